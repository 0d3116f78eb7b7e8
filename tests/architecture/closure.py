"""Import closures and import cycles of the package, counting lazy and typing imports too.

python -m tests.architecture.closure        # what a reader of the step, and of load(), has to open
"""

import ast
import sys
from pathlib import Path

SRC = Path(__file__).parents[2] / "src"
STEP = "foreroute.engine.moe_step"
LOAD = "foreroute.loading.load"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in (SRC / "foreroute").rglob("*.py"):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that the file imports by name, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            # `from package import name`: the name may be a module, or defined in the package's own file.
            found.update(
                full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names
            )
    return {name for name in found if name in known}


def graph() -> dict[str, set[str]]:
    """Every module's imports within the package."""
    known = modules()
    return {name: imports_of(path, known) - {name} for name, path in known.items()}


def closure(start: str, edges: dict[str, set[str]]) -> set[str]:
    """The module and all that it imports, directly or not; packages that only re-export nothing are left out."""
    seen, waiting = set[str](), [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += edges[name]
    return seen


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle (strongly connected components of two or more)."""
    reach = {name: closure(name, edges) for name in edges}
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in edges}
    return sorted(list(group) for group in groups if len(group) > 1)


def size(names: set[str]) -> tuple[int, int]:
    """(files, lines) of the modules."""
    known = modules()
    return len(names), sum(len(known[name].read_text(encoding="utf-8").splitlines()) for name in names)


def main() -> int:
    """Print the closures and the cycles; 1 where there is a cycle."""
    edges = graph()
    for start in (STEP, LOAD):
        names = closure(start, edges)
        files, lines = size(names)
        print(f"{start}: {files} files, {lines} lines")
        if "-v" in sys.argv:
            for name in sorted(names):
                print(f"    {name} {size({name})[1]}")
    circles = cycles(edges)
    print(f"import cycles: {len(circles)}")
    for circle in circles:
        print("    " + " <-> ".join(circle))
    return 1 if circles else 0


if __name__ == "__main__":
    sys.exit(main())
