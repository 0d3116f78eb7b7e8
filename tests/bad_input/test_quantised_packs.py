"""Quantised packs that cannot be, or do not end well: each named, before work where it can be known before."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foreroute.checkpoint import codecs
from foreroute.checkpoint.codecs import CODECS
from foreroute.checkpoint.layouts import ExpertLayout, ExpertTable
from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import PackedStore, StoreWriter, partial_path, store_name, stored_choice
from foreroute.errors import PredictorError, StoreError, UnsupportedModelError
from foreroute.kernels.torch import quant as kernels
from foreroute.model.skeleton import outline
from foreroute.prepare.choosing import fitted_counts, most_used
from foreroute.prepare.pack import pack
from foreroute.prepare.quantise import Quantiser
from tests.support.broken import copied
from tests.support.checkpoints import random_model, save_checkpoint, save_tokenizer
from tests.support.families import FAMILIES
from tests.support.runs import watch_reads

ROOT = Path(__file__).parents[2]
CHOICE = {"int8_share": 0.25, "by": "text", "uses": 100, "share_of_uses": 0.5}


def quiet(done: int, total: int) -> None:
    """No progress."""


@pytest.fixture
def folder(checkpoints, tmp_path) -> Path:
    return copied(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "model")


def quantiser_of(folder: Path, quant: str = "int4") -> Quantiser:
    sketch = outline(folder, read_index(folder))
    mixed = {"often": [{1, 2}] * len(sketch.table.layers), "choice": CHOICE} if quant == "mixed" else {}
    return Quantiser(sketch.table, CODECS[quant], sketch.is_transposed, **mixed)


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
            (48, "mixed", ["down_proj", "48 columns", "whole groups of 32", "--quant int8 can"]),
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

    @pytest.mark.parametrize("quant", ["int4", "mixed"])
    def test_other_weights(self, load, folder, checkpoints, tmp_path, quant):
        other = copied(checkpoints.get("qwen3_moe", "bf16", seed=1), tmp_path / "other")
        made(other, quant).replace(folder / store_name(quant))
        with pytest.raises(StoreError, match="packed from other weights"):
            load(folder, packed=quant)

    def test_another_codec_than_its_name_says_is_said(self, load, folder):
        """The header decides, not the file's name."""
        made(folder, "int8").replace(folder / store_name("int4"))
        assert load(folder, packed="int4").foreroute.plan.stored_dtype == "int8"

    @pytest.mark.parametrize("quant", ["int4", "mixed"])
    def test_another_kind_of_cpu(self, load, folder, monkeypatch, quant):
        made(folder, quant)
        monkeypatch.setattr(kernels, "order_of", lambda bits, group: "another")
        with pytest.raises(StoreError, match=r"another kind of CPU.*foreroute pack --force"):
            load(folder, packed=quant)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_another_dtype(self, load, folder, dtype):
        made(folder, "mixed")
        with pytest.raises(
            StoreError, match=r"mixed experts is computed in bfloat16.*--dtype bfloat16, or --packed no"
        ):
            load(folder, packed="mixed", dtype=dtype)

    @pytest.mark.parametrize("keep", [0, 100, 4096, -1])
    def test_cut_off(self, load, folder, keep):
        path = made(folder, "mixed")
        os.truncate(path, keep if keep >= 0 else path.stat().st_size - 4096)
        with pytest.raises(StoreError, match="Remove it"):
            load(folder, packed="mixed")


KILLED = """
import os, signal, sys
from pathlib import Path
from foreroute.checkpoint import records
from foreroute.checkpoint.codecs import CODECS
from foreroute.checkpoint.locate import read_index
from foreroute.prepare.pack import pack
from foreroute.prepare.quantise import Quantiser
from foreroute.model.skeleton import outline

records._SYNC_EVERY_BYTES = 1
folder = Path(sys.argv[1])
sketch = outline(folder, read_index(folder))
choice = {"int8_share": 0.25, "by": "text", "uses": 100, "share_of_uses": 0.5}
quantiser = Quantiser(
    sketch.table, CODECS["mixed"], sketch.is_transposed, often=[{1, 2}] * len(sketch.table.layers), choice=choice
)

def progress(done, total):
    if done == 20:
        os.kill(os.getpid(), signal.SIGKILL)

pack(sketch.table, folder / records.store_name("mixed"), progress=progress, quantiser=quantiser)
"""


class TestNotToTheEnd:
    def test_killed_and_taken_up_again(self, folder, checkpoints, tmp_path):
        whole = made(copied(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "whole"), "mixed").read_bytes()
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            check=False,
        )
        assert done.returncode == -signal.SIGKILL
        path, quantiser = folder / store_name("mixed"), quantiser_of(folder, "mixed")
        assert not path.exists()
        # What the killed one had chosen can be taken up without choosing again.
        choice, often = stored_choice(partial_path(path), quantiser.source)
        assert choice == CHOICE
        assert often == [{1, 2}] * len(quantiser.source.layers)
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
            made(folder, "mixed")
        assert [path.name for path in folder.iterdir() if ".foreroute" in path.name] == []

    def test_one_that_was_only_begun_is_not_used(self, load, folder):
        """And the message says that nothing done is lost."""
        path = made(folder)
        path.replace(partial_path(path))
        with pytest.raises(StoreError, match=r"is not there. Make it with .*--quant int4`. That goes on"):
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

    def test_a_partial_one_of_another_choice_is_not_taken_up(self, folder):
        first, path = quantiser_of(folder, "mixed"), folder / store_name("mixed")

        def stop(done: int, total: int) -> None:
            if done == 9:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack(first.source, path, progress=stop, keep_partial=True, quantiser=first)
        sketch = outline(folder, read_index(folder))
        often = [{5}] * len(sketch.table.layers)
        second = Quantiser(sketch.table, CODECS["mixed"], sketch.is_transposed, often=often, choice=CHOICE)
        steps: list[int] = []
        pack(second.source, path, progress=lambda done, total: steps.append(done), quantiser=second)
        assert steps[0] == 0
        assert [layer.others for layer in PackedStore(path, sketch.table).table.layers] == [{5}] * len(often)
        assert second.is_measured


class TestChoosing:
    def test_the_most_used_of_all_layers_together(self):
        often, used = most_used([[5, 0, 9, 1], [2, 2, 8, 3]], 0.375)
        assert often == [{0, 2}, {2}]
        assert used == 22 / 30

    def test_where_uses_are_equal_the_first(self):
        assert most_used([[1, 1], [1, 1]], 0.5)[0] == [{0, 1}, frozenset()]

    @pytest.mark.parametrize(("share", "instead"), [(0.01, "--quant int4"), (0.99, "--quant int8")])
    def test_a_share_that_is_no_choice(self, share, instead):
        with pytest.raises(StoreError, match=instead):
            most_used([[1, 2], [3, 4]], share)

    def test_a_fit_of_another_model(self, folder, checkpoints, tmp_path):
        sketch = outline(folder, read_index(folder))
        assert fitted_counts(folder, sketch, "auto") is None
        with pytest.raises(PredictorError, match="does not exist"):
            fitted_counts(folder, sketch, str(tmp_path / "gone"))
        (tmp_path / "notes").write_text(json.dumps({"no": "fit"}))
        with pytest.raises(PredictorError, match="no file of `foreroute fit`"):
            fitted_counts(folder, sketch, str(tmp_path / "notes"))
