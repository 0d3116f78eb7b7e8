"""`pack --dense`: a store with dense weights in blocks gives what `dense=` at load gives, and is read as it lies."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from safetensors.torch import load_file, save_file

from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import PackedStore, partial_path
from foreroute.config import EngineConfig
from foreroute.errors import ChecksumError, CorruptCheckpointError, StoreError, UnsupportedModelError
from foreroute.kernels.ggml.library import GgmlError
from foreroute.kernels.ggml.linear import BlockEmbedding, BlockLinear
from foreroute.loading import block_kernels
from foreroute.loading.arguments import open_device
from foreroute.loading.block_kernels import dense_nbytes_at_load
from foreroute.loading.checkpoint import open_checkpoint
from foreroute.model.build.skeleton import outline
from tests.formats.gguf_writer import Kind, write_gguf
from tests.support.broken import copied, flip_byte
from tests.support.checkpoints import edit_json
from tests.support.packs import dense_quantiser_of, numbers_again, pack_dense, pack_quantised
from tests.support.quantised import write_fp8, write_gptq_around, write_mxfp4
from tests.support.runs import assert_same_bits, generate

ODD_ONE = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(checkpoints: Any, tmp_path: Path) -> Path:
    return copied(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "model")


def of_blocks(model: Any) -> list[BlockLinear | BlockEmbedding]:
    return [module for module in model.modules() if isinstance(module, BlockLinear | BlockEmbedding)]


@pytest.mark.parametrize("quant", [None, "q4_0"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_it_gives_what_quantising_at_load_gives(family, quant, checkpoints, load, tmp_path):
    """At every budget; with experts as they are stored, which torch computes, and in blocks."""
    folder = copied(checkpoints.get(family, "bf16"), tmp_path / "model")
    name = "dense-q5_1" if quant is None else f"{quant}-dense-q5_1"
    assert pack_dense(folder, "q5_1", quant).name == f"experts.{name}.foreroute"
    if quant is not None:
        pack_quantised(folder, quant)
    whole, part = load(folder, "100%", packed=name), load(folder, "25%", packed=name)
    at_load = load(folder, "100%", packed=quant or "no", dense="q5_1")
    expected = generate(at_load)
    assert_same_bits(generate(whole), expected)
    assert_same_bits(generate(part), expected)
    assert part.foreroute.stats().evictions > 0
    plan, other = whole.foreroute.plan, at_load.foreroute.plan
    assert (plan.dense, plan.source, other.dense) == ("q5_1", "packed", "q5_1")
    assert (plan.dense_bytes, plan.compute_dtype, plan.math) == (other.dense_bytes, other.compute_dtype, other.math)
    assert len(of_blocks(whole)) == len(of_blocks(at_load)) > 5


@pytest.mark.parametrize(("write", "family"), [(write_fp8, "qwen3_moe"), (write_mxfp4, "gpt_oss")])
def test_of_published_formats(write, family, checkpoints, load, tmp_path):
    """FP8's dense weights are quantised a second time, from all their digits; MXFP4's experts stay in its blocks."""
    folder = write(checkpoints.get(family, "bf16"), tmp_path / "model")
    pack_dense(folder, "q8_0")
    packed, at_load = load(folder, "50%", packed="dense-q8_0"), load(folder, "50%", packed="no", dense="q8_0")
    assert_same_bits(generate(packed), generate(at_load))
    assert packed.foreroute.plan.math == at_load.foreroute.plan.math


def test_memory_is_that_of_the_blocks_and_known_before(folder, load):
    pack_dense(folder, "q4_0", "q8_0")
    model = load(folder, packed="q8_0-dense-q4_0")
    held = sum({module.matrix.address: module.matrix.blocks.nbytes for module in of_blocks(model)}.values())
    floats = sum(one.nbytes for one in model.parameters())
    assert model.foreroute.plan.dense_bytes == held + floats
    config = EngineConfig(packed="q8_0-dense-q4_0")
    counted = dense_nbytes_at_load(config, open_checkpoint(folder, None, config.packed), open_device(config))
    assert counted == held + floats
    assert held == sum(open_checkpoint(folder, None, config.packed).store.dense.nbytes)


def test_without_it_nothing_changes(folder, load):
    pack_quantised(folder, "q8_0")
    plain = (folder / "experts.q8_0.foreroute").read_bytes()
    assert b'"dense"' not in plain[:65536]
    packed = pack_dense(folder, "q4_0", "q8_0").read_bytes()
    assert len(packed) > len(plain)
    assert packed[-len(plain) // 2 :] != plain[-len(plain) // 2 :]
    assert load(folder).foreroute.plan.source == "safetensors", "never found by itself"
    assert load(folder, packed="q8_0").foreroute.plan.dense == "stored"


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "iq4_nl", "mxfp4"])
def test_the_same_bytes_by_any_number_of_threads(folder, kind):
    written = [pack_dense(folder, kind, "q8_0", threads, resume=False).read_bytes() for threads in (1, 3)]
    assert written[0] == written[1]


def test_torch_dequantises_the_same_numbers(folder, load, tmp_path):
    """--math torch, and where ggml cannot be had: the bits of a checkpoint that has those numbers."""
    path = pack_dense(folder, "q8_0")
    twin, state = copied(folder, tmp_path / "twin"), load_file(folder / "model.safetensors")
    for name in PackedStore(path, outline(folder, read_index(folder)).table).dense.shapes:
        state[name] = numbers_again(state[name], "Q8_0").bfloat16()
    save_file(state, twin / "model.safetensors", {"format": "pt"})
    model = load(folder, "50%", packed="dense-q8_0", math="torch")
    assert not of_blocks(model)
    assert model.foreroute.plan.dense == "q8_0"
    assert_same_bits(generate(model), generate(load(twin, "50%", packed="no", math="torch")))


def test_without_ggml_torch_computes_and_says_so(folder, load, monkeypatch):
    pack_dense(folder, "q8_0")

    def absent() -> None:
        raise GgmlError("ggml is not here.")

    monkeypatch.setattr(block_kernels, "open_library", absent)
    model = load(folder, "50%", packed="dense-q8_0")
    assert not of_blocks(model)
    assert "ggml is not here" in model.foreroute.plan.math_note
    with pytest.raises(GgmlError, match="not here"):
        load(folder, packed="dense-q8_0", math="ggml")


def test_a_tied_head_is_packed_once(folder, load):
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", tie_word_embeddings=True)
    path = pack_dense(folder, "q8_0")
    names = PackedStore(path, outline(folder, read_index(folder)).table).dense.shapes
    assert "model.embed_tokens.weight" in names
    assert not [name for name in names if "lm_head" in name]
    model = load(folder, packed="dense-q8_0")
    assert model.lm_head.matrix is model.model.embed_tokens.matrix
    assert_same_bits(generate(model), generate(load(folder, packed="no", dense="q8_0")))


class TestRefused:
    def test_rows_that_are_no_whole_blocks(self, folder):
        with pytest.raises(UnsupportedModelError, match=r"--dense q6_k cannot take .*64 weights.*--dense q4_0, .* can"):
            dense_quantiser_of(folder, "q6_k")

    def test_a_gguf_file(self, tmp_path):
        written = write_gguf(tmp_path / "gguf", "gpt-oss", Kind.Q8_0)
        with pytest.raises(UnsupportedModelError, match=r"--dense q8_0: .*GGUF file stay in its own blocks. Leave it"):
            dense_quantiser_of(written.path, "q8_0")

    def test_four_bit_integers(self, checkpoints, load, tmp_path):
        folder = write_gptq_around(8)(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "gptq")
        for asking in (lambda: dense_quantiser_of(folder, "q8_0"), lambda: load(folder, dense="q8_0")):
            with pytest.raises(
                UnsupportedModelError,
                match=r"(--dense q8_0|dense=\"q8_0\"): .* four-bit integers .*gptq.* Leave it out",
            ):
                asking()

    def test_dense_beside_a_store_that_has_it(self, folder, load):
        pack_dense(folder, "q8_0")
        with pytest.raises(UnsupportedModelError, match=r"dense=\"q4_0\": .*store's dense weights are in q8_0 already"):
            load(folder, packed="dense-q8_0", dense="q4_0")

    def test_a_store_that_is_not_there(self, folder, load):
        for name, flags in (("q4_0-dense-q8_0", "--quant q4_0 --dense q8_0"), ("dense-q8_0", "--dense q8_0")):
            with pytest.raises(StoreError, match=rf"does not exist. Make it with `foreroute pack \S+ {flags}`"):
                load(folder, packed=name)
        for name in ("q4_0-dense-q9", "dense-Q8_0", "q4_0-dense-"):  # no names, so paths
            with pytest.raises(StoreError, match=f"--out {name}`"):
                load(folder, packed=name)

    def test_a_weight_that_is_no_number(self, folder):
        state = load_file(folder / "model.safetensors")
        state[ODD_ONE][3, 5] = float("nan")
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CorruptCheckpointError, match=rf"{ODD_ONE}: a weight is nan.*pack without --dense"):
            pack_dense(folder, "q8_0")
        assert not list(folder.glob("*.foreroute"))


class TestUnfinished:
    @pytest.mark.parametrize("further", [-3, 4])
    def test_it_is_continued(self, folder, checkpoints, tmp_path, further):
        """Among the experts, and among the dense matrices behind them."""
        whole = pack_dense(copied(folder, tmp_path / "whole"), "q8_0", "q8_0").read_bytes()
        stop_at = outline(folder, read_index(folder)).table.total_slots + further

        def interrupted(done: int, total: int) -> None:
            if done == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack_dense(folder, "q8_0", "q8_0", progress=interrupted, keep_partial=True)
        (partial,) = folder.glob("*.partial")
        assert not partial.with_name(partial.name.removesuffix(".partial")).exists()
        steps: list[int] = []
        path = pack_dense(folder, "q8_0", "q8_0", progress=lambda done, total: steps.append(done))
        assert steps[0] in (stop_at, stop_at - 1)
        assert path.read_bytes() == whole

    def test_another_type_is_not_taken_up(self, folder):
        """Both go to one path, as --out may say."""
        path = pack_dense(folder, "q8_0")
        other = path.rename(path.with_name("experts.dense-q4_0.foreroute"))
        other.rename(partial_path(other))
        steps: list[int] = []
        pack_dense(folder, "q4_0", progress=lambda done, total: steps.append(done))
        assert steps[0] == 0


class TestDamaged:
    def test_bytes_of_a_matrix(self, folder, load):
        path = pack_dense(folder, "q8_0")
        flip_byte(path, path.stat().st_size - 4096)
        for math in ("auto", "torch"):
            with pytest.raises(ChecksumError, match=r"the blocks of \S+ are not those that were packed. Pack"):
                load(folder, packed="dense-q8_0", math=math)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda dense: dense.update(type="Q4_0"), "in place of"),
            (lambda dense: dense.update(type="Q4_K"), "damaged header"),
            (lambda dense: dense.update(type="F32"), "damaged header"),
            (lambda dense: dense.update(type=None), "damaged header"),
            (lambda dense: dense["matrices"].pop(), "in place of"),
            (lambda dense: dense["matrices"][0].reverse(), "damaged header"),
            (lambda dense: dense["matrices"].append(dense["matrices"][0]), "damaged header"),
            (lambda dense: dense["matrices"][0].append(1), "damaged header"),
            (lambda dense: dense["matrices"].clear(), "damaged header"),
            (lambda dense: dense.update(more=1), "damaged header"),
            (lambda dense: dense["matrices"][0].__setitem__(0, "model.other.weight"), "its dense weights are others"),
        ],
    )
    def test_what_a_header_says_is_compared(self, folder, load, change: Callable[[Any], Any], said: str):
        path = pack_dense(folder, "q8_0")
        raw = path.read_bytes()
        magic, nbytes, _ = struct.unpack_from("<8sQQ", raw)
        header = json.loads(raw[24 : 24 + nbytes])
        change(header["dense"])
        text = json.dumps(header, sort_keys=True).encode()
        head = struct.pack("<8sQQ", magic, len(text), xxhash.xxh3_64_intdigest(text)) + text
        begin = -(-(24 + nbytes) // 4096) * 4096
        path.write_bytes(head.ljust(begin, b"\0") + raw[begin:])
        with pytest.raises(StoreError, match=said):
            load(folder, packed="dense-q8_0")
