"""Put four-bit integers as GPTQ, AWQ and compressed-tensors publish them into ggml's blocks that hold them exactly.

A number is scale * (step - zero), with steps and zeros of 0 to 15; ggml's blocks have 32 of them, with a float16 scale:

    Q4_0   4.5 bits   scale * (q - 8)        where every zero is 8
    Q4_1   5 bits     scale * q + offset     where -zero * scale is a float16
    Q5_0   5.5 bits   scale * (q - 16)       any zero: q is step - zero + 16

Byte j of a block's 16 holds the four low bits of weight j, and above them those of weight j + 16.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from foreroute.checkpoint.assembly import Coding
from foreroute.checkpoint.codecs import INT4_TYPES
from foreroute.checkpoint.quantised_formats import AWQ_INT4, PACKED_INT4
from foreroute.kernels.torch.dequantise import AWQ_SHIFTS, gptq_zeros

_WEIGHTS = 32
# The zero of a format that stores none.
_MIDDLE = 8


def types_that_hold(coding: Coding, scales: torch.Tensor, zero_words: torch.Tensor | None) -> tuple[str, ...]:
    """The types of blocks that hold a matrix exactly, smallest first; empty where no float16 is a scale of it.

    Args:
        scales, zero_words: of the matrix, as its `coding` has them; None where it stores no zeros.
    """
    if not _is_half(scales.float()):
        return ()
    if zero_words is None:
        return INT4_TYPES
    zeros = _zeros(coding, scales, zero_words)
    has = {
        "Q4_0": bool((zeros == _MIDDLE).all()),
        "Q4_1": _is_half(zeros.float() * scales.float()),
        "Q5_0": True,
    }
    return tuple(kind for kind in INT4_TYPES if has[kind])


def into_blocks(kind: str, coding: Coding, components: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Write a matrix in blocks of `kind`, one of its `types_that_hold`, to `out` [rows, bytes of a row], uint8.

    Args:
        components: of the matrix: words, scales and, where the `coding` has them, zeros.
    """
    words, scales, *zero_words = components
    zeros = _zeros(coding, scales, zero_words[0]) if zero_words else torch.full_like(scales, _MIDDLE, dtype=torch.int32)
    if coding.kind != PACKED_INT4:
        scales, zeros = scales.t(), zeros.t()
    pairs = _pairs(coding, words).view(len(out), -1, _WEIGHTS // 2)
    num_blocks = pairs.shape[1]
    per_group = max((coding.block[1] or num_blocks * _WEIGHTS) // _WEIGHTS, 1)
    scales, zeros = (one.repeat_interleave(per_group, 1)[:, :num_blocks] for one in (scales, zeros))
    made = _MAKERS[kind](pairs, scales.float(), zeros)
    blocks, first = out.view(len(out), num_blocks, -1), 0
    for field in made:
        blocks[..., first : first + field.shape[-1]] = field
        first += field.shape[-1]


def _pairs(coding: Coding, words: torch.Tensor) -> torch.Tensor:
    """The steps [rows, columns / 2], two neighbours to a byte, the first in its low half."""
    if coding.kind == AWQ_INT4:
        of_words = words.view(torch.uint8).view(*words.shape, 4)
        steps = torch.stack([(of_words[..., at // 8] >> at % 8) & 15 for at in AWQ_SHIFTS], -1).flatten(1)
        return (steps[::2] | (steps[1::2] << 4)).t().contiguous()
    # GPTQ's words are compressed-tensors', transposed.
    upright = words if coding.kind == PACKED_INT4 else words.t()
    return upright.contiguous().view(torch.uint8)


def _zeros(coding: Coding, scales: torch.Tensor, zero_words: torch.Tensor) -> torch.Tensor:
    """The zeros, shaped as `scales`."""
    if coding.kind == AWQ_INT4:
        shifts = torch.tensor(AWQ_SHIFTS, dtype=torch.int32)
        return ((zero_words.unsqueeze(-1) >> shifts) & 15).view(scales.shape)
    return gptq_zeros(zero_words, scales, coding)


def _is_half(numbers: torch.Tensor) -> bool:
    """Whether every number is one that float16 holds, and finite."""
    halves = numbers.half()
    return bool((halves.isfinite() & (halves.float() == numbers)).all())


def _half_bytes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.half().contiguous().view(torch.uint8).view(*numbers.shape, 2)


def _low_halves(pairs: torch.Tensor) -> torch.Tensor:
    """Bytes of two neighbours each as bytes of two weights that are 16 apart: [..., 16]."""
    first, second = pairs[..., :8], pairs[..., 8:]
    return torch.stack((first & 15 | second << 4, first >> 4 | second & 0xF0), -1).flatten(-2)


def _q4_0(pairs: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _half_bytes(scales), _low_halves(pairs)


def _q4_1(pairs: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _half_bytes(scales), _half_bytes(-zeros * scales), _low_halves(pairs)


def _q5_0(pairs: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, ...]:
    steps = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
    codes = steps + (2 * _MIDDLE - zeros).to(torch.uint8).unsqueeze(-1)
    tops, low = (codes >> 4).view(*codes.shape[:-1], 4, 8), codes & 15
    bits = tops[..., 0].clone()
    for at in range(1, 8):
        bits |= tops[..., at] << at
    return _half_bytes(scales), bits, low[..., :16] | (low[..., 16:] << 4)


_MAKERS: Mapping[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0,
}  # fmt: skip
