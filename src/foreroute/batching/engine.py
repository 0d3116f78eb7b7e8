"""Several requests at once on one model: a prompt's chunk, then one token for all rows, and again.

Each decode step is one forward pass of [rows, 1], so that an expert that several rows want is read once for them all.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from foreroute.batching.answer import Answer
from foreroute.batching.requests import EngineState, Event, Finished, Request
from foreroute.batching.rows import OneRow, RowsCache, kv_bytes, why_not_batched
from foreroute.engine.lean_loop import is_ordinary
from foreroute.engine.prompt_cache import PromptCache, can_be_continued, new_cache
from foreroute.errors import ContextLengthError, ForerouteError, QueueFullError

_LOG = logging.getLogger(__name__)
# Tokens that each request has room for, where the context is longer.
_USUAL_TOKENS = 4096
_MOST_KEPT_BYTES = 2**30


class BatchEngine:
    """Answers requests, several at once, in the order in which they came. All methods: see requests.Engine.

    Args:
        model: of `foreroute.load`; nothing else may use it meanwhile. tokenizer: of transformers.
        context: tokens of prompt and answer together.
        max_num_seqs: requests computed at once. max_waiting: further ones that may wait.
        kv_tokens: of keys and values, rows times the longest of them, padding included. When left out, each row has
            room for the context or 4096 tokens, and one alone for the whole context.

    Attributes:
        rows: requests computed at once: 1 where the model cannot be batched. why_one_row: the reason, or "".
        kv_tokens: as above. kv_bytes: of so many tokens, at most.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        context: int,
        max_num_seqs: int = 8,
        max_waiting: int = 64,
        kv_tokens: int | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.why_one_row = why_not_batched(model)
        self.rows = 1 if self.why_one_row else max_num_seqs
        self.kv_tokens = kv_tokens or max(context, self.rows * min(context, _USUAL_TOKENS))
        self.kv_bytes = kv_bytes(model.config, self.kv_tokens, model.dtype.itemsize)
        self._context = min(context, self.kv_tokens)
        self._most_open = max_num_seqs + max_waiting
        eos = model.generation_config.eos_token_id
        self._ends = frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)
        cache = new_cache(model)
        self._can_continue = cache is not None and is_ordinary(model) and can_be_continued(model, cache)
        self._kept = PromptCache(min(_MOST_KEPT_BYTES, self.kv_bytes)) if self._can_continue else None
        # The lock guards these; computing needs none, as one thread does it.
        self._changed = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._joining: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._is_closed = False
        self._batch: RowsCache | OneRow = self._empty_batch()
        self._thread = threading.Thread(target=self._work, name="foreroute-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Answer:
        """See requests.Engine."""
        num_prompt, most_new = len(request.prompt_ids), request.max_new_tokens
        wanted = num_prompt + (1 if most_new is None else most_new)
        if wanted > self._context:
            raise ContextLengthError(
                f"The context holds {self._context} tokens; {wanted} are asked for ({num_prompt} of the prompt). "
                "Shorten the prompt or ask for fewer."
            )
        if most_new is None:
            # A fair share, so that who says nothing does not keep all others waiting.
            share = self.kv_tokens // self.rows
            most_new = min(self._context - num_prompt, max(share - num_prompt, share // 4, 1))
        answer = Answer(request, on_event, most_new)
        with self._changed:
            num_open = len(self._waiting) + len(self._joining) + len(self._running)
            if self._is_closed or num_open >= self._most_open:
                raise QueueFullError(f"{num_open} requests are computed or wait already. Try again later.")
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def cancel(self, handle: Answer) -> None:
        """See requests.Engine. What it holds is free before the next step."""
        handle.cancel("The request was cancelled.")

    def state(self) -> EngineState:
        """See requests.Engine."""
        with self._changed:
            return EngineState(
                running=len(self._joining) + len(self._running),
                waiting=len(self._waiting),
                kv_blocks_used=self._held(),
                kv_blocks=self.kv_tokens,
            )

    def close(self) -> None:
        """See requests.Engine. Waits for the forward pass that runs."""
        with self._changed:
            self._is_closed = True
            for answer in (*self._waiting, *self._joining, *self._running):
                answer.cancel("The server is shutting down.")
            self._changed.notify()
        self._thread.join()

    def _held(self, *more: Answer) -> int:
        """Tokens that the rows which are admitted, and these, may come to hold, padding included."""
        lengths = [answer.reserved for answer in (*self._joining, *self._running, *more)]
        return len(lengths) * max(lengths, default=0)

    @torch.no_grad()
    def _work(self) -> None:
        while self._await_work():
            try:
                self._drop_cancelled()
                self._admit()
                if self._joining:
                    self._prefill()
                if self._running:
                    self._decode()
            except Exception as error:  # noqa: BLE001  a thread that died would leave everybody waiting for ever
                _LOG.exception("the engine failed between steps; its requests are ended")
                self._fail([*self._joining, *self._running], error)

    def _await_work(self) -> bool:
        """False when the engine is closed and all requests have ended."""
        with self._changed:
            while not (self._waiting or self._joining or self._running):
                if self._is_closed:
                    return False
                self._changed.wait()
        return True

    def _drop_cancelled(self) -> None:
        for answer in [one for one in (*self._waiting, *self._joining) if one.is_cancelled]:
            self._end(answer, answer.finished("cancelled", answer.why_cancelled))
        self._take_out(
            {
                answer: answer.finished("cancelled", answer.why_cancelled)
                for answer in self._running
                if answer.is_cancelled
            }
        )

    def _admit(self) -> None:
        """Those that waited longest, while there are rows and room for them."""
        while self._waiting and len(self._joining) + len(self._running) < self.rows:
            answer = self._waiting[0]
            if self._held(answer) > self.kv_tokens:
                return
            with self._changed:
                self._waiting.popleft()
                self._joining.append(answer)
            try:
                self._begin(answer)
            except Exception as error:  # noqa: BLE001  told to the one that it concerns
                self._end(answer, _failed(answer, error))

    def _begin(self, answer: Answer) -> None:
        cache, num_cached = None, 0
        if self._kept is not None and not answer.request.wants_prompt_scores:
            # A last token alone would be decoded, not prefilled, and so not be exact under every policy.
            cache, num_cached = self._kept.take(self._model, answer.ids, len(answer.ids) - 2)
        chunk = self._model.foreroute.plan.prefill_chunk if self._can_continue else None
        answer.begin(self._model, self._tokenizer, cache or new_cache(self._model), num_cached, chunk)

    def _prefill(self) -> None:
        """One chunk of one prompt; the prompts that are being computed take turns."""
        answer = self._joining[0]
        try:
            logits = answer.prefill(self._model)
            if logits is None:
                with self._changed:
                    self._joining.rotate(-1)
                return
            if answer.wants_none:
                end: Finished | None = answer.finished("length")
            else:
                end = answer.advance(logits, int(logits.argmax()), self._ends)
            if end is None:
                self._batch.arrange(range(len(self._running)), [(answer.cache, answer.num_computed)])
        except Exception as error:  # noqa: BLE001  told to the one that it concerns
            end = _failed(answer, error)
        if end is not None:
            self._keep(answer, answer.cache, end)
            self._end(answer, end)
            return
        answer.cache = None
        with self._changed:
            self._joining.popleft()
            self._running.append(answer)

    def _decode(self) -> None:
        """One token for every row."""
        try:
            logits = self._batch.step(self._model, [answer.ids[-1] for answer in self._running])
            likeliest = logits.argmax(-1).tolist()
        except Exception as error:  # noqa: BLE001  told to those that it concerns
            self._fail(self._running, error)
            return
        ended: dict[Answer, Finished] = {}
        for answer, row, token in zip(self._running, logits, likeliest, strict=True):
            answer.num_computed += 1
            try:
                end = answer.advance(row, token, self._ends)
            except Exception as error:  # noqa: BLE001  told to the one that it concerns
                end = _failed(answer, error)
            if end is not None:
                ended[answer] = end
        self._take_out(ended)

    def _take_out(self, ended: dict[Answer, Finished]) -> None:
        """These rows are not computed any more."""
        if not ended:
            return
        for at, answer in enumerate(self._running):
            if answer in ended:
                self._keep(answer, self._batch.row(at), ended[answer])
        self._batch.arrange([at for at, answer in enumerate(self._running) if answer not in ended], [])
        for answer, end in ended.items():
            self._end(answer, end)

    def _keep(self, answer: Answer, cache: Any, end: Finished) -> None:
        """Leave what was computed for the next prompt that begins alike."""
        if self._kept is None or end.reason == "error" or answer.request.wants_prompt_scores:
            return
        ids = answer.ids[: answer.num_computed]
        # A stand-in leaves its mark on what is computed after it; the prompt is exact always.
        if any(policy.stands_in or policy.replaces_route for policy in self._model.foreroute.policies):
            ids = ids[: len(answer.request.prompt_ids)]
        self._kept.keep(self._model, ids, cache)

    def _end(self, answer: Answer, end: Finished) -> None:
        with self._changed:
            for place in (self._waiting, self._joining, self._running):
                if answer in place:
                    place.remove(answer)
        answer.cache = None
        answer.tell(end)

    def _fail(self, answers: Sequence[Answer], error: Exception) -> None:
        """End these, the rows that decode among them."""
        self._batch = self._empty_batch()
        for answer in list(answers):
            self._end(answer, _failed(answer, error))

    def _empty_batch(self) -> RowsCache | OneRow:
        return OneRow() if self.why_one_row else RowsCache()


def _failed(answer: Answer, error: Exception) -> Finished:
    text = str(error) if isinstance(error, ForerouteError) else f"The engine failed ({type(error).__name__})."
    return answer.finished("error", text)
