"""Files that are damaged, or lie: each is refused with one of our errors, or is a model; quickly and in little memory.

The files are drawn by hypothesis, always the same ones. What it found once has a case of its own, further down.
"""

import contextlib
import hashlib
import math
import os
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import foreroute
from foreroute.checkpoint.gguf_file import read_gguf
from foreroute.errors import CheckpointError, CorruptCheckpointError, ForerouteError
from foreroute.loading.checkpoint import open_checkpoint
from foreroute.model.text import load_tokenizer
from tests.converted.malformed import (
    ARRAY,
    FLOAT,
    MUTATIONS,
    Document,
    Field,
    in_parts,
    number,
    spoil_parts,
    text,
    with_vocabulary,
)
from tests.converted.tokenizer_sources import END, TEMPLATE
from tests.formats.gguf_writer import Kind, write_gguf

# Of each kind; of kinds of which many can be loaded, which takes longer, and of those of the vocabulary, fewer.
FILES, FEWER = 30, 10
HAS_FEWER = {
    "flip-in-data", "tokens-twice", "types-too-few", "scores-too-few", "scores", "ids", "pre", "merges", "template",
}  # fmt: skip
# How many of a kind are refused at least; of the other kinds all are. Bits of the weights say nothing of
# themselves, and ids out of range that there is no such token.
LEAST_REFUSED = {
    "flip-in-header": 20, "flip-in-table": 20, "flip-in-data": 0, "types": 25, "dims": 25, "values": 20,
    "contradictions": 15, "arrays": 25, "alignment": 25, "absent-or-twice": 15, "architecture": 25, "versions": 25,
    "ids": 0,
}  # fmt: skip
# What is said of where tensors are. Of other files that can be loaded they are where they were.
MOVES = {"flip-in-table", "types", "dims", "alignment"}
# A file takes a hundredth of that; other programs may have the processor.
DEADLINE = timedelta(seconds=5)
MOST_BYTES = 200 * 2**20
SMALL = {
    "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2,
    "moe_intermediate_size": 32, "num_experts": 4, "vocab_size": 1120,
}  # fmt: skip
fuzzed = settings(
    max_examples=FILES + FILES // 4,
    deadline=DEADLINE,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def whole(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Document:
    """A model in 160 kB, in four types of tensors, and its tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    made = write_gguf(folder, "qwen3moe", Kind.Q8_0, dense=Kind.Q8_0, down=[Kind.IQ4_NL, Kind.F32], **SMALL)
    return with_vocabulary(Document.of(made.path), folder)


def _forgets_peak() -> bool:
    """Whether this process may have the kernel forget the most memory that it has had; containers deny it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return True
    return False


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return 1024 * int(found[1])


@contextlib.contextmanager
def _memory() -> Iterator[list[int]]:
    """The most bytes that were taken meanwhile, in the list behind it: the process's, or Python's where it is denied.

    Python's are those that a header is read to, and not the weights'.
    """
    taken: list[int] = []
    if _forgets_peak():
        before = _peak_bytes()
        yield taken
        taken.append(_peak_bytes() - before)
        return
    tracemalloc.start()
    try:
        yield taken
        taken.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("is_denied", [False, True])
def test_memory_that_was_taken_is_seen(is_denied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After more was taken before, too."""
    if is_denied:
        monkeypatch.setattr(f"{__name__}._forgets_peak", lambda: False)
    assert len(b"x" * (96 * 2**20)) > 0
    with _memory() as taken:
        assert len(b"x" * (48 * 2**20)) > 0
    assert 40 * 2**20 < taken[0] < 80 * 2**20


def read(path: Path) -> str:
    """Load the model and compute a token: what was raised, "" if nothing. Fails on more memory than may be taken."""
    error = ""
    with _memory() as taken:
        try:
            _use(path)
        except ForerouteError as failure:
            error = f"{type(failure).__name__}: {failure}"
    assert "\n" not in error
    assert taken[0] <= MOST_BYTES, f"{taken[0] / 2**20:.0f} MiB were taken: {error}"
    return error


def _use(path: Path) -> None:
    index = open_checkpoint(path, None, "no").index
    ends: dict[str, int] = {}
    for entry in sorted(index.tensors.values(), key=lambda entry: (entry.path, entry.offset)):
        assert ends.get(entry.path, 0) <= entry.offset, f"{entry.name} overlaps"
        ends[entry.path] = entry.offset + entry.nbytes
    assert all(end <= Path(path).stat().st_size for path, end in ends.items())
    load_tokenizer(path)
    model: Any = foreroute.load(path, "100%")
    with contextlib.closing(model.foreroute):
        model(torch.tensor([[1, 2, 3]]))


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor begins, from the file's end, which no change of the header moves; and its bytes."""
    end = path.stat().st_size
    return {name: (entry.offset - end, entry.nbytes) for name, entry in read_gguf(path).tensors.items()}


def test_the_whole_file_is_a_model_with_its_tokenizer(whole: Document, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.content().bytes)
    assert read(path) == ""
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"
    assert len(tokenizer.encode("the quick")) < len("the quick")
    assert (tokenizer.eos_token, tokenizer.chat_template) == (END, TEMPLATE)


@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_malformed_file_is_refused_by_one_of_our_errors(kind: str, whole: Document, tmp_path: Path) -> None:
    """Or is a model, of the same tensors."""
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.content().bytes)
    places, original = _places(path), hashlib.sha256(path.read_bytes()).digest()
    files = FEWER if kind in HAS_FEWER else FILES
    seen: dict[bytes, bool] = {}

    @settings(fuzzed, max_examples=files + files // 4)
    @given(st.data())
    def test(data: st.DataObject) -> None:
        content = MUTATIONS[kind](data.draw, whole)
        path.write_bytes(content)
        is_refused = bool(read(path))
        assert is_refused or kind in MOVES or _places(path) == places
        seen[hashlib.sha256(content).digest()] = is_refused

    test()
    assert len(seen) >= files
    assert not seen.pop(original, False)
    assert sum(seen.values()) >= LEAST_REFUSED.get(kind, len(seen))


def _write_parts(folder: Path, parts: Sequence[bytes | None]) -> Path:
    """Write parts of a model, but for those that are None; the first one's path."""
    paths = [folder / f"model-{at:05d}-of-{len(parts):05d}.gguf" for at in range(1, len(parts) + 1)]
    for path, content in zip(paths, parts, strict=True):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    return paths[0]


def test_spoilt_parts_are_refused(whole: Document, tmp_path: Path) -> None:
    """No model is made of the parts of two."""
    parts, others = in_parts(whole, 3), in_parts(whole, 4)
    first = _write_parts(tmp_path, [part.content().bytes for part in parts])
    assert read(first) == ""
    tensors, seen = read_gguf(first).tensors, {}

    @fuzzed
    @given(st.data())
    def test(data: st.DataObject) -> None:
        spoilt = spoil_parts(data.draw, parts, others)
        is_refused = bool(read(_write_parts(tmp_path, spoilt)))
        assert is_refused or read_gguf(first).tensors == tensors
        seen[hashlib.sha256(repr(spoilt).encode()).digest()] = is_refused

    test()
    assert len(seen) >= FILES
    assert sum(seen.values()) >= 20


# What was once read wrongly, or raised another error.


def _info(whole: Document, name: str) -> int:
    return [info.name for info in whole.infos].index(name.encode())


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        pytest.param(
            lambda whole: whole.with_info(1, offset=whole.infos[0].offset),
            CorruptCheckpointError, r"token_embd.weight begins at byte \d+, where the tensors before it, and 32 bytes",
            id="two tensors in one place",
        ),
        pytest.param(
            lambda whole: whole.with_info(1, offset=whole.infos[1].offset + 4),
            CorruptCheckpointError, r"output_norm.weight begins at byte \d+, where",
            id="an offset that is not aligned",
        ),
        pytest.param(
            # F32 in place of Q8_0: its rows would reach into the next tensor.
            lambda whole: whole.with_info(_info(whole, "blk.0.ffn_up_exps.weight"), type=0),
            CorruptCheckpointError, r"blk.0.ffn_down_exps.weight begins at byte \d+, where the tensors before it",
            id="a type that takes more bytes",
        ),
        pytest.param(
            lambda whole: whole.with_info(_info(whole, "blk.0.ffn_up_exps.weight"), dims=(2**32, 2**32, 4)),
            CorruptCheckpointError, r"not a complete GGUF file: blk.0.ffn_up_exps.weight ends at byte \d{20}",
            id="as many weights as 64 bits do not hold",
        ),
        pytest.param(
            lambda whole: whole.with_info(1, dims=(0,)),
            CorruptCheckpointError, r"output_norm.weight is \[0\] in F32, of which a row is blocks of 1",
            id="a tensor of nothing",
        ),
        pytest.param(
            lambda whole: whole.with_info(1, dims=(1, 1, 1, 1, 32)),
            CorruptCheckpointError, "output_norm.weight has 5 dimensions, where 1 to 4 are possible",
            id="five dimensions",
        ),
        pytest.param(
            lambda whole: whole.with_field(text("split.count", "three")),
            CorruptCheckpointError, "split.count is 'three', no number",
            id="a number of parts that is a text",
        ),
        pytest.param(
            lambda whole: replace(whole, fields=whole.fields[1:]),
            CorruptCheckpointError, "general.architecture is not said. Download it again",
            id="no architecture",
        ),
        pytest.param(
            lambda whole: whole.with_field(number("general.architecture", 5)),
            CorruptCheckpointError, "general.architecture is 5, no name",
            id="an architecture that is a number",
        ),
        pytest.param(
            lambda whole: whole.with_field(Field(b"qwen3moe.rope.freq_base", FLOAT, struct.pack("<f", math.nan))),
            CorruptCheckpointError, "qwen3moe.rope.freq_base is nan",
            id="a setting that is no number",
        ),
        pytest.param(
            lambda whole: whole.with_field(
                Field(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000 + struct.pack("<IQ", ARRAY, 2**60))
            ),
            CorruptCheckpointError, "not a complete GGUF file",
            id="arrays in arrays, 5,000 deep",
        ),
        pytest.param(
            lambda whole: replace(whole, counts=(2**63, len(whole.fields))),
            CorruptCheckpointError, "not a complete GGUF file",
            id="2^63 tensors",
        ),
        pytest.param(
            lambda whole: whole.with_field(text("tokenizer.chat_template.rag", "a" * (2**20 + 1))),
            CorruptCheckpointError, r"tokenizer.chat_template.rag has 1,048,577 bytes; no chat template is as long",
            id="a chat template that was left out",
        ),
    ],
)  # fmt: skip
def test_lies_that_were_believed(
    change: Callable[[Document], Document], error: type[Exception], said: str, whole: Document, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(change(whole).content().bytes)
    with pytest.raises(error, match=said):
        open_checkpoint(path, None, "no")


def test_other_long_texts_are_passed_over(whole: Document, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.with_field(text("general.description", "a" * (2**20 + 1))).content().bytes)
    assert read(path) == ""
    assert "general.description" not in read_gguf(path).settings


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            "header",
            r"model.gguf is not a complete GGUF file: \d+ bytes are to follow byte \d+, and the file ends at byte",
        ),
        (
            "table",
            r"model.gguf is not a complete GGUF file: \d+ bytes are to follow byte \d+, and the file ends at byte",
        ),
        (
            "data",
            r"model.gguf is not a complete GGUF file: blk.1.ffn_down_exps.weight ends at byte \d+, the file at \d+",
        ),
    ],
)
def test_where_a_file_was_cut_off_is_said(where: str, said: str, whole: Document, tmp_path: Path) -> None:
    content = whole.content()
    end = {"header": content.table - 9, "table": content.data - 64, "data": len(content.bytes) - 1}[where]
    (tmp_path / "model.gguf").write_bytes(content.bytes[:end])
    with pytest.raises(CorruptCheckpointError, match=rf"{said}.*Download it again"):
        read_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("block_count", 3, "lacks blk.2"),
        ("block_count", 2**31, "block_count is 2147483648; no model has that many layers"),
        ("block_count", 100, "is 100, and the files hold 2 layers. Metadata and weights are of different models"),
        ("embedding_length", 64, r"gives an expert \[64, 32\], the metadata \[64, 64\]"),
        ("expert_count", 5, "stores 4 experts, its metadata say 5"),
        ("expert_count", 3, "stores 4 experts, its metadata say 3"),
        ("expert_used_count", 9, "num_experts_per_tok is 9; of 4 experts a token is computed by 1 to 4"),
        ("expert_feed_forward_length", 16, r"gives an expert \[64, 32\], the metadata \[32, 32\]"),
        ("attention.head_count", 4, r"attn_q.weight has another shape than the metadata say: \[32, 32\] in place of"),
        ("attention.key_length", 32, "attention.value_length is 16, where keys have 32"),
    ],
)
def test_settings_that_the_shapes_contradict_are_named(
    name: str, value: int, said: str, whole: Document, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.with_field(number(f"qwen3moe.{name}", value)).content().bytes)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(path, None, "no")


@pytest.mark.parametrize("which", ["a name", "a text", "a tensor's name", "an array"])
def test_a_length_that_lies_costs_no_memory_in_a_large_file(which: str, whole: Document, tmp_path: Path) -> None:
    """The file holds as many bytes as the length says: reading them took as much memory."""
    content = whole.content()
    tokens = b"tokenizer.ggml.tokens"
    at = {
        "a name": content.lengths[0],
        "a text": content.lengths[1],
        "a tensor's name": content.lengths[-1],
        "an array": content.bytes.index(tokens) + len(tokens) + 8,
    }[which]
    path = tmp_path / "model.gguf"
    path.write_bytes(content.bytes[:at] + struct.pack("<Q", 2**31) + content.bytes[at + 8 :])
    os.truncate(path, 2**33)  # without a block on the disk
    assert "CorruptCheckpointError" in read(path)


def test_a_part_of_another_model_is_named(whole: Document, tmp_path: Path) -> None:
    """Of the same number, and with as many tensors."""
    parts = in_parts(whole, 3)
    for changed, said in (
        (text("general.architecture", "olmoe"), "its general.architecture is 'olmoe', that of .* 'qwen3moe'"),
        (number("split.tensors.count", 99), r"its split.tensors.count is 99, that of .* \d+"),
    ):
        spoilt = [parts[0], parts[1].with_field(changed), parts[2]]
        first = _write_parts(tmp_path, [part.content().bytes for part in spoilt])
        with pytest.raises(CorruptCheckpointError, match=rf"model-00002-of-00003.gguf is another model's part: {said}"):
            read_gguf(first)
    spoilt = [parts[0].with_field(number("split.no", 1)), *parts[1:]]
    first = _write_parts(tmp_path, [part.content().bytes for part in spoilt])
    with pytest.raises(CorruptCheckpointError, match=r"model-00001-of-00003.gguf is not part 1 of"):
        read_gguf(first)
