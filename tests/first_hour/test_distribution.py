"""What is published: a lean source distribution, of which the wheel can be made; and project files that are true."""

import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

import foreroute
from tests.support.wheel import ROOT, build_sdist, build_wheel

MOST_BYTES = 24 * 10**6  # the model that ships has 22.4 MB


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdist(tmp_path_factory.mktemp("sdist"))


def test_the_sdist_has_what_the_wheel_is_made_of_and_no_results(sdist: Path) -> None:
    assert sdist.stat().st_size <= MOST_BYTES
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.partition("/")[0] for name in names if "/" in name} == {"src", "docs", "examples", "models"}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "pyproject.toml"} <= names
    assert {name.split("/")[1] for name in names if name.startswith("models/")} == {"foreroute-tiny"}
    assert not [name for name in names if name.endswith(("history.json", "figures.json", ".pyc", ".foreroute"))]


def test_the_wheel_of_the_sdist_is_that_of_the_repository(sdist: Path, tmp_path: Path) -> None:
    import zipfile

    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    found = []
    for name, source in (("ours", ROOT), ("theirs", root)):
        (tmp_path / f"{name}-wheel").mkdir()
        with zipfile.ZipFile(build_wheel(tmp_path / f"{name}-wheel", source)) as wheel:
            found.append(
                {entry.filename: entry.CRC for entry in wheel.infolist() if not entry.filename.endswith("RECORD")}
            )
    assert found[0] == found[1]


def project() -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        tomllib = pytest.importorskip("tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_versions_are_said_alike() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {foreroute.__version__}\n" in citation
    about = project()
    assert about["version"] == foreroute.__version__
    least = about["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {least}" in about["classifiers"]
    assert f"Python {least} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_image_runs_what_exists(run: Any) -> None:
    """No container runtime is needed: its command is one of ours, its extra and its health check exist."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    command = re.search(r"^CMD \[(.*)\]$", text, re.MULTILINE)
    assert command is not None
    words = re.findall(r'"([^"]+)"', command[1])
    told = run(words[0], "--help").out
    assert all(word in told for word in words if word.startswith("--"))
    assert set(re.findall(r"'\.\[(\w+)\]'", text)) <= set(project()["optional-dependencies"])
    assert "/health" in text
    assert "\nUSER foreroute\n" in text
