"""Measure whether prefetches arrive in time, in a real run: greedy decoding within the given budget."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from foreroute.loading.offloaded_model import OffloadedModel


@dataclass(frozen=True)
class Timeliness:
    """Outcomes of prefetches, and of demanded experts without one, over `tokens` decoded.

    in_time: resident when the router asked. late_hits: in flight then. wasted: evicted before any use. The rest of
    `prefetched` is still resident, undecided. misses: demanded experts that were absent. resident: demanded
    experts left in a slot by an earlier token.
    """

    tokens: int
    prefetched: int
    in_time: int
    late_hits: int
    wasted: int
    misses: int
    resident: int


def timeliness(
    model: OffloadedModel,
    prompts: torch.Tensor,
    new_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Timeliness:
    """Continue every prompt greedily by `new_tokens`, and count outcomes.

    Args:
        model: of `foreroute.load`, with prefetch in decode alone. prompts: [prompts, length] token ids.
        progress: called with (tokens decoded, all tokens).
    """
    before = model.foreroute.stats()
    for number, prompt in enumerate(prompts, 1):
        model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            pad_token_id=0,
            disable_compile=True,
        )
        progress(number * new_tokens, len(prompts) * new_tokens)
    decode = model.foreroute.stats().minus(before).decode
    # Within a decode step all demands are served, so that an expert found in flight was prefetched.
    in_time = decode.prefetch_used - decode.late_hits
    return Timeliness(
        tokens=decode.tokens,
        prefetched=decode.prefetch_loads,
        in_time=in_time,
        late_hits=decode.late_hits,
        wasted=decode.prefetch_wasted,
        misses=decode.misses,
        resident=decode.hits - in_time,
    )
