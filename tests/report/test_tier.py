"""The simulation of a memory tier: closed forms where there are some, and the published setting."""

import itertools

import pytest

from foreroute.report.tier.simulation import Simulated, Tier, TierSimulation
from foreroute.residency.eviction import Lru

LAYERS, WIDTH, TOP_K = 6, 16, 2
NBYTES = 1000
NO_GUESS: list[tuple[int, ...]] = [() for _ in range(LAYERS)]


def tier(link: float = 1e6, before_s: float = 0.5e-3, expert_s: float = 0.1e-3, after_s: float = 0.0) -> Tier:
    return Tier(link, (before_s,) * LAYERS, (expert_s,) * LAYERS, after_s)


def fresh_steps(count: int, top_k: int = TOP_K) -> list[list[tuple[int, ...]]]:
    """Steps that never demand what one of the last WIDTH / top_k - 1 steps did."""
    turns = itertools.cycle(range(0, WIDTH, top_k))
    return [
        [tuple(layer * WIDTH + first + at for at in range(top_k)) for layer in range(LAYERS)]
        for first in itertools.islice(turns, count)
    ]


def shifted(steps, by: int, count: int = 1) -> list[list[tuple[int, ...]]]:
    """Guesses of every layer but the first: `count` keys, `by` behind what the router will choose."""
    return [
        [(), *(tuple((key + by + at) % WIDTH + layer * WIDTH for at in range(count)) for layer, key in first[1:])]
        for first in ([(layer, keys[0] % WIDTH) for layer, keys in enumerate(step)] for step in steps)
    ]


def simulate(on: Tier, steps, guesses, num_slots: int, **options) -> Simulated:
    simulation = TierSimulation(on, (NBYTES,) * LAYERS, LAYERS * WIDTH, WIDTH, num_slots, Lru(), **options)
    return simulation.run(steps, guesses, warm_up=2)


def test_on_demand_without_reuse_the_last_expert_alone_is_computed_behind_its_copy():
    steps = fresh_steps(8)
    found = simulate(tier(), steps, [NO_GUESS] * 8, 2 * TOP_K)
    copy_s, expert_s = NBYTES / 1e6, 0.1e-3
    # The first of two is computed while the second is copied.
    assert found.step_s == pytest.approx(LAYERS * (0.5e-3 + TOP_K * copy_s + expert_s))
    assert found.copied_bytes == LAYERS * TOP_K * NBYTES
    assert found.misses == LAYERS * TOP_K
    assert found.stall_s == pytest.approx(found.step_s - LAYERS * (0.5e-3 + TOP_K * expert_s))


def test_guesses_that_are_right_hide_what_a_layer_computes():
    steps = fresh_steps(8)
    guesses = [[(), *step[1:]] for step in steps]
    found = simulate(tier(), steps, guesses, 4 * TOP_K, staging_slots=2 * TOP_K)
    copy_s, expert_s, before_s = NBYTES / 1e6, 0.1e-3, 0.5e-3
    # The link never rests between the first layer's demand and the last layer's last copy.
    assert found.step_s == pytest.approx(before_s + LAYERS * TOP_K * copy_s + expert_s)
    assert found.copied_bytes == LAYERS * TOP_K * NBYTES
    slow_compute = simulate(tier(before_s=5e-3), steps, guesses, 4 * TOP_K, staging_slots=2 * TOP_K)
    first_layer = 5e-3 + TOP_K * copy_s + expert_s
    assert slow_compute.step_s == pytest.approx(first_layer + (LAYERS - 1) * (5e-3 + TOP_K * expert_s))
    assert slow_compute.late_hits == 0


def test_wrong_guesses_are_copied_beside_what_is_demanded():
    steps = fresh_steps(8)
    wrong = shifted(steps, TOP_K)
    found = simulate(tier(before_s=5e-3), steps, wrong, 4 * TOP_K, staging_slots=TOP_K)
    assert found.copied_bytes == (LAYERS * TOP_K + LAYERS - 1) * NBYTES
    assert found.misses == LAYERS * TOP_K


def test_what_is_resident_costs_compute_alone():
    steps = [fresh_steps(1)[0]] * 6
    found = simulate(tier(after_s=2e-3), steps, [NO_GUESS] * 6, LAYERS * TOP_K)
    assert found.step_s == pytest.approx(LAYERS * (0.5e-3 + TOP_K * 0.1e-3) + 2e-3)
    assert found.copied_bytes == found.stall_s == found.misses == 0


def test_a_guess_that_the_router_contradicts_is_cancelled_unless_its_copy_has_begun():
    steps = fresh_steps(8)
    # Three guesses where one copy takes longer than all that is computed: the second and third never begin.
    wrong = shifted(steps, 4, count=3)
    found = simulate(tier(before_s=0.0, expert_s=0.0), steps, wrong, 4 * TOP_K, staging_slots=2 * TOP_K)
    assert found.copied_bytes <= LAYERS * (TOP_K + 1) * NBYTES


def test_executing_guesses_waits_for_no_router():
    steps = fresh_steps(8)
    guesses = shifted(steps, 4, count=TOP_K)  # all wrong
    exact = simulate(tier(), steps, guesses, 6 * TOP_K, staging_slots=2 * TOP_K)
    paper = simulate(tier(), steps, guesses, 6 * TOP_K, staging_slots=2 * TOP_K, executes_guesses=True)
    assert paper.step_s < exact.step_s
    assert paper.misses <= TOP_K  # layer 0 has no guess


def test_experts_computed_in_one_call_wait_for_the_last_of_them():
    steps = fresh_steps(8)
    found = simulate(tier(), steps, [NO_GUESS] * 8, 2 * TOP_K, in_one_call=True)
    assert found.step_s == pytest.approx(LAYERS * (0.5e-3 + TOP_K * (NBYTES / 1e6 + 0.1e-3)))


# Qwen3-30B-A3B in bfloat16 on an A6000 behind PCIe 4 (arXiv 2603.19289): measured TPOT in ms, by context length.
PUBLISHED = {1024: (158.9, 144.4), 65536: (169.4, 146.0)}


@pytest.mark.parametrize("context", PUBLISHED)
def test_the_published_times_come_out_of_bytes_and_bandwidths(context: int):
    hidden, layers, top_k = 2048, 48, 8
    link, memory = 25.7e9, 768e9
    expert_bytes = 3 * hidden * 768 * 2
    dense = (hidden * (32 + 4 + 4) * 128 + 32 * 128 * hidden + hidden * 128) * 2
    cache = context * 2 * 4 * 128 * 2
    head_s = hidden * 151936 * 2 / memory
    on = Tier(link, ((dense + cache) / memory,) * layers, (expert_bytes / memory,) * layers, head_s)
    width = 4 * top_k
    turns = itertools.cycle(range(0, width, top_k))
    steps = [
        [tuple(range(layer * width + first, layer * width + first + top_k)) for layer in range(layers)]
        for first in itertools.islice(turns, 6)
    ]

    def tpot_ms(guesses, **options) -> float:
        # Two layers' buffers, and nothing kept across tokens.
        simulation = TierSimulation(
            on, (expert_bytes,) * layers, layers * width, width, 2 * top_k, Lru(), in_one_call=True, **options
        )
        return 1e3 * simulation.run(steps, guesses, warm_up=2).step_s

    none: list[list[tuple[int, ...]]] = [[() for _ in range(layers)] for _ in steps]
    on_demand, prefetched = PUBLISHED[context]
    assert tpot_ms(none) == pytest.approx(on_demand, rel=0.1)
    guesses = [[(), *step[1:]] for step in steps]
    assert tpot_ms(guesses, staging_slots=top_k, executes_guesses=True) == pytest.approx(prefetched, rel=0.1)
