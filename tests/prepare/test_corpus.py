"""The same windows every time, spread over the text; what is no text is named."""

from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.errors import PredictorError
from foreroute.prepare.corpus import Corpus, read_corpus


class Bytes:
    """A tokenizer of single bytes."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_windows_do_not_cross_files_and_ends_are_dropped(tmp_path: Path) -> None:
    files = [written(tmp_path / "a", "abcdefg"), written(tmp_path / "b", "hijkl")]
    corpus = read_corpus(Bytes(), files, None, 3)
    assert [bytes(row).decode() for row in corpus.windows.tolist()] == ["abc", "def", "hij"]


def test_fewer_tokens_are_spread_over_all_of_the_text(tmp_path: Path) -> None:
    text = "".join(chr(97 + at // 100) for at in range(2000))
    corpus = read_corpus(Bytes(), [written(tmp_path / "a", text)], 20, 4)
    assert corpus.num_tokens == 20
    firsts = [chr(row[0]) for row in corpus.windows.tolist()]
    assert firsts == ["a", "e", "i", "m", "q"]
    assert read_corpus(Bytes(), [tmp_path / "a"], 20, 4).digest == corpus.digest
    assert read_corpus(Bytes(), [tmp_path / "a"], 24, 4).digest != corpus.digest


def test_held_out_windows_are_the_every_nth_and_never_all_or_none() -> None:
    fitted, held_out = Corpus(torch.arange(8)[:, None], "").split(4)
    assert fitted.flatten().tolist() == [0, 1, 2, 4, 5, 6]
    assert held_out.flatten().tolist() == [3, 7]
    fitted, held_out = Corpus(torch.arange(2)[:, None], "").split(8)
    assert (len(fitted), len(held_out)) == (1, 1)


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe", "not UTF-8"), (b"short", "at least 2"), (None, "cannot be read")]
)
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PredictorError, match=message):
        read_corpus(Bytes(), [path], None, 4)
