"""The training-only code computes what transformers computes, balances what collapses, and resumes where it stopped."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import attention, experts, loop, optim
from models.families import RECIPES, SMOKE, Recipe, recipe_of
from models.train import SMOKE_BITS


def gradients(recipe: Recipe, fast: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model = loop.build(recipe)
    generator = torch.Generator().manual_seed(1)
    for router in experts.routers_of(model):
        router.weight.data.normal_(0, 0.5, generator=generator)
    if not fast:
        model.set_attn_implementation("eager")
        model.config._experts_implementation = "eager"
    ids = torch.randint(5, 1000, (2, 150), generator=generator)
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"foreroute-tiny-switch"}))  # its own: test_seq2seq.py
def test_fast_experts_and_attention_have_the_gradients_of_transformers_own(name: str) -> None:
    fast_loss, fast = gradients(RECIPES[name], fast=True)
    loss, plain = gradients(RECIPES[name], fast=False)
    assert fast_loss == pytest.approx(loss, abs=2e-3)
    assert fast.keys() == plain.keys()
    for parameter, grad in plain.items():
        # bf16 rounding flips a few choices of experts; a wrong formula shows as a cosine far from 1.
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), fast[parameter].flatten(), dim=0)
        assert cosine > 0.95, parameter


def test_attention_is_causal() -> None:
    query = torch.randn(1, 2, 300, 16)
    before, _ = attention.blocked_attention(torch.nn.Identity(), query, query, query, None, 0.25)
    query[:, :, 200:] = 0
    after, _ = attention.blocked_attention(torch.nn.Identity(), query, query, query, None, 0.25)
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


def test_balance_loss_sees_one_collapsed_layer_that_sums_over_layers_would_hide() -> None:
    tap = experts.RouterTap(torch.nn.Identity())
    even = torch.arange(64).view(32, 2) % 8
    collapsed = torch.tensor([[0, 1]]).expand(32, 2)
    other = torch.tensor([[2, 3], [4, 5], [6, 7]]).repeat(11, 1)[:32]
    level = torch.zeros(32, 8)

    def loss(*layers: tuple[torch.Tensor, torch.Tensor]) -> float:
        tap.logits, tap.ids = [logits for logits, _ in layers], [ids for _, ids in layers]
        return tap.balance_loss(sigmoid=False).item()

    assert loss((level, even), (level, even)) == pytest.approx(1.0)
    sharp = torch.full((32, 8), -5.0)
    first, second = sharp.clone(), sharp.clone()
    first[:, :2], second[:, 2:] = 5.0, 5.0
    assert loss((first, collapsed), (second, other)) > 2.0


def test_balance_loss_of_unit_logits_sees_a_collapse_that_small_logits_hide() -> None:
    tap = experts.RouterTap(torch.nn.Identity())
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) + torch.eye(8)[0]
    for scale in (1.0, 1e-3):
        tap.logits, tap.ids = [scale * logits], [(scale * logits).argmax(-1, keepdim=True)]
        assert tap.balance_loss(sigmoid=False, unit_logits=True).item() > 1.2
    assert tap.balance_loss(sigmoid=False).item() == pytest.approx(1.0, abs=0.01)


def test_orthogonalise_brings_singular_values_near_one_and_keeps_the_direction() -> None:
    matrices = torch.randn(3, 64, 24)
    found = optim.orthogonalise(matrices).float()
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.5
    assert singular.max() < 1.4
    assert (found * matrices).sum() > 0


def test_rate_warms_up_stays_and_falls_to_zero() -> None:
    span = loop.Span(0, 200, 150)
    rates = [loop.learning_rate(SMOKE, span, step) for step in range(200)]
    assert rates[0] < rates[SMOKE.warmup_steps - 1] == SMOKE.lr
    assert set(rates[SMOKE.warmup_steps : 150]) == {SMOKE.lr}
    assert rates[150:] == sorted(rates[150:], reverse=True)
    assert rates[-1] < 0.02 * SMOKE.lr
    assert loop.learning_rate(SMOKE, loop.Span(0, 200, None), 199) == SMOKE.lr


def test_tickets_are_drawn_once_and_start_where_a_resumed_run_left_off() -> None:
    context = torch.multiprocessing.get_context("spawn")
    tickets = loop.Tickets(context, num_done=7, per_step=3)
    first = tickets.draw(7)
    assert next(first) == 0
    assert list(tickets.draw(7)) == [1, 2]
    assert list(first) == []
    assert list(tickets.draw(8)) == [0, 1, 2]


def test_only_who_asked_listens_to_the_routers() -> None:
    # A forgotten listener keeps the graph of every step: 35 MB per step, until the machine swaps.
    shared = loop.allocate(SMOKE, num_ranks=1)
    model = loop.build(SMOKE)
    loop.attach(model, shared, rank=0)
    tap = experts.RouterTap(model)
    assert [len(router._forward_hooks) for router in experts.routers_of(model)] == [1, 1]
    tap.close()
    model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    assert tap.ids == []


def test_a_checkpoint_restores_what_was_saved(tmp_path: Path) -> None:
    shared = loop.allocate(SMOKE, num_ranks=1)
    shared.params.uniform_()
    shared.first.uniform_()
    loop.save(tmp_path / "one.pt", shared, 12, [{"step": 12.0}])
    again = loop.allocate(SMOKE, num_ranks=1)
    assert loop.restore(tmp_path / "one.pt", again) == (12, [{"step": 12.0}])
    assert torch.equal(again.params, shared.params)
    assert torch.equal(again.first, shared.first)
    assert torch.equal(again.weights, shared.params.bfloat16())
    assert [path.name for path in tmp_path.iterdir()] == ["one.pt"]


def test_another_seed_is_the_same_recipe_under_another_name() -> None:
    first, other = RECIPES["foreroute-tiny-oss"], recipe_of("foreroute-tiny-oss-seed1")
    assert (other.name, other.seed) == ("foreroute-tiny-oss-seed1", 1)
    assert replace(other, name=first.name, seed=first.seed) == first == recipe_of(first.name)
    weights = [next(loop.build(recipe).parameters()) for recipe in (first, other)]
    assert not torch.equal(*weights)


def test_the_smoke_run_learns() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "models/train.py", "--smoke"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"(\S+): held-out bits/char ([\d.]+) -> ([\d.]+)", done.stdout)
    assert [name for name, _, _ in told] == ["smoke", "smoke-draft", "smoke-switch"]
    assert all(float(before) - float(after) >= SMOKE_BITS for _, before, after in told)
