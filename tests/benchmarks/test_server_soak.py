"""The soak's verdict: each thing that must hold is seen when it does not."""

import pytest

from benchmarks.server_soak import faults

HELD = {"requests": 0, "slots_leased": 0, "tasks": 2, "threads": 4, "files": 11}
GOOD = {
    "answers": {"reads 200": 5, "leaves 0": 1, "slow 429": 2}, "rss_peak_bytes": 1050, "plan_bytes": 1000,
    "grown": 1.05, "held_first": HELD, "held_last": HELD,
}  # fmt: skip


def test_what_is_as_promised_has_no_faults() -> None:
    assert faults(GOOD) == []
    assert faults({**GOOD, "grown": None}) == []


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"answers": {"reads 500": 1}}, "500"),
        ({"rss_peak_bytes": 1051}, "105.1% of the plan"),
        ({"grown": 1.06}, "grew"),
        *(({"held_last": {**HELD, name: held + 1}}, f"{name}: {held} before, {held + 1} after")
          for name, held in HELD.items()),
    ],
)  # fmt: skip
def test_what_is_not_is_named(wrong: dict[str, object], what: str) -> None:
    (fault,) = faults({**GOOD, **wrong})
    assert what in fault
