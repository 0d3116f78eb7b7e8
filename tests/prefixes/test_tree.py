"""generation/prefix_tree.py: what is found, what is shared, and what is evicted, without a tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreroute.generation.prefix_tree import NewState, PrefixTree, common_length

TOKEN_BYTES, STATE_BYTES = 10, 35


class Tokens:
    """A part that says which tokens it is of."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = tuple(ids)
        self.nbytes = TOKEN_BYTES * len(self.ids)

    def split(self, at: int) -> tuple["Tokens", "Tokens"]:
        return Tokens(self.ids[:at]), Tokens(self.ids[at:])


@dataclass
class After:
    ids: tuple[int, ...]
    least: int
    nbytes: int = STATE_BYTES


class Kept:
    """A tree beside the conversations that it was told, all of which a plain list would keep."""

    def __init__(self, max_bytes: int = 10**9, least_hit: int = 1, reach: int | None = None) -> None:
        self.tree, self.reach = PrefixTree(max_bytes, least_hit), reach
        self.told: list[tuple[int, ...]] = []
        self.made = 0

    def insert(self, ids: Sequence[int], owner: Any = "model") -> bool:
        def part_of(start: int, end: int) -> Tokens:
            self.made += end - start
            return Tokens(ids[start:end])

        state = None
        if self.reach is not None:
            least = max(0, len(ids) - self.reach)
            state = NewState(STATE_BYTES, least, lambda: After(tuple(ids), least))
        is_kept = self.tree.insert(owner, ids, TOKEN_BYTES, part_of, state)
        if is_kept:
            self.told.append(tuple(ids))
        return is_kept

    def find(self, ids: Sequence[int], at_most: int | None = None, owner: Any = "model") -> int:
        """The length of a hit, whose parts and state are of the right tokens."""
        at_most = len(ids) if at_most is None else at_most
        expected = self.tree.reusable(owner, ids, at_most)
        found = self.tree.find(owner, ids, at_most)
        if found is None:
            assert expected == 0
            return 0
        held = [token for node in found.nodes for token in node.part.ids]
        assert held[: found.length] == list(ids[: found.length])
        assert found.length == expected
        assert found.nodes[-1].start < found.length <= found.nodes[-1].end
        assert (found.state is None) == (self.reach is None)
        if found.state is not None:
            state = found.state.state
            assert state.ids[: found.length] == tuple(ids[: found.length])
            assert state.least <= found.length <= len(state.ids)
        return found.length

    def check(self) -> None:
        nodes = list(self.tree._nodes())
        assert self.tree.nbytes == sum(node.part.nbytes + (0 if node.state is None else STATE_BYTES) for node in nodes)
        assert self.tree.nbytes <= self.tree.max_bytes
        for node in nodes:
            assert node.ids == node.part.ids
            assert node.parent.children[node.ids[0]] is node
            assert node.start == node.parent.end
            assert self.reach is None or node.children or node.state is not None, "nothing continues after it"


ids_of = st.lists(st.integers(1, 2), min_size=1, max_size=9)


def shared_by(told: Sequence[Sequence[int]], ids: Sequence[int]) -> int:
    return max((common_length(tuple(one), tuple(ids)) for one in told), default=0)


@settings(deadline=None, max_examples=120)
@given(st.lists(ids_of, max_size=8), ids_of, st.integers(0, 9))
def test_without_states_the_longest_beginning_is_found_and_each_token_is_kept_once(told, ids, at_most) -> None:
    kept = Kept()
    for one in told:
        assert kept.insert(one)
        kept.check()
    assert kept.find(ids, at_most) == min(shared_by(told, ids), len(ids), at_most)
    beginnings = {tuple(one[:end]) for one in told for end in range(1, len(one) + 1)}
    assert kept.tree.nbytes == len(beginnings) * TOKEN_BYTES
    assert kept.made == len(beginnings), "something was copied twice"


@settings(deadline=None, max_examples=120)
@given(st.lists(ids_of, max_size=8), ids_of, st.integers(0, 9), st.integers(0, 3))
def test_with_states_a_prompt_continues_where_one_serves(told, ids, at_most, reach) -> None:
    kept = Kept(reach=reach)
    for one in told:
        assert kept.insert(one)
        kept.check()
    most = min(at_most, len(ids))
    lengths = [min(common_length(tuple(one), tuple(ids)), most) for one in told]
    fits = [length for one, length in zip(told, lengths, strict=True) if length >= len(one) - reach]
    assert kept.find(ids, at_most) == max(fits, default=0)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.booleans(), ids_of, st.sampled_from("ab")), max_size=30),
    st.integers(0, 200),
    st.sampled_from([None, 0, 2]),
)
def test_memory_is_bounded_whatever_comes(events, max_bytes, reach) -> None:
    kept = Kept(max_bytes, reach=reach)
    for is_insert, ids, owner in events:
        if is_insert:
            needed = len(ids) * TOKEN_BYTES + (0 if reach is None else STATE_BYTES)
            is_kept = kept.insert(ids, owner)
            assert is_kept == (needed <= max_bytes)
            assert not is_kept or kept.find(ids, owner=owner) == len(ids), "the latest is kept"
        else:
            kept.find(ids, owner=owner)
        kept.check()
    kept.tree.forget("a")
    kept.check()
    assert kept.find([1] * 9, owner="a") == 0
    kept.tree.clear()
    assert (kept.tree.nbytes, len(kept.tree)) == (0, 0)


def test_conversations_in_turn_compute_and_evict_nothing() -> None:
    system = list(range(100, 150))
    kept = Kept(max_bytes=100 * TOKEN_BYTES)
    texts = {name: [*system, ord(name)] for name in "AB"}
    for turn in range(4):
        for ids in texts.values():
            known = kept.find(ids)
            assert known == (len(ids) - 1 if turn == 0 and ids is texts["B"] else 0 if turn == 0 else len(ids) - 3)
            kept.insert(ids)
            ids += [turn] * 3
            assert kept.tree.known("model", ids) == len(ids) - 3
    assert kept.tree.nbytes == (50 + 2 * 10) * TOKEN_BYTES


def test_the_ends_that_were_not_used_go_first_and_the_beginning_stays() -> None:
    system = [9] * 10
    kept = Kept(max_bytes=30 * TOKEN_BYTES)
    for name in (1, 2, 3):
        kept.insert([*system, *[name] * 6])
    kept.find([*system, *[1] * 6])
    kept.insert([*system, *[4] * 6])
    kept.check()
    assert [kept.tree.reusable("model", [*system, *[name] * 6], 16) for name in (1, 2, 3, 4)] == [16, 10, 16, 16]


@pytest.mark.parametrize("reach", [None, 0])
def test_a_common_token_or_two_are_no_hit_and_refresh_nothing(reach: int | None) -> None:
    kept = Kept(max_bytes=24 * TOKEN_BYTES + (0 if reach is None else 2 * STATE_BYTES), least_hit=3, reach=reach)
    old, young = [7, 7, *[1] * 8], [8, 8, *[2] * 8]
    kept.insert(old)
    kept.insert(young)
    for _ in range(3):
        assert kept.find([7, 7, 3, 3]) == 0
    kept.insert([5] * 12)
    assert [kept.find(ids) for ids in (old, young)] == [0, 10]


def test_states_within_a_conversation_go_before_its_end() -> None:
    kept = Kept(max_bytes=12 * TOKEN_BYTES + 2 * STATE_BYTES, reach=0)
    for end in (4, 8, 12):
        assert kept.insert([1] * end)
    kept.check()
    assert [kept.tree.reusable("model", [1] * end, end) for end in (4, 8, 12)] == [0, 8, 12]


def test_what_nothing_can_continue_is_dropped_with_what_followed_it() -> None:
    kept = Kept(max_bytes=10 * TOKEN_BYTES + STATE_BYTES, reach=0)
    kept.insert([1] * 4)
    kept.insert([1] * 10)
    assert kept.tree.reusable("model", [1] * 4, 4) == 0
    kept.insert([2] * 3)
    kept.check()
    assert kept.tree.nbytes == 3 * TOKEN_BYTES + STATE_BYTES
    assert len(kept.tree) == 1


def test_what_does_not_fit_alone_evicts_nothing() -> None:
    kept = Kept(max_bytes=8 * TOKEN_BYTES)
    kept.insert([1] * 5)
    assert not kept.insert([2] * 9)
    assert not kept.insert([*[1] * 5, *[2] * 4])
    assert kept.find([1] * 5) == 5
