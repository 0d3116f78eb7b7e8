"""Folders that cannot be run: each is refused before a weight is read, with a message that names the thing."""

import json
import os
import re

import pytest
import torch

from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError
from foreroute.model.adapters import registry
from tests.support.broken import change_header, closed_up, copied, read_parts, without, write_parts
from tests.support.checkpoints import edit_json
from tests.support.families import VOCAB_SIZE
from tests.support.runs import watch_reads

EXPERT = "model.layers.1.mlp.experts.7.up_proj.weight"


@pytest.fixture
def refused(load, monkeypatch):
    """`refused(folder, error type, regex, ...)`: loading fails so, and no weight has been read by then."""
    from transformers import PreTrainedModel

    def started(*_, **__):
        raise AssertionError("weights were being loaded when the error should have been there")

    def check(folder, error_type, *patterns):
        with monkeypatch.context() as patch, watch_reads() as reads:
            patch.setattr(PreTrainedModel, "from_pretrained", started)
            with pytest.raises(error_type) as caught:
                load(folder)
        assert caught.type is error_type
        for pattern in patterns:
            assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in: {caught.value}"
        assert not reads.paths

    return check


@pytest.fixture
def folder(checkpoints, tmp_path):
    return copied(checkpoints.get("qwen3_moe"), tmp_path / "model")


@pytest.fixture
def sharded(checkpoints, tmp_path):
    return copied(checkpoints.get("qwen3_moe", sharded=True), tmp_path / "model")


class TestTheFolder:
    def test_not_there(self, refused, tmp_path):
        refused(tmp_path / "nowhere" / "at" / "all", CheckpointError, "nowhere/at/all is not a folder", "hub id")

    def test_a_hub_id_without_network(self, refused):
        refused("some-one/some-model", CheckpointError, "some-one/some-model", "HF_HUB_OFFLINE is set")

    def test_a_file(self, refused, folder):
        refused(folder / "model.safetensors", CheckpointError, r"model\.safetensors is a file", "Give the folder")

    def test_empty(self, refused, tmp_path):
        refused(tmp_path, CheckpointError, r"no model\.safetensors")

    def test_shards_without_their_index(self, refused, sharded):
        (sharded / "model.safetensors.index.json").unlink()
        refused(sharded, CheckpointError, r"model-00001-of-\d+\.safetensors", r"no model\.safetensors\.index\.json")

    def test_no_config(self, refused, folder):
        (folder / "config.json").unlink()
        refused(folder, CheckpointError, r"no config\.json", "Give the folder")

    @pytest.mark.parametrize("content", ["{", "", "[1, 2]", "null", '"qwen3_moe"', "\x00\xff"])
    def test_a_config_that_is_none(self, refused, folder, content):
        (folder / "config.json").write_text(content, encoding="latin-1")
        refused(folder, CheckpointError, r"config\.json is not a JSON object")

    def test_a_config_without_model_type(self, refused, folder):
        edit_json(folder / "config.json", model_type=None, architectures=None)
        refused(folder, UnsupportedModelError, r"config\.json", "model type None")

    def test_a_config_of_the_wrong_types(self, refused, folder):
        edit_json(folder / "config.json", hidden_size="many")
        refused(folder, CheckpointError, r"config\.json", "hidden_size")

    def test_sizes_that_do_not_fit_together(self, refused, folder):
        edit_json(folder / "config.json", hidden_act="nonsense")
        refused(folder, CheckpointError, r"config\.json", "nonsense")

    def test_pickles(self, refused, folder):
        torch.save({}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        refused(folder, UnsupportedModelError, r"pytorch_model\.bin", "safetensors only", "save_pretrained")


class TestTheModel:
    @pytest.fixture
    def saved(self, tmp_path):
        def save(config):
            from transformers import AutoModel, AutoModelForCausalLM

            try:
                model = AutoModelForCausalLM.from_config(config)
            except ValueError:
                model = AutoModel.from_config(config)
            model.save_pretrained(tmp_path / "other")
            return tmp_path / "other"

        return save

    def test_dense(self, refused, saved):
        from transformers import LlamaConfig

        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        folder = saved(LlamaConfig(vocab_size=VOCAB_SIZE, **sizes))
        refused(folder, UnsupportedModelError, "dense model", "llama", "with transformers itself")

    def test_experts_that_are_not_offloaded(self, refused, saved):
        from transformers import DogeConfig

        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = DogeConfig(vocab_size=VOCAB_SIZE, is_moe=True, num_experts=16, num_experts_per_tok=4, **sizes)
        refused(saved(config), UnsupportedModelError, "doge", "not offloaded", "two vectors", "transformers itself")

    def test_experts_off_the_seam_without_an_adapter(self, refused, saved, monkeypatch):
        from transformers import DbrxConfig

        monkeypatch.setattr(registry, "adapter_of", lambda cls: None)
        attention, experts = (
            {"kv_n_heads": 2, "rope_theta": 1e4},
            {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        )
        sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "vocab_size": VOCAB_SIZE}
        folder = saved(DbrxConfig(attn_config=attention, ffn_config=experts, **sizes))
        refused(folder, UnsupportedModelError, "dbrx", "no adapter", "transformers itself")

    def test_no_language_model(self, refused, saved):
        from transformers import ViTConfig

        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        refused(saved(ViTConfig(image_size=32, **sizes)), UnsupportedModelError, "vit", "not a causal language model")

    def test_unknown_to_transformers(self, refused, folder):
        edit_json(folder / "config.json", model_type="next_years_moe")
        refused(folder, UnsupportedModelError, "next_years_moe", r"config\.json", "does not know model type")

    def test_code_in_the_folder_is_not_run(self, refused, folder, monkeypatch):
        """transformers would ask on the terminal whether to."""
        (folder / "mine.py").write_text("raise SystemExit('code of the checkpoint was run')")
        edit_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"})
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
        refused(folder, UnsupportedModelError, "mine", r"config\.json", "its own code")


class TestTheFiles:
    def test_a_missing_shard(self, refused, sharded):
        gone = sorted(sharded.glob("model-*.safetensors"))[1]
        gone.unlink()
        refused(sharded, CorruptCheckpointError, gone.name, r"1 of \d+ shards", "Download")

    @pytest.mark.parametrize("keep", [0, 5, 100, -1])
    def test_a_truncated_shard(self, refused, sharded, keep):
        short = sorted(sharded.glob("model-*.safetensors"))[1]
        os.truncate(short, keep if keep >= 0 else short.stat().st_size + keep)
        refused(sharded, CorruptCheckpointError, short.name, "truncated|too short", "Download|too short")

    def test_a_web_page_in_place_of_a_shard(self, refused, folder):
        (folder / "model.safetensors").write_text("<!DOCTYPE html><title>Too many requests</title>" * 9)
        refused(folder, CorruptCheckpointError, r"model\.safetensors", "not a safetensors file", "Download")

    @pytest.mark.parametrize("header", [[], {"t": 1}, {"t": {"dtype": "F32"}}, {"t": {"shape": None}}])
    def test_a_malformed_header(self, refused, folder, header):
        write_parts(folder / "model.safetensors", header, b"")
        refused(folder, CorruptCheckpointError, r"model\.safetensors has a malformed header", "Download")

    def test_a_header_that_is_not_json(self, refused, folder):
        raw = bytearray((folder / "model.safetensors").read_bytes())
        raw[8] = ord("!")
        (folder / "model.safetensors").write_bytes(raw)
        refused(folder, CorruptCheckpointError, r"model\.safetensors has a malformed header", "Download")

    def test_overlapping_tensors(self, refused, folder):
        def overlap(header):
            begin, end = header[EXPERT]["data_offsets"]
            header[EXPERT]["data_offsets"] = [begin - 64, end - 64]

        change_header(folder / "model.safetensors", overlap)
        refused(folder, CorruptCheckpointError, re.escape(EXPERT), "overlaps", "Download")

    def test_a_range_before_the_data(self, refused, folder):
        change_header(folder / "model.safetensors", lambda header: header[EXPERT].update(data_offsets=[-8192, 0]))
        refused(folder, CorruptCheckpointError, re.escape(EXPERT), "overlaps the header")

    @pytest.mark.parametrize("by", [-64, 64])
    def test_a_range_of_the_wrong_length(self, refused, folder, by):
        header, payload = read_parts(folder / "model.safetensors")
        last = max((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        header[last]["data_offsets"][1] += by
        write_parts(folder / "model.safetensors", header, payload + bytes(64))
        refused(folder, CorruptCheckpointError, re.escape(last), r"has \d+ bytes in place of \d+")

    def test_a_hole(self, refused, folder):
        change_header(folder / "model.safetensors", lambda header: header.pop(EXPERT))
        refused(folder, CorruptCheckpointError, r"model\.safetensors", "no tensor has the 8192 bytes", "Download")

    def test_bytes_after_the_end(self, refused, folder):
        with open(folder / "model.safetensors", "ab") as file:
            file.write(bytes(100))
        refused(folder, CorruptCheckpointError, r"model\.safetensors goes on for 100 bytes", "Download")

    def test_an_index_that_names_absent_tensors(self, refused, sharded):
        index = json.loads((sharded / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.layers.9.absent"] = (
            "model-00001-of-" + next(iter(index["weight_map"].values()))[-17:]
        )
        (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(
            sharded, CorruptCheckpointError, r"model\.layers\.9\.absent", "does not hold it", "index and the shards"
        )

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
    def test_an_index_that_is_none(self, refused, sharded, content):
        (sharded / "model.safetensors.index.json").write_text(content)
        refused(sharded, CorruptCheckpointError, r"index\.json is not a safetensors index", "Download")


class TestTheExperts:
    @pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "U8"])
    def test_stored_as_bytes(self, refused, folder, dtype):
        """Quantised: every expert's up projection one byte wide."""
        header, payload = read_parts(folder / "model.safetensors")
        for name, info in header.items():
            if "up_proj" in name and "experts" in name:
                begin, end = info["data_offsets"]
                info["dtype"], info["data_offsets"] = dtype, [begin, begin + (end - begin) // 4]
        write_parts(folder / "model.safetensors", *closed_up(header, payload))
        refused(folder, UnsupportedModelError, "experts", dtype, "F32, F16, BF16", "how it is quantised")

    def test_one_expert_of_another_dtype(self, refused, folder):
        header, payload = read_parts(folder / "model.safetensors")
        begin, end = header[EXPERT]["data_offsets"]
        header[EXPERT].update(dtype="F16", data_offsets=[begin, begin + (end - begin) // 2])
        write_parts(folder / "model.safetensors", *closed_up(header, payload))
        refused(folder, CorruptCheckpointError, re.escape(EXPERT), "F16", "F32")

    def test_gate_and_up_of_different_dtypes(self, refused, folder):
        header, payload = read_parts(folder / "model.safetensors")
        for name, info in header.items():
            if "experts" in name and "up_proj" in name:
                begin, end = info["data_offsets"]
                info.update(dtype="F16", data_offsets=[begin, begin + (end - begin) // 2])
        write_parts(folder / "model.safetensors", *closed_up(header, payload))
        refused(folder, CorruptCheckpointError, r"gate_up_proj is stored in several dtypes: \['F16', 'F32'\]")

    def test_one_expert_of_another_shape(self, refused, folder):
        change_header(folder / "model.safetensors", lambda header: header[EXPERT].update(shape=[64, 32]))
        refused(folder, CorruptCheckpointError, re.escape(EXPERT), r"\[64, 32\]", r"\[32, 64\]")

    @pytest.mark.parametrize("changes", [{"moe_intermediate_size": 48}, {"hidden_size": 128}])
    def test_the_config_says_other_sizes(self, refused, folder, changes):
        edit_json(folder / "config.json", **changes)
        refused(folder, CorruptCheckpointError, "experts", "the config says", r"config\.json and the weights")

    @pytest.mark.parametrize("num_experts", [15, 17])
    def test_the_config_says_another_number_of_experts(self, refused, folder, num_experts):
        edit_json(folder / "config.json", num_experts=num_experts, num_local_experts=None)
        refused(folder, CorruptCheckpointError, "stores 16 experts", rf"config\.json says {num_experts}")

    def test_the_config_says_more_layers(self, refused, folder):
        edit_json(folder / "config.json", num_hidden_layers=4, layer_types=None)
        refused(
            folder, CorruptCheckpointError, r"stores nothing for model\.layers\.3\.mlp\.experts", "shard is missing"
        )

    def test_one_expert_is_missing(self, refused, folder):
        without(folder / "model.safetensors", EXPERT)
        refused(folder, CorruptCheckpointError, r"model\.layers\.1\.mlp\.experts", "15 experts", "16")


class TestTheDenseWeights:
    """Found by transformers while it loads them; still before the first expert is read."""

    @pytest.fixture
    def refused_later(self, load):
        def check(folder, *patterns):
            with watch_reads() as reads, pytest.raises(CorruptCheckpointError) as caught:
                load(folder)
            for pattern in patterns:
                assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in: {caught.value}"
            assert not reads.paths

        return check

    def test_one_is_missing(self, refused_later, folder):
        without(folder / "model.safetensors", "model.layers.1.mlp.gate.weight")
        refused_later(folder, r"lacks model\.layers\.1\.mlp\.gate\.weight", "1 missing")

    def test_one_has_another_shape(self, refused_later, folder):
        change_header(
            folder / "model.safetensors",
            lambda header: header["model.layers.1.mlp.gate.weight"].update(shape=[32, 32]),
        )
        refused_later(folder, r"model\.layers\.1\.mlp\.gate\.weight", "another shape")

    def test_one_too_many(self, refused_later, folder):
        header, payload = read_parts(folder / "model.safetensors")
        header["model.extra.weight"] = {"dtype": "F32", "shape": [4], "data_offsets": [len(payload), len(payload) + 16]}
        write_parts(folder / "model.safetensors", header, payload + bytes(16))
        refused_later(folder, r"model\.extra\.weight", "no place", "different models")
