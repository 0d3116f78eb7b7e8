"""Errors of a disk that may pass: a read that fails is tried again, not for ever, and what is told."""

import errno
import os
import threading

import pytest

from foreroute.checkpoint import source_files
from foreroute.errors import ChangedFileError, ReadError
from foreroute.transfer.disk import DiskTransfer
from tests.support.broken import replace
from tests.unit.transfer.expert_files import make_slots, whole, write_file


@pytest.fixture
def disk():
    """A transfer of one read, key 0, and its slots; closed in the end."""
    opened = []

    def make(read, **options):
        slots = make_slots()
        opened.append(DiskTransfer(lambda key: (read,), slots.__getitem__, **options))
        return opened[-1], slots

    yield make
    for transfer in opened:
        transfer.close()


@pytest.fixture
def pauses(monkeypatch):
    """How long each retry waited; none does."""
    slept = []
    monkeypatch.setattr(source_files.time, "sleep", slept.append)
    return slept


@pytest.fixture
def failing(monkeypatch):
    """The next `times` reads fail with this errno."""

    def fail(code, times):
        real, left = os.preadv, [times]

        def preadv(*args):
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(code, os.strerror(code))
            return real(*args)

        monkeypatch.setattr(os, "preadv", preadv)

    return fail


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("code", [errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.EREMOTEIO])
def test_tried_again_after_a_pause(disk, tmp_path, pauses, failing, caplog, code, direct):
    path, content = write_file(tmp_path / "a", 20_000)
    transfer, slots = disk(whole(path, 4096, 6000), direct=direct)
    before = set(os.listdir("/proc/self/fd"))
    failing(code, 3)
    transfer.demand(0, 0)
    assert transfer.wait()[0].error is None
    assert slots[0][:6000] == content[4096:10_096]
    assert transfer.retries == 3
    assert pauses == sorted(pauses)
    assert len(pauses) == 3
    assert 0 < sum(pauses) < 1
    assert [record.getMessage() for record in caplog.records] == [
        f"A read of {path} failed ({os.strerror(code)}) and is tried again."
    ] * 3
    # A stale handle is opened again; none is left behind.
    assert len(set(os.listdir("/proc/self/fd"))) == len(before) + 1


def test_not_for_ever(disk, tmp_path, pauses, failing):
    path, _ = write_file(tmp_path / "a", 20_000)
    transfer, _ = disk(whole(path, 4096, 6000))
    failing(errno.EIO, 1000)
    transfer.demand(0, 0)
    error = transfer.wait()[0].error
    assert isinstance(error, ReadError)
    assert "a at offset 4096: Input/output error, 4 times in a row. Check the disk" in str(error)
    assert transfer.retries == len(pauses) == 3


def test_what_does_not_pass_is_not_tried_again(disk, tmp_path, pauses, failing):
    path, _ = write_file(tmp_path / "a", 20_000)
    transfer, _ = disk(whole(path, 4096, 6000))
    failing(errno.EACCES, 1)
    transfer.demand(0, 0)
    assert "Permission denied. Check the disk" in str(transfer.wait()[0].error)
    assert (transfer.retries, pauses) == (0, [])


def test_a_handle_that_is_stale_because_the_file_is_another(disk, tmp_path, pauses, failing):
    path, content = write_file(tmp_path / "a", 20_000)
    transfer, _ = disk(whole(path, 4096, 6000))
    transfer.demand(0, 0)
    assert transfer.wait()[0].error is None
    replace(tmp_path / "a", content)
    failing(errno.ESTALE, 1)
    transfer.demand(0, 0)
    error = transfer.wait()[0].error
    assert isinstance(error, ChangedFileError)
    assert "another file has its name now" in str(error)


def test_two_threads_find_out_at_once_that_o_direct_is_refused(tmp_path, monkeypatch):
    """The second learns of it when the first has opened the file anew."""
    path, content = write_file(tmp_path / "a", 20_000)
    real_open, real_preadv, opened_anew, first = os.open, os.preadv, threading.Event(), []

    def open_(name, flags, *rest):
        fd = real_open(name, flags & ~os.O_DIRECT, *rest)
        if name == path and not flags & os.O_DIRECT:
            opened_anew.set()
        elif name == path:
            first.append(fd)
        return fd

    def preadv(fd, *rest):
        if fd in first:
            reading.wait(5)
            if threading.current_thread().name.endswith("1"):
                opened_anew.wait(5)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_preadv(fd, *rest)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    reading = threading.Barrier(2)
    slots = make_slots()
    transfer = DiskTransfer(lambda key: (whole(path, 4096, 6000),), slots.__getitem__, num_threads=2)
    transfer.demand(0, 0)
    transfer.demand(1, 1)
    completions = transfer.wait()
    completions += transfer.wait() if len(completions) < 2 else []
    transfer.close()
    assert [one.error for one in completions] == [None, None]
    assert slots[0][:6000] == slots[1][:6000] == content[4096:10_096]
