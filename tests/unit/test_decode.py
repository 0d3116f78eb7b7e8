"""One token or several: experts computed and vectors that stand in are summed alike, in ascending order."""

import pytest
import torch

from foreroute.engine.decode import RowsStep, TokenStep
from foreroute.kernels.cpu import ExpertMath, OneToken

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
