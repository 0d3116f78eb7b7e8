"""Requests of one batch keep their tokens where some, or all, are drafted and verified."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import foreroute
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, NewToken, Request, Sampling
from foreroute.batching.row_layers import RowLayer, RowLengths
from foreroute.config import EngineConfig
from foreroute.errors import RefusedError
from foreroute.model.text import load_tokenizer
from tests.drafting.conftest import Fixed, Knowing

TINY = Path(__file__).parents[2] / "models" / "foreroute-tiny"
PROMPTS = ([300, 301, 302, 303], [*range(900, 940)], [2000, 17, 3000, 44, 1200])
SAMPLED = Sampling(temperature=1.0, seed=7)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Any]:
    torch.set_num_threads(1)
    config = EngineConfig(packed="no", draft="prompt-lookup")
    model = foreroute.load(TINY, "25%", dtype="float32", config=config)
    yield model
    model.foreroute.close()


def answers(model: Any, samplings: list[Sampling], known: dict[int, list[int]] | None = None) -> list[list[int]]:
    """Tokens of all PROMPTS, computed together; with `known`, some rows' answers are drafted, wrong in places."""
    from foreroute.model.draft_model import PROMPT_LOOKUP

    model.foreroute.draft = PROMPT_LOOKUP if known is not None else None
    engine = BatchEngine(model, load_tokenizer(TINY), 512, 4)
    if known is not None:
        drafts = engine._drafts
        assert drafts is not None
        texts = {tuple(PROMPTS[at]): [*PROMPTS[at], *tokens] for at, tokens in known.items()}

        def of(answer: Any, governor: Any, own: Any = drafts._of) -> list[int]:
            if answer.drafter is None:
                answer.drafter = Knowing()
                answer.drafter.text = texts.get(tuple(answer.request.prompt_ids), ())
            return own(answer, governor)

        drafts._of = of
        drafts._governors = {rows: Fixed(3, 1, 6) for rows in range(1, 5)}
    heard: list[list[Any]] = [[] for _ in PROMPTS]
    try:
        for prompt, sampling, events in zip(PROMPTS, samplings, heard, strict=True):
            engine.submit(Request(prompt, 40, sampling, ignore_eos=True), events.append)
        while not all(events and isinstance(events[-1], Finished) for events in heard):
            time.sleep(0.01)
        state = engine.state()
    finally:
        engine.close()
    assert [events[-1].reason for events in heard] == ["length"] * len(PROMPTS)
    if known:
        assert state.verify_steps > 0
        assert 0 < state.accepted < state.drafted
    else:
        assert not state.drafted
    return [[event.token_id for event in events if isinstance(event, NewToken)] for events in heard]


@pytest.mark.parametrize("samplings", [[GREEDY] * 3, [SAMPLED, GREEDY, SAMPLED]])
def test_rows_with_and_without_a_draft_keep_their_tokens(tiny, samplings: list[Sampling]) -> None:
    without = answers(tiny, samplings)
    assert answers(tiny, samplings, dict(enumerate(without))) == without
    # The second row has no draft: beside it the others are of other lengths.
    assert answers(tiny, samplings, {0: without[0], 2: without[2]}) == without


def test_one_token_too_many_is_seen(tiny, monkeypatch) -> None:
    """A planted fault: all that was drafted is kept in the cache, whatever the model chose."""
    from foreroute.batching.rows import RowsCache

    without = answers(tiny, [GREEDY] * 3)
    monkeypatch.setattr(RowsCache, "drop", lambda self, counts: None)
    assert answers(tiny, [GREEDY] * 3, dict(enumerate(without))) != without


def test_the_governor_of_a_batch_measures_it_and_changes_no_token(tiny) -> None:
    """Text that repeats itself, looked up in it, with the governor that a server has."""
    prompts = [[300, 301, 302, 303] * 8, [*range(900, 908)] * 5]
    tokens = {}
    for draft in (None, "prompt-lookup"):
        tiny.foreroute.draft = draft
        engine = BatchEngine(tiny, load_tokenizer(TINY), 512, 4)
        heard: list[list[Any]] = [[], []]
        for prompt, events in zip(prompts, heard, strict=True):
            engine.submit(Request(prompt, 60, GREEDY, ignore_eos=True), events.append)
        while not all(events and isinstance(events[-1], Finished) for events in heard):
            time.sleep(0.01)
        state = engine.state()
        engine.close()
        tokens[draft] = [[event.token_id for event in events if isinstance(event, NewToken)] for events in heard]
    assert tokens["prompt-lookup"] == tokens[None]
    assert state.verify_steps > 0
    assert state.drafted >= state.accepted
    governors = engine._drafts._governors
    assert sum(one.drafted for one in governors.values()) == state.drafted
    assert sum(one.accepted for one in governors.values()) == state.accepted


def test_a_row_whose_draft_fails_keeps_its_tokens(tiny, caplog, monkeypatch) -> None:
    """Its drafter fails at every token that it is asked for, and is asked once; the others are drafted on."""
    without, own, asked = answers(tiny, [GREEDY] * 3), Knowing.draft, []

    def failing(self: Any, ids: Any, *args: Any) -> Any:
        if list(ids[: len(PROMPTS[1])]) == PROMPTS[1]:
            asked.append(len(ids))
            raise ZeroDivisionError
        return own(self, ids, *args)

    monkeypatch.setattr(Knowing, "draft", failing)
    assert answers(tiny, [GREEDY] * 3, dict(enumerate(without))) == without
    assert len(asked) == 1
    assert caplog.text.count("drafting failed") == 1


def test_other_threads_wait_while_attention_is_replaced(tiny) -> None:
    tiny.foreroute.draft = "prompt-lookup"
    engine = BatchEngine(tiny, load_tokenizer(TINY), 512, 4)
    drafts, taken = engine._drafts, []
    with drafts.alike(1):
        thread = threading.Thread(target=lambda: taken.append(tiny.foreroute.lock.acquire(blocking=False)))
        thread.start()
        thread.join()
    engine.close()
    assert taken == [False]


def test_a_model_whose_rows_cannot_be_verified_is_refused_by_name(tiny, monkeypatch) -> None:
    monkeypatch.setattr("foreroute.batching.engine.why_not_batched", lambda model: "its state is its own")
    tiny.foreroute.draft = "prompt-lookup"
    with pytest.raises(RefusedError, match=r"--draft: .* as its state is its own"):
        BatchEngine(tiny, load_tokenizer(TINY), 256, 2)


@pytest.mark.parametrize("window", [None, 5])
def test_tokens_that_are_taken_back_leave_the_others_in_their_places(window: int | None) -> None:
    """Rows of other lengths, new tokens and losses, also where others have left a window for them."""
    lengths = RowLengths()
    layer = RowLayer(lengths, window)
    layer.join([(None, 0), (None, 0)])
    lengths.set([0, 0])
    rows: list[list[int]] = [[], []]
    number = 0
    for news, losses in (((9, 7), (0, 0)), ((4, 2), (3, 0)), ((1, 4), (0, 2)), ((3, 3), (2, 2)), ((4, 4), (0, 3))):
        most = max(news)
        keys = torch.full((2, 1, most, 1), float("nan"))
        lengths.begin(news)
        for at, num in enumerate(news):
            new = [*range(number + 1, number + num + 1)]
            number += num
            rows[at] += new
            keys[at, 0, most - num :, 0] = torch.tensor(new, dtype=torch.float32)
        layer.update(keys, keys)
        lengths.end()
        layer.drop(losses)
        lengths.set([had - lost for had, lost in zip(lengths.had, losses, strict=True)])
        for at, lost in enumerate(losses):
            rows[at] = rows[at][: len(rows[at]) - lost]
            held = len(rows[at]) if window is None else min(len(rows[at]), window - 1)
            assert layer.keys[at, 0, layer._end - held : layer._end, 0].tolist() == rows[at][-held:]
