"""`foreroute plan`: the forecast's arithmetic, what is measured, what is advised, and how it is shown."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import foreroute
from foreroute.bench.bandwidth import measure_bandwidth
from foreroute.cli import options
from foreroute.cli.commands import plan as plan_command
from foreroute.cli.forecast import forecast
from foreroute.cli.probes import ComputeTime, measure_compute
from foreroute.errors import BudgetError, ReadError
from foreroute.loading.wording import as_flags
from foreroute.memory import host
from foreroute.memory.host import Ram
from foreroute.memory.serving import kv_bytes_per_token, planned_kv_bytes_per_token
from foreroute.types import Copy, Read
from tests.cli.harness import NUM_EXPERTS, NUM_LAYERS, TOP_K

EXPERT_BYTES = 3 * 64 * 64 * 4


@pytest.fixture(scope="module")
def found(tiny: Path) -> plan_command.Findings:
    """What `plan` finds out with room for a quarter of the experts."""
    from foreroute.cli.main import build_parser

    args = build_parser().parse_args(["plan", str(tiny), "--memory", "25%"])
    return plan_command.find(tiny, args, options.engine_config(args))


def test_a_forecast_is_misses_times_bytes_and_compute() -> None:
    best, likely, worst = forecast(0.25, 100, 10**6, 10**9, compute_ms=20.0)
    assert likely.miss_rate == pytest.approx(0.548)  # LFU with a quarter resident
    assert likely.misses_per_token == pytest.approx(54.8)
    assert likely.read_mb_per_token == pytest.approx(54.8)
    assert (likely.tpot_ms_low, likely.tpot_ms_high) == (pytest.approx(54.8), pytest.approx(74.8))
    assert (best.tpot_ms_low, best.tpot_ms_high) == (pytest.approx(32.9), pytest.approx(52.9))
    assert (worst.tpot_ms_low, worst.tpot_ms_high) == (100.0, 120.0)


def test_a_forecast_between_the_measured_shares_is_on_the_line() -> None:
    _, at_three_eighths, _ = forecast(0.375, 1, 1, 1, 0.0)
    assert at_three_eighths.miss_rate == pytest.approx((0.548 + 0.273) / 2)
    assert forecast(0.25, 1, 1, 1, 0.0, "lru")[1].miss_rate == pytest.approx(0.612)


def test_everything_resident_reads_nothing() -> None:
    for case in forecast(1.0, 100, 10**6, 10**9, 20.0):
        assert (case.read_mb_per_token, case.tpot_ms_low, case.tpot_ms_high) == (0.0, 20.0, 20.0)


def test_nothing_kept_is_always_missing() -> None:
    assert {case.miss_rate for case in forecast(0.0, 8, 1, 1, 1.0)} == {1.0}


def test_bandwidth_counts_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "experts"
    path.write_bytes(bytes(8 * 8192))

    def reads_of(key: int) -> tuple[Read, ...]:
        return (Read(str(path), key * 8192, 8000, (Copy(0, 0, 1, 8000, 1, 8000, 1),)),)

    measured = measure_bandwidth(reads_of, range(8), 8192, seconds=0.05, num_threads=2)
    assert measured.num_experts == measured.num_reads > 8
    assert measured.bytes_per_s == pytest.approx(measured.num_experts * 8000 / measured.elapsed_s)
    assert measured.expert_ms > 0
    assert measured.is_direct
    buffered = measure_bandwidth(reads_of, [3], 8192, seconds=0.01, direct=False)
    assert not buffered.is_direct
    path.write_bytes(b"")
    with pytest.raises(ReadError):
        measure_bandwidth(reads_of, range(8), 8192, seconds=0.05)


def test_what_is_found_is_what_the_model_has(found) -> None:
    assert found.plan.num_slots == NUM_LAYERS * NUM_EXPERTS // 4
    assert found.plan.token_demand_bytes == NUM_LAYERS * TOP_K * EXPERT_BYTES
    assert found.kv_bytes_per_token == 2 * NUM_LAYERS * 2 * 16 * 4  # keys and values, 2 heads of 16, float32
    assert found.bandwidth.num_experts > 0
    assert found.compute.ms > 0
    assert [case.name for case in found.cases] == ["best", "likely", "worst"]


def test_advice_names_the_memory_that_holds_everything_and_the_pack(found) -> None:
    text = "\n".join(plan_command.advice(found, "MODEL"))
    assert "--memory 3.0MiB would hold every expert" in text
    assert "foreroute pack MODEL" in text
    assert "swap" not in text


def test_advice_for_other_machines(found) -> None:
    demand = found.plan.token_demand_slots
    small = replace(found, plan=replace(found.plan, num_slots=demand + demand // 2))
    assert "holds only 1.5 tokens' demand: expect few hits. --memory 768.0KiB holds two." in "\n".join(
        plan_command.advice(small, "MODEL")
    )
    much = replace(found.plan, memory_bytes=8 * 2**30, num_slots=found.plan.total_slots)
    assert plan_command.advice(replace(found, plan=much), "MODEL") == [], "more than all experts is never allocated"
    poor = replace(found, chosen_memory_bytes=500_000)
    assert "may swap" in plan_command.advice(poor, "MODEL")[0]
    assert "has room for" in plan_command.advice(poor, "MODEL")[1]
    cached = replace(found, bandwidth=replace(found.bandwidth, is_direct=False))
    assert any("page cache" in hint for hint in plan_command.advice(cached, "MODEL"))
    whole = replace(found, plan=replace(found.plan, num_slots=found.plan.total_slots))
    assert plan_command.advice(whole, "MODEL") == []


def test_the_plan_fits_a_terminal(run, tiny: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = run("plan", tiny, "--memory", "25%", "--threads", "1")
    assert (ran.code, ran.err) == (0, "")
    lines = [line.rstrip() for line in ran.out.splitlines()]
    assert max(map(len, lines)) <= 80
    for said in ("4 MoE layers x 16 experts, top-2", "16 slots, 25.0 % of the experts", "2.0 tokens' demand",
                 "O_DIRECT", "best: Belady", "likely: LFU", "worst: no hits", "What would change it:"):  # fmt: skip
        assert said in ran.out
    # A row that wraps would start with blanks.
    assert not any(line.startswith("    ") for line in lines[: lines.index("It assumes:")])


def test_plan_as_json(run, tiny: Path) -> None:
    ran = run("plan", tiny, "--threads", "1", "--json")
    assert (ran.code, ran.err) == (0, "")
    plan = ran.json
    assert plan["serving"] is None
    assert set(plan) == {"plan", "serving", "measured", "forecast", "advice", "assumptions"}
    assert plan["plan"]["memory_was_chosen"]
    assert plan["plan"]["resident_share"] == 1.0
    assert plan["plan"]["kv_bytes_per_1k_tokens"] == 1_024_000
    assert plan["measured"]["disk"]["bytes_per_s"] > 0
    assert plan["forecast"]["likely"]["tpot_ms_low"] == plan["measured"]["compute_ms"]
    assert plan["advice"] == []


def test_a_plan_for_requests_counts_their_memory(tiny: Path, monkeypatch, capsys) -> None:
    """Room for two requests of 512 tokens: what is free beside it goes to experts, and the total is the sum."""
    from foreroute.cli.main import build_parser

    def planned(*flags: str) -> plan_command.Findings:
        args = build_parser().parse_args(["plan", str(tiny), "--max-num-seqs", "2", "--ctx-size", "512", *flags])
        with as_flags():  # as the command line runs it
            return plan_command.find(tiny, args, options.engine_config(args))

    found = planned()
    needs = found.serving
    assert needs is not None
    assert (needs.kv_tokens, found.context) == (1024, 512)
    assert needs.kv_bytes == needs.kept_bytes == 1024 * found.kv_bytes_per_token > 0
    assert needs.expert_bytes == found.plan.num_slots * found.plan.slot_bytes
    parts = needs.dense_bytes + needs.expert_bytes + needs.kv_bytes + needs.kept_bytes + needs.all_working_bytes
    assert plan_command.as_json(found)["serving"]["total_bytes"] == parts
    rows = {row[0]: row for row in plan_command._memory_rows(found)}
    assert rows["requests"][2] == "of KV cache: 1,024 tokens, of one 512"
    assert "of RAM" in rows["in all"][2]
    # With a little more RAM than the reserve, each byte for keys and values is one less for experts.
    assert needs.tokens_bytes == 2 * needs.kv_bytes + 1024 * needs.working_bytes_per_token
    free = 2**31 + needs.dense_bytes + needs.tokens_bytes + 2**21
    monkeypatch.setattr(host, "ram", lambda: Ram(2**40, free, None))
    tight = planned()
    assert tight.plan.memory_bytes == tight.chosen_memory_bytes == 2**21
    with pytest.raises(BudgetError, match=r"Lower --kv-tokens to \d+"):
        planned("--kv-tokens", "8192")
    with pytest.raises(BudgetError, match=r"may have 512 tokens.*--kv-tokens 100 has"):
        planned("--kv-tokens", "100")


def test_too_little_memory_says_what_would_do(run, tiny: Path) -> None:
    ran = run("plan", tiny, "--memory", "1%")
    assert ran.code == 2
    assert "Raise --memory to 384.0 KiB" in ran.err


def test_a_plan_for_a_gpu_speaks_of_its_memory_and_the_link(found, capsys) -> None:
    plan = replace(found.plan, device="cuda:0", host_records=found.plan.total_slots, memory_was_chosen=True)
    on_gpu = replace(found, plan=plan)
    rows = {row[0]: row for row in (*plan_command._model_rows(on_gpu), *plan_command._speed_rows(on_gpu))}
    assert rows["dense weights"][2] == "always on the GPU, beside --memory"
    assert "from pinned host memory" in rows["link"][2]
    assert "disk" not in rows
    assert "chosen from the GPU's free memory" in plan_command._memory_rows(on_gpu)[0][2]
    assert plan_command.advice(on_gpu, "MODEL") == []
    small = replace(on_gpu, plan=replace(plan, num_slots=plan.token_demand_slots, host_records=10))
    text = "\n".join(plan_command.advice(small, "MODEL"))
    assert "Host memory holds 10 of" in text
    assert "--host-memory 3.0MiB would hold all" in text
    assert "less than two tokens' demand" in text


def test_threads_that_have_no_processor_are_told_of(found) -> None:
    """In Python they stay as they are, and so they do where the user has said how many."""
    plan = replace(found.plan, threads=8, usable_cpus=2)
    (hint,) = [hint for hint in plan_command.advice(replace(found, plan=plan), "MODEL") if "threads" in hint]
    assert "torch has 8 threads" in hint
    assert "--threads 2" in hint
    plan = replace(found.plan, threads=2, usable_cpus=2)
    assert not [hint for hint in plan_command.advice(replace(found, plan=plan), "MODEL") if "threads" in hint]
    assert plan_command.as_json(found)["plan"]["threads"] == found.plan.threads == torch.get_num_threads()
    rows = {row[0]: row for row in plan_command._speed_rows(replace(found, plan=plan))}
    assert rows["compute"][2].endswith("2 threads")


# The limit of time.

LIMIT_S = 3.0


class SlowLayers:
    """A model's MoE layers, each of which takes `layer_s` by a clock that the engine has too."""

    def __init__(self, model: Any, layer_s: float) -> None:
        self.now_s = self.num_computed = 0.0
        model.foreroute.engine.pool.clock = self.clock
        for layer in model.foreroute.layers:
            layer.experts.engine_forward = self._slow(layer.experts.engine_forward, layer_s)

    def clock(self) -> float:
        """Seconds."""
        return self.now_s

    def _slow(self, forward: Any, layer_s: float) -> Any:
        def slow(*args: Any) -> torch.Tensor:
            self.now_s += layer_s
            self.num_computed += 1
            result: torch.Tensor = forward(*args)
            return result

        return slow


@pytest.mark.parametrize(
    ("layer_s", "ms", "passes", "layers", "computed"),
    [
        (0.01, 40, 7, NUM_LAYERS, 9 * NUM_LAYERS),
        (0.25, 1000, 1, NUM_LAYERS, 3 * NUM_LAYERS),  # two to warm up, one that is timed
        (0.5, 2000, 1, NUM_LAYERS, NUM_LAYERS + 2),  # the second one is cut
        (2.0, 8000, 0, 2, 2),
        (60.0, 240_000, 0, 1, 1),
    ],
)
def test_no_layer_is_begun_after_the_limit(
    tiny: Path, layer_s: float, ms: float, passes: int, layers: int, computed: int
) -> None:
    model = foreroute.load(tiny, "50%")
    slow = SlowLayers(model, layer_s)
    measured = measure_compute(model, limit_s=LIMIT_S, clock=slow.clock)
    assert (measured.num_passes, measured.num_layers, slow.num_computed) == (passes, layers, computed)
    assert measured.ms == pytest.approx(ms)
    model.foreroute.close()


def test_a_model_whose_pass_was_cut_computes_on(tiny: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    model, other = foreroute.load(tiny, "50%"), foreroute.load(tiny, "50%")
    forwards = [layer.experts.engine_forward for layer in model.foreroute.layers]
    measure_compute(model, limit_s=LIMIT_S, clock=SlowLayers(model, 2.0).clock)
    for layer, forward in zip(model.foreroute.layers, forwards, strict=True):
        layer.experts.engine_forward = forward
    assert torch.equal(model(ids).logits, other(ids).logits)
    model.foreroute.close()
    other.foreroute.close()


def test_the_cache_is_measured_without_experts(tiny: Path) -> None:
    """Two more forward passes would take as long as two tokens."""
    model = foreroute.load(tiny, "50%")
    expected = kv_bytes_per_token(model)
    slow = SlowLayers(model, 1.0)
    assert planned_kv_bytes_per_token(model, model.foreroute.plan, model.foreroute.layers) == expected > 0
    assert slow.num_computed == 0
    kv_bytes_per_token(model)
    assert slow.num_computed == 2 * NUM_LAYERS, "and experts are computed again afterwards"
    model.foreroute.close()


def test_what_is_extrapolated_is_said(found, capsys) -> None:
    plan_command.show(replace(found, compute=ComputeTime(8000.0, 0, 2)), [])
    text = capsys.readouterr().out
    assert f"from 2 of {NUM_LAYERS} layers, measured" in text
    assert "measured: one token" not in text
    measured = plan_command.as_json(replace(found, compute=ComputeTime(8000.0, 0, 2)))["measured"]
    assert (measured["compute_ms"], measured["compute_passes"], measured["compute_layers"]) == (8000.0, 0, 2)
    plan_command.show(found, [])
    assert "measured: one token, its experts in memory" in capsys.readouterr().out
