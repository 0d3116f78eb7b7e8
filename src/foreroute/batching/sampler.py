"""Sample a request's next token, and compute logprobs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from foreroute.batching.requests import Sampling, Top
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.generation_settings import decoder_start
from foreroute.structured.mask import GrammarMask

# Below it, a difference of two logits in float32 (1e-7 and more) makes one of the tokens impossible.
_COLD = 1e-9


def score(logits: torch.Tensor, token: int, num_top: int | None) -> tuple[float | None, Top]:
    """Return a token's logprob and the `num_top` likeliest ones, by the model's own distribution.

    Args:
        logits: [vocabulary] fp32, before any penalty or temperature. num_top: None computes nothing.
    """
    if num_top is None:
        return None, ()
    logprobs = torch.log_softmax(logits, dim=-1)
    if num_top == 0:
        return logprobs[token].item(), ()
    values, ids = logprobs.topk(num_top)
    return logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True))


class Sampler:
    """Draws one answer's tokens as transformers' generate() does: with its processors, in its order, made once.

    OpenAI's penalties, which transformers lacks, come after its own and before temperature, top-k, top-p and min-p.
    Each request has its own generator, so that requests in the same steps do not change its draws.

    Args:
        model: its generation_config has the defaults; its generate() makes the processors.
        prompt_ids: a repetition penalty applies to them too; not to those of an encoder-decoder.
        most_new: most tokens of the answer.
        grammar: of the answer; it masks tokens before temperature, top-k, top-p and min-p.

    Attributes:
        is_greedy: the next token is the argmax of the model's logits, without `draw`.
    """

    def __init__(
        self,
        model: OffloadedModel,
        asked: Sampling,
        prompt_ids: Sequence[int],
        most_new: int,
        grammar: GrammarMask | None = None,
    ) -> None:
        self._grammar = grammar
        start = decoder_start(model)
        if start is not None:
            prompt_ids = [start]
        self._length = len(prompt_ids)
        self._ids = torch.empty((1, self._length + most_new), dtype=torch.int64)
        self._ids[0, : self._length] = torch.tensor(prompt_ids)
        options = _options(asked, model.generation_config, grammar)
        self._draws = bool(options["do_sample"])
        self._processors = processors_of(model, self._ids[:, : self._length], options | {"max_new_tokens": most_new})
        self.is_greedy = not self._draws and not self._processors
        self._generator = torch.Generator()
        if asked.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(asked.seed)

    def draw(self, logits: torch.Tensor) -> int:
        """Draw the next token from logits [vocabulary] fp32, which are not changed."""
        scores = self._processors(self._ids[:, : self._length], logits[None].clone())
        if self._draws:
            token = int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=self._generator))
        else:
            token = int(scores.argmax())
        self._ids[0, self._length] = token
        self._length += 1
        if self._grammar is not None:
            self._grammar.accept(token)
        return token

    @property
    def is_complete(self) -> bool:
        """Whether there is a grammar, and it allows nothing more."""
        return self._grammar is not None and self._grammar.is_complete


def processors_of(model: OffloadedModel, ids: torch.Tensor, options: Mapping[str, Any]) -> LogitsProcessorList:
    """Return generate()'s logits processors for a prompt `ids` [1, tokens] and its `options`; computes nothing."""
    found: list[LogitsProcessorList] = []

    def take(
        model: OffloadedModel, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, **_: Any
    ) -> torch.Tensor:
        found.append(logits_processor)
        return input_ids

    fixed: dict[str, Any] = {"custom_generate": take, "num_beams": 1, "disable_compile": True, "stop_strings": None}
    if model.config.is_encoder_decoder:
        # In place of an encoded prompt, so that none is computed.
        encoded = BaseModelOutput(last_hidden_state=torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype))
        given: dict[str, Any] = {"decoder_input_ids": ids, "encoder_outputs": encoded}
    else:
        given = {"inputs": ids}
    model.generate(**given, attention_mask=torch.ones_like(ids), **fixed, **options)
    return found[0]


def _options(asked: Sampling, own: Any, grammar: GrammarMask | None) -> dict[str, Any]:
    """Return options for generate(); `own` is the model's generation_config."""
    masks = [] if grammar is None else [_Masked(grammar)]
    options: dict[str, Any] = {
        "do_sample": bool(own.do_sample) if asked.temperature is None else asked.temperature > 0,
        "repetition_penalty": asked.repetition_penalty,
        "min_new_tokens": asked.min_tokens or None,
        "logits_processor": LogitsProcessorList([*_penalties(asked), *masks]),
    }
    if options["do_sample"]:
        options |= {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "min_p": asked.min_p,
            # 0 (off), where neither the request nor the model has one: not transformers' default of 50.
            "top_k": asked.top_k if asked.top_k is not None else own.top_k or 0,
        }
        if asked.temperature is not None and asked.temperature < _COLD:
            # So near to 0 that logits overflow float32: only the likeliest, and those equal to it, can be drawn.
            options |= {"temperature": 1.0, "top_k": 1}
    wants_float = ("temperature", "repetition_penalty")
    return {
        name: float(value) if name in wants_float else value for name, value in options.items() if value is not None
    }


def _penalties(asked: Sampling) -> Iterator[LogitsProcessor]:
    if asked.presence_penalty or asked.frequency_penalty:
        yield CountPenalty(asked.presence_penalty, asked.frequency_penalty)
    if asked.logit_bias:
        yield TokenBias(asked.logit_bias)


class _Masked(LogitsProcessor):
    """One answer's grammar, whose tokens `Sampler` accepts."""

    def __init__(self, grammar: GrammarMask) -> None:
        self._grammar = grammar

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._grammar.apply(scores[0])[None]


class CountPenalty(LogitsProcessor):
    """OpenAI's penalties on tokens of the answer: `presence` once, and `frequency` per occurrence."""

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency
        self._num_prompt: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Penalise scores [rows, vocabulary] by ids [rows, tokens]; the first call has the prompt alone."""
        if self._num_prompt is None:
            self._num_prompt = input_ids.shape[1]
        new = input_ids[:, self._num_prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class TokenBias(LogitsProcessor):
    """OpenAI's logit_bias: constants added to the logits of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = torch.tensor(list(bias))
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Add the bias to each row of scores [rows, vocabulary]."""
        return scores.index_add(1, self._ids, self._values.expand(len(scores), -1))
