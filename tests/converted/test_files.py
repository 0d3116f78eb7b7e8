"""Which files are meant, and what is refused of them before a weight is read: endings, folders, parts, versions."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from foreroute.checkpoint.gguf_file import read_gguf
from foreroute.checkpoint.locate import locate, read_index
from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError
from foreroute.loading.checkpoint import open_checkpoint
from foreroute.model.text import load_tokenizer
from tests.converted.malformed import Document, number
from tests.formats.gguf_writer import Kind, Written, write_copy, write_gguf
from tests.support.checkpoints import save_tokenizer
from tests.support.runs import assert_same_bits, generate


@pytest.fixture(scope="module")
def written(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_gguf(tmp_path_factory.mktemp("files"), "gpt-oss", Kind.MXFP4, dense=Kind.Q8_0)


def test_a_blob_without_an_ending_is_known_by_its_first_bytes(
    written: Written, tmp_path: Path, load: Callable[..., Any]
) -> None:
    """As ollama stores models."""
    blob = tmp_path / "sha256-0f5e9c"
    shutil.copyfile(written.path, blob)
    shutil.copyfile(written.path.parent / "tokenizer.json", tmp_path / "tokenizer.json")
    shutil.copyfile(written.path.parent / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    assert locate(blob) == blob
    assert read_index(blob).kind == "gguf"
    assert load_tokenizer(blob).encode("ab") == [ord("a") - 33, ord("b") - 33]
    model = load(blob, "40%", dtype="float32", math="torch")
    assert_same_bits(generate(model), generate(written.resident))


def test_a_folder_that_holds_one_file_is_that_file(written: Written, tmp_path: Path) -> None:
    (tmp_path / "mmproj-model-f16.gguf").touch()
    assert locate(tmp_path) == tmp_path
    shutil.copyfile(written.path, tmp_path / "model-q8_0.gguf")
    assert locate(tmp_path) == tmp_path / "model-q8_0.gguf"
    (tmp_path / "model-q4_0.gguf").touch()
    with pytest.raises(
        CheckpointError, match=r"holds 2 GGUF files \(model-q4_0.gguf, model-q8_0.gguf\). Give the path of"
    ):
        locate(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert locate(tmp_path) == tmp_path


def test_a_folder_whose_files_are_passed_over_says_why(written: Written, tmp_path: Path) -> None:
    path = tmp_path / "mixtral-imatrix-Q4_K_M.gguf"
    shutil.copyfile(written.path, path)
    with pytest.raises(CheckpointError) as caught:
        read_index(locate(tmp_path))
    assert str(caught.value).endswith(
        f"{path.name} is an importance matrix by its name; if it is a model, give {path}."
    )
    assert read_index(locate(path)).kind == "gguf"
    path.rename(tmp_path / "model.gguf.part1of2")
    with pytest.raises(
        CheckpointError, match=r"model.gguf.part1of2 is a piece of a file.* with cat, in order, into mod"
    ):
        read_index(locate(tmp_path))


def test_an_ending_in_capitals_is_one(written: Written, tmp_path: Path) -> None:
    path = tmp_path / "MODEL-Q8_0.GGUF"
    shutil.copyfile(written.path, path)
    assert locate(tmp_path) == path
    assert read_index(path).kind == "gguf"


def test_other_versions_of_the_format_are_named(written: Written, tmp_path: Path) -> None:
    content = written.path.read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[:4] + (7).to_bytes(4, "little") + content[8:])
    with pytest.raises(
        UnsupportedModelError, match=r"is of version 7 of the format, which is not read; versions 2 and 3 are"
    ):
        read_gguf(tmp_path / "model.gguf")


def _in_parts(path: Path, folder: Path, per_part: int) -> list[Path]:
    """The file in parts of as many tensors, as the package's writer makes them."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(folder / "model.gguf", "gpt-oss", split_max_tensors=per_part)
    write_copy(reader, writer)
    save_tokenizer(folder)
    return sorted(folder.glob("*.gguf"))


@pytest.mark.parametrize("role", ["padding", "bos", "eos"])
def test_an_id_out_of_range_means_that_there_is_none(role: str, written: Written, tmp_path: Path) -> None:
    document = Document.of(written.path).with_field(number(f"tokenizer.ggml.{role}_token_id", 2**32 - 1))
    (tmp_path / "model.gguf").write_bytes(document.content().bytes)
    config = open_checkpoint(tmp_path / "model.gguf", None, "no").outline.config
    assert getattr(config, f"{role.removesuffix('ding')}_token_id") is None


def test_a_model_in_parts_is_read_from_any_of_them(written: Written, tmp_path: Path, load: Callable[..., Any]) -> None:
    first, *others = _in_parts(written.path, tmp_path, 30)
    assert len(others) >= 2
    assert {locate(path) for path in (tmp_path, first, *others)} == {first}
    assert read_gguf(others[0]).tensors.keys() == read_gguf(written.path).tensors.keys()
    expected = generate(written.resident)
    for math in ("torch", "ggml"):
        model = load(others[-1], "40%", dtype="float32", math=math)
        assert model.foreroute.stats().evictions == 0
        found = generate(model)
        if math == "torch":
            assert_same_bits(found, expected)
        else:
            assert_same_bits(found, generate(load(written.path, "40%", dtype="float32", math=math)))
    assert load_tokenizer(locate(others[0])).encode("ab") == [ord("a") - 33, ord("b") - 33]


def test_parts_that_are_no_model_are_named(written: Written, tmp_path: Path) -> None:
    first, second, *others = _in_parts(written.path, tmp_path, 30)
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(CorruptCheckpointError, match=r"model-00002-of-0000\d.gguf is absent: the model has \d parts"):
        read_gguf(first)
    shutil.copyfile(first, second)
    with pytest.raises(CorruptCheckpointError, match=r"model-00002-of-0000\d.gguf is not part 2 of .*00001-of"):
        read_gguf(first)
    inside = [tensor.name for tensor in gguf.GGUFReader(first).tensors]
    ours = next(tensor.name for tensor in gguf.GGUFReader(others[-1]).tensors)
    twice = next(name for name in inside if len(name) == len(ours))
    second.write_bytes(content)
    last = others[-1].read_bytes()
    others[-1].write_bytes(last.replace(ours.encode(), twice.encode(), 1))
    with pytest.raises(
        CorruptCheckpointError, match=r"hold \d+ tensors in place of \d+: one of them is another model's"
    ):
        read_gguf(first)
    others[-1].write_bytes(last)
    shutil.copyfile(first, tmp_path / "alone.gguf")
    with pytest.raises(CorruptCheckpointError, match=r"alone.gguf is one of \d parts of a model, and not named so"):
        read_gguf(tmp_path / "alone.gguf")
    first.unlink()
    with pytest.raises(
        CorruptCheckpointError, match=r"model-00001-of-0000\d.gguf is absent, the first part of the mod"
    ):
        locate(others[0])
