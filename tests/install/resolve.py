"""Whether the pins can be installed where nothing is local: `python -m tests.install.resolve`, which is `make resolve`.

pip plans an installation of the wheel from the package index alone, without this machine's settings, wheel folders and
constraints: all extras for each Python that development supports, then the oldest transformers, then what a plain
`pip install` takes, and the clients that tests/clients has in an environment of its own. Whatever it would install must
be what is pinned. Nothing is installed, and of wheels only their metadata is read.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.wheel import ROOT, build_wheel

PYTHONS = ("3.11", "3.12", "3.13")
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
EXTRAS = ("serve", "structured", "gguf", "gpu", "completion", "docs", "dev", "eval", "plots", "bench")
# For a Python that is not on this machine pip plans with wheels alone; others need packages that come as sources.
WHEELS_ONLY = ("serve", "structured", "gguf", "gpu", "completion", "docs", "plots")
CLIENTS = ROOT / "tests/clients"
NOT_RESOLVED, NOT_REACHED = 1, 2
_TIMEOUT_S = 900
# Of pip's settings in the environment: how the index is reached, not what is taken from where.
_HOW_TO_REACH = frozenset({"PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_TIMEOUT", "PIP_DEFAULT_TIMEOUT"})
# What pip writes when it has tried for the last time, or when what answers is no index.
_UNREACHABLE = re.compile(r"Retry\(total=0,|ERROR:.*(ConnectionError|Timeout|SSLError|ProxyError|HTTP error 5)")
_CAUSE = "The conflict is caused by:"


class ResolveError(Exception):
    """One plan failed. code: NOT_RESOLVED or NOT_REACHED."""

    def __init__(self, message: str, code: int = NOT_RESOLVED) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Case:
    """One installation to plan: extras of the wheel for a Python, with these pins; a plain one has none.

    wanted: what is installed in the wheel's place.
    """

    label: str
    python: str
    extras: tuple[str, ...]
    pins: Mapping[str, str]
    wanted: tuple[str, ...] = ()


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path: Path) -> dict[str, str]:
    """Version by canonical name, of lines `name==version`."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): version for name, version in pairs}


def cases(pins: Mapping[str, str], oldest: Mapping[str, str]) -> Iterator[Case]:
    """Every installation that must work."""
    clients = tuple((CLIENTS / "requirements.txt").read_text().split())
    yield Case(f"Python {HERE}, clients", HERE, (), read_pins(CLIENTS / "constraints.txt"), clients)
    for python in PYTHONS:
        yield Case(f"Python {python}", python, EXTRAS, pins)
    yield Case(f"Python {HERE}, oldest transformers", HERE, ("dev",), {**pins, **oldest})
    yield Case(f"Python {HERE}, no pins", HERE, (), {})


def index_alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, without what else pip is told on this machine: settings, other indexes, wheels, constraints."""
    kept = {name: value for name, value in environment.items() if not name.startswith("PIP_") or name in _HOW_TO_REACH}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def find_python(version: str) -> str | None:
    """An interpreter of that version: this one, one on PATH, or one installed beside this one; None without any."""
    if version == HERE:
        return sys.executable
    beside = Path(sys.base_prefix).parent.glob(f"*/bin/python{version}")
    for found in filter(None, (shutil.which(f"python{version}"), *map(str, sorted(beside)))):
        # A shim is on PATH for versions too that it does not find.
        asked = [found, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == version:
            return found
    return None


def plan(case: Case, wheel: Path, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """What pip would install, an entry of its report per package; and a note on what was left out.

    Raises:
        ResolveError: it found no way, or did not reach the index.
    """
    python, note, extras = find_python(case.python), "", case.extras
    command = [sys.executable, "-m", "pip"]
    if python is None:
        extras = tuple(extra for extra in extras if extra in WHEELS_ONLY)
        note = f" (there is no interpreter: wheels alone, extras {', '.join(extras)})"
    elif python != sys.executable:
        command += ["--python", python]
    report, constraints = folder / "report.json", folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in case.pins.items()))
    command += ["install", "--dry-run", "--ignore-installed", "--progress-bar=off", "--report", str(report)]
    # Where the index has no separate metadata, a wheel's is read out of its middle.
    ours = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
    command += ["--use-feature=fast-deps", "-c", str(constraints), *(case.wanted or [ours])]
    if python is None:
        command += ["--python-version", case.python, "--only-binary=:all:", "--target", str(folder / "target")]
    try:
        ran = subprocess.run(
            command, env=index_alone(os.environ), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ResolveError(
            f"{case.label}: pip did not end within {_TIMEOUT_S} s; nothing was checked.", NOT_REACHED
        ) from None
    if ran.returncode:
        raise why(case.label, ran.stdout, ran.stderr)
    installs: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return installs, note


def why(label: str, told: str, said: str) -> ResolveError:
    """The error for what pip told on standard output and said on standard error."""
    lines = [line for line in said.splitlines() if line.strip()]
    failures = [line for line in lines if _UNREACHABLE.search(line)]
    if failures:
        return ResolveError(
            f"{label}: the package index cannot be reached, so nothing was checked. Run it again where it can.\n"
            f"    {failures[-1]}",
            NOT_REACHED,
        )
    # Which packages want what stands on standard output, in the midst of hints.
    cause = told.partition(_CAUSE)[2].partition("\n\n")[0].splitlines()
    errors = [line for line in lines if not line.startswith("WARNING")]
    return ResolveError(
        "\n    ".join([f"{label}: pip finds no versions that fit together:", *filter(None, cause), *errors])
    )


def differences(installs: list[dict[str, Any]], pins: Mapping[str, str]) -> list[str]:
    """Every package that is not pinned, or not as it is pinned; the wheel itself has no pin."""
    found = []
    for entry in installs:
        name, version = entry["metadata"]["name"], entry["metadata"]["version"]
        pinned = pins.get(canonical(name))
        if canonical(name) == "foreroute" or pinned == version:
            continue
        found.append(f"{name} would be {version}, " + (f"pinned is {pinned}" if pinned else "and is not pinned"))
    return found


def untested(installs: list[dict[str, Any]], pins: Mapping[str, str]) -> list[str]:
    """Whether a plain installation takes another minor of transformers than the one that the pins are tested with."""
    (taken,) = (one["metadata"]["version"] for one in installs if one["metadata"]["name"] == "transformers")
    if taken.split(".")[:2] == pins["transformers"].split(".")[:2]:
        return []
    return [f"transformers would be {taken}, tested is {pins['transformers']}: see pyproject.toml's upper bound"]


def main() -> int:
    """Plan them all, a line for each; the exit code."""
    pins = read_pins(ROOT / "constraints.txt")
    oldest = read_pins(ROOT / "constraints-oldest.txt")
    code = 0
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build_wheel(Path(scratch))

        def check(case: Case) -> tuple[str, int]:
            started = time.monotonic()
            try:
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    installs, note = plan(case, wheel, Path(folder))
            except ResolveError as error:
                return str(error), error.code
            wrong = differences(installs, case.pins) if case.pins else untested(installs, pins)
            if wrong:
                return "\n    ".join([f"{case.label}: not what is pinned:", *wrong]), NOT_RESOLVED
            taken = {canonical(one["metadata"]["name"]): one["metadata"]["version"] for one in installs}
            held = "all as pinned" if case.pins else f"transformers {taken['transformers']}, torch {taken['torch']}"
            return f"{case.label}: {len(installs)} packages, {held}{note} ({time.monotonic() - started:.0f} s)", 0

        # All at once: most of the time they wait for the index.
        with ThreadPoolExecutor(max_workers=len(PYTHONS) + 3) as pool:
            for line, failed in pool.map(check, cases(pins, oldest)):
                print(line, file=sys.stderr if failed else sys.stdout, flush=True)
                code = code or failed
    return code


if __name__ == "__main__":
    sys.exit(main())
