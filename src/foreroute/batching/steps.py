"""What the engine computes: chunks of the prompts in prefill, then a token for every row that decodes, or some.

Each step is one forward pass of several rows, so that an expert that several of them demand is read once for all.
"""

import bisect
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from foreroute.batching.answer import Answer
from foreroute.batching.beginnings import Beginnings
from foreroute.batching.drafts import BatchDrafts
from foreroute.batching.encoded_row import EncodedRow
from foreroute.batching.requests import Finished
from foreroute.batching.rows import OneRow, RowsCache, step_rows
from foreroute.errors import ForerouteError, GrammarError
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.memory.serving import keeps_prompts
from foreroute.memory.serving_budget import SCORED_AT_ONCE
from foreroute.model.generation_settings import end_tokens

_LEAST_CHUNK = 8
# Tokens of prompts in one step while others wait for their next token. A longer step would read experts less often.
_CHUNK_BESIDE_OTHERS = 512


class RowSteps:
    """Computes the admitted requests, step by step. Only the engine's thread uses it.

    Args:
        is_one_row: the model cannot be batched. context: see engine.BatchEngine.
        kept: beginnings of earlier prompts; None: none are kept. drafts: None: nothing is drafted.
        lock: held while the lists change, as others count them.

    Attributes:
        joining, running: answers in prefill, and those that decode; their order is that of the rows.
    """

    def __init__(
        self,
        model: OffloadedModel,
        tokenizer: Any,
        context: int,
        kept: Beginnings | None,
        drafts: BatchDrafts | None,
        lock: threading.Condition,
        *,
        is_one_row: bool,
    ) -> None:
        self._model, self._tokenizer, self._is_one_row = model, tokenizer, is_one_row
        self._context = context
        self._kept, self._drafts, self._lock = kept, drafts, lock
        self._ends = end_tokens(model.generation_config)
        self._can_continue = keeps_prompts(model)
        self.joining: list[Answer] = []
        self.running: list[Answer] = []
        # Rows in prefill and rows that decode; places as in `joining` and in `running`.
        self._prompts: Any = self._no_rows()
        self._batch: Any = self._no_rows()

    @property
    def answers(self) -> list[Answer]:
        """All that are admitted."""
        return [*self.joining, *self.running]

    def begin(self, answer: Answer) -> None:
        """Begin the last of `joining`, with what is kept of its prompt; or end it with an error."""
        # Memory of rows that have left is not counted any more; it is freed only now.
        self._prompts.trim()
        self._batch.trim()
        try:
            beginning = None if self._kept is None else self._kept.begin(answer)
            num_cached = 0 if beginning is None else beginning.length
            answer.begin(self._tokenizer, self._model, num_cached)
            self._prompts.arrange(range(len(self.joining) - 1), [(beginning, num_cached)])
        except Exception as error:  # noqa: BLE001  reported to its request
            self._end(answer, _failed(answer, error))

    def set_aside(self, answer: Answer, waiting: list[Answer]) -> None:
        """Move an answer to those that are `waiting`; later it goes on from its tokens.

        Its memory is free afterwards. What the cache has of it is kept as that of an answer that ends.
        """
        for admitted, rows in ((self.joining, self._prompts), (self.running, self._batch)):
            if answer not in admitted:
                continue
            at = admitted.index(answer)
            if self._kept is not None:
                self._kept.keep_all(answer, rows, at)
            rows.arrange([other for other in range(len(admitted)) if other != at], [])
            rows.trim()
            with self._lock:
                admitted.remove(answer)
                answer.drafter = None  # with its cache, which is a row's as well
                bisect.insort(waiting, answer, key=lambda one: one.turn)
            return

    def drop_cancelled(self) -> None:
        """End the cancelled ones; their memory is free afterwards."""
        self._leave_prompts(cancelled(self.joining))
        self._take_out(cancelled(self.running))

    def compute(self) -> None:
        """Compute a chunk of every prompt in prefill, and a token of every other row."""
        if self.joining:
            self._prefill()
        if self.running:
            self._decode()

    def fail_all(self, error: Exception) -> None:
        """End all with this error."""
        self._fail(self.answers, error)
        self._prompts, self._batch = self._no_rows(), self._no_rows()

    def _prefill(self) -> None:
        """Compute the next chunk of every prompt in prefill."""
        answers = list(self.joining)
        chunks = [answer.next_chunk(self._most_at_once(answers)) for answer in answers]
        wants_scores = any(answer.wants_scores for answer in answers)
        try:
            outcomes = step_rows(self._prompts, chunks, "prefill", all_logits=wants_scores)
        except Exception as error:  # noqa: BLE001  reported to the requests in prefill
            self._fail(self.joining, error)
            self._prompts = self._no_rows()
            return
        done: dict[Answer, Finished | None] = {}
        for answer, chunk, logits in zip(answers, chunks, outcomes, strict=True):
            if isinstance(logits, Exception):
                done[answer] = _failed(answer, logits)
                continue
            try:
                if answer.took(len(chunk), logits):
                    done[answer] = self._first_token(answer, logits[-1].float().cpu())
            except Exception as error:  # noqa: BLE001  reported to its request
                done[answer] = _failed(answer, error)
        self._keep_prompts(answers, outcomes)
        going = [at for at, answer in enumerate(answers) if answer in done and done[answer] is None]
        try:
            if going:
                self._batch.append_from(self._prompts, going)
        except Exception as error:  # noqa: BLE001  reported to these requests: the rows that decode go on
            done.update({answers[at]: _failed(answers[at], error) for at in going})
        self._leave_prompts(done)

    def _keep_prompts(self, answers: Sequence[Answer], outcomes: Sequence[torch.Tensor | ForerouteError]) -> None:
        """Keep what the step has added to prompts in prefill."""
        for at, (answer, outcome) in enumerate(zip(answers, outcomes, strict=True)):
            if self._kept is not None and not isinstance(outcome, Exception):
                self._kept.keep_prompt(answer, self._prompts, at)

    def _most_at_once(self, answers: Sequence[Answer]) -> int:
        """Most tokens of each prompt in the next step."""
        if not self._can_continue:
            return self._context
        most: int = self._model.foreroute.plan.prefill_chunk
        if self.running:
            most = min(most, _CHUNK_BESIDE_OTHERS)
        if any(answer.wants_scores for answer in answers):
            most = min(most, SCORED_AT_ONCE)
        return max(most // len(answers), _LEAST_CHUNK)

    def _first_token(self, answer: Answer, logits: torch.Tensor) -> Finished | None:
        if answer.wants_none:
            return answer.finished("length")
        return answer.advance(logits, int(logits.argmax()), self._ends)

    def _leave_prompts(self, left: Mapping[Answer, Finished | None]) -> None:
        """Remove these from prefill; those with None decode from now on, the others end."""
        if not left:
            return
        for at, answer in enumerate(self.joining):
            end = left.get(answer)
            if end is not None:
                self._keep(answer, self._prompts, at, end)
        self._prompts.arrange([at for at, answer in enumerate(self.joining) if answer not in left], [])
        with self._lock:
            for answer, end in left.items():
                self.joining.remove(answer)
                if end is None:
                    self.running.append(answer)
        for answer, end in left.items():
            if end is not None:
                self._end(answer, end)

    def _decode(self) -> None:
        """Compute one token for every row, or some where others were drafted."""
        answers, drafts = list(self.running), self._drafts
        drafted = [list[int]()] * len(answers) if drafts is None else drafts.think(answers)
        tokens = [[answer.ids[-1], *some] for answer, some in zip(answers, drafted, strict=True)]
        try:
            if drafts is not None and any(drafted):
                with drafts.alike(len(answers)):
                    outcomes = step_rows(self._batch, tokens, "verify", all_logits=True)
            else:
                outcomes = step_rows(self._batch, tokens, "decode")
        except Exception as error:  # noqa: BLE001  reported to the requests that decode
            self._fail(self.running, error)
            self._batch = self._no_rows()
            return
        ended: dict[Answer, Finished] = {}
        counts: list[tuple[int, int] | None] = []
        for answer, some, outcome in zip(answers, drafted, outcomes, strict=True):
            end: Finished | None
            if isinstance(outcome, Exception):
                end = _failed(answer, outcome)
                counts.append(None)
            else:
                # Fewer positions than tokens: only the first was computed.
                verified = some[: len(outcome) - 1]
                end, num_kept = self._next_tokens(answer, verified, outcome[-len(verified) - 1 :])
                counts.append((len(verified), num_kept))
            if end is not None:
                ended[answer] = end
        if drafts is not None:
            drafts.ended(counts)
        self._batch.drop([0 if count is None else count[0] - count[1] for count in counts])
        self._take_out(ended)

    def _next_tokens(self, answer: Answer, drafted: Sequence[int], logits: torch.Tensor) -> tuple[Finished | None, int]:
        """Choose tokens by `logits` [positions, vocabulary], while they are those that were drafted, and one more.

        Returns:
            The last event, if the answer has ended; and how many of the drafted tokens it keeps.
        """
        for at, row_logits in enumerate(logits):
            answer.num_computed += 1
            try:
                row = row_logits.float().cpu()
                end = answer.advance(row, int(row.argmax()), self._ends)
            except Exception as error:  # noqa: BLE001  reported to its request
                return _failed(answer, error), at
            if end is not None or at == len(drafted) or answer.ids[-1] != drafted[at]:
                return end, at
        raise AssertionError("there are logits behind the last drafted token")

    def _take_out(self, ended: dict[Answer, Finished]) -> None:
        """Remove ended rows from decoding."""
        if not ended:
            return
        for at, answer in enumerate(self.running):
            if answer in ended:
                self._keep(answer, self._batch, at, ended[answer])
        self._batch.arrange([at for at, answer in enumerate(self.running) if answer not in ended], [])
        for answer, end in ended.items():
            self._end(answer, end)

    def _keep(self, answer: Answer, rows: RowsCache | OneRow, at: int, end: Finished) -> None:
        """Keep the row's keys and values for later prompts with the same beginning."""
        if self._kept is not None and end.reason != "error":
            self._kept.keep_all(answer, rows, at)

    def _end(self, answer: Answer, end: Finished) -> None:
        with self._lock:
            for place in (self.joining, self.running):
                if answer in place:
                    place.remove(answer)
        answer.tell(end)

    def _fail(self, answers: Sequence[Answer], error: Exception) -> None:
        for answer in list(answers):
            self._end(answer, _failed(answer, error))

    def _no_rows(self) -> RowsCache | OneRow:
        if self._model.config.is_encoder_decoder:
            return EncodedRow(self._model)
        return OneRow(self._model) if self._is_one_row else RowsCache(self._model)


def cancelled(answers: Iterable[Answer]) -> dict[Answer, Finished]:
    """Those of `answers` that are cancelled, and the last event of each."""
    return {one: one.finished("cancelled", one.why_cancelled) for one in answers if one.is_cancelled}


def _failed(answer: Answer, error: Exception) -> Finished:
    text = str(error) if isinstance(error, ForerouteError) else f"The engine failed ({type(error).__name__})."
    return answer.finished("error", text, is_refusal=isinstance(error, GrammarError))
