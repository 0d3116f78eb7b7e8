"""Packed stores that are not this model's, not whole, or not what was packed; and packing that does not end well."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foreroute.checkpoint import source_files
from foreroute.checkpoint.records import STORE_NAME, PackedStore
from foreroute.checkpoint.store_writer import StoreWriter
from foreroute.errors import ChecksumError, ReadError, StoreError
from foreroute.prepare.pack import pack
from tests.support.broken import copied, flip_byte, overwrite, read_parts, replace
from tests.support.runs import ONE_PROMPT, assert_same_bits, expert_table, generate, packed_store, watch_reads

ROOT = Path(__file__).parents[2]
PAGE = 4096


def quiet(done, total):
    """No progress."""


@pytest.fixture
def folder(checkpoints, tmp_path):
    return copied(checkpoints.get("qwen3_moe"), tmp_path / "model")


@pytest.fixture
def store(folder):
    """The store where "auto" finds it."""
    path = folder / STORE_NAME
    pack(expert_table(folder), path, progress=quiet)
    return path


def refused(load, folder, *fragments, **options):
    with watch_reads() as reads, pytest.raises(StoreError) as caught:
        load(folder, **options)
    assert caught.type is StoreError
    for fragment in fragments:
        assert fragment in str(caught.value), caught.value
    assert not reads.paths


class TestOpening:
    def test_a_good_one(self, load, folder, store, references, checkpoints):
        """What all others here are compared with; nothing but the store is left in the folder."""
        assert [path.name for path in folder.iterdir() if STORE_NAME in path.name] == [STORE_NAME]
        model = load(folder)
        assert model.foreroute.plan.source == "packed"
        assert_same_bits(generate(model), references.output(checkpoints.get("qwen3_moe"), ONE_PROMPT))

    def test_other_weights_of_the_same_shape(self, load, folder, store, checkpoints):
        other = packed_store(checkpoints.get("qwen3_moe", seed=5))
        store.write_bytes(other.read_bytes())
        refused(load, folder, str(store), "packed from other weights", "foreroute pack", "packed=no")

    def test_another_family(self, load, folder, checkpoints):
        other = packed_store(checkpoints.get("olmoe"))
        refused(load, folder, str(other), "does not belong to this model", "foreroute pack", packed=str(other))

    def test_another_version(self, load, folder, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr("foreroute.checkpoint.records._VERSION", 999)
            pack(expert_table(folder), folder / STORE_NAME, progress=quiet)
        refused(load, folder, "version 999", "foreroute pack")

    def test_a_partial_one_is_not_used(self, load, folder, store):
        store.rename(store.with_name(store.name + ".partial"))
        model = load(folder)
        with watch_reads() as reads:
            generate(model)
        assert model.foreroute.plan.source == "safetensors"
        assert reads.names == {"model.safetensors"}

    def test_no_means_no(self, load, folder, store):
        flip_byte(store, 30)
        assert load(folder, packed="no").foreroute.plan.source == "safetensors"

    @pytest.mark.parametrize("keep", [0, 7, 100, PAGE, -PAGE, -1])
    def test_truncated(self, load, folder, store, keep):
        os.truncate(store, keep if keep >= 0 else store.stat().st_size + keep)
        refused(load, folder, str(store), "Remove it")

    def test_too_long(self, load, folder, store):
        with open(store, "ab") as file:
            file.write(bytes(PAGE))
        refused(load, folder, str(store), "Remove it and run `foreroute pack` again")

    def test_something_else(self, load, folder, store):
        store.write_text("not a store\n" * 10_000)
        refused(load, folder, str(store), "not a packed store", "foreroute pack")

    @pytest.mark.parametrize("offset", [0, 8, 16, 24, 300])
    def test_a_flipped_byte_in_the_header(self, load, folder, store, offset):
        flip_byte(store, offset)
        refused(load, folder, str(store), "Remove it")

    def test_a_missing_record(self, load, folder, store):
        with open(store, "r+b") as file:
            file.seek(table_start(store, folder) + 8 * 5)
            file.write(bytes(8))
        refused(load, folder, str(store), "1 of 48 records are missing", "foreroute pack")

    def test_named_and_not_there(self, load, folder, tmp_path):
        refused(load, folder, str(tmp_path / "gone"), "foreroute pack", packed=str(tmp_path / "gone"))

    def test_named_by_its_folder(self, load, folder, store, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        store.rename(tmp_path / "elsewhere" / STORE_NAME)
        assert load(folder, packed=str(tmp_path / "elsewhere")).foreroute.plan.source == "packed"


def table_start(store, folder):
    return PackedStore(store, expert_table(folder))._geometry.table_start


class TestReading:
    """Damage that no header shows: found when the record is read, and never computed with."""

    def expect(self, load, folder, store, record):
        model = load(folder, "100%", prefetch="none")
        with pytest.raises(ChecksumError) as caught:
            generate(model)
        layer, expert = divmod(record, 16)
        assert f"expert {expert} of MoE layer {layer} (model.layers.{layer}.mlp.experts)" in str(caught.value)
        assert str(store) in str(caught.value)
        assert "Pack the model again" in str(caught.value)
        return model

    @pytest.mark.parametrize("at", [0, 100, 24575])
    def test_a_flipped_byte_in_a_record(self, load, folder, store, references, checkpoints, at):
        expected = references.output(checkpoints.get("qwen3_moe"), ONE_PROMPT)
        record = first_record_read(load, folder)
        offset = PackedStore(store, expert_table(folder))._geometry.offsets[record] + at
        flip_byte(store, offset)
        model = self.expect(load, folder, store, record)
        flip_byte(store, offset)
        assert_same_bits(generate(model), expected)

    def test_a_flipped_byte_in_the_table(self, load, folder, store):
        record = first_record_read(load, folder)
        flip_byte(store, table_start(store, folder) + 8 * record)
        self.expect(load, folder, store, record)


def first_record_read(load, folder):
    """An expert that the prompt needs for sure: the first that its first layer routes to."""
    model = load(folder, "100%", prefetch="none")
    seen = []
    compute = model.foreroute.engine.compute

    def noting(layer, hidden, ids, weights):
        seen.append(layer * 16 + int(ids.min()))
        return compute(layer, hidden, ids, weights)

    model.foreroute.engine.compute = noting
    generate(model, new_tokens=1)
    return seen[0]


KILLED = """
import os, signal, sys
from pathlib import Path
from foreroute.checkpoint import records, store_writer
from foreroute.checkpoint.locate import read_index
from foreroute.prepare.pack import pack
from foreroute.model.build.skeleton import outline

store_writer._SYNC_EVERY_BYTES = 1  # the table follows after every record, not after 256 MB
folder = Path(sys.argv[1])

def progress(done, total):
    if done == 20:
        os.kill(os.getpid(), signal.SIGKILL)

pack(outline(folder, read_index(folder)).table, folder / records.STORE_NAME, progress=progress)
"""


class TestPacking:
    @pytest.fixture
    def complete(self, checkpoints):
        return packed_store(checkpoints.get("qwen3_moe")).read_bytes()

    def left(self, folder):
        return [path.name for path in folder.iterdir() if STORE_NAME in path.name]

    def test_killed_and_taken_up_again(self, folder, complete):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            check=False,
        )
        assert done.returncode == -signal.SIGKILL
        assert self.left(folder) == [STORE_NAME + ".partial"]
        steps = []
        pack(expert_table(folder), folder / STORE_NAME, progress=lambda done, total: steps.append(done))
        assert steps[0] in (19, 20)
        assert steps[-1] == 48
        assert self.left(folder) == [STORE_NAME]
        assert (folder / STORE_NAME).read_bytes() == complete

    def test_a_partial_of_another_model_is_not_taken_up(self, folder, checkpoints, complete):
        other = packed_store(checkpoints.get("qwen3_moe", seed=5))
        (folder / (STORE_NAME + ".partial")).write_bytes(other.read_bytes())
        steps = []
        pack(expert_table(folder), folder / STORE_NAME, progress=lambda done, total: steps.append(done))
        assert steps[0] == 0
        assert (folder / STORE_NAME).read_bytes() == complete

    def test_starting_anew(self, folder, complete):
        """What lies there is overwritten when it is not to be taken up, also where it is damaged."""
        partial = folder / (STORE_NAME + ".partial")
        partial.write_bytes(complete[: len(complete) // 2] + bytes([255] * (len(complete) // 2)))
        pack(expert_table(folder), folder / STORE_NAME, progress=quiet, resume=False)
        assert (folder / STORE_NAME).read_bytes() == complete

    @pytest.mark.parametrize("keep", [False, True])
    def test_interrupted(self, folder, complete, keep):
        def interrupt(done, total):
            if done == 20:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack(expert_table(folder), folder / STORE_NAME, progress=interrupt, keep_partial=keep)
        assert self.left(folder) == ([STORE_NAME + ".partial"] if keep else [])
        steps = []
        pack(expert_table(folder), folder / STORE_NAME, progress=lambda done, total: steps.append(done))
        assert steps[0] == (20 if keep else 0)
        assert (folder / STORE_NAME).read_bytes() == complete

    @pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync"])
    def test_the_disk_is_full(self, folder, monkeypatch, call):
        original, calls = getattr(os, call), []

        def full(*args):
            calls.append(args)
            if call == "pwrite" and len(calls) < 20:
                return original(*args)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, call, full)
        with pytest.raises(StoreError) as caught:
            pack(expert_table(folder), folder / STORE_NAME, progress=quiet)
        message = str(caught.value)
        assert str(folder / STORE_NAME) in message
        assert "No space left on device" in message
        assert "Make room or choose another --out" in message
        assert self.left(folder) == []

    def test_one_that_another_finishes_meanwhile_stays_whole(self, folder, complete, monkeypatch):
        """The second opened the first one's file, and gets its lock when that has the final name: not to write into."""
        path, flock, calls = folder / STORE_NAME, fcntl.flock, []

        def late(fd, how):
            calls.append(fd)
            if len(calls) == 1:
                pack(expert_table(folder), path, progress=quiet)
                # What the first one wrote is what the second has open.
                os.dup2(os.open(path, os.O_RDWR), fd)
            flock(fd, how)

        monkeypatch.setattr(fcntl, "flock", late)
        writer = StoreWriter(path, expert_table(folder))
        assert path.read_bytes() == complete
        writer.discard()
        assert self.left(folder) == [STORE_NAME]
        assert path.read_bytes() == complete

    def test_interrupted_while_room_is_reserved(self, folder, monkeypatch):
        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "posix_fallocate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack(expert_table(folder), folder / STORE_NAME, progress=quiet)
        assert self.left(folder) == []

    def test_the_name_cannot_be_given(self, folder):
        """As where a folder of that name is in its place."""
        (folder / STORE_NAME).mkdir()
        with pytest.raises(StoreError, match="cannot be written: Is a directory"):
            pack(expert_table(folder), folder / STORE_NAME, progress=quiet)
        assert self.left(folder) == [STORE_NAME]

    def test_whoever_reads_goes_on_while_it_is_replaced(self, load, folder, store, references, checkpoints):
        """With the file that was opened, which has no name any more."""
        model = load(folder)
        expected = references.output(checkpoints.get("qwen3_moe"), ONE_PROMPT)
        assert_same_bits(generate(model), expected)
        for _ in range(3):
            pack(expert_table(folder), store, progress=quiet)
            assert_same_bits(generate(model), expected)
        store.write_bytes(b"something else")
        store.unlink()
        assert_same_bits(generate(load(folder)), expected)

    def test_a_folder_that_is_not_there(self, folder):
        with pytest.raises(StoreError, match=r"cannot be written: .* Choose another --out"):
            pack(expert_table(folder), folder / "no" / "such" / STORE_NAME, progress=quiet)

    def test_the_checkpoint_cannot_be_read(self, folder, monkeypatch):
        """What was written is kept, to go on with."""
        monkeypatch.setattr(source_files, "RETRY_PAUSES_S", (0, 0))
        table, preadv, reads = expert_table(folder), os.preadv, []

        def failing(*args):
            reads.append(args)
            if len(reads) > 5:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing)
            with pytest.raises(ReadError, match=r"expert \d+ of MoE layer \d+ .*model\.safetensors at offset \d+"):
                pack(table, folder / STORE_NAME, progress=quiet)
        assert self.left(folder) == [f"{STORE_NAME}.partial"]

    @pytest.mark.parametrize("change", [overwrite, replace])
    def test_the_checkpoint_changes_before_it_is_opened(self, folder, change):
        table, file = expert_table(folder), folder / "model.safetensors"
        change(file, file.read_bytes())
        with pytest.raises(ReadError, match=r"model\.safetensors has changed .* Load the model again"):
            pack(table, folder / STORE_NAME, progress=quiet)
        assert self.left(folder) == []

    @pytest.mark.parametrize("change", ["written", "cut off"])
    def test_the_checkpoint_changes_while_it_is_packed(self, folder, change):
        """A store of two models must not come of it; nor may what was written be gone on with."""
        table, file = expert_table(folder), folder / "model.safetensors"
        content = file.read_bytes()

        def changing(done, total):
            if done == 3:
                overwrite(file, content if change == "written" else content[: len(content) // 2])

        with pytest.raises(ReadError, match=r"expert \d+ of MoE layer \d+ .*model\.safetensors at offset \d+"):
            pack(table, folder / STORE_NAME, progress=changing)
        assert self.left(folder) == []

    def test_a_checkpoint_that_is_replaced_is_packed_as_it_was(self, folder, checkpoints):
        table, file = expert_table(folder), folder / "model.safetensors"
        other = (checkpoints.get("qwen3_moe", seed=5) / "model.safetensors").read_bytes()
        pack(table, folder / STORE_NAME, progress=lambda done, total: done == 3 and replace(file, other))
        assert (folder / STORE_NAME).read_bytes() == packed_store(checkpoints.get("qwen3_moe")).read_bytes()

    def test_a_half_written_store_of_an_older_checkpoint_is_begun_anew(self, folder, checkpoints):
        """One expert was another, and the fingerprint, of samples, is the same."""
        file = folder / "model.safetensors"
        good = file.read_bytes()
        header, payload = read_parts(file)
        start = len(good) - len(payload) + header["model.layers.0.mlp.experts.2.up_proj.weight"]["data_offsets"][0]
        fingerprint = expert_table(folder).index.fingerprint()
        overwrite(file, good[:start] + bytes(64) + good[start + 64 :])
        assert expert_table(folder).index.fingerprint() == fingerprint

        def interrupting(done, total):
            if done == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack(expert_table(folder), folder / STORE_NAME, progress=interrupting, keep_partial=True)
        overwrite(file, good)
        now = (folder / f"{STORE_NAME}.partial").stat().st_mtime_ns + 10_000_000
        os.utime(file, ns=(now, now))
        pack(expert_table(folder), folder / STORE_NAME, progress=quiet)
        assert (folder / STORE_NAME).read_bytes() == packed_store(checkpoints.get("qwen3_moe")).read_bytes()
