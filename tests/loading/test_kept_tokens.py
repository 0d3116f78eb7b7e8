"""Cache layers with room for tokens to come: what transformers' own hold, and nothing that others show is written."""

import copy
import io
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from foreroute.model.decode.kept_tokens import room_of

ROWS, HEADS, SIZE, WINDOW = 2, 3, 4, 6


def states(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, ROWS, HEADS, tokens, SIZE, generator=generator, dtype=torch.float32)
    return both[0], both[1]


def cache_of(tokens: int, is_sliding: bool) -> DynamicCache:
    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(WINDOW) if is_sliding else DynamicLayer())
    cache.update(*states(tokens, 0), 0)
    return cache


def append(cache: DynamicCache, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = room_of(cache, 0, ROWS)
    assert found is not None
    return found[1].append(found[0], *states(1, seed))


def held(cache: DynamicCache) -> list[torch.Tensor]:
    return [cache.layers[0].keys.clone(), cache.layers[0].values.clone()]


@pytest.mark.parametrize("is_sliding", [False, True])
@pytest.mark.parametrize("tokens", [1, WINDOW - 1, WINDOW, 11])
def test_tokens_are_held_and_seen_as_by_transformers(tokens: int, is_sliding: bool) -> None:
    ours, theirs = cache_of(tokens, is_sliding), cache_of(tokens, is_sliding)
    for step in range(1, 150):  # more than there is room for at once
        seen, expected = append(ours, step), theirs.update(*states(1, step), 0)
        assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))
        assert all(torch.equal(one, other) for one, other in zip(held(ours), held(theirs), strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)


def branched(cache: DynamicCache) -> DynamicCache:
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch


def saved(cache: DynamicCache) -> DynamicCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded: DynamicCache = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [branched, copy.deepcopy, saved])
@pytest.mark.parametrize("is_sliding", [False, True])
def test_copies_of_a_cache_go_on_apart(copied: Any, is_sliding: bool) -> None:
    cache = cache_of(3, is_sliding)
    append(cache, 1)
    other = copied(cache)
    expected = {seed: cache_of(3, is_sliding) for seed in (2, 3)}
    for seed, reference in expected.items():
        for one in (1, seed, 4):
            reference.update(*states(1, one), 0)
    for step in range(2):
        append(cache, (2, 4)[step])
        append(other, (3, 4)[step])
    for found, seed in ((cache, 2), (other, 3)):
        assert all(torch.equal(one, two) for one, two in zip(held(found), held(expected[seed]), strict=True))


def test_a_cut_cache_does_not_write_over_what_others_show() -> None:
    cache = cache_of(3, is_sliding=False)
    append(cache, 1)
    shown, before = cache.layers[0].keys, held(cache)[0]
    cache.crop(-2)
    append(cache, 2)
    assert torch.equal(shown, before)
    assert torch.equal(cache.layers[0].keys[:, :, -1:], states(1, 2)[0])
    assert cache.get_seq_length() == 3


def test_other_caches_keep_their_own_way() -> None:
    class Other(DynamicLayer):
        pass

    cache = cache_of(3, is_sliding=False)
    assert room_of(None, 0, ROWS) is None
    assert room_of(cache, 1, ROWS) is None, "a layer that holds nothing yet"
    recorded = cache_of(3, is_sliding=True)
    recorded.layers[0].record_past = True
    assert room_of(recorded, 0, ROWS) is None
    for layer in (Other(), DynamicLayer()):
        cache.layers[0] = layer
        assert room_of(cache, 0, ROWS) is None
    half = DynamicCache()
    half.update(*(one.bfloat16() for one in states(2, 0)), 0)
    assert room_of(half, 0, ROWS) is None


def test_past_that_is_recorded_from_now_on_is_transformers_own() -> None:
    cache, theirs = (cache_of(9, is_sliding=True) for _ in range(2))
    append(cache, 1)
    theirs.update(*states(1, 1), 0)
    for one in (cache, theirs):
        one.layers[0].record_past = True
        assert room_of(one, 0, ROWS) is None
        for seed in (2, 3):
            one.update(*states(1, seed), 0)
        one.crop(-1)
    assert all(torch.equal(one, other) for one, other in zip(held(cache), held(theirs), strict=True))


def test_a_cache_of_other_rows_or_half_a_token_is_left_to_transformers() -> None:
    cache = cache_of(3, is_sliding=False)
    append(cache, 1)
    assert room_of(cache, 0, 1) is None
    cache.layers[0].keys = cache.layers[0].keys[:, :, :-1]  # as after an interrupt between keys and values
    assert room_of(cache, 0, ROWS) is None
