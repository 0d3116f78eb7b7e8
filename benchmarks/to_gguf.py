"""Write the GGUF file of a Qwen3-MoE checkpoint (architecture qwen3moe), so that llama.cpp runs the same weights.

    python -m benchmarks.to_gguf build/synth build/synth-f16.gguf

F16 by default, which llama.cpp's CPU code multiplies on any x86; the bytes per expert are the same. BF16 weights of
ordinary size are exact in F16. One layer's experts of one kind are in memory at a time. The tokenizer goes with it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "bf16": gguf.LlamaFileType.MOSTLY_BF16}
TORCH_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
QUANTIZATION = {"f16": gguf.GGMLQuantizationType.F16, "bf16": gguf.GGMLQuantizationType.BF16}

# One tensor of the GGUF file: its name, and the checkpoint's tensors that are stacked to make it.
Part = tuple[str, list[str]]


def parts(config: dict[str, Any]) -> list[Part]:
    """Every tensor of the GGUF file in order, with the names it comes from."""
    listed: list[Part] = [("token_embd.weight", ["model.embed_tokens.weight"])]
    plain = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
    }
    for layer in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{layer}", f"blk.{layer}"
        listed += [(f"{target}.{new}.weight", [f"{source}.{old}.weight"]) for new, old in plain.items()]
        for kind in ("gate", "up", "down"):
            experts = range(num_experts(config))
            names = [f"{source}.mlp.experts.{expert}.{kind}_proj.weight" for expert in experts]
            listed.append((f"{target}.ffn_{kind}_exps.weight", names))
    listed.append(("output_norm.weight", ["model.norm.weight"]))
    if not config.get("tie_word_embeddings"):
        listed.append(("output.weight", ["lm_head.weight"]))
    return listed


def num_experts(config: dict[str, Any]) -> int:
    """Experts per layer, under either of the names that configurations use."""
    return int(config.get("num_experts") or config["num_local_experts"])


def add_settings(writer: gguf.GGUFWriter, config: dict[str, Any], dtype: str) -> None:
    """The model's settings as llama.cpp names them."""
    writer.add_name("synthetic qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_expert_count(num_experts(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """The byte-level BPE of tokenizer.json; ids that it does not name are filled with unused tokens."""
    saved = json.loads((folder / "tokenizer.json").read_text())
    by_id = {index: token for token, index in saved["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in saved["added_tokens"]}
    tokens, types = [], []
    for index in range(vocab_size):
        if index in special:
            tokens.append(special[index])
            types.append(gguf.TokenType.CONTROL)
        elif index in by_id:
            tokens.append(by_id[index])
            types.append(gguf.TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{index}]")
            types.append(gguf.TokenType.UNUSED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in saved["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(next(iter(special)))
    writer.add_add_bos_token(False)


class Checkpoint:
    """Tensors of a sharded safetensors folder by name; a file is mapped while one of its tensors is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self.file_of: dict[str, str] = index["weight_map"]

    def shape(self, name: str) -> list[int]:
        """Shape by the header alone."""
        with safe_open(self.folder / self.file_of[name], framework="pt") as file:
            return list(file.get_slice(name).get_shape())

    def read(self, names: list[str]) -> torch.Tensor:
        """One tensor, or several of one shape stacked along a new first axis; in one pass per file."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.file_of[name], []).append(name)
        found: dict[str, torch.Tensor] = {}
        for file_name, wanted in by_file.items():
            with safe_open(self.folder / file_name, framework="pt") as file:
                found.update((name, file.get_tensor(name)) for name in wanted)
        return found[names[0]] if len(names) == 1 else torch.stack([found[name] for name in names])


def stored(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """The bytes that go to the file: vectors and routers in fp32 as llama.cpp wants them, matrices in `dtype`."""
    kept = tensor.to(TORCH_TYPES[dtype])
    if dtype == "bf16":
        return kept.view(torch.uint8).numpy()
    if not torch.isfinite(kept).all():
        raise ValueError("A weight is too large for F16; use --dtype bf16.")
    return kept.numpy()


def convert(folder: Path, out: Path, dtype: str = "f16") -> None:
    """Write `out`; it gets its name only when it is whole.

    Raises:
        ValueError: another architecture, or a weight that F16 cannot hold.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "qwen3_moe":
        raise ValueError(f"{folder} is {config['model_type']}; only qwen3_moe is written here.")
    checkpoint = Checkpoint(folder)
    unfinished = out.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "qwen3moe")
    add_settings(writer, config, dtype)
    add_tokenizer(writer, folder, config["vocab_size"])
    plan = parts(config)
    for target, names in plan:
        shape = checkpoint.shape(names[0])
        if len(names) > 1:
            shape = [len(names), *shape]
        in_fp32 = len(shape) == 1 or "ffn_gate_inp" in target
        numpy_type: np.dtype[Any] = np.dtype(np.float32 if in_fp32 else np.float16)
        raw_type = None if in_fp32 else QUANTIZATION[dtype]
        if raw_type == gguf.GGMLQuantizationType.BF16:  # announced in bytes: numpy has no bf16
            shape, numpy_type = [*shape[:-1], shape[-1] * 2], np.dtype(np.uint8)
        nbytes = int(np.prod(shape)) * numpy_type.itemsize
        writer.add_tensor_info(target, shape, numpy_type, nbytes, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for target, names in plan:
        tensor = checkpoint.read(names)
        in_fp32 = tensor.dim() == 1 or "ffn_gate_inp" in target
        writer.write_tensor_data(tensor.float().numpy() if in_fp32 else stored(tensor, dtype))
    writer.close()
    unfinished.rename(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=sorted(FILE_TYPES), default="f16")
    args = parser.parse_args()
    convert(args.checkpoint, args.out, args.dtype)
    print(json.dumps({"file": str(args.out), "bytes": args.out.stat().st_size, "dtype": args.dtype}))


if __name__ == "__main__":
    main()
