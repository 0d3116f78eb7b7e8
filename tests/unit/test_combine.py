"""One token or several: computed experts and default vectors are summed alike, in ascending order."""

import pytest
import torch

from foreroute.kernels.torch.experts import ExpertMath, OneToken, compute_rows_apart, compute_several, gate_rows
from foreroute.kernels.torch.layer import RowsSum, TokenSum, is_distinct

HIDDEN, INNER = 6, 10


def expert(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HIDDEN, INNER, generator=generator), torch.randn(INNER, HIDDEN, generator=generator)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_default_vectors_are_weighted_by_their_tokens_gate_weights(num_tokens: int) -> None:
    math = ExpertMath(torch.relu, 0, 1, is_transposed=True)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    routed = [[4, 7], [7, 2], [2, 4]][:num_tokens]
    weights = torch.rand(num_tokens, 2, generator=generator)
    vectors = torch.randn(8, HIDDEN, generator=generator)
    keys = sorted({key for row in routed for key in row})
    absent = [7]
    if num_tokens == 1:
        token = TokenSum(OneToken(2, INNER, HIDDEN, torch.float32), math, expert)
        step: TokenSum | RowsSum = token.begin(hidden, routed[0], weights)
    else:
        step = RowsSum(math, expert, hidden, routed, weights)
    step.substitute(absent, vectors[absent])
    step.add([(key, key) for key in keys if key not in absent])
    expected = torch.zeros_like(hidden)
    for token, row in enumerate(routed):
        for at, key in enumerate(row):
            output = vectors[key] if key in absent else math(hidden[token : token + 1], expert(key))[0]
            expected[token] += weights[token, at] * output
    torch.testing.assert_close(step.total(), expected)


def interleaved(up: torch.Tensor) -> torch.Tensor:
    return up[..., 1::2] * torch.sigmoid(up[..., ::2] * 1.702)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [16, 48, 64, 2880, 11040])
@pytest.mark.parametrize("gate", [torch.nn.functional.silu, interleaved])
def test_rows_gated_together_have_the_bits_of_rows_gated_alone(gate, width: int, threads: int) -> None:
    columns = width if gate is not interleaved else 2 * width
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 2, 3, 8):
            up = 3 * torch.randn(rows, columns, generator=generator)
            together = gate_rows(gate, up)
            alone = [gate(row) for row in up.split(1)]
            assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))
    finally:
        torch.set_num_threads(before)


def test_rows_of_whole_vectors_are_gated_in_one_call() -> None:
    calls = []

    def gate(up: torch.Tensor) -> torch.Tensor:
        calls.append(up.shape)
        return up

    gate_rows(gate, torch.zeros(4, 768))
    assert calls == [(4, 768)]


@pytest.mark.parametrize(("routed", "expected"), [([3, 1], True), ([3, 3], False), ([-1, -1, 2], True)])
def test_only_experts_count_as_named_twice(routed: list[int], expected: bool) -> None:
    assert is_distinct(routed) is expected


def gated(up: torch.Tensor) -> torch.Tensor:
    gate, linear = up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * linear


def eager(math: ExpertMath, experts, hidden: torch.Tensor, routed, weights: torch.Tensor) -> torch.Tensor:
    """What transformers' eager experts do: expert after expert, rows by position and then token."""
    ids, total = torch.tensor(routed), torch.zeros_like(hidden)
    for key in sorted({key for row in routed for key in row if key >= 0}):
        position, token = torch.where(ids.t() == key)
        out = math(hidden[token], experts[key]) * weights[token, position, None]
        total.index_add_(0, token, out.to(total.dtype))
    return total


ROUTES = {
    "shared and lone experts": [[4, 7, 1], [7, 2, 4], [2, 4, 0], [5, 6, 7]],
    "slots that are no expert": [[4, -1, 1], [-1, -1, 4], [-1, -1, -1], [0, 1, 2]],
    "an expert named twice": [[4, 4, 1], [1, 2, 4], [2, 3, 4], [1, 1, 1]],
    "one expert for all": [[3], [3], [3], [3]],
}


@pytest.mark.parametrize("routed", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "inner"), [(128, 64), (48, 40), (18, 6)])
@pytest.mark.parametrize("most_at_once", [None, 2])
def test_rows_have_the_bits_of_eager_experts_in_any_order(routed, dtype, width, inner, most_at_once) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    math = ExpertMath(gated, 0, 1, 2, 3, is_transposed=True)
    experts = [(random(width, 2 * inner), random(inner, width), random(2 * inner), random(width)) for _ in range(8)]
    # Gate weights in fp32, as some routers give them to bf16 states too.
    hidden, weights = random(4, width), torch.rand(4, len(routed[0]), generator=generator)
    expected = eager(math, experts, hidden, routed, weights)
    keys = sorted({key for row in routed for key in row if key >= 0})
    for order in (keys, keys[::-1], keys[1::2] + keys[::2]):
        for at_once in (1, 3, len(keys)):
            step = RowsSum(math, experts.__getitem__, hidden, routed, weights, most_at_once)
            for first in range(0, len(order), at_once):
                step.add([(key, key) for key in order[first : first + at_once]])
            assert torch.equal(step.total(), expected)


def test_nothing_routed_is_nothing() -> None:
    math = ExpertMath(gated, 0, 1, is_transposed=True)
    step = RowsSum(math, expert, torch.ones(2, HIDDEN), [[-1, -1], [-1, -1]], torch.ones(2, 2))
    assert torch.equal(step.total(), torch.zeros(2, HIDDEN))


@pytest.mark.parametrize(("inner", "num_experts", "expected"), [(64, 3, 1), (40, 3, 3), (6144, 3, 3), (64, 1, 1)])
def test_experts_are_gated_in_one_call_where_that_is_safe(inner: int, num_experts: int, expected: int) -> None:
    calls = []

    def gate(up: torch.Tensor) -> torch.Tensor:
        calls.append(len(up))
        return gated(up)

    operands = (torch.ones(HIDDEN, 2 * inner), torch.ones(inner, HIDDEN))
    rows = [torch.ones(at + 1, HIDDEN) for at in range(num_experts)]
    outs = compute_several(ExpertMath(gate, 0, 1, is_transposed=True), rows, [operands] * num_experts)
    assert (len(calls), [len(out) for out in outs]) == (expected, [at + 1 for at in range(num_experts)])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [128, 512, 2816, 5760])
@pytest.mark.parametrize("gate", [gated, interleaved])
def test_experts_gated_together_have_the_bits_of_experts_gated_alone(gate, width: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            eye = torch.eye(width, dtype=dtype)
            rows = [(3 * torch.randn(rows, width, generator=generator)).to(dtype) for rows in (1, 2, 1, 3, 5)]
            # A gate's output is what the second product takes: with ones on the diagonal it comes out as it is.
            operands = (eye, torch.eye(width // 2, dtype=dtype))
            together = compute_several(ExpertMath(gate, 0, 1, is_transposed=True), rows, [operands] * len(rows))
            assert all(torch.equal(out, gate(some)) for out, some in zip(together, rows, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("are_alike", [True, False])
def test_no_more_rows_are_computed_together_than_were_tried(monkeypatch, are_alike: bool) -> None:
    """A batch that is verified may route more rows to an expert than the 16 whose bits were compared."""
    math, generator = ExpertMath(torch.relu, 0, 1, is_transposed=True), torch.Generator().manual_seed(2)
    experts = [[torch.randn(64, 64, generator=generator) for _ in range(2)] for _ in range(3)]
    sizes = (1, 40, 16)
    rows = [torch.randn(size, 64, generator=generator) for size in sizes]
    monkeypatch.setattr("foreroute.kernels.torch.experts._are_alike", lambda *_: are_alike)
    own, widths = ExpertMath.multiply, []

    def multiply(self, x, operands, at):
        widths.append(len(x))
        return own(self, x, operands, at)

    monkeypatch.setattr(ExpertMath, "multiply", multiply)
    outs = compute_rows_apart(math, rows, experts)
    assert max(widths) == (16 if are_alike else 1)
    assert [len(out) for out in outs] == list(sizes)
    for some, out, operands in zip(rows, outs, experts, strict=True):
        torch.testing.assert_close(out, math(some, operands), rtol=1e-3, atol=1e-3)
