"""What GPTQ, AWQ and compressed-tensors mean, written a second time: the same checkpoints as plain numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.quantised import rewritten, write_awq, write_float_quantised, write_gptq, write_packed_int4

State = dict[str, torch.Tensor]


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Words [rows, n] as integers 0..15 [rows, 8 n], one by one."""
    rows = packed.view(torch.uint32).tolist()
    return torch.tensor([[(word >> shift) & 15 for word in row for shift in range(0, 32, 4)] for row in rows])


def plain_packed_int4(state: State, stem: str) -> torch.Tensor:
    """By compressed-tensors' own functions."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    steps = unpack_from_int32(state.pop(f"{stem}weight_packed"), 4, torch.Size(state.pop(f"{stem}weight_shape")))
    scales = state.pop(f"{stem}weight_scale")
    return dequantised(steps, scales, num_bits=4, type="int", strategy="group", group_size=32)


def plain_float_quantised(state: State, stem: str) -> torch.Tensor:
    values, scales = state.pop(f"{stem}weight"), state.pop(f"{stem}weight_scale")
    return dequantised(values, scales, num_bits=8, type="float", strategy="channel")


def dequantised(steps: torch.Tensor, scales: torch.Tensor, **args: Any) -> torch.Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    made: torch.Tensor = dequantize(steps, scales, args=QuantizationArgs(**args))
    return made


def plain_gptq(state: State, stem: str, shift: int = 1) -> torch.Tensor:
    """By the definition: scale of the input's group, times (step - (stored zero + 1)); gptq_v2 adds no one."""
    steps = unpacked(state.pop(f"{stem}qweight").t().contiguous()).t()
    zeros = unpacked(state.pop(f"{stem}qzeros")) + shift
    groups = state.pop(f"{stem}g_idx").long()
    return (state.pop(f"{stem}scales")[groups] * (steps - zeros[groups]).half()).t()


def plain_awq(state: State, stem: str) -> torch.Tensor:
    """By the format's definition: nibble n of a word is output 0 2 4 6 1 3 5 7 of its eight; zeros as they are."""
    steps, zeros = (
        unpacked(state.pop(f"{stem}{which}")).view(-1, scale_rows // 8, 8)[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].flatten(1)
        for scale_rows in [state[f"{stem}scales"].shape[1]]
        for which in ("qweight", "qzeros")
    )
    scales = state.pop(f"{stem}scales")
    groups = torch.arange(len(steps)) // (len(steps) // len(scales))
    return (scales[groups] * (steps - zeros[groups]).half()).t()


FORMATS: dict[str, tuple[Callable[[Path, Path], Path], str, Callable[..., torch.Tensor], float]] = {
    "pack-quantized": (write_packed_int4, "weight_packed", plain_packed_int4, 4 + 16 / 32),
    "float-quantized": (write_float_quantised, "weight_scale", plain_float_quantised, 0),
    "gptq": (write_gptq, "qweight", plain_gptq, 4 + 20 / 16),
    "awq": (write_awq, "qweight", plain_awq, 4 + 20 / 16),
}


def plain(folder: Path, name: str, to: Path, **how: Any) -> Path:
    """The checkpoint with numbers in place of what is quantised."""
    rewritten(folder, to, lambda state: numbers(state, name, **how))
    config = json.loads((to / "config.json").read_text())
    config.pop("quantization_config", None)
    (to / "config.json").write_text(json.dumps(config))
    return to


def numbers(state: State, name: str, only: str = "", **how: Any) -> State:
    """The tensors with numbers in place of what is quantised; of matrices with `only` in their names."""
    _, ending, make, _ = FORMATS[name]
    for stem in [key.removesuffix(ending) for key in list(state) if key.endswith(ending) and only in key]:
        state[f"{stem}weight"] = make(state, stem, **how).bfloat16().contiguous()
    assert only or not any(key.endswith(("scales", "weight_scale")) for key in state)
    return state
