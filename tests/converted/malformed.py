"""GGUF files taken apart, and put together wrongly: headers, tables and data that lie, for the reader to refuse."""

import itertools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
from hypothesis import strategies as st

from foreroute.model.gguf.families import FAMILIES
from tests.converted.tokenizer_sources import PUBLISHED, byte_level_source, write_vocabulary

Draw = Callable[[st.SearchStrategy[Any]], Any]
U8, U32, FLOAT, BOOL, TEXT, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 31, 32, 33, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**61, 2**63, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2000),
)
TOKENS, TYPES, SCORES, MERGES = (f"tokenizer.ggml.{one}" for one in ("tokens", "token_type", "scores", "merges"))
# Written in the first of several parts, and in the others.
SPLIT = ("split.no", "split.count", "split.tensors.count")


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


# Without a second part, or of parts that are no tokens.
NO_MERGES = [_text(one) for one in (b"", b"a", b"a b c", b"a ", b" a", b"no such", b"a no-such")]


@dataclass(frozen=True)
class Field:
    """One of the metadata: `value` as it is written, behind the number of its type."""

    name: bytes
    type: int
    value: bytes


@dataclass(frozen=True)
class Info:
    """A line of the table of tensors. num_dims: what is written for their number; None is the right one."""

    name: bytes
    dims: tuple[int, ...]
    type: int
    offset: int
    num_dims: int | None = None


@dataclass(frozen=True)
class Content:
    """The bytes of a file. lengths: where lengths of texts and arrays are. table, data: where these begin."""

    bytes: bytes
    lengths: tuple[int, ...]
    table: int
    data: int

    def bounds(self, where: str) -> tuple[int, int]:
        """The first and last byte of the header's metadata, the table or the data."""
        ends = {"header": (0, self.table), "table": (self.table, self.data), "data": (self.data, len(self.bytes))}
        return ends[where][0], ends[where][1] - 1


@dataclass(frozen=True)
class Document:
    """A GGUF file in pieces. counts: of tensors and metadata, if not the right ones."""

    fields: tuple[Field, ...] = field(repr=False)
    infos: tuple[Info, ...] = field(repr=False)
    data: bytes = field(repr=False)
    version: int = 3
    counts: tuple[int, int] | None = None

    @classmethod
    def of(cls, path: Path) -> "Document":
        """Take a file apart."""
        reader = gguf.GGUFReader(path)
        fields = tuple(
            Field(bytes(found.parts[1]), int(found.parts[2][0]), b"".join(part.tobytes() for part in found.parts[3:]))
            for name, found in reader.fields.items()
            if not name.startswith("GGUF.")
        )
        infos = []
        for tensor in reader.tensors:
            _, name, _, dims, kind, offset = tensor.field.parts
            infos.append(Info(bytes(name), tuple(map(int, dims)), int(kind[0]), int(offset[0])))
        return cls(fields, tuple(infos), reader.data[reader.data_offset :].tobytes())

    def content(self) -> Content:
        """Put it together."""
        counts = self.counts or (len(self.infos), len(self.fields))
        made = bytearray(b"GGUF" + struct.pack("<IQQ", self.version, *counts))
        lengths = []
        for one in self.fields:
            lengths.append(len(made))
            made += _text(one.name) + struct.pack("<I", one.type)
            if one.type in (TEXT, ARRAY):
                lengths.append(len(made) + (4 if one.type == ARRAY else 0))
            made += one.value
        table = len(made)
        for info in self.infos:
            lengths.append(len(made))
            num_dims = len(info.dims) if info.num_dims is None else info.num_dims
            made += _text(info.name) + struct.pack(f"<I{len(info.dims)}Q", num_dims, *info.dims)
            made += struct.pack("<IQ", info.type, info.offset)
        made += bytes(-len(made) % 32)
        return Content(bytes(made) + self.data, tuple(lengths), table, len(made))

    def items(self, name: str) -> tuple[int, list[bytes]]:
        """The items of an array as they are written, behind the number of their type: of texts, or of four bytes."""
        value = next(one.value for one in self.fields if one.name == name.encode())
        (kind, count), items, at = struct.unpack_from("<IQ", value), [], 12
        for _ in range(count):
            end = at + (8 + struct.unpack_from("<Q", value, at)[0] if kind == TEXT else 4)
            items.append(value[at:end])
            at = end
        return kind, items

    def with_field(self, new: Field) -> "Document":
        """With this one in place of that of its name, or behind the others."""
        others = [one for one in self.fields if one.name != new.name]
        at = next((at for at, one in enumerate(self.fields) if one.name == new.name), len(others))
        return replace(self, fields=(*others[:at], new, *others[at:]))

    def with_info(self, at: int, **changes: Any) -> "Document":
        """With one line of the table changed."""
        return replace(self, infos=(*self.infos[:at], replace(self.infos[at], **changes), *self.infos[at + 1 :]))


Mutation = Callable[[Draw, Document], bytes]


def number(name: str, value: int, kind: int = U32) -> Field:
    """A whole number."""
    return Field(name.encode(), kind, struct.pack("<I" if kind == U32 else "<Q", value))


def text(name: str, value: str) -> Field:
    """A text."""
    return Field(name.encode(), TEXT, _text(value.encode()))


def array(name: str, kind: int, items: Sequence[bytes], count: int | None = None) -> Field:
    """An array of items as they are written; `count` is what is said of their number."""
    head = struct.pack("<IQ", kind, len(items) if count is None else count)
    return Field(name.encode(), ARRAY, head + b"".join(items))


def with_vocabulary(whole: Document, folder: Path) -> Document:
    """With a vocabulary that makes a tokenizer; its arrays are too long to be read as settings."""
    source = byte_level_source(next(one for one in PUBLISHED if "qwen2" in one.names), num_tokens=1100)
    scores = [-float(at) for at in range(len(source))]
    path = write_vocabulary(source, folder / "vocabulary.gguf", "gpt2", "qwen2", scores=scores)
    for one in Document.of(path).fields:
        whole = whole.with_field(one) if one.name.startswith(b"tokenizer.") else whole
    padding = number("tokenizer.ggml.padding_token_id", source.eos_token_id)
    return whole.with_field(padding).with_field(text("general.name", "a tiny model"))


def in_parts(whole: Document, count: int) -> list[Document]:
    """A file in parts of about as many tensors."""
    bounds = [len(whole.infos) * at // count for at in range(count + 1)]
    parts = []
    for at, (first, last) in enumerate(itertools.pairwise(bounds)):
        infos = whole.infos[first:last]
        end = whole.infos[last].offset if last < len(whole.infos) else len(whole.data)
        start = infos[0].offset
        moved = tuple(replace(info, offset=info.offset - start) for info in infos)
        part = Document(whole.fields if at == 0 else (), moved, whole.data[start:end])
        for name, value in zip(SPLIT, (at, count, len(whole.infos)), strict=True):
            part = part.with_field(number(name, value))
        parts.append(part)
    return parts


# What is done to a document, by name. Each makes one file.


def _cut(draw: Draw, whole: Document, where: str) -> bytes:
    content = whole.content()
    return content.bytes[: draw(st.integers(*content.bounds(where)))]


def _flip(draw: Draw, whole: Document, where: str) -> bytes:
    content = whole.content()
    first, last = content.bounds(where)
    made = bytearray(content.bytes)
    for at in draw(st.lists(st.integers(8 * first, 8 * last + 7), min_size=1, max_size=6)):
        made[at // 8] ^= 1 << at % 8
    return bytes(made)


def _counts(draw: Draw, whole: Document) -> bytes:
    tensors, fields = len(whole.infos), len(whole.fields)
    near = st.integers(0, 3 * tensors)
    counts = draw(st.tuples(NUMBERS | near, st.just(fields) | NUMBERS | near))
    return replace(whole, counts=counts).content().bytes


def _lengths(draw: Draw, whole: Document) -> bytes:
    content = whole.content()
    at = draw(st.sampled_from(content.lengths))
    return content.bytes[:at] + struct.pack("<Q", draw(NUMBERS)) + content.bytes[at + 8 :]


def _offsets(draw: Draw, whole: Document) -> bytes:
    at = draw(st.integers(0, len(whole.infos) - 1))
    others = st.sampled_from([info.offset for info in whole.infos])
    offset = draw(NUMBERS | others | others.map(lambda one: one + 1) | st.integers(0, len(whole.data) + 64))
    return whole.with_info(at, offset=offset).content().bytes


def _types(draw: Draw, whole: Document) -> bytes:
    at = draw(st.integers(0, len(whole.infos) - 1))
    kind = draw(st.one_of(st.integers(0, 45), st.integers(0, 2**32 - 1)))
    return whole.with_info(at, type=kind).content().bytes


def _dims(draw: Draw, whole: Document) -> bytes:
    at = draw(st.integers(0, len(whole.infos) - 1))
    dims = whole.infos[at].dims
    lying = st.lists(st.one_of(NUMBERS, st.sampled_from([16, 64, 2**62])), max_size=6).map(tuple)
    changed = draw(st.one_of(lying, st.permutations(dims).map(tuple), st.just((1, *dims)), st.just((*dims, 2**33))))
    num_dims = draw(st.one_of(st.none(), st.integers(0, 8), st.integers(0, 2**32 - 1)))
    return whole.with_info(at, dims=changed, num_dims=num_dims).content().bytes


_VALUES = st.one_of(
    NUMBERS.map(lambda value: (U64, struct.pack("<Q", value))),
    st.integers(0, 2**32 - 1).map(lambda value: (U32, struct.pack("<I", value))),
    st.floats(width=32).map(lambda value: (FLOAT, struct.pack("<f", value))),
    st.sampled_from([float("nan"), float("inf"), 0.0, -1.0]).map(lambda value: (FLOAT, struct.pack("<f", value))),
    st.integers(0, 255).map(lambda value: (BOOL, bytes([value]))),
    st.binary(max_size=12).map(lambda value: (TEXT, _text(value))),
    st.lists(st.integers(0, 255), max_size=8).map(
        lambda values: (ARRAY, struct.pack("<IQ", U8, len(values)) + bytes(values))
    ),
    st.integers(11, 2**32 - 1).map(lambda kind: (kind, bytes(8))),
)


def _values(draw: Draw, whole: Document) -> bytes:
    """Another type, and another value, than is due."""
    made = whole
    for at in draw(st.lists(st.integers(0, len(whole.fields) - 1), min_size=1, max_size=2, unique=True)):
        made = made.with_field(Field(whole.fields[at].name, *draw(_VALUES)))
    return made.content().bytes


def _contradictions(draw: Draw, whole: Document) -> bytes:
    """Numbers that the shapes of the tensors contradict, or that are none of a model."""
    own = [one for one in whole.fields if one.type in (U32, FLOAT) and b"." in one.name]
    chosen = own[draw(st.integers(0, len(own) - 1))]
    if chosen.type == FLOAT:
        value = struct.pack("<f", draw(st.sampled_from([0.0, -1.0, float("nan"), float("inf"), 1e38])))
    else:
        (before,) = struct.unpack("<I", chosen.value)
        around = st.sampled_from([0, before + 1, max(0, before - 1), 2 * before, before // 2, 2**31, 2**32 - 1])
        value = struct.pack("<I", draw(st.one_of(around, st.integers(0, 300))))
    return whole.with_field(replace(chosen, value=value)).content().bytes


def _arrays(draw: Draw, whole: Document) -> bytes:
    """Arrays in arrays, and numbers of items that lie."""
    depth, count = draw(st.sampled_from([0, 1, 2, 50, 5000])), draw(NUMBERS)
    kind, items = draw(st.sampled_from([(U32, bytes(64)), (TEXT, bytes(64)), (TEXT, _text(b"x") * 9), (77, b"")]))
    value = struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", kind, count) + items
    name = draw(st.sampled_from([*(one.name for one in whole.fields), b"tokenizer.ggml.more"]))
    return whole.with_field(Field(name, ARRAY, value)).content().bytes


def _alignment(draw: Draw, whole: Document) -> bytes:
    kind, value = draw(
        st.one_of(st.sampled_from([0, 1, 8, 16, 64, 4096, 2**31]), st.integers(0, 2**32 - 1)).map(
            lambda value: (U32, struct.pack("<I", value))
        )
        | _VALUES
    )
    return whole.with_field(Field(b"general.alignment", kind, value)).content().bytes


def _absent(draw: Draw, whole: Document) -> bytes:
    """Without one of the metadata or tensors, with one twice, or under another name."""
    which = draw(st.sampled_from(["fields", "infos"]))
    pieces: list[Any] = list(getattr(whole, which))
    at = draw(st.integers(0, len(pieces) - 1))
    renamed = draw(st.sampled_from([pieces[0].name, b"", b"\xff\xfe", b"blk.9.ffn_up_exps.weight", b"x" * 70000]))
    changed = {
        "absent": [],
        "twice": [pieces[at], pieces[at]],
        "renamed": [replace(pieces[at], name=renamed)],
    }[draw(st.sampled_from(["absent", "twice", "renamed"]))]
    return replace(whole, **{which: (*pieces[:at], *changed, *pieces[at + 1 :])}).content().bytes


def _architecture(draw: Draw, whole: Document) -> bytes:
    """Said to be of another architecture, its settings under that name too."""
    known = [*FAMILIES, *gguf.MODEL_ARCH_NAMES.values(), "", "no such thing"]
    name = draw(st.sampled_from(known))
    fields = tuple(replace(one, name=one.name.replace(b"qwen3moe.", f"{name}.".encode(), 1)) for one in whole.fields)
    return replace(whole, fields=fields).with_field(text("general.architecture", name)).content().bytes


def _versions(draw: Draw, whole: Document) -> bytes:
    version = draw(st.sampled_from([0, 1, 2, 4, 2**24, 2 * 2**24, 3 * 2**24]) | st.integers(0, 2**32 - 1))
    magic = draw(st.sampled_from([b"GGUF", b"GGUF", b"GGML", b"FUGG", b"\0\0\0\0"]))
    return magic + struct.pack("<I", version) + whole.content().bytes[8:]


def _items(name: str, change: Callable[[Draw, list[bytes]], list[bytes]], kind: str = "gpt2") -> Mutation:
    """Of the vocabulary, said to be of this kind: other items in one of its arrays."""

    def spoil(draw: Draw, whole: Document) -> bytes:
        item, items = whole.items(name)
        made = whole.with_field(array(name, item, change(draw, items)))
        return made.with_field(text("tokenizer.ggml.model", kind)).content().bytes

    return spoil


def _put(draw: Draw, items: list[bytes], others: list[bytes]) -> list[bytes]:
    at = draw(st.integers(0, len(items) - 1))
    return [*items[:at], draw(st.sampled_from(others)), *items[at + 1 :]]


def _ids(draw: Draw, whole: Document) -> bytes:
    """Tokens with a role that are ordinary ones, none at all, or no numbers."""
    value = draw(NUMBERS.map(lambda value: (U64, struct.pack("<Q", value))) | _VALUES)
    role = draw(st.sampled_from(["bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "cls", "mask"]))
    return whole.with_field(Field(f"tokenizer.ggml.{role}_token_id".encode(), *value)).content().bytes


def _pre(draw: Draw, whole: Document) -> bytes:
    lists = st.lists(st.sampled_from([b"qwen2", b"gpt-2"]).map(_text), max_size=3)
    made = lists.map(lambda items: (ARRAY, array("", TEXT, items).value))
    return whole.with_field(Field(b"tokenizer.ggml.pre", *draw(made | _VALUES))).content().bytes


def _template(draw: Draw, whole: Document) -> bytes:
    wrong = st.sampled_from(["{% if", "{{ a", "{% endfor %}", "{% for a in b %}", "{{ 1 + }}", "{% no_such %}"])
    value, name = draw(st.text(alphabet="abc \n", max_size=9)) + draw(wrong), draw(st.sampled_from(["", ".rag"]))
    return whole.with_field(text(f"tokenizer.chat_template{name}", value)).content().bytes


MUTATIONS: Mapping[str, Mutation] = {
    "cut-in-header": lambda draw, whole: _cut(draw, whole, "header"),
    "cut-in-table": lambda draw, whole: _cut(draw, whole, "table"),
    "cut-in-data": lambda draw, whole: _cut(draw, whole, "data"),
    "flip-in-header": lambda draw, whole: _flip(draw, whole, "header"),
    "flip-in-table": lambda draw, whole: _flip(draw, whole, "table"),
    "flip-in-data": lambda draw, whole: _flip(draw, whole, "data"),
    "counts": _counts,
    "lengths": _lengths,
    "offsets": _offsets,
    "types": _types,
    "dims": _dims,
    "values": _values,
    "contradictions": _contradictions,
    "arrays": _arrays,
    "alignment": _alignment,
    "absent-or-twice": _absent,
    "architecture": _architecture,
    "versions": _versions,
    "tokens-twice": _items(TOKENS, lambda draw, items: [*(made := items[:-1]), draw(st.sampled_from(made))]),
    "types-too-few": _items(TYPES, lambda draw, items: items[: draw(st.integers(1, len(items) - 1))]),
    "scores-too-few": _items(SCORES, lambda draw, items: items[: draw(st.integers(1, len(items) - 1))], "llama"),
    "scores": _items(SCORES, lambda draw, items: _put(draw, items, [struct.pack("<f", math.nan)]), "llama"),
    "merges": _items(MERGES, lambda draw, items: _put(draw, items, NO_MERGES)),
    "ids": _ids,
    "pre": _pre,
    "template": _template,
}


def spoil_parts(draw: Draw, parts: Sequence[Document], others: Sequence[Document]) -> list[bytes | None]:
    """Parts of a model, one of them absent (None), cut, one of `others`, or with numbers that lie."""
    at = draw(st.integers(0, len(parts) - 1))
    made: list[bytes | None] = [part.content().bytes for part in parts]
    kind = draw(st.sampled_from(["absent", "cut", "cut", "others'", "number", "number", "value", "value"]))
    name = draw(st.sampled_from(SPLIT))
    if kind == "absent":
        made[at] = None
    elif kind == "cut":
        whole = parts[at].content().bytes
        made[at] = whole[: draw(st.integers(0, len(whole) - 1))]
    elif kind == "others'":
        made[at] = others[draw(st.integers(0, len(others) - 1))].content().bytes
    elif kind == "number":
        made[at] = parts[at].with_field(number(name, draw(NUMBERS), U64)).content().bytes
    else:
        made[at] = parts[at].with_field(Field(name.encode(), *draw(_VALUES))).content().bytes
    return made
