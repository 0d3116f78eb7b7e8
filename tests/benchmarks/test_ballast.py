"""The ballast refuses what could hurt a machine. That it holds memory is seen by running it, not in a test."""

import subprocess
import sys

import pytest

from benchmarks import ballast


def test_it_never_leaves_less_than_three_gib() -> None:
    with pytest.raises(ballast.BallastError, match="3 GiB"):
        ballast.Ballast(free_bytes=3 * 2**30 - 1)


def test_the_process_itself_refuses_too() -> None:
    command = [sys.executable, ballast.__file__, "--free", "2.9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "3 GiB" in done.stdout


def test_more_than_is_free_is_refused_with_the_reason() -> None:
    with pytest.raises(ballast.BallastError, match="are to be left"):
        ballast.Ballast(free_bytes=ballast.available_bytes() + 64 * 2**30).__enter__()


def test_a_ballast_that_fell_voids_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    held = ballast.Ballast(free_bytes=3 * 2**30)
    held.process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE, text=True)
    held.process.wait()
    with pytest.raises(ballast.BallastError, match="void"):
        held.__exit__(None, None, None)
