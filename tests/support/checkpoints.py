"""Tiny checkpoints on disk: seeded random weights, saved by transformers as a user would find them."""

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support.families import FAMILIES, PAD_ID

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Small enough that every checkpoint here falls into several shards, some between two tensors of one expert.
SMALL_SHARDS = "200KB"


def random_model(config: Any, seed: int) -> Any:
    """A model with weights random enough that routing varies and logits stay finite."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction_bias" in n)]
    with torch.no_grad():
        for name, tensor in tensors:
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1 and "bias" not in name and "sinks" not in name:
                tensor.copy_(1 + 0.1 * noise)  # norms
            else:
                tensor.copy_(noise * (0.5 if "embed" in name else 0.2 if ".experts." in name else 0.1))
    return model.eval()


def save_checkpoint(model: Any, folder: Path, dtype: str = "fp32", *, sharded: bool = False) -> Path:
    """Save as transformers does: tensors per expert for most families, fused for gpt-oss."""
    model = model.to(DTYPES[dtype])
    model.save_pretrained(folder, max_shard_size=SMALL_SHARDS if sharded else "5GB")
    assert (folder / "model.safetensors.index.json").is_file() == sharded
    return folder


def save_tokenizer(folder: Path, merges: Sequence[tuple[str, str]] = ()) -> None:
    """A tokenizer of single bytes, with padding, start and end tokens; behind them what `merges` makes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<bos>", "<eos>"]
    symbols += ["".join(pair) for pair in merges]
    vocab = {symbol: position for position, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[*merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    assert wrapped.pad_token_id == PAD_ID
    wrapped.save_pretrained(folder)


class Checkpoints:
    """Makes each checkpoint once per session; tests must not change them (copy first)."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, family: str, dtype: str = "fp32", *, sharded: bool = False, seed: int = 0) -> Path:
        """The folder of this family's tiny checkpoint, tokenizer included."""
        folder = self._root / f"{family}-{dtype}-{'sharded' if sharded else 'single'}-{seed}"
        if not folder.is_dir():
            made = save_checkpoint(random_model(FAMILIES[family](), seed), folder, dtype, sharded=sharded)
            save_tokenizer(made)
        return folder


def save_hollow(config: Any, folder: Path) -> Path:
    """A Qwen3-MoE checkpoint of any size, in bf16, whose experts are zeros that take no place on the disk.

    Dense weights are random, so that it routes; hidden and intermediate size are one and the same.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    dense: dict[int, torch.Tensor] = {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in sorted(_stored_shapes(model, config).items()):
        if ".experts." not in name:
            noise = torch.randn(shape, generator=generator) * 0.05
            dense[offset] = (noise if noise.ndim > 1 else 1 + noise).bfloat16()
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    folder.mkdir(exist_ok=True)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    encoded = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        start = file.tell()
        file.truncate(start + offset)
        for tensor_start, tensor in dense.items():
            file.seek(start + tensor_start)
            file.write(tensor.view(torch.int16).numpy().tobytes())
    return folder


def _stored_shapes(model: Any, config: Any) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert in range(config.num_experts):
                for which in ("gate", "up", "down"):
                    stored = f"{name.removesuffix('gate_up_proj')}{expert}.{which}_proj.weight"
                    shapes[stored] = (config.hidden_size, config.hidden_size)
        elif not name.endswith("experts.down_proj"):
            shapes[name] = tuple(tensor.shape)
    return shapes


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object in a file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
