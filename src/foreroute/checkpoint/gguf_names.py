"""What the names of GGUF files say: which is a model, which are the parts of one, which one a folder means."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from foreroute.errors import CheckpointError, CorruptCheckpointError

SUFFIX = ".gguf"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.(?i:gguf))")
# A file cut in pieces, as some upload it; unlike parts they are no GGUF files themselves.
_PIECE = re.compile(r"(.+\.gguf)(?:\.part\d+of\d+|-split-[a-z]+)", re.IGNORECASE)
# Files that lie beside a model, as llama.cpp tells them by their names: projectors, importance matrices; draft heads.
_NO_MODELS = {"mmproj": "a projector", "imatrix": "an importance matrix"}
_DRAFTS = ("mtp-", "eagle3-", "dflash-", "dspark-")


@dataclass(frozen=True)
class PartName:
    """What the name of one of a model's files says.

    stem: the name without its end. number: of the part, from 1. suffix: .gguf, as it is spelled.
    """

    stem: str
    number: int
    count: int
    suffix: str = SUFFIX

    @property
    def siblings(self) -> tuple[str, ...]:
        """The names of all parts, in order."""
        return tuple(
            f"{self.stem}-{number:05d}-of-{self.count:05d}{self.suffix}" for number in range(1, self.count + 1)
        )


def part_of(name: str) -> PartName | None:
    """Which part of a model in several files the name (or path) is of; None for a file that is all of its model."""
    found = _PART.fullmatch(name)
    part = found and PartName(found[1], int(found[2]), int(found[3]), found[4])
    return part if part and 1 <= part.number <= part.count else None


def is_gguf_name(name: str) -> bool:
    """Whether the name is a GGUF file's: its ending in any case."""
    return name.lower().endswith(SUFFIX)


def is_model_name(name: str) -> bool:
    """Whether a file of this name (or path) is a GGUF model, or a part of one."""
    return is_gguf_name(name) and not _other_kind(name)


def _other_kind(name: str) -> str:
    """What a GGUF file of this name is, if it is no model; "" for one."""
    base = name.rpartition("/")[2].lower()
    if base.startswith(_DRAFTS):
        return "a draft head"
    return next((kind for word, kind in _NO_MODELS.items() if word in base), "")


def passed_over(names: Iterable[str], place: str) -> str:
    """Say which GGUF files are not taken for models and what to do, each kind once, with a space before; "" for none.

    Args:
        place: what is written before a file's name to load that file: a folder and "/", or a hub id and ":".
    """
    said: dict[str, str] = {}
    for name in sorted(names):
        piece = _PIECE.fullmatch(name)
        if piece:
            text = f"download all pieces and join them with cat, in order, into {piece[1]}."
            said.setdefault("a piece", f" {name} is a piece of a file: {text}")
        elif is_gguf_name(name) and (kind := _other_kind(name)):
            said.setdefault(kind, f" {name} is {kind} by its name; if it is a model, give {place}{name}.")
    return "".join(said.values())


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that has one, and no checkpoint of another kind; None where there is none.

    Raises:
        CheckpointError: there are several.
    """
    if (folder / "config.json").is_file():
        return None
    files = (path for path in folder.glob("*") if is_model_name(path.name))
    # Of parts the first.
    found = sorted(path for path in files if (part := part_of(path.name)) is None or part.number == 1)
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds {len(found)} GGUF files ({', '.join(path.name for path in found[:3])}"
            f"{' ...' if len(found) > 3 else ''}). Give the path of one of them."
        )
    return found[0] if found else None


def first_part(path: Path) -> Path:
    """The first part of a model in several files, which has the settings, for any of them; else `path`."""
    part = part_of(path.name)
    first = path if part is None else path.with_name(part.siblings[0])
    if not first.is_file():
        raise CorruptCheckpointError(
            f"{first} is absent, the first part of the model of {path.name}. Download it, too."
        )
    return first
