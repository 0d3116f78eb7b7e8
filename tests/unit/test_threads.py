"""Idle OpenMP threads leave the cores to the readers, unless the user has said otherwise."""

import os
import subprocess
import sys

import pytest

ASK = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("before", "environment", "expected"),
    [
        ("import foreroute", {}, "2000"),
        ("import foreroute", {"GOMP_SPINCOUNT": "500"}, "500"),
        ("import foreroute", {"OMP_WAIT_POLICY": "active"}, "None"),
        # Too late to change anything: then it must not look as if it had.
        ("import sys; sys.modules['torch'] = None; import foreroute", {}, "None"),
    ],
)
def test_it_is_set_before_torch_is_imported(before: str, environment: dict[str, str], expected: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ran = subprocess.run(
        [sys.executable, "-c", f"{before}; {ASK}"],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == expected
