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


def without_encoding(source: str) -> list[int]:
    """Lines that read or write text in the locale's encoding, which may know ASCII alone."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in call.keywords):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        of = call.func.value if isinstance(call.func, ast.Attribute) else None
        if name == "open" and not (isinstance(of, ast.Name) and of.id in ("os", "gzip")):
            at = 1 if of is None else 0
            modes = [*call.args[at : at + 1], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
            is_text = not modes or not isinstance(modes[0], ast.Constant) or "b" not in str(modes[0].value)
        else:
            is_text = (name == "read_text" and not call.args) or (name == "write_text" and len(call.args) < 2)
        if is_text:
            found.append(call.lineno)
    return found


@pytest.mark.parametrize("path", [path for path in PYTHON_FILES if ROOT / "tests" not in path.parents], ids=name_of)
def test_text_has_an_encoding(path: Path) -> None:
    lines = without_encoding(path.read_text(encoding="utf-8"))
    assert not lines, f'{name_of(path)}: say encoding="utf-8" in lines {lines}'


def test_the_rules_go_red() -> None:
    assert without_encoding("open(p)\np.open('w')\np.read_text()\np.write_text(x)\nopen(p, mode='r')") == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert without_encoding("open(p, 'rb')\np.open('wb')\nos.open(p, 0)\np.read_text(encoding='utf-8')") == []
    assert lacks_docstring("import os\n")
    assert not lacks_docstring('"""Says it."""\n')
    assert NOT_PORTABLE.search("open('/" + "home/someone/model')")
    assert PYTHON_FILES
    assert SOURCES
