"""The command line in this process, the tiny model as in tests/cli, and a config file of the test's own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import run as run
from tests.cli.conftest import same_threads_afterwards as same_threads_afterwards
from tests.cli.conftest import tiny as tiny


@pytest.fixture(autouse=True)
def settings_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of settings: not that of whoever runs the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.delenv("FOREROUTE_CONFIG", raising=False)
    return tmp_path / "settings"


@pytest.fixture
def config(settings_folder: Path) -> Callable[[str], Path]:
    """Write the config file, and return its path."""

    def write(text: str) -> Path:
        path = settings_folder / "foreroute" / "config.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write
