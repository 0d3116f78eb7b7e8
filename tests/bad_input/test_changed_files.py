"""Files that are replaced, written over or cut off under a model, at every moment: never a token of mixed weights."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from foreroute.checkpoint import source_files
from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import STORE_NAME
from foreroute.errors import ChangedFileError, ForerouteError, ReadError
from foreroute.loading import load as loader
from foreroute.model.build.skeleton import load_skeleton, outline
from foreroute.transfer.files import BlockFiles
from foreroute.transfer.memory import map_memory
from tests.support.broken import copied, overwrite, read_parts, replace, write_parts
from tests.support.checkpoints import edit_json
from tests.support.families import PAD_ID
from tests.support.runs import ONE_PROMPT, THREE_PROMPTS, assert_same_bits, generate, packed_store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def original(checkpoints):
    return checkpoints.get("qwen3_moe")


@pytest.fixture
def folder(original, tmp_path):
    return copied(original, tmp_path / "model")


@pytest.fixture
def other(checkpoints):
    """The file of another model of the same shape."""
    return (checkpoints.get("qwen3_moe", seed=5) / "model.safetensors").read_bytes()


class TestWhileAModelRuns:
    """It goes on as it was, or stops with a word."""

    @pytest.fixture(params=["safetensors", "packed"])
    def file(self, request, original, folder):
        """What the experts are read from."""
        if request.param == "safetensors":
            return folder / "model.safetensors"
        shutil.copyfile(packed_store(original), folder / STORE_NAME)
        return folder / STORE_NAME

    @pytest.fixture
    def spoilt(self, file, other, checkpoints):
        """What takes the file's place."""
        is_store = file.name == STORE_NAME
        return packed_store(checkpoints.get("qwen3_moe", seed=5)).read_bytes() if is_store else other

    def test_replaced(self, load, folder, file, spoilt, original, references):
        """Nothing has been read yet, and nothing of the new file ever is."""
        model = load(folder, "25%")
        replace(file, spoilt)
        for batch in (ONE_PROMPT, THREE_PROMPTS):
            assert_same_bits(generate(model, batch), references.output(original, batch))

    def test_removed(self, load, folder, file, original, references):
        model = load(folder, "25%")
        shutil.rmtree(folder)
        assert_same_bits(generate(model), references.output(original, ONE_PROMPT))

    def test_written_over(self, load, folder, file, spoilt):
        model = load(folder, "25%")
        generate(model, new_tokens=2)
        overwrite(file, spoilt)
        for _ in range(2):
            with pytest.raises(ChangedFileError, match=r"expert \d+ of MoE layer \d.* Load the model again") as caught:
                generate(model)
            assert str(file) in str(caught.value)

    def test_written_over_while_it_is_read(self, load, folder, file, spoilt, monkeypatch):
        """The bytes of the very read are of either file."""
        model = load(folder, "25%")
        preadv = os.preadv

        def late(fd, buffers, offset):
            done = preadv(fd, buffers, offset)
            monkeypatch.undo()
            overwrite(file, spoilt)
            return done

        monkeypatch.setattr(os, "preadv", late)
        with pytest.raises(ChangedFileError):
            generate(model)

    def test_a_read_that_fails_once_is_counted(self, load, folder, file, original, references, monkeypatch):
        monkeypatch.setattr(source_files, "RETRY_PAUSES_S", (0,))
        model = load(folder, "25%")
        preadv, failures = os.preadv, [errno.EIO]

        def failing(*args):
            if failures:
                raise OSError(failures[0], os.strerror(failures.pop()))
            return preadv(*args)

        monkeypatch.setattr(os, "preadv", failing)
        assert_same_bits(generate(model), references.output(original, ONE_PROMPT))
        assert model.foreroute.stats().read_retries == 1

    def test_closed_for_want_of_descriptors_and_replaced(self, load, checkpoints, tmp_path, monkeypatch):
        """What has to be opened again is another file then."""
        folder = copied(checkpoints.get("qwen3_moe", sharded=True), tmp_path / "sharded")
        monkeypatch.setattr("foreroute.transfer.files.room_for_files", lambda wanted: 1)
        model = load(folder, "25%", reader_threads=1)
        generate(model)
        for file in folder.glob("model-*.safetensors"):
            replace(file, file.read_bytes())
        with pytest.raises(ChangedFileError, match="another file has its name now"):
            generate(model, THREE_PROMPTS)


class TestWhileAModelIsLoaded:
    """Between the headers, the dense weights and the first expert."""

    @pytest.mark.parametrize("change", [overwrite, replace])
    def test_after_the_headers(self, load, folder, other, monkeypatch, change):
        def late(*args, **kwargs):
            change(folder / "model.safetensors", other)
            return load_skeleton(*args, **kwargs)

        monkeypatch.setattr(loader, "load_skeleton", late)
        with pytest.raises(ChangedFileError, match=r"model\.safetensors has changed .* Load the model again"):
            load(folder, "25%")

    @pytest.mark.parametrize("change", [overwrite, replace])
    def test_after_the_dense_weights(self, load, folder, other, monkeypatch, change):
        """Not one expert has to be read for it."""

        def early(*args, **kwargs):
            model = load_skeleton(*args, **kwargs)
            change(folder / "model.safetensors", other)
            return model

        monkeypatch.setattr(loader, "load_skeleton", early)
        with pytest.raises(ChangedFileError, match=r"model\.safetensors has changed"):
            load(folder, "25%")

    def test_a_store_after_its_header(self, load, original, folder, monkeypatch):
        store = folder / STORE_NAME
        shutil.copyfile(packed_store(original), store)

        def late(*args, **kwargs):
            replace(store, store.read_bytes())
            return load_skeleton(*args, **kwargs)

        monkeypatch.setattr(loader, "load_skeleton", late)
        with pytest.raises(ChangedFileError, match=r"experts\.foreroute has changed"):
            load(folder, "25%")

    @pytest.mark.parametrize("keep", [0.0, 0.5])
    def test_cut_off_while_dense_weights_are_read(self, load, folder, monkeypatch, keep):
        """A mapped file would end the process here, with no word."""
        file, readv, sizes = folder / "model.safetensors", os.readv, []

        def cutting(fd, buffers):
            if os.readlink(f"/proc/self/fd/{fd}") == str(file):
                sizes.append(1)
                if len(sizes) == 5:  # the header took two
                    os.truncate(file, int(file.stat().st_size * keep))
            return readv(fd, buffers)

        monkeypatch.setattr(os, "readv", cutting)
        with pytest.raises(ReadError, match=r"model\.safetensors has changed"):
            load(folder, "25%")

    def test_the_fingerprint_is_of_the_file_of_the_headers(self, folder, other):
        index = read_index(folder)
        replace(folder / "model.safetensors", other)
        with pytest.raises(ChangedFileError):
            index.fingerprint()


class TestDenseWeights:
    def test_no_file_stays_mapped(self, load, folder):
        model = load(folder, "25%")
        generate(model)
        assert str(folder) not in Path("/proc/self/maps").read_text()

    def test_they_lie_as_in_a_mapped_file(self, folder):
        """Matrix kernels give other bits at other alignments, and the resident model's are those of the file."""
        index = read_index(folder)
        model = load_skeleton(folder, outline(folder, index), "auto")
        compared = 0
        for name, parameter in model.named_parameters():
            if name in index.tensors:
                assert parameter.data_ptr() % 64 == index.tensors[name].offset % 64
                compared += 1
        assert compared > 10

    def test_a_read_that_fails_once(self, load, folder, references, original, monkeypatch):
        """Of dense weights too: it is tried again."""
        monkeypatch.setattr(source_files, "RETRY_PAUSES_S", (0,))
        readv, failed = os.readv, []

        def failing(fd, buffers):
            path = os.readlink(f"/proc/self/fd/{fd}")
            if not failed and len(buffers[0]) == 64 * 4 and path.startswith(str(folder)):  # a norm
                failed.append(path)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return readv(fd, buffers)

        monkeypatch.setattr(os, "readv", failing)
        model = load(folder, "25%")
        assert failed
        assert_same_bits(generate(model), references.output(original, ONE_PROMPT))

    def test_a_read_that_fails_for_good(self, load, folder, monkeypatch):
        monkeypatch.setattr(source_files, "RETRY_PAUSES_S", (0, 0))
        readv = os.readv

        def failing(fd, buffers):
            if len(buffers[0]) == 64 * 4:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return readv(fd, buffers)

        monkeypatch.setattr(os, "readv", failing)
        with pytest.raises(
            ReadError, match=r"model\.safetensors cannot be read at offset \d+: Input/output error, 3 times"
        ):
            load(folder, "25%")

    def test_a_dtype_that_no_config_names(self, load, checkpoints, tmp_path):
        """transformers takes that of the first weight, and so do we."""
        from transformers import AutoModelForCausalLM

        folder = copied(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "model")
        edit_json(folder / "config.json", dtype=None, torch_dtype=None)
        resident = AutoModelForCausalLM.from_pretrained(folder)
        assert load(folder, "25%").dtype == resident.dtype == torch.bfloat16

    def test_settings_of_generation_that_older_configs_hold(self, load, folder):
        """transformers looks for them in config.json where there is no generation_config.json."""
        (folder / "generation_config.json").unlink(missing_ok=True)
        edit_json(folder / "config.json", top_k=7, max_length=33)
        from transformers import AutoModelForCausalLM

        resident = AutoModelForCausalLM.from_pretrained(folder)
        assert resident.generation_config.max_length == 33
        model = load(folder, "25%")
        # But for the tokenizer's end, which transformers does not ask.
        expected = {**resident.generation_config.to_diff_dict(), "eos_token_id": PAD_ID + 2}
        assert model.generation_config.to_diff_dict() == expected
        assert model.name_or_path == str(folder)

    @pytest.mark.parametrize("choosing", [{"variant": "fp16"}, {"use_safetensors": False}, {"subfolder": "other"}])
    def test_arguments_that_would_choose_other_files(self, load, folder, choosing):
        with pytest.raises(ForerouteError, match=f"load takes no {next(iter(choosing))}"):
            load(folder, "25%", **choosing)


# Loads and generates where no more than 64 files can be open; prints the tokens.
FEW_FILES = """
import resource, sys
import torch, foreroute
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
model = foreroute.load(sys.argv[1], "25%")
ids = torch.arange(1, 9)[None]
print(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False).tolist())
"""


class TestFewDescriptors:
    @pytest.fixture
    def many_shards(self, folder):
        """120 files."""
        header, payload = read_parts(folder / "model.safetensors")
        names = [name for name in header if name != "__metadata__"]
        weight_map = {name: f"model-{at % 120:05}-of-00120.safetensors" for at, name in enumerate(names)}
        for shard in sorted(set(weight_map.values())):
            part, pieces, end = {}, b"", 0
            for name in (one for one in names if weight_map[one] == shard):
                begin, stop = header[name]["data_offsets"]
                part[name] = {**header[name], "data_offsets": [end, end + stop - begin]}
                pieces, end = pieces + payload[begin:stop], end + stop - begin
            write_parts(folder / shard, part, pieces)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    def test_more_shards_than_descriptors(self, many_shards, original, references):
        """They take turns."""
        ids = torch.arange(1, 9)[None]
        resident = references.model(original)
        expected = resident.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        done = subprocess.run(
            [sys.executable, "-c", FEW_FILES, str(many_shards)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(expected.tolist())

    def test_the_soft_limit_is_raised_as_far_as_needed(self, many_shards, load):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/proc/self/fd"))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 70, hard))
            load(many_shards, "25%")
            assert used + 120 < resource.getrlimit(resource.RLIMIT_NOFILE)[0] < used + 300
            opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
            assert sum(path.startswith(str(many_shards)) for path in opened) == 120
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_none_at_all_is_said(self, tmp_path, monkeypatch):
        """Not a traceback: the limit is named, and what to do."""
        paths = []
        for number in range(3):
            paths.append(str(tmp_path / f"file-{number}"))
            Path(paths[-1]).write_bytes(bytes(8192))
        monkeypatch.setattr("foreroute.transfer.files.room_for_files", lambda wanted: 4)
        files = BlockFiles(direct=False)
        block = memoryview(map_memory(4096))
        files.read(paths[0], 0, block, 4096)
        with no_descriptor_left():
            # One is closed for it: one that is not being read.
            files.read(paths[1], 0, block, 4096)
            with pytest.raises(ReadError, match=r"Too many open files; the limit is \d+ .*ulimit -n"):
                BlockFiles(direct=False, stamps={paths[2]: source_files.FileStamp(0, 0, 0, 0)})
            with pytest.raises(ReadError, match=r"file-2 cannot be opened: Too many open files; the limit is \d+"):
                source_files.SourceFile(paths[2])
        files.close()


@contextmanager
def no_descriptor_left():
    """While inside, nothing can be opened that was not closed before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    # Every number below the limit is taken.
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)
