"""GGUF files: blocks as gguf's own dequantiser has them, tokens as the dequantised resident model has them.

That model's bits are torch's (math="torch"); what ggml's kernels give is held in tests/gates/test_blocks.py.
"""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from foreroute.checkpoint.gguf_file import EXPERT_BLOCKS, read_gguf
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.locate import read_index
from foreroute.cli.main import main
from foreroute.errors import (
    ChangedFileError,
    CheckpointError,
    CorruptCheckpointError,
    ForerouteError,
    UnsupportedModelError,
)
from foreroute.kernels.ggml.library import open_library
from foreroute.kernels.slot_views import TORCH_DTYPES
from foreroute.kernels.torch.dequantise import Workspaces, decode_part
from foreroute.kernels.torch.gguf_blocks import dequantise_gguf
from foreroute.model.build.skeleton import outline
from foreroute.model.gguf.settings import settings_of
from foreroute.model.text import load_tokenizer
from foreroute.transfer.disk import DiskTransfer
from foreroute.transfer.memory import allocate_slots
from tests.formats.gguf_writer import (
    Kind,
    Written,
    add_settings,
    gpt_oss_config,
    qwen3_moe_config,
    write_copy,
    write_gguf,
)
from tests.support.broken import overwrite, replace
from tests.support.checkpoints import save_tokenizer
from tests.support.runs import assert_same_bits, generate

Writing = Callable[..., Written]
TINY = Path(__file__).parents[2] / "models" / "foreroute-tiny"
# Architecture, experts, their down matrices if of another kind, dense matrices; bits per weight, biases aside.
CASES = {
    "qwen3moe-q8_0": ("qwen3moe", Kind.Q8_0, None, Kind.F16, 8.5),
    "qwen3moe-q4_k": ("qwen3moe", Kind.Q4_K, None, Kind.F32, 4.5),
    "qwen3moe-q4_k_m": ("qwen3moe", Kind.Q4_K, Kind.Q6_K, Kind.Q8_0, (2 * 4.5 + 6.5625) / 3),
    "gpt-oss-mxfp4": ("gpt-oss", Kind.MXFP4, None, Kind.Q8_0, 4.25),
    "gpt-oss-f16": ("gpt-oss", Kind.F16, Kind.BF16, Kind.F32, 16.0),
    # Types that the gguf package makes numbers of, not torch.
    "qwen3moe-q5_1": ("qwen3moe", Kind.Q5_1, Kind.TQ2_0, Kind.Q4_1, (2 * 6 + 2.0625) / 3),
}


@pytest.fixture(scope="module")
def written(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Writing:
    """The file of a case, made once."""
    made: dict[str, Written] = {}

    def get(case: str) -> Written:
        if case not in made:
            architecture, kind, down, dense, _ = CASES[case]
            made[case] = write_gguf(tmp_path_factory.mktemp(case), architecture, kind, down=down, dense=dense)
        return made[case]

    return get


@pytest.mark.parametrize("kind", EXPERT_BLOCKS)
def test_blocks_become_the_numbers_that_gguf_makes_of_them(kind: str) -> None:
    """All bytes at random: also infinite scales, subnormal powers of two and both zeros."""
    number = Kind[kind]
    raw = np.random.default_rng(0).integers(0, 256, (6, 40 * gguf.GGML_QUANT_SIZES[number][1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = raw.view(np.float32) if kind == "F32" else np.asarray(dequantize(raw, number))
        theirs = raw.view(np.float16).astype(np.float32) if kind == "F16" else theirs
    ours = dequantise_gguf(kind, torch.from_numpy(raw)).numpy()
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert ours.shape == theirs.shape
    assert same.all(), f"{(~same).sum()} of {same.size}"
    assert np.isfinite(theirs).mean() > 0.8
    if kind != "F32":
        ggml, out = open_library().traits(kind).to_float, np.empty_like(ours)
        ggml(raw.ctypes.data, out.ctypes.data, out.size)
        same = (ours.view(np.uint32) == out.view(np.uint32)) | (np.isnan(ours) & np.isnan(out))
        assert same.all(), f"{(~same).sum()} of {same.size} differ from ggml's"


def _decoded(table: ExpertTable, key: int) -> dict[str, torch.Tensor]:
    """An expert read into a slot, as the family has it, in fp32."""
    memory, slots = allocate_slots(1, table.slot_bytes)
    transfer = DiskTransfer(table.reads, slots.__getitem__, label=table.label)
    transfer.demand(key, 0)
    (done,) = transfer.wait()
    transfer.close()
    assert done.error is None
    layer = table.layers[table.expert_id(key).layer]
    stored = [
        torch.frombuffer(bytearray(slots[0][part.offset : part.offset + part.nbytes]), dtype=TORCH_DTYPES[part.dtype])
        .view(part.shape)
        for part in layer.layout.parts
    ]  # fmt: skip
    slots.clear()
    del memory
    return {part.name: decode_part(part, stored, torch.float32, Workspaces()).clone() for part in layer.parts}


@pytest.mark.parametrize("case", CASES)
def test_an_expert_in_its_slot_is_the_one_that_gguf_dequantises(case: str, written: Writing) -> None:
    made = written(case)
    table = outline(made.path, read_index(made.path)).table
    num_compared = 0
    for at, layer in enumerate(table.layers):
        module = made.resident.get_submodule(layer.name)
        for expert in (0, 1, layer.num_experts - 1):
            reads = table.reads(at * table.num_experts + expert)
            assert len(reads) <= len(layer.sources), "one range for a tensor of an expert"
            for name, tensor in _decoded(table, at * table.num_experts + expert).items():
                theirs = getattr(module, name)[expert]
                assert torch.equal(tensor.view(torch.int32), theirs.contiguous().view(torch.int32)), (name, expert)
                num_compared += tensor.numel()
    assert num_compared > 0


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_dequantised_resident_model(
    case: str, written: Writing, load: Callable[..., Any]
) -> None:
    made, bits = written(case), CASES[case][-1]
    model = load(made.path, "40%", dtype="float32", math="torch")
    ours, theirs = generate(model), generate(made.resident)
    assert_same_bits(ours, theirs)
    assert theirs.num_distinct > 5
    stats, plan = model.foreroute.stats(), model.foreroute.plan
    assert stats.evictions > 0
    assert plan.source == "gguf"
    assert plan.stored_dtype.startswith("gguf ")
    decode = stats.decode
    moved, loads = decode.demand_bytes + decode.prefetch_bytes, decode.demand_loads + decode.prefetch_loads
    assert loads > 0
    assert moved == loads * made.expert_nbytes, "nothing but what is stored"
    biases = sum(raw[0].nbytes for name, (raw, _) in made.experts.items() if name in _biases_of_block_0(made))
    found = 8 * (moved / loads - biases) / made.weights_per_expert
    print(f"{case}: {moved / decode.tokens / 1e3:.1f} kB moved per token, {found:.3f} bits per weight as stored")
    assert found == pytest.approx(bits, rel=1e-9)


def _biases_of_block_0(made: Written) -> list[str]:
    return [name for name in made.experts if name.startswith("blk.0.") and name.endswith("bias")]


def test_bf16_is_what_auto_means_and_gives_the_resident_models_bits(written: Writing, load: Callable[..., Any]) -> None:
    made = write_gguf(written("gpt-oss-mxfp4").path.parent / "bf16", "gpt-oss", Kind.MXFP4, dense=Kind.Q8_0)
    model = load(made.path, "40%", math="torch")
    assert model.dtype == torch.bfloat16
    for parameter in made.resident.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)  # not the buffers: frequencies stay as they are
    assert_same_bits(generate(model), generate(made.resident))


def test_settings_come_from_the_metadata(written: Writing) -> None:
    made = written("gpt-oss-mxfp4")
    config = outline(made.path, read_index(made.path)).config
    theirs = made.resident.config
    assert config.rope_parameters == theirs.rope_parameters
    for name in ("head_dim", "sliding_window", "layer_types", "rms_norm_eps", "num_experts_per_tok", "vocab_size"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.tie_word_embeddings is False


def _rewritten(path: Path, folder: Path, **settings: Any) -> Path:
    """The file with more settings: gpt-oss's, numbers."""
    reader = gguf.GGUFReader(path)
    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / path.name, "gpt-oss")
    for name, value in settings.items():
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.FLOAT32
        writer.add_key_value(name, value, kind)
    write_copy(reader, writer, without=settings)
    save_tokenizer(folder)
    return folder / path.name


YARN = "gpt-oss.rope.scaling."


def test_where_yarn_begins_and_ends_comes_from_the_metadata(
    written: Writing, load: Callable[..., Any], tmp_path: Path
) -> None:
    made = written("gpt-oss-mxfp4")
    bounds = {f"{YARN}yarn_beta_fast": 6.0, f"{YARN}yarn_beta_slow": 0.5}
    # And those that say what transformers does in any case.
    usual = {f"{YARN}yarn_ext_factor": 1.0, f"{YARN}yarn_attn_factor": 1.0, f"{YARN}attn_factor": 1.0}
    path = _rewritten(made.path, tmp_path / "bounds", **bounds, **usual)
    config = copy.deepcopy(made.resident.config)
    config.rope_parameters = {**config.rope_parameters, "beta_fast": 6.0, "beta_slow": 0.5}
    theirs = type(made.resident)(config).eval()
    theirs.load_state_dict(made.resident.state_dict())
    model = load(path, "40%", dtype="float32", math="torch")
    assert model.config.rope_parameters == config.rope_parameters
    out = generate(theirs)
    assert_same_bits(generate(model), out)
    before = generate(made.resident)
    assert not torch.equal(out.logits[0], before.logits[0]), "the bounds matter"


def test_positions_that_transformers_computes_otherwise_are_refused(written: Writing, tmp_path: Path) -> None:
    made = written("gpt-oss-mxfp4")
    for at, (name, value, said) in enumerate((
        (f"{YARN}yarn_ext_factor", 0.5, r"rope\.scaling\.yarn_ext_factor 0\.5 is not read"),
        (f"{YARN}yarn_attn_factor", 2.0, "yarn_attn_factor 2.0 is not read"),
        (f"{YARN}attn_factor", 2.0, "scaling.attn_factor 2.0 is not read"),
        (f"{YARN}yarn_log_multiplier", 0.1, "yarn_log_multiplier 0.1 is not read"),
        (f"{YARN}alpha", 3.0, "scaling.alpha 3.0 is not read"),
        (f"{YARN}type", "linear", "positions scaled as linear"),
        ("gpt-oss.rope.dimension_count", 16.0, "turn 16.0 of a head's 32 dimensions"),
        ("gpt-oss.attention.head_count", 0.0, "describe no gpt-oss"),
        ("gpt-oss.rope.freq_base", "often", "describe no gpt-oss"),
    )):  # fmt: skip
        path = _rewritten(made.path, tmp_path / str(at), **{name: value})
        with pytest.raises(CheckpointError, match=said):
            outline(path, read_index(path))


def test_a_factor_without_a_type_is_linear(tmp_path: Path) -> None:
    """As llama.cpp takes it; a factor of one is none."""
    for at, (name, value) in enumerate((("rope.scaling.factor", 4.0), ("rope.scale_linear", 2.0))):
        path = _minimal(tmp_path / f"{at}.gguf", settings={}, numbers={f"qwen3moe.{name}": value})
        with pytest.raises(UnsupportedModelError, match="positions scaled as linear"):
            settings_of(read_gguf(path))
        path = _minimal(tmp_path / f"{at}-one.gguf", settings={}, numbers={f"qwen3moe.{name}": 1.0})
        assert settings_of(read_gguf(path))[1]["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}


def test_a_tokenizer_of_another_model_beside_the_file_is_refused(written: Writing, tmp_path: Path) -> None:
    made = written("gpt-oss-mxfp4")
    assert load_tokenizer(made.path).encode("ab") == [ord("a") - 33, ord("b") - 33]
    shutil.copy(made.path, tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path / made.path.name)
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="the tokenizer has 4096 tokens, the model 264"):
        load_tokenizer(tmp_path / made.path.name)


@pytest.mark.parametrize(("architecture", "before"), [("qwen3moe", "qwen2"), ("gpt-oss", "gpt-4o")])
def test_without_a_tokenizer_beside_it_the_files_own_is_used(architecture: str, before: str, tmp_path: Path) -> None:
    saved = json.loads((TINY / "tokenizer.json").read_text())
    tokens = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].__getitem__)
    special = {entry["id"] for entry in saved["added_tokens"]}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(before)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if at in special else gguf.TokenType.NORMAL for at in range(len(tokens))]
    )
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    add_settings(writer, qwen3_moe_config() if architecture == "qwen3moe" else gpt_oss_config(), architecture)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = load_tokenizer(tmp_path / "model.gguf"), load_tokenizer(TINY)
    text = "Hello there, it's 12345  days!\n é日<|user|>x"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.eos_token == "<|endoftext|>"
    assert ours.chat_template == "{{ messages[0]['content'] }}"


def _minimal(
    path: Path, architecture: str = "qwen3moe", kind: Kind = Kind.Q8_0, tensors: tuple[str, ...] = (),
    parts: tuple[str, ...] = ("up",), settings: dict[str, Any] | None = None, numbers: dict[str, float] | None = None,
) -> Path:  # fmt: skip
    """A file with too little in it; with the settings of the tiny model, but for those that are given."""
    writer = gguf.GGUFWriter(path, architecture)
    raw = quantize(np.ones((2, 32, 256), dtype=np.float32), kind)
    for part in parts:
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", raw, raw_dtype=kind)
    for name in ("token_embd.weight", *tensors):
        writer.add_tensor(name, np.ones((264, 4), dtype=np.float32))
    if settings is not None:
        add_settings(writer, qwen3_moe_config(), architecture)
        for name, value in settings.items():
            writer.add_string(name, value)
        for name, number in (numbers or {}).items():
            writer.add_float32(name, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _retyped(path: Path, kind: int, other: int) -> Path:
    """The file with the number of the first expert tensor's type replaced."""
    content = path.read_bytes()
    name = content.index(b"_exps.weight") + len(b"_exps.weight")
    at = name + 4 + 3 * 8  # the number of extents, and three of them
    assert content[at : at + 4] == int(kind).to_bytes(4, "little")
    path.write_bytes(content[:at] + int(other).to_bytes(4, "little") + content[at + 4 :])
    return path


def test_what_is_not_read_is_refused_by_name_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"ffn_up_exps.weight is quantised as Q1_0.*Q4_K"):
        read_gguf(_retyped(_minimal(tmp_path / "quant.gguf", kind=Kind.Q5_1), Kind.Q5_1, Kind.Q1_0))
    with pytest.raises(
        UnsupportedModelError, match=r"type 99, which the gguf package .* does not know.*pip install -U"
    ):
        read_gguf(_retyped(_minimal(tmp_path / "newer.gguf", kind=Kind.Q5_1), Kind.Q5_1, 99))
    with pytest.raises(UnsupportedModelError, match="of architecture mamba2 are not read; those of llama, qwen2moe, "):
        settings_of(read_gguf(_minimal(tmp_path / "family.gguf", "mamba2")))
    for name, error, said, options in (
        ("none", CorruptCheckpointError, "does not say qwen3moe.context_length", {}),
        ("scaled", UnsupportedModelError, "positions scaled as longrope",
         {"settings": {"qwen3moe.rope.scaling.type": "longrope"}}),
        ("strange", UnsupportedModelError, "qwen3moe.attention.strange is 'very', a setting that is not known here",
         {"settings": {"qwen3moe.attention.strange": "very"}}),
        ("absent", CorruptCheckpointError, "lacks blk.0.ffn_gate_exps.weight", {"settings": {}}),
        ("shaped", CorruptCheckpointError, r"exps.weight gives an expert \[64, 256\], the metadata \[512, 256\]",
         {"settings": {}, "parts": ("gate", "up", "down")}),
    ):  # fmt: skip
        path = _minimal(tmp_path / f"{name}.gguf", **options)
        with pytest.raises(error, match=said):
            outline(path, read_index(path))


def test_damage_is_named(written: Writing, tmp_path: Path, load: Callable[..., Any]) -> None:
    whole = written("gpt-oss-mxfp4").path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-5000])
    with pytest.raises(CorruptCheckpointError, match="Download it again"):
        load(tmp_path / "cut.gguf")
    (tmp_path / "other.gguf").write_bytes(b"not a GGUF file at all, but long enough to be one" * 10)
    with pytest.raises(CorruptCheckpointError, match="not a complete GGUF file"):
        load(tmp_path / "other.gguf")


def test_a_file_that_changes_under_the_model(written: Writing, tmp_path: Path, load: Callable[..., Any]) -> None:
    """Replaced, it is read on as it was; written over, the model stops; and none of it is mapped."""
    path = tmp_path / "model.gguf"
    shutil.copyfile(written("qwen3moe-q8_0").path, path)
    save_tokenizer(tmp_path)
    model = load(path, "25%")
    assert str(path) not in Path("/proc/self/maps").read_text()
    expected = generate(load(written("qwen3moe-q8_0").path, "25%"))
    content = path.read_bytes()
    replace(path, bytes(len(content)))
    assert_same_bits(generate(model), expected)
    replace(path, content)
    model = load(path, "25%")
    overwrite(path, content)
    with pytest.raises(ChangedFileError, match=r"model\.gguf has changed .* Load the model again"):
        generate(model)


def test_without_the_package_it_is_said_how_to_get_it(
    written: Writing, monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]
) -> None:
    path = written("gpt-oss-mxfp4").path
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ForerouteError, match="pip install gguf"):
        load(path)


def test_the_command_line_takes_the_file(written: Writing, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written("gpt-oss-mxfp4").path)
    asked = ["--memory", "40%", "--dtype", "float32", "--math", "torch", "--max-new-tokens", "6"]
    asked += ["--no-do-sample", "--json"]
    assert main(["generate", path, "Hello", *asked]) == 0
    told = json.loads(capsys.readouterr().out)
    ids = torch.tensor([load_tokenizer(path).encode("Hello")])
    theirs = written("gpt-oss-mxfp4").resident.generate(ids, max_new_tokens=6, do_sample=False)
    assert told["token_ids"] == theirs[0, ids.shape[1] :].tolist()
    assert told["plan"]["stored_dtype"] == "gguf MXFP4"
