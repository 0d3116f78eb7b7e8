"""generation/prefix_cache.py: what is kept, what is dropped, and what must never be continued."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import JambaConfig, MixtralConfig, Qwen3NextConfig
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from foreroute.engine.chunks import split_prompt
from foreroute.generation.prefix_cache import PromptCache
from foreroute.model.caches import can_be_continued, can_be_cut, new_cache
from foreroute.model.decode.kept_tokens import room_of

# Two layers, keys and values, 1 head of width 1, fp32.
TOKEN_BYTES = 2 * 2 * 4


class Model:
    def __init__(self, **options: Any) -> None:
        self.config = MixtralConfig(num_hidden_layers=2, **options)

    def _supports_default_dynamic_cache(self) -> bool:
        return True


def filled(model: Model, ids: list[int]) -> DynamicCache:
    """A cache whose keys say which token they are of."""
    cache = new_cache(model)
    states = torch.tensor(ids, dtype=torch.float32).reshape(1, 1, -1, 1)
    for layer in range(2):
        cache.update(states, -states, layer)
    return cache


def tokens_in(cache: DynamicCache) -> list[list[float]]:
    return [part.flatten().abs().tolist() for layer in cache.layers for part in (layer.keys, layer.values)]


def kept_of(*conversations: list[int], max_bytes: int = 10**6) -> tuple[Model, PromptCache]:
    model, kept = Model(), PromptCache(max_bytes, least_hit=1)
    for ids in conversations:
        assert kept.keep(model, ids, filled(model, ids))
    return model, kept


short_ids = st.lists(st.integers(1, 2), min_size=1, max_size=7)


@settings(deadline=None)
@given(st.lists(short_ids, max_size=5), short_ids, st.integers(0, 7))
def test_the_longest_beginning_is_found_and_is_what_it_says(conversations, ids, at_most) -> None:
    model, kept = kept_of(*conversations)
    before = kept.nbytes
    cache, known = kept.take(model, ids, at_most)
    common = [next((n for n, (a, b) in enumerate(zip(one, ids)) if a != b), min(len(one), len(ids)))  # noqa: B905
              for one in conversations]  # fmt: skip
    assert known == min(max(common, default=0), at_most)
    assert (cache is None) == (known == 0)
    if cache is not None:
        assert tokens_in(cache) == [ids[:known]] * 4
        cache.update(torch.full((1, 1, 3, 1), 9.0), torch.full((1, 1, 3, 1), 9.0), 0)
    assert kept.nbytes == before
    again, _ = kept.take(model, ids, at_most)
    assert again is None or tokens_in(again) == [ids[:known]] * 4


def test_the_oldest_is_dropped() -> None:
    model, kept = kept_of([1, 1, 1], [2, 2, 2], max_bytes=7 * TOKEN_BYTES)
    assert (len(kept), kept.nbytes) == (2, 6 * TOKEN_BYTES)
    kept.take(model, [1, 1, 1, 4], 3)
    kept.keep(model, [3, 3, 3], filled(model, [3, 3, 3]))
    assert [kept.take(model, [n, n, n], 3)[1] for n in (1, 2, 3)] == [3, 0, 3]
    assert not kept.keep(model, [5] * 8, filled(model, [5] * 8))
    assert [kept.take(model, [n, n, n], 3)[1] for n in (1, 3, 5)] == [3, 3, 0]
    kept.clear()
    assert (len(kept), kept.nbytes) == (0, 0)


def test_what_conversations_begin_with_is_kept_once() -> None:
    model, kept = kept_of([1, 2], [1, 2, 3, 4], [1, 2, 3, 5])
    assert (len(kept), kept.nbytes) == (2, 5 * TOKEN_BYTES)
    assert kept.take(model, [1, 2, 9], 2)[1] == 2


def test_of_a_broken_off_step_the_certain_part_is_kept() -> None:
    model, kept = Model(), PromptCache()
    cache = filled(model, [1, 2, 3])
    cache.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)
    assert kept.keep(model, [1, 2, 3], cache)
    assert tokens_in(kept.take(model, [1, 2, 3], 3)[0]) == [[1, 2, 3]] * 4
    cache.layers[1].keys = torch.cat([cache.layers[1].keys, torch.ones(1, 1, 1, 1)], dim=-2)
    assert not kept.keep(model, [1, 2, 3], cache), "values are missing"
    assert not kept.keep(model, [1, 2, 3, 4, 5], filled(model, [1, 2, 3])), "tokens are missing"
    assert not kept.keep(model, [], filled(model, [1]))


def test_a_window_is_cut_only_while_it_holds_everything() -> None:
    model, kept = Model(sliding_window=4), PromptCache(least_hit=1)
    assert can_be_continued(model, filled(model, [1, 2]))
    for ids in ([1, 2, 3], [5, 6, 7, 8, 9]):
        assert can_be_cut(filled(model, ids)) == (len(ids) < 4)
        assert kept.keep(model, ids, filled(model, ids))
    assert tokens_in(kept.take(model, [1, 2, 9], 2)[0]) == [[1, 2]] * 4
    assert kept.take(model, [5, 6, 9], 2) == (None, 0)
    cache, known = kept.take(model, [5, 6, 7, 8, 9, 1], 5)
    assert (known, cache.get_seq_length(), tokens_in(cache)) == (5, 5, [[7, 8, 9]] * 4)
    # Nor is a longer one a substitute for it.
    assert kept.keep(model, [5, 6, 7, 8, 9, 1, 1], filled(model, [5, 6, 7, 8, 9, 1, 1]))
    assert [kept.take(model, [5, 6, 7, 8, 9, 2, 2], 5)[1], len(kept)] == [5, 3]
    torn = filled(model, [5, 6, 7, 8, 9])
    assert not kept.keep(model, [5, 6, 7, 8], torn)


def test_a_model_that_is_gone_takes_its_cache_along() -> None:
    model, kept = kept_of([1, 2, 3])
    other = Model()
    assert kept.take(other, [1, 2, 3], 3) == (None, 0)
    del model
    kept.take(other, [1], 1)
    assert len(kept) == 0


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_are_not_continued(rope_type: str) -> None:
    model = Model()
    model.config.rope_parameters = {"full_attention": {"rope_type": rope_type, "factor": 2.0}}
    assert not can_be_continued(model, new_cache(model))


def test_longrope_that_divides_alike_at_every_length_is_continued() -> None:
    model = Model()
    factors = {"short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0]}
    model.config.rope_parameters = {"rope_type": "longrope", **factors}
    assert can_be_continued(model, new_cache(model))
    model.config.rope_parameters["long_factor"] = [1.0, 2.5]
    assert not can_be_continued(model, new_cache(model))


def test_states_of_linear_attention_are_continued_by_families_that_are_known_to() -> None:
    model = Model()
    model.config = JambaConfig(num_hidden_layers=4, attn_layer_offset=1, attn_layer_period=2)
    cache = new_cache(model)
    assert not can_be_continued(model, cache), "its code begins anew where several tokens follow"
    model.config = Qwen3NextConfig(num_hidden_layers=4)
    cache = new_cache(model)
    assert can_be_continued(model, cache)
    assert not PromptCache().keep(model, [1], cache), "nothing is in it"


def test_states_that_may_have_seen_more_tokens_are_not_kept() -> None:
    """Those of a broken-off step, whose attention has one token more, and of an answer after its prompt."""
    model, kept = Model(), PromptCache(least_hit=1)
    model.config = Qwen3NextConfig(num_hidden_layers=4)
    cache = new_cache(model)
    states = torch.ones(1, 1, 3, 1)
    for at, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionLayer):
            cache.update_conv_state(torch.ones(1, 2, 4), at)
            cache.update_recurrent_state(torch.ones(1, 2, 2), at)
        else:
            cache.update(states, -states, at)
    assert not kept.keep(model, [1, 2], cache)
    assert kept.keep(model, [1, 2, 3], cache)
    assert kept.take(model, [1, 2, 9], 2) == (None, 0)
    taken, known = kept.take(model, [1, 2, 3, 4], 3)
    assert known == 3
    assert taken is not None
    taken.update_recurrent_state(torch.zeros(1, 2, 2), 0)
    again, _ = kept.take(model, [1, 2, 3, 4], 3)
    assert again is not None
    assert again.get_recurrent_state(0).sum() == 4, "what was taken is a copy"


def test_a_family_with_a_cache_of_its_own_gets_none() -> None:
    model = Model()
    model._supports_default_dynamic_cache = lambda: False
    assert new_cache(model) is None


@given(st.integers(1, 60), st.integers(3, 20))
def test_a_prompt_is_split_without_a_single_token_left_over(num_tokens: int, chunk: int) -> None:
    ids = torch.arange(num_tokens)[None]
    pieces = split_prompt(ids, chunk)
    assert torch.equal(torch.cat(pieces, dim=1), ids)
    sizes = [piece.shape[1] for piece in pieces]
    assert max(sizes) <= chunk
    assert min(sizes) > 1 or num_tokens == 1
    assert len(sizes) == -(-num_tokens // chunk)
    assert [piece.shape[1] for piece in split_prompt(ids, None)] == [num_tokens]


def test_room_that_decoding_left_is_not_kept() -> None:
    model, kept = Model(), PromptCache(10**6)
    cache = filled(model, [1, 2, 3])
    for index in range(2):
        layer, room = room_of(cache, index, 1) or pytest.fail("no room")
        room.append(layer, torch.full((1, 1, 1, 1), 4.0), torch.full((1, 1, 1, 1), 4.0))
    assert kept.keep(model, [1, 2, 3, 4], cache)
    assert kept.nbytes == 4 * TOKEN_BYTES
    taken, known = kept.take(model, [1, 2, 3, 4, 5], 9)
    assert taken is not None
    assert known == 4
    assert tokens_in(taken) == [[1, 2, 3, 4]] * 4
    held = sum(part.untyped_storage().nbytes() for one in taken.layers for part in (one.keys, one.values))
    assert held == kept.nbytes
