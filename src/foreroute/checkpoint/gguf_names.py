"""What the names of GGUF files say: which is a model, which are the parts of one, which one a folder means."""

import re
from dataclasses import dataclass
from pathlib import Path

from foreroute.errors import CheckpointError, CorruptCheckpointError

SUFFIX = ".gguf"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# Files that lie beside a model, as llama.cpp tells them by their names: projectors, importance matrices; draft heads.
_NO_MODELS = ("mmproj", "imatrix")
_DRAFTS = ("mtp-", "eagle3-", "dflash-", "dspark-")


@dataclass(frozen=True)
class PartName:
    """What the name of one of a model's files says. stem: the name without its end. number: of the part, from 1."""

    stem: str
    number: int
    count: int

    @property
    def siblings(self) -> tuple[str, ...]:
        """The names of all parts, in order."""
        return tuple(f"{self.stem}-{number:05d}-of-{self.count:05d}{SUFFIX}" for number in range(1, self.count + 1))


def part_of(name: str) -> PartName | None:
    """Which part of a model in several files the name (or path) is of; None for a file that is all of its model."""
    found = _PART.fullmatch(name)
    part = found and PartName(found[1], int(found[2]), int(found[3]))
    return part if part and 1 <= part.number <= part.count else None


def is_model_name(name: str) -> bool:
    """Whether a GGUF file of this name (or path) is a model, or a part of one."""
    base = name.rpartition("/")[2].lower()
    return not any(word in base for word in _NO_MODELS) and not base.startswith(_DRAFTS)


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that has one, and no checkpoint of another kind; None where there is none.

    Raises:
        CheckpointError: there are several.
    """
    if (folder / "config.json").is_file():
        return None
    files = (path for path in folder.glob(f"*{SUFFIX}") if is_model_name(path.name))
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
