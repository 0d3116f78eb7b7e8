"""Write GGUF files at the shapes and block types of models that people download, with random weights.

    python -m benchmarks.published_files qwen3 build/qwen3-q4_k_m.gguf            # Qwen3-30B-A3B, Q4_K_M: 18.6 GB
    python -m benchmarks.published_files gpt-oss build/gpt-oss-mxfp4.gguf         # gpt-oss-20b, MXFP4: 12.1 GB
    python -m benchmarks.published_files qwen3 build/small.gguf --layers 4 --vocabulary 8192

They measure mechanics: bytes, kernels, overhead. What a model routes to, and so hit rates, they do not; but how much a
token's experts have in common with those of the token before decides what a cache is worth, so that it is set: what
layers add to the residual stream is halved, which makes it 24 % of Qwen3's eight (trained models: 18 to 43 %; with
weights of the usual spread it grows with depth to 75 %). Blocks come from a stock of normal weights of each width,
quantised once by ggml and cut at random places.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from benchmarks.to_gguf import add_tokenizer
from foreroute.kernels.ggml.library import open_library

TOKENIZER = Path(__file__).parents[1] / "models" / "foreroute-tiny"
STOCK_WEIGHTS = 2**24
# Of the usual spread of matrices that write to the residual stream.
ADDED_SPREAD = 0.5
RANDOM = np.random.default_rng(11)
Kind = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Shape:
    """A published model. head_type and embedding_type: of the output and of the token embedding."""

    architecture: str
    layers: int
    vocabulary: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_width: int
    attention_type: str
    head_type: str
    embedding_type: str


SHAPES = {
    "qwen3": Shape("qwen3moe", 48, 151936, 2048, 768, 128, 8, 32, 4, 128, "Q4_K", "Q6_K", "Q4_K"),
    "gpt-oss": Shape("gpt-oss", 24, 201088, 2880, 2880, 32, 4, 64, 8, 64, "Q8_0", "Q8_0", "Q8_0"),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file: its type, its shape from the outermost, and its numbers' spread.

    Without one, floats are ones, and blocks have the spread that keeps the norm of what they are multiplied by.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    spread: float | None = None

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        weights, nbytes = gguf.GGML_QUANT_SIZES[Kind[self.kind]]
        return int(np.prod(self.shape)) // weights * nbytes


def tensors(shape: Shape) -> Iterator[Tensor]:
    """Every tensor, in the order of the file."""
    hidden, width = shape.hidden, shape.heads * shape.head_width
    kv_width = shape.kv_heads * shape.head_width
    is_oss = shape.architecture == "gpt-oss"
    yield Tensor("token_embd.weight", shape.embedding_type, (shape.vocabulary, hidden), 1.0)
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        value_type = "Q6_K" if shape.attention_type == "Q4_K" else shape.attention_type
        matrices = (
            ("attn_q", shape.attention_type, (width, hidden)),
            ("attn_k", shape.attention_type, (kv_width, hidden)),
            ("attn_v", value_type, (kv_width, hidden)),
        )
        yield Tensor(block + "attn_norm.weight", "F32", (hidden,))
        for name, kind, extents in matrices:
            yield Tensor(f"{block}{name}.weight", kind, extents)
            if is_oss:
                yield Tensor(f"{block}{name}.bias", "F32", extents[:1], 0.02)
        yield Tensor(block + "attn_output.weight", shape.attention_type, (hidden, width), ADDED_SPREAD * width**-0.5)
        if is_oss:
            yield Tensor(block + "attn_output.bias", "F32", (hidden,), 0.02)
        if is_oss:
            yield Tensor(block + "attn_sinks.weight", "F32", (shape.heads,), 0.5)
            yield Tensor(block + "post_attention_norm.weight", "F32", (hidden,))
        else:
            yield Tensor(block + "attn_q_norm.weight", "F32", (shape.head_width,))
            yield Tensor(block + "attn_k_norm.weight", "F32", (shape.head_width,))
            yield Tensor(block + "ffn_norm.weight", "F32", (hidden,))
        yield Tensor(block + "ffn_gate_inp.weight", "F32", (shape.experts, hidden), hidden**-0.5)
        if is_oss:
            yield Tensor(block + "ffn_gate_inp.bias", "F32", (shape.experts,), 0.02)
        yield from _experts(shape, block, layer)
    yield Tensor("output_norm.weight", "F32", (hidden,))
    yield Tensor("output.weight", shape.head_type, (shape.vocabulary, hidden))


def _experts(shape: Shape, block: str, layer: int) -> Iterator[Tensor]:
    """Experts: MXFP4 with biases in gpt-oss; Q4_K in Qwen3, with every second layer's down in Q6_K, as in Q4_K_M."""
    is_oss = shape.architecture == "gpt-oss"
    inner, outer = (shape.experts, shape.intermediate, shape.hidden), (shape.experts, shape.hidden, shape.intermediate)
    for name, extents in (("gate", inner), ("up", inner), ("down", outer)):
        kind = "MXFP4" if is_oss else "Q6_K" if name == "down" and layer % 2 else "Q4_K"
        spread = ADDED_SPREAD * extents[-1] ** -0.5 if name == "down" else None
        yield Tensor(f"{block}ffn_{name}_exps.weight", kind, extents, spread)
        if is_oss:
            yield Tensor(f"{block}ffn_{name}_exps.bias", "F32", extents[:2], 0.02)


@lru_cache
def stock(kind: str, width: int, spread: float) -> np.ndarray:
    """Rows of `width` normal weights as blocks, one after the other: uint8."""
    library = open_library()
    block = library.types[kind]
    rows = STOCK_WEIGHTS // width
    weights = RANDOM.standard_normal((rows, width), dtype=np.float32) * np.float32(spread)
    blocks = np.empty(rows * block.row_bytes(width), dtype=np.uint8)
    library.ggml_quantize_chunk(block.number, weights.ctypes.data, blocks.ctypes.data, 0, rows, width, None)
    return blocks


class Content:
    """A tensor's bytes, made while the file is written."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.nbytes = tensor.nbytes

    def tofile(self, file: Any) -> None:
        """Write them, as numpy's arrays do."""
        tensor = self._tensor
        if tensor.kind == "F32":
            spread = tensor.spread
            size = tensor.shape
            (
                np.ones(size, np.float32)
                if spread is None
                else RANDOM.standard_normal(size, np.float32) * np.float32(spread)
            ).tofile(file)
            return
        blocks = stock(tensor.kind, tensor.shape[-1], tensor.spread or tensor.shape[-1] ** -0.5)
        row_bytes = len(blocks) // (STOCK_WEIGHTS // tensor.shape[-1])
        left = self.nbytes
        while left:
            start = int(RANDOM.integers(0, len(blocks) // row_bytes // 2)) * row_bytes
            piece = blocks[start : start + left]
            piece.tofile(file)
            left -= len(piece)


def settings(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """The metadata that llama.cpp and foreroute read."""
    is_oss = shape.architecture == "gpt-oss"
    writer.add_name(f"random {shape.architecture}")
    writer.add_block_count(shape.layers)
    writer.add_context_length(131072 if is_oss else 40960)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate if is_oss else 3 * shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_layer_norm_rms_eps(1e-5 if is_oss else 1e-6)
    writer.add_rope_freq_base(150000.0 if is_oss else 1e6)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_expert_feed_forward_length(shape.intermediate)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if is_oss:
        writer.add_sliding_window(128)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(32.0)
        writer.add_rope_scaling_orig_ctx_len(4096)


def write(shape: Shape, path: Path) -> None:
    """Write the file under a partial name, and rename it when it is whole."""
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(str(partial), shape.architecture)
    settings(writer, shape)
    add_tokenizer(writer, TOKENIZER, shape.vocabulary)
    listed = [*tensors(shape)]
    for tensor in listed:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=Kind[tensor.kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in listed:
        writer.write_tensor_data(Content(tensor))  # type: ignore[arg-type]
    writer.close()
    partial.rename(path)


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers, for a trial")
    parser.add_argument("--vocabulary", type=int, help="a smaller vocabulary, for a trial")
    args = parser.parse_args()
    facts = dict(vars(SHAPES[args.model]))
    facts |= {name: value for name in ("layers", "vocabulary") if (value := getattr(args, name))}
    write(Shape(**facts), args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
