"""Tiny encoder-decoders, and what they write: random weights, every other block sparse, experts that overflow."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NEW_TOKENS = 12
NUM_SENTINELS = 8
# Bytes, padding, a start and an end, and the sentinels.
PAD, END = 256, 258
FIRST_SENTINEL = 259
VOCAB_SIZE = 272
PROMPT = torch.tensor([[*range(70, 118, 2), END]])
# Of three lengths, padded on the right as T5's tokenizers pad.
ROWS = torch.full((3, 20), PAD)
for _row, _length in enumerate((6, 20, 13)):
    ROWS[_row, :_length] = torch.randint(0, 256, (_length,), generator=torch.Generator().manual_seed(_row))
MASK = (ROWS != PAD).long()


@dataclass(frozen=True)
class Written:
    """Token ids [rows, positions] and the logits [rows, vocabulary] of each new one."""

    tokens: torch.Tensor
    logits: tuple[torch.Tensor, ...]


def switch_config(**changes: Any) -> Any:
    """A Switch Transformers of six blocks on each side, 8 experts in every other one; an expert takes 4 tokens."""
    from transformers import SwitchTransformersConfig

    told: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 6,
        "num_decoder_layers": 6,
        "num_sparse_encoder_layers": 3,
        "num_sparse_decoder_layers": 3,
        "num_experts": 8,
        "expert_capacity": 4,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "decoder_start_token_id": PAD,
    }
    return SwitchTransformersConfig(**{**told, **changes})


def nllb_config(**changes: Any) -> Any:
    """An NLLB-MoE of four blocks on each side, 8 experts in every other one, some of whose tokens overflow."""
    from transformers import NllbMoeConfig

    told: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 64,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_experts": 8,
        "moe_eval_capacity_token_fraction": 0.5,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "bos_token_id": 257,
        "decoder_start_token_id": END,
        "tie_word_embeddings": False,
    }
    return NllbMoeConfig(**{**told, **changes})


CONFIGS: dict[str, Callable[..., Any]] = {"switch_transformers": switch_config, "nllb-moe": nllb_config}


def save_seq2seq(config: Any, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A checkpoint of random weights with a tokenizer of bytes and sentinels."""
    from transformers import AutoModelForSeq2SeqLM

    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(1 + 0.1 * noise if "weight" in name else 0.1 * noise)
            else:
                tensor.copy_(noise * (1.0 if "shared" in name or "embed" in name or "lm_head" in name else 0.2))
    model.to(dtype).save_pretrained(folder)
    save_sentinel_tokenizer(folder)
    return folder


def save_sentinel_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes that ends each text, with sentinels behind its special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<bos>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: at for at, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.add_special_tokens(
        [AddedToken(f"<extra_id_{at}>", special=True, normalized=False) for at in range(NUM_SENTINELS)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="</s>",
        extra_special_tokens=[f"<extra_id_{at}>" for at in range(NUM_SENTINELS)],
    )
    assert wrapped.convert_tokens_to_ids(["<pad>", "</s>", "<extra_id_0>"]) == [PAD, END, FIRST_SENTINEL]
    wrapped.save_pretrained(folder)


def write(model: Any, ids: torch.Tensor = PROMPT, mask: torch.Tensor | None = None, **options: Any) -> Written:
    """What the model writes greedily past any end, or as `options` say."""
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        output_logits=True,
        return_dict_in_generate=True,
        **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1, "eos_token_id": None, **options},
    )
    return Written(made.sequences, made.logits)


def assert_same_writing(ours: Written, theirs: Written) -> None:
    """The same tokens, and the same bits in all logits."""
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert len(ours.logits) == len(theirs.logits)
    for step, (left, right) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        assert_same_tensor(left, right, f"the logits of step {step}")


def assert_same_tensor(left: torch.Tensor, right: torch.Tensor, what: str) -> None:
    """The same bits: -0.0 is not 0.0 here."""
    assert left.dtype == right.dtype == torch.float32
    assert torch.isfinite(right).all(), f"{what}: the reference is not finite"
    differing = int((left.contiguous().view(torch.int32) != right.contiguous().view(torch.int32)).sum())
    worst = float((left - right).abs().max())
    assert differing == 0, f"{what}: {differing} of {left.numel()} numbers differ, by up to {worst:.3g}"


def routed_nllb(block: Any, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
    """NLLB-MoE's block as its router chooses: transformers' eager loop over ids, where 5.24 gives a mask."""
    rows, positions, width = hidden_states.shape
    hidden = hidden_states.view(-1, width)
    _, gates, _ = block.router(hidden, padding_mask)
    weights, ids = gates.topk(2)
    total = torch.zeros_like(hidden)
    for number in range(block.num_experts):
        at, tokens = torch.where(((ids == number) & (weights != 0)).t())
        if len(tokens):
            outputs = block.experts[f"expert_{number}"](hidden[tokens]) * weights[tokens, at, None]
            outputs *= 1 - block.experts.moe_token_dropout
            total.index_add_(0, tokens, outputs)
    return total.view(rows, positions, width)


def resident(folder: Path) -> Any:
    """transformers' own model with every expert in memory; NLLB-MoE's with its blocks mended.

    Experts are copied to memory of their own, aligned as ours are: as loaded they may be views into a file, and
    products on unaligned memory may round otherwise.
    """
    from transformers import AutoModelForSeq2SeqLM
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="auto").eval()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data.clone()
    for module in model.modules():
        if isinstance(module, NllbMoeSparseMLP):
            module.forward = routed_nllb.__get__(module)
    return model
