"""Folders with more than one set of weights: dense weights and experts are of one, the one that transformers takes."""

import json
import logging
import shutil

import pytest

from foreroute.checkpoint.index import INDEX, SINGLE
from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import STORE_NAME
from foreroute.errors import CheckpointError, CorruptCheckpointError, PredictorError, StoreError, UnsupportedModelError
from foreroute.predict.sidecar import SIDECAR_NAME, Sidecar
from tests.support.broken import copied, read_parts, write_parts
from tests.support.checkpoints import edit_json
from tests.support.runs import assert_same_bits, generate, packed_store

# Bits are compared with the same files: how tensors are aligned in them, bits depend on too.
NEWER, OLDER = {"seed": 0}, {"seed": 5, "sharded": True}


@pytest.fixture
def both(checkpoints, tmp_path):
    """A newer single file beside the index and the shards of an older model of the same shape."""
    folder = copied(checkpoints.get("qwen3_moe", **NEWER), tmp_path / "both")
    for path in checkpoints.get("qwen3_moe", **OLDER).glob("model*.safetensors*"):
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture
def is_model(checkpoints, references, load):
    """Every bit is that of a model; and that is what transformers makes of the folder."""

    def check(folder, which):
        expected = references.output(checkpoints.get("qwen3_moe", **which))
        assert_same_bits(generate(load(folder, "25%")), expected)
        assert_same_bits(generate(references.model(folder)), expected)

    return check


def test_a_single_file_beside_stale_shards(is_model, both, caplog):
    with caplog.at_level(logging.WARNING, "foreroute"):
        is_model(both, NEWER)
    (record,) = caplog.records
    assert (
        f"{both / SINGLE} is read, as transformers does; the shards that {INDEX} names are not" in record.getMessage()
    )


def test_an_index_whose_shards_are_gone(is_model, both, caplog):
    for path in both.glob("model-*.safetensors"):
        path.unlink()
    with caplog.at_level(logging.WARNING, "foreroute"):
        is_model(both, NEWER)
    assert not caplog.records


def test_shards_whose_single_file_is_gone(is_model, both):
    (both / SINGLE).unlink()
    is_model(both, OLDER)


def test_an_index_that_is_named_in_the_config(is_model, both):
    (both / INDEX).rename(both / "other.safetensors.index.json")
    edit_json(both / "config.json", transformers_weights="other.safetensors.index.json")
    is_model(both, OLDER)


def test_a_file_that_is_named_in_the_config(is_model, both):
    (both / SINGLE).rename(both / "newest.safetensors")
    edit_json(both / "config.json", transformers_weights="newest.safetensors")
    is_model(both, NEWER)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("gone.safetensors", "has no gone.safetensors, which its config.json names"),
        ("../model.safetensors", "no safetensors file of that folder"),
        ("pytorch_model.bin", "no safetensors file of that folder"),
        (3, "no safetensors file of that folder"),
    ],
)
def test_a_name_in_the_config_that_is_none(both, named, said):
    edit_json(both / "config.json", transformers_weights=named)
    with pytest.raises(CheckpointError, match=said):
        read_index(both)


def test_an_adapter_is_not_passed_over(both):
    (both / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"adapter_config\.json.*merge_and_unload"):
        read_index(both)


def test_a_distributed_checkpoint_is_not_passed_over(both):
    shutil.copyfile(both / SINGLE, both / "shard-00001-model-00001-of-00002.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"shard-00001-model-00001-of-00002\.safetensors.*save_pretrained"):
        read_index(both)


def test_a_tensor_in_two_shards(both):
    """transformers takes the last, the index names another."""
    (both / SINGLE).unlink()
    first, *_, last = sorted(both.glob("model-*.safetensors"))
    header = read_parts(first)[0]
    name = next(name for name in header if name != "__metadata__")
    begin, end = header[name]["data_offsets"]
    other, others = read_parts(last)
    other[name] = {**header[name], "data_offsets": [len(others), len(others) + end - begin]}
    write_parts(last, other, others + bytes(end - begin))
    with pytest.raises(CorruptCheckpointError) as caught:
        read_index(both)
    for said in (name, first.name, last.name):
        assert said in str(caught.value)


def test_a_tensor_that_the_index_does_not_name(is_model, both):
    """As transformers does: of the index only the names of files count."""
    (both / SINGLE).unlink()
    index = json.loads((both / INDEX).read_text())
    for name in ("model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"):
        del index["weight_map"][name]
    (both / INDEX).write_text(json.dumps(index))
    is_model(both, OLDER)


def test_a_store_of_the_older_weights(checkpoints, both, load):
    shutil.copyfile(packed_store(checkpoints.get("qwen3_moe", **OLDER)), both / STORE_NAME)
    with pytest.raises(StoreError, match="it was packed from other weights"):
        load(both)


def test_predictors_of_the_older_weights(checkpoints, both, load):
    fingerprint = read_index(checkpoints.get("qwen3_moe", **OLDER)).fingerprint()
    Sidecar(fingerprint, [None] * 3, [None] * 3, None, [], [None] * 3).save(both / SIDECAR_NAME)
    with pytest.raises(PredictorError, match="fitted to another model or to other weights"):
        load(both)


def test_names_that_cannot_be_looked_up_are_named():
    from foreroute.checkpoint.locate import locate
    from foreroute.errors import CheckpointError

    for name in ("a" * 300, "~nobody-of-this-name/model"):
        with pytest.raises(CheckpointError, match="cannot be opened"):
            locate(name)
