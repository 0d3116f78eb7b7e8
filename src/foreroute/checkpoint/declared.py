"""Read what a checkpoint's files declare of its quantisation, with each value checked against its type.

config.json has it as `quantization_config`. Quantisers also write their own file, and older checkpoints have only that:
quantize_config.json (AutoGPTQ, GPTQModel) or quant_config.json (AutoAWQ).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreroute.checkpoint.index import CheckpointIndex
from foreroute.errors import CheckpointError
from foreroute.whole_files import read_object

_CONFIG = "config.json"
# The quantisers' own files: the method if the file names none, and its keys that differ from config.json's.
_OWN_FILES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "quantize_config.json": ("gptq", {}),
    "quant_config.json": ("awq", {"w_bit": "bits", "q_group_size": "group_size"}),
}
# Keys that decide how stored numbers are read: two files that differ in one cannot both be right.
_DECISIVE = ("bits", "group_size", "checkpoint_format", "dynamic", "zero_point", "version")


@dataclass(frozen=True)
class Declaration:
    """A JSON object with declared settings, and its location.

    file: the file. path: the object's place in it ("quantization_config"); "" for the whole file.
    """

    file: Path
    path: str
    content: Mapping[str, Any]

    def nonsense(self, key: str, wanted: str) -> CheckpointError:
        """Make the error for an impossible value of `key`; `wanted` says what is possible."""
        told = repr(self.content[key]) if key in self.content else "absent"
        place = f"{self.path}.{key}" if self.path else key
        return CheckpointError(
            f"{self.file}: {place} is {told}, which makes no sense: it must be {wanted}. "
            "Correct it, or download the file again."
        )

    def whole(self, key: str, default: int | None = None, *, others: tuple[int, ...] = ()) -> int:
        """Read `key` as an integer of at least 1, or one of `others`; `default` if absent.
        Raises: CheckpointError for other values, and if absent without a default."""
        value = self.content.get(key, default)
        if not is_whole(value) or (value < 1 and value not in others):
            also = "".join(f", or {other}" for other in others)
            raise self.nonsense(key, f"a whole number of at least 1{also}")
        return int(value)

    def text(self, key: str, default: str = "") -> str:
        """Read `key` as a string in lower case; `default` if null or absent. Raises: CheckpointError for others."""
        value = self.content.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.nonsense(key, "a text")
        return value.lower()

    def flag(self, key: str, *, default: bool) -> bool:
        """Read `key` as a boolean; `default` if null or absent. Raises: CheckpointError for other values."""
        value = self.content.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.nonsense(key, "true or false")
        return value

    def within(self, key: str) -> "Declaration":
        """Read `key` as an object, empty if null or absent. Raises: CheckpointError for other values."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.nonsense(key, "an object")
        return Declaration(self.file, f"{self.path}.{key}" if self.path else key, value or {})

    def pair(self, key: str) -> tuple[int, int] | None:
        """Read `key` as two integers of at least 1; None if null or absent. Raises: CheckpointError for others."""
        value = self.content.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(is_whole(one) and one > 0 for one in value):
            raise self.nonsense(key, "a list of two whole numbers of at least 1")
        return value[0], value[1]


def is_whole(value: Any) -> bool:
    """Whether a JSON value is an integer; booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_declaration(folder: Path, index: CheckpointIndex) -> Declaration | None:
    """Read the quantisation that the checkpoint `index` in `folder` declares; None without a declaration.

    A key that config.json leaves out is taken from the quantiser's own file.

    Raises:
        CheckpointError: a file is not a JSON object, or two of them contradict each other.
    """
    declared = _of_config(folder)
    # Other tools use these file names too: they count only where words of integers are stored.
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
        return None  # reading the model's config reports it, with what to do
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
    """Add to config.json's declaration what the quantiser's own file has besides."""
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
