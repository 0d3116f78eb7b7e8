"""Tiny GGUF files with random weights, and the resident models of the same numbers."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize

from foreroute.kernels.ggml.library import open_library
from tests.support.checkpoints import random_model, save_tokenizer

Kind = gguf.GGMLQuantizationType
_ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
}  # fmt: skip
_BLOCK: Mapping[str, Mapping[str, str]] = {
    "qwen3moe": {
        **_ATTENTION, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate",
    },
    "gpt-oss": {**_ATTENTION, "post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
}  # fmt: skip


def qwen3_moe_config(**others: Any) -> Any:
    """Rows of 256 weights, as the K-quants want them."""
    from transformers import Qwen3MoeConfig

    settings: dict[str, Any] = {
        "vocab_size": 264, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "num_hidden_layers": 3, "intermediate_size": 96, "moe_intermediate_size": 256, "num_experts": 8,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "mlp_only_layers": [], "max_position_embeddings": 192,
        "tie_word_embeddings": False, "pad_token_id": 256, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    return Qwen3MoeConfig(**{**settings, **others})


def gpt_oss_config(**others: Any) -> Any:
    """Windows that slide within a prompt, positions by YaRN."""
    from transformers import GptOssConfig

    settings: dict[str, Any] = {
        "vocab_size": 264, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "num_hidden_layers": 4, "intermediate_size": 96, "num_local_experts": 12, "num_experts_per_tok": 2,
        "sliding_window": 8, "max_position_embeddings": 192, "tie_word_embeddings": False, "pad_token_id": 256,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return GptOssConfig(**{**settings, **others})


@dataclass(frozen=True)
class Written:
    """A GGUF file. resident: transformers' model of its numbers, in fp32.

    experts: for each stored expert tensor its raw bytes [experts, rows, bytes of a row] and what they are.
    """

    path: Path
    resident: Any
    experts: Mapping[str, tuple[np.ndarray, Kind]]

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert of the first layer."""
        return sum(raw[0].nbytes for name, (raw, _) in self.experts.items() if name.startswith("blk.0."))

    @property
    def weights_per_expert(self) -> int:
        """How many weights an expert has, biases left out."""
        return sum(
            dequantize(raw[0], kind).size
            for name, (raw, kind) in self.experts.items()
            if name.startswith("blk.0.") and name.endswith("weight")
        )


def random_q4_k(rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """Valid blocks, not quantised from numbers: small scales, the rest at random."""
    blocks = generator.integers(0, 256, (rows * columns // 256, 144), dtype=np.uint8)
    scales = generator.uniform(0.0005, 0.002, (len(blocks), 2)).astype(np.float16)
    scales[:, 1] *= 7  # the offset: the middle of 0 .. 15
    blocks[:, :4] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def random_q6_k(rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """The same for Q6_K."""
    blocks = generator.integers(0, 256, (rows * columns // 256, 210), dtype=np.uint8)
    blocks[:, 208:] = generator.uniform(2e-5, 1e-4, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(
    folder: Path, architecture: str, kind: Kind, *, dense: Kind = Kind.F32, down: Kind | Sequence[Kind] | None = None,
    layers: Sequence[Mapping[str, Kind]] | None = None, seed: int = 0, tokenizer: bool = True, **settings: Any,
) -> Written:  # fmt: skip
    """Write `folder`/model.gguf: experts in `kind` (their down matrices in `down`, one for all layers or one for each;
    or in `layers`, by layer the kinds of gate, up and down), other matrices in `dense`. `settings` are the config's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = (qwen3_moe_config if architecture == "qwen3moe" else gpt_oss_config)(**settings)
    config._experts_implementation = "eager"
    model = random_model(config, seed)
    state = dict(model.state_dict())
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    add_settings(writer, config, architecture)
    _add_dense(writer, config, architecture, state, dense)
    experts: dict[str, tuple[np.ndarray, Kind]] = {}
    generator = np.random.default_rng(seed)
    downs = down if isinstance(down, Sequence) else [down or kind] * config.num_hidden_layers
    for layer in range(config.num_hidden_layers):
        others = {"down": downs[layer]} if layers is None else layers[layer]
        _add_experts(writer, layer, architecture, state, others, kind, generator, experts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(state)
    if tokenizer:
        save_tokenizer(folder)
    return Written(path, model, experts)


def in_blocks(tensor: torch.Tensor, kind: Kind) -> np.ndarray:
    """A tensor [..., columns] in `kind`, by the gguf package; by ggml's quantiser where that one has none."""
    try:
        return np.asarray(quantize(tensor.numpy(), kind))
    except NotImplementedError:
        library, numbers = open_library(), np.ascontiguousarray(tensor.numpy().reshape(-1, tensor.shape[-1]))
        blocks = np.zeros((len(numbers), library.types[kind.name].row_bytes(numbers.shape[1])), dtype=np.uint8)
        shape = (0, *numbers.shape)
        library.ggml_quantize_chunk(int(kind), numbers.ctypes.data, blocks.ctypes.data, *shape, None)
        return blocks.reshape(*tensor.shape[:-1], -1)


def add_settings(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    """The model's settings as llama.cpp names them."""
    is_qwen = architecture == "qwen3moe"
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts if is_qwen else config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size if is_qwen else config.intermediate_size)
    writer.add_pad_token_id(256)
    if not is_qwen:
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Store a dense tensor, and give back the numbers that are in the file."""
    if tensor.ndim == 1 or "ffn_gate_inp" in name:
        kind = Kind.F32
    raw = in_blocks(tensor, kind)
    writer.add_tensor(name, raw, raw_dtype=kind)
    return torch.from_numpy(np.array(dequantize(raw, kind))).view(tensor.shape)


def _add_dense(
    writer: gguf.GGUFWriter, config: Any, architecture: str, state: dict[str, torch.Tensor], kind: Kind
) -> None:
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    names = {**top, "output.weight": "lm_head.weight"}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in _BLOCK[architecture].items():
            for ending in ("weight", "bias"):
                names[f"blk.{layer}.{theirs}.{ending}"] = f"model.layers.{layer}.{ours}.{ending}"
        names[f"blk.{layer}.attn_sinks.weight"] = f"model.layers.{layer}.self_attn.sinks"
    for theirs, ours in names.items():
        if ours in state:
            state[ours] = _add(writer, theirs, state[ours], kind)


def _add_experts(
    writer: gguf.GGUFWriter, layer: int, architecture: str, state: dict[str, torch.Tensor], others: Mapping[str, Kind],
    kind: Kind, generator: np.random.Generator, experts: dict[str, tuple[np.ndarray, Kind]],
) -> None:  # fmt: skip
    stem = f"model.layers.{layer}.mlp.experts"
    is_qwen = architecture == "qwen3moe"
    gate_up, down = state[f"{stem}.gate_up_proj"], state[f"{stem}.down_proj"]
    if is_qwen:
        gate, up = gate_up.chunk(2, 1)
    else:
        gate, up = (gate_up[:, :, which::2].transpose(1, 2) for which in (0, 1))
        down = down.transpose(1, 2)
    made = {}
    for name, tensor in {"gate": gate, "up": up, "down": down}.items():
        of_this = others.get(name, kind)
        shape = tuple(tensor.shape)
        if of_this in (Kind.Q4_K, Kind.Q6_K):
            make = random_q4_k if of_this == Kind.Q4_K else random_q6_k
            raw = make(shape[0] * shape[1], shape[2], generator)
        else:
            raw = in_blocks(tensor.contiguous().view(-1, shape[2]), of_this)
        raw = raw.reshape(shape[0], shape[1], -1)
        full = f"blk.{layer}.ffn_{name}_exps.weight"
        writer.add_tensor(full, raw, raw_dtype=of_this)
        experts[full] = (raw, of_this)
        made[name] = torch.from_numpy(np.array(dequantize(raw, of_this))).view(shape)
    if is_qwen:
        state[f"{stem}.gate_up_proj"] = torch.cat((made["gate"], made["up"]), 1)
        state[f"{stem}.down_proj"] = made["down"]
        return
    both = torch.stack((made["gate"], made["up"]), 2).flatten(1, 2)
    state[f"{stem}.gate_up_proj"] = both.transpose(1, 2).contiguous()
    state[f"{stem}.down_proj"] = made["down"].transpose(1, 2).contiguous()
    bias = state[f"{stem}.gate_up_proj_bias"]
    for name, part in {"gate": bias[:, 0::2], "up": bias[:, 1::2], "down": state[f"{stem}.down_proj_bias"]}.items():
        raw = part.contiguous().numpy()
        writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.bias", raw)
        experts[f"blk.{layer}.ffn_{name}_exps.bias"] = (raw, Kind.F32)


def write_copy(
    reader: gguf.GGUFReader, writer: gguf.GGUFWriter, without: Container[str] = (), *, stride: int = 1
) -> None:
    """Write what `reader` has, but for the settings `without`, behind what `writer` was given; close it.

    Of the tensors every `stride`-th comes first, then every one behind these, and so on.
    """
    for name, field in reader.fields.items():
        if name != "general.architecture" and not name.startswith("GGUF.") and name not in without:
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in (tensor for first in range(stride) for tensor in reader.tensors[first::stride]):
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
