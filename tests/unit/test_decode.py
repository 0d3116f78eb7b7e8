"""One token or several: experts computed and vectors that stand in are summed alike, in ascending order."""

import pytest
import torch

from foreroute.engine.decode import RowsStep, TokenStep, is_distinct
from foreroute.kernels.cpu import ExpertMath, OneToken, gate_rows

HIDDEN, INNER = 6, 10


def expert(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HIDDEN, INNER, generator=generator), torch.randn(INNER, HIDDEN, generator=generator)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_vectors_stand_in_with_their_tokens_gate_weights(num_tokens: int) -> None:
    math = ExpertMath(torch.relu, 0, 1, is_transposed=True)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    routed = [[4, 7], [7, 2], [2, 4]][:num_tokens]
    weights = torch.rand(num_tokens, 2, generator=generator)
    vectors = torch.randn(8, HIDDEN, generator=generator)
    keys = sorted({key for row in routed for key in row})
    absent = [7]
    if num_tokens == 1:
        step = TokenStep(OneToken(2, INNER, HIDDEN, torch.float32), math, expert, hidden, routed[0], weights)
    else:
        step = RowsStep(math, expert, hidden, routed, weights)
    step.stand_in(absent, vectors[absent])
    step.run([key for key in keys if key not in absent])
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
