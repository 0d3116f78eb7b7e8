"""Lanes: threads of their own, one thread of torch each, for many rows."""

import threading
from collections.abc import Iterator

import pytest
import torch

from foreroute.kernels.ggml.graph import Runner
from foreroute.kernels.ggml.lanes import Lanes, one_thread
from foreroute.kernels.ggml.library import open_library


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_lane_has_one_thread_and_the_caller_keeps_its_own() -> None:
    lanes = Lanes(open_library(), 3)

    def asked() -> tuple[int, int]:
        torch.ones(1 << 16).add_(1).sum()
        return torch.get_num_threads(), threading.get_ident()

    found = [lanes.submit(asked).result() for _ in range(12)]
    assert {threads for threads, _ in found} == {1}
    assert threading.get_ident() not in {thread for _, thread in found}
    assert torch.get_num_threads() == 2
    taken = list[int]()
    other = threading.Thread(target=lambda: taken.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert taken == [2], "threads that begin later have the process's number"


def test_lanes_work_at_once_and_have_a_runner_each() -> None:
    lanes = Lanes(open_library(), 2)
    both = threading.Barrier(2)

    def runner() -> Runner:
        both.wait(10)
        return lanes.runner

    first, second = (lanes.submit(runner) for _ in range(2))
    assert first.result() is not second.result()
    assert first.result().num_threads == second.result().num_threads == 1


def test_no_gradients_and_errors_reach_the_caller() -> None:
    lanes = Lanes(open_library(), 1)
    assert lanes.submit(torch.is_grad_enabled).result() is False

    def fails() -> None:
        raise ValueError("in a lane")

    with pytest.raises(ValueError, match="in a lane"):
        lanes.submit(fails).result()
    assert lanes.submit(int).result() == 0, "the lane goes on"


def test_beside_lanes_the_caller_has_one_thread() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == 2
