"""Record one answer's tokens: their times, their text as it comes, and whether a stop string has come."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from foreroute.model.text import StopText, TextPieces


class TokenRecorder(BaseStreamer):
    """A transformers streamer: called with the prompt and then with every token, it notes the time and passes text on.

    Args:
        stop: stop strings; they are not passed on.

    Attributes:
        ids, times_s: of the tokens so far; Ctrl-C may leave one more time. written: the text passed on so far.
    """

    def __init__(
        self, tokenizer: Any, on_text: Callable[[str], None], clock: Callable[[], float], stop: Sequence[str]
    ) -> None:
        self.ids: list[int] = []
        self.times_s: list[float] = []
        self.written: list[str] = []
        self._pieces = TextPieces(tokenizer)
        self._stop = StopText(stop)
        self._on_text = on_text
        self._clock = clock
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, in the first call; then one token per call."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.add(int(value))

    def add(self, token_id: int) -> None:
        """Take a new token."""
        self.times_s.append(self._clock())
        self.ids.append(token_id)
        self._say(self._stop.push(self._pieces.push(token_id), self._pieces.hidden(token_id)))

    def end(self) -> None:
        """Pass on the text that was held back, after the last token."""
        self._say(self._stop.push(self._pieces.finish()))
        self._say(self._stop.rest())

    @property
    def is_over(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.is_over

    def _say(self, text: str) -> None:
        if text:
            self.written.append(text)
            self._on_text(text)


class StopWhen(StoppingCriteria):
    """A stopping criterion that ends all rows when `should_stop` returns True; called after every token."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self._should_stop(), dtype=torch.bool, device=input_ids.device)
