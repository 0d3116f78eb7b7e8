"""Several requests at once on one model: their queue, and which of them are computed, by rows and KV cache.

What is computed of them, one forward pass of several rows after another, is in steps.py.
"""

import itertools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from foreroute.batching.answer import Answer
from foreroute.batching.beginnings import beginnings_of
from foreroute.batching.drafts import drafts_of
from foreroute.batching.requests import AnswerEvent, EngineState, Request
from foreroute.batching.room import CacheRoom
from foreroute.batching.rows import can_be_padded, why_not_batched
from foreroute.batching.steps import RowSteps, cancelled
from foreroute.errors import ContextLengthError, PromptError, QueueFullError
from foreroute.generation.prefix_cache import PrefixCounts
from foreroute.loading.offloaded_model import OffloadedModel, handle_of
from foreroute.memory.freed import FreedMemory
from foreroute.memory.serving import keeps_prompts, planned_kv_bytes_per_token
from foreroute.memory.serving_budget import MOST_SCORED_WHOLE, choose_kv_tokens

_LOG = logging.getLogger(__name__)
# Without requests, after which what is kept of prompts is written to its folder, if there is one.
_IDLE_S = 30.0


class BatchEngine:
    """Answers requests, several at once, first come first served. All methods: see requests.Engine.

    Args:
        model: of `foreroute.load`; its other users wait for the steps here, and these for them. tokenizer: its own.
        context: tokens of prompt and answer together.
        max_num_seqs: most requests computed at once. max_waiting: most further ones that may wait.
        kv_tokens: capacity of the KV cache: rows times the longest of them, padding included. None: the context or
            4096 tokens for each row, and at least one whole context.
        prefix_folder: where beginnings of prompts are kept for a later process; None: nowhere.
    Raises:
        ForerouteError: that folder cannot be written, or is in use by another process with this model.
        RefusedError: a draft was asked for, and what is not chosen could not be taken back.

    Attributes:
        rows: most requests computed at once: 1 where the model cannot be batched. why_one_row: the reason, or "".
        kv_tokens: as above. kv_bytes: of the full KV cache.
    """

    def __init__(
        self,
        model: OffloadedModel,
        tokenizer: Any,
        context: int,
        max_num_seqs: int = 8,
        max_waiting: int = 64,
        kv_tokens: int | None = None,
        prefix_folder: Path | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.why_one_row = why_not_batched(model)
        self.rows = 1 if self.why_one_row else max_num_seqs
        self.kv_tokens = kv_tokens or choose_kv_tokens(None, context, self.rows)
        handle = handle_of(model)
        self.kv_bytes = self.kv_tokens * planned_kv_bytes_per_token(model, handle.plan, handle.layers)
        self._context = min(context, self.kv_tokens)
        self._room = CacheRoom(self.kv_tokens, self.rows, self._context)
        self._most_open = max_num_seqs + max_waiting
        self._can_continue = keeps_prompts(model)
        self._can_pad = not self.why_one_row and can_be_padded(model)
        self._drafts = drafts_of(model, self.why_one_row, can_pad=self._can_pad)
        self._kept = beginnings_of(model, self.kv_bytes, self.kv_tokens, prefix_folder)
        # The lock guards these, and which answers are computed; computing needs none, as only one thread computes.
        self._changed = threading.Condition()
        self._waiting: list[Answer] = []  # by their turns
        self._turns = itertools.count()
        self._is_closed = False
        # The first that waits for rows or KV cache.
        self._blocked: Answer | None = None
        self._num_set_aside = 0
        self._steps = RowSteps(
            model,
            tokenizer,
            self._context,
            self._kept,
            self._drafts,
            self._changed,
            is_one_row=bool(self.why_one_row),
        )
        self._thread = threading.Thread(target=self._work, name="foreroute-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: Callable[[AnswerEvent], None]) -> Answer:
        """See requests.Engine.

        Raises:
            RefusedError: this process was forked from the one that loaded the model.
        """
        # Raises in a forked process, which has no thread to answer.
        _ = self._model.foreroute.lock
        num_prompt, most_new = len(request.prompt_ids), request.max_new_tokens
        if not num_prompt:
            raise PromptError("The prompt is empty: there is no token to start from.")
        if request.wants_prompt_scores and self._model.config.is_encoder_decoder:
            raise PromptError("An encoder-decoder reads its prompt at once and predicts none of it: it has no scores.")
        if request.wants_prompt_scores and not self._can_continue and num_prompt > MOST_SCORED_WHOLE:
            raise ContextLengthError(
                f"This model computes a prompt at once, and scores {MOST_SCORED_WHOLE} tokens of it at most; "
                f"{num_prompt} are asked for. Shorten the prompt, or ask for no scores."
            )
        # What is asked for beyond the context is no reason to refuse: the answer ends there.
        if num_prompt + (most_new != 0) > self._context:
            raise ContextLengthError(
                f"The context holds {self._context} tokens, and the prompt has {num_prompt}. Shorten the prompt."
            )
        limit = self._room.most_new(num_prompt, most_new, self._model.generation_config.max_new_tokens)
        answer = Answer(request, on_event, limit)
        answer.reserved = self._room.first(num_prompt, answer.most)
        with self._changed:
            num_open = len(self._waiting) + len(self._steps.answers)
            if self._is_closed or num_open >= self._most_open:
                raise QueueFullError(f"{num_open} requests are computed or wait already. Try again later.")
            answer.turn = next(self._turns)
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def cancel(self, handle: Answer) -> None:
        """See requests.Engine. Its memory is free before the next step."""
        handle.cancel("The request was cancelled.")

    def state(self) -> EngineState:
        """See requests.Engine."""
        counts = PrefixCounts() if self._kept is None else self._kept.counts
        drafts = self._drafts
        with self._changed:
            return EngineState(
                running=len(self._steps.answers),
                waiting=len(self._waiting),
                kv_blocks_used=self._room.held(self._steps.answers),
                kv_blocks=self.kv_tokens,
                prefix_bytes=0 if self._kept is None else self._kept.nbytes,
                prefix_lookups=counts.lookups,
                prefix_hits=counts.hits,
                prefix_tokens=counts.tokens_saved,
                drafted=None if drafts is None else drafts.drafted,
                accepted=None if drafts is None else drafts.accepted,
                verify_steps=None if drafts is None else drafts.verify_steps,
                set_aside=self._num_set_aside,
            )

    def close(self) -> None:
        """See requests.Engine. Waits for the current forward pass."""
        if self._model.foreroute.entry.is_forked:
            return
        with self._changed:
            self._is_closed = True
            for answer in (*self._waiting, *self._steps.answers):
                answer.cancel("The server is shutting down.")
            self._changed.notify()
        self._thread.join()
        if self._kept is not None:
            self._kept.close()

    @torch.no_grad()
    def _work(self) -> None:
        freed = FreedMemory()
        while self._await_work():
            try:
                self._drop_cancelled()
                self._admit()
                self._make_room()
                self._steps.compute()
            except Exception as error:  # noqa: BLE001  without the thread, all requests would wait for ever
                _LOG.exception("the engine failed between steps; its requests are ended")
                self._steps.fail_all(error)
            freed.give_back(is_idle=not (self._waiting or self._steps.answers))

    def _await_work(self) -> bool:
        """Wait for requests; False when the engine is closed and all have ended. Meanwhile beginnings are saved."""
        while True:
            is_idle = False
            with self._changed:
                while not (self._waiting or self._steps.answers or is_idle):
                    if self._is_closed:
                        return False
                    is_unsaved = self._kept is not None and self._kept.is_unsaved
                    is_idle = not self._changed.wait(_IDLE_S if is_unsaved else None)
            if not is_idle:
                return True
            assert self._kept is not None, "something is kept"
            self._kept.save(lambda: not (self._waiting or self._is_closed))

    def _drop_cancelled(self) -> None:
        with self._changed:
            ended = cancelled(self._waiting)
            for answer in ended:
                self._waiting.remove(answer)
        for answer, end in ended.items():
            answer.tell(end)
        self._steps.drop_cancelled()

    def _admit(self) -> None:
        """Admit waiting requests in order, while rows and KV cache are free."""
        most_prompts = self.rows if self._can_pad else 1
        with self._changed:
            waiting = list(self._waiting)
        self._blocked, is_full = None, False
        for answer in waiting:
            admitted = self._steps.answers
            if len(admitted) >= self.rows:
                self._blocked = self._blocked or answer
                return
            if self._kept is not None and self._kept.is_computed_by(self._steps.joining, answer):
                # It joins when the beginning that it shares with another prompt has been computed.
                continue
            has_room = self._room.fits([*admitted, answer])
            if not is_full and not has_room:
                self._blocked = answer
            is_full = is_full or not has_room or len(self._steps.joining) >= most_prompts
            if is_full:
                continue
            with self._changed:
                self._waiting.remove(answer)
                self._steps.joining.append(answer)
            self._steps.begin(answer)

    def _make_room(self) -> None:
        """Give more room to answers that have used theirs up; where there is none, the last that came gives way."""
        for answer in sorted(self._steps.running, key=_turn):
            while answer in self._steps.running and answer.num_left < 1:
                if self._gives_its_turn(answer):
                    with self._changed:
                        answer.turn = next(self._turns)
                    self._set_aside(answer)
                    # Before others take the room.
                    self._admit()
                elif not self._room.extend(answer, self._steps.answers):
                    last = max(self._steps.answers, key=_turn)
                    self._set_aside(last)
                    self._blocked = min(last, self._blocked or last, key=_turn)

    def _gives_its_turn(self, answer: Answer) -> bool:
        """Whether an answer that has had its fair share waits now, so that one that has not begun yet can begin."""
        if self._blocked is None or len(answer.ids) < self._room.share:
            return False
        with self._changed:
            if all(one.has_begun for one in self._waiting):
                return False
        others = [one for one in self._steps.answers if one is not answer]
        return self._room.fits([*others, self._blocked])

    def _set_aside(self, answer: Answer) -> None:
        self._num_set_aside += 1
        self._steps.set_aside(answer, self._waiting)
        answer.reserved = self._room.first(len(answer.ids), answer.most)


def _turn(answer: Answer) -> int:
    return answer.turn
