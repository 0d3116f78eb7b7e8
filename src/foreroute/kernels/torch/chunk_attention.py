"""Attention of a prompt's chunk over itself and all that is before it, without a mask.

torch knows a triangle only where queries and keys begin together. For a chunk that others precede it takes a mask of
chunk x context, makes numbers of it in each layer, and walks keys that heads share once per head, as copies. Here the
context, which every token of the chunk sees, is attended to in one call, with the heads that share keys as one head of
more queries; the chunk itself in another; and what both found is joined by their sums of exponentials.
"""

import torch

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KINDS = frozenset({torch.float32, torch.bfloat16, torch.float16})


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend_chunk` computes these; shapes as there."""
    is_one_kind = query.dtype == key.dtype == value.dtype and query.dtype in _KINDS
    is_one_size = query.shape[-1] == key.shape[-1] == value.shape[-1]
    has_whole_rows = all(one.stride(-1) == 1 for one in (query, key, value))
    is_grouped = query.shape[1] % key.shape[1] == 0
    return query.device.type == "cpu" and is_one_kind and is_one_size and has_whole_rows and is_grouped


def attend_chunk(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Attend with every token to those before it and to itself.

    Args:
        query: [rows, heads, tokens, size], the last of those that keys are of. key, value: [rows, key heads, columns,
            size]. scale: of the products; None: one over the root of size.
    Returns:
        [rows, tokens, heads, size].
    Cost: no copy of keys or values but the chunk's own.
    """
    heads, num_tokens = query.shape[1], query.shape[2]
    key_heads, num_before = key.shape[1], key.shape[2] - num_tokens
    group = heads // key_heads
    own_key, own_value = (
        states[:, :, num_before:].repeat_interleave(group, dim=1) if group > 1 else states[:, :, num_before:]
        for states in (key, value)
    )
    own, log_own = _FLASH(query, own_key, own_value, 0.0, True, scale=scale)
    if num_before == 0:
        return own.transpose(1, 2).contiguous()
    # [rows, key heads, group, tokens, size] as [rows, key heads, group x tokens, size].
    grouped = query.unflatten(1, (key_heads, group)).flatten(2, 3)
    before, log_before = _FLASH(grouped, key[:, :, :num_before], value[:, :, :num_before], 0.0, False, scale=scale)
    before, log_before = before.unflatten(2, (group, num_tokens)), log_before.unflatten(2, (group, num_tokens))
    own, log_own = own.unflatten(1, (key_heads, group)), log_own.unflatten(1, (key_heads, group))
    share = torch.sigmoid(log_before - log_own)[..., None]
    joined = own.float().lerp_(before.float(), share).to(query.dtype)
    return joined.flatten(1, 2).transpose(1, 2).contiguous()
