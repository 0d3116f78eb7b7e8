"""The decoding loop for one row: the prompt in chunks, then token by token, with little overhead.

transformers' generate() prepares everything (settings, logits processors, stopping criteria) and calls this loop
instead of its own, through its `custom_generate`. Tokens are the same as its own loop's: the same processors see the
same scores, and sampling draws from the same generator.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from foreroute.drafting.draft import GovernedDraft
from foreroute.drafting.steps import DraftedSteps
from foreroute.engine.chunks import split_prompt
from foreroute.engine.interfaces import Phase, StepInfo
from foreroute.errors import CheckpointError
from foreroute.generation.graph_decoder import GraphDecoder
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.caches import CACHE_NAME, cache_argument, is_ordinary

# Settings of how a token is chosen from its scores, or when to end: transformers turns them into the processors and
# criteria that this loop takes. With any other setting, generate() keeps its own loop.
_UNDERSTOOD = frozenset(
    [
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "sequence_bias",
        "min_new_tokens",
        "min_length",
        "renormalize_logits",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "forced_eos_token_id",
        "eos_token_id",
        "pad_token_id",
        "max_time",
        "logits_processor",
        "stopping_criteria",
    ]
)

_NO_NUMBERS = (
    "The model's logits are not numbers (NaN): no token follows from them. Its weights may be damaged, a number in "
    "config.json wrong, or the compute dtype too narrow (`foreroute verify` finds out; try --dtype float32)."
)


def serves(model: OffloadedModel, cache: DynamicCache | None, options: dict[str, Any]) -> bool:
    """Whether this loop does what generate() would do with `model`, an empty cache for it, and these options."""
    settings = model.generation_config
    return (
        cache is not None
        and not cache.is_compileable
        and options.keys() <= _UNDERSTOOD
        and settings.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and settings.cache_implementation in (None, "dynamic")
        and settings.use_cache is not False
        and settings.prefill_chunk_size is None
        and not settings.token_healing
        and is_ordinary(model)
    )


class LeanLoop:
    """Generates one answer; generate() calls it once.

    Args:
        on_token: called with each new token as soon as it is chosen.
        should_stop: called after every token; True ends the answer.
        chunk: most prompt tokens computed at once; None computes them all.
        decoder: computes instead of the model, whose cache then stays empty; None calls the model.
        draft: drafts tokens that the model verifies; None: no token is drafted.

    Attributes:
        steps: those of an answer with a draft, once they began; None without one.
        num_computed: tokens, from the start of the prompt, whose steps have ended, so that the cache holds them.
        is_in_step: a step has begun and not ended: states in the cache may have seen more tokens than these.
    """

    def __init__(
        self,
        on_token: Callable[[int], None],
        should_stop: Callable[[], bool] | None,
        chunk: int | None,
        decoder: GraphDecoder | None = None,
        draft: GovernedDraft | None = None,
    ) -> None:
        self._on_token = on_token
        self._should_stop = should_stop
        self._chunk = chunk
        self._decoder = decoder
        self._draft = draft
        self.steps: DraftedSteps | None = None
        self.num_computed = 0
        self.is_in_step = False

    def __call__(
        self,
        model: OffloadedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Compute `input_ids` [1, tokens] after those in the cache, then new tokens until an end; return all tokens."""
        length, end = input_ids.shape[1], stopping_criteria.max_length
        assert end is not None, "generate() always says how many tokens at most"
        cache = model_kwargs.pop(CACHE_NAME)
        # All ones: there is one row.
        model_kwargs.pop("attention_mask", None)
        has_positions = model_kwargs.pop("position_ids", None) is not None
        positions = torch.arange(end, device=input_ids.device)[None] if has_positions else None
        kwargs = {name: value for name, value in model_kwargs.items() if value is not None}
        ends, others = _split(stopping_criteria)
        ids = torch.empty((1, end), dtype=torch.int64, device=input_ids.device)
        ids[:, :length] = input_ids
        self.num_computed = cache.get_seq_length()

        compute = _ModelStep(self, model, cache, positions, kwargs)
        decoder = self._decoder
        if decoder is not None:
            logits = decoder.prefill(input_ids, self._chunk)
        else:
            for chunk in split_prompt(input_ids[:, self.num_computed :], self._chunk):
                logits = compute(chunk, "prefill")
        if self._draft is not None:
            self.steps = DraftedSteps(model, self._draft, cache, compute, input_ids[0].tolist(), end)
        while True:
            # In fp32 and a copy, as generate() does it: processors may write to it.
            scores = logits_processor(ids[:, :length], logits.to(copy=True, dtype=torch.float32))
            token = _chosen(scores, do_sample=bool(generation_config.do_sample))
            ids[:, length : length + 1] = token
            length += 1
            value = int(token)
            self._on_token(value)
            if value in ends or length >= end or (self._should_stop is not None and self._should_stop()):
                break
            if others and bool(others(ids[:, :length], None).all()):
                break
            logits = self._logits_after(token, value, compute)
        if self.steps is not None:
            self.steps.close()
        return ids[:, :length]

    def _logits_after(self, token: torch.Tensor, value: int, compute: "_ModelStep") -> torch.Tensor:
        """Logits [1, vocabulary] after `token` [1, 1], of this value."""
        if self.steps is not None:
            logits = self.steps.after(value)
            self.num_computed = self.steps.num_chosen
            return logits
        return compute(token, "decode") if self._decoder is None else self._decoder.step(token)


class _ModelStep:
    """A step of the model for one answer's `loop`, whose tokens it counts; see `Compute` of drafting/steps.py.

    Args:
        positions: [1, tokens] of the whole answer; None where the model takes none. kwargs: others of the model.
    """

    def __init__(
        self,
        loop: LeanLoop,
        model: OffloadedModel,
        cache: DynamicCache,
        positions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        self._loop, self._model, self._cache, self._positions, self._kwargs = loop, model, cache, positions, kwargs

    def __call__(self, tokens: torch.Tensor, phase: Phase, *, num_dropped: int = 0) -> torch.Tensor:
        """Compute `tokens` [1, positions]: logits of the last [1, vocabulary], or of all that are verified."""
        before, count, kwargs = self._loop.num_computed, tokens.shape[1], self._kwargs
        is_verified = phase == "verify"
        if self._positions is not None:
            kwargs["position_ids"] = self._positions[:, before : before + count]
        if is_verified and "logits_to_keep" in kwargs:
            kwargs = {**kwargs, "logits_to_keep": count}
        info = StepInfo.of(phase, tokens, is_start=before == 0, num_dropped=num_dropped)
        self._loop.is_in_step = True
        with self._model.foreroute.step(info):
            output = self._model(input_ids=tokens, **cache_argument(self._cache), return_dict=True, **kwargs)
        logits: torch.Tensor = output.logits
        # Of the tokens that are verified one is chosen; the loop counts the others when it has chosen them.
        self._loop.num_computed = before + (1 if is_verified else count)
        self._loop.is_in_step = False
        return logits[0] if is_verified else logits[:, -1]


def _chosen(scores: torch.Tensor, *, do_sample: bool) -> torch.Tensor:
    """Choose the next token [1, 1] by its scores [1, vocabulary].

    Raises:
        CheckpointError: they are NaN. Not checked on a GPU, where that would wait for the device.
    """
    if not do_sample:
        token = torch.argmax(scores, dim=-1, keepdim=True)
        # argmax takes NaN for the largest.
        if scores.is_cpu and math.isnan(scores[0, token[0, 0]]):
            raise CheckpointError(_NO_NUMBERS)
        return token
    try:
        return torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1)
    except RuntimeError as error:
        if "probability tensor" in str(error):
            raise CheckpointError(_NO_NUMBERS) from error
        raise


def _split(criteria: StoppingCriteriaList) -> tuple[frozenset[int], StoppingCriteriaList]:
    """Return the tokens that end an answer, and the criteria to call; the loop counts the length itself."""
    ends: set[int] = set()
    others = StoppingCriteriaList()
    for one in criteria:
        if type(one) is EosTokenCriteria:
            ends.update(one.eos_token_id.flatten().tolist())
        elif type(one) is not MaxLengthCriteria:
            others.append(one)
    return frozenset(ends), others
