"""A tiny model on disk, a tokenizer whose every byte is a token, and the command line as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' + message['content'] }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
NUM_LAYERS, NUM_EXPERTS, TOP_K, CONTEXT = 4, 16, 2, 1024


def make_tokenizer() -> Any:
    """Byte-level without a single merge: a character of n bytes is n tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_model(folder: Path) -> None:
    """Write a random Qwen3-MoE with 3 MiB of experts, which never ends by itself, and its tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(SPECIAL) + 256, hidden_size=64, intermediate_size=128, moe_intermediate_size=64,
        num_hidden_layers=NUM_LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, max_position_embeddings=CONTEXT,
        initializer_range=0.1, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


class Ran(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def start(*args: str | Path, before: str = "", **options: Any) -> subprocess.Popen[bytes]:
    """Start a command as a process of its own; `before` is Python that is run first in it."""
    script = f"{before}\nimport sys\nfrom foreroute.cli.main import main\nsys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "80"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        bufsize=0,  # a byte that was read must not take others with it
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        **options,
    )
