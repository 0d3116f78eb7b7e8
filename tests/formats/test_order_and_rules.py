"""What single matrices of a checkpoint have of their own: an order of columns, rules, or no quantisation at all.

The reference is the same checkpoint as plain numbers, made by the format's definition (plain.py).
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foreroute.checkpoint.locate import read_index
from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError
from foreroute.model.build.skeleton import outline
from tests.formats.plain import FORMATS, State, numbers, plain
from tests.support.checkpoints import edit_json
from tests.support.quantised import gptq_components, rewritten, write_awq, write_gptq, write_mxfp4
from tests.support.runs import ONE_PROMPT, assert_same_bits, expert_table, generate, packed_store

GROUP = 16


@pytest.fixture
def gptq(published) -> Path:
    return published(write_gptq, "qwen3_moe")


def declaring(folder: Path, **keys: Any) -> Path:
    """With these keys in its quantisation's declaration; None removes one."""
    import json

    declared = {**json.loads((folder / "config.json").read_text())["quantization_config"], **keys}
    edit_json(folder / "config.json", quantization_config={k: v for k, v in declared.items() if v is not None})
    return folder


def reordered(state: State, part: str) -> State:
    """Columns of matrices with `part` in their names are of groups in an order of their own."""
    generator = torch.Generator().manual_seed(11)
    return {
        name: one[torch.randperm(len(one), generator=generator)] if name.endswith("g_idx") and part in name else one
        for name, one in state.items()
    }


@pytest.mark.parametrize(
    ("part", "says_so", "store"),
    [
        ("self_attn.q_proj", False, "safetensors"),
        ("1.mlp.experts", False, "safetensors"),
        ("", True, "safetensors"),
        ("", False, "packed"),
    ],
)
def test_columns_in_another_order(gptq, references, load, tmp_path, part, says_so, store):
    """Dense matrices, experts of one layer, or all; g_idx counts, whatever desc_act says."""
    folder = rewritten(gptq, tmp_path / "reordered", lambda state: reordered(state, part))
    declaring(folder, desc_act=says_so)
    reference = plain(folder, "gptq", tmp_path / "plain")
    packed = str(packed_store(folder)) if store == "packed" else "no"
    ours = generate(load(folder, "25%", packed=packed), ONE_PROMPT)
    assert_same_bits(ours, references.output(reference, ONE_PROMPT))
    assert ours.tokens.tolist() != generate(load(gptq, "25%"), ONE_PROMPT).tokens.tolist(), "the order means nothing"


def test_desc_act_whose_columns_lie_as_ever(gptq, tmp_path):
    """As with one group, or static groups: no expert is larger for it."""
    folder = declaring(shutil.copytree(gptq, tmp_path / "ordered"), desc_act=True)
    assert expert_table(folder).layers[0].layout == expert_table(gptq).layers[0].layout


def changed(gptq: Path, tmp_path: Path, name: str, to: torch.Tensor | None) -> Path:
    def change(state: State) -> State:
        return {key: one if key != name else to for key, one in state.items() if key != name or to is not None}

    return rewritten(gptq, tmp_path / "changed", change)


@pytest.mark.parametrize(
    ("to", "says_so", "said"),
    [
        (None, True, "is not stored, though the columns are said to be in another order"),
        (torch.full((64,), 4, dtype=torch.int32), False, "groups 4 to 4, of 4"),
        (torch.full((64,), -1, dtype=torch.int32), False, "groups -1 to -1, of 4"),
    ],
)
def test_an_order_that_cannot_be(gptq, tmp_path, to, says_so, said):
    name = "model.layers.1.self_attn.k_proj.g_idx"
    folder = declaring(changed(gptq, tmp_path, name, to), desc_act=says_so)
    with pytest.raises(CorruptCheckpointError, match=said) as raised:
        outline(folder, read_index(folder))
    assert name in str(raised.value)


def test_an_order_of_another_dtype(gptq, tmp_path):
    name = "model.layers.1.self_attn.k_proj.g_idx"
    folder = changed(gptq, tmp_path, name, torch.arange(64) // GROUP)
    with pytest.raises(UnsupportedModelError, match=f"{name} is I64"):
        outline(folder, read_index(folder))


def test_the_second_layout_of_gptq(gptq, references, load, tmp_path):
    """gptq_v2 stores zero points as they are, not less one."""
    folder = declaring(shutil.copytree(gptq, tmp_path / "second"), checkpoint_format="gptq_v2")
    reference = plain(folder, "gptq", tmp_path / "plain", shift=0)
    assert_same_bits(generate(load(folder, "25%"), ONE_PROMPT), references.output(reference, ONE_PROMPT))


def with_head(state: State) -> State:
    head = "lm_head.weight"
    return {**{name: one for name, one in state.items() if name != head}, **gptq_components(head, state[head], GROUP)}


def test_a_quantised_head(gptq, references, load, tmp_path):
    folder = declaring(rewritten(gptq, tmp_path / "head", with_head), lm_head=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    reference = plain(folder, "gptq", tmp_path / "plain")
    assert_same_bits(generate(load(folder, "25%"), ONE_PROMPT), references.output(reference, ONE_PROMPT))


LEFT_OUT = {  # how each format's declaration names what is not quantised
    "gptq": {"dynamic": {r"-:model\.layers\.0\..*": {}}},
    "awq": {"modules_to_not_convert": ["model.layers.0"]},
    "pack-quantized": {"ignore": ["re:.*layers.0.*", "lm_head"]},
    "float-quantized": {"ignore": ["re:.*layers.0.*", "lm_head"]},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_that_is_not_quantised(published, references, load, tmp_path, name):
    """Attention and experts: both are read as the numbers that they are."""
    whole = published(FORMATS[name][0], "qwen3_moe")
    folder = rewritten(whole, tmp_path / "parts", lambda state: numbers(state, name, only="layers.0."))
    declaring(folder, **LEFT_OUT[name])
    reference = plain(folder, name, tmp_path / "plain")
    table = expert_table(folder)
    assert [layer.stored_as for layer in table.layers[:2]] == ["", name]
    assert_same_bits(generate(load(folder, "25%"), ONE_PROMPT), references.output(reference, ONE_PROMPT))


def test_a_layer_of_mxfp4_that_is_not_quantised(published, checkpoints, tmp_path):
    """What is named in modules_to_not_convert is stored as numbers: the names say which it is."""
    numbered = load_file(checkpoints.get("gpt_oss", "bf16") / "model.safetensors")

    def change(state: State) -> State:
        kept = {name: one for name, one in state.items() if not (".0.mlp.experts" in name and name[-1] == "s")}
        return {**kept, **{name: one for name, one in numbered.items() if ".0.mlp.experts" in name}}

    folder = rewritten(published(write_mxfp4, "gpt_oss"), tmp_path / "parts", change)
    declaring(folder, modules_to_not_convert=["model.layers.0.mlp.experts"])
    assert [layer.stored_as for layer in expert_table(folder).layers[:2]] == ["", "mxfp4"]


def regrouped(state: State, source: State, part: str, group: int) -> State:
    """Matrices with `part` in their names in groups of another size."""
    made = dict(state)
    for name in [name for name in state if name.endswith("qweight") and part in name]:
        weight = name.replace("qweight", "weight")
        made |= gptq_components(weight, source[weight], group)
    return made


@pytest.mark.parametrize("part", ["self_attn", "layers.1.mlp.experts"])
def test_rules_with_groups_of_their_own(gptq, checkpoints, references, load, tmp_path, part):
    source = load_file(checkpoints.get("qwen3_moe", "bf16") / "model.safetensors")
    folder = rewritten(gptq, tmp_path / "grouped", lambda state: regrouped(state, source, part, 32))
    declaring(folder, dynamic={rf"+:.*\.{part}\..*": {"group_size": 32, "sym": True}, ".*": {"desc_act": False}})
    reference = plain(folder, "gptq", tmp_path / "plain")
    assert_same_bits(generate(load(folder, "25%"), ONE_PROMPT), references.output(reference, ONE_PROMPT))


@pytest.mark.parametrize("write", [write_gptq, write_awq])
@pytest.mark.parametrize(
    ("dynamic", "error", "said"),
    [
        ({"+:.*self_attn.*": {"bits": 8}}, UnsupportedModelError, r"self_attn.\w_proj is (gptq|awq) with 8 bits"),
        ({"-:.*self_attn.*": {}}, CorruptCheckpointError, "is stored quantised, though a rule"),
        ({"+:.*": {"backend": "x"}}, UnsupportedModelError, r"dynamic.+:.\* sets backend"),
        ({"+:(": {"bits": 4}}, CheckpointError, "regular expression"),
        ({"+:.*": {"bits": "8"}}, CheckpointError, "bits is '8', which makes no sense"),
        ({"+:.*": {"group_size": 0}}, CheckpointError, "group_size is 0, which makes no sense"),
        ({"+:.*": 8}, CheckpointError, "is 8, which makes no sense: it must be an object"),
        ([], CheckpointError, r"quantization_config.dynamic is \[\], which makes no sense"),
    ],
)
def test_rules_that_are_not_followed(published, tmp_path, write, dynamic, error, said):
    folder = declaring(shutil.copytree(published(write, "qwen3_moe"), tmp_path / "ruled"), dynamic=dynamic)
    with pytest.raises(error, match=said):
        outline(folder, read_index(folder))


def test_experts_of_one_layer_whose_rules_differ(gptq, checkpoints, tmp_path):
    source = load_file(checkpoints.get("qwen3_moe", "bf16") / "model.safetensors")
    folder = rewritten(gptq, tmp_path / "grouped", lambda state: regrouped(state, source, "experts.3.", 32))
    declaring(folder, dynamic={r"+:.*experts\.3\..*": {"group_size": 32}})
    with pytest.raises(UnsupportedModelError, match="experts of one layer that differ"):
        outline(folder, read_index(folder))


def test_a_rule_for_what_is_not_stored_means_nothing(gptq, tmp_path):
    folder = declaring(shutil.copytree(gptq, tmp_path / "ruled"), dynamic={"+:.*visual.*": {"bits": 8}})
    outline(folder, read_index(folder))
