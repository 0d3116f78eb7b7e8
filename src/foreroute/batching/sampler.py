"""How a request's next token is drawn, how it is scored, and which texts end its answer."""

from collections.abc import Sequence
from typing import Any

import torch

from foreroute.batching.requests import Sampling, Top

# Below it, a difference of two logits in float32 (1e-7 and more) makes one of the tokens impossible.
_COLD = 1e-9


def score(logits: torch.Tensor, token: int, num_top: int | None) -> tuple[float | None, Top]:
    """A token's logprob and the likeliest ones, of the model's own distribution; nothing where None are wanted.

    Args:
        logits: [vocabulary] fp32, before any penalty or temperature.
    """
    if num_top is None:
        return None, ()
    logprobs = torch.log_softmax(logits, dim=-1)
    if num_top == 0:
        return logprobs[token].item(), ()
    values, ids = logprobs.topk(num_top)
    return logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True))


class Sampler:
    """Draws one answer's tokens, from a generator of its own: who shares its steps changes no draw.

    Args:
        asked: what the request says; what it leaves open, `settings` (the model's generation_config) says.
        prompt_ids: a repetition penalty holds for them too.

    Attributes:
        is_greedy: it takes the likeliest token as the model has it, and `draw` need not be asked.
    """

    def __init__(self, asked: Sampling, prompt_ids: Sequence[int], settings: Any) -> None:
        own_temperature = (settings.temperature or 1.0) if settings.do_sample else 0.0
        self._asked = asked
        self._temperature = own_temperature if asked.temperature is None else asked.temperature
        self._top_p = asked.top_p if asked.top_p is not None else settings.top_p or 1.0
        self._top_k = asked.top_k
        self._min_p = asked.min_p or 0.0
        self._repetition = asked.repetition_penalty or settings.repetition_penalty or 1.0
        self._seen = set(prompt_ids) if self._repetition != 1.0 else set()
        self._counts: dict[int, int] = {}
        is_plain = not (asked.presence_penalty or asked.frequency_penalty or asked.logit_bias)
        self.is_greedy = is_plain and self._temperature == 0 and self._repetition == 1.0
        self._generator = torch.Generator()
        if asked.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(asked.seed)

    def draw(self, logits: torch.Tensor) -> int:
        """The next token, from logits [vocabulary] fp32, which stay as they are."""
        row = logits.clone()
        if self._repetition != 1.0:
            seen = torch.tensor(sorted(self._seen))
            row[seen] = torch.where(row[seen] > 0, row[seen] / self._repetition, row[seen] * self._repetition)
        for token, count in self._counts.items():
            row[token] -= self._asked.presence_penalty + self._asked.frequency_penalty * count
        for token, bias in self._asked.logit_bias.items():
            row[token] += bias
        token = int(row.argmax()) if self._temperature == 0 else self._sample(self._cooled(row))
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._repetition != 1.0:
            self._seen.add(token)
        return token

    def _cooled(self, row: torch.Tensor) -> torch.Tensor:
        if self._temperature >= _COLD:
            return row / self._temperature
        # So near to nought a quotient is beyond float32: what is left is the likeliest, and those that equal it.
        return torch.where(row == row.max(), 0.0, float("-inf"))

    def _sample(self, row: torch.Tensor) -> int:
        probabilities, ids = torch.softmax(row, dim=-1).sort(descending=True, stable=True)
        kept = probabilities.cumsum(0) - probabilities < self._top_p
        kept &= probabilities >= self._min_p * probabilities[0]
        kept[0] = True
        if self._top_k:
            kept[self._top_k :] = False
        return int(ids[torch.multinomial(probabilities * kept, 1, generator=self._generator)])


class StopText:
    """Holds text back while it may become one of the texts that end an answer.

    Attributes:
        is_over: one of them has come.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held, self.is_over = stop, "", False

    def push(self, piece: str) -> str:
        """What may be said now that `piece` has come."""
        if self.is_over:
            return ""
        self._held += piece
        found = [at for at in (self._held.find(one) for one in self._stop) if at >= 0]
        if found:
            self.is_over, said, self._held = True, self._held[: min(found)], ""
            return said
        end = len(self._held) - max((self._beginning_of(one) for one in self._stop), default=0)
        said, self._held = self._held[:end], self._held[end:]
        return said

    def rest(self) -> str:
        """What was still held back, at the answer's end."""
        held, self._held = self._held, ""
        return held

    def _beginning_of(self, stop: str) -> int:
        """How many of the last characters are the beginning of `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)
