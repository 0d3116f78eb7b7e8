"""The reference of the device's paging equals residency/. Triton's kernels: test_interpreted.py."""

from foreroute.device import paging
from tests.support.paging import Walk, assert_fetched


def test_the_planner_decides_as_residency_does() -> None:
    """10,000 operations: demands, guesses and releases over pools of several sizes."""
    seen = dict.fromkeys(paging.COUNTERS, 0)
    for seed in range(20):
        walk = Walk(paging, seed)
        walk.run(500)
        for name, count in walk.state.counts().items():
            seen[name] += count
    assert all(seen[name] > 0 for name in paging.COUNTERS if name != "shortages"), seen


def test_records_come_whole() -> None:
    assert_fetched(paging, 1)
