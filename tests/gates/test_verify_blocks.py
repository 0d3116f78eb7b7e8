"""`foreroute verify` where ggml's kernels multiply: equal bits are proven, and planted faults are found and named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.cli.main import main
from foreroute.engine.moe_step import MoeStep
from foreroute.kernels.ggml.decoder.layer import _After
from foreroute.kernels.ggml.form import BlockForm
from foreroute.kernels.ggml.library import open_library
from foreroute.kernels.ggml.linear import BlockLinear
from foreroute.loading import checkpoint
from foreroute.verification.distance import MOST_KL, distance
from tests.formats.gguf_writer import Kind, Written, write_gguf
from tests.support.runs import expert_table

LAYER = 1


@pytest.fixture(scope="module")
def made(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Q4_0, whose blocks are as long as those of IQ4_NL, which mean other numbers."""
    return write_gguf(tmp_path_factory.mktemp("verified"), "gpt-oss", Kind.Q4_0, dense=Kind.Q8_0)


@pytest.fixture
def verified(capfd: pytest.CaptureFixture[str], made: Written, tmp_path: Path) -> Callable[..., Any]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The ship came into the harbour.\n1 + 1 =\n")

    def run(*flags: str, expect: int = 0) -> Any:
        threads = torch.get_num_threads()
        asked = ["--prompts", str(prompts), "--tokens", "8", "--threads", "1", *flags]
        code = main(["verify", str(made.path), *asked])
        torch.set_num_threads(threads)
        out, err = capfd.readouterr()
        assert code == expect, out + err
        return json.loads(out) if "--json" in flags else out

    return run


def test_resident_and_on_demand(verified: Any) -> None:
    for kind in ("resident", "on-demand"):
        answer = verified("--reference", kind, "--json")
        assert (answer["same"], answer["reference"], answer["plan"]["math"]) == (True, kind, "ggml")
        assert answer["evictions"] > 0
        assert answer["prefetch_used"] > 0
        apart = answer["beside_torch"]
        assert apart["steps"] == 16
        assert 0 < apart["median_kl"] < MOST_KL
        assert apart["same_top"] >= 12
    assert verified("--beside-torch", "0", "--json")["beside_torch"] is None


def test_it_says_what_it_proves(verified: Any) -> None:
    said = verified()
    assert "the same kernels, all experts in" in said
    assert "Exact mode gives what the same kernels give with every expert in memory." in said
    assert "beside torch" in said
    said = verified("--math", "torch")
    assert "beside torch" not in said
    assert "Cache, eviction, prefetches and packed store change nothing" in said


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[BlockForm], BlockForm], *, everywhere: bool) -> None:
    """Layer LAYER is computed by a form with this fault, in the verified model or in the reference too."""
    forms_of_layers = checkpoint.forms_of_layers
    loads = 0

    def faulty(*args: Any) -> tuple[list[BlockForm | None], str]:
        nonlocal loads
        loads += 1
        forms, reason = forms_of_layers(*args)
        form = forms[LAYER]
        # To plan, then the reference, then the model.
        if form is not None and (everywhere or loads > 2):
            forms[LAYER] = fault(form)
        return forms, reason

    monkeypatch.setattr(checkpoint, "forms_of_layers", faulty)


def other_stride(form: BlockForm) -> BlockForm:
    return replace(form, down=replace(form.down, row_stride=form.down.row_stride - form.down.kind.nbytes))


def other_type(form: BlockForm) -> BlockForm:
    kind = open_library().types["IQ4_NL"]
    assert kind.nbytes == form.down.kind.nbytes
    return replace(form, down=replace(form.down, kind=kind))


@pytest.mark.parametrize("fault", [other_stride, other_type])
def test_a_wrong_stride_and_a_wrong_type(fault: Any, verified: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, fault, everywhere=False)
    answer = verified("--json", expect=1)
    first = answer["first_difference"]
    assert (first["part"], first["moe_layer"], first["step"]) == ("experts", LAYER, 1)
    assert not answer["same"]


def test_a_fault_of_all_models_is_far_from_torch(verified: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same wrong bits everywhere: what only a second kind of math can see."""
    plant(monkeypatch, other_type, everywhere=True)
    answer = verified("--json", expect=1)
    assert answer["same"]
    assert answer["beside_torch"]["median_kl"] > MOST_KL
    assert "torch's math gives other distributions" in verified(expect=1).replace("\n", " ")


def test_a_swapped_slot_is_named(verified: Any, made: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool hands out, once, another expert's slot."""
    compute, swapped, width = MoeStep._compute_pinned, list[int](), expert_table(made.path).num_experts
    base = LAYER * width

    def swapping(step: MoeStep, layer: int, *args: Any) -> Any:
        begin = step.kernels[layer].begin

        def other_begin(*given: Any) -> Any:
            total = begin(*given)
            add = total.add

            def other_add(experts: Any) -> None:
                ready = [key for key in step.pool.by_layer[layer].ready_keys() if base <= key < base + width]
                others = [step.pool.residency.slot_of(key) for key in ready] + [slot for _, slot in experts[1:]]
                if others and not swapped:
                    swapped.append(experts[0][0] - base)
                    experts = [(experts[0][0], others[0]), *experts[1:]]
                add(experts)

            total.add = other_add
            return total

        if layer == LAYER and not step.is_prefill and step.pool.stats.decode.prefetch_loads:
            monkeypatch.setattr(step.kernels[layer], "begin", other_begin, raising=False)
            try:
                return compute(step, layer, *args)
            finally:
                monkeypatch.delattr(step.kernels[layer], "begin")
        return compute(step, layer, *args)

    monkeypatch.setattr(MoeStep, "_compute_pinned", swapping)
    first = verified("--json", expect=1)["first_difference"]
    assert (first["part"], first["moe_layer"]) == ("experts", LAYER)
    assert swapped[0] in first["experts"]
    assert any("slot that was loaded for" in reason for reason in first["reasons"])


def test_a_dense_matrix_with_other_blocks_is_named(verified: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, make = 0, BlockLinear.__init__

    def making(self: BlockLinear, matrix: Any, *args: Any) -> None:
        nonlocal loads
        make(self, matrix, *args)
        loads += 1
        # The last model's: its layers come after those of the two that are loaded before.
        if loads == NUM_LINEAR * 2 + 6:
            matrix.blocks[0, 5] ^= 1

    monkeypatch.setattr(BlockLinear, "__init__", making)
    first = verified("--json", expect=1)["first_difference"]
    assert first["tensors"] == ["model.layers.1.self_attn.k_proj.weight"]


# q, k, v, o of four layers, and the head.
NUM_LINEAR = 17


def test_distance() -> None:
    rows = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 5.0]), torch.tensor([2.0, 0.0, 0.0])]
    same = distance(rows, rows)
    assert (same.steps, same.same_top, same.median_kl, same.worst_kl) == (3, 3, 0.0, 0.0)
    far = distance(rows, [rows[0], rows[1], rows[2].flip(0)])
    assert far.same_top == 2
    assert far.median_kl == 0
    assert far.worst_kl == pytest.approx(1.357, rel=0.01)
    assert far.agrees


def test_a_choice_of_a_graph_is_looked_at(verified: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs choose experts in every ordinary step, and in those that are compared: in all models alike, so that only
    torch's numbers tell."""
    own = _After.chosen
    monkeypatch.setattr(_After, "chosen", lambda self: torch.arange(self._chosen[1])[None].expand_as(own(self)))
    answer = verified("--json", expect=1)
    assert answer["same"]
    assert answer["beside_torch"]["median_kl"] > MOST_KL
