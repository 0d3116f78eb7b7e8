"""Who may import whom: the contracts of pyproject.toml hold, and each of them goes red when it is broken."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# (where a line is added, the line, the contract that must break)
VIOLATIONS = [
    ("engine", "import foreroute.loading", "Each layer imports only the layers below it"),
    ("memory", "import foreroute.engine", "Each layer imports only the layers below it"),
    ("generation", "import foreroute.batching", "Each layer imports only the layers below it"),
    ("model", "import foreroute.engine", "Each layer imports only the layers below it"),
    ("checkpoint", "import foreroute.transfer", "Each layer imports only the layers below it"),
    ("predict", "import foreroute.engine", "Each layer imports only the layers below it"),
    ("residency", "import foreroute.checkpoint", "Each layer imports only the layers below it"),
    ("engine", "def late():\n    import foreroute.report", "Each layer imports only the layers below it"),
    ("residency", "import torch", "Decisions are pure"),
    ("policy.py", "from time import monotonic", "Decisions are pure"),
    ("memory/budget.py", "import torch", "Decisions are pure"),
    ("predict/governor.py", "import time", "Decisions are pure"),
    ("types.py", "import threading", "Decisions are pure"),
    ("report", "import foreroute.engine", "Reports read trace files"),
    ("report", "from foreroute.model.build import skeleton", "Reports read trace files"),
]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package under `folder`/src with the contracts of `folder`/pyproject.toml."""
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copied_project(tmp_path: Path) -> Path:
    """A copy of the sources and of the contracts that a test may spoil."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(("place", "line", "contract"), VIOLATIONS, ids=lambda value: value.split("\n")[-1].strip())
def test_a_forbidden_import_goes_red(copied_project: Path, place: str, line: str, contract: str) -> None:
    package = copied_project / "src" / "foreroute"
    if place.endswith(".py"):
        target = package / place
        target.write_text(target.read_text() + "\n" + line + "\n")
    else:
        (package / place / "spoiled.py").write_text(line + "\n")
        (package / "model" / "skeleton.py").touch()  # the last case imports it
    done = lint_imports(copied_project)
    assert done.returncode != 0, done.stdout
    broken = [row for row in done.stdout.splitlines() if row.startswith(contract) or contract in row]
    assert any("BROKEN" in row for row in broken), done.stdout


def test_a_package_that_no_layer_lists_goes_red(copied_project: Path) -> None:
    stranger = copied_project / "src" / "foreroute" / "utils"
    stranger.mkdir()
    (stranger / "__init__.py").touch()
    done = lint_imports(copied_project)
    assert done.returncode != 0
    assert "foreroute.utils" in done.stdout


def test_importing_foreroute_loads_nothing_heavy() -> None:
    """What only some commands need is imported by them, so that `import foreroute` and `--help` stay quick."""
    heavy = ("rich", "matplotlib", "fastapi", "uvicorn", "lm_eval", "accelerate")
    script = f"import sys, foreroute; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
