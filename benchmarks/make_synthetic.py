"""Write a synthetic Qwen3-MoE checkpoint with the expert shape of Qwen3-30B-A3B, as a published one would lie on disk.

    python -m benchmarks.make_synthetic --out build/synth

By default 8 layers x 64 experts, 4.8 GB of experts in bf16, 5.2 GB in all: too large for a small budget, small enough
for every peer. Weights are random and seeded by their name: the same options give the same bytes. They measure
mechanics (reads, copies, overheads) and say nothing about the hit rate of a trained model.

Random attention adds nearly the same to every token, until in deep layers all are alike: with 16 layers of 128 experts,
200 tokens of a text never route to half the experts of the last layers, and the model is smaller than it looks. With
--attention-gain 0.6 the tokens stay apart, and LRU misses about as often as on a trained model: .66 of the routes with
memory for 25 % of the experts and .33 with 50 % (trained: .61 and .33).

Memory stays at one tensor; shards go to OUT.partial, which is renamed at the end; a run that broke off goes on there.
"""

import argparse
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

SHARD_BYTES = 10**9
BYTES_PER_WEIGHT = 2  # bf16
END_OF_TEXT = "<|endoftext|>"

Shape = tuple[int, ...]


def tensor_shapes(args: argparse.Namespace) -> Iterator[tuple[str, Shape]]:
    """Every tensor of the checkpoint in the order in which published checkpoints have them: (name, shape)."""
    hidden, inter, heads, kv_heads, head_dim = args.hidden, args.intermediate, args.heads, args.kv_heads, args.head_dim
    yield "model.embed_tokens.weight", (args.vocab, hidden)
    for layer in range(args.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (heads * head_dim, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv_heads * head_dim, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv_heads * head_dim, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, heads * head_dim)
        yield f"{prefix}.self_attn.q_norm.weight", (head_dim,)
        yield f"{prefix}.self_attn.k_norm.weight", (head_dim,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate.weight", (args.experts, hidden)
        for expert in range(args.experts):
            yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", (inter, hidden)
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", (inter, hidden)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (hidden, inter)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (args.vocab, hidden)


def num_bytes(shape: Shape) -> int:
    """Bytes of a bf16 tensor."""
    count = BYTES_PER_WEIGHT
    for length in shape:
        count *= length
    return count


def random_weight(name: str, shape: Shape, seed: int, attention_gain: float = 1.0) -> torch.Tensor:
    """The bf16 tensor of that name: ones for norms, else normal with a spread that keeps activations near 1.

    attention_gain scales what attention adds to a token.
    """
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))  # torch keeps 32 bits of a seed
    spread = 1.0 if name.startswith("model.embed") else shape[-1] ** -0.5
    if name.endswith("self_attn.o_proj.weight"):
        spread *= attention_gain
    return torch.randn(shape, generator=generator).mul_(spread).to(torch.bfloat16)


def split_into_shards(tensors: list[tuple[str, Shape]]) -> list[list[tuple[str, Shape]]]:
    """Consecutive tensors, SHARD_BYTES at most in each shard."""
    shards: list[list[tuple[str, Shape]]] = [[]]
    shard_bytes = 0
    for name, shape in tensors:
        if shards[-1] and shard_bytes + num_bytes(shape) > SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append((name, shape))
        shard_bytes += num_bytes(shape)
    return shards


def write_shard(path: Path, tensors: list[tuple[str, Shape]], seed: int, attention_gain: float) -> None:
    """Write one safetensors file, tensor by tensor; it gets its name only when it is whole."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name, shape in tensors:
            random_weight(name, shape, seed, attention_gain).view(torch.int16).numpy().tofile(file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Train a byte-level BPE of exactly `vocab_size` tokens on Python's own manual, and save it for transformers.

    The split rule is Qwen2's, which llama.cpp knows by name.
    """
    from pydoc_data.topics import topics

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|unused_{index}|>" for index in range(missing)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(folder)


def write_config(folder: Path, args: argparse.Namespace) -> None:
    """Write config.json and generation_config.json."""
    from transformers import GenerationConfig, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate * args.top_k,
        moe_intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        eos_token_id=0,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    GenerationConfig(do_sample=False, eos_token_id=0).save_pretrained(folder)


def write_checkpoint(args: argparse.Namespace) -> Path:
    """Write the whole folder, atomically: it has its name only when it is complete. Returns it."""
    out = Path(args.out)
    wanted = {name: value for name, value in vars(args).items() if name not in ("out", "force")}
    if out.exists() and not args.force:
        sys.exit(f"{out} exists already. Remove it, or say --force to replace it.")
    partial = out.with_name(out.name + ".partial")
    spec = partial / "synthetic.json"
    if spec.exists() and json.loads(spec.read_text(encoding="utf-8")) != wanted:
        shutil.rmtree(partial)  # begun with other options: its shards are of no use
    partial.mkdir(parents=True, exist_ok=True)
    spec.write_text(json.dumps(wanted, indent=2), encoding="utf-8")

    shards = split_into_shards(list(tensor_shapes(args)))
    total_bytes = sum(num_bytes(shape) for shard in shards for _, shape in shard)
    if shutil.disk_usage(partial).free < total_bytes * 1.05:
        sys.exit(
            f"{total_bytes / 1e9:.1f} GB are needed under {partial.parent}; free some space or choose another --out."
        )
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        path = partial / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if not path.exists():
            write_shard(path, shard, args.seed, args.attention_gain)
        weight_map.update((name, path.name) for name, _ in shard)
        print(f"\r{number}/{len(shards)} shards of {total_bytes / 1e9:.2f} GB", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    write_config(partial, args)
    write_tokenizer(partial, args.vocab)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return out


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; their defaults are the checkpoint of the published tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, help="folder to write, e.g. build/synth")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768, help="of one expert")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--attention-gain", type=float, default=1.0, help="see above; less keeps tokens apart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace --out if it exists")
    return parser.parse_args(argv)


if __name__ == "__main__":
    options = parse_args()
    folder = write_checkpoint(options)
    experts_bytes = options.layers * options.experts * 3 * options.hidden * options.intermediate * BYTES_PER_WEIGHT
    all_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(json.dumps({"folder": str(folder), "total_bytes": all_bytes, "expert_bytes": experts_bytes}))
