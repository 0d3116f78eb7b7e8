"""A stream says what the whole answer says: a thousand strings of emoji, CJK and what else takes several bytes."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from foreroute.cli.commands import demo
from foreroute.model.text import load_tokenizer
from foreroute.server.backend import Prompts
from foreroute.server.dialogue.messages import Dialogue, DialogueMessage
from foreroute.server.dialogue.turn import Turn
from foreroute.server.settings import Limits
from tests.server.conftest import Served

Serve = Callable[..., Served]
# Faces, families joined by U+200D, flags, skin tones, Han, kana, Hangul, combining accents, ASCII, spaces.
PARTS = [
    "😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "漢字", "仮名", "かな", "カナ", "한글", "é", "e\u0301", "ß", "Ω",
    "ﷺ", "𝔘", "𠮷", "a", " ", "  ", "\n", "\t", "import os", "{}", "\u200b", "\ufeff", "0",
]  # fmt: skip
COUNT = 1000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(demo.find_model())


def content_of(stream: str) -> str:
    bodies = [json.loads(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
    pieces = [choice["delta"].get("content", "") for body in bodies for choice in body["choices"]]
    assert not any("\ufffd" in piece for piece in pieces)
    return "".join(pieces)


def test_streamed_is_unstreamed(serve: Serve, tokenizer: Any) -> None:
    draw = random.Random(0)
    prompts = Prompts(tokenizer, 4096, Limits())
    served = serve(own_prompts=prompts, tokenizer=tokenizer, context=4096)
    ids = [5, 6, 7]

    async def same_prompt(conversation: Any) -> Turn:
        return Turn(ids)

    # The template is not what is tested.
    prompts.chat = same_prompt
    cut_short = 0
    for _ in range(COUNT):
        text = "".join(draw.choices(PARTS, k=draw.randint(1, 8)))
        served.engine.answer = text
        # A third of them end in the middle, perhaps of a character.
        most = None if draw.random() < 0.67 else draw.randint(1, 12)
        asked = {} if most is None else {"max_tokens": most}
        choice = served.chat(**asked).json()["choices"][0]
        whole = choice["message"]["content"]
        assert content_of(served.chat(stream=True, **asked).text) == whole
        if choice["finish_reason"] == "stop":
            assert whole == text
        else:
            cut_short += 1
            assert text.startswith(whole)
    assert cut_short > 100


def test_the_prompt_is_what_the_command_line_makes(tokenizer: Any) -> None:
    """A template rendered in the other process gives the tokens that `foreroute generate` and `chat` compute."""
    import asyncio

    prompts = Prompts(tokenizer, 4096, Limits())
    for messages in (
        [{"role": "user", "content": "12 + 34"}],
        [{"role": "system", "content": "漢"}, {"role": "user", "content": "😀"}, {"role": "assistant", "content": "a"},
         {"role": "user", "content": "<|end|> {{ 1 }}"}],
    ):  # fmt: skip
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        conversation = Dialogue(tuple(DialogueMessage(one["role"], one["content"]) for one in messages))
        assert asyncio.run(prompts.chat(conversation)).prompt_ids == list(expected)
    prompts.close()
