"""A grammar holds behind reasoning: what the prompt opened, what the model opens, and gpt-oss's channels."""

import copy
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")

import torch

from foreroute.structured.compiler import GrammarCompiler
from foreroute.structured.grammar import Grammar
from foreroute.structured.reasoning import behind_reasoning
from tests.cli.harness import make_tokenizer

END, PAD = 0, 1
NUMBER = Grammar.regex("[0-9]+")
MARKS = ("<think>", "</think>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>")
THINKS, CHANNELS = "{{ messages }}<think></think>", "{{ messages }}<|channel|>"


@pytest.fixture(scope="module")
def plain() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module", params=[(), MARKS], ids=["text", "special"])
def tokenizer(request: Any, plain: Any) -> Any:
    made = copy.deepcopy(plain)
    made.add_special_tokens({"additional_special_tokens": list(request.param)})
    return made


def taken(tokenizer: Any, grammar: Grammar, text: str, end: int = END) -> bool:
    mask = GrammarCompiler(tokenizer, len(tokenizer), (end,)).compile(grammar).start()
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not mask.allowed()[token]:
            return False
        mask.accept(token)
    return bool(mask.allowed()[end])


@pytest.mark.parametrize(
    ("template", "prompt", "good", "bad"),
    [
        (THINKS, "Hi<think>\n", ["so: 3</think>\n\n12", "</think>1"], ["12"]),
        (THINKS, "Hi", ["<think>so: 3</think>\n\n12", "12"], ["so: 12", "<think>12"]),
        (THINKS, "Hi<think>\n\n</think>\n\n", ["12"], ["<think>3</think>12"]),
        ("{{ messages }}", "Hi", ["12"], ["<think>3</think>12"]),
        ({"default": THINKS}, "Hi<think>", ["3</think>12"], ["12"]),
        (None, "Hi", ["12"], ["<think>3</think>12"]),
    ],
)
def test_thoughts(tokenizer: Any, template: Any, prompt: str, good: list[str], bad: list[str]) -> None:
    own = copy.copy(tokenizer)
    own.chat_template = template
    grammar = behind_reasoning(NUMBER, own, prompt)
    assert [text for text in good if not taken(own, grammar, text)] == []
    assert [text for text in bad if taken(own, grammar, text)] == []


def test_channels(plain: Any) -> None:
    tokenizer = copy.deepcopy(plain)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.chat_template = CHANNELS
    grammar = behind_reasoning(NUMBER, tokenizer, "Hi")
    answer = "<|channel|>final<|message|>12"
    thought = "<|channel|>analysis<|message|>so: 3<|end|><|start|>assistant"
    # The end token of the other tests is one of the marks.
    assert taken(tokenizer, grammar, answer, PAD)
    assert taken(tokenizer, grammar, thought + answer, PAD)
    assert not taken(tokenizer, grammar, "12", PAD)


def test_a_row_that_has_ended_is_padded(plain: Any) -> None:
    two, six = (plain(one, add_special_tokens=False)["input_ids"][0] for one in "26")
    processor = GrammarCompiler(plain, len(plain), (END,)).compile(Grammar.regex("222|6")).processor()
    scores = torch.zeros(2, len(plain))
    processor(torch.tensor([[9], [9]]), scores)
    processor(torch.tensor([[9, two], [9, six]]), scores)
    # Beams change places too.
    for rows in ([[9, six, END], [9, two, two]], [[9, six, END, PAD], [9, two, two, two]]):
        masked = processor(torch.tensor(rows), scores)
        assert torch.equal(masked[0], scores[0])
        assert masked[1].isfinite().nonzero().flatten().tolist() == [two if len(rows[1]) == 3 else END]
    masked = processor(torch.tensor([[9, six, END, PAD, PAD], [9, two, two, two, END]]), scores)
    assert torch.equal(masked, scores)
