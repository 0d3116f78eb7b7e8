"""Do guesses come in time? Counted in a real run: text continued token by token, on the budget that was asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timeliness:
    """What became of the experts that were fetched on a guess, and of those that were not, over `tokens` decoded.

    in_time: were there when the router asked. late: were on their way. wasted: given up before anybody asked. The rest
    of `fetched` is still there, undecided. missed: demanded experts whose load nothing had issued. resident: demanded
    experts that an earlier token had left there.
    """

    tokens: int
    fetched: int
    in_time: int
    late: int
    wasted: int
    missed: int
    resident: int


def timeliness(
    model: Any,
    prompts: torch.Tensor,
    new_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Timeliness:
    """Continue every prompt greedily by `new_tokens` and count.

    Args:
        model: of `foreroute.load`, with guesses in decode alone. prompts: [prompts, length] token ids.
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
    # Within a decode step whatever is demanded arrives: an expert that is found on its way was guessed.
    in_time = decode.prefetch_used - decode.late
    return Timeliness(
        tokens=decode.tokens,
        fetched=decode.prefetch_loads,
        in_time=in_time,
        late=decode.late,
        wasted=decode.prefetch_wasted,
        missed=decode.misses,
        resident=decode.hits - in_time,
    )
