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
