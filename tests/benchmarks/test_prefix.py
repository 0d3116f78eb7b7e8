"""The verdict on conversations that begin alike, and the turns that have other bits."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.prefix import Asked, ask, differing_turns, faults, step_s
from foreroute.batching.engine import BatchEngine
from foreroute.model.text import load_tokenizer
from tests.prefixes.conftest import TINY

GOOD = {"ratio": 1.1, "ratio_alone": 1.3, "over_plan": 1.05, "computed_twice": [], "differing_turns": []}


def test_what_is_as_wanted_has_no_faults() -> None:
    assert faults(GOOD, 1.1, None) == faults(GOOD, 1.1, 1.3) == []


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"ratio": 1.2}, "1.20 times its step"),
        ({"ratio_alone": 1.4}, "1.40 times its tokens alone"),
        ({"over_plan": 1.051}, "105.1% of the plan"),
        ({"computed_twice": [{"turn": 3}]}, "computed twice"),
        ({"differing_turns": [2]}, "turn 2"),
    ],
)
def test_what_is_not_is_named(wrong: dict[str, Any], what: str) -> None:
    (fault,) = faults({**GOOD, **wrong}, 1.1, 1.3)
    assert what in fault


def test_a_turn_is_computed_anew_and_compared_bit_by_bit(load: Any) -> None:
    model = load(TINY, "50%", prefill_chunk=16)
    engine = BatchEngine(model, load_tokenizer(TINY), 256)
    turns: list[tuple[list[int], Asked]] = []
    ids = list(range(5, 50))
    try:
        for _ in range(2):
            got = ask(engine, ids, 4)
            turns.append((list(ids), got))
            before, ids = ids, [*ids, *got.tokens, 7, 9, 8]
        assert turns[1][1].num_cached == len(turns[0][0]) + 3
        assert step_s(model, engine, before, turns[1][1].num_cached) > 0
    finally:
        engine.close()
    assert differing_turns(model, turns) == []
    prompt, got = turns[1]
    assert got.logprob is not None
    assert differing_turns(model, [turns[0], (prompt, replace(got, logprob=got.logprob + 1e-6))]) == [1]
    assert differing_turns(model, [turns[0], (prompt, replace(got, tokens=[*got.tokens[:3], 1]))]) == [1]
