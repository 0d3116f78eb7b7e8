"""Tiny checkpoints in published formats: written from a plain one, quantised here by the simplest rule."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


def rewritten(source: Path, folder: Path, change: Callable[[State], State], **config: object) -> Path:
    """A copy of the checkpoint with other tensors, and with these keys in config.json."""
    shutil.copytree(source, folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    return folder


def write_mxfp4(source: Path, folder: Path) -> Path:
    """gpt-oss as it is published: random blocks and exponents in place of each fused expert matrix [in, out]."""

    def change(state: State) -> State:
        generator = torch.Generator().manual_seed(5)
        changed: State = {}
        for name, tensor in state.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                changed[name] = tensor
                continue
            experts, width, rows = tensor.shape
            shape = (experts, rows, width // 32)
            changed[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            changed[f"{name}_scales"] = torch.randint(119, 124, shape, generator=generator, dtype=torch.uint8)
        return changed

    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    declared = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    return rewritten(source, folder, change, quantization_config=declared)


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Matrices that FP8 and int4 checkpoints quantise: all but embeddings, head and router."""
    plain = ("embed_tokens", "lm_head", ".gate.weight", "router")
    return tensor.ndim == 2 and name.endswith(".weight") and not any(part in name for part in plain)


def write_fp8(source: Path, folder: Path, block: int = 16) -> Path:
    """DeepSeek-V3's format with blocks of `block` x `block`; every linear layer but the router and the head."""

    def change(state: State) -> State:
        changed: State = {}
        for name, tensor in state.items():
            if not is_linear(name, tensor):
                changed[name] = tensor
                continue
            values, scales = fp8_blocks(tensor, block)
            changed[name], changed[f"{name}_scale_inv"] = values, scales
        return changed

    declared = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block],
        "modules_to_not_convert": ["lm_head", "gate"],
    }  # fmt: skip
    return rewritten(source, folder, change, quantization_config=declared)


def fp8_blocks(tensor: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 values, and the scale of each block; the last blocks may be cut off."""
    rows, cols = tensor.shape
    scales = torch.empty(-(-rows // block), -(-cols // block))
    values = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = tensor[at].float().abs().max() / 448
            values[at] = (tensor[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def write_float_quantised(source: Path, folder: Path) -> Path:
    """compressed-tensors' eight-bit floats with a scale per row."""

    def change(state: State) -> State:
        changed: State = {}
        for name, tensor in state.items():
            if not is_linear(name, tensor):
                changed[name] = tensor
                continue
            scales = (tensor.float().abs().amax(1, keepdim=True) / 448).bfloat16()
            changed[name] = (tensor.float() / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            changed[f"{name}_scale"] = scales
        return changed

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    return rewritten(source, folder, change, quantization_config=compressed("float-quantized", weights))


def write_packed_int4(source: Path, folder: Path, group: int = 32) -> Path:
    """compressed-tensors' four-bit integers, eight to a word along the input, with a scale per group of a row."""

    def change(state: State) -> State:
        changed: State = {}
        for name, tensor in state.items():
            if not is_linear(name, tensor):
                changed[name] = tensor
                continue
            grouped = tensor.float().view(len(tensor), -1, group)
            scales = (grouped.abs().amax(2) / 7.5).bfloat16()
            steps = (grouped / scales.float().unsqueeze(-1)).round().clamp(-8, 7).view(tensor.shape) + 8
            stem = name.removesuffix("weight")
            changed[f"{stem}weight_packed"], changed[f"{stem}weight_scale"] = words(steps), scales
            changed[f"{stem}weight_shape"] = torch.tensor(tensor.shape)
        return changed

    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False,
    }  # fmt: skip
    return rewritten(source, folder, change, quantization_config=compressed("pack-quantized", weights))


def compressed(layout: str, weights: dict[str, object]) -> dict[str, object]:
    """The declaration of compressed-tensors with one kind of weights."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*gate$"],
    }  # fmt: skip


def write_gptq(source: Path, folder: Path, group: int = 16) -> Path:
    """GPTQ's four-bit integers with zero points, eight to a word along the input, scales in float16.

    group 0 is the whole row; the last group may be a shorter one.
    """

    def change(state: State) -> State:
        changed: State = {}
        for name, tensor in state.items():
            if not is_linear(name, tensor):
                changed[name] = tensor
                continue
            changed |= gptq_components(name, tensor, group)
        return changed

    declared = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": False}
    return rewritten(source, folder, change, quantization_config=declared)


def write_gptq_around(zero: int) -> Callable[[Path, Path], Path]:
    """A writer of GPTQ in groups of 32 with one zero point for all: 8 is its `sym`."""

    def write(source: Path, folder: Path) -> Path:
        def change(state: State) -> State:
            made = [
                gptq_components(name, one, 32, zero) if is_linear(name, one) else {name: one}
                for name, one in state.items()
            ]
            return {name: tensor for one in made for name, tensor in one.items()}

        declared = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": zero == 8}
        return rewritten(source, folder, change, quantization_config=declared)

    write.__name__ = f"write_gptq_around_{zero}"
    return write


def gptq_components(name: str, tensor: torch.Tensor, group: int, zero: int | None = None) -> State:
    """What GPTQ stores of the matrix `name` [rows, columns]. zero: of every group, if not chosen by its numbers."""
    columns = tensor.shape[1]
    per_group = min(group or columns, columns)
    # The last column again, which leaves the last group's range as it is.
    filled = torch.nn.functional.pad(tensor.float(), (0, -columns % per_group), mode="replicate")
    grouped = filled.view(len(tensor), -1, per_group)
    low, high = grouped.amin(2), grouped.amax(2)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(1, 15)
    if zero is not None:
        zeros = torch.full_like(zeros, zero)
    steps = (grouped / scales.float().unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, 15)
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": words(steps.flatten(1)[:, :columns]).t().contiguous(),
        f"{stem}scales": scales.t().contiguous(),
        f"{stem}qzeros": words(zeros.t().contiguous() - 1),
        f"{stem}g_idx": torch.arange(columns, dtype=torch.int32) // per_group,
    }


# Nibble n of a word holds output number _AWQ_ORDER[n] of its eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def write_awq(source: Path, folder: Path, group: int = 16) -> Path:
    """AWQ's four-bit integers with zero points, eight to a word along the output in an order of their own.

    group 0 is the whole row.
    """

    def change(state: State) -> State:
        changed: State = {}
        for name, tensor in state.items():
            if not is_linear(name, tensor):
                changed[name] = tensor
                continue
            grouped = tensor.float().view(len(tensor), -1, group or tensor.shape[1])
            low, high = grouped.amin(2), grouped.amax(2)
            scales = ((high - low) / 15).half()
            zeros = (-low / scales.float()).round().clamp(0, 15)
            steps = (grouped / scales.float().unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, 15)
            stem = name.removesuffix("weight")
            changed[f"{stem}qweight"] = words(_awq_order(steps.view(tensor.shape).t()))
            changed[f"{stem}scales"] = scales.t().contiguous()
            changed[f"{stem}qzeros"] = words(_awq_order(zeros.t()))
        return changed

    declared = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return rewritten(source, folder, change, quantization_config=declared)


def _awq_order(steps: torch.Tensor) -> torch.Tensor:
    return steps.reshape(len(steps), -1, 8)[:, :, list(_AWQ_ORDER)].reshape(len(steps), -1)


def words(steps: torch.Tensor) -> torch.Tensor:
    """Integers 0..15 [rows, n] as words [rows, n / 8], the first in the lowest bits."""
    eights = steps.long().view(len(steps), -1, 8) << torch.arange(0, 32, 4)
    return eights.sum(2).to(torch.uint32).view(torch.int32)
