"""Render chat messages to a prompt: by the model's own template, isolated in another process."""

import contextlib
import json
import subprocess
import threading
from collections.abc import Mapping
from typing import Any

from foreroute.children import child_command, child_environment
from foreroute.server.api.problems import ApiError
from foreroute.server.dialogue.reading import TemplateReading
from foreroute.server.settings import Limits
from foreroute.system.pipes import exchange

_WORKER = "foreroute.server.dialogue.template_worker"


class TemplateRenderer:
    """Renders a chat template in a separate process, which is kept for the next request.

    Only what `render` is given and the tokenizer's special tokens reach the template.

    Args:
        template: the model's chat template (Jinja).
        special: the names of special tokens, as the tokenizer gives them to templates.
        limits: template_s, template_bytes and template_chars apply to every rendering.
    """

    def __init__(self, template: str, special: dict[str, str], limits: Limits) -> None:
        self._template, self._special, self._limits = template, special, limits
        self._reading: TemplateReading | None = None
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def start(self) -> None:
        """Start the process before the first request needs it. Takes about a second."""
        with self._lock:
            self._ready_worker()

    def reading(self) -> TemplateReading:
        """What the template reads; found once. Blocks, like `render`.

        Raises:
            ApiError: as `render`: the template cannot be used at all.
        """
        if self._reading is None:
            self._reading = TemplateReading.from_json(self._ask({"variables": self._special})["reading"])
        return self._reading

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render these messages to a prompt that ends where the answer begins. Blocks; one at a time.

        Args:
            tools: as OpenAI has them; None: none. variables: further ones; those of special tokens stay as they are.
        Raises:
            ApiError: the template refuses the messages, or exceeds its limits of time, memory or text.
        """
        given = {**(variables or {}), **self._special}
        return str(self._ask({"messages": messages, "tools": tools, "variables": given})["text"])

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Exchange a line with the process.

        Raises:
            ApiError: see `render`.
        """
        limits = {"most_chars": self._limits.template_chars, "most_s": self._limits.template_s}
        line = json.dumps({"template": self._template, **asked, **limits}).encode() + b"\n"
        with self._lock:
            worker = self._ready_worker()
            answer = exchange(worker, line, self._limits.template_s)
            if answer is None:
                was_killed = worker.poll() is None
                self._stop_worker()
                why = f"takes more than {self._limits.template_s:g} s" if was_killed else "takes too much memory"
                raise refused(f"it {why}")
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise refused(found["error"])
        return found

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._is_closed = True
            self._stop_worker()

    def _ready_worker(self) -> subprocess.Popen[bytes]:
        if self._is_closed:
            raise ApiError(503, "The server is shutting down.", code="shutting_down")
        if self._worker is None or self._worker.poll() is not None:
            self._stop_worker()
            self._worker = subprocess.Popen(
                child_command(_WORKER, self._limits.template_bytes),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=child_environment(),
                start_new_session=True,  # Ctrl-C is for the server alone
            )
            if exchange(self._worker, b"", 60.0) is None:
                self._stop_worker()
                raise ApiError(500, "The process that renders chat templates does not start.", code="internal_error")
        return self._worker

    def _stop_worker(self) -> None:
        if self._worker is None:
            return
        self._worker.kill()
        self._worker.wait()
        for pipe in (self._worker.stdin, self._worker.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._worker = None


def refused(why: str) -> ApiError:
    """Make a 400: the template refuses the messages, because of `why`."""
    return ApiError(
        400, f"The model's chat template refuses these messages: {why}", param="messages", code="template_error"
    )
