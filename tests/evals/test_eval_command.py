"""`foreroute eval` in this process, on the model that ships."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from foreroute.cli.commands import demo
from foreroute.cli.main import main
from foreroute.evals.text import HeldOut

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run_command(*args: object) -> tuple[int, str, str]:
        code = main(["eval", *map(str, args), "--threads", "1", "--dtype", "float32"])
        return (code, *capfd.readouterr())

    return run_command


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Text that stands for the held-out one."""
    path = tmp_path / "held-out.json"
    glossary = {f"{word}ing": f"the act of {word}ing something" for word in ("walk", "read", "wash", "sort", "pack")}
    HeldOut({"readme": (ROOT / "README.md").read_text()}, {"readme": 1.0}, glossary).write(path)
    return path


def test_the_suite_is_the_same_with_a_quarter_of_the_experts_in_memory(run, held_out: Path) -> None:
    asked = ("--suite", "builtin", "--held-out", held_out, "--per-kind", 6, "--kinds", "add", "copy", "define",
             "--windows", 2, "--context", 64, "--json")  # fmt: skip
    code, out, err = run(demo.find_model(), *asked)
    assert code == 0, err
    whole = json.loads(out)
    assert whole["accuracy"].keys() == {"add", "copy", "define"}
    # The model was trained to add; more than half of six right is no accident.
    assert whole["accuracy"]["add"]["right"] >= 4
    assert whole["accuracy"]["add"]["multi_step"]
    assert whole["accuracy"]["add"]["low"] < whole["accuracy"]["add"]["share"] <= whole["accuracy"]["add"]["high"]
    assert 0.5 < whole["bits_per_char"]["readme"] < 4
    assert whole["scored_tokens"] == 2 * 64
    code, out, err = run(demo.find_model(), *asked, "--memory", "25%")
    assert code == 0, err
    quarter = json.loads(out)
    assert quarter.pop("memory_bytes") < whole.pop("memory_bytes")
    assert quarter == whole


def test_text_of_ones_own(run, tmp_path: Path) -> None:
    code, out, err = run(demo.find_model(), "--text", ROOT / "README.md", "--windows", 1, "--context", 32)
    assert code == 0, err
    assert "README.md" in out
    assert "32 tokens scored" in out
    assert "right" not in out


def test_two_files_of_one_name_are_two(run, tmp_path: Path) -> None:
    paths = [tmp_path / name / "book.txt" for name in ("a", "b")]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        path.write_text((ROOT / "README.md").read_text()[1000 * number : 1000 * number + 600])
    code, out, err = run(demo.find_model(), "--text", *paths, "--windows", 1, "--context", 32, "--json")
    assert code == 0, err
    assert json.loads(out)["bits_per_char"].keys() == {*map(str, paths), "all"}


def test_what_cannot_be_evaluated_is_named_before_work(run, held_out: Path, tmp_path: Path) -> None:
    code, _, err = run(demo.find_model(), "--suite", "builtin", "--held-out", tmp_path / "no.json")
    assert code == 2
    assert "make held-out" in err
    code, _, err = run(demo.find_model(), "--suite", "builtin", "--held-out", held_out, "--kinds", "juggle")
    assert code == 2
    assert "no kind of task called juggle" in err
    code, _, err = run(demo.find_model(), "--text", tmp_path / "absent.txt")
    assert code == 2
    assert "absent.txt cannot be read" in err
    for flags in (("--kinds", "add"), ("--per-kind", 3), ("--windows", 0)):
        code, _, err = run(demo.find_model(), "--text", ROOT / "README.md", *flags)
        assert code == 2
        assert flags[0] in err
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    code, _, err = run(demo.find_model(), "--text", tmp_path / "bytes.txt")
    assert code == 2
    assert "not UTF-8" in err
