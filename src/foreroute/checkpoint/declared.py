"""What a checkpoint's files declare of its quantisation, value by value, each held to its type.

config.json says it as `quantization_config`. Quantisers write a file of their own beside it, which older checkpoints
have alone: quantize_config.json (AutoGPTQ, GPTQModel) and quant_config.json (AutoAWQ).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreroute.checkpoint.index import CheckpointIndex
from foreroute.errors import CheckpointError
from foreroute.reading import read_object

_CONFIG = "config.json"
# The quantisers' own files: the method where the file names none, and the keys that are called otherwise there.
_OWN_FILES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "quantize_config.json": ("gptq", {}),
    "quant_config.json": ("awq", {"w_bit": "bits", "q_group_size": "group_size"}),
}
# Keys that say how stored numbers are to be read: two files that differ in one cannot both be right.
_DECISIVE = ("bits", "group_size", "checkpoint_format", "dynamic", "zero_point", "version")


@dataclass(frozen=True)
class Declaration:
    """A JSON object that declares something, and where it stands.

    file: the file. path: the object's place in it ("quantization_config"); "" for the whole file.
    """

    file: Path
    path: str
    content: Mapping[str, Any]

    def nonsense(self, key: str, wanted: str) -> CheckpointError:
        """The error for a value that cannot be; `wanted` says what could."""
        told = repr(self.content[key]) if key in self.content else "absent"
        place = f"{self.path}.{key}" if self.path else key
        return CheckpointError(
            f"{self.file}: {place} is {told}, which makes no sense: it must be {wanted}. "
            "Correct it, or download the file again."
        )

    def whole(self, key: str, default: int | None = None, *, least: int = 1, others: tuple[int, ...] = ()) -> int:
        """A whole number of at least `least`, or one of `others`.

        Raises:
            CheckpointError: it is something else, or absent where there is no default.
        """
        value = self.content.get(key, default)
        if not is_whole(value) or (value < least and value not in others):
            also = "".join(f", or {other}" for other in others)
            raise self.nonsense(key, f"a whole number of at least {least}{also}")
        return int(value)

    def text(self, key: str, default: str = "") -> str:
        """A text in lower case; the default where it is null or absent.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.content.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.nonsense(key, "a text")
        return value.lower()

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false; the default where it is null or absent.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.content.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.nonsense(key, "true or false")
        return value

    def within(self, key: str) -> "Declaration":
        """An object; an empty one where it is null or absent.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.content.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.nonsense(key, "an object")
        return Declaration(self.file, f"{self.path}.{key}" if self.path else key, value or {})

    def pair(self, key: str) -> tuple[int, int] | None:
        """Two whole numbers of at least 1; None where it is null or absent.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.content.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(is_whole(one) and one > 0 for one in value):
            raise self.nonsense(key, "a list of two whole numbers of at least 1")
        return value[0], value[1]


def is_whole(value: Any) -> bool:
    """A whole number, as JSON has it: true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_declaration(folder: Path, index: CheckpointIndex) -> Declaration | None:
    """What the checkpoint in `folder` declares of its quantisation; None where it declares nothing.

    A key that config.json leaves out is taken from the quantiser's own file.

    Raises:
        CheckpointError: a file is no JSON object, or two of them contradict each other.
    """
    declared = _of_config(folder)
    # Others than quantisers have files of these names: they count where words of integers are stored.
    has_words = any(name.endswith("qweight") for name in index.tensors)
    for name, (method, renamed) in _OWN_FILES.items():
        if not has_words or not (folder / name).is_file():
            continue
        found = read_object(folder / name, CheckpointError)
        content = {"quant_method": method, **{renamed.get(key, key): value for key, value in found.items()}}
        own = Declaration(folder / name, "", content)
        if declared is None:
            return own
        if declared.text("quant_method") == own.text("quant_method"):
            return _completed(declared, own)
    if declared is None and (folder / "hf_quant_config.json").is_file():
        return Declaration(folder / "hf_quant_config.json", "", {"quant_method": "modelopt"})
    return declared


def _of_config(folder: Path) -> Declaration | None:
    try:
        config = read_object(folder / _CONFIG, CheckpointError)
    except CheckpointError:
        return None  # which is said, with what to do, where the model's config is read
    for path, holder in (("", config), ("text_config.", config.get("text_config"))):
        for key in ("quantization_config", "compression_config"):
            declared = holder.get(key) if isinstance(holder, dict) else None
            if declared is None or declared == {}:
                continue
            if not isinstance(declared, dict):
                raise Declaration(folder / _CONFIG, path.rstrip("."), {key: declared}).nonsense(key, "an object")
            return Declaration(folder / _CONFIG, path + key, declared)
    return None


def _completed(declared: Declaration, own: Declaration) -> Declaration:
    """What config.json declares, and what the quantiser's own file adds to it."""
    for key in _DECISIVE:
        told, also_told = (one.content.get(key) for one in (declared, own))
        if told is None or also_told is None:
            continue
        if _plain(told) != _plain(also_told):
            raise CheckpointError(
                f"{declared.file}: {declared.path}.{key} is {told!r}, but {own.file.name} says {also_told!r}. "
                "They are of different downloads, or one was changed: take both from one place."
            )
    given = {key: value for key, value in declared.content.items() if value is not None}
    return Declaration(declared.file, declared.path, {**own.content, **given})


def _plain(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
