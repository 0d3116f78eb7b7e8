"""What a reader of the step has to open stays small, and no module imports itself in a circle."""

from tests.architecture.closure import STEP, closure, cycles, graph, modules

MOST_FILES, MOST_LINES = 20, 3500


def test_the_step_is_read_in_an_evening() -> None:
    known = modules()
    files = closure(STEP, graph())
    num_lines = sum(len(known[name].read_text(encoding="utf-8").splitlines()) for name in files)
    assert len(files) <= MOST_FILES, sorted(files)
    assert num_lines <= MOST_LINES, f"{num_lines} lines"


def test_nothing_imports_in_a_circle() -> None:
    assert cycles(graph()) == []


def test_a_circle_is_seen() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]
