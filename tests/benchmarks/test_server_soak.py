"""The soak's verdict: each thing that must hold is seen when it does not."""

import pytest

from benchmarks.server_soak import faults, grown

HELD = {"requests": 0, "slots_pinned": 0, "tasks": 2, "threads": 4, "files": 11}
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
SERVED = {
    "reads 200": 5,
    "leaves 0": 1,
    "leaves 200": 3,
    "slow 200": 3,
    "slow 429": 2,
    **{f"{path} 200": 3 for path in PATHS},
}
GOOD = {
    "answers": SERVED, "rss_peak_bytes": 1050, "plan_bytes": 1000,
    "grown": 1.05, "held_first": HELD, "held_last": HELD,
}  # fmt: skip


def test_what_is_as_promised_has_no_faults() -> None:
    assert faults(GOOD) == []
    assert faults({**GOOD, "grown": None}) == []


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"answers": {**SERVED, "reads 500": 1}}, "500"),
        *(({"answers": {**SERVED, f"{path} 200": 0}}, f"nothing was served at {path}") for path in PATHS),
        *(({"answers": {**SERVED, f"{manner} 200": 2}}, f"'{manner}'") for manner in ("reads", "slow", "leaves")),
        ({"rss_peak_bytes": 1051}, "105.1% of the plan"),
        ({"grown": 1.06}, "grew"),
        *(({"held_last": {**HELD, name: held + 1}}, f"{name}: {held} before, {held + 1} after")
          for name, held in HELD.items()),
    ],
)  # fmt: skip
def test_what_is_not_is_named(wrong: dict[str, object], what: str) -> None:
    (fault,) = faults({**GOOD, **wrong})
    assert what in fault


def test_what_stays_is_growth_and_what_comes_and_goes_is_none() -> None:
    """Samples of a second each."""
    assert grown([100, 140] * 60 + [100] * 60, 180.0) == 100 / 120
    assert grown([100] * 60 + [190] * 29 + [100] * 31, 120.0) == 1.0
    assert grown([100] * 60 + [110] * 60, 120.0) == 1.1
    assert grown([100] * 119, 119.0) is None


def test_a_server_that_refuses_everybody_is_faulty() -> None:
    assert len(faults({**GOOD, "answers": {"reads 503": 5000, "leaves 0": 9}})) == 3 + len(PATHS)
