"""House rules that a tool can hold: modules say what they are, files stay readable, nothing names one machine."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 400
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PYTHON_FILES = sorted(
    path for folder in ("src", "tests", "benchmarks", "models") for path in (ROOT / folder).rglob("*.py")
)
TEXT_FILES = PYTHON_FILES + sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")) + [ROOT / "Makefile"]
# A path in someone's home: true on one machine, wrong on the next.
NOT_PORTABLE = re.compile(r"/(?:home|root|Users)/[\w.]+")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lacks_docstring(source: str) -> bool:
    return not ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert not lacks_docstring(path.read_text()), f"{name_of(path)} starts without a docstring"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_no_file_is_two_rooms_in_one(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{name_of(path)} has {num_lines} lines; what is its second question?"


@pytest.mark.parametrize("path", TEXT_FILES, ids=name_of)
def test_no_file_names_one_machine(path: Path) -> None:
    assert not NOT_PORTABLE.findall(path.read_text())


def test_the_rules_go_red() -> None:
    assert lacks_docstring("import os\n")
    assert not lacks_docstring('"""Says it."""\n')
    assert NOT_PORTABLE.search("open('/" + "home/someone/model')")
    assert PYTHON_FILES
    assert SOURCES
