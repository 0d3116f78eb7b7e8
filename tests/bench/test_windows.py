"""What is read: pieces of a text, or random ids, and never tokens that the model does not have."""

import pytest
import torch

from foreroute.bench.passage import PASSAGE
from foreroute.bench.run import Case
from foreroute.bench.windows import GIVEN_TEXT, OWN_TEXT, RANDOM, Windows, read_windows
from foreroute.errors import CheckpointError, PromptError


def test_runs_read_pieces_spread_over_the_text_which_begins_anew():
    windows = Windows(torch.arange(10), "x")
    assert windows.of(Case(2, 3, 1), 2).tolist() == [[[0, 1, 2, 3], [2, 3, 4, 5]], [[5, 6, 7, 8], [7, 8, 9, 0]]]
    assert windows.of(Case(1, 12, 0), 1)[0, 0].tolist() == [*range(10), 0, 1]


def test_text_of_the_tokenizer_or_random_ids(tiny, without_tokenizer, tmp_path):
    own = read_windows(tiny, None, 260)
    assert own.source == OWN_TEXT
    # Every byte is a token of this tokenizer.
    assert own.of(Case(1, len(PASSAGE.encode()), 0), 1).unique().numel() > 40
    file = tmp_path / "text"
    file.write_text("abab")
    given = read_windows(tiny, file, 260)
    assert given.source == GIVEN_TEXT
    (row,) = given.of(Case(1, 6, 0), 1)[0].tolist()
    assert row[:2] == row[2:4] == row[4:6]
    random = read_windows(without_tokenizer, None, 260)
    assert random.source == RANDOM
    assert 200 < random.of(Case(1, 4096, 0), 1).unique().numel() <= 260


def test_what_cannot_be_read_is_refused(tiny, without_tokenizer, tmp_path):
    with pytest.raises(PromptError, match="cannot be read"):
        read_windows(tiny, tmp_path / "absent", 260)
    (tmp_path / "empty").write_text("")
    with pytest.raises(PromptError, match="empty"):
        read_windows(tiny, tmp_path / "empty", 260)
    with pytest.raises(CheckpointError, match="tokenizer"):
        read_windows(without_tokenizer, tmp_path / "empty", 260)
    with pytest.raises(PromptError, match="the model only 100"):
        read_windows(tiny, None, 100)
