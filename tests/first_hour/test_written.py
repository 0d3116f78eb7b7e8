"""What docs/python.md and examples/ show runs, and README's other commands exist; tests/docs runs its blocks."""

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foreroute.cli import figures
from foreroute.cli.main import COMMANDS
from foreroute.errors import DeviceError
from tests.server.process import serving

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ANSWER = "1 Tue 4 Jul\n2 Wed 5 Jul"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_readmes_other_commands_exist(run: Callable[..., Any]) -> None:
    """Those with MODEL and files of the reader's: their flags are known."""
    lines = [line.strip() for line in README.splitlines() if re.match(r"    (.* \| )?foreroute ", line)]
    assert len(lines) >= 14
    for line in lines:
        words = shlex.split(line.partition(" > ")[0], comments=True)
        words = words[words.index("foreroute") + 1 :]
        assert words[0] in COMMANDS
        told = run(words[0], "--help").out + run(words[0], "--help-all").out
        assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", told)), line


def test_the_python_page(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    page = blocks((ROOT / "docs" / "python.md").read_text(encoding="utf-8"), "python")
    assert len(page) == 8
    said = []
    for block in page:
        exec(compile(block, "docs/python.md", "exec"), names)
        said.append(capsys.readouterr().out)
    assert said[0] == "64 of 256 experts fit the memory\n"
    assert "parameters, experts counted" in said[1]
    assert said[2].startswith(ANSWER)
    assert said[3].startswith(f"{ANSWER}\n stop")
    assert said[4].splitlines()[-2:] == ANSWER.splitlines()
    assert "= 42" in said[4]
    assert re.fullmatch(r"\d+ hits, \d+ late hits, \d+ misses, \d+ bytes read\n", said[5])
    assert re.search(r"Raise memory= to [\d.]+ MiB\.\n$", said[6])


def test_the_examples_run(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        "chat.py", "batch.py", "serve_client.py", "tools.py", "langchain_client.py",
    }  # fmt: skip
    for name, told in {"chat.py": (ANSWER, "= 42", "were kept)"), "batch.py": ("12 + 30: = 42", "2 Wed 5 Jul")}.items():
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        printed = capsys.readouterr().out
        assert all(one in printed for one in told), printed


def test_the_client_example_runs(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        monkeypatch.setattr(sys, "argv", ["serve_client.py", f"{server.url}/v1"])
        runpy.run_path(str(ROOT / "examples" / "serve_client.py"), run_name="__main__")
    assert capsys.readouterr().out == f"{ANSWER}\n"


def test_the_tools_example_runs(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The call is one that the tool takes, and what it says is what was called with."""
    with serving("--tool-parser", "hermes") as server:
        monkeypatch.setattr(sys, "argv", ["tools.py", f"{server.url}/v1"])
        runpy.run_path(str(ROOT / "examples" / "tools.py"), run_name="__main__")
    said = re.fullmatch(r"add\((-?\d+), (-?\d+)\) = (-?\d+)\n", capsys.readouterr().out)
    assert said is not None
    assert int(said[1]) + int(said[2]) == int(said[3])


def test_the_langchain_example_runs(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        monkeypatch.setattr(sys, "argv", ["langchain_client.py", f"{server.url}/v1"])
        runpy.run_path(str(ROOT / "examples" / "langchain_client.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == [*ANSWER.splitlines(), "42"]


def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells, in their order, as one program; it is kept without outputs."""
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {}
    said = []
    for cell in cells:
        exec(compile("".join(cell["source"]), "examples/notebook.ipynb", "exec"), names)
        said.append(capsys.readouterr().out)
    assert "64 of 256 experts fit" in said[0]
    assert said[1].strip().splitlines()[-2:] == ANSWER.splitlines()
    assert re.search(r"\d+ hits, \d+ late hits, \d+ misses", said[2])


def test_exit_code_1_is_said_alike(run: Callable[..., Any]) -> None:
    """By README, `foreroute --help`, and the commands that have it."""
    told = " ".join(run("--help").out.split())
    assert "1 verify, bench or demo found a difference" in told
    assert "1 where `demo`, `verify` or `bench` found a difference" in " ".join(README.split())
    folder = ROOT / "src" / "foreroute" / "cli" / "commands"
    sources = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    has_one = re.compile(r"^ +return .* else 1$|^EXIT_DIFFERENT, \w+ = 1,", re.MULTILINE)
    found = {name for name, text in sources.items() if has_one.search(text)}
    assert found == {"verify", "bench", "demo"}


def test_a_load_that_is_refused_has_drawn_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DeviceError), figures.loading(is_quiet=False):
        raise DeviceError("no CUDA")
    assert capsys.readouterr().err == ""
