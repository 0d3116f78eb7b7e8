"""Clients in environments of their own (`make clients`): each is a script that does jobs and says what came of them."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs fastapi: pip install foreroute[serve]")
pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")

from tests.cli.harness import ROOT
from tests.server.conftest import byte_tokenizer

__all__ = ["byte_tokenizer"]

Do = Callable[[str, list[dict[str, Any]]], list[dict[str, Any]]]

HERE = Path(__file__).parent
PYTHON = ROOT / ".venv-clients/bin/python"
MODULES = HERE / "node/node_modules"


def command(script: str) -> list[str]:
    """How a client is started, or why it is not tried here."""
    name, *arguments = script.split()
    if name.endswith(".py"):
        if not PYTHON.exists():
            pytest.skip("these clients have an environment of their own: make clients")
        return [str(PYTHON), str(HERE / "python" / name), *arguments]
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not on this machine, so npm's clients are not tried")
    if not MODULES.exists():
        pytest.skip("npm's clients are installed in a folder of their own: make clients")
    return [node, str(HERE / "node" / name), *arguments]


@pytest.fixture(scope="session")
def do() -> Do:
    """`do(script, jobs)`: what a client answers to each job."""

    def doing(script: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # litellm asks for its table of prices at every start, and says so where it does not get it.
        done = subprocess.run(
            command(script), input=json.dumps(jobs), capture_output=True, text=True, check=False,
            env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        results: list[dict[str, Any]] = json.loads(done.stdout)
        assert len(results) == len(jobs)
        return results

    return doing
