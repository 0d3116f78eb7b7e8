"""Blocks of a Markdown page, and how each is run: as it is written, in the page's order, in one empty folder.

A comment before a block, which no reader sees, says why it is not run: `<!-- run: no (downloads) -->`; or that it is a
server, which runs until the page ends: `<!-- run: server -->`; or that what it ends with depends on the machine:
`<!-- run: any exit code -->`. A `text` block is what the block before it prints.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Why a block may not be run.
REASONS = frozenset(
    {
        "downloads",
        "installs",
        "needs a checkout",
        "needs a GPU",
        "needs another program",
        "sets up a checkout",
        "waits for the keyboard",
    }
)
RUN, SERVER, ANY_CODE = "run", "server", "any exit code"
RUNNABLE, SHOWN = frozenset({"sh", "python"}), frozenset({"toml", "json", "yaml"})
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- *run: *(.*?) *-->\s*\Z")
_PORT = "8000"
_WITHIN_S = 120.0


class MarkError(Exception):
    """A page has a block that is marked, or written, in a way that no test knows."""


@dataclass(frozen=True)
class Block:
    """how: RUN, SERVER, ANY_CODE, or why it is not run. told: lines that it must print; `...` is any text."""

    language: str
    text: str
    how: str
    told: tuple[str, ...] = ()


def blocks_of(page: str) -> list[Block]:
    """Every block of a page that could be run, in its order.

    Raises:
        MarkError: a mark, a language, or an output that no test knows.
    """
    found: list[Block] = []
    follows_output, marks = False, 0
    for fence in _FENCE.finditer(page):
        language, text = fence.groups()
        mark = _MARK.search(page, 0, fence.start())
        marks += mark is not None
        if language in RUNNABLE:
            found.append(Block(language, text, RUN if mark is None else _how(mark[1])))
        elif language == "text":
            if not found or follows_output or found[-1].how not in (RUN, ANY_CODE):
                raise MarkError(f"no block that is run stands before this output:\n{text}")
            found[-1] = Block(found[-1].language, found[-1].text, found[-1].how, tuple(text.splitlines()))
        elif language not in SHOWN:
            raise MarkError(f"{language or 'no language'}: name one of {sorted(RUNNABLE | SHOWN | {'text'})}:\n{text}")
        follows_output = language == "text"
    if marks != len(re.findall(r"<!-- *run:", page)):
        raise MarkError("a mark stands before no block")
    return found


def _how(mark: str) -> str:
    if mark in (SERVER, ANY_CODE):
        return mark
    reason = re.fullmatch(r"no \((.*)\)", mark)
    if reason is None or reason[1] not in REASONS:
        raise MarkError(
            f"run: {mark} is not known: write server, any exit code, or no (REASON) with one of {sorted(REASONS)}"
        )
    return reason[1]


def missing(told: tuple[str, ...], printed: str) -> list[str]:
    """Those lines of what is told that were not printed, in this order."""
    lines, at, absent = [" ".join(line.split()) for line in printed.splitlines()], 0, []
    for line in told:
        wanted = re.compile(".*".join(map(re.escape, " ".join(line.split()).split("..."))))
        following = next((there for there in range(at, len(lines)) if wanted.fullmatch(lines[there])), None)
        if following is None:
            absent.append(line)
        else:
            at = following + 1
    return absent


@dataclass
class Reader:
    """Someone who follows a page: an empty folder, a home of their own, and `foreroute` on the path."""

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: str = ""

    def __post_init__(self) -> None:
        for name in ("home", "bin", "work"):
            (self.folder / name).mkdir()
        program = self.folder / "bin" / "foreroute"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m foreroute "$@"\n')
        program.chmod(0o755)

    @property
    def environment(self) -> Mapping[str, str]:
        """No settings and caches of whoever runs the tests; the port, where a server was started."""
        home = self.folder / "home"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FOREROUTE_", "HF_"))}
        return {
            **kept, "HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src"),
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            **{f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CACHE", "CONFIG", "DATA", "STATE")},
        }  # fmt: skip

    def run(self, block: Block) -> str:
        """Run a block; what it prints."""
        text = block.text.replace(f"127.0.0.1:{_PORT}", f"127.0.0.1:{self.port}") if self.port else block.text
        if block.how == SERVER:
            return self._serve(text)
        if block.language == "sh":
            ran = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text], cwd=self.folder / "work", env=self.environment,
                capture_output=True, text=True, timeout=250, check=False,
            )  # fmt: skip
            assert ran.returncode == 0 or block.how == ANY_CODE, f"{text}\n{ran.stdout}\n{ran.stderr}"
            return ran.stdout + ran.stderr
        printed = StringIO()
        with contextlib.redirect_stdout(printed), contextlib.chdir(self.folder / "work"):
            exec(compile(text, "a page", "exec"), self.names)
        return printed.getvalue()

    def _serve(self, text: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        self.servers.append(
            subprocess.Popen(
                ["bash", "-c", f"exec {text}"], cwd=self.folder / "work", stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, env={**self.environment, "FOREROUTE_SERVE_PORT": self.port},
            )
        )  # fmt: skip
        end = time.monotonic() + _WITHIN_S
        while time.monotonic() < end and self.servers[-1].poll() is None:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return ""
            time.sleep(0.2)
        raise AssertionError(f"it does not serve: {text}")

    def close(self) -> None:
        """Stop what was started."""
        for server in self.servers:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                raise


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[Reader]:
    """A reader, whose servers end with the page."""
    reader = Reader(folder)
    try:
        yield reader
    finally:
        reader.close()
