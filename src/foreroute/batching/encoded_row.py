"""One request of an encoder-decoder at a time: the prompt is encoded once, the decoder writes from a start token."""

from collections.abc import Sequence
from typing import Any

import torch

from foreroute.batching.rows import OneRow
from foreroute.engine.interfaces import Phase, StepInfo
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.caches import cache_argument, cache_of, decoder_call, encode
from foreroute.model.generation_settings import decoder_start


class EncodedRow(OneRow):
    """A `OneRow` whose prompt goes to the encoder; the cache is the decoder's, with the prompt's keys and values."""

    def __init__(self, model: OffloadedModel) -> None:
        super().__init__(model)
        start = decoder_start(model)
        assert start is not None, "it is an encoder-decoder"
        self._start: int = start
        self._encoded: Any = None

    def arrange(self, kept: Sequence[int], new: Sequence[tuple[Any, int]]) -> None:
        """Keep the current row, or take the new one."""
        if not kept:
            self._encoded = None
        super().arrange(kept, new)

    def append_from(self, other: OneRow, places: Sequence[int]) -> None:
        """Take the other's row."""
        assert isinstance(other, EncodedRow), "rows of one model"
        super().append_from(other, places)
        self._encoded = other._encoded

    def step(self, tokens: Sequence[Sequence[int]], phase: Phase, *, all_logits: bool = False) -> torch.Tensor:
        """Encode the prompt and compute the decoder's start token, or compute the next token: [1, 1, vocabulary]."""
        ids = torch.tensor([list(tokens[0])], device=self._model.device)
        is_start = self._encoded is None
        if is_start:
            self._encoded = encode(self._model, ids)
            ids = torch.full((1, 1), self._start, device=ids.device)
        with self._model.foreroute.step(StepInfo.of("prefill" if is_start else phase, ids, is_start=is_start)):
            asked = decoder_call(ids, self._encoded)
            out = self._model(**asked, **cache_argument(self._cache), use_cache=True, return_dict=True)
        self._cache = cache_of(out)
        self.lengths = [self.lengths[0] + len(tokens[0])]
        logits: torch.Tensor = out.logits
        return logits
