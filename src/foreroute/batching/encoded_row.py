"""One request of an encoder-decoder at a time: the prompt is encoded once, the decoder writes from a start token."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from foreroute.batching.rows import OneRow
from foreroute.engine.interfaces import Phase, StepInfo
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.caches import cache_argument, cache_of
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
        model = self._model
        given = torch.tensor([list(tokens[0])], device=model.device)
        if self._encoded is None:
            ids = torch.full((1, 1), self._start, device=model.device)
            asked = {"input_ids": given, "decoder_input_ids": ids}
            info = StepInfo.of("prefill", given, is_start=True)
        else:
            asked = {"encoder_outputs": self._encoded, "decoder_input_ids": given}
            info = StepInfo.of(phase, given)
        with model.foreroute.step(info):
            out = model(**asked, **cache_argument(self._cache), use_cache=True, return_dict=True)
        self._cache = cache_of(out)
        if self._encoded is None:
            self._encoded = BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
        self.lengths = [self.lengths[0] + len(tokens[0])]
        logits: torch.Tensor = out.logits
        return logits
