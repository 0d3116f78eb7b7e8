"""Spoilt files through the commands: one line and exit code 2, or success; the whole run is benchmarks/mutations.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mutations import COMMANDS, Outcome, arguments, make_whole, run, with_spoilt
from benchmarks.spoilt_files import KINDS, Spoilt, spoil

pytest.importorskip("gguf")
pytest.importorskip("fastapi")

ROOT = Path(__file__).parents[2]
# Of each kind: every way to spoil the whole text or file, and as many random ones.
EACH = 30
# CPU seconds; what is meant is 3 (benchmarks/mutations.py), and a test is not timed as finely.
MOST_S = 20.0


@pytest.fixture(scope="module")
def whole(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "spoilt"


def untouched(whole: dict[str, Path], kind: str) -> Spoilt:
    """A file of the kind as it is."""
    file = KINDS[kind].file or min(path.name for path in whole[kind].glob("model*.safetensors"))
    return Spoilt(kind, -1, file, (whole[kind] / file).read_bytes(), "nothing")


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_taken(whole: dict[str, Path], place: Path, kind: str) -> None:
    """Or the runs below would say nothing."""
    spoilt = untouched(whole, kind)
    outcome = run("generate", with_spoilt(whole[kind], spoilt, place), spoilt, MOST_S)
    assert outcome.result == "ok", outcome.said


@pytest.mark.parametrize("kind", KINDS)
def test_no_traceback_and_no_hang(whole: dict[str, Path], place: Path, kind: str) -> None:
    outcomes: list[Outcome] = []
    for number in range(EACH):
        spoilt = spoil(KINDS[kind], whole[kind], number)
        # Each file meets one command; over the kinds and numbers every command meets everything.
        command = COMMANDS[(number + list(KINDS).index(kind)) % len(COMMANDS)] if number % 2 else "generate"
        outcomes.append(run(command, with_spoilt(whole[kind], spoilt, place), spoilt, MOST_S))
    faults = [f"{one.spoilt.number} ({one.spoilt.what}), {one.command}: {one.said}" for one in outcomes
              if one.result == "fault"]  # fmt: skip
    assert not faults, "\n".join(faults)
    assert sum(one.result == "error" for one in outcomes) >= EACH // 4, "little was spoilt"


def test_the_watcher_sees_faults(whole: dict[str, Path], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import foreroute.loading.load

    spoilt = untouched(whole, "config")
    model = with_spoilt(whole["config"], spoilt, place)

    def outcome_of(act: object) -> Outcome:
        with monkeypatch.context() as patch:
            patch.setattr(foreroute.loading.load, "open_checkpoint", act)
            return run("generate", model, spoilt, 0.05)

    def fails(*args: object) -> None:
        raise KeyError("x")

    def hangs(*args: object) -> None:
        while True:
            pass

    assert "KeyError" in outcome_of(fails).said
    assert outcome_of(fails).result == "fault"
    assert "stopped" in outcome_of(hangs).said


def test_as_processes(whole: dict[str, Path], tmp_path: Path) -> None:
    """A share of them as users start them."""
    chosen = [("config", 6, "generate"), ("generation config", 10, "plan"), ("tokenizer", 7, "generate"),
              ("index", 3, "plan"), ("safetensors header", 10, "pack"), ("store header", 5, "generate"),
              ("gguf header", 1, "generate"), ("chat template", 10, "serve")]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    for kind, number, command in chosen:
        spoilt = spoil(KINDS[kind], whole[kind], number)
        model = with_spoilt(whole[kind], spoilt, tmp_path / "spoilt")
        done = subprocess.run(
            [sys.executable, "-m", "foreroute.cli.main", *arguments(command, model, spoilt)],
            env=environment, capture_output=True, timeout=120, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        said = done.stderr.decode()
        assert done.returncode == 2, (kind, number, command, done.returncode, said)
        assert len(said.splitlines()) == 1, (kind, number, command, said)
        assert said.startswith("foreroute: error: ")


def test_the_same_seed_spoils_the_same_way(whole: dict[str, Path]) -> None:
    for kind in KINDS.values():
        assert spoil(kind, whole[kind.name], 25) == spoil(kind, whole[kind.name], 25)
    header = spoil(KINDS["store header"], whole["store header"], 25)
    assert json.loads(KINDS["store header"].take(header.content)), "a header under a checksum that is right"
