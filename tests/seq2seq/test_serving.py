"""Requests to an encoder-decoder: one at a time, each encoded and then decoded; chats and prompt scores are refused."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, NewToken, Request, Sampling
from foreroute.errors import PromptError
from foreroute.model.text import load_tokenizer
from foreroute.server.api.problems import ApiError
from foreroute.server.backend import Prompts
from foreroute.server.settings import Limits
from tests.support.seq2seq import PROMPT, ROWS, write

PROMPTS = [PROMPT[0].tolist(), ROWS[0, :6].tolist()]


@pytest.fixture
def engine(load: Any, switch: Path) -> Iterator[BatchEngine]:
    """An engine over a quarter of the experts."""
    made = BatchEngine(load(switch, "25%"), load_tokenizer(switch), context=64, max_num_seqs=4)
    yield made
    made.close()


def tokens_of(engine: BatchEngine, request: Request) -> list[int]:
    """The tokens of one answer."""
    events: Queue[Any] = Queue()
    engine.submit(request, events.put)
    tokens = []
    while not isinstance(event := events.get(timeout=60), Finished):
        if isinstance(event, NewToken):
            tokens.append(event.token_id)
    assert event.error is None, event.error
    return tokens


def test_answers_are_the_resident_model_s(engine: BatchEngine, resident_of: Any) -> None:
    """One prompt after the other: nothing of an earlier one is left."""
    assert (engine.rows, engine.why_one_row) == (1, "an encoder-decoder: each request is encoded first")
    theirs = resident_of("switch_transformers")
    for prompt in (*PROMPTS, PROMPTS[0]):
        asked = Request(prompt, 9, Sampling(temperature=0), ignore_eos=True)
        ids = PROMPT.new_tensor([prompt])
        assert tokens_of(engine, asked) == write(theirs, ids, max_new_tokens=9).tokens[0, 1:].tolist()


def test_penalties_see_the_answer_alone(engine: BatchEngine, resident_of: Any) -> None:
    """As in generate(): the encoder's tokens are not the decoder's."""
    asked = Request(PROMPTS[0], 9, Sampling(temperature=0, repetition_penalty=1.5), ignore_eos=True)
    theirs = write(resident_of("switch_transformers"), PROMPT, max_new_tokens=9, repetition_penalty=1.5)
    assert tokens_of(engine, asked) == theirs.tokens[0, 1:].tolist()


def test_prompt_scores_are_refused(engine: BatchEngine) -> None:
    """It predicts none of its prompt."""
    with pytest.raises(PromptError, match="it has no scores"):
        engine.submit(Request(PROMPTS[0], 1, wants_prompt_scores=True), print)


def test_a_chat_is_refused_by_name(switch: Path) -> None:
    """Whatever template the tokenizer has."""
    tokenizer = load_tokenizer(switch)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    prompts = Prompts(tokenizer, 272, Limits(), "switch_transformers is an encoder-decoder. Use /v1/completions.")
    try:
        with pytest.raises(ApiError, match="is an encoder-decoder"):
            asyncio.run(prompts.chat([{"role": "user", "content": "hello"}]))
    finally:
        prompts.close()
