"""`look_up`: what a hub id is found to be, by a process of its own.

huggingface_hub reads its settings when it is imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests.hub.fake_hub import FakeHub, Found

_SCRIPT = """
import json, sys
from pathlib import Path
from foreroute.checkpoint.hub.fetch import HubAccess
from foreroute.checkpoint.locate import locate
from foreroute.errors import ForerouteError
given = json.loads(sys.argv[4])
if "cache_dir" in given:
    given["cache_dir"] = Path(given["cache_dir"])
try:
    print(locate(sys.argv[1], revision=sys.argv[2] or None, quiet=sys.argv[3] == "quiet", access=HubAccess(**given)))
except ForerouteError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def look_up(tmp_path: Path) -> Callable[..., Found]:
    """(hub, id, revision) -> the folder, or None; and what was said on standard error. `access`: see HubAccess."""

    def run(
        hub: FakeHub | str,
        hub_id: str = "org/tiny",
        revision: str = "",
        bars: str = "quiet",
        access: Mapping[str, Any] = MappingProxyType({}),
        **env: str,
    ) -> Found:
        settings = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": hub if isinstance(hub, str) else hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **env,
        }
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, hub_id, revision, bars, json.dumps(dict(access))],
            env=settings, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return (Path(done.stdout.strip()) if done.returncode == 0 else None), done.stderr

    return run
