"""A grammar holds for the answer behind reasoning that the prompt has opened, and not for the reasoning."""

import copy
from typing import Any

import pytest
from transformers import AddedToken

pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")

from foreroute.server.backend import Prompts
from foreroute.server.settings import Limits
from foreroute.structured.compiler import GrammarCompiler
from foreroute.structured.grammar import Grammar
from foreroute.structured.reasoning import behind_reasoning
from tests.cli.harness import SPECIAL

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: <think>\n{# </think> #}"


def test_reasoning_is_free(serve: Any, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(SPECIAL) + 256
    monkeypatch.setattr(byte_tokenizer, "chat_template", TEMPLATE)
    prompts = Prompts(byte_tokenizer, size, Limits())
    try:
        served = serve(own_prompts=prompts, context=512)
        served.backend.serving().grammars = GrammarCompiler(byte_tokenizer, size, [0])
        answer = served.chat(guided_regex="[0-9]+")
        assert answer.status_code == 200, answer.text
        mask = served.engine.requests[-1].grammar.start()
        for token in byte_tokenizer("so: 3</think>\n\n12", add_special_tokens=False)["input_ids"]:
            assert mask.allowed()[token]
            mask.accept(token)
        assert mask.allowed()[0]
        assert not mask.allowed()[byte_tokenizer("x", add_special_tokens=False)["input_ids"][0]]
    finally:
        prompts.close()


def test_the_server_and_python_know_the_same_special_tokens(byte_tokenizer: Any) -> None:
    """Also one that is marked as special where it was added, and has no name among the tokenizer's own."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens([AddedToken(tag, special=True) for tag in ("<think>", "</think>")])
    prompts = Prompts(tokenizer, len(tokenizer), Limits())
    try:
        token = tokenizer.convert_tokens_to_ids("</think>")
        assert prompts.special_id("</think>") == token
        assert f"<[{token}]>" in behind_reasoning(Grammar.regex("a"), tokenizer, "Hi <think>").text
        assert prompts.special_id("x") is None
        assert prompts.special_id(SPECIAL[0]) == tokenizer.convert_tokens_to_ids(SPECIAL[0])
    finally:
        prompts.close()
