"""The simplest engine: one request after another, each token by an ordinary forward pass."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foreroute.engine.prompt_cache import new_cache
from foreroute.engine.text import TextPieces
from foreroute.errors import ContextLengthError, ForerouteError, QueueFullError
from foreroute.server.port import (
    EngineState,
    Event,
    Finished,
    Progress,
    PromptScored,
    Request,
    Sampling,
    Step,
)


@dataclass(eq=False)
class _Asked:
    request: Request
    on_event: Callable[[Event], None]
    is_cancelled: bool = False


class PlainEngine:
    """Answers requests one by one, in the order in which they came.

    Args:
        model: of `foreroute.load`. tokenizer: of transformers.
        context: tokens of prompt and answer together. most_waiting: requests that may wait.
    """

    def __init__(self, model: Any, tokenizer: Any, context: int, most_waiting: int = 64) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._context, self._most_waiting = context, most_waiting
        self._lock = threading.Lock()
        self._waiting: queue.Queue[_Asked | None] = queue.Queue()
        self._open: set[_Asked] = set()
        self._is_closed = False
        eos = model.generation_config.eos_token_id
        self._ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
        self._thread = threading.Thread(target=self._work, name="foreroute-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Any:
        """See port.Engine."""
        wanted = len(request.prompt_ids) + (1 if request.max_new_tokens is None else request.max_new_tokens)
        if wanted > self._context:
            raise ContextLengthError(
                f"The context holds {self._context} tokens; {wanted} are asked for ({len(request.prompt_ids)} of the "
                "prompt). Shorten the prompt or ask for fewer."
            )
        asked = _Asked(request, on_event)
        with self._lock:
            if self._is_closed or len(self._open) > self._most_waiting:
                raise QueueFullError(f"{self._most_waiting} requests wait already. Try again later.")
            self._open.add(asked)
        self._waiting.put(asked)
        return asked

    def cancel(self, handle: Any) -> None:
        """See port.Engine."""
        handle.is_cancelled = True

    def state(self) -> EngineState:
        """See port.Engine."""
        waiting = self._waiting.qsize()
        return EngineState(running=max(len(self._open) - waiting, 0), waiting=waiting, kv_blocks_used=0, kv_blocks=0)

    def close(self) -> None:
        """See port.Engine. Waits for the forward pass that runs."""
        with self._lock:
            self._is_closed = True
            for asked in self._open:
                asked.is_cancelled = True
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (asked := self._waiting.get()) is not None:
            try:
                end = self._answer(asked)
            except ForerouteError as error:
                end = Finished("error", error=str(error))
            except RuntimeError as error:
                end = Finished("error", error=f"The engine failed ({type(error).__name__}).")
            with self._lock:
                self._open.discard(asked)
            asked.on_event(end)

    @torch.no_grad()
    def _answer(self, asked: _Asked) -> Finished:
        request, num_prompt = asked.request, len(asked.request.prompt_ids)
        cache, sampler = new_cache(self._model), _Sampler(request, self._model.generation_config)
        logits = self._prefill(asked, cache)
        room = self._context - num_prompt
        most_new = room if request.max_new_tokens is None else request.max_new_tokens
        pieces, text = TextPieces(self._tokenizer), _StopText(request.stop)
        count = 0
        while count < most_new:
            if asked.is_cancelled or logits is None:
                return Finished("cancelled", num_prompt, count, error="The server is shutting down.")
            token = sampler.draw(logits)
            count += 1
            is_end = token in self._ends
            piece = "" if is_end else text.push(pieces.push(token))
            logprob, top = scored(logits, token, request.num_top_logprobs)
            asked.on_event(Step(token, piece, logprob, top))
            if is_end or text.is_over:
                tail = "" if text.is_over else text.push(pieces.finish()) + text.rest()
                return Finished("stop", num_prompt, count, 0, tail)
            if count < most_new:
                logits = self._forward([token], cache)[-1]
        tail = text.push(pieces.finish())
        return Finished("length", num_prompt, count, 0, tail + ("" if text.is_over else text.rest()))

    def _prefill(self, asked: _Asked, cache: Any) -> torch.Tensor | None:
        """The logits after the prompt; None when the request was cancelled meanwhile."""
        request, ids = asked.request, list(asked.request.prompt_ids)
        chunk = self._model.foreroute.plan.prefill_chunk
        logprobs: list[float | None] = [None]
        tops: list[Sequence[tuple[int, float]] | None] = [None]
        logits = torch.empty(0)
        for at in range(0, len(ids), chunk):
            if asked.is_cancelled:
                return None
            logits = self._forward(ids[at : at + chunk], cache)
            if request.wants_prompt_scores:
                for row, token in zip(logits, ids[at + 1 : at + chunk + 1], strict=False):
                    logprob, top = scored(row, token, request.num_top_logprobs or 0)
                    logprobs.append(logprob)
                    tops.append(top)
            asked.on_event(Progress(min(at + chunk, len(ids)), len(ids)))
        if request.wants_prompt_scores:
            asked.on_event(PromptScored(logprobs, tops))
        return logits[-1]

    def _forward(self, ids: list[int], cache: Any) -> torch.Tensor:
        out = self._model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        return out.logits[0].float()


def scored(logits: torch.Tensor, token: int, num_top: int | None) -> tuple[float | None, Sequence[tuple[int, float]]]:
    """A token's logprob and the likeliest ones, of the model's own distribution; nothing where None are wanted."""
    if num_top is None:
        return None, ()
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(num_top) if num_top else (logprobs[:0], logprobs[:0])
    return logprobs[token].item(), [(int(at), value) for at, value in zip(ids.tolist(), values.tolist(), strict=True)]


class _Sampler:
    """Draws tokens as a request asks; what it leaves open, the model's generation_config says."""

    def __init__(self, request: Request, settings: Any) -> None:
        asked: Sampling = request.sampling
        own_temperature = (settings.temperature or 1.0) if settings.do_sample else 0.0
        self.temperature = own_temperature if asked.temperature is None else asked.temperature
        self.top_p = asked.top_p if asked.top_p is not None else settings.top_p or 1.0
        self.top_k = asked.top_k
        self.min_p = asked.min_p or 0.0
        self.repetition = asked.repetition_penalty or settings.repetition_penalty or 1.0
        self.asked = asked
        self._seen = torch.tensor(sorted(set(request.prompt_ids)))
        self._counts: dict[int, int] = {}
        self._generator = torch.Generator()
        if asked.seed is not None:
            self._generator.manual_seed(asked.seed)
        else:
            self._generator.seed()

    def draw(self, logits: torch.Tensor) -> int:
        """The next token."""
        row = logits.clone()
        if self.repetition != 1.0:
            seen = torch.cat([self._seen, torch.tensor(list(self._counts), dtype=torch.long)]).unique()
            row[seen] = torch.where(row[seen] > 0, row[seen] / self.repetition, row[seen] * self.repetition)
        for token, count in self._counts.items():
            row[token] -= self.asked.presence_penalty + self.asked.frequency_penalty * count
        for token, bias in self.asked.logit_bias.items():
            row[token] += bias
        token = int(row.argmax()) if self.temperature == 0 else self._sample(row / self.temperature)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _sample(self, row: torch.Tensor) -> int:
        probabilities, ids = torch.softmax(row, dim=-1).sort(descending=True)
        kept = probabilities.cumsum(0) - probabilities < self.top_p
        kept &= probabilities >= self.min_p * probabilities[0]
        if self.top_k is not None:
            kept[self.top_k :] = False
        at = torch.multinomial(probabilities * kept, 1, generator=self._generator)
        return int(ids[at])


class _StopText:
    """Holds back what may become one of the stop texts."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held, self.is_over = stop, "", False

    def push(self, piece: str) -> str:
        """What may be said now."""
        if self.is_over:
            return ""
        self._held += piece
        found = [at for at in (self._held.find(one) for one in self._stop) if at >= 0]
        if found:
            self.is_over, said, self._held = True, self._held[: min(found)], ""
            return said
        keep = max((self._may_begin(one) for one in self._stop), default=0)
        said, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return said

    def rest(self) -> str:
        """What was held back at the end."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, stop: str) -> int:
        """How many of the last characters are the beginning of a stop text."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)
