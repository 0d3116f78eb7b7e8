"""Cut text files into windows of tokens, reproducibly."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from foreroute.errors import PredictorError
from foreroute.whole_files import read_text

# At most this many characters per wanted token are tokenised: tokens are rarely longer on average.
_CHARS_PER_TOKEN = 12


@dataclass(frozen=True)
class Corpus:
    """Text as token ids [windows, context], in the order of the files; `digest` identifies it."""

    windows: torch.Tensor
    digest: str

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows."""
        return self.windows.numel()

    def split(self, every: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hold out every `every`-th window: (others, held out), each [windows, context] and not empty."""
        held_out = torch.zeros(len(self.windows), dtype=torch.bool)
        held_out[every - 1 :: every] = True
        if not held_out.any():
            held_out[-1] = True
        return self.windows[~held_out], self.windows[held_out]


def read_corpus(tokenizer: Any, files: Sequence[Path], num_tokens: int | None, context: int) -> Corpus:
    """Cut `files` into windows of `context` tokens by `tokenizer`; from a longer text, windows are spread evenly.

    Args:
        num_tokens: the most tokens; None for all.
    Raises:
        PredictorError: a file cannot be read, is not UTF-8, or there is less than two windows of text.
    """
    texts = [read_text(path, PredictorError) for path in files]
    most = None if num_tokens is None else max(2, num_tokens // context)
    pieces = _thinned(texts, most, context)
    windows: list[list[int]] = []
    for piece in pieces:
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        windows += [ids[at : at + context] for at in range(0, len(ids) - context + 1, context)]
    if len(windows) < 2:
        raise PredictorError(
            f"The text has {len(windows)} windows of {context} tokens; at least 2 are needed, one to fit and one to "
            "hold out, and some hundreds are good. Give more text, or a smaller --context."
        )
    if most is not None and len(windows) > most:
        windows = [windows[at * len(windows) // most] for at in range(most)]
    ids_of_all = torch.tensor(windows)
    return Corpus(ids_of_all, xxhash.xxh3_128(ids_of_all.numpy().tobytes()).hexdigest())


def _thinned(texts: Sequence[str], most: int | None, context: int) -> list[str]:
    """The texts, or, where they are far longer than `most` windows, pieces of them spread evenly."""
    num_chars = sum(map(len, texts))
    piece = context * _CHARS_PER_TOKEN
    if most is None or num_chars <= most * piece:
        return list(texts)
    stride = num_chars / most
    pieces: list[str] = []
    start = 0.0
    for text in texts:
        while start < len(text):
            pieces.append(text[int(start) : int(start) + piece])
            start += stride
        start -= len(text)
    return pieces
