"""One family at a time: a tiny model saved, loaded by transformers and by foreroute, and what both say compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

import foreroute
from tests.families.installed import Family
from tests.families.shrink import TOP_K, tiny_config

PROMPT = torch.arange(1, 13)[None] * 7
NEW_TOKENS = 12


@dataclass(frozen=True)
class Answer:
    """Token ids [1, positions] and the logits [1, vocabulary] of each new token."""

    tokens: torch.Tensor
    logits: tuple[torch.Tensor, ...]


def auto_class(family: Family) -> Any:
    """transformers' Auto class for the family."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if family.is_causal else AutoModelForImageTextToText


def save_tiny(family: Family, folder: Path, config: Any = None) -> Path:
    """A checkpoint of random weights: large enough that routes vary, small enough that logits stay finite.

    Args:
        config: of the model; the family's tiny one if None.
    """
    torch.manual_seed(0)
    config = tiny_config(family.model_type) if config is None else config
    model = auto_class(family).from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    biases = ((name, b) for name, b in model.named_buffers() if "bias" in name and b.is_floating_point())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *biases]:
            # State space parameters stay as they were made: others make states that grow.
            if tensor.ndim == 1 and ("A_log" in name or "dt_" in name):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1 and "bias" not in name and "sinks" not in name:
                tensor.copy_(1 + 0.1 * noise)
            else:
                tensor.copy_(
                    noise * (0.5 if "embed" in name or "router_mlp" in name else 0.2 if ".experts." in name else 0.1)
                )
        for name, table in model.named_buffers():
            if "tid2eid" in name:  # experts by token id, all of them 0 as made
                order = torch.rand(table.shape[0], model.config.num_local_experts, generator=generator).argsort(-1)
                table.copy_(order[:, : table.shape[1]])
                table[::2, 1] = table[::2, 0]  # a token may name an expert twice
    model.save_pretrained(folder)
    return folder


def resident_answer(family: Family, folder: Path) -> Answer:
    """What transformers says, with all experts in memory.

    Experts stored fused are views into the file there, and products on unaligned memory may round otherwise: they are
    copied to memory of their own, aligned as ours are.
    """
    model = auto_class(family).from_pretrained(folder, experts_implementation="eager", dtype="auto").eval()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data.clone()
    return answer(model)


def answer(model: Any) -> Answer:
    """Greedy tokens after the prompt, with their logits."""
    made = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return Answer(made.sequences, made.logits)


def load_tight(folder: Path) -> Any:
    """The model with little more than the slots that one token demands, so that experts come and go."""
    config = AutoConfig.from_pretrained(folder).get_text_config()
    share = 20 * getattr(config, "num_experts_per_tok", TOP_K)
    return foreroute.load(folder, f"{share}%", config=foreroute.EngineConfig(governor=False))


def assert_same(ours: Answer, theirs: Answer) -> None:
    """The same tokens, and the same bits in all logits."""
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    for step, (left, right) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        assert torch.isfinite(right).all(), f"the reference's logits of step {step} are not numbers"
        assert left.dtype == right.dtype == torch.float32
        differing = int((left.contiguous().view(torch.int32) != right.contiguous().view(torch.int32)).sum())
        worst = float((left - right).abs().max())
        assert differing == 0, f"step {step}: {differing} of {left.numel()} logits differ, by up to {worst:.3g}"
