"""Several requests at once on one model: a chunk of the prompts, then one token for all rows, and again.

Each step is one forward pass of several rows, so that an expert that several of them demand is read once for all.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from foreroute.batching.answer import Answer
from foreroute.batching.beginnings import beginnings_of
from foreroute.batching.drafts import drafts_of
from foreroute.batching.encoded_row import EncodedRow
from foreroute.batching.requests import AnswerEvent, EngineState, Finished, Request
from foreroute.batching.rows import OneRow, RowsCache, can_be_padded, step_rows, why_not_batched
from foreroute.errors import ContextLengthError, ForerouteError, GrammarError, PromptError, QueueFullError
from foreroute.generation.prefix_cache import PrefixCounts
from foreroute.loading.offloaded_model import OffloadedModel, handle_of
from foreroute.memory.serving import keeps_prompts, planned_kv_bytes_per_token
from foreroute.memory.serving_budget import MOST_SCORED_WHOLE, SCORED_AT_ONCE, choose_kv_tokens
from foreroute.model.generation_settings import end_tokens

_LOG = logging.getLogger(__name__)
_LEAST_CHUNK = 8
# Tokens of prompts in one step while others wait for their next token. A longer step would read experts less often.
_CHUNK_BESIDE_OTHERS = 512
# Tokens of the KV cache that an answer without a limit gets when its room is used up.
_ROOM_AT_ONCE = 64


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
        self._most_open = max_num_seqs + max_waiting
        self._ends = end_tokens(model.generation_config)
        self._can_continue = keeps_prompts(model)
        self._can_pad = not self.why_one_row and can_be_padded(model)
        self._drafts = drafts_of(model, self.why_one_row, can_pad=self._can_pad)
        self._kept = beginnings_of(model, self.kv_bytes, self.kv_tokens, prefix_folder)
        # The lock guards these; computing needs none, as only one thread computes.
        self._changed = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._joining: list[Answer] = []
        self._running: list[Answer] = []
        self._is_closed = False
        # Rows in prefill and rows that decode; places as in _joining and in _running.
        self._prompts: Any = self._no_rows()
        self._batch: Any = self._no_rows()
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
        wanted = num_prompt + (1 if most_new is None else most_new)
        if wanted > self._context:
            raise ContextLengthError(
                f"The context holds {self._context} tokens; {wanted} are asked for ({num_prompt} of the prompt). "
                "Shorten the prompt or ask for fewer."
            )
        answer = Answer(request, on_event, *self._lengths(num_prompt, most_new))
        with self._changed:
            num_open = len(self._waiting) + len(self._joining) + len(self._running)
            if self._is_closed or num_open >= self._most_open:
                raise QueueFullError(f"{num_open} requests are computed or wait already. Try again later.")
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def _lengths(self, num_prompt: int, asked: int | None) -> tuple[int, int]:
        """Return the new tokens that an answer gets room for at first, and the most that it can have."""
        if asked is not None:
            return asked, asked
        own = self._model.generation_config.max_new_tokens
        most = min(self._context - num_prompt, own or self._context)
        # At first a fair share, so that others find room too; then what is free.
        share = self.kv_tokens // self.rows
        return min(most, max(share - num_prompt, share // 4, 1)), most

    def cancel(self, handle: Answer) -> None:
        """See requests.Engine. Its memory is free before the next step."""
        handle.cancel("The request was cancelled.")

    def state(self) -> EngineState:
        """See requests.Engine."""
        counts = PrefixCounts() if self._kept is None else self._kept.counts
        drafts = self._drafts
        with self._changed:
            return EngineState(
                running=len(self._joining) + len(self._running),
                waiting=len(self._waiting),
                kv_blocks_used=self._held(),
                kv_blocks=self.kv_tokens,
                prefix_bytes=0 if self._kept is None else self._kept.nbytes,
                prefix_lookups=counts.lookups,
                prefix_hits=counts.hits,
                prefix_tokens=counts.tokens_saved,
                drafted=None if drafts is None else drafts.drafted,
                accepted=None if drafts is None else drafts.accepted,
                verify_steps=None if drafts is None else drafts.verify_steps,
            )

    def close(self) -> None:
        """See requests.Engine. Waits for the current forward pass."""
        if self._model.foreroute.entry.is_forked:
            return
        with self._changed:
            self._is_closed = True
            for answer in (*self._waiting, *self._joining, *self._running):
                answer.cancel("The server is shutting down.")
            self._changed.notify()
        self._thread.join()
        if self._kept is not None:
            self._kept.close()

    def _held(self, *more: Answer) -> int:
        """Most tokens that the admitted rows, and these, can come to hold, padding included."""
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
            except Exception as error:  # noqa: BLE001  without the thread, all requests would wait for ever
                _LOG.exception("the engine failed between steps; its requests are ended")
                self._fail([*self._joining, *self._running], error)
                self._prompts, self._batch = self._no_rows(), self._no_rows()

    def _await_work(self) -> bool:
        """Wait for requests; False when the engine is closed and all have ended."""
        with self._changed:
            while not (self._waiting or self._joining or self._running):
                if self._is_closed:
                    return False
                self._changed.wait()
        return True

    def _drop_cancelled(self) -> None:
        def of(answers: Iterable[Answer]) -> dict[Answer, Finished]:
            return {one: one.finished("cancelled", one.why_cancelled) for one in answers if one.is_cancelled}

        with self._changed:
            waiting = list(self._waiting)
        for answer, end in of(waiting).items():
            self._end(answer, end)
        self._leave_prompts(of(self._joining))
        self._take_out(of(self._running))

    def _admit(self) -> None:
        """Admit waiting requests in order, while rows and KV cache are free."""
        most_prompts = self.rows if self._can_pad else 1
        with self._changed:
            waiting = list(self._waiting)
        is_full = False
        for answer in waiting:
            if len(self._joining) + len(self._running) >= self.rows:
                return
            if self._kept is not None and self._kept.is_computed_by(self._joining, answer):
                # It joins when the beginning that it shares with another prompt has been computed.
                continue
            is_full = is_full or len(self._joining) >= most_prompts or self._held(answer) > self.kv_tokens
            if is_full:
                continue
            with self._changed:
                self._waiting.remove(answer)
                self._joining.append(answer)
            # Memory of rows that have left is not counted any more; it is freed only now.
            self._prompts.trim()
            self._batch.trim()
            try:
                self._begin(answer)
            except Exception as error:  # noqa: BLE001  reported to its request
                self._end(answer, _failed(answer, error))

    def _begin(self, answer: Answer) -> None:
        beginning = None if self._kept is None else self._kept.begin(answer)
        num_cached = 0 if beginning is None else beginning.length
        answer.begin(self._tokenizer, self._model, num_cached)
        self._prompts.arrange(range(len(self._joining) - 1), [(beginning, num_cached)])

    def _prefill(self) -> None:
        """Compute the next chunk of every prompt in prefill."""
        answers = list(self._joining)
        chunks = [answer.next_chunk(self._most_at_once(answers)) for answer in answers]
        wants_scores = any(answer.request.wants_prompt_scores for answer in answers)
        try:
            outcomes = step_rows(self._prompts, chunks, "prefill", all_logits=wants_scores)
        except Exception as error:  # noqa: BLE001  reported to the requests in prefill
            self._fail(self._joining, error)
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
        if self._running:
            most = min(most, _CHUNK_BESIDE_OTHERS)
        if any(answer.request.wants_prompt_scores for answer in answers):
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
        for at, answer in enumerate(self._joining):
            end = left.get(answer)
            if end is not None:
                self._keep(answer, self._prompts, at, end)
        self._prompts.arrange([at for at, answer in enumerate(self._joining) if answer not in left], [])
        with self._changed:
            for answer, end in left.items():
                self._joining.remove(answer)
                if end is None:
                    self._running.append(answer)
        for answer, end in left.items():
            if end is not None:
                self._end(answer, end)

    def _decode(self) -> None:
        """Compute one token for every row, or some where others were drafted."""
        answers, drafts = list(self._running), self._drafts
        drafted = [list[int]()] * len(answers) if drafts is None else drafts.think(answers)
        tokens = [[answer.ids[-1], *some] for answer, some in zip(answers, drafted, strict=True)]
        try:
            if drafts is not None and any(drafted):
                with drafts.alike(len(answers)):
                    outcomes = step_rows(self._batch, tokens, "verify", all_logits=True)
            else:
                outcomes = step_rows(self._batch, tokens, "decode")
        except Exception as error:  # noqa: BLE001  reported to the requests that decode
            self._fail(self._running, error)
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
                end, num_kept = self._next_tokens(answer, some, outcome[-len(some) - 1 :])
                counts.append((len(some), num_kept))
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
            if answer.is_short_of_room:
                rows = len(self._joining) + len(self._running)
                answer.extend(min(answer.reserved + _ROOM_AT_ONCE, self.kv_tokens // rows))
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
        for at, answer in enumerate(self._running):
            if answer in ended:
                self._keep(answer, self._batch, at, ended[answer])
        self._batch.arrange([at for at, answer in enumerate(self._running) if answer not in ended], [])
        for answer, end in ended.items():
            self._end(answer, end)

    def _keep(self, answer: Answer, rows: RowsCache | OneRow, at: int, end: Finished) -> None:
        """Keep the row's keys and values for later prompts with the same beginning."""
        if self._kept is not None and end.reason != "error":
            self._kept.keep_all(answer, rows, at)

    def _end(self, answer: Answer, end: Finished) -> None:
        with self._changed:
            for place in (self._waiting, self._joining, self._running):
                if answer in place:
                    place.remove(answer)
        answer.tell(end)

    def _fail(self, answers: Sequence[Answer], error: Exception) -> None:
        for answer in list(answers):
            self._end(answer, _failed(answer, error))

    def _no_rows(self) -> RowsCache | OneRow:
        if self._model.config.is_encoder_decoder:
            return EncodedRow(self._model)
        return OneRow(self._model) if self.why_one_row else RowsCache(self._model)


def _failed(answer: Answer, error: Exception) -> Finished:
    text = str(error) if isinstance(error, ForerouteError) else f"The engine failed ({type(error).__name__})."
    return answer.finished("error", text, is_refusal=isinstance(error, GrammarError))
