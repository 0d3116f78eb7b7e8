"""The experts' kernels equal their reference; run by test_interpreted.py. The interpreter has no bf16."""

import itertools

import pytest
import torch

from foreroute.kernels.triton import expert_form
from foreroute.kernels.triton import experts as triton_experts
from foreroute.kernels.triton.expert_form import CLAMPED, SILU, ExpertForm, MatrixForm


def matrix(
    rows: int, cols: int, at: int, dtype: torch.dtype, *, has_bias: bool, is_transposed: bool
) -> tuple[MatrixForm, int]:
    """A form and the byte behind it."""

    def after(nbytes: int) -> int:
        return -(-nbytes // 64) * 64

    bias_at = at + after(rows * cols * dtype.itemsize)
    form = MatrixForm(rows, cols, at, bias_at if has_bias else -1, dtype, dtype, is_transposed)
    return form, bias_at + after(rows * dtype.itemsize)


def fill(form: MatrixForm, slot: torch.Tensor, generator: torch.Generator) -> None:
    """Random weights of about unit columns."""

    def put(at: int, values: torch.Tensor) -> None:
        raw = values.contiguous().view(torch.uint8).flatten()
        slot[at : at + len(raw)] = raw

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows, cols = form.rows, form.cols
    shape = (cols, rows) if form.is_transposed else (rows, cols)
    put(form.at, (normal(*shape) * cols**-0.5).to(form.dtype))
    if form.bias_at >= 0:
        put(form.bias_at, normal(rows).to(form.bias_dtype))


def case(tokens, dtype, *, gate=SILU, interleaved=False, bias=False, transposed=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, top_k, num_experts, num_slots = 96, 64, 3, 6, 8
    up, end = matrix(2 * inner, hidden, 0, dtype, has_bias=bias, is_transposed=transposed)
    down, end = matrix(hidden, inner, end, dtype, has_bias=bias, is_transposed=transposed)
    form = ExpertForm(up, down, interleaved, gate, limit=0.7 if gate == CLAMPED else 7.0)
    pool = torch.full((num_slots, end), 255, dtype=torch.uint8)
    slot_of = torch.randperm(num_slots, generator=generator)[:num_experts].int()
    for slot in slot_of.tolist():
        fill(up, pool[slot], generator)
        fill(down, pool[slot], generator)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(tokens)])
    slots = slot_of[ids]
    slots[torch.rand(tokens, top_k, generator=generator) < 0.2] = -1
    weights = torch.rand(tokens, top_k, generator=generator).to(dtype)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return form, x, ids, slots, weights, pool


def assert_alike(args) -> None:
    expected = expert_form.experts(*args)
    found = triton_experts.experts(*args)
    assert expected.float().abs().max() > 0.05
    # fp16: rounded in the same places, so that they differ by a rounding now and then.
    worst = 2e-5 if found.dtype == torch.float32 else 1e-2
    assert (found - expected).float().abs().max() <= worst * max(1.0, float(expected.float().abs().max()))


@pytest.mark.parametrize("tokens", [1, 3])
def test_every_record(tokens: int) -> None:
    for seed, dtype in enumerate((torch.float32, torch.float16)):
        assert_alike(case(tokens, dtype, seed=seed))


@pytest.mark.parametrize(("gate", "interleaved", "bias", "transposed"), [
    *itertools.product([SILU, CLAMPED], [False, True], [True], [False, True]), (SILU, False, False, True),
])  # fmt: skip
def test_every_gate(gate: int, interleaved: bool, bias: bool, transposed: bool) -> None:
    shape = {"gate": gate, "interleaved": interleaved, "bias": bias, "transposed": transposed}
    assert_alike(case(2, torch.float32, **shape, seed=7))
    assert_alike(case(1, torch.float32, **shape, seed=8))


def test_more_tokens_than_a_block() -> None:
    assert_alike(case(21, torch.float32, seed=3))


def test_the_sum_is_rounded_after_each_expert_in_ascending_order() -> None:
    """As transformers' eager does; other orders give other bits, of which some must show here."""
    form, x, ids, slots, weights, pool = case(8, torch.float16, seed=5)
    form32 = case(8, torch.float32, seed=5)[0]
    assert form32.up.rows == form.up.rows
    found = triton_experts.experts(form, x, ids, slots, weights, pool)
    shuffled = [t.flip(1) for t in (ids, slots, weights)]
    assert torch.equal(found, triton_experts.experts(form, x, *shuffled, pool))
