"""Models that llama.cpp's own converter wrote: read here, they have the logits and tokens of what it was given.

The files are those of tests/converted/convert.py, which says how they were made; the models, made anew from the
same numbers, are transformers' own.
"""

import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from foreroute.checkpoint.gguf_file import read_gguf
from foreroute.checkpoint.locate import read_index
from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError
from foreroute.model.build.skeleton import outline
from foreroute.model.gguf.families import FAMILIES
from foreroute.model.gguf.settings import settings_of
from tests.converted.convert import CONVERTED
from tests.converted.models import TINY, tiny_config, tiny_model
from tests.support.checkpoints import save_tokenizer

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "formats.md"
TABLE_HEAD = "| architecture | transformers' model type | tensors that are changed back |\n|---|---|---|\n"
Converted = Callable[[str], Path]
# Settings that no number of an answer depends on.
IDLE = frozenset({
    "initializer_range", "use_cache", "attention_dropout", "output_router_logits", "router_aux_loss_coef",
    "router_jitter_noise", "input_jitter_noise", "pretraining_tp", "max_window_layers", "num_nextn_predict_layers",
    "mamba_chunk_size", "eod_token_id", "sep_token_id", "hidden_act", "chunk_size", "expand", "hidden_dropout",
    "mamba_proj_bias", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "mtp_layers_block_type",
    "num_logits_to_keep", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_limit",
    "time_step_max", "use_associative_scan", "use_mamba_kernels", "use_mambapy",
})  # fmt: skip
# Those that follow from others in the config's class; and one that is none unless the metadata say otherwise.
FOLLOWING = frozenset({"mlp_layer_types", "sliding_window_pattern", "global_attn_every_n_layers", "clip_qkv"})

# Models that another of transformers' families computes alike.
READ_AS = {"qwen3_vl_moe_text": "qwen3_moe", "glm4_moe_lite": "deepseek_v3", "solar_open": "glm4_moe"}


def _tokens(length: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (1, length)))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=_tokens(40)).logits
        return found


@pytest.mark.parametrize("name", TINY)
def test_logits_and_tokens_are_those_of_the_model_that_was_converted(
    name: str, converted: Converted, load: Callable[..., Any]
) -> None:
    ours, theirs = load(converted(name), "60%", dtype="float32", math="torch"), tiny_model(name)
    expected = _logits(theirs)
    assert (_logits(ours) - expected).abs().max() < 1e-4
    assert expected.std() > 0.3
    asked = {"input_ids": _tokens(9), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
    assert ours.generate(**asked).tolist() == theirs.generate(**asked).tolist()


def test_every_architecture_is_held_so() -> None:
    """With more than one file where its settings choose among models."""
    assert {read_gguf_architecture(name) for name in TINY} == FAMILIES.keys()
    assert len(FAMILIES) >= 16


def test_the_table_of_the_documentation_is_this() -> None:
    _, table, _ = _said()
    assert table == architecture_table(), "python -m tests.converted.test_architectures writes it"


def _said() -> tuple[str, str, str]:
    """The documentation before its table, the table, and the rest."""
    before, head, rest = DOCUMENTATION.read_text().partition(TABLE_HEAD)
    table, end, after = rest.partition("\n\n")
    return before + head, f"{table}\n", end[1:] + after


def architecture_table() -> str:
    """A line for each architecture: what transformers calls it, and which of its tensors are changed back."""
    types: dict[str, set[str]] = {}
    for name in TINY:
        types.setdefault(read_gguf_architecture(name), set()).add(TINY[name][0])
    changed = {
        name: dict.fromkeys(
            end.removesuffix(".weight").removesuffix(".bias") for end, change in family.changes.items() if change
        )
        for name, family in FAMILIES.items()
    }
    return "".join(
        f"| {name} | {', '.join(sorted(types[name]))} | {', '.join(changed[name])} |\n" for name in FAMILIES
    ).replace("|  |", "| |")


def read_gguf_architecture(name: str) -> str:
    """The architecture in the first bytes of a file's metadata."""
    with lzma.open(CONVERTED / f"{name}.gguf.xz") as file:
        head = file.read(4096)
    at = head.index(b"general.architecture") + len(b"general.architecture") + 4
    length = int.from_bytes(head[at : at + 8], "little")
    return head[at + 8 : at + 8 + length].decode()


@pytest.mark.parametrize("name", TINY)
def test_no_setting_is_left_to_its_class(name: str, converted: Converted) -> None:
    """A default would be right for some models and wrong for others."""
    model_type, settings = settings_of(read_gguf(converted(name)))
    config = tiny_config(name).get_text_config()
    own = set(vars(config)) & set(type(config).__dataclass_fields__) - set(type(config).__mro__[1].__dataclass_fields__)
    assert own, "the settings of the family"
    said = {config.attribute_map.get(name, name) for name in settings}
    derived = FOLLOWING | ({"layer_types"} if settings.get("sliding_window", 0) is None else set())
    assert own - said - IDLE - derived == set()
    assert model_type == READ_AS.get(config.model_type, config.model_type)


def _rewritten(path: Path, out: Path, change: Callable[[str, np.ndarray], dict[str, np.ndarray]], **more: Any) -> Path:
    """The file with its tensors changed, each [name, numbers] to tensors by name; `more` metadata."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name != "general.architecture" and not name.startswith(("GGUF.", "tokenizer.")):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for name, value in more.items():
        writer.add_key_value(f"{architecture}.{name}", value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        for name, numbers in change(tensor.name, np.array(tensor.data)).items():
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_tokenizer(out.parent)
    return out


def test_gate_and_up_in_one_tensor_are_the_same_model(
    converted: Converted, tmp_path: Path, load: Callable[..., Any]
) -> None:
    """As a switch of the converter writes them."""
    gates: dict[str, np.ndarray] = {}

    def fused(name: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        if "ffn_gate_exps" in name:
            gates[name] = numbers
            return {}
        if "ffn_up_exps" in name:
            both = np.concatenate((gates[name.replace("ffn_up", "ffn_gate")], numbers), 1)
            return {name.replace("ffn_up", "ffn_gate_up"): both}
        return {name: numbers}

    path = _rewritten(converted("qwen3moe"), tmp_path / "fused.gguf", fused)
    expected = _logits(load(converted("qwen3moe"), "60%", dtype="float32", math="torch"))
    for math in ("torch", "ggml"):
        ours = _logits(load(path, "60%", dtype="float32", math=math))
        assert (ours - expected).abs().max() < 1e-4


def test_keys_and_values_of_older_files_are_whole(
    converted: Converted, tmp_path: Path, load: Callable[..., Any]
) -> None:
    """DeepSeek's attn_kv_b, before the converter split it."""
    weights = tiny_model("deepseek3").state_dict()

    def whole(name: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        if "attn_v_b" in name:
            layer = name.split(".")[1]
            kv_b = weights[f"model.layers.{layer}.self_attn.kv_b_proj.weight"].numpy()
            return {f"blk.{layer}.attn_kv_b.weight": kv_b}
        return {} if "attn_k_b" in name else {name: numbers}

    path = _rewritten(converted("deepseek3"), tmp_path / "whole.gguf", whole)
    expected = _logits(tiny_model("deepseek3"))
    assert (_logits(load(path, "60%", dtype="float32", math="torch")) - expected).abs().max() < 1e-4


def test_blocks_of_multi_token_prediction_are_left_unread(
    converted: Converted, tmp_path: Path, load: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def deeper(name: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        more = {name.replace("blk.1.", "blk.2."): numbers} if name.startswith("blk.1.attn") else {}
        head = {"blk.2.nextn.eh_proj.weight": numbers} if name == "output.weight" else {}
        return {name: numbers, **more, **head}

    path = _rewritten(converted("glm4moe"), tmp_path / "deeper.gguf", deeper, nextn_predict_layers=1)
    content = path.read_bytes()
    at = content.index(b"glm4moe.block_count") + len(b"glm4moe.block_count") + 4
    path.write_bytes(content[:at] + (3).to_bytes(4, "little") + content[at + 4 :])
    ours = _logits(load(path, "60%", dtype="float32", math="torch"))
    assert (ours - _logits(tiny_model("glm4moe"))).abs().max() < 1e-4
    assert "Layers of multi-token prediction are left unread" in caplog.text


@pytest.mark.parametrize(
    ("name", "end"),
    [
        (name, end)
        for name in ("mixtral", "granitemoeshared", "granitehybrid", "qwen3next", "qwen35moe")
        for end in FAMILIES[read_gguf_architecture(name)].changes
        if not end.endswith("_proj.bias")
    ],
)
def test_a_change_that_is_not_undone_shows(
    name: str, end: str, converted: Converted, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate goes red for each of them."""
    architecture = read_gguf_architecture(name)
    family = FAMILIES[architecture]
    fewer = {one: change for one, change in family.changes.items() if one != end}
    monkeypatch.setitem(FAMILIES, architecture, replace(family, changes=fewer))
    try:
        ours = _logits(load(converted(name), "60%", dtype="float32", math="torch"))
    except CheckpointError:
        return  # its tensors have no place then
    assert not (ours - _logits(tiny_model(name))).abs().max() < 1e-3


def test_what_the_model_has_no_place_for_is_refused(converted: Converted, tmp_path: Path) -> None:
    path = converted("qwen3moe")
    first = next(iter(tiny_model("qwen3moe").state_dict().values())).numpy()

    def with_one_more(name: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {name: numbers, **({"blk.0.attn_strange.weight": first} if name == "output.weight" else {})}

    def without_norm(name: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {} if name == "blk.1.ffn_norm.weight" else {name: numbers}

    def with_a_long_norm(name: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.concatenate((numbers, numbers)) if name == "blk.1.ffn_norm.weight" else numbers}

    def same(name: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {name: numbers}

    def divided_by(divisors: list[float]) -> Callable[[str, np.ndarray], dict[str, np.ndarray]]:
        more = {"rope_freqs.weight": np.array(divisors, dtype=np.float32)}
        return lambda name, numbers: {name: numbers, **(more if name == "output.weight" else {})}

    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 24}
    for at, (change, more, error, said) in enumerate((
        (divided_by([1.0] * 7), {}, CorruptCheckpointError, r"rope_freqs.weight has 7 numbers, .* of the 32 dim"),
        (divided_by([1.0] * 15 + [0.0]), {}, CorruptCheckpointError, "16 numbers, not all positive"),
        (divided_by([1.0] * 16), yarn, UnsupportedModelError, r"scaled twice, by rope_freqs.weight and by rope.scal"),
        (with_one_more, {}, UnsupportedModelError, "attn_strange.weight is not known in a model of"),
        (without_norm, {}, CorruptCheckpointError, r"lacks blk.1.ffn_norm.weight \(model.layers.1.post_"),
        (with_a_long_norm, {}, CorruptCheckpointError, r"has another shape than the metadata say: \[128"),
        (same, {"attention.clamp_kqv": 8.0}, UnsupportedModelError, "clamp_kqv is 8.0, which transformers' family"),
        (same, {"expert_gating_func": 2}, UnsupportedModelError, "gating_func is 2, which transformers' qwen3_moe"),
        (same, {"attention.strange": 1}, UnsupportedModelError, "strange is 1, a setting that is not known here"),
        (same, {"attention.value_length": 8}, UnsupportedModelError, "value_length is 8, where keys have 32"),
    )):  # fmt: skip
        other = _rewritten(path, tmp_path / f"{at}.gguf", change, **more)
        with pytest.raises(error, match=said):
            outline(other, read_index(other))


if __name__ == "__main__":
    before, _, after = _said()
    DOCUMENTATION.write_text(before + architecture_table() + after)
