"""Cut text files into windows of tokens, reproducibly; and what an encoder-decoder is given of a window.

Where the tokenizer has sentinels, an encoder-decoder gets text with gaps, as in the training of T5 and Switch
Transformers: the encoder reads it with a sentinel in place of each gap, and the decoder writes what was in the gaps, a
sentinel before each. Without sentinels the decoder writes what the encoder reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from foreroute.errors import PredictorError
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.generation_settings import decoder_start
from foreroute.model.text import sentinels
from foreroute.whole_files import read_text

# At most this many characters per wanted token are tokenised: tokens are rarely longer on average.
_CHARS_PER_TOKEN = 12
# Of T5's training: the share of tokens in gaps, and the tokens of a gap, on average.
_GAP_SHARE, _GAP_TOKENS = 0.15, 3


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


def read_corpus(
    tokenizer: Any, files: Sequence[Path], num_tokens: int | None, context: int, start: int | None = None
) -> Corpus:
    """Cut `files` into windows of `context` tokens by `tokenizer`; from a longer text, windows are spread evenly.

    Args:
        num_tokens: the most tokens; None for all. start: an encoder-decoder's `decoder_start`: where the tokenizer has
            sentinels, windows then hold both sides of a text with gaps, see `with_gaps`.
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
    # Where it is in a text, the token would be taken for the beginning of the decoder's side.
    windows = [window for window in windows if start not in window]
    if len(windows) < 2:
        raise PredictorError(
            f"The text has {len(windows)} windows of {context} tokens; at least 2 are needed, one to fit and one to "
            "hold out, and some hundreds are good. Give more text, or a smaller --context."
        )
    if most is not None and len(windows) > most:
        windows = [windows[at * len(windows) // most] for at in range(most)]
    ids_of_all = torch.tensor(windows)
    if start is not None and (gaps := sentinels(tokenizer)):
        ids_of_all = with_gaps(ids_of_all, gaps, start, tokenizer.eos_token_id)
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


def with_gaps(windows: torch.Tensor, sentinels: tuple[int, ...], start: int, end: int | None) -> torch.Tensor:
    """Turn windows of text into what both sides are given: the encoder's tokens, `start`, the decoder's other tokens.

    The gaps' places are drawn anew for each window, the same ones in each run; their number and length are those of
    the windows' length.

    Args:
        windows: [windows, context] token ids of a text, without `start`. sentinels: ids, in the order of their use.
        start: the decoder's first token. end: the encoder's last token, if it has one.
    Returns:
        [windows, both sides] token ids; `sides` parts them.
    """
    context = windows.shape[1]
    num_gaps = min(max(1, round(context * _GAP_SHARE / _GAP_TOKENS)), len(sentinels), context // (2 * _GAP_TOKENS))
    if not num_gaps:
        return torch.cat([windows, torch.full((len(windows), 1), start), windows[:, :-1]], 1)
    generator = torch.Generator().manual_seed(0)
    # Each gap lies in its own stretch of the window, so that no two touch.
    stretch = context // num_gaps
    made = []
    for window in windows.tolist():
        offsets = torch.randint(stretch - _GAP_TOKENS, (num_gaps,), generator=generator).tolist()
        reads, writes, at = list[int](), [start], 0
        for number, offset in enumerate(offsets):
            begin = number * stretch + offset
            reads += [*window[at:begin], sentinels[number]]
            at = begin + _GAP_TOKENS
            writes += [sentinels[number], *window[begin:at]]
        reads += [*window[at:], *([] if end is None else [end])]
        made.append(reads + writes)
    return torch.tensor(made)


def sides(windows: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Part `windows` [windows, context] into the encoder's tokens and the decoder's.

    Args:
        start: the decoder's first token: its side begins where all windows have it, at the first such place. Without
            one the decoder writes the whole window, one token behind.
    """
    places = (windows[:, 1:] == start).all(0).nonzero().flatten().tolist()
    if places:
        return windows[:, : places[0] + 1], windows[:, places[0] + 1 :]
    return windows, torch.cat([torch.full((len(windows), 1), start), windows[:, :-1]], 1)


def calls_of(model: OffloadedModel, windows: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """How `model` is called with `windows` [rows, context]: its arguments, and the ids that decoded steps would have.

    Returns:
        The keyword arguments; and [rows, positions], of the decoder where there is one.
    """
    start = decoder_start(model)
    if start is None:
        return {"input_ids": windows}, windows
    reads, writes = sides(windows, start)
    return {"input_ids": reads, "decoder_input_ids": writes}, writes
