"""`import foreroute`, `--help` and generate where what Linux alone has is absent: one by one, and as systems lack it.

No macOS or Windows has run this: what is shown is that nothing here needs what they lack.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.system import other_system

ROOT = Path(__file__).parents[2]
GENERATE = ("generate", str(ROOT / "models" / "foreroute-tiny"), "12 + 30", "--memory", "25%", "--max-new-tokens", "12",
            "--no-do-sample", "--threads", "1", "--json")  # fmt: skip
EACH = sorted({*other_system.WINDOWS, *other_system.MACOS})
LIBRARIES = "import torch._dynamo, transformers.generation, transformers.models.qwen3_moe.modeling_qwen3_moe\n"
SYSTEMS = {"macos": other_system.MACOS, "older macos": other_system.OLDER_MACOS, "windows": other_system.WINDOWS}


def run(
    hidden: Sequence[str], then: str, folder: Path, *args: str, first: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Python's `then`, in a process without what is `hidden`. first: what is imported before."""
    script = f"{first}from tests.system.other_system import hide; hide({list(hidden)!r}); {then}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )


def command(hidden: Sequence[str], folder: Path, *args: str) -> str:
    done = run(hidden, "from foreroute.cli.main import main; raise SystemExit(main())", folder, *args, first=LIBRARIES)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is generated on this system as it is."""
    return dict(json.loads(command((), tmp_path_factory.mktemp("here"), *GENERATE)))


@pytest.mark.parametrize("name", EACH)
def test_import_and_help_need_none_of_it(name: str, tmp_path: Path) -> None:
    then = "import foreroute; from foreroute.cli.main import main; raise SystemExit(main(['--help']))"
    done = run([name], then, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_same_tokens(system: str, here: dict[str, Any], tmp_path: Path) -> None:
    found = json.loads(command(SYSTEMS[system], tmp_path, *GENERATE))
    assert found["token_ids"] == here["token_ids"]
    assert len(found["token_ids"]) > 3
    assert found["figures"]["evictions"] > 0, "a quarter of the experts: some were read again"
    assert found["figures"]["peak_rss_bytes"] > 50e6


def test_doctor_says_what_it_cannot_know(tmp_path: Path) -> None:
    done = run(other_system.WINDOWS, "from foreroute.cli.main import main; raise SystemExit(main())", tmp_path,
               "doctor", str(ROOT / "models" / "foreroute-tiny"), "--json", first=LIBRARIES)  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    found = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
    assert found["direct reads"]["found"] == "this system has none"
    assert "GiB free of this machine's RAM" in found["memory"]["found"]
    assert "does not say" in found["huge pages"]["found"]
    assert "usable of" in found["processors"]["found"]


def test_hiding_hides(tmp_path: Path) -> None:
    """Else all of the above would be about this system."""
    then = (
        "import os, mmap, pathlib; assert not hasattr(os, 'preadv') and not hasattr(mmap, 'MAP_PRIVATE')\n"
        "try:\n    import fcntl\nexcept ImportError:\n    print('gone')\n"
        "try:\n    pathlib.Path('/proc/meminfo').read_text()\nexcept OSError:\n    print('unreadable')"
    )
    done = run(other_system.WINDOWS, then, tmp_path)
    assert done.stdout == "gone\nunreadable\n", done.stderr
