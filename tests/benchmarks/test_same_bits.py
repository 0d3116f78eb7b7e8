"""Cells name what is compared, memory is the share that they say, and a loss reads as one."""

import argparse
import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import same_bits
from tests.benchmarks.test_peers import run_of

CONFIG = {
    "hidden_size": 1024,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of 0.1875 GiB of experts and 1 GiB of dense weights, in sparse files; its q4_0 store has 10 GiB."""
    folder = tmp_path / "synth"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for path, gib in ((folder / "a.safetensors", 1.1875), (tmp_path / "synth.q4_0.foreroute", 10)):
        with path.open("wb") as file:
            file.truncate(int(gib * 2**30))
    return folder


def cell_of(model: Path, name: str) -> same_bits.Cell:
    return next(cell for cell in same_bits.all_cells(model) if cell.name == name)


def test_memory_is_the_share_and_the_ballast_leaves_the_rest_too(model: Path) -> None:
    memory, left = same_bits.memory_of(cell_of(model, "q4_0-50"), model, allowance=0.75)
    assert memory == 5
    assert left == 5 + 1 + 0.75


def test_never_less_than_three_gib_are_left(model: Path) -> None:
    memory, left = same_bits.memory_of(cell_of(model, "accelerate-25"), model, allowance=0.75)
    assert memory == 0.1875 / 4
    assert left == 3


def test_what_is_missing_is_named_before_anything_runs(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert same_bits.missing_files(cell_of(model, "q4_0-25")) == [f"{model}-q4_0.gguf"]
    assert same_bits.missing_files(cell_of(model, "accelerate-25")) == []
    monkeypatch.setattr("sys.argv", ["same_bits", str(model), "--cells", "q4_0-25,accelerate-25"])
    with pytest.raises(SystemExit, match=r"synth-q4_0\.gguf"):
        same_bits.main()
    monkeypatch.setattr("sys.argv", ["same_bits", str(model), "--cells", "int3-25"])
    with pytest.raises(SystemExit, match="int3-25"):
        same_bits.main()


def runs_of(ours_s: float, theirs_s: float) -> list[dict[str, Any]]:
    names = ("foreroute:packed=/a/b.q4_0.foreroute", "llama.cpp:gguf=/a/b.gguf")
    return [
        run_of(ours_s, engine=names[0], tokens=[1, 2, 3, 4]),
        run_of(theirs_s, engine=names[1], tokens=[1, 2, 3, 9]),
    ]


@pytest.mark.parametrize(("ours_s", "theirs_s", "times"), [(0.1, 0.25, "2.50 x"), (0.25, 0.1, "0.40 x")])
def test_the_table_says_who_is_faster(ours_s: float, theirs_s: float, times: str) -> None:
    rows = same_bits.summaries(runs_of(ours_s, theirs_s) * 3)
    result = {"cell": "q4_0-25", "left_gib": 3, "memory_gib": 1.4, "rows": rows, "direct_read_bytes_per_s": 1e9}
    ours, theirs = same_bits.table([result]).splitlines()[2:]
    assert f"**{1 / ours_s:.2f}**" in ours
    assert times in theirs
    assert "llama.cpp:gguf=b.gguf" in theirs
    assert "75 %" in theirs


def test_engines_of_a_round_go_forwards_and_backwards(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, float, float]] = []

    def run_engine(engine: str, limited: bool, args: argparse.Namespace) -> dict[str, Any]:
        assert limited
        assert args.feed == "text"
        ran.append((engine, args.memory, args.left))
        return {"engine": engine, "limited": True, "error": "no"}

    kept: list[int] = []
    monkeypatch.setattr(same_bits.peers, "run_engine", run_engine)
    monkeypatch.setattr(same_bits.peers, "direct_read_rate", lambda path: 1e9)
    monkeypatch.setattr(same_bits, "keep", lambda cell, memory, left, rates, runs, args: kept.append(len(runs)))
    cell = same_bits.Cell("c", "q4_0", 0.5, ("A", "B"), once=("C",))
    args = argparse.Namespace(model=model, allowance=0.75, rounds=2)
    same_bits.run_cell(cell, args, same_bits.Turns(None, 1))
    assert [engine for engine, _, _ in ran] == list("ABBACABBA")
    assert {settings[1:] for settings in ran} == {(5, 6.75)}
    assert kept == [5, 9]


def test_the_lock_is_released_between_turns(tmp_path: Path) -> None:
    lock = tmp_path / "lock"

    def is_free() -> bool:
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    turns, free = same_bits.Turns(lock, rounds=2), []
    for _ in range(4):
        with turns.next():
            free.append(is_free())
        free.append(is_free())
    assert free == [False, False, False, True] * 2


def test_what_is_kept_names_no_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    monkeypatch.setattr(same_bits, "record", lambda name, result, raw, keep: kept.append(json.dumps([result, raw])))
    monkeypatch.setattr(same_bits.peers, "read_ahead_file", lambda path: model / "config.json")
    (model / "config.json").write_text("128")
    monkeypatch.setattr(same_bits.peers, "model_facts", lambda folder: {})
    args = argparse.Namespace(model=model, allowance=1, new_tokens=1, prompt_tokens=1, threads=1, trial=False)
    same_bits.keep(same_bits.Cell("c", "q4_0", 0.5, ()), 1.0, 3.0, [1e9], runs_of(0.1, 0.2), args)
    assert "b.gguf" in kept[0]
    assert "/a/" not in kept[0]
    assert str(model.parent) not in kept[0]
