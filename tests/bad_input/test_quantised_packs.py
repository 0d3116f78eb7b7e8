"""Quantised packs that cannot be, or do not end well: each named, before work where it can be known before."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xxhash
from safetensors.torch import load_file, save_file

from foreroute.checkpoint.records import partial_path, store_name
from foreroute.checkpoint.store_writer import StoreWriter
from foreroute.errors import StoreError
from foreroute.prepare.pack import pack
from tests.support.broken import copied
from tests.support.checkpoints import random_model, save_checkpoint, save_tokenizer
from tests.support.families import FAMILIES
from tests.support.packs import pack_quantised, quantiser_of
from tests.support.runs import watch_reads

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(checkpoints, tmp_path) -> Path:
    return copied(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "model")


def made(folder: Path, quant: str = "q4_0") -> Path:
    return pack_quantised(folder, quant)


def odd_model(folder: Path, **sizes: int) -> Path:
    config = FAMILIES["qwen3_moe"]()
    for name, value in sizes.items():
        setattr(config, name, value)
    made = save_checkpoint(random_model(config, 0), folder, "bf16")
    save_tokenizer(made)
    return made


class TestShapes:
    @pytest.mark.parametrize(
        ("inner", "quant", "fragments"),
        [
            (48, "q4_0", ["down_proj", "rows have 48 weights", "blocks of 32", "No type here can: pack without"]),
            (64, "q4_k", ["gate_up_proj", "64 weights", "blocks of 256", "q8_0, iq4_nl or mxfp4 can", "takes q5_0 in"]),
            (96, "q4_k_m", ["gate_up_proj", "64 weights", "blocks of 256", "--quant q4_0, q4_1"]),
            (96, "iq4_xs", ["blocks of 256", "llama.cpp takes iq4_nl in its place"]),
        ],
    )
    @pytest.mark.usefixtures("_torch_setup")
    def test_rows_that_are_no_whole_blocks(self, tmp_path, inner, quant, fragments):
        folder = odd_model(tmp_path / "odd", moe_intermediate_size=inner)
        with watch_reads() as reads, pytest.raises(StoreError) as caught:
            quantiser_of(folder, quant)
        for fragment in (f"{quant} cannot take model.layers.", *fragments):
            assert fragment in str(caught.value), caught.value
        assert not reads.paths


class TestWeights:
    """Some that no block can hold: the expert is named, and nothing is left that looks whole."""

    @pytest.mark.parametrize(("weight", "said"), [(float("nan"), "nan"), (float("-inf"), "inf"), (1e6, "9994")])
    def test_a_weight_that_is_no_number(self, folder, weight, said):
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        state = load_file(folder / "model.safetensors")
        state[name][2, 7] = weight
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(StoreError, match=rf"expert 3 of MoE layer 1 .*gate_up_proj: a weight is {said}.*Pack with"):
            made(folder)
        assert not (folder / store_name("q4_0")).exists()


class TestOfAnother:
    """A quantised store in the place of this model's."""

    def test_other_weights(self, load, folder, checkpoints, tmp_path):
        other = copied(checkpoints.get("qwen3_moe", "bf16", seed=1), tmp_path / "other")
        made(other).replace(folder / store_name("q4_0"))
        with pytest.raises(StoreError, match="packed from other weights"):
            load(folder, packed="q4_0")

    def test_another_codec_than_its_name_says_is_said(self, load, folder):
        """The header decides, not the file's name."""
        made(folder, "q8_0").replace(folder / store_name("q4_0"))
        assert load(folder, packed="q4_0").foreroute.plan.stored_dtype == "q8_0"

    @pytest.mark.parametrize("keep", [0, 100, 4096, -1])
    def test_cut_off(self, load, folder, keep):
        path = made(folder)
        os.truncate(path, keep if keep >= 0 else path.stat().st_size - 4096)
        with pytest.raises(StoreError, match="Remove it"):
            load(folder, packed="q4_0")


class TestOfEarlierVersions:
    """Stores for torch's kernels, which `pack` made once: refused by name, never read as something else."""

    @pytest.fixture(params=["int8", "int4", "int4-g128", "mixed"])
    def old(self, folder, request) -> Path:
        """As such a store began."""
        path = made(folder).replace(folder / store_name(request.param))
        raw = path.read_bytes()
        magic, nbytes, _ = struct.unpack_from("<8sQQ", raw)
        header = {**json.loads(raw[24 : 24 + nbytes]), "codec": request.param, "order": "0123456789abcdef"}
        text = json.dumps(header, sort_keys=True).encode()
        path.write_bytes(struct.pack("<8sQQ", magic, len(text), xxhash.xxh3_64_intdigest(text)) + text)
        return path

    @pytest.mark.parametrize("by", ["name", "path"])
    def test_an_old_store(self, load, folder, old, by):
        codec = old.name.split(".")[1]
        again = "q8_0`" if codec == "int8" else r"q4_k` \(or q4_1\)"
        with pytest.raises(
            StoreError, match=rf"the codec {codec}, which .* not read. Pack again with .*--quant {again}"
        ):
            load(folder, packed=codec if by == "name" else str(old))

    def test_a_new_one_beside_it_is_taken(self, load, folder, old):
        codec = old.name.split(".")[1]
        made(folder, "q8_0" if codec == "int8" else "q4_1")
        assert load(folder, packed=codec).foreroute.plan.stored_dtype in ("q8_0", "q4_1")

    def test_none_at_all(self, load, folder):
        with pytest.raises(
            StoreError, match=r"q4_k.foreroute does not exist. Make it with `foreroute pack .*--quant q4_k`"
        ):
            load(folder, packed="mixed")

    @pytest.mark.parametrize("old", ["int4"], indirect=True)
    def test_pack_does_not_write_over_it_unasked(self, folder, old):
        found = subprocess.run(
            [sys.executable, "-m", "foreroute.cli.main", "pack", str(folder), "--quant", "q4_0", "--out", str(old)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert found.returncode == 2
        assert "in the codec" in found.stderr
        assert "--force packs over it" in found.stderr


class TestHeaders:
    """What a header says of its layers is compared, not believed: it decides where bytes are written."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer["parts"][0].update(offset=64),
            lambda layer: layer["parts"][0].update(nbytes=10**9),
            lambda layer: layer["tensors"][0].update(blocks=["Q8_0", "Q8_0"]),
            lambda layer: layer["tensors"][0].update(is_interleaved=True),
            lambda layer: layer["tensors"][1].update(is_transposed=True),
            lambda layer: layer.update(tensors=[]),
            lambda layer: layer.pop("tensors"),
            lambda layer: layer.update(tensors=7),
        ],
    )
    def test_another_layout(self, load, folder, change):
        path = made(folder)
        raw = path.read_bytes()
        magic, nbytes, _ = struct.unpack_from("<8sQQ", raw)
        header = json.loads(raw[24 : 24 + nbytes])
        change(header["layers"][1])
        text = json.dumps(header, sort_keys=True).encode()
        path.write_bytes(struct.pack("<8sQQ", magic, len(text), xxhash.xxh3_64_intdigest(text)) + text + raw[4096:])
        with pytest.raises(StoreError, match="laid out differently"):
            load(folder, packed="q4_0")


KILLED = """
import os, signal, sys
from pathlib import Path
from foreroute.checkpoint import records, store_writer
from foreroute.checkpoint.codecs import CODECS
from foreroute.checkpoint.locate import read_index
from foreroute.prepare.pack import pack
from foreroute.prepare.quantise import Quantiser
from foreroute.kernels.ggml.library import open_library
from foreroute.model.build.skeleton import outline

store_writer._SYNC_EVERY_BYTES = 1
folder = Path(sys.argv[1])
sketch = outline(folder, read_index(folder))
quantiser = Quantiser(sketch.table, CODECS["q4_0"], open_library(), 2)

def progress(done, total):
    if done == 20:
        os.kill(os.getpid(), signal.SIGKILL)

pack(sketch.table, folder / records.store_name("q4_0"), progress=progress, quantiser=quantiser)
"""


class TestNotToTheEnd:
    def test_killed_and_taken_up_again(self, folder, checkpoints, tmp_path):
        whole = made(copied(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "whole")).read_bytes()
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            check=False,
        )
        assert done.returncode == -signal.SIGKILL
        path, quantiser = folder / store_name("q4_0"), quantiser_of(folder, "q4_0")
        assert not path.exists()
        assert partial_path(path).exists()
        steps: list[int] = []
        pack(quantiser.source, path, progress=lambda done, total: steps.append(done), quantiser=quantiser)
        assert steps[0] in (19, 20)
        assert path.read_bytes() == whole
        assert not quantiser.is_measured, "half of the layers were not seen"

    def test_a_partial_one_of_another_type_is_not_taken_up(self, folder):
        """Both go to one path, as --out may say."""
        quantiser, path = quantiser_of(folder, "q8_0"), folder / "experts"

        def stop(done: int, total: int) -> None:
            if done == 9:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack(quantiser.source, path, progress=stop, keep_partial=True, quantiser=quantiser)
        quantiser, steps = quantiser_of(folder, "q4_0"), []
        pack(quantiser.source, path, progress=lambda done, total: steps.append(done), quantiser=quantiser)
        assert steps[0] == 0
        assert quantiser.is_measured
        assert path.read_bytes() == made(folder).read_bytes()

    @pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync"])
    def test_the_disk_is_full(self, folder, monkeypatch, call):
        original, calls = getattr(os, call), []

        def full(*args: Any) -> Any:
            calls.append(args)
            if call == "pwrite" and len(calls) < 20:
                return original(*args)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, call, full)
        with pytest.raises(
            StoreError, match=r"No space left on device. It needs [\d.]+ [KM]iB; nothing was left behind"
        ):
            made(folder)
        assert [path.name for path in folder.iterdir() if ".foreroute" in path.name] == []

    def test_one_that_was_only_begun_is_not_used(self, load, folder):
        """And the message says that nothing done is lost."""
        path = made(folder)
        path.replace(partial_path(path))
        with pytest.raises(StoreError, match=r"does not exist. Make it with .*--quant q4_0`. That continues"):
            load(folder, packed="q4_0")

    def test_two_at_once(self, folder):
        """The second must not write into what the first is writing, and leaves it alone."""
        quantiser, path = quantiser_of(folder, "q4_0"), folder / store_name("q4_0")
        with StoreWriter(path, quantiser.table, codec="q4_0"):
            before = partial_path(path).read_bytes()
            with pytest.raises(StoreError, match=r"being written by another `foreroute pack`\. Wait for it"):
                made(folder)
            assert partial_path(path).read_bytes() == before
        assert made(folder).exists()
