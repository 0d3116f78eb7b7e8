"""An engine that says what the test told it to, from a thread of its own, as the real one does."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from foreroute.batching.requests import EngineState, Finished, NewToken, PromptProgress, PromptScored, Request
from foreroute.errors import ContextLengthError, QueueFullError
from foreroute.model.text import TextPieces


class FakeEngine:
    """Answers every request with the same text.

    Attributes:
        answer: the text. reason: why it ends. stop_text: the stop string that ends it.
        error: what goes wrong after `fail_after` tokens.
        gate: tokens come while it is set. requests: all that were submitted. cancelled: handles that were cancelled.
    """

    def __init__(self, tokenizer: Any, answer: str = "Hello", context: int = 64, most_open: int = 16) -> None:
        self._tokenizer, self.context, self.most_open = tokenizer, context, most_open
        self.answer, self.reason = answer, "stop"
        self.error: str | None = None
        self.stop_text: str | None = None
        self.fail_after = 2
        self.gate = threading.Event()
        self.gate.set()
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self._open: dict[int, threading.Event] = {}
        self._callbacks: dict[int, Callable[[Any], None]] = {}
        self._lock = threading.Lock()

    def submit(self, request: Request, on_event: Callable[[Any], None]) -> int:
        num_prompt = len(request.prompt_ids)
        if num_prompt + (request.max_new_tokens != 0) > self.context:
            raise ContextLengthError(f"The context holds {self.context} tokens, and the prompt has {num_prompt}.")
        with self._lock:
            if len(self._open) >= self.most_open:
                raise QueueFullError(f"{self.most_open} requests wait already.")
            handle = len(self.requests)
            self.requests.append(request)
            stop = self._open[handle] = threading.Event()
            self._callbacks[handle] = on_event
        threading.Thread(target=self._work, args=(handle, request, on_event, stop), daemon=True).start()
        return handle

    def cancel(self, handle: int) -> None:
        with self._lock:
            if handle in self._open:
                self.cancelled.append(handle)
                self._open.pop(handle).set()

    def state(self) -> EngineState:
        return EngineState(running=len(self._open), waiting=0, kv_blocks_used=len(self._open), kv_blocks=self.most_open)

    def close(self) -> None:
        for handle in list(self._open):
            self._callbacks[handle](Finished("cancelled", error="The server is shutting down."))
            self.cancel(handle)

    def _work(self, handle: int, request: Request, on_event: Callable[[Any], None], stop: threading.Event) -> None:
        num_prompt = len(request.prompt_ids)
        on_event(PromptProgress(num_prompt, num_prompt))
        if request.wants_prompt_scores:
            logprobs = [None, *(self._logprob(token) for token in request.prompt_ids[1:])]
            tops = [None, *(self._top(token, request) for token in request.prompt_ids[1:])]
            on_event(PromptScored(logprobs, tops))
        ids = self._tokenizer(self.answer, add_special_tokens=False)["input_ids"]
        reason = self.reason
        if request.max_new_tokens is not None and len(ids) > request.max_new_tokens:
            ids, reason = ids[: request.max_new_tokens], "length"
        pieces = TextPieces(self._tokenizer, request.shown_special)
        for at, token in enumerate(ids):
            while not self.gate.wait(0.02):
                if stop.is_set():
                    return
            if stop.is_set():
                return
            if self.error is not None and at >= self.fail_after:
                self._end(handle, on_event, Finished("error", error=self.error))
                return
            has_logprobs = request.num_top_logprobs is not None
            logprob = self._logprob(token) if has_logprobs else None
            on_event(NewToken(token, pieces.push(token), logprob, self._top(token, request) if has_logprobs else ()))
        self._end(
            handle, on_event, Finished(reason, num_prompt, len(ids), 0, pieces.finish(), stop_text=self.stop_text)
        )

    def _end(self, handle: int, on_event: Callable[[Any], None], event: Finished) -> None:
        with self._lock:
            if self._open.pop(handle, None) is None:
                return
        on_event(event)

    @staticmethod
    def _logprob(token: int) -> float:
        return -math.log(2 + token % 7)

    def _top(self, token: int, request: Request) -> Sequence[tuple[int, float]]:
        count = request.num_top_logprobs or 0
        return [(token + at, self._logprob(token) - at) for at in range(count)]
