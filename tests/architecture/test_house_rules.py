"""House rules that a tool can hold: modules say what they are, files stay readable, nothing names one machine."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 400
MAX_BRANCHES = 15
MAX_FILES = 14
# What makes a second way through a function; mccabe, as ruff counts it, leaves out half of these.
BRANCHES = (
    ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.BoolOp, ast.Match, ast.comprehension,
)  # fmt: skip
# "folder/file.py::function" -> why it may have more; three at the most.
MORE_BRANCHES: dict[str, str] = {}
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


def branches_of(source: str) -> Iterator[tuple[str, int]]:
    """Every function, nested ones too, with its branches and those of what is defined in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, sum(isinstance(part, BRANCHES) for part in ast.walk(node))


def class_names(source: str) -> Iterator[str]:
    """Classes of a module, and names like those of classes that it gives to types."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if re.match(r"[A-Z][a-z]", name) and not (isinstance(node.value, ast.Call)):
                yield name


def test_functions_have_few_branches() -> None:
    counted = {
        f"{path.relative_to(ROOT / 'src' / 'foreroute')}::{name}": count
        for path in SOURCES
        for name, count in branches_of(path.read_text())
    }
    too_many = {name: count for name, count in counted.items() if count > MAX_BRANCHES}
    assert too_many.keys() == MORE_BRANCHES.keys(), f"{too_many}: what can be a function, or a table, of its own?"
    assert len(MORE_BRANCHES) <= 3


def test_no_two_classes_have_one_name() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        for name in class_names(path.read_text()):
            places[name].append(name_of(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_every_folder_of_the_package_is_one_that_git_and_the_wheel_have() -> None:
    folders = {path.parent for path in SOURCES}
    assert [name_of(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert [name_of(folder) for folder in folders if f"{folder.name}/" in ignored] == [], "what git ignores is left out"


def test_folders_can_be_looked_over() -> None:
    files = Counter(path.parent for path in PYTHON_FILES if path.name != "__init__.py")
    # Of benchmarks/ and models/ each file is a program, independent of the others.
    rooms = {folder: count for folder, count in files.items() if name_of(folder).startswith(("src", "tests"))}
    assert {name_of(folder): count for folder, count in rooms.items() if count > MAX_FILES} == {}


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


def without_a_dtype(source: str) -> list[str]:
    """Calls that make numbers of torch's default dtype, which is the user's to change."""
    makers = {"zeros", "ones", "empty", "rand", "randn", "linspace", "eye"}
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if ast.unparse(call.func).removeprefix("torch.") in makers
        and ast.unparse(call.func).startswith("torch.")
        and not any(keyword.arg in ("dtype", None) for keyword in call.keywords)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_numbers_are_made_of_a_dtype_that_is_said(path: Path) -> None:
    assert not without_a_dtype(path.read_text())


def models_of_any_type(source: str) -> list[int]:
    """Lines whose `model`, an argument or a variable, is annotated as Any."""
    found = []
    for node in ast.walk(ast.parse(source)):
        named = isinstance(node, ast.arg) and node.arg == "model"
        named |= isinstance(node, ast.AnnAssign) and ast.unparse(node.target).split(".")[-1] == "model"
        if named and node.annotation is not None and ast.unparse(node.annotation) == "Any":
            found.append(node.lineno)
    return sorted(found)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_loaded_model_has_a_type(path: Path) -> None:
    assert not models_of_any_type(path.read_text()), "OffloadedModel, or PreTrainedModel: see docs/structure.md"


def test_the_rules_go_red() -> None:
    assert models_of_any_type("def f(model: Any, n: Any):\n  self.model: Any = 0\n  model: list[Any] = 1\n") == [1, 2]
    assert without_a_dtype("torch.zeros(3)") == ["torch.zeros(3)"]
    assert not without_a_dtype("torch.zeros(3, dtype=torch.float32)")
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
    nested = "def f(a):\n  def g(): return [x for x in a for y in x if y or 1]\n  return 1 if a else 2\n"
    assert dict(branches_of(nested)) == {"f": 4, "g": 3}
    assert list(class_names("class A: ...\nProgress = Callable[[int], None]\nSIZE = 3\nT = TypeVar('T')\n")) == [
        "A",
        "Progress",
    ]
    assert PYTHON_FILES
    assert SOURCES
