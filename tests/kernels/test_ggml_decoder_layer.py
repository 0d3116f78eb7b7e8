"""The graphs of attention and around it: torch's numbers, and bits of a row that no other row changes."""

import pytest
import torch

from foreroute.kernels.ggml.decoder.attention import TokenAttention
from foreroute.kernels.ggml.decoder.layer import AfterGraph, BeforeGraph, KeptTokens, LayerGraph
from foreroute.kernels.ggml.decoder.parts import AfterAttention, Attention, BeforeAttention, Buffers, Norm, Route
from foreroute.kernels.ggml.graph import shared_runner
from foreroute.kernels.ggml.linear import BlockMatrix
from tests.kernels.ggml_matrices import error, random_blocks, random_rows

WIDTH, SIZE, QUERIES, SHARED, EXPERTS, ROWS = 256, 32, 8, 2, 6, 5
# Activations are rounded to 8 bits in blocks.
MOST_ERROR = 0.03


def matrix(rows: int, columns: int, seed: int, name: str = "Q8_0") -> tuple[BlockMatrix, torch.Tensor]:
    blocks = random_blocks(name, rows, columns, seed=seed)
    return BlockMatrix(blocks.kind, columns, torch.from_numpy(blocks.blocks.copy())), torch.from_numpy(blocks.numbers)


def normed(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], None, norm.epsilon) * norm.weight


def angles(cosines: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [rows, cosines], which repeat where there is one for each number of a head."""
    some = random_rows(ROWS, SIZE // 2)
    return some.cos().repeat(1, 2)[:, :cosines].contiguous(), some.sin().repeat(1, 2)[:, :cosines].contiguous()


@pytest.mark.parametrize("cosines", [SIZE // 2, SIZE])
@pytest.mark.parametrize(("has_bias", "has_head_norm"), [(False, False), (True, False), (False, True), (True, True)])
def test_before_attention(has_bias: bool, has_head_norm: bool, cosines: int) -> None:
    heads = (QUERIES, SHARED, SHARED)
    made = [matrix(one * SIZE, WIDTH, seed) for seed, one in enumerate(heads)]
    norm = Norm(random_rows(1, WIDTH)[0], 1e-5)
    bias = random_rows(1, sum(heads) * SIZE)[0] * 9 if has_bias else None
    head_norm = Norm(random_rows(QUERIES + SHARED, SIZE) + 1, 1e-6) if has_head_norm else None
    (query, _), (key, _), (value, _) = made
    part = BeforeAttention(norm, (query, key, value), bias, heads, SIZE, head_norm)
    x, (cosine, sine) = random_rows(ROWS, WIDTH), angles(cosines)
    graph = BeforeGraph(shared_runner(2), part, ROWS, cosines, Buffers())
    found = graph.run(x, cosine, sine)
    product = normed(x, norm) @ torch.cat([numbers for _, numbers in made]).t()
    q, k, v = (product if bias is None else product + bias).view(ROWS, -1, SIZE).split(heads, dim=1)
    if head_norm is not None:
        q, k = normed(torch.cat((q, k), 1), head_norm).split(heads[:2], dim=1)

    def turned(states: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, -1)
        c, s = (one[:, None, : SIZE // 2] for one in (cosine, sine))
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    for ours, theirs in zip(found, (turned(q), turned(k), v), strict=True):
        assert ours.shape == (ROWS, theirs.shape[1], 1, SIZE)
        assert error(ours.reshape(ROWS, -1), theirs.reshape(ROWS, -1)) < MOST_ERROR
    alone = BeforeGraph(shared_runner(2), part, 1, cosines, Buffers())
    for at in range(ROWS):
        row = slice(at, at + 1)
        for one, among in zip(alone.run(x[row], cosine[row], sine[row]), found, strict=True):
            assert torch.equal(one, among[row])


@pytest.mark.parametrize("has_router", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_after_attention(has_bias: bool, has_router: bool) -> None:
    output, numbers = matrix(WIDTH, QUERIES * SIZE, 3)
    router, scores_of = matrix(EXPERTS, WIDTH, 4, "F32")
    norm, bias = Norm(random_rows(1, WIDTH)[0], 1e-5), random_rows(1, WIDTH)[0] if has_bias else None
    part = AfterAttention(output, bias, norm, router if has_router else None)
    attended, residual = random_rows(ROWS, QUERIES * SIZE), random_rows(ROWS, WIDTH, seed=8)
    found = AfterGraph(shared_runner(2), part, ROWS, Buffers()).run(attended, residual)
    found = [one.view(ROWS, -1) for one in found]
    stream = residual + attended @ numbers.t() + (0 if bias is None else bias)
    scores = normed(found[0], norm) @ scores_of.t() if has_router else torch.empty(ROWS, 0)
    assert error(found[0], stream) < MOST_ERROR
    assert torch.allclose(found[1], normed(found[0], norm), rtol=1e-5, atol=1e-6)
    assert torch.allclose(found[2], scores, rtol=1e-4, atol=1e-4)
    alone = AfterGraph(shared_runner(2), part, 1, Buffers())
    for at in range(ROWS):
        row = slice(at, at + 1)
        for one, among in zip(alone.run(attended[row], residual[row]), found, strict=True):
            assert torch.equal(one.view(1, -1), among[row])


@pytest.mark.parametrize("mask", [None, "added", "seen"])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, 100, 700])
def test_attention_of_a_token(tokens: int, has_sinks: bool, mask: str | None) -> None:
    query = random_rows(3 * QUERIES, SIZE).view(3, QUERIES, 1, SIZE)
    # Of a longer cache, so that heads and tokens lie apart.
    keys, values = (
        random_rows(3 * SHARED * 800, SIZE, seed=at).view(3, SHARED, 800, SIZE)[:, :, :tokens] for at in (1, 2)
    )
    sinks = random_rows(1, QUERIES)[0] if has_sinks else None
    seen = torch.ones(3, 1, 1, tokens, dtype=torch.bool)
    if mask is not None:
        seen[1, ..., : tokens // 3] = False
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    given = {None: None, "added": added, "seen": seen}[mask]
    attend = TokenAttention(shared_runner(2))
    assert attend.takes(query, keys, values)
    found = attend(query, keys, values, given, 0.3, sinks)
    scores = query.view(3, SHARED, -1, SIZE) @ keys.transpose(2, 3) * 0.3 + added
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, SHARED, -1, 1).expand(3, -1, -1, -1)), -1)
    theirs = torch.softmax(scores, -1)[..., :tokens] @ values
    assert torch.allclose(found, theirs.view(3, 1, QUERIES, SIZE), rtol=1e-4, atol=1e-5)
    alone = TokenAttention(shared_runner(1))
    for at in range(3):
        row = slice(at, at + 1)
        own = given if given is None else given[row]
        assert torch.equal(alone(query[row], keys[row], values[row], own, 0.3, sinks), found[row]), "threads, rows"


def test_other_numbers_are_left_to_torch() -> None:
    attend, query = TokenAttention(shared_runner(2)), torch.zeros(1, QUERIES, 1, SIZE)
    states = torch.zeros(1, SHARED, 600, SIZE)
    assert attend.takes(query, states, states)
    assert not attend.takes(query.bfloat16(), states, states)
    assert not attend.takes(query, states.transpose(2, 3), states.transpose(2, 3))


def test_masks_that_weigh_tokens_or_hide_all_are_left_to_torch() -> None:
    attend, query = TokenAttention(shared_runner(2)), random_rows(QUERIES, SIZE).view(1, QUERIES, 1, SIZE)
    states = random_rows(SHARED * 4, SIZE).view(1, SHARED, 4, SIZE)

    def takes(mask: torch.Tensor) -> bool:
        attend.begin_step()
        return attend.takes(query, states, states, mask.view(1, 1, 1, 4))

    least = torch.finfo(torch.float32).min
    assert takes(torch.tensor([0.0, least, -torch.inf, 0.0]))
    assert takes(torch.tensor([True, False, True, False]))
    assert not takes(torch.tensor([0.0, -0.5, 0.0, 0.0]))
    assert not takes(torch.tensor([least, least, least, least]))
    assert not takes(torch.tensor([0.0, torch.nan, 0.0, 0.0]))


def test_a_mask_that_is_changed_in_place_is_seen_in_the_next_step() -> None:
    attend, query = TokenAttention(shared_runner(2)), random_rows(QUERIES, SIZE).view(1, QUERIES, 1, SIZE)
    states = random_rows(SHARED * 4, SIZE).view(1, SHARED, 4, SIZE)
    mask = torch.tensor([True, False, False, False]).view(1, 1, 1, 4)
    first = attend(query, states, states, mask, 1.0)
    mask[..., 1] = True
    attend.begin_step()
    assert not torch.equal(first, attend(query, states, states, mask, 1.0))


@pytest.mark.parametrize("is_share_of_all", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_route_chooses_as_torch_does(has_bias: bool, is_share_of_all: bool) -> None:
    top_k, (output, _), (router, scores_of) = 3, matrix(WIDTH, QUERIES * SIZE, 3), matrix(EXPERTS, WIDTH, 4, "F32")
    bias = random_rows(1, EXPERTS)[0] if has_bias else None
    norm = Norm(random_rows(1, WIDTH)[0], 1e-5)
    part = AfterAttention(output, None, norm, router, Route(top_k, bias, is_share_of_all))
    attended, residual = random_rows(ROWS, QUERIES * SIZE), random_rows(ROWS, WIDTH, seed=8)
    found = AfterGraph(shared_runner(2), part, ROWS, Buffers()).run(attended, residual)
    scores = found.normed.view(ROWS, WIDTH) @ scores_of.t() + (0 if bias is None else bias)
    best = (scores.softmax(-1) if is_share_of_all else scores).topk(top_k)
    assert found.ids.dtype == torch.int64
    assert torch.equal(found.ids, best.indices)
    weights = best.values if is_share_of_all else best.values.softmax(-1)
    assert torch.allclose(found.weights, weights, rtol=1e-4, atol=1e-5)
    alone = AfterGraph(shared_runner(2), part, 1, Buffers())
    for at in range(ROWS):
        row = slice(at, at + 1)
        one = alone.run(attended[row], residual[row])
        assert torch.equal(one.ids, found.ids[row])
        assert torch.equal(one.weights, found.weights[row])


@pytest.mark.parametrize("tokens", [0, 1, 40, 700])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_layer_in_one_graph_has_the_bits_of_its_parts(has_sinks: bool, tokens: int) -> None:
    runner, buffers, heads, scale = shared_runner(2), Buffers(), (QUERIES, SHARED, SHARED), 0.3
    query, key, value = (matrix(one * SIZE, WIDTH, seed)[0] for seed, one in enumerate(heads))
    norm = Norm(random_rows(1, WIDTH)[0], 1e-5)
    before = BeforeAttention(norm, (query, key, value), random_rows(1, sum(heads) * SIZE)[0], heads, SIZE, None)
    after = AfterAttention(
        matrix(WIDTH, QUERIES * SIZE, 3)[0], None, norm, matrix(EXPERTS, WIDTH, 4, "F32")[0], Route(2, None, False)
    )
    sinks = random_rows(1, QUERIES)[0] if has_sinks else None
    x, (cosine, sine) = random_rows(1, WIDTH), (one[:1] for one in angles(SIZE))
    # Of longer tensors, from some token on.
    start, longer = 7, [random_rows(SHARED * 800, SIZE, seed=at).view(1, SHARED, 800, SIZE) for at in (1, 2)]
    states = [one.clone() for one in longer]
    q, k, v = BeforeGraph(runner, before, 1, SIZE, buffers).run(x, cosine, sine)
    for one, added in zip(states, (k, v), strict=True):
        one[:, :, start + tokens] = added[:, :, 0]
    keys, values = (one[:, :, start : start + tokens + 1] for one in states)
    attended = TokenAttention(runner)(q, keys, values, None, scale, sinks)
    expected = AfterGraph(runner, after, 1, buffers).run(attended, x)
    whole = LayerGraph(runner, before, Attention(scale, sinks), after, SIZE, buffers)
    first = [one.data_ptr() + 4 * SIZE * start for one in longer]
    for _ in range(2):
        found = whole.run(x, cosine, sine, KeptTokens(*first, 4 * SIZE * 800, tokens))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert all(torch.equal(one, other) for one, other in zip(longer, states, strict=True)), "one token is written"
