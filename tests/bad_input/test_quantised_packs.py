"""Quantised packs that cannot be, or do not end well: each named, before work where it can be known before."""

import dataclasses
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

from foreroute.checkpoint import codecs
from foreroute.checkpoint.codecs import CODECS
from foreroute.checkpoint.layouts import ExpertLayout, ExpertTable
from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import StoreWriter, partial_path, store_name
from foreroute.errors import StoreError, UnsupportedModelError
from foreroute.kernels.torch import quant
from foreroute.model.build.skeleton import outline
from foreroute.prepare.pack import pack
from foreroute.prepare.quantise import Quantiser
from tests.support.broken import copied
from tests.support.checkpoints import random_model, save_checkpoint, save_tokenizer
from tests.support.families import FAMILIES
from tests.support.runs import watch_reads

ROOT = Path(__file__).parents[2]


def quiet(done: int, total: int) -> None:
    """No progress."""


@pytest.fixture
def folder(checkpoints, tmp_path) -> Path:
    return copied(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "model")


def quantiser_of(folder: Path, quant: str = "int4") -> Quantiser:
    sketch = outline(folder, read_index(folder))
    return Quantiser(sketch.table, CODECS[quant], sketch.is_transposed)


def made(folder: Path, quant: str = "int4") -> Path:
    quantiser, path = quantiser_of(folder, quant), folder / store_name(quant)
    pack(quantiser.source, path, progress=quiet, quantiser=quantiser)
    return path


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
            (48, "int4", ["down_proj", "48 columns", "whole groups of 32", "--quant int8 can"]),
            (96, "int4-g128", ["whole groups of 128", "--quant int8 or int4 can"]),
            (40, "int8", ["down_proj", "40 columns", "whole blocks of 16", "pack without --quant"]),
            (8, "int4", ["8 columns", "pack without --quant"]),
        ],
    )
    @pytest.mark.usefixtures("_torch_setup")
    def test_what_the_kernels_cannot_take(self, tmp_path, inner, quant, fragments):
        """Of int8 the kernel would read past the end of a row of 40, and end the process."""
        folder = odd_model(tmp_path / "odd", moe_intermediate_size=inner)
        with watch_reads() as reads, pytest.raises(StoreError) as caught:
            quantiser_of(folder, quant)
        for fragment in (f"{quant} cannot take model.layers.", *fragments):
            assert fragment in str(caught.value), caught.value
        assert not reads.paths

    def test_a_store_with_such_a_matrix_is_not_computed_with(self, tmp_path, load, monkeypatch):
        """Made by whom did not know."""
        folder = odd_model(tmp_path / "odd", moe_intermediate_size=40)
        with monkeypatch.context() as unchecked:
            unchecked.setattr(codecs, "_INT8_COLUMNS", 1)
            unchecked.setattr(Quantiser, "_measure", lambda *args: None)
            made(folder, "int8")
        with pytest.raises(StoreError, match=r"int8 cannot take .*down_proj.* 40 columns"):
            load(folder, packed="int8")

    def test_a_family_whose_maths_is_not_known(self, folder):
        """Packing it would take its time, and then nothing could use the store."""
        sketch = outline(folder, read_index(folder))
        first = sketch.table.layers[0]
        odd = dataclasses.replace(first.layout.parts[0], name="odd_proj")
        layout = ExpertLayout((odd, *first.layout.parts[1:]))
        table = ExpertTable((dataclasses.replace(first, layout=layout),), sketch.table.index)
        with pytest.raises(UnsupportedModelError, match=r"odd_proj is not known.*Pack without --quant"):
            Quantiser(table, CODECS["int8"], sketch.is_transposed[:1])


class TestOfAnother:
    """A quantised store in the place of this model's."""

    def test_other_weights(self, load, folder, checkpoints, tmp_path):
        other = copied(checkpoints.get("qwen3_moe", "bf16", seed=1), tmp_path / "other")
        made(other).replace(folder / store_name("int4"))
        with pytest.raises(StoreError, match="packed from other weights"):
            load(folder, packed="int4")

    def test_another_codec_than_its_name_says_is_said(self, load, folder):
        """The header decides, not the file's name."""
        made(folder, "int8").replace(folder / store_name("int4"))
        assert load(folder, packed="int4").foreroute.plan.stored_dtype == "int8"

    def test_another_kind_of_cpu(self, load, folder, monkeypatch):
        made(folder)
        monkeypatch.setattr(quant, "order_of", lambda bits, group: "another")
        with pytest.raises(StoreError, match=r"another kind of CPU.*foreroute pack --force"):
            load(folder, packed="int4")

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_another_dtype(self, load, folder, dtype):
        made(folder)
        with pytest.raises(StoreError, match=r"int4 experts is computed in bfloat16.*--dtype bfloat16, or --packed no"):
            load(folder, packed="int4", dtype=dtype)

    @pytest.mark.parametrize("keep", [0, 100, 4096, -1])
    def test_cut_off(self, load, folder, keep):
        path = made(folder)
        os.truncate(path, keep if keep >= 0 else path.stat().st_size - 4096)
        with pytest.raises(StoreError, match="Remove it"):
            load(folder, packed="int4")


class TestOfEarlierVersions:
    """Stores of mixed bits, which `pack` made once: refused by name, never read as something else."""

    @pytest.fixture
    def mixed(self, folder) -> Path:
        """As such a store began: its codec, and per layer the experts that have the other layout."""
        path = made(folder, "int4").replace(folder / store_name("mixed"))
        raw = path.read_bytes()
        magic, nbytes, _ = struct.unpack_from("<8sQQ", raw)
        header = json.loads(raw[24 : 24 + nbytes])
        header |= {"codec": "mixed", "choice": {"int8_share": 0.25, "by": "text", "uses": 9, "share_of_uses": 0.5}}
        header["layers"] = [{**layer, "others": [1], "other_parts": layer["parts"]} for layer in header["layers"]]
        text = json.dumps(header, sort_keys=True).encode()
        path.write_bytes(struct.pack("<8sQQ", magic, len(text), xxhash.xxh3_64_intdigest(text)) + text)
        return path

    @pytest.mark.parametrize("asked", ["mixed", "path"])
    def test_a_store_of_mixed_bits(self, load, folder, mixed, asked):
        with pytest.raises(StoreError, match=r"mixed.* not read.*`foreroute pack --quant int4`.*--packed int4"):
            load(folder, packed=str(mixed) if asked == "path" else asked)

    def test_mixed_bits_without_a_store(self, load, folder):
        with pytest.raises(StoreError, match=r"--packed mixed: .*not read any more.*`foreroute pack --quant int4`"):
            load(folder, packed="mixed")

    def test_pack_does_not_write_over_it_unasked(self, folder, mixed):
        found = subprocess.run(
            [sys.executable, "-m", "foreroute.cli.main", "pack", str(folder), "--quant", "int4", "--out", str(mixed)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert found.returncode == 2
        assert "codec mixed" in found.stderr
        assert "--force packs over it" in found.stderr


KILLED = """
import os, signal, sys
from pathlib import Path
from foreroute.checkpoint import records
from foreroute.checkpoint.codecs import CODECS
from foreroute.checkpoint.locate import read_index
from foreroute.prepare.pack import pack
from foreroute.prepare.quantise import Quantiser
from foreroute.model.build.skeleton import outline

records._SYNC_EVERY_BYTES = 1
folder = Path(sys.argv[1])
sketch = outline(folder, read_index(folder))
quantiser = Quantiser(sketch.table, CODECS["int4"], sketch.is_transposed)

def progress(done, total):
    if done == 20:
        os.kill(os.getpid(), signal.SIGKILL)

pack(sketch.table, folder / records.store_name("int4"), progress=progress, quantiser=quantiser)
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
        path, quantiser = folder / store_name("int4"), quantiser_of(folder)
        assert not path.exists()
        assert partial_path(path).exists()
        steps: list[int] = []
        pack(quantiser.source, path, progress=lambda done, total: steps.append(done), quantiser=quantiser)
        assert steps[0] in (19, 20)
        assert path.read_bytes() == whole
        assert not quantiser.is_measured, "half of the layers were not seen"

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
        with pytest.raises(StoreError, match=r"does not exist. Make it with .*--quant int4`. That continues"):
            load(folder, packed="int4")

    def test_two_at_once(self, folder):
        """The second must not write into what the first is writing, and leaves it alone."""
        quantiser, path = quantiser_of(folder), folder / store_name("int4")
        order = {"codec": "int4", "order": quantiser.order}
        with StoreWriter(path, quantiser.table, **order):
            before = partial_path(path).read_bytes()
            with pytest.raises(StoreError, match=r"being written by another `foreroute pack`\. Wait for it"):
                made(folder)
            assert partial_path(path).read_bytes() == before
        assert made(folder).exists()
