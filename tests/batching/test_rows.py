"""Rows of different lengths in one cache: each row's keys are its own, in order, whoever comes and goes."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import foreroute
from foreroute.batching import row_attention
from foreroute.batching.row_layers import RowLayer, RowLengths
from foreroute.batching.rows import RowsCache
from foreroute.config import EngineConfig
from foreroute.generation.kept_layers import LayerParts
from foreroute.predict.base import most_wanted

TINY = Path(__file__).parents[2] / "models" / "foreroute-tiny"
MAX_ROWS, HEADS = 4, 2

# What happens next: tokens for every row (cut to the rows that there are), a row that leaves, or one that comes.
_EVENTS = st.one_of(
    st.tuples(st.just("step"), st.lists(st.integers(1, 90), min_size=MAX_ROWS, max_size=MAX_ROWS)),
    st.tuples(st.just("leave"), st.integers(0, MAX_ROWS - 1)),
    st.tuples(st.just("join"), st.integers(0, 150)),
)


class Tape:
    """Rows whose n-th token of all has the key n and the value -n, beside a layer that is told the same."""

    def __init__(self, window: int | None) -> None:
        self.lengths, self.rows, self.window = RowLengths(), list[list[int]](), window
        self.layer = RowLayer(self.lengths, window)
        self.num_tokens = 0

    def made(self, num: int) -> list[int]:
        self.num_tokens += num
        return list(range(self.num_tokens - num + 1, self.num_tokens + 1))

    def step(self, news: list[int]) -> None:
        news = news[: len(self.rows)]
        self.lengths.begin(news)
        most, before = max(news), self.layer.get_seq_length()
        keys = torch.full((len(news), HEADS, most, 3), float("nan"))
        for at, num in enumerate(news):
            tokens = self.made(num)
            self.rows[at] += tokens
            keys[at, :, most - num :] = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
        width, first = self.layer.get_mask_sizes(most)
        found = self.layer.update(keys, -keys[..., :2])
        self.lengths.end()
        assert before + most == max(map(len, self.rows)) == width + first
        for states, sign in zip(found, (1, -1), strict=True):
            assert states.shape[:3] == (len(news), HEADS, width)
            assert states.isfinite().all(), "padding is multiplied, though by zero"
            for at, num in enumerate(news):
                # Of a window, what the row's first new token sees, and what comes after it.
                seen = len(self.rows[at]) if self.window is None else min(num + self.window - 1, len(self.rows[at]))
                assert (sign * states[at, 0, width - seen :, 0]).tolist() == self.rows[at][-seen:]

    def leave(self, at: int) -> None:
        del self.rows[at]
        kept = [place for place in range(len(self.rows) + 1) if place != at]
        self.layer.keep(kept)
        self.lengths.set([len(row) for row in self.rows])
        if at % 2:
            self.layer.trim()

    def join(self, num: int) -> None:
        tokens = self.made(num)
        alone = DynamicLayer() if self.window is None else DynamicSlidingWindowLayer(self.window)
        if num:
            keys = torch.tensor(tokens, dtype=torch.float32)[None, None, :, None].expand(1, HEADS, -1, 3)
            alone.update(keys, -keys[..., :2])
        self.layer.join([(alone if num else None, num)])
        self.rows.append(tokens)
        self.lengths.set([len(row) for row in self.rows])

    def check_rows(self) -> None:
        """Each row taken out is what transformers' own layer would hold."""
        for at, row in enumerate(self.rows):
            like = DynamicLayer() if self.window is None else DynamicSlidingWindowLayer(self.window)
            out = self.layer.row(at, like)
            if not out.is_initialized:
                assert row == []
                continue
            held = len(row) if self.window is None else min(len(row), self.window - 1)
            assert out.keys[0, 1, :, 2].tolist() == row[len(row) - held :]
            assert out.values[0, 0, :, 1].tolist() == [-token for token in row[len(row) - held :]]
            assert out.get_seq_length() == len(row)


@pytest.mark.parametrize("window", [None, 6])
@settings(max_examples=120, deadline=None)
@given(events=st.lists(_EVENTS, min_size=1, max_size=14))
# Rows of more tokens than they brought, moved where there are no columns before them, or another row's.
@example(events=[("join", 7), ("join", 12), ("step", [2, 1, 1, 1])])
@example(events=[("join", 12), ("step", [4] * 4), ("leave", 0), ("join", 3), ("join", 12), ("step", [2, 1, 1, 1])])
def test_every_row_keeps_its_own(window, events):
    tape = Tape(window)
    for what, arg in events:
        if what == "step" and tape.rows:
            tape.step(arg)
        elif what == "leave" and arg < len(tape.rows):
            tape.leave(arg)
        elif what == "join" and len(tape.rows) < MAX_ROWS:
            tape.join(arg)
        tape.check_rows()


def test_memory_is_freed():
    tape = Tape(None)
    tape.join(3)
    tape.join(4000)
    tape.step([1, 1])
    assert tape.layer.keys.shape[2] >= 4000
    assert len(tape.layer.keys) == 2
    tape.leave(1)
    tape.layer.trim()
    assert tape.layer.keys.shape[2] < 200
    tape.leave(0)
    assert tape.layer.keys is None


def test_a_row_comes_in_parts() -> None:
    """They lie one after the other, before a window's last alone where there is one."""
    for window, held in ((None, 70), (6, 21)):
        lengths = RowLengths()
        layer, like = RowLayer(lengths, window), DynamicLayer()
        tokens = torch.arange(70.0)[None, None, :, None].expand(1, HEADS, -1, 3)
        parts = {"keys": tokens.split([50, 1, 19], 2), "values": (-tokens).split([50, 1, 19], 2)}
        like.lazy_initialization(parts["keys"][0], parts["values"][0])
        layer.join([(LayerParts(like, parts), 70)])
        lengths.set([70])
        found = layer.row(0, like, more=99)
        assert found.keys[0, 1, :, 0].tolist() == list(range(70 - held, 70))
        assert torch.equal(found.values, -found.keys)


def test_a_row_comes_where_a_longer_one_has_left():
    """Longer than the current rows, shorter than what one before them had."""
    tape = Tape(None)
    tape.join(400)
    tape.join(10)
    tape.leave(0)
    tape.join(100)
    tape.join(200)
    tape.check_rows()


def test_a_window_does_not_grow():
    tape = Tape(8)
    tape.join(2)
    for _ in range(300):
        tape.step([1])
    assert tape.layer.keys.shape[2] <= 8 + 64


@pytest.fixture
def tiny():
    model = foreroute.load(TINY, "25%", dtype="float32", config=EngineConfig(packed="no", prefetch_prefill="on"))
    yield model
    model.foreroute.close()


def test_padding_is_computed_by_no_expert(tiny: Any):
    """The real tokens are what they are alone."""
    engine, routed = tiny.foreroute.engine, []
    width = tiny.foreroute.plan.num_experts
    engine.routing_listener = lambda layer, hidden, ids, weights: routed.append(int((ids < width).sum()))
    cache, prompts = RowsCache(tiny), [[5, 6, 7], list(range(9, 29)), [11]]
    cache.arrange([], [(None, 0)] * 3)
    logits = cache.step(prompts, "prefill")[:, -1]
    assert routed == [(3 + 20 + 1) * tiny.foreroute.plan.top_k[0]] * tiny.foreroute.plan.num_layers
    for row, ids in enumerate(prompts):
        expected = tiny(input_ids=torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)


def test_what_another_row_left_changes_no_row(tiny: Any):
    """A place that is used again may have held NaN."""
    cache = RowsCache(tiny)
    cache.arrange([], [(None, 0)] * 3)
    cache.step([[7] * 30, [5, 6, 9], [4] * 30], "prefill")
    for layer in cache._cache.layers:
        layer.keys[0], layer.values[0] = float("nan"), float("nan")
    cache.arrange([1, 2], [(None, 0)])
    logits = cache.step([[11], [12], [8, 9]], "prefill")[:, -1]
    torch.testing.assert_close(
        logits[0], tiny(input_ids=torch.tensor([[5, 6, 9, 11]])).logits[0, -1], atol=1e-4, rtol=0
    )
    assert logits.isfinite().all()


def test_where_memory_runs_out_rows_stay_as_they_were(monkeypatch: pytest.MonkeyPatch):
    tape = Tape(None)
    tape.join(5)
    made = torch.Tensor.new_empty
    calls = []

    def fails(self: torch.Tensor, *shape: int) -> torch.Tensor:
        calls.append(shape)
        if len(calls) == 2:
            raise MemoryError("planted")
        return made(self, *shape)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", fails)
        alone = DynamicLayer()
        alone.update(torch.ones(1, HEADS, 400, 3), torch.ones(1, HEADS, 400, 2))
        with pytest.raises(MemoryError):
            tape.layer.join([(alone, 400)])
    tape.check_rows()
    tape.step([3])


def test_rows_are_taken_over_without_a_second_copy(tiny: Any):
    prompts, decoding = RowsCache(tiny), RowsCache(tiny)
    prompts.arrange([], [(None, 0)] * 2)
    prompts.step([[5, 6, 7], [8, 9]], "prefill")
    keys = prompts._cache.layers[0].keys
    decoding.append_from(prompts, [0, 1])
    assert decoding._cache.layers[0].keys is keys, "nothing was there: not even a copy"
    assert (decoding.lengths, prompts.lengths) == ([3, 2], [])
    prompts.arrange([], [(None, 0)] * 2)
    prompts.step([[15, 16], [17, 18, 19, 20]], "prefill")
    decoding.append_from(prompts, [1])
    assert (decoding.lengths, prompts.lengths) == ([3, 2, 4], [2, 4])
    prompts.arrange([0], [])
    decoding.append_from(prompts, [0])
    assert all(layer.keys is None for layer in prompts._cache.layers)
    logits = decoding.step([[11]] * 4, "decode")[:, -1]
    for row, ids in enumerate(([5, 6, 7], [8, 9], [17, 18, 19, 20], [15, 16])):
        expected = tiny(input_ids=torch.tensor([[*ids, 11]])).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=0)


def test_padding_has_no_vote_and_is_not_counted(tiny: Any, monkeypatch: pytest.MonkeyPatch):
    """One prompt of 26 tokens and seven of 3: what is guessed is what the real tokens' guesses are."""
    prefetcher, guessed = tiny.foreroute.engine.prefetcher, []
    prompts = [list(range(5, 31)), *([40 + at, 50 + at, 60 + at] for at in range(7))]
    predictor = prefetcher.predictor
    inner = predictor._predictor.guess

    def spying(layer: int, seen: Any, width: int) -> Any:
        found = inner(layer, seen, width)
        real = (seen.ids < tiny.foreroute.plan.num_experts).any(-1)
        guessed.append(most_wanted(found.ids[real], tiny.foreroute.plan.num_experts))
        return found

    told: list[list[int]] = []
    prefetch = prefetcher.prefetch
    monkeypatch.setattr(predictor._predictor, "guess", spying)
    monkeypatch.setattr(prefetcher, "prefetch", lambda at, found: told.append(list(found)) or prefetch(at, found))
    before = tiny.foreroute.stats().prefill.tokens
    cache = RowsCache(tiny)
    cache.arrange([], [(None, 0)] * len(prompts))
    cache.step(prompts, "prefill")
    assert told == guessed
    assert len(told) > 3
    assert tiny.foreroute.stats().prefill.tokens - before == sum(map(len, prompts))


def test_the_attention_of_rows_takes_its_arguments_by_the_names_of_transformers() -> None:
    """afmoe gives its mask by name."""
    theirs = list(inspect.signature(sdpa_attention_forward).parameters)[:5]
    assert list(inspect.signature(row_attention._attend).parameters)[:5] == theirs


def test_what_a_row_did_not_bring_is_not_given_back():
    """Tokens before its window, which a row keeps a few of: one that came without them has none."""
    tape = Tape(6)
    tape.join(40)
    tape.step([3])
    assert tape.layer.row(0, DynamicSlidingWindowLayer(6), more=16).keys[0, 1, :, 2].tolist() == tape.rows[0][-8:]
    tape.step([20])
    assert tape.layer.row(0, DynamicSlidingWindowLayer(6), more=16).keys[0, 1, :, 2].tolist() == tape.rows[0][-21:]
