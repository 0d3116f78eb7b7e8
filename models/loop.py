"""The training loop: processes that share one flat parameter buffer, a schedule that can be cut anywhere, checkpoints.

One process per core, each with a single torch thread: small matrices gain little from two threads, and a busy machine
then delays a step instead of every operation. A step's rows are cut into parts, and its update into slots; each
process takes the next part that nobody has, so a process that gets less of its core does less. They meet at two
barriers per step and sleep there: stopping (SIGSTOP) any of them pauses all without harm.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor
from transformers import PreTrainedModel

from models import attention, experts
from models.families import Recipe
from models.objectives import NextToken, Objective
from models.optim import FlatOptimizer, layout
from models.seq2seq import training
from models.seq2seq.objective import Denoising

LOG_EVERY, EVALUATE_EVERY, SAVE_EVERY = 20, 200, 100


@dataclass
class Shared:
    """What the processes share: fp32 parameters and optimiser state [elements], the bf16 weights that the models
    compute with [elements], bf16 gradients [ranks, elements], expert counts [ranks, layers, experts], the correction
    biases [layers, experts], losses [parts, 2]."""

    params: Tensor
    weights: Tensor
    grads: Tensor
    first: Tensor
    second: Tensor
    counts: Tensor
    biases: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Span:
    """Which steps to run: from `start` to `stop`, the rate falling to zero over the steps after `decay_from`."""

    start: int
    stop: int
    decay_from: int | None


def build(recipe: Recipe) -> PreTrainedModel:
    """A freshly initialised fp32 model of the recipe, with the training experts forward; the seed fixes it."""
    experts.register()
    attention.register()
    torch.manual_seed(recipe.seed)
    config = recipe.config()
    if config.is_encoder_decoder:
        return training.build(config)
    config._experts_implementation = experts.IMPLEMENTATION
    return recipe.model_class._from_config(config, attn_implementation=attention.IMPLEMENTATION)


def objective_of(recipe: Recipe, work: Path, model: PreTrainedModel) -> Objective:
    """What a step of the recipe scores."""
    return (Denoising if model.config.is_encoder_decoder else NextToken)(recipe, work, model)


def learning_rate(recipe: Recipe, span: Span, step: int) -> float:
    """Warm-up, stable, then a fall to zero as 1 - sqrt(progress) from `span.decay_from` on."""
    rate = recipe.lr * min(1.0, (step + 1) / recipe.warmup_steps)
    if span.decay_from is not None and step >= span.decay_from:
        rate *= 1 - ((step - span.decay_from) / (span.stop - span.decay_from)) ** 0.5
    return rate


def allocate(recipe: Recipe, num_ranks: int) -> Shared:
    """Shared buffers, initialised from the recipe's fresh model."""
    model = build(recipe)
    slots = layout(model)
    size = slots[-1].stop
    routers = experts.routers_of(model)
    width = routers[0].num_experts if routers else 0

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype).share_memory_()

    shared = Shared(
        params=zeros(size),
        weights=zeros(size, dtype=torch.bfloat16),
        grads=zeros(num_ranks, size, dtype=torch.bfloat16),
        first=zeros(size),
        second=zeros(size),
        counts=zeros(num_ranks, len(routers), width),
        biases=zeros(len(routers), width),
        losses=zeros(recipe.parts, 2),
    )
    for slot, parameter in zip(slots, model.parameters(), strict=True):
        shared.params[slot.start : slot.stop] = parameter.detach().reshape(-1)
    shared.weights.copy_(shared.params)
    return shared


def attach(model: PreTrainedModel, shared: Shared, rank: int) -> None:
    """Make the model's parameters, gradients and correction biases views of the shared buffers."""
    for slot, parameter in zip(layout(model), model.parameters(), strict=True):
        parameter.data = shared.weights[slot.start : slot.stop].view(slot.shape)
        parameter.grad = shared.grads[rank, slot.start : slot.stop].view(slot.shape)
    for layer, router in enumerate(experts.routers_of(model)):
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias = shared.biases[layer]


class Tickets:
    """Numbers that processes draw, each number once."""

    def __init__(self, context: Any, num_done: int, per_step: int) -> None:
        self.next = context.Value("q", num_done * per_step)
        self.per_step = per_step

    def draw(self, step: int) -> Iterator[int]:
        """Numbers 0..per_step-1 of this step that no other process has drawn."""
        while True:
            with self.next.get_lock():
                number = self.next.value
                if number >= (step + 1) * self.per_step:
                    return
                self.next.value += 1
            yield number - step * self.per_step


@dataclass(frozen=True)
class Crew:
    """How the processes share a step: parts of the batch, slots of the update, and where they meet."""

    parts: Tickets
    slots: Tickets
    barrier: Any


class Trainer:
    """One process of the training."""

    def __init__(self, recipe: Recipe, work: Path, shared: Shared, rank: int, crew: Crew) -> None:
        torch.set_num_threads(1)
        self.recipe, self.shared, self.rank, self.crew = recipe, shared, rank, crew
        self.model = build(recipe)
        attach(self.model, shared, rank)
        self.tap = experts.RouterTap(self.model)
        self.objective = objective_of(recipe, work, self.model)
        self.slots = layout(self.model)
        self.slots.sort(key=lambda slot: -slot.shape.numel() * (4 if slot.muon else 1))
        self.optimizer = FlatOptimizer(shared)

    def step(self, step: int, lr: float) -> None:
        """Gradients of the parts that this process draws, meet, update the slots that it draws, meet."""
        recipe, shared = self.recipe, self.shared
        shared.grads[self.rank].zero_()
        shared.counts[self.rank].zero_()
        for part in self.crew.parts.draw(step):
            self._gradients(step, part)
        self.crew.barrier.wait()
        for number in self.crew.slots.draw(step):
            self.optimizer.update(self.slots[number], recipe.parts, step, lr)
        if self.rank == 0 and recipe.bias_rate:
            counts = shared.counts.sum(0)
            shared.biases += recipe.bias_rate * torch.sign(counts.mean(1, keepdim=True) - counts)
        self.crew.barrier.wait()

    def _gradients(self, step: int, part: int) -> None:
        self.tap.clear()
        loss = self.objective.loss(step, part)
        balance = self.tap.balance_loss(self.recipe.bias_rate > 0, self.recipe.unit_logits)
        (loss + self.recipe.balance * balance).backward()
        self.shared.counts[self.rank] += self.tap.counts()
        self.shared.losses[part] = torch.tensor([loss.item(), balance.item()])


def save(path: Path, shared: Shared, step: int, history: list[dict[str, float]]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one."""
    state = {name: getattr(shared, name) for name in ("params", "first", "second", "biases")}
    torch.save({**state, "step": step, "history": history}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def restore(path: Path, shared: Shared) -> tuple[int, list[dict[str, float]]]:
    """Load a checkpoint into the shared buffers; returns the next step and the history so far."""
    state = torch.load(path, weights_only=True)
    for name in ("params", "first", "second", "biases"):
        getattr(shared, name).copy_(state[name])
    shared.weights.copy_(shared.params)
    return state["step"], state["history"]


def _report(
    trainer: Trainer, step: int, lr: float, seconds: float, losses: list[Tensor], before: float
) -> dict[str, float]:
    shared, recipe = trainer.shared, trainer.recipe
    counts = shared.counts.sum(0)
    loss, balance = torch.stack(losses).mean((0, 1)).tolist()
    tokens = before + len(losses) * recipe.rows * recipe.seq_len * recipe.parts
    entry = {"step": step + 1, "tokens": tokens, "loss": loss, "lr": lr, "seconds": seconds}
    if len(counts):
        entry["balance"], entry["worst_load"] = balance, (counts.max(1).values / counts.mean(1)).max().item()
    return entry


def _run_rank(
    rank: int, recipe: Recipe, work: Path, out: Path, shared: Shared, span: Span, history: list[dict[str, float]],
    crew: Crew,
) -> None:  # fmt: skip
    trainer = Trainer(recipe, work, shared, rank, crew)
    seconds = history[-1]["seconds"] if history else 0.0
    losses: list[Tensor] = []
    for step in range(span.start, span.stop):
        began = time.perf_counter()
        lr = learning_rate(recipe, span, step)
        trainer.step(step, lr)
        if rank:
            continue
        seconds += time.perf_counter() - began
        losses.append(shared.losses.clone())
        last = step + 1 == span.stop
        if last or (step + 1) % LOG_EVERY == 0:
            before = history[-1]["tokens"] if history else 0.0
            entry = _report(trainer, step, lr, seconds, losses, before)
            losses.clear()
            if last or (step + 1) % EVALUATE_EVERY == 0:
                entry["bits_per_char"] = trainer.objective.held_out_bits()
            history.append(entry)
            print(json.dumps({key: round(value, 4) for key, value in entry.items()}), flush=True)
        if last or (step + 1) % SAVE_EVERY == 0:
            save(out, shared, step + 1, history)


def run(recipe: Recipe, work: Path, out: Path, span: Span, resume: Path | None, num_ranks: int = 2) -> None:
    """Train over `span`, from `resume` when given, leaving the checkpoint and its history in `out`."""
    shared = allocate(recipe, num_ranks)
    history: list[dict[str, float]] = []
    if resume is not None:
        start, history = restore(resume, shared)
        span = Span(start, span.stop, span.decay_from)
    context = mp.get_context("spawn")
    crew = Crew(
        parts=Tickets(context, span.start, recipe.parts),
        slots=Tickets(context, span.start, len(layout(build(recipe)))),
        barrier=context.Barrier(num_ranks),
    )
    arguments = (recipe, work, out, shared, span, history, crew)
    others = [context.Process(target=_run_rank, args=(rank, *arguments), daemon=True) for rank in range(1, num_ranks)]
    for process in others:
        process.start()
    _run_rank(0, *arguments)
    for process in others:
        process.join()
