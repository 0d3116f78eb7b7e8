"""The header of a GGUF file: read without making objects of its vocabulary, and refused where that is cut off."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from foreroute.checkpoint import gguf_header
from foreroute.checkpoint.gguf_file import read_array, read_gguf
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError
from tests.formats.gguf_writer import add_settings, qwen3_moe_config

TOKENS = 3000


def _write(path: Path, endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> Path:
    """A header with a vocabulary between its settings, and one tensor."""
    writer = gguf.GGUFWriter(path, "qwen3moe", endianess=endian)
    add_settings(writer, qwen3_moe_config(), "qwen3moe")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {at}" for at in range(TOKENS)])
    writer.add_token_scores([float(at) for at in range(TOKENS)])
    writer.add_array("foreroute.nested", [[1, 2], [3, 4]])
    writer.add_array("foreroute.by_layer", [0, 2, 0])
    writer.add_string("general.name", "after the vocabulary")
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_settings_and_tensors_are_those_of_the_packages_reader(tmp_path: Path) -> None:
    path = _write(tmp_path / "model.gguf")
    theirs, ours = gguf.GGUFReader(path), read_gguf(path)
    arrays = {name for name, field in theirs.fields.items() if field.types[0] == gguf.GGUFValueType.ARRAY}
    assert len(arrays) == 4
    counts = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert set(ours.settings) == set(theirs.fields) - counts - arrays | {"foreroute.by_layer"}
    plain = set(ours.settings) - {"foreroute.by_layer"}
    assert {name: ours.settings[name] for name in plain} == pytest.approx(
        {name: theirs.fields[name].contents() for name in plain}
    )
    assert ours.settings["qwen3moe.attention.layer_norm_rms_epsilon"] == 1e-6, "as it was written"
    assert ours.settings["foreroute.by_layer"] == [0, 2, 0]
    assert ours.settings["general.name"] == "after the vocabulary"
    assert read_array(ours, "tokenizer.ggml.tokens") == [f"token {at}" for at in range(TOKENS)]
    assert read_array(ours, "tokenizer.ggml.scores") == [float(at) for at in range(TOKENS)]
    assert read_array(ours, "foreroute.by_layer") == [0, 2, 0]
    assert read_array(ours, "tokenizer.ggml.merges") is None
    with pytest.raises(CorruptCheckpointError, match=r"general\.name is 'after the vocabulary', not a list"):
        read_array(ours, "general.name")
    (tensor,) = theirs.tensors
    entry = ours.tensors["token_embd.weight"]
    assert (entry.offset, entry.nbytes) == (tensor.data_offset, tensor.n_bytes)


def test_a_file_in_another_byte_order_is_refused(tmp_path: Path) -> None:
    """Its weights would be read as other numbers."""
    _write(tmp_path / "model.gguf", gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedModelError, match=r"model\.gguf was written in the byte order of another kind"):
        read_gguf(tmp_path / "model.gguf")


def test_no_object_is_made_of_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 150,000 tokens and their merges took seconds."""
    path = _write(tmp_path / "model.gguf")
    calls = 0
    take = gguf_header._Header.take

    def counted(*args: Any) -> bytes:
        nonlocal calls
        calls += 1
        return take(*args)

    monkeypatch.setattr(gguf_header._Header, "take", counted)
    read_gguf(path)
    assert 0 < calls < TOKENS / 3


@pytest.mark.parametrize("at", [0.3, 0.7, 0.95], ids=["in the tokens", "in the scores", "behind them"])
def test_a_file_cut_off_in_its_vocabulary_is_refused(tmp_path: Path, at: float) -> None:
    content = _write(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * at)])
    with pytest.raises(CorruptCheckpointError, match=r"cut\.gguf is not a complete GGUF file: .* Download it again"):
        read_gguf(tmp_path / "cut.gguf")


def test_a_length_that_leads_out_of_the_file_is_refused(tmp_path: Path) -> None:
    content = bytearray(_write(tmp_path / "whole.gguf").read_bytes())
    at = content.index(b"token 17") - 8
    content[at : at + 8] = (2**62).to_bytes(8, "little")
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"bad\.gguf is not a complete GGUF file"):
        read_gguf(tmp_path / "bad.gguf")
