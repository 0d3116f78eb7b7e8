"""Tensors that mean nothing here are left unread and said in a line; any other without a place is an error."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foreroute.checkpoint.locate import read_index
from foreroute.errors import CorruptCheckpointError
from foreroute.model.build.skeleton import outline
from tests.support.checkpoints import edit_json
from tests.support.quantised import rewritten, write_awq, write_float_quantised, write_fp8, write_gptq
from tests.support.runs import ONE_PROMPT, assert_same_bits, expert_table, generate, packed_store

State = dict[str, torch.Tensor]
PREDICTION = {
    "eh_proj.weight": (64, 128),
    "enorm.weight": (64,),
    "hnorm.weight": (64,),
    "shared_head.norm.weight": (64,),
}


def with_layer(state: State, beyond: int, parts: dict[str, tuple[int, ...]]) -> State:
    """One more layer, like the last one, so far beyond it, with these parts of its own."""
    depth = num_layers(state)
    last, more = f"model.layers.{depth - 1}.", f"model.layers.{depth + beyond}."
    added = {name.replace(last, more): one.clone() for name, one in state.items() if name.startswith(last)}
    return {**state, **added, **{more + name: torch.ones(shape).bfloat16() for name, shape in parts.items()}}


def num_layers(state: State) -> int:
    return 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))


def loads_as(folder: Path, original: Path, references: Any, load: Any, caplog: Any, said: str) -> None:
    """See that generate says what it says without them, that pack takes it too, and that a line tells."""
    with caplog.at_level(logging.WARNING):
        ours = generate(load(folder, "25%"), ONE_PROMPT)
    assert_same_bits(ours, references.output(original, ONE_PROMPT))
    assert [said in record.getMessage() for record in caplog.records].count(True) == 1
    assert_same_bits(generate(load(folder, "25%", packed=str(packed_store(folder))), ONE_PROMPT), ours)
    assert outline(folder, read_index(folder)).dense_nbytes == outline(original, read_index(original)).dense_nbytes


@pytest.mark.parametrize("write", [None, write_fp8])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("is_declared", [True, False])
def test_layers_of_multi_token_prediction(
    checkpoints, published, references, load, tmp_path, caplog, family, write, is_declared
):
    """The published models have 61, 46 and 92 layers, and transformers knows the next one by that number."""
    original = checkpoints.get(family, "bf16") if write is None else published(write, family)
    parts = {} if is_declared else PREDICTION
    folder = rewritten(original, tmp_path / "mtp", lambda state: with_layer(state, 0, parts))
    edit_json(folder / "config.json", num_nextn_predict_layers=int(is_declared))
    loads_as(folder, original, references, load, caplog, "Layers of multi-token prediction are left unread")


@pytest.mark.parametrize("prefix", ["mtp.layers.0.", "model.mtp.", "model.mtp_layers.0.", "model.nextn.0."])
def test_modules_of_multi_token_prediction(checkpoints, references, load, tmp_path, caplog, prefix):
    original = checkpoints.get("qwen3_moe", "bf16")
    added = {f"{prefix}mlp.up_proj.weight": torch.ones(64, 64).bfloat16(), f"{prefix}norm.weight": torch.ones(64)}
    folder = rewritten(original, tmp_path / "mtp", lambda state: {**state, **added})
    loads_as(folder, original, references, load, caplog, "at a time (2 tensors, first ")


UNKNOWN: dict[str, tuple[Callable[[State], State], str]] = {
    # config.json says no such layer, or fewer of them, and they have nothing that an ordinary layer lacks.
    "a layer too many": (lambda state: with_layer(state, 0, {}), "model.layers."),
    "a layer far off": (lambda state: with_layer(state, 57, {}), "model.layers.6"),
    "part of a layer": (lambda state: {**state, "model.layers.1.mlp.extra.weight": torch.ones(4)}, "mlp.extra"),
    "a scale without a quantisation": (
        lambda state: {**state, "model.layers.1.self_attn.k_scale": torch.ones(1)},
        "self_attn.k_scale",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_others_are_an_error_for_pack_as_for_generate(checkpoints, load, tmp_path, family, case):
    change, named = UNKNOWN[case]
    folder = rewritten(checkpoints.get(family, "bf16"), tmp_path / "more", change)
    edit_json(folder / "config.json", num_nextn_predict_layers=0)
    for attempt in (expert_table, load):
        with pytest.raises(CorruptCheckpointError, match="has no place for") as raised:
            attempt(folder)
        assert named in str(raised.value)


def test_a_number_that_transformers_ignores_is_no_layer_of_a_deeper_model(checkpoints, tmp_path, monkeypatch):
    """In a model of 64 layers the 61st is a layer like any other: what it has too much is an error."""
    from transformers import DeepseekV3ForCausalLM

    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    change = {"model.layers.2.self_attn.q_bias": torch.ones(4)}
    folder = rewritten(checkpoints.get("deepseek_v3", "bf16"), tmp_path / "more", lambda state: {**state, **change})
    with pytest.raises(CorruptCheckpointError, match=r"model.layers.2.self_attn.q_bias"):
        expert_table(folder)


SCALES = (
    "self_attn.k_scale", "self_attn.v_scale", "self_attn.q_scale", "self_attn.kv_scale", "self_attn.attn.k_scale",
    "self_attn.k_proj.k_scale", "self_attn.v_proj.output_scale", "self_attn.prob_scale", "self_attn.k_zero_point",
)  # fmt: skip


@pytest.mark.parametrize("write", [write_fp8, write_float_quantised, write_gptq, write_awq])
def test_scales_of_keys_and_values(published, load, tmp_path, caplog, write):
    original = published(write, "qwen3_moe")

    def change(state: State) -> State:
        scales = {
            f"model.layers.{at}.{name}": torch.full((1,), 0.5) for at in range(num_layers(state)) for name in SCALES
        }
        return {**state, **scales}

    folder = rewritten(original, tmp_path / "scaled", change)
    theirs = generate(load(original, "25%"), ONE_PROMPT)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert_same_bits(generate(load(folder, "25%"), ONE_PROMPT), theirs)
    said = "Scales of keys and values are left unread"
    assert [said in record.getMessage() for record in caplog.records].count(True) == 1
    assert expert_table(folder).layers == expert_table(original).layers


def test_a_model_whose_keys_and_values_alone_are_quantised(checkpoints, references, load, tmp_path, caplog):
    original = checkpoints.get("qwen3_moe", "bf16")
    added = {f"model.layers.{at}.self_attn.{which}_scale": torch.ones(1) for at in range(3) for which in "kv"}
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    declared = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    folder = rewritten(original, tmp_path / "scaled", lambda state: {**state, **added}, quantization_config=declared)
    loads_as(folder, original, references, load, caplog, "(6 tensors, first model.layers.0.self_attn.k_scale)")


def test_static_scales_of_activations(published, load, tmp_path, caplog):
    """They say how activations would be rounded: here they are not, which a line tells."""
    original = published(write_float_quantised, "qwen3_moe")

    def change(state: State) -> State:
        stems = [name.removesuffix("weight_scale") for name in state if name.endswith("weight_scale")]
        return {**state, **{f"{stem}input_scale": torch.ones(1) for stem in stems}}

    folder = rewritten(original, tmp_path / "static", change)
    import json

    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    declared["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": False}
    edit_json(folder / "config.json", quantization_config=declared)
    theirs = generate(load(original, "25%"), ONE_PROMPT)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert_same_bits(generate(load(folder, "25%"), ONE_PROMPT), theirs)
    told = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
    # The other line is that on ggml's kernels.
    assert [one for one in told if not one.startswith("Quantised weights are dequantised by torch")] == [
        "The checkpoint asks for activations rounded to few bits (input_activations): "
        "here they stay in the compute dtype."
    ]


@pytest.mark.parametrize("suffix", ["weight_zero_point", "weight_g_idx"])
@pytest.mark.parametrize("module", ["self_attn.q_proj", "mlp.experts.3.down_proj"])
def test_what_a_format_does_not_declare_is_no_leftover(published, tmp_path, module, suffix):
    name = f"model.layers.1.{module}.{suffix}"
    folder = rewritten(
        published(write_float_quantised, "qwen3_moe"), tmp_path / "more", lambda state: {**state, name: torch.ones(8)}
    )
    assert name in load_file(folder / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=name):
        expert_table(folder)
