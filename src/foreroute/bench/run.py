"""Time one run: a prompt and the tokens after it, fed from a text, with the engine's counts."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from foreroute.engine.chunks import split_prompt
from foreroute.engine.interfaces import PhaseStats, StepInfo
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.caches import cache_argument, cache_of, last_logits_only


@dataclass(frozen=True)
class Case:
    """One test: `batch` rows of `prompt_tokens`, then `new_tokens` each; with 0 new tokens, the prompt alone."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def num_decode_passes(self) -> int:
        """Forward passes after the prompt's, which gives the first new token itself."""
        return max(0, self.new_tokens - 1)

    @property
    def tests(self) -> tuple[str, ...]:
        """Names of the tests, as in llama-bench: pp is the prompt, tg the tokens after it."""
        prompt = f"pp{self.prompt_tokens}"
        return (prompt, f"tg{self.new_tokens}") if self.new_tokens else (prompt,)


@dataclass(frozen=True)
class Timed:
    """Times and counts of one run.

    ttft_s: from the start to the first token of every row. tpot_s: (last - first) / (n - 1); None without new tokens.
    choices: [passes][rows], the likeliest token at each step; they tell whether two runs computed the same.
    prefill, decode: the engine's counts.
    """

    ttft_s: float
    tpot_s: float | None
    choices: list[list[int]]
    prefill: PhaseStats
    decode: PhaseStats


@torch.no_grad()
def run_once(
    model: OffloadedModel, window: torch.Tensor, case: Case, clock: Callable[[], float] = time.perf_counter
) -> Timed:
    """Prefill the prompt, in the engine's chunks, then feed the text's next tokens one by one.

    The text is fed rather than the model's choice, so that routes are those of text and the same for all contenders.

    Args:
        window: [rows, prompt_tokens + new_tokens] token ids. case: how they divide. clock: in seconds.
    """
    options = last_logits_only(model)
    before = model.foreroute.stats()
    started_s = clock()
    cache = None
    for chunk in split_prompt(window[:, : case.prompt_tokens], model.foreroute.plan.prefill_chunk):
        with model.foreroute.step(StepInfo.of("prefill", chunk, is_start=cache is None)):
            output = model(input_ids=chunk, **cache_argument(cache), use_cache=True, **options)
        cache = cache_of(output)
    chosen = [output.logits[:, -1].argmax(-1)]
    first_s = last_s = clock()
    for at in range(case.prompt_tokens, case.prompt_tokens + case.num_decode_passes):
        token = window[:, at : at + 1]
        with model.foreroute.step(StepInfo.of("decode", token)):
            output = model(input_ids=token, **cache_argument(cache), use_cache=True, **options)
        cache = cache_of(output)
        chosen.append(output.logits[:, -1].argmax(-1))
        last_s = clock()
    stats = model.foreroute.stats().minus(before)
    return Timed(
        ttft_s=first_s - started_s,
        tpot_s=(last_s - first_s) / case.num_decode_passes if case.new_tokens else None,
        choices=[tokens.tolist() for tokens in chosen],
        prefill=stats.prefill,
        decode=stats.decode,
    )


@torch.no_grad()
def fill_pool(model: OffloadedModel, tokens: torch.Tensor) -> None:
    """Load every expert of `model` once, layer by layer, as far as the pool has room.

    Args:
        tokens: [1, n] token ids of any text, which give each layer's input its shape.
    """
    engine, inputs = model.foreroute.host_engine, {}

    def note(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        inputs[layer] = (hidden[:1].clone(), ids[:1, :1].clone(), weights[:1, :1].clone())

    engine.routing_listener = note
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        engine.routing_listener = None
    for layer, (hidden, ids, weights) in inputs.items():
        num_experts = model.foreroute.table.layers[layer].num_experts
        every = torch.arange(num_experts, dtype=ids.dtype)[:, None]
        engine.compute(
            layer, hidden.expand(num_experts, -1).contiguous(), every, weights.expand(num_experts, -1).contiguous()
        )
