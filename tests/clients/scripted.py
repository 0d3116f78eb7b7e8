"""A scripted model behind a real socket: it reasons, calls tools in its format, and answers what calls came to."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from foreroute.server.backend import Backend, Prompts, Serving
from foreroute.server.dialogue.parsing.formats import Format, format_named
from foreroute.server.settings import Limits, ServerSettings
from foreroute.structured.compiler import GrammarCompiler
from tests.server.dialogue import templates
from tests.server.dialogue.answers import Written
from tests.server.dialogue.conftest import RenderedHere
from tests.server.fake_engine import FakeEngine
from tests.server.sockets import running

THOUGHT, TEXT, AGAIN, AFTER = "Two times 23.", "It is 46.", "It is 47.", "It is done."
QUESTION, ASK_AGAIN, CALL, RESULT, PERSON_QUESTION = "How much?", "And one more?", "Do it.", "it came to 7", "Who?"
PERSON = {"name": "Ada", "is_old": True}
_PERSON_TEXT = '{"name": "Ada", "is_old": true}'


class ScriptedEngine(FakeEngine):
    """Answers by what the prompt says last; a later turn only where the earlier ones are in the prompt.

    has_channels: answers come in channels, as gpt-oss writes them. calls: the text that calls tools.
    """

    def __init__(self, tokenizer: Any, has_channels: bool, calls: str) -> None:
        super().__init__(tokenizer, context=32768)
        self._has_channels, self._calls = has_channels, calls

    def submit(self, request: Any, on_event: Any) -> int:
        prompt = self._tokenizer.decode(list(request.prompt_ids))
        self.answer = self._answer_to(prompt)
        return super().submit(request, on_event)

    def _answer_to(self, prompt: str) -> str:
        if RESULT in prompt:
            return self._said(AFTER)
        if CALL in prompt:
            return self._calls
        if PERSON_QUESTION in prompt:
            return self._said(_PERSON_TEXT)
        if ASK_AGAIN in prompt:
            whole = QUESTION in prompt and TEXT in prompt
            return self._said(AGAIN if whole else "The first turn is not in the prompt.")
        return self._said(TEXT, THOUGHT)

    def _said(self, text: str, thought: str = "") -> str:
        if not self._has_channels:
            return f"<think>{thought}</think>{text}" if thought else text
        analysis = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
        return f"{analysis}<|channel|>final<|message|>{text}<|return|>"


def with_markers(byte_tokenizer: Any, own: Format) -> Any:
    """The tokenizer with a format's special tokens and a template for it."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = templates.HARMONY if own.has_channels else templates.HERMES
    tokenizer.add_special_tokens({"additional_special_tokens": list(own.markers)})
    return tokenizer


@contextlib.contextmanager
def compiler(byte_tokenizer: Any) -> Iterator[GrammarCompiler]:
    """One for all models, as each tries a grammar in a new process: the engine draws no token by it."""
    tokenizer = with_markers(byte_tokenizer, format_named("harmony"))
    made = GrammarCompiler(tokenizer, len(tokenizer), [0])
    yield made
    made.close()


@contextlib.contextmanager
def scripted(byte_tokenizer: Any, written: Written, grammars: GrammarCompiler) -> Iterator[str]:
    """While inside, a model that calls tools as `written` does is served at the URL that this gives."""
    own = format_named(written.format)
    tokenizer = with_markers(byte_tokenizer, own)
    prompts = Prompts(tokenizer, len(tokenizer), Limits(), calls=own)
    prompts._renderer = RenderedHere(tokenizer.chat_template, {})
    engine = ScriptedEngine(tokenizer, own.has_channels, written.text)
    serving = Serving(engine, prompts, engine.context, grammars=grammars)
    with running(Backend(serving), ServerSettings(served_names=("scripted",))) as url:
        yield url
