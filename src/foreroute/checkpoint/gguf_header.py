"""Parse the header of a GGUF file: its settings and the table of its tensors.

Not by the gguf package's reader, which maps the file (a mapped file that is cut off kills the process) and believes a
damaged header: a length that lies there costs as much memory as the file has. Here nothing is read that the file does
not hold, and memory is that of the settings that are kept.
"""

import struct
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from foreroute.checkpoint.source_files import SourceFile
from foreroute.errors import UnsupportedModelError
from foreroute.types import round_up

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Facts of the format: numbers of the types of settings, and how struct names those of one number.
_TEXT, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT = 6
_MOST_DIMS = 4
_USUAL_ALIGNMENT = 32
_MOST_NAME_BYTES = 2**16 - 1
# Of what is kept: arrays that say something of every layer, and templates; longer ones are passed over.
_LONGEST_ARRAY, _LONGEST_TEXT_BYTES = 1024, 2**20
# Passing one over would make a model without a chat of it.
_TEMPLATE = "tokenizer.chat_template"
# Vocabularies and their merges have a tenth of that.
_MOST_TEXTS = 2**22
_MOST_ARRAYS = 2**16
_MOST_ARRAY_BYTES = 2**27
_WINDOW_BYTES = 2**18
_LENGTH = struct.Struct("=Q")


@dataclass(frozen=True)
class TableLine:
    """One tensor of the table: its row-major `shape` in weights, the number of its type, `offset` from the data's."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class StoredArray(NamedTuple):
    """Where an array of the settings lies: its first byte, the one behind it, items, the number of their type."""

    start: int
    end: int
    num_items: int
    item: int


@dataclass(frozen=True)
class GgufHeader:
    """settings: texts, numbers and short lists of numbers. arrays: the others. data_start: of tensors, each aligned."""

    settings: dict[str, Any]
    arrays: dict[str, StoredArray]
    lines: tuple[TableLine, ...]
    alignment: int
    data_start: int


def parse_header(file: SourceFile) -> GgufHeader:
    """Read the header of `file`, in this machine's byte order.

    Raises:
        ValueError: it is no header, or not a whole one; says where.
        UnsupportedModelError: another version of the format, or another byte order.
    """
    header = _Header(file)
    if header.take(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    _check_version(file.path, header.number("I"))
    num_tensors, num_settings = header.number("Q"), header.number("Q")
    settings: dict[str, Any] = {}
    arrays: dict[str, StoredArray] = {}
    names = set[str]()
    for _ in range(num_settings):
        name = header.name("a setting")
        if name in names:
            raise ValueError(f"it says {name} twice")
        names.add(name)
        value = _setting(header, name)
        if isinstance(value, StoredArray):
            arrays[name] = value
        elif value is not None:
            settings[name] = value
    lines: dict[str, TableLine] = {}
    for _ in range(num_tensors):
        line = _line(header)
        if line.name in lines:
            raise ValueError(f"it has {line.name} twice")
        lines[line.name] = line
    alignment = settings.get("general.alignment", _USUAL_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r:.40}, which is no power of two")
    return GgufHeader(settings, arrays, tuple(lines.values()), alignment, round_up(header.at, alignment))


def parse_array(file: SourceFile, array: StoredArray) -> list[Any]:
    """Read the items of `array` of `file`, texts or numbers. Cost: 20 ms for 100,000 texts.

    Raises:
        ValueError: it takes more memory than any vocabulary, or a text in it is no UTF-8.
    """
    if array.end - array.start > _MOST_ARRAY_BYTES:
        raise ValueError(f"its {array.num_items} items take {array.end - array.start} bytes")
    content = bytes(file.read(array.start, array.end - array.start))
    if array.item != _TEXT:
        return [*struct.unpack(f"={array.num_items}{_NUMBERS[array.item]}", content)]
    texts, at = [], 0
    for _ in range(array.num_items):
        begin = at + _LENGTH.size
        at = begin + _LENGTH.unpack_from(content, at)[0]
        texts.append(str(content[begin:at], "utf-8"))
    return texts


def _check_version(path: str, version: int) -> None:
    if version in _VERSIONS:
        return
    if version and not version % 2**16:
        raise UnsupportedModelError(
            f"{path} was written in the byte order of another kind of machine, which is not read. Take a "
            f"{sys.byteorder}-endian file."
        )
    raise UnsupportedModelError(
        f"{path} is of version {version} of the format, which is not read; versions 2 and 3 are. Take such a "
        "file, or a newer foreroute, if it reads more."
    )


def _setting(header: "_Header", name: str) -> Any:
    """The value of a setting, or where the array is that it is; None for one that is passed over."""
    kind = header.number("I")
    if kind == _TEXT:
        return header.text(name)
    if kind != _ARRAY:
        return _number(header, kind, name)
    kind, count = header.number("I"), header.number("Q")
    if kind in _NUMBERS and 0 < count <= _LONGEST_ARRAY:
        return [_number(header, kind, name) for _ in range(count)]
    start = header.at
    _skip_array(header, kind, count, name)
    return StoredArray(start, header.at, count, kind) if count and kind != _ARRAY else None


def _skip_array(header: "_Header", kind: int, count: int, name: str) -> None:
    """Pass over an array, and those in it."""
    waiting, num_arrays = [(kind, count)], 0
    while waiting:
        kind, count = waiting.pop()
        if kind == _TEXT:
            header.skip_texts(count)
        elif kind == _ARRAY:
            num_arrays += 1
            if num_arrays > _MOST_ARRAYS:
                raise ValueError(f"{name} has arrays in arrays without end")
            if count:
                waiting += [(kind, count - 1), (header.number("I"), header.number("Q"))]
        else:
            header.skip(count * struct.calcsize("=" + _form(kind, name)))


def _number(header: "_Header", kind: int, name: str) -> int | float:
    value = header.number(_form(kind, name))
    return _exact(value) if kind == _FLOAT else value


def _form(kind: int, name: str) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"{name} is of type {kind}, which the format does not have")
    return _NUMBERS[kind]


def _exact(value: float) -> float:
    """Restore a float32 as it was written: 1e-05, not 9.99999974e-06."""
    import numpy

    return float(str(numpy.float32(value)))


def _line(header: "_Header") -> TableLine:
    name = header.name("a tensor")
    num_dims = header.number("I")
    if not 0 < num_dims <= _MOST_DIMS:
        raise ValueError(f"{name} has {num_dims} dimensions, where 1 to {_MOST_DIMS} are possible")
    shape = tuple(header.number("Q") for _ in range(num_dims))[::-1]
    return TableLine(name, shape, header.number("I"), header.number("Q"))


class _Header:
    """The file from its beginning, read in windows; whatever is asked for is held against the file's end.

    Attributes:
        at: the byte that is read next.
    """

    def __init__(self, file: SourceFile) -> None:
        self.at = 0
        self._file, self._end = file, file.stamp.nbytes
        self._window, self._start = bytearray(), 0

    def skip(self, nbytes: int) -> None:
        """Pass over bytes."""
        if nbytes > self._end - self.at:
            raise ValueError(f"{nbytes} bytes are to follow byte {self.at}, and the file ends at byte {self._end}")
        self.at += nbytes

    def take(self, nbytes: int) -> bytes:
        """Read bytes: few, or as many as are kept."""
        begin = self.at
        self.skip(nbytes)
        if begin + nbytes > self._start + len(self._window):
            self._look(begin, nbytes)
        return bytes(self._window[begin - self._start : begin - self._start + nbytes])

    def number(self, form: str) -> Any:
        """Read a number, as struct names its type."""
        (value,) = struct.unpack("=" + form, self.take(struct.calcsize("=" + form)))
        return value

    def name(self, of: str) -> str:
        """Read a name."""
        nbytes = self.number("Q")
        if nbytes > _MOST_NAME_BYTES:
            raise ValueError(f"at byte {self.at} the name of {of} is to have {nbytes} bytes")
        return str(self.take(nbytes), "utf-8")

    def text(self, of: str) -> str | None:
        """Read the text of a setting; None for one that is too long to be kept. A chat template never is."""
        nbytes = self.number("Q")
        if nbytes > _LONGEST_TEXT_BYTES:
            self.skip(nbytes)
            if of.startswith(_TEMPLATE):
                raise ValueError(f"{of} has {nbytes:,} bytes; no chat template is as long")
            return None
        return str(self.take(nbytes), "utf-8")

    def skip_texts(self, count: int) -> None:
        """Pass over texts, each behind its length. Cost: 10 ms for 100,000."""
        if count > _MOST_TEXTS:
            raise ValueError(f"at byte {self.at} there are to be {count} texts; no vocabulary has as many")
        length_at = _LENGTH.unpack_from
        while count:
            begin = self.at
            self.skip(_LENGTH.size)
            self._look(begin, _LENGTH.size)
            window, at = self._window, 0
            last = len(window) - _LENGTH.size
            while count and at <= last:
                at += _LENGTH.size + length_at(window, at)[0]
                count -= 1
            self.at = begin
            self.skip(at)

    def _look(self, begin: int, nbytes: int) -> None:
        self._window, self._start = self._file.read(begin, max(nbytes, _WINDOW_BYTES)), begin
