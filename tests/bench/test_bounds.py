"""The bound of a recorded run in bytes."""

import pytest

from foreroute.bench.bounds import decode_bytes, prefill_bytes

PROMPT = [[0, 1, 2], [0, 1]]


def test_a_prompt_reads_each_of_its_experts_once_but_for_what_the_pool_held():
    assert prefill_bytes([PROMPT], 0, [10, 100]) == 230
    # Were the large ones there, the small ones would be read; the bound is the least of all.
    assert prefill_bytes([PROMPT], 2, [10, 100]) == 30
    assert prefill_bytes([PROMPT], 5, [10, 100]) == 0
    # A second chunk reads them again.
    assert prefill_bytes([PROMPT, PROMPT], 2, [10, 100]) == 60


def test_new_tokens_read_what_no_cache_could_have_kept():
    # Two layers: the same expert index is another expert in each.
    routes = [[[0], [0]], [[1], [0]], [[0], [0]], [[1], [0]]]
    assert decode_bytes(routes, 3, [10, 100]) == 0
    # With two slots, layer 1's stays and layer 0's alternate; the first content is free.
    assert decode_bytes(routes, 2, [10, 100]) == 30
    assert decode_bytes([], 2, [10, 100]) == 0


def test_what_passes_through_the_pool_has_no_bound():
    assert decode_bytes([PROMPT], 2, [10, 100]) is None


@pytest.mark.parametrize("num_slots", [2, 4])
def test_layers_do_not_share_experts(num_slots):
    routes = [[[step % 2], [step % 2]] for step in range(8)]
    # Four experts in all.
    assert (decode_bytes(routes, num_slots, [1, 1]) == 0) == (num_slots == 4)
