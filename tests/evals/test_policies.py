"""`foreroute eval --policies`: rows that can be believed, repeated, and gone on with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.checkpoint.locate import read_index
from foreroute.cli.commands import demo
from foreroute.cli.main import main
from foreroute.evals.policies import mean_accuracy
from foreroute.evals.pricing import Divergence, pareto
from foreroute.evals.text import HeldOut
from foreroute.prepare.corpus import Corpus
from foreroute.prepare.fit import FitSettings, fit

ROOT = Path(__file__).parents[2]
KEYS = {
    "policy", "tau", "memory", "delta_nats", "agreement", "bytes_per_token", "stalled_layers", "waited_misses",
    "accuracy", "tpot_ms",
}  # fmt: skip


@pytest.fixture(scope="module")
def sidecar(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's predictors, fitted to its own README."""
    import foreroute
    from foreroute.model.text import load_tokenizer

    folder, path = demo.find_model(), tmp_path_factory.mktemp("fitted") / "tiny.safetensors"
    model = foreroute.load(folder, "100%", config=foreroute.EngineConfig(predictor="no"))
    ids = load_tokenizer(folder)((ROOT / "README.md").read_text(), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
    fit(model, read_index(folder).fingerprint(), Corpus(windows, "readme"), path, settings=FitSettings())
    model.foreroute.close()
    return path


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.json"
    HeldOut({"log": (ROOT / "docs/LOG.md").read_text()}, {"log": 1.0}, {"walking": "the act of walking"}).write(path)
    return path


@pytest.fixture
def run(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sidecar: Path
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run_command(*args: object) -> tuple[int, str, str]:
        code = main(["eval", str(demo.find_model()), "--threads", "1", "--predictor", str(sidecar), *map(str, args)])
        return (code, *capfd.readouterr())

    return run_command


def suite(held_out: Path) -> tuple[object, ...]:
    return ("--suite", "builtin", "--held-out", held_out, "--per-kind", 2, "--kinds", "add", "calendar", "--windows", 2,
            "--context", 48, "--deterministic")  # fmt: skip


def test_the_rows(run, held_out: Path, tmp_path: Path) -> None:
    policies = ("--policies", "exact", "tolerance:0.1", "speculative", "paper", "--memory", "none", "25%")
    code, out, err = run(*suite(held_out), *policies, "--json", "--png", tmp_path / "prices.png")
    assert code == 0, err
    rows = json.loads(out)
    assert [(row["policy"], row["tau"], row["memory"]) for row in rows] == [
        (policy, tau, memory)
        for memory in ("none", "25%")
        for policy, tau in (("exact", 0), ("tolerance", 0.1), ("speculative", 0), ("paper", 0))
    ]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["accuracy"].keys() == row["interval"].keys() == {"add", "calendar"}
        assert row["tpot_ms"] is None
        assert row["bytes_per_token"] > 0
        assert 0 <= row["stalled_layers"] <= 1
    exact, tolerant, speculative, paper = rows[:4]
    for row in (exact, rows[4]):
        # Whatever is resident: exact is what it is compared with.
        assert (row["delta_nats"], row["kl"], row["agreement"], row["waited_misses"]) == (0, 0, 1, 1)
    assert exact["accuracy"] == rows[4]["accuracy"]
    assert exact["stalled_layers"] > tolerant["stalled_layers"] > speculative["stalled_layers"] > 0
    assert exact["bytes_per_token"] > tolerant["bytes_per_token"] > speculative["bytes_per_token"]
    assert speculative["waited_misses"] == 0 < tolerant["waited_misses"] < 1
    assert 0 < tolerant["kl"] < speculative["kl"] < paper["kl"]
    # With a cache likewise, and fewer bytes.
    assert 0 < rows[5]["kl"] < rows[6]["kl"] < rows[7]["kl"]
    assert rows[6]["bytes_per_token"] < speculative["bytes_per_token"]
    assert rows[4]["stalled_layers"] > rows[6]["stalled_layers"] > 0 == rows[6]["waited_misses"]
    assert (tmp_path / "prices.png").read_bytes().startswith(b"\x89PNG")


def test_two_deterministic_runs_are_equal(run, held_out: Path) -> None:
    asked = (*suite(held_out), "--policies", "speculative", "tolerance:0.2", "--memory", "25%", "--json")
    first, second = (run(*asked)[1] for _ in range(2))
    assert json.loads(first)
    assert first == second


def test_a_run_that_was_stopped_goes_on(run, held_out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from foreroute.evals import policies

    asked = (*suite(held_out), "--policies", "exact", "speculative", "--memory", "none", "25%", "--json")
    whole = json.loads(run(*asked)[1])
    assert not list((tmp_path / "cache").rglob("eval*")), "what is shown is not kept"
    computed: list[str] = []
    head = policies._Row._head

    def stopping(self: Any) -> dict[str, Any]:
        computed.append(self.name)
        if len(computed) == 4:
            raise KeyboardInterrupt
        return head(self)

    monkeypatch.setattr(policies._Row, "_head", stopping)
    assert run(*asked)[0] == 130
    (kept,) = (tmp_path / "cache").rglob("eval*.json")
    assert len(json.loads(kept.read_text())["rows"]) == 3
    code, out, err = run(*asked)
    assert code == 0
    assert "Going on after 3 of 4 rows" in err
    assert computed == ["exact at none", "speculative at none", "exact at 25%", *["speculative at 25%"] * 2]
    assert json.loads(out) == whole
    # Other settings are another run.
    assert run(*asked, "--seed", 1)[0] == 0
    assert len(computed) == 9


def test_text_alone_and_time(run) -> None:
    code, out, err = run("--text", ROOT / "README.md", "--windows", 1, "--context", 32, "--policies", "speculative",
                         "--memory", "50%", "--json")  # fmt: skip
    assert code == 0, err
    (row,) = json.loads(out)
    assert row["tpot_ms"] > 0
    assert row["accuracy"] == {}
    assert row["scored_tokens"] == 28
    code, out, err = run("--text", ROOT / "README.md", "--windows", 1, "--context", 32, "--policies", "exact")
    assert code == 0, err
    assert "stall %" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "25%" in out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--policies", "tolerance:2"), "from 0 to 1"),
        (("--policies", "fast"), "Choose exact"),
        (("--policies", "speculative", "--predictor", "no"), "foreroute fit"),
        (("--policies", "exact", "--memory", "none", "--predictor", "no"), "needs fitted predictors"),
        (("--policy", "paper"), "--policies paper"),
        (("--policies", "exact", "--memory", "1KiB"), "Raise --memory"),
        (("--memory", "25%", "50%"), "belong to --policies"),
        (("--memory", "none"), "belong to --policies"),
        (("--png", "prices.png"), "--png belongs to --policies"),
        (("--limit", "3"), "--limit belongs to"),
        (("--include-path", "."), "--include-path belongs to"),
        (("--confirm-run-unsafe-code",), "--confirm-run-unsafe-code belongs to"),
        (("--policies", "exact", "--png", "/no/such/folder/a.png"), "not a folder"),
    ],
)
def test_what_cannot_be_is_said_before_any_row(run, flags, says, monkeypatch: pytest.MonkeyPatch) -> None:
    from foreroute.evals import policies

    monkeypatch.setattr(policies._Row, "_head", lambda self: pytest.fail("a row was begun"))
    flags = [str(flag) for flag in flags]
    code, _, err = run("--text", ROOT / "README.md", "--context", 32, *flags)
    assert code == 2
    assert says in err


def test_no_items_are_named(run, held_out: Path) -> None:
    code, _, err = run(
        "--suite", "builtin", "--held-out", held_out, "--per-kind", 0, "--windows", 0, "--policies", "exact"
    )
    assert code == 2
    assert "nothing to evaluate on" in err
    code, _, err = run("--human-eval")
    assert code == 2
    assert "--confirm-run-unsafe-code" in err


def test_the_difference_of_two_distributions() -> None:
    exact = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    ours = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    difference = Divergence(chars=2)
    difference.add(ours, exact, torch.tensor([0, 0]))
    log_p, log_q = torch.log_softmax(exact, -1).double(), torch.log_softmax(ours, -1).double()
    found = difference.figures()
    assert found["delta_nats"] == pytest.approx(float(log_p[1, 0] - log_q[1, 0]) / 2, abs=1e-6)
    assert found["kl"] == pytest.approx(float((log_p[1].exp() * (log_p[1] - log_q[1])).sum()) / 2, abs=1e-6)
    assert found["agreement"] == 0.5
    assert found["moved_by_0.1"] == found["moved_by_1"] == 0.5
    assert found["bits_per_char"] == pytest.approx(-float(log_q[:, 0].sum()) / 2 / 0.6931472, abs=1e-5)


def test_what_nothing_beats() -> None:
    assert pareto([(3, 0.0), (1, 5.0), (2, 6.0), (2, 1.0)]) == [(1, 5.0), (2, 1.0), (3, 0.0)]


def test_the_mean_over_tasks() -> None:
    assert mean_accuracy({"accuracy": {"a": 1.0, "b": 0.5}}) == 0.75
    assert mean_accuracy({"accuracy": {}}) is None
