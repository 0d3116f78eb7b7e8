"""Check what a benchmark was asked to measure, and find every error and misfit before anything runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from foreroute.bench.run import Case
from foreroute.bench.rungs import RESIDENT, Rung
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.config import EngineConfig, Plan
from foreroute.errors import BudgetError, PromptError
from foreroute.loading.arguments import open_device
from foreroute.loading.block_kernels import dense_nbytes_at_load
from foreroute.loading.checkpoint import open_checkpoint
from foreroute.loading.load import load
from foreroute.memory.plan import choose_memory
from foreroute.model.config_file import refuse_encoder_decoder
from foreroute.types import ExpertReads
from foreroute.units import format_memory


@dataclass(frozen=True)
class Asked:
    """The measurements that a user asked for.

    memories: budgets as `load` takes them. may_drop: leave out budgets too small for the model, else raise for them.
    prompts: tokens of each, in order; new_tokens: after the first of them, 0 for none. repeats: timed runs besides one
    warm-up. config: all switches that no rung sets.
    """

    memories: tuple[str, ...]
    may_drop: bool
    prompts: tuple[int, ...]
    new_tokens: int
    batches: tuple[int, ...]
    repeats: int
    rungs: tuple[Rung, ...]
    dtype: str
    config: EngineConfig


@dataclass(frozen=True)
class Settled:
    """The measurements that will be made, after checking.

    asked: without what cannot be measured; remarks say what was left out.
    cases: the tests, in order. budgets: memory as asked -> bytes. plan: of the smallest budget.
    whole_bytes: memory that holds every expert. reads_of, label: how experts are read, by key.
    num_experts, expert_bytes: per MoE layer, the number of experts and the stored bytes of one.
    """

    folder: Path
    asked: Asked
    remarks: tuple[str, ...]
    cases: tuple[Case, ...]
    budgets: dict[str, int]
    plan: Plan
    whole_bytes: int
    vocab_size: int
    num_experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    reads_of: Callable[[int], ExpertReads]
    label: Callable[[int], str]

    @property
    def can_be_resident(self) -> bool:
        """Whether the rung that holds every expert was asked for and fits."""
        return any(rung.name == RESIDENT for rung in self.asked.rungs)

    def measured_rungs(self, memory: str) -> tuple[Rung, ...]:
        """Rungs to run at a budget, lowest first; only one where the budget holds every expert."""
        measured = tuple(rung for rung in self.asked.rungs if rung.is_measured)
        if self.budgets[memory] >= self.whole_bytes and self.can_be_resident:
            return tuple(rung for rung in measured if rung.name == RESIDENT)
        return measured

    def keys(self) -> list[int]:
        """The keys of all experts."""
        width = max(self.num_experts)
        return [layer * width + expert for layer, count in enumerate(self.num_experts) for expert in range(count)]


def settle(folder: Path, asked: Asked) -> Settled:
    """Check `asked` against the model in `folder`, which is loaded once for this, without its experts.

    Raises:
        BudgetError: a budget cannot be parsed, is too small for one token, or exceeds the machine's memory.
        PromptError: no requested test fits the model's context.
        ForerouteError: as `foreroute.load`.
    """
    checkpoint = open_checkpoint(folder, None, asked.config.packed)
    text_config = checkpoint.outline.config.get_text_config()
    refuse_encoder_decoder(
        text_config, folder, "bench feeds texts to decoders; `foreroute generate` shows its figures."
    )
    remarks: list[str] = []
    cases = _cases(asked, getattr(text_config, "max_position_embeddings", None), remarks)
    kept = checkpoint.kept
    dense_bytes = dense_nbytes_at_load(asked.config, checkpoint, open_device(asked.config))
    whole_bytes = kept.whole_bytes
    budgets = {memory: choose_memory(memory, kept, dense_bytes) for memory in asked.memories}
    if any(rung.name == RESIDENT for rung in asked.rungs):
        room = choose_memory(None, kept, dense_bytes)
        if room < whole_bytes:
            asked = replace(asked, rungs=tuple(rung for rung in asked.rungs if rung.name != RESIDENT))
            remarks.append(
                f"Fully resident is left out: all experts take {format_memory(whole_bytes)}, and there is room for "
                f"{format_memory(room)}."
            )
    plan, table = _load_once(folder, asked, budgets, remarks)
    asked = replace(asked, memories=tuple(budgets))
    return Settled(
        folder=folder,
        asked=asked,
        remarks=tuple(remarks),
        cases=cases,
        budgets=budgets,
        plan=plan,
        whole_bytes=whole_bytes,
        vocab_size=text_config.vocab_size,
        num_experts=tuple(layer.num_experts for layer in table.layers),
        expert_bytes=tuple(layer.expert_nbytes for layer in table.layers),
        reads_of=table.reads if checkpoint.store is None else checkpoint.store.reads_of(table),
        label=table.label,
    )


def _cases(asked: Asked, context: int | None, remarks: list[str]) -> tuple[Case, ...]:
    """List the prompts that fit the context; the new tokens follow the first one that leaves room for them."""
    prompts = [length for length in asked.prompts if context is None or length <= context]
    if len(prompts) < len(asked.prompts):
        longer = ", ".join(str(length) for length in asked.prompts if length not in prompts)
        remarks.append(f"Prompts of {longer} tokens are left out: the model's context holds {context}.")
    if not prompts:
        raise PromptError(f"No prompt fits the model's context of {context} tokens. Give a shorter one: -p 32.")
    followed = next((at for at in prompts if context is None or at + asked.new_tokens <= context), None)
    if asked.new_tokens and followed is None:
        raise PromptError(
            f"{min(prompts)} tokens and {asked.new_tokens} new ones are more than the model's context of {context}. "
            "Give a shorter -p or a smaller -n."
        )
    return tuple(
        Case(batch, length, asked.new_tokens if length == followed else 0)
        for batch in asked.batches
        for length in prompts
    )


def _load_once(folder: Path, asked: Asked, budgets: dict[str, int], remarks: list[str]) -> tuple[Plan, ExpertTable]:
    """Load with the smallest budget that works; drop smaller ones from `budgets` where that is allowed."""
    for memory in sorted(budgets, key=lambda name: budgets[name]):
        try:
            model = load(folder, memory, asked.dtype, config=asked.config)
        except BudgetError as error:
            if not asked.may_drop or len(budgets) == 1:
                raise
            remarks.append(f"Memory {memory} is left out: {error}")
            del budgets[memory]
            continue
        model.foreroute.close()
        return model.foreroute.plan, model.foreroute.table
    raise AssertionError("the last budget raises or loads")
