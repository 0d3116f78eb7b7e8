"""Compute bits per character on text that no model was trained on, and read and write the file of such text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreroute.errors import EvaluationError
from foreroute.whole_files import atomic_write, check_no_pointer

FORMAT = 1
# Windows per forward pass at most; fewer where a large vocabulary makes their logits large.
_MOST_ROWS, _LOGIT_BYTES = 4, 64 * 2**20
# Positions whose logits are converted to float32 at a time.
_SLICE = 128


@dataclass(frozen=True)
class HeldOut:
    """Text by source, the weight of each source, and a glossary (word -> gloss) for the `define` task."""

    texts: Mapping[str, str]
    shares: Mapping[str, float]
    glossary: Mapping[str, str]

    def write(self, path: Path) -> None:
        """Write the file that `read_held_out` reads; it appears under its name only when complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as beside:
            beside.write_text(json.dumps({"format": FORMAT, **asdict(self)}), encoding="utf-8")


def read_held_out(path: Path) -> HeldOut:
    """Read a file that `HeldOut.write` wrote.

    Raises:
        EvaluationError: the file is missing or not one of held-out text.
    """
    try:
        check_no_pointer(path, EvaluationError)
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        held_out = HeldOut(**found)
        if not (held_out.texts and held_out.texts.keys() == held_out.shares.keys() and sum(held_out.shares.values())):
            raise ValueError("its texts and their shares do not go together")
        words = [*held_out.texts.values(), *held_out.glossary, *held_out.glossary.values()]
        if not all(isinstance(text, str) for text in words):
            raise ValueError("one of its texts is not a string")
        return held_out
    except FileNotFoundError:
        raise EvaluationError(
            f"There is no held-out text at {path}. In a checkout `make held-out` writes it (it fetches Debian packages "
            "through apt). Or evaluate on text of your own: --text FILE."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(f"{path} is not a file of held-out text ({error}). `make held-out` writes it.") from error


@dataclass(frozen=True)
class TextWindows:
    """Windows of one source: ids [windows, context + 1], and the number of characters of the scored tokens."""

    source: str
    share: float
    ids: Tensor
    chars: int


def cut_windows(
    texts: Mapping[str, str], shares: Mapping[str, float], tokenizer: Any, context: int, per_source: int
) -> list[TextWindows]:
    """Cut evenly spaced windows from `texts` by source; the first token of a window is given, not scored.

    Args:
        shares: weights by source. tokenizer: of transformers. context: scored tokens per window. per_source: windows.
    Raises:
        EvaluationError: a text is shorter than one window.
    """
    cut = []
    for source, text in texts.items():
        ids = tokenizer((tokenizer.bos_token or "") + text, add_special_tokens=False, verbose=False)["input_ids"]
        count = min(per_source, (len(ids) - 1) // context)
        if count < 1:
            raise EvaluationError(
                f"The text {source} has {len(ids)} tokens; one window takes {context + 1}. Give more text or a smaller "
                "--context."
            )
        stride = (len(ids) - 1) // count
        rows = [ids[n * stride : n * stride + context + 1] for n in range(count)]
        cut.append(TextWindows(source, shares[source], torch.tensor(rows), num_chars(tokenizer, rows)))
    return cut


def num_chars(tokenizer: Any, rows: Iterable[Any], given: int = 1) -> int:
    """Characters of all `rows` of token ids, without the first `given` of each."""
    return sum(len(tokenizer.decode(row[given:], skip_special_tokens=False)) for row in rows)


@torch.no_grad()
def bits_per_char(
    model: Callable[..., Any],
    windows: list[TextWindows],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Bits per character of `model`, of any kind, by source, and "all": their mean weighted by the sources' shares.

    Nats of all scored tokens / ln 2 / characters; every window starts with an empty context.

    Args:
        progress: called with (windows done, all windows).
    """
    found: dict[str, float] = {}
    done, total, num_rows = 0, sum(len(one.ids) for one in windows), 1
    for one in windows:
        nats, start = 0.0, 0
        while start < len(one.ids):
            rows = one.ids[start : start + num_rows]
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits.flatten(0, 1)
            for some, labels in zip(logits.split(_SLICE), rows[:, 1:].flatten().split(_SLICE), strict=True):
                nats += torch.nn.functional.cross_entropy(some.float(), labels, reduction="sum").item()
            start += len(rows)
            done += len(rows)
            progress(done, total)
            # The first pass, of one window, shows how large the vocabulary is.
            num_rows = max(1, min(_MOST_ROWS, _LOGIT_BYTES // (4 * logits.shape[-1] * rows.shape[1])))
        found[one.source] = nats / math.log(2) / one.chars
    found["all"] = sum(one.share * found[one.source] for one in windows) / sum(one.share for one in windows)
    return found
