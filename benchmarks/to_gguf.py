"""Write the GGUF file of a Qwen3-MoE checkpoint (architecture qwen3moe), so that llama.cpp runs the same weights.

    python -m benchmarks.to_gguf build/synth build/synth-f16.gguf
    python -m benchmarks.to_gguf build/synth128 build/synth128-q4_0.gguf --experts q4_0

F16 by default, which llama.cpp's CPU code multiplies on any x86; the bytes per expert are the same. BF16 weights of
ordinary size are exact in F16. --experts q8_0 or q4_0 quantises the experts alone, by the gguf package's own code, and
--dtype q8_0 or q4_0 everything but vectors and routers, as llama-quantize does. (Q8_0 is 8.5 bits per weight, Q4_0 is
4.5, in a file as in a store of `foreroute pack --quant`.)

One expert's tensor is in memory at a time. The tokenizer goes with it.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from safetensors import safe_open

Kind = gguf.GGMLQuantizationType
DENSE = {"f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}
EXPERTS = DENSE
FILE_TYPES = {
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Kind.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}

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


def add_settings(writer: gguf.GGUFWriter, config: dict[str, Any], experts: Kind) -> None:
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
    writer.add_file_type(FILE_TYPES[experts])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """The byte-level BPE of tokenizer.json; ids that it does not name are filled with unused tokens."""
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
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
    """Tensors of a safetensors folder by name; the file of the last one asked for stays mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: tuple[str, Any] = ("", None)
        index = folder / "model.safetensors.index.json"
        self.file_of: dict[str, str] = {}
        if index.is_file():
            self.file_of.update(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                self.file_of.update(dict.fromkeys(file.keys(), "model.safetensors"))

    def shape(self, name: str) -> list[int]:
        """Shape by the header alone."""
        return list(self._file_with(name).get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as stored."""
        tensor: torch.Tensor = self._file_with(name).get_tensor(name)
        return tensor

    def _file_with(self, name: str) -> Any:
        file_name = self.file_of[name]
        if self._opened[0] != file_name:
            self._opened = (file_name, safe_open(self.folder / file_name, framework="pt"))
        return self._opened[1]


def kind_of(target: str, dimensions: int, dense: Kind, experts: Kind) -> Kind:
    """How a tensor is stored: vectors and routers in fp32 as llama.cpp wants them, experts and the others as asked."""
    if dimensions == 1 or "ffn_gate_inp" in target:
        return Kind.F32
    return experts if "_exps." in target else dense


def encode(tensor: torch.Tensor, kind: Kind) -> np.ndarray:
    """The tensor as the file has it.

    Raises:
        ValueError: a weight that F16 cannot hold.
    """
    if kind == Kind.BF16:
        return tensor.to(torch.bfloat16).view(torch.uint8).numpy()
    if kind == Kind.F16:
        kept = tensor.to(torch.float16)
        if not torch.isfinite(kept).all():
            raise ValueError("A weight is too large for F16; use --dtype bf16.")
        return kept.numpy()
    return quantize(tensor.float().numpy(), kind)  # F32: as it is


def stored_bytes(shape: list[int], kind: Kind) -> int:
    """Bytes of a tensor in the file.

    Raises:
        ValueError: rows that are no whole number of blocks.
    """
    block_weights, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block_weights:
        raise ValueError(f"{kind.name} takes rows of {block_weights} weights or a multiple of it, not of {shape[-1]}.")
    return int(np.prod(shape)) // block_weights * block_bytes


@dataclass(frozen=True)
class Streamed:
    """What GGUFWriter asks of a tensor (its length, and to be written), one piece in memory at a time."""

    nbytes: int
    pieces: Iterator[np.ndarray]

    def tofile(self, file: BinaryIO) -> None:
        """Write the pieces one after the other."""
        written = 0
        for piece in self.pieces:
            piece.tofile(file)
            written += piece.nbytes
        assert written == self.nbytes


def convert(folder: Path, out: Path, dtype: str = "f16", experts: str | None = None) -> None:
    """Write `out`; it gets its name only when it is whole.

    Args:
        dtype: of the dense weights, a key of DENSE.
        experts: of the experts, a key of EXPERTS; None: as the dense weights.
    Raises:
        ValueError: another architecture, a weight that F16 cannot hold, rows that a quantisation cannot divide, or too
            little room on the disk.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen3_moe":
        raise ValueError(f"{folder} is {config['model_type']}; only qwen3_moe is written here.")
    dense_kind, expert_kind = DENSE[dtype], EXPERTS[experts or dtype]
    checkpoint = Checkpoint(folder)
    unfinished = out.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "qwen3moe")
    add_settings(writer, config, expert_kind)
    add_tokenizer(writer, folder, config["vocab_size"])
    plan = []
    for target, names in parts(config):
        shape = checkpoint.shape(names[0])
        kind = kind_of(target, len(shape), dense_kind, expert_kind)
        if len(names) > 1:
            shape = [len(names), *shape]
        nbytes = stored_bytes(shape, kind)
        writer.add_tensor_info(target, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)  # raw_dtype is what counts
        plan.append((names, kind, nbytes))
    needed = sum(nbytes for _, _, nbytes in plan)
    if shutil.disk_usage(out.parent).free < needed * 1.02:
        raise ValueError(f"{out.name} takes {needed / 1e9:.1f} GB, more than is free there. Choose another place.")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (names, kind, nbytes) in enumerate(plan, start=1):
        pieces = (encode(checkpoint.read(name), kind) for name in names)
        writer.write_tensor_data(Streamed(nbytes, pieces))  # type: ignore[arg-type]
        print(f"\r{number}/{len(plan)} tensors of {needed / 1e9:.2f} GB", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    writer.close()
    unfinished.rename(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=sorted(DENSE), default="f16")
    parser.add_argument("--experts", choices=sorted(EXPERTS), help="of the experts alone; as --dtype when left out")
    args = parser.parse_args()
    try:
        convert(args.checkpoint, args.out, args.dtype, args.experts)
    except ValueError as error:
        sys.exit(str(error))
    facts = {"bytes": args.out.stat().st_size, "dtype": args.dtype, "experts": args.experts or args.dtype}
    print(json.dumps({"file": str(args.out), **facts}))


if __name__ == "__main__":
    main()
