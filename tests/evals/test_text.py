"""Bits per character: what they count, and the file that held-out text lies in."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from foreroute.errors import EvaluationError
from foreroute.evals.answers import wilson
from foreroute.evals.text import HeldOut, bits_per_char, cut_windows, read_held_out


class Letters:
    """A tokenizer of one token per character."""

    bos_token = "^"

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(map(chr, ids))


def uniform(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
    """A model that knows nothing over 128 tokens: 7 bits each."""
    return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 128))


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary() -> None:
    windows = cut_windows({"a": "abc" * 100, "b": "xy" * 40}, {"a": 0.75, "b": 0.25}, Letters(), 20, per_source=3)
    assert [len(one.ids) for one in windows] == [3, 3]
    assert [one.chars for one in windows] == [60, 60]
    bits = bits_per_char(uniform, windows)
    assert bits == pytest.approx({"a": 7, "b": 7, "all": 7})


def test_all_is_weighted_by_share() -> None:
    def sure_of_a(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, 128)
        logits[..., ord("a")] = 1e4
        return SimpleNamespace(logits=logits / 1e3)

    windows = cut_windows({"a": "a" * 99, "b": "b" * 99}, {"a": 0.9, "b": 0.1}, Letters(), 10, per_source=2)
    bits = bits_per_char(sure_of_a, windows)
    miss = math.log2(math.exp(10) + 127)
    assert bits["b"] == pytest.approx(miss)
    assert bits["all"] == pytest.approx(0.1 * miss + 0.9 * (miss - 10 / math.log(2)), rel=1e-4)


def test_windows_start_at_the_beginning_token_and_are_spread() -> None:
    (one,) = cut_windows({"a": "".join(map(chr, range(65, 125)))}, {"a": 1}, Letters(), 9, per_source=2)
    assert one.ids[:, 0].tolist() == [ord("^"), ord("^") - 94 + 65 + 29]
    with pytest.raises(EvaluationError, match="a smaller --context"):
        cut_windows({"a": "short"}, {"a": 1}, Letters(), 9, per_source=2)


def test_the_file_is_read_back_and_others_are_refused(tmp_path: Path) -> None:
    text = HeldOut({"a": "some text"}, {"a": 1.0}, {"ant": "a small insect"})
    text.write(tmp_path / "new" / "text.json")
    assert read_held_out(tmp_path / "new" / "text.json") == text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["text.json"]
    with pytest.raises(EvaluationError, match="make held-out"):
        read_held_out(tmp_path / "absent.json")
    whole = '{"format": 1, "glossary": {}, "texts": %s, "shares": %s}'
    unequal = [whole % pair for pair in (('{"a": "b"}', "{}"), ("{}", "{}"), ("[]", "[]"), ('{"a": "b"}', '{"a": 0}'))]
    for content in ("{}", "[]", "not json", '{"format": 2}', '{"format": 1, "texts": {}}', *unequal):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(EvaluationError, match=r"bad\.json is not a file of held-out text"):
            read_held_out(tmp_path / "bad.json")


def test_the_interval_holds_the_share_and_narrows() -> None:
    assert wilson(0, 20)[0] == 0
    assert wilson(20, 20)[1] == 1
    low, high = wilson(50, 100)
    # Against the closed form at one half: 0.5 +- 1.96 / (2 sqrt(n + 1.96^2)).
    assert (low, high) == pytest.approx((0.5 - 0.98 / math.sqrt(103.84), 0.5 + 0.98 / math.sqrt(103.84)), abs=1e-3)
    assert wilson(500, 1000)[0] > low
