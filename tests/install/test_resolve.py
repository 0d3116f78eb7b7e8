"""What `make resolve` makes of pip's plans; the plans themselves need the package index, and are CI's own step."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from tests.install import resolve
from tests.install.resolve import NOT_REACHED, NOT_RESOLVED, differences, index_alone, read_pins, untested, why
from tests.support.wheel import ROOT

TOLD = """Collecting triton

The conflict is caused by:
    torch 2.13.0 depends on triton==3.7.1
    The user requested (constraint) triton==3.9.0

To fix this you could try to:
"""
SAID = """WARNING: pip is using lazily downloaded wheels
ERROR: Cannot install foreroute because these package versions have conflicting dependencies.
"""


def installs(**versions: str) -> list[dict[str, dict[str, str]]]:
    return [{"metadata": {"name": name, "version": version}} for name, version in versions.items()]


def test_pins_are_read_by_the_name_that_indexes_compare(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text("# why\nhuggingface_hub==2.4.0\n\nJinja2==3.1.6\n")
    assert read_pins(file) == {"huggingface-hub": "2.4.0", "jinja2": "3.1.6"}


def test_what_is_not_as_pinned_is_named() -> None:
    planned = installs(foreroute="0.1.0", Jinja2="3.1.6", triton="3.7.1", colorama="0.4.6")
    assert differences(planned, {"jinja2": "3.1.6", "triton": "3.9.0"}) == [
        "triton would be 3.7.1, pinned is 3.9.0",
        "colorama would be 0.4.6, and is not pinned",
    ]


def test_a_plain_installation_takes_the_minor_that_is_tested() -> None:
    assert untested(installs(transformers="5.24.3"), {"transformers": "5.24.0"}) == []
    assert "5.25.0" in untested(installs(transformers="5.25.0"), {"transformers": "5.24.0"})[0]


def test_nothing_that_pip_is_told_on_this_machine_counts() -> None:
    told = {"PIP_FIND_LINKS": "/wheels", "PIP_EXTRA_INDEX_URL": "file:///simple", "PIP_CONSTRAINT": "c.txt"}
    left = index_alone({**told, "PIP_CERT": "ca.crt", "HTTPS_PROXY": "proxy", "PATH": "/bin"})
    assert left["PIP_CERT"] == "ca.crt"
    assert left["HTTPS_PROXY"] == "proxy"
    assert not left.keys() & told.keys()
    asked = [sys.executable, "-m", "pip", "config", "list"]
    settings = subprocess.run(asked, env=left, capture_output=True, text=True, check=True).stdout
    assert not re.search("constraint|find-links|index", settings)


def test_a_conflict_is_told_in_pips_words() -> None:
    error = why("Python 3.11", TOLD, SAID)
    assert error.code == NOT_RESOLVED
    assert "torch 2.13.0 depends on triton==3.7.1" in str(error)
    assert "To fix" not in str(error)


def test_an_index_that_is_not_reached_is_no_success_and_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself, with a proxy that does not answer: it calls every package unknown."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--retries", "1", "--ignore-installed"]
    ran = subprocess.run(
        [*command, "numpy"], env=index_alone(resolve.os.environ), capture_output=True, text=True, check=False
    )
    assert ran.returncode
    error = why("Python 3.11", ran.stdout, ran.stderr)
    assert error.code == NOT_REACHED
    assert "cannot be reached" in str(error)


def test_pins_are_the_ends_of_what_the_package_allows() -> None:
    """The newest minor below the upper bound, and the lower bound: what lies between is taken on trust."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bounds,) = (one for one in project["dependencies"] if one.startswith("transformers"))
    lowest, above = re.fullmatch(r"transformers>=([\d.]+),<5\.(\d+)", bounds).groups()
    assert read_pins(ROOT / "constraints.txt")["transformers"].startswith(f"5.{int(above) - 1}.")
    assert read_pins(ROOT / "constraints-oldest.txt")["transformers"] == f"{lowest}.0"


def test_every_extra_is_resolved() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(resolve.EXTRAS) == sorted(project["optional-dependencies"])


def test_the_clients_environment_is_resolved_and_its_npm_part_pinned_to_the_digit() -> None:
    """The lock file names no host: npm asks the registry that it is told of."""
    (clients,) = (case for case in resolve.cases({}, {}) if case.wanted)
    assert {resolve.canonical(one) for one in clients.wanted} <= clients.pins.keys()
    assert len(clients.pins) > len(clients.wanted)
    folder = resolve.CLIENTS / "node"
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    locked = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert all(re.fullmatch(r"[\d.]+", version) for version in wanted.values())
    assert locked[""]["dependencies"] == wanted
    assert all(one["integrity"] and "resolved" not in one for path, one in locked.items() if path)
