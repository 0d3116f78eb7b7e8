"""Which beginning of a prompt is not computed again, what is kept of a row, and who waits for whose prompt."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foreroute.batching.answer import Answer
from foreroute.batching.row_layers import BEFORE_WINDOW
from foreroute.batching.rows import OneRow, RowsCache
from foreroute.errors import ForerouteError
from foreroute.generation.prefix_cache import Beginning, PrefixCounts, PromptCache
from foreroute.generation.prefix_files import PrefixFiles
from foreroute.generation.prefix_tree import common_length
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.memory.serving import keeps_prompts, state_bytes_without_experts
from foreroute.memory.serving_budget import kept_prompt_bytes
from foreroute.model.caches import needs_state, only_windows

_LOG = logging.getLogger(__name__)
# Tokens that are worth waiting for, or another step: fewer are computed sooner than they are found.
_WORTH = 32


class Beginnings:
    """Keeps beginnings of prompts and answers for later requests. Only the engine's thread uses it, except `counts`.

    Args:
        max_bytes: most bytes to keep. bytes_per_token: of the model's KV cache. state_bytes: of its states that do not
            grow with that.
        folder: where they are kept for a later process; None: nowhere.
    Raises:
        ForerouteError: the folder cannot be written, or is in use.
    """

    def __init__(
        self,
        model: OffloadedModel,
        max_bytes: int,
        bytes_per_token: int,
        folder: Path | None = None,
        state_bytes: int = 0,
    ) -> None:
        self._model = model
        self._needs_state, is_cuttable = needs_state(model), only_windows(model)
        self._reach = BEFORE_WINDOW if is_cuttable else 0
        self._most_tokens = (max_bytes - state_bytes) // max(bytes_per_token, 1)
        self._cache = PromptCache(max_bytes)
        self._files: PrefixFiles | None = None
        if folder is not None:
            self._files = PrefixFiles(folder, model.foreroute.plan.identity, max_bytes)
            self._cache.read(model, self._files)
        self._version_saved = self._cache.version

    @property
    def counts(self) -> PrefixCounts:
        """How often a beginning was found."""
        return self._cache.counts

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self._cache.nbytes

    @property
    def is_unsaved(self) -> bool:
        """Whether there is a folder that lacks something of what is kept."""
        return self._files is not None and self._cache.version != self._version_saved

    def save(self, goes_on: Callable[[], bool]) -> None:
        """Write what is kept to the folder, while `goes_on`, which is asked before each part."""
        assert self._files is not None, "there is something to be saved"
        version = self._cache.version
        if self._cache.write(self._model, self._files, goes_on):
            self._version_saved = version

    def close(self) -> None:
        """Write what is kept to the folder, if there is one."""
        files, self._files = self._files, None
        if files is not None:
            self._cache.write(self._model, files)
            files.close()

    def clear(self) -> None:
        """Drop everything."""
        self._cache.clear()

    def begin(self, answer: Answer) -> Beginning | None:
        """Find the longest kept beginning of the answer's prompt.

        Where a model needs a state, and the prompt parts from a kept one later than there is one, a chunk shall end
        there: the next prompt that does so can continue.
        """
        if answer.request.wants_prompt_scores:
            return None
        # The last token is computed in any case: its logits choose the next one.
        ids, at_most = answer.ids, len(answer.ids) - 1
        found = self._cache.find(self._model, ids, at_most)
        if self._needs_state:
            known, length = self._cache.known(self._model, ids[:at_most]), 0 if found is None else found.length
            if known - length >= _WORTH:
                answer.stops.add(known)
        return found

    def is_computed_by(self, others: Sequence[Answer], answer: Answer) -> bool:
        """Whether one of `others`, prompts in prefill, leaves a beginning that the answer's prompt should wait for."""
        if answer.request.wants_prompt_scores:
            return False
        at_most = len(answer.ids) - 1
        for other in others:
            shared = answer.shared.get(other)
            if shared is None:
                shared = answer.shared[other] = min(common_length(other.ids, answer.ids), at_most)
            # A prompt is kept as a whole, or with states up to where a chunk ends.
            num_kept = shared if self._needs_state else other.num_prefill
            if other.request.wants_prompt_scores or shared < _WORTH or num_kept > self._most_tokens:
                continue
            if shared - self._reusable(answer, at_most) < _WORTH:
                continue
            # The state at the end of a prompt can be cut a little; at another place there is one if a chunk ends there.
            if self._needs_state and other.num_prefill - shared > self._reach:
                if shared <= other.num_computed:
                    continue
                other.stops.add(shared)
            return True
        return False

    def _reusable(self, answer: Answer, at_most: int) -> int:
        """Number of the answer's tokens that are kept already; looked up once for each version of what is kept."""
        version = self._cache.version
        if answer.reusable is None or answer.reusable[0] != version:
            answer.reusable = version, self._cache.reusable(self._model, answer.ids, at_most)
        return answer.reusable[1]

    def keep_prompt(self, answer: Answer, rows: RowsCache | OneRow, at: int) -> None:
        """Keep what a prompt's chunk has added, where that is worth a copy: all of a prompt, or a state."""
        if self._needs_state or answer.is_prompt_computed:
            self._keep(answer, answer.ids[: answer.num_computed], rows, at)

    def keep_all(self, answer: Answer, rows: RowsCache | OneRow, at: int) -> None:
        """Keep the row of an answer that ends."""
        ids = answer.ids[: answer.num_computed]
        # A substitute changes all later keys and values; the prompt's are always exact.
        if not self._model.foreroute.is_exact:
            ids = ids[: answer.num_prompt]
        self._keep(answer, ids, rows, at)

    def _keep(self, answer: Answer, ids: Sequence[int], rows: RowsCache | OneRow, at: int) -> None:
        if not ids or answer.request.wants_prompt_scores:
            return
        try:
            row: Any = rows.row(at, is_copy=False, more=BEFORE_WINDOW)
            self._cache.keep(self._model, ids, row)
        except (RuntimeError, MemoryError):
            # Only a copy for later requests: without memory for it, running ones go on.
            _LOG.warning("A prompt was not kept for the next request", exc_info=True)


def beginnings_of(model: OffloadedModel, kv_bytes: int, kv_tokens: int, folder: Path | None) -> Beginnings | None:
    """What keeps beginnings of the prompts to `model`; None where they are not kept.

    Args:
        kv_bytes, kv_tokens: of the full KV cache. folder: see `Beginnings`.
    Raises:
        ForerouteError: a folder is given, and nothing would be kept in it, or it cannot be used.
    """
    handle = model.foreroute
    states = state_bytes_without_experts(model, handle.layers)
    max_bytes = kept_prompt_bytes(kv_bytes, handle.plan.prefix_cache, states)
    if keeps_prompts(model) and max_bytes > 0:
        return Beginnings(model, max_bytes, kv_bytes // kv_tokens, folder, states)
    if folder is not None:
        raise ForerouteError(
            "Prompts of this model are not kept (docs/limitations.md says of which), or --prefix-cache is 0. "
            "Leave --prefix-cache-dir out."
        )
    return None
