"""Disks that fail and users who interrupt, in the middle of a generation: it stops, and the model works afterwards."""

import errno
import os
import random
import re
import signal
import sys
import threading
from pathlib import Path

import pytest

from foreroute.checkpoint import source_files
from foreroute.errors import ChangedFileError, ReadError
from foreroute.model.caches import cache_argument, cache_of
from foreroute.residency.slots import LOADING, PINNED
from tests.support.broken import copied, read_parts
from tests.support.runs import ONE_PROMPT, THREE_PROMPTS, assert_same_bits, generate, packed_store

PREFILL, DECODE = 0, 25  # reads that go well before the first that fails


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    """What fails again and again is not waited for here."""
    monkeypatch.setattr(source_files, "RETRY_PAUSES_S", (0, 0, 0))


@pytest.fixture(params=["safetensors", "packed"])
def folder(request, checkpoints, tmp_path):
    """A copy of a checkpoint, and its store beside it when reads are to go there."""
    original = checkpoints.get("deepseek_v2")
    folder = copied(original, tmp_path / "model")
    if request.param == "packed":
        (folder / "experts.foreroute").write_bytes(packed_store(original).read_bytes())
    return folder


@pytest.fixture
def expected(checkpoints, references):
    return [references.output(checkpoints.get("deepseek_v2"), batch) for batch in (ONE_PROMPT, THREE_PROMPTS)]


def assert_usable(model, expected):
    """It says what it always says, and no slot stays in use or in wait."""
    for batch, theirs in zip((ONE_PROMPT, THREE_PROMPTS), expected, strict=True):
        assert_same_bits(generate(model, batch), theirs)
    pool = model.foreroute.engine.pool
    pool.drain()
    residency = pool.residency
    states = [residency.state(key) for key in range(residency.num_keys)]
    assert PINNED not in states
    assert LOADING not in states
    assert residency.num_free + residency.num_resident == residency.num_slots


def assert_names(error, folder):
    """File, offset and expert."""
    message = str(error)
    assert re.search(r"expert \d+ of MoE layer \d \(model\.layers\.\d\.mlp\.experts\)", message)
    (path, offset) = re.search(r"from (\S+) at offset (\d+)", message).groups()
    assert Path(path).parent == folder
    assert 0 < int(offset) < Path(path).stat().st_size


@pytest.mark.parametrize("prefetch", ["lookahead", "none"])
@pytest.mark.parametrize("good_reads", [PREFILL, DECODE])
def test_a_disk_that_fails_for_a_while(load, folder, expected, monkeypatch, good_reads, prefetch):
    model = load(folder, "50%", prefetch=prefetch)
    preadv, done = os.preadv, []
    # Resident experts are used, and read errors come later in the step.
    generate(model, new_tokens=2)

    def failing(*args):
        done.append(args)
        if len(done) > good_reads:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        for _ in range(3):
            with pytest.raises(ReadError) as caught:
                generate(model)
            assert_names(caught.value, folder)
            assert "Input/output error, 4 times in a row" in str(caught.value)
            assert "Check the disk" in str(caught.value)
    assert_usable(model, expected)


def test_decoding_stops_too(load, folder, expected, monkeypatch):
    """The prompt goes well, a later token does not."""
    model = load(folder, "25%")
    phases = []

    def failing(*_):
        phases.append(model.foreroute.engine.is_prefill)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    cache = cache_of(model(ONE_PROMPT.ids, use_cache=True))
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(ReadError) as caught:
            decode(model, 32, cache)
    assert_names(caught.value, folder)
    assert set(phases) == {False}
    assert_usable(model, expected)


def decode(model, num_tokens, cache):
    for token in range(num_tokens):
        model(ONE_PROMPT.ids[:, :1] + token, **cache_argument(cache))


@pytest.mark.parametrize("num_bytes", [0, 7])
def test_short_reads_are_read_on(load, folder, expected, monkeypatch, num_bytes):
    """A file system may give less than was asked for; nothing at all means that the file has ended."""
    model = load(folder, "25%", direct_io=False)
    preadv = os.preadv

    def short(fd, buffers, offset):
        return preadv(fd, [buffers[0][: num_bytes or 1]], offset) if num_bytes else 0

    with monkeypatch.context() as patch:
        if num_bytes:
            patch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][: 4096 + num_bytes]], at))
            assert_same_bits(generate(model), expected[0])
        else:
            patch.setattr(os, "preadv", short)
            with pytest.raises(ReadError, match="the file ends at byte"):
                generate(model)
    assert_usable(model, expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("of_dense", [False, True])
def test_a_file_that_loses_its_end(load, checkpoints, references, tmp_path, packed, of_dense):
    """Whichever file: no dense weight is mapped, so that nothing but a read can notice."""
    original = checkpoints.get("qwen3_moe", sharded=True)
    folder = copied(original, tmp_path / "model")
    store = folder / "experts.foreroute"
    if packed:
        store.write_bytes(packed_store(original).read_bytes())
    model = load(folder, "25%")
    expected = [references.output(original, batch) for batch in (ONE_PROMPT, THREE_PROMPTS)]
    files = {path: read_parts(path)[0] for path in sorted(folder.glob("model-*.safetensors"))}
    dense = [path for path, header in files.items() if not any(".experts." in name for name in header)]
    assert dense
    if of_dense:
        for path in dense:
            os.truncate(path, 0)
        assert_usable(model, expected)
        return
    file = store if packed else next(path for path in files if path not in dense)
    before, whole = file.stat(), file.read_bytes()
    os.truncate(file, len(whole) // 4)
    with pytest.raises(ChangedFileError) as caught:
        generate(model, THREE_PROMPTS)
    assert f"it had {len(whole)} bytes and has {len(whole) // 4}" in str(caught.value)
    assert str(file) in str(caught.value)
    assert "Load the model again" in str(caught.value)
    with open(file, "r+b") as opened:
        opened.write(whole)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert_usable(model, expected)


class TestInterrupts:
    """Ctrl-C wherever it comes."""

    @pytest.fixture
    def model(self, checkpoints, load):
        return load(checkpoints.get("deepseek_v2"), "25%")

    @pytest.mark.parametrize("after", [0, 1, 7, 40])
    def test_while_waiting(self, model, expected, monkeypatch, after):
        transfer = model.foreroute.engine.pool.transfer
        wait, calls = transfer.wait, []

        def interrupted():
            calls.append(1)
            if len(calls) == after + 1:
                raise KeyboardInterrupt
            return wait()

        monkeypatch.setattr(transfer, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(model)
        assert_usable(model, expected)

    @pytest.mark.parametrize("after", [0, 1, 7, 40])
    @pytest.mark.parametrize("where", ["operands", "guess", "submit"])
    def test_while_computing(self, model, expected, monkeypatch, where, after):
        engine = model.foreroute.engine
        engine.prefetcher.governor = None  # it may switch guesses off before the fortieth
        target, name = {
            "operands": (engine.kernels[0].views, "operands"),
            "guess": (engine.prefetcher.predictor, "guess"),
            "submit": (engine.pool.transfer, "demand"),
        }[where]
        original, calls = getattr(target, name), []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == after + 1:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(target, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(model)
        assert_usable(model, expected)

    def test_by_a_signal_at_any_time(self, model, expected):
        """As Ctrl-C does it: at whatever bytecode the interpreter happens to be."""

        def interrupt(signum, frame):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGUSR1, interrupt)
        chance, hits = random.Random(0), 0
        try:
            for _ in range(30):
                timer = threading.Timer(chance.uniform(0.001, 0.15), os.kill, (os.getpid(), signal.SIGUSR1))
                try:
                    timer.start()
                    generate(model, THREE_PROMPTS, 6)
                    timer.join()
                except KeyboardInterrupt:
                    hits += 1
                finally:
                    timer.join()
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert hits > 10
        assert_usable(model, expected)

    @pytest.mark.parametrize("batch", [ONE_PROMPT, THREE_PROMPTS], ids=["one", "three"])
    def test_at_any_line(self, model, expected, batch):
        """Of the engine and of what it calls: more places than a signal can come to, in an order without gaps."""
        num_lines = run_to_line(-1, lambda: generate(model, batch, 2))
        assert num_lines > 1000
        for step in range(40):
            generate(model, batch, 2)
            run_to_line(step * num_lines // 40 + step % 7, lambda: generate(model, batch, 2))
        assert_usable(model, expected)


def run_to_line(number, act):
    """Run `act` and raise KeyboardInterrupt at the so-and-so-many-th line of foreroute's own code; how many it ran.

    transfer/ is left out: a tracer can raise between a `with` block and the release of its lock, a signal cannot.
    """
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if "/foreroute/" not in frame.f_code.co_filename or "/transfer/" in frame.f_code.co_filename:
            return None
        if event == "line":
            seen += 1
            if seen == number:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return seen


def test_a_prefetch_that_fails_in_prefill_is_no_error(load, folder, expected, monkeypatch):
    model = load(folder, "50%", prefetch_prefill="on")
    transfer = model.foreroute.engine.pool.transfer
    guessed, failed = set(), []
    prefetch, wait, completed = transfer.prefetch, transfer.wait, transfer.completed

    def noting(key, slot):
        guessed.add(key)
        prefetch(key, slot)

    def spoilt(completions):
        failed.extend(one.key for one in completions if one.key in guessed)
        spoilt = [one._replace(error=ReadError("a guess")) if one.key in guessed else one for one in completions]
        guessed.difference_update(one.key for one in completions)
        return spoilt

    monkeypatch.setattr(transfer, "prefetch", noting)
    monkeypatch.setattr(transfer, "completed", lambda: spoilt(completed()))
    monkeypatch.setattr(transfer, "wait", lambda: spoilt(wait()))
    # A late hit in decode is waited for, and its failure is an error: prefill alone.
    generate(model, THREE_PROMPTS, 1)
    assert failed
    monkeypatch.undo()
    assert_usable(model, expected)
