"""Dequantise GGUF blocks to fp32, bit for bit as the gguf package does: common types with vectorised torch operations.

Q8_0     32 weights, 34 bytes    fp16 scale, int8
MXFP4    32 weights, 17 bytes    power of two, four-bit floats: the low halves of the bytes first, then the high ones
Q4_0     32 weights, 18 bytes    fp16 scale, four-bit integers from -8: low halves first
Q4_1     32 weights, 20 bytes    fp16 scale and fp16 offset, four-bit integers: low halves first
Q5_0     32 weights, 22 bytes    fp16 scale, five-bit integers from -16: their top bits in 4 bytes, low halves first
Q4_K    256 weights, 144 bytes   fp16 scale and fp16 offset, 8 groups with 6-bit factors of both, four-bit integers
Q5_K    256 weights, 176 bytes   the same with a fifth bit, of all eight groups in 32 bytes
Q6_K    256 weights, 210 bytes   four low bits, two high bits, 16 groups with int8 factors of one fp16 scale

The package itself dequantises the others, with numpy.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from foreroute.checkpoint.assembly import GGUF_PREFIX, Coding
from foreroute.checkpoint.gguf_file import EXPERT_BLOCKS, gguf_package

# Twice the values of E2M1; the scale is half its own, so that the product is exact.
_MXFP4_VALUES = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.float32)


def dequantise_gguf(kind: str, raw: torch.Tensor) -> torch.Tensor:
    """Dequantise one stored matrix.

    Args:
        kind: the quantisation's name in GGUF. raw: uint8 [rows, bytes of a row].
    Returns:
        float32 [rows, columns].
    """
    if kind in FLOATS:
        return raw.contiguous().view(FLOATS[kind]).float()
    if kind not in _BLOCKS:
        return _by_package(kind, raw)
    make, block_bytes = _BLOCKS[kind]
    return make(raw.reshape(-1, block_bytes)).view(raw.shape[0], -1)


def _by_package(kind: str, raw: torch.Tensor) -> torch.Tensor:
    gguf = gguf_package()
    with np.errstate(all="ignore"):  # scales that are infinite or no numbers
        numbers = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32)).view(raw.shape[0], -1)


def _half(raw: torch.Tensor) -> torch.Tensor:
    """Decode fp16 scales [blocks, 1] from two bytes each."""
    return raw.contiguous().view(torch.float16).float()


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks[:, :2])


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    exponent = blocks[:, :1].int()
    # The bits of half the power of two; the two smallest are subnormal.
    bits = torch.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)
    return _MXFP4_VALUES[_halves(blocks[:, 1:]).int()] * bits.view(torch.float32)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks[:, :2]) * (_halves(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks[:, :2]) * _halves(blocks[:, 4:]).float() + _half(blocks[:, 2:4])


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    tops = torch.stack([(blocks[:, 2:6] >> shift) & 1 for shift in range(8)], dim=2).view(len(blocks), 32)
    return _half(blocks[:, :2]) * ((_halves(blocks[:, 6:]) | (tops << 4)).float() - 16)


def _halves(packed: torch.Tensor) -> torch.Tensor:
    """Return the four low bits of all bytes, followed by the four high bits of all bytes."""
    return torch.cat((packed & 0x0F, packed >> 4), dim=1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _in_groups(blocks, _pairs(blocks[:, 16:]))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    tops = torch.stack([(blocks[:, 16:48] >> shift) & 1 for shift in range(8)], dim=1)
    return _in_groups(blocks, _pairs(blocks[:, 48:]) | (tops << 4))


def _pairs(packed: torch.Tensor) -> torch.Tensor:
    """Unpack groups of 32 codes [blocks, 8, 32]: of every 32 bytes the low halves, then the high ones."""
    rows = packed.reshape(len(packed), 4, 32)
    return torch.stack((rows & 0x0F, rows >> 4), dim=2).view(len(packed), 8, 32)


def _in_groups(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Scale codes [blocks, 8, 32] by the factors of their groups, which are in the blocks' first 16 bytes."""
    scale, offset = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    low_d, low_m, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    factors = torch.cat((low_d & 0x3F, (high & 0x0F) | ((low_d >> 2) & 0x30)), dim=1)
    offsets = torch.cat((low_m & 0x3F, (high >> 4) | ((low_m >> 2) & 0x30)), dim=1)
    return (scale * factors.float()).unsqueeze(2) * codes.float() - (offset * offsets.float()).unsqueeze(2)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    num_blocks = blocks.shape[0]
    low, high = blocks[:, :128].reshape(num_blocks, 2, 64), blocks[:, 128:192].reshape(num_blocks, 2, 32)
    scales = _half(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8).float()
    codes = torch.stack((low & 0x0F, low >> 4), dim=2).view(num_blocks, 8, 32)
    tops = torch.stack([(high >> shift) & 0x03 for shift in (0, 2, 4, 6)], dim=2).view(num_blocks, 8, 32)
    numbers = (codes | (tops << 4)).float() - 32
    return scales.unsqueeze(2) * numbers.view(num_blocks, 16, 16)


FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCKS: Mapping[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "Q8_0": (_q8_0, 34), "MXFP4": (_mxfp4, 17), "Q4_0": (_q4_0, 18), "Q4_1": (_q4_1, 20), "Q5_0": (_q5_0, 22),
    "Q4_K": (_q4_k, 144), "Q5_K": (_q5_k, 176), "Q6_K": (_q6_k, 210),
}  # fmt: skip


def _decode(components: Sequence[torch.Tensor], out: torch.Tensor, coding: Coding) -> None:
    out.copy_(dequantise_gguf(coding.kind.removeprefix(GGUF_PREFIX), components[0]))


# For kernels/torch/dequantise.py, by the coding's name.
GGUF_DECODERS = {GGUF_PREFIX + kind: _decode for kind in EXPERT_BLOCKS}
