"""How far a load is: a plain function gets bytes, and a terminal a bar once it takes long."""

import contextlib
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from foreroute.checkpoint.locate import read_index
from foreroute.cli import figures
from foreroute.cli.commands import serve
from foreroute.loading.progress import LoadedBytes
from foreroute.model.build.skeleton import outline

MIB = 2**20


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


@pytest.mark.parametrize("options", [{}, {"math": "torch"}, {"dense": "stored"}], ids=str)
@pytest.mark.parametrize("form", ["bf16", "fp32"])
def test_dense_weights_are_counted(
    checkpoints: Any, load: Callable[..., Any], form: str, options: dict[str, Any]
) -> None:
    told: list[tuple[int, int]] = []
    folder = checkpoints.get("qwen3_moe", form)
    load(folder, "25%", progress=lambda done, total: told.append((done, total)), **options)
    sketch = outline(folder, read_index(folder))
    if options:
        assert {total for _, total in told} == {sketch.dense_nbytes}
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len({done for done, _ in told}) > 5, "tensor by tensor"


def test_tied_weights_are_not_counted_twice_and_the_rest_ends_it() -> None:
    told: list[tuple[int, int]] = []
    counted = LoadedBytes(lambda done, total: told.append((done, total)), 100)
    counted.dense(60)
    counted.dense(60)
    counted.end_dense()
    counted.experts(10)(1, 3)
    assert told == [(60, 100), (100, 100), (100, 100), (110, 130)]


def test_a_start_of_the_server_never_goes_back() -> None:
    """The total grows when the dense weights are there and host memory is still to be filled."""
    shares: list[float] = []
    backend: Any = SimpleNamespace(report=lambda step, progress: shares.append(progress))
    counted = LoadedBytes(serve.reading_of(backend), 100)
    fill = counted.experts(100)
    counted.dense(60)
    counted.end_dense()
    for done in range(1, 10):
        fill(done, 9)
    assert shares == sorted(set(shares)), "each step moves it, and forwards"
    assert shares[-1] == pytest.approx(0.9)


def test_a_terminal_has_a_bar_after_two_seconds(terminal: Terminal) -> None:
    clock = Clock()
    with contextlib.redirect_stderr(terminal), figures.loading(is_quiet=False, clock=clock) as progress:
        progress(1 * MIB, 8 * MIB)
        clock.now_s += 1.9
        progress(2 * MIB, 8 * MIB)
        assert "MiB" not in terminal.getvalue()
        clock.now_s += 0.2
        progress(3 * MIB, 8 * MIB)
        progress(9 * MIB, 12 * MIB)
    assert "3.0/8.0 MiB" in terminal.getvalue()
    assert "9.0/12.0 MiB" in terminal.getvalue()


def test_elsewhere_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with figures.loading(is_quiet=False, clock=clock) as progress:
        clock.now_s += 10
        progress(3, 8)
    assert capsys.readouterr().err == ""


def test_nor_where_it_was_asked_to_be_quiet(terminal: Terminal) -> None:
    clock = Clock()
    with contextlib.redirect_stderr(terminal), figures.loading(is_quiet=True, clock=clock) as progress:
        clock.now_s += 10
        progress(3, 8)
    assert terminal.getvalue() == ""
