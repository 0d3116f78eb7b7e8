"""Token ids for every run: windows of a text, or random ids for a model without a tokenizer."""

from pathlib import Path
from typing import Any

import torch

from foreroute.bench.passage import PASSAGE
from foreroute.bench.run import Case
from foreroute.errors import CheckpointError, CorruptCheckpointError, PromptError
from foreroute.model.text import load_tokenizer
from foreroute.whole_files import read_text

# Sources of the token ids.
OWN_TEXT, GIVEN_TEXT, RANDOM = "built-in passage", "text file", "random ids"


class Windows:
    """Gives every run of a case another window, spread evenly over the text, which wraps around at its end.

    Args:
        ids: [tokens] of the whole text. source: where they come from.
    """

    def __init__(self, ids: torch.Tensor, source: str) -> None:
        self._ids = ids
        self.source = source

    def of(self, case: Case, repeats: int) -> torch.Tensor:
        """[repeats, batch, prompt_tokens + new_tokens] token ids for the runs of `case`."""
        length, count = case.prompt_tokens + case.new_tokens, repeats * case.batch
        starts = torch.arange(count) * len(self._ids) // count
        rows = self._ids[(starts[:, None] + torch.arange(length)) % len(self._ids)]
        return rows.view(repeats, case.batch, length)


def read_windows(folder: Path, text: Path | None, vocab_size: int) -> Windows:
    """Read `text`, or the built-in passage, with the tokenizer in `folder`; without one, draw ids below `vocab_size`.

    Raises:
        PromptError: the text cannot be read, is empty, or has tokens that the model does not know.
        CheckpointError: a text is given, and the model has no tokenizer.
    """
    written = PASSAGE if text is None else read_text(text, PromptError)
    try:
        tokenizer: Any = load_tokenizer(folder)
    except CorruptCheckpointError:
        # The tokenizer exists but is damaged: not the same as none.
        raise
    except CheckpointError:
        if text is not None:
            raise
        generator = torch.Generator().manual_seed(0)
        return Windows(torch.randint(0, vocab_size, (2**16,), generator=generator), RANDOM)
    ids = torch.tensor(tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if not len(ids):
        raise PromptError(f"{text} is empty: there is nothing to read in it.")
    if int(ids.max()) >= vocab_size:
        raise PromptError(
            f"The tokenizer has a token {int(ids.max())}, the model only {vocab_size}: they do not belong together."
        )
    return Windows(ids, OWN_TEXT if text is None else GIVEN_TEXT)
