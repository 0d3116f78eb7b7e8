"""What is drawn within a schema's grammar is valid by the schema, whatever a model's logits are."""

import json
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")
import jsonschema_rs
from llguidance import LLMatcher

from foreroute.cli.commands import demo
from foreroute.model.text import load_tokenizer
from foreroute.structured.grammar import Grammar
from foreroute.structured.limits import limits
from foreroute.structured.mask import GrammarMask
from foreroute.structured.vocabulary import vocabulary_of
from tests.support.schemas import SCHEMAS

VOCABULARY, ENDS = 4096, frozenset({0, 4})
MOST_NEW = 120


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    return vocabulary_of(load_tokenizer(demo.find_model()), VOCABULARY, ENDS)


@pytest.fixture(scope="module")
def closing(vocabulary: Any) -> torch.Tensor:
    """Tokens that bring JSON to its end; without a push, noise writes long texts."""
    wanted = [text.encode() for text in ('"', "}", "]", '"}', ",", ":", "0", "1")]
    return torch.tensor([one for one in range(VOCABULARY) if vocabulary.decode_bytes([one]) in wanted])


def drawn(vocabulary: Any, schema: dict[str, Any], closing: torch.Tensor, seed: int) -> str | None:
    """The answer of a model whose logits are noise; None where it did not end."""
    matcher = LLMatcher(vocabulary, Grammar.json_schema(schema).text, log_level=0, limits=limits())
    assert not matcher.is_error(), matcher.get_error()
    mask, ids, noise = GrammarMask(matcher, VOCABULARY, ENDS), [], torch.Generator().manual_seed(seed)
    for _ in range(MOST_NEW):
        logits = torch.randn(VOCABULARY, generator=noise)
        logits[closing] += 4.0
        token = int(torch.multinomial(torch.softmax(mask.apply(logits), -1), 1, generator=noise))
        if token not in ENDS:
            ids.append(token)
        mask.accept(token)
        if token in ENDS or mask.is_complete:
            return vocabulary.decode_bytes(ids).decode()
    return None


def test_every_finished_answer_is_valid(vocabulary: Any, closing: torch.Tensor) -> None:
    assert len(SCHEMAS) >= 200
    num_finished = 0
    for at, (name, schema) in enumerate(SCHEMAS.items()):
        said = drawn(vocabulary, schema, closing, at)
        if said is None:
            continue
        num_finished += 1
        # A leap second: allowed at any minute by the format's grammar, and by no validator.
        value = json.loads(said.replace(":60", ":59") if schema.get("format") in ("time", "date-time") else said)
        jsonschema_rs.validator_for(schema, validate_formats=True).validate(value), (name, said)
    assert num_finished > 0.9 * len(SCHEMAS)
