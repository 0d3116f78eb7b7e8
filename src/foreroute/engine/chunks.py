"""Split a prompt into chunks."""

import torch


def split_prompt(ids: torch.Tensor, chunk: int | None) -> list[torch.Tensor]:
    """Split `ids` [1, tokens] into chunks of `chunk` tokens and a remainder.

    A remainder of one token takes one more from the chunk before: a loop that announces no steps has their phase
    inferred from their shape, and one token would count as decode. So every loop has the same chunks and bits.
    """
    num_tokens = ids.shape[1]
    if chunk is None or num_tokens <= chunk:
        return [ids]
    sizes = [chunk] * (num_tokens // chunk) + ([num_tokens % chunk] if num_tokens % chunk else [])
    if sizes[-1] == 1:
        sizes[-2:] = [sizes[-2] - 1, 2]
    return list(torch.split(ids, sizes, dim=1))
