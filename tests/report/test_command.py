"""`foreroute replay` from end to end: on traces made by hand, and on one that the engine wrote."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.harness import NUM_EXPERTS, NUM_LAYERS, TOP_K, save_model
from tests.report.traces import routed, write

ROUTE = [[[0, 1], [2, 3]], [[1, 2], [0, 3]], [[0, 3], [0, 1]], [[2, 3], [1, 2]], [[0, 1], [2, 3]]] * 5


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """A model, a trace of it, and what generate said of the run."""
    import contextlib
    import io

    from foreroute.cli.main import main

    folder = tmp_path_factory.mktemp("traced")
    save_model(folder / "model")
    trace, said = folder / "run.jsonl", io.StringIO()
    asked = ["generate", folder / "model", "Once upon a time", "--max-new-tokens", "40", "--memory", "40%", "--trace",
             trace, "--threads", "1", "--json"]  # fmt: skip
    with contextlib.redirect_stdout(said):
        assert main([str(one) for one in asked]) == 0
    return folder / "model", trace, json.loads(said.getvalue())


def test_the_recorded_row_is_what_the_engine_counted(traced, run) -> None:
    model, trace, said = traced
    ran = run("replay", trace, "--model", model, "--warm-up", "0", "--json")
    assert ran.code == 0, ran.err
    figures, recorded = said["figures"], ran.json["recorded"]
    assert recorded["tokens"] == 39
    for ours, theirs in (("hits", "hits"), ("late_hits", "late_hits"), ("misses", "misses")):
        assert recorded[ours] == figures[theirs]
    assert recorded["hits"] + recorded["late_hits"] + recorded["misses"] == 39 * NUM_LAYERS * TOP_K
    assert recorded["demand_bytes"] == pytest.approx(1e6 * figures["demand_mb_per_token"])
    assert recorded["prefetch_bytes"] == pytest.approx(1e6 * figures["prefetch_mb_per_token"], rel=0.02)
    # From a step's begin to the next one's: all of a token's time but what lies after the last step's layers.
    assert 0.75 * figures["tpot_ms"] < ran.json["timing"]["tpot_ms"] <= 1.001 * figures["tpot_ms"]
    assert ran.json["timing"]["stall_ms"] == pytest.approx(figures["stall_ms_per_token"], rel=0.01, abs=0.01)
    assert recorded["num_slots"] == int(0.4 * NUM_LAYERS * NUM_EXPERTS)
    budgets = {round(budget["share"], 2): budget for budget in ran.json["budgets"]}
    for budget in budgets.values():
        fewest = budget["policies"]["belady"]["misses_per_token"]
        assert all(policy["misses_per_token"] >= fewest for policy in budget["policies"].values())
    assert budgets[0.25]["policies"]["lru"]["misses_per_token"] > budgets[0.75]["policies"]["lru"]["misses_per_token"]
    prefetches = ran.json["prefetches"]
    assert prefetches["in_time"] + prefetches["late_hits"] + prefetches["later"] > 0
    assert prefetches["late_hits"] == figures["late_hits"]


def test_tables_say_what_was_asked(traced, run) -> None:
    _, trace, _ = traced
    ran = run("replay", trace, "--memory", "30%", "75%", "--bandwidth", "2GB/s")
    assert ran.code == 0, ran.err
    words = " ".join(ran.out.split())
    recorded = f"{100 * int(0.4 * 64) / 64:.1f} % of the experts"
    for text in ("29.7 % of the experts", recorded, "75.0 %", "belady", "recorded", "2.00 GB/s as given"):
        assert text in words
    assert max(map(len, ran.out.splitlines())) <= 80


def test_pictures_and_a_page_that_needs_nothing_else(tmp_path: Path, run) -> None:
    trace = routed(tmp_path / "run.jsonl", ROUTE, model="<script>alert(1)</script>")
    out = tmp_path / "report"
    ran = run("replay", trace, "--out", out, "--token", "3", "--json")
    assert ran.code == 0, ran.err
    names = {"index.html", "timeline.png", "residency.png", "layers.png"}
    assert {path.name for path in out.iterdir()} == names
    assert {Path(path).name for path in ran.json["written"]} == names
    for name in names - {"index.html"}:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / "index.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "Decode step 3," in page
    assert '<meta name="viewport"' in page


def test_a_trace_for_perfetto(tmp_path: Path, run) -> None:
    trace = routed(tmp_path / "run.jsonl", ROUTE)
    ran = run("replay", trace, "--chrome", tmp_path / "run.json", "--json")
    assert ran.code == 0, ran.err
    events = json.loads((tmp_path / "run.json").read_text())
    spans = [event for event in events if event["ph"] == "X"]
    # A step has two layers, each with a stall and two loads.
    assert len(spans) == len(ROUTE) * 2 * 4
    assert run("replay", trace, "--chrome", tmp_path / "run.txt").code == 2
    assert json.loads(trace.read_text().splitlines()[0])["event"] == "header"


def test_half_a_trace_with_and_without_partial(tmp_path: Path, run) -> None:
    trace = routed(tmp_path / "run.jsonl", ROUTE)
    text = trace.read_text()
    trace.write_text(text[: len(text) * 2 // 3])
    ran = run("replay", trace)
    assert ran.code == 2
    assert "was cut off" in ran.err
    ran = run("replay", trace, "--partial", "--chrome", tmp_path / "run.json")
    assert ran.code == 0, ran.err
    assert "The trace was cut off: its 16 whole steps are used." in " ".join(ran.out.split())
    assert json.loads((tmp_path / "run.json").read_text())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--memory", "10%"], "holds 0 slots; one token needs 4. Raise --memory to 4.0 KiB"),
        (["--memory", "much"], "'much' is not an amount of memory"),
        (["--bandwidth", "fast"], "--bandwidth 'fast' is not a speed"),
        (["--bandwidth", "100%"], "--bandwidth '100%' is not a speed"),
        (["--warm-up", "25"], "a warm-up of 25 leaves none to count"),
        (["--token", "25"], "--token 25: the trace has 25 decode steps, counted from 0"),
        (["--out", "run.jsonl"], "is a file. Choose a folder"),
        (["--out", "no/such/folder"], "is not a writable folder"),
        (["--chrome", "run.jsonl"], "choose another name, one that ends in .json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_named(tmp_path: Path, run, monkeypatch, flags: list[str], complaint: str) -> None:
    monkeypatch.chdir(tmp_path)
    routed(tmp_path / "run.jsonl", ROUTE)
    ran = run("replay", "run.jsonl", *flags)
    assert ran.code == 2
    assert complaint in ran.err


def test_a_trace_of_another_model_is_refused(traced, run, tmp_path: Path) -> None:
    model, trace, _ = traced
    head, *rest = trace.read_text().splitlines()
    other = write(tmp_path / "other.jsonl", json.loads(head) | {"fingerprint": "f" * 32, "model": "another"})
    other.write_text(other.read_text() + "\n".join(rest) + "\n")
    ran = run("replay", other, "--model", model)
    assert ran.code == 2
    assert "is a trace of another model: it says another (ffffffff)" in ran.err
