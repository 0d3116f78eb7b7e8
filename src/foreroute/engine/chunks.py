"""How a prompt is cut into the chunks that are computed at once."""

import torch


def split_prompt(ids: torch.Tensor, chunk: int | None) -> list[torch.Tensor]:
    """`ids` [1, tokens] in chunks of `chunk` tokens and a rest.

    A rest of a single token takes one from the chunk before: a loop that announces no step, and whose steps are guessed
    from their shape, would have it taken for a decoded one. So chunks are the same in every loop, and their bits too.
    """
    num_tokens = ids.shape[1]
    if chunk is None or num_tokens <= chunk:
        return [ids]
    sizes = [chunk] * (num_tokens // chunk) + ([num_tokens % chunk] if num_tokens % chunk else [])
    if sizes[-1] == 1:
        sizes[-2:] = [sizes[-2] - 1, 2]
    return list(torch.split(ids, sizes, dim=1))
