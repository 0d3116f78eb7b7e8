"""Drafts and kept beginnings together: what a verify step leaves in a row is kept as any answer, and continued."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from foreroute.drafting.draft import draft_for
from foreroute.errors import RefusedError
from foreroute.generation.generate import generate
from foreroute.model.draft_model import PROMPT_LOOKUP
from tests.batching.test_engine import ask, assert_same_answers
from tests.drafting.conftest import Fixed, Knowing
from tests.prefixes.test_beginnings import SYSTEM, ids_of

NEW = 20


@pytest.fixture
def drafting(model: Any) -> Iterator[Any]:
    """The model, whose engines draft."""
    model.foreroute.draft = PROMPT_LOOKUP
    yield model
    model.foreroute.draft = None


def conversations(engine: Any, known: Callable[[int, int], list[int]] | None, model: Any) -> list[list[Any]]:
    """Two conversations of three turns, each turn of both at once; answers that are `known` are drafted."""
    system = ids_of(model, SYSTEM, 1)
    texts = [[*system, *ids_of(model, 7, 10 + at)] for at in range(2)]
    turns = []
    drafts = engine._drafts
    own = None if drafts is None else drafts._of
    for turn in range(3):
        if known is not None:
            answers = {tuple(ids): [*ids, *known(turn, at)] for at, ids in enumerate(texts)}
            assert drafts is not None
            drafts._governors = {rows: Fixed(3, 1, 6) for rows in (1, 2)}

            def of(answer: Any, governor: Any, own: Any = own, answers: Any = answers) -> list[int]:
                if answer.drafter is None:
                    answer.drafter = Knowing()
                    answer.drafter.text = answers[tuple(answer.request.prompt_ids)]
                return own(answer, governor)

            drafts._of = of
        heard = [one.wait() for one in [ask(engine, ids, NEW) for ids in texts]]
        turns.append(heard)
        for at, ids in enumerate(texts):
            ids += [*heard[at].tokens, *ids_of(model, 5, 20 + 2 * turn + at)]
    return turns


@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss"], indirect=True)
def test_a_drafted_answer_is_kept_and_continued_as_another(model, engine_of) -> None:
    without = conversations(engine_of(model, max_num_seqs=2), None, model)
    model.foreroute.draft = PROMPT_LOOKUP
    engine = engine_of(model, max_num_seqs=2)
    drafted = conversations(engine, lambda turn, at: without[turn][at].tokens, model)
    state = engine.state()
    assert 0 < state.accepted < state.drafted
    for turn, (ones, others) in enumerate(zip(without, drafted, strict=True)):
        for one, other in zip(ones, others, strict=True):
            assert_same_answers(one, other)
            assert other.end.cached_tokens == one.end.cached_tokens
            assert not turn or other.end.cached_tokens > SYSTEM + NEW


@pytest.mark.parametrize("model", ["qwen3_next"], indirect=True)
def test_states_that_cannot_be_taken_back_are_refused_a_draft_by_name(drafting, engine_of, tokenizer) -> None:
    refused = r"No draft for a qwen3_next model here: states of linear attention, .* cannot be taken back"
    with pytest.raises(RefusedError, match=refused):
        engine_of(drafting, max_num_seqs=2)
    with pytest.raises(RefusedError, match=refused):
        draft_for(drafting, None)
    with pytest.raises(RefusedError, match=refused):
        generate(drafting, tokenizer, torch.tensor([[5, 6, 7]]), max_new_tokens=4)
    drafting.foreroute.draft = None
    assert len(ask(engine_of(drafting, max_num_seqs=2), [5, 6, 7], 4).wait().tokens) == 4
