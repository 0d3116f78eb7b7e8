"""The ways past the page cache and of reading at an offset, each by a fake of the system that has it."""

import ctypes
import errno
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foreroute.system import reading, windows
from foreroute.system.reading import EmulatedFiles, direct_way, open_direct, positional_files
from foreroute.transfer.files import BlockFiles

BLOCK = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "weights"
    made.write_bytes(os.urandom(64 * BLOCK + 100))
    return made


class Caches:
    """macOS's fcntl, and what it was asked for."""

    F_NOCACHE = 48

    def __init__(self, refuses: bool = False) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self._refuses = refuses

    def fcntl(self, fd: int, command: int, value: int) -> int:
        self.asked.append((fd, command, value))
        if self._refuses:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return 0


class Kernel:
    """Windows' CreateFileW: opens by Linux's means, or answers with `error`."""

    def __init__(self, error: int = 0) -> None:
        self.flags: list[int] = []
        self._error = error
        self.CreateFileW: Any = lambda *given: self._create(*given)

    def _create(self, path: str, access: int, share: int, _: None, how: int, flags: int, __: None) -> int | None:
        assert (access, share, how) == (0x80000000, 7, 3), "read, shared with all, existing"
        self.flags.append(flags)
        return ctypes.c_void_p(-1).value if self._error else os.open(path, os.O_RDONLY)


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make `open_direct` find itself on another system."""

    def becoming(system: str, **options: Any) -> Any:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
        monkeypatch.setattr(reading, "FCNTL", None)
        if system == "macos":
            fake = Caches(**options)
            monkeypatch.setattr(reading, "FCNTL", fake)
            return fake
        kernel = Kernel(**options)
        if system == "windows":
            monkeypatch.setattr(windows, "is_here", lambda: True)
            monkeypatch.setattr(ctypes, "WinDLL", lambda name, use_last_error: kernel, raising=False)
            monkeypatch.setattr(ctypes, "get_last_error", lambda: kernel._error, raising=False)
            monkeypatch.setattr(ctypes, "FormatError", lambda code: f"code {code}", raising=False)
            crt = types.SimpleNamespace(open_osfhandle=lambda handle, flags: handle)
            monkeypatch.setitem(sys.modules, "msvcrt", crt)
        return kernel

    return becoming


def content_by(files: BlockFiles, path: Path) -> bytes:
    buffer = memoryview(bytearray(66 * BLOCK))
    got = files.read(str(path), 0, buffer[: 65 * BLOCK], 64 * BLOCK + 100)
    return bytes(buffer[:got])


def test_macos_asks_for_no_cache(become: Callable[..., Any], path: Path) -> None:
    fake = become("macos")
    assert direct_way() == "F_NOCACHE"
    files = BlockFiles(True)
    assert content_by(files, path) == path.read_bytes()
    assert files.buffered_paths == []
    assert [(command, value) for _, command, value in fake.asked] == [(48, 1)]
    files.close()


def test_macos_where_a_file_system_refuses(become: Callable[..., Any], path: Path) -> None:
    become("macos", refuses=True)
    before = set(os.listdir("/proc/self/fd"))
    files = BlockFiles(True)
    assert content_by(files, path) == path.read_bytes()
    assert files.buffered_paths == [str(path)]
    files.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_windows_asks_for_no_buffering(become: Callable[..., Any], path: Path) -> None:
    kernel = become("windows")
    assert direct_way() == "FILE_FLAG_NO_BUFFERING"
    files = BlockFiles(True)
    assert content_by(files, path) == path.read_bytes()
    assert files.buffered_paths == []
    assert kernel.flags == [0x20000000]
    files.close()


def test_windows_where_a_file_system_refuses(become: Callable[..., Any], path: Path) -> None:
    kernel = become("windows", error=87)
    files = BlockFiles(True)
    assert content_by(files, path) == path.read_bytes()
    assert files.buffered_paths == [str(path)]
    assert len(kernel.flags) == 1
    files.close()


def test_windows_names_what_else_is_wrong(become: Callable[..., Any], path: Path) -> None:
    """ERROR_ACCESS_DENIED is no reason to read in another way."""
    become("windows", error=5)
    with pytest.raises(OSError, match="code 5") as caught:
        windows.open_unbuffered(str(path))
    assert caught.value.errno != errno.EINVAL


def test_another_system_reads_through_the_cache(become: Callable[..., Any], path: Path) -> None:
    become("another")
    assert direct_way() is None
    with pytest.raises(OSError, match="Invalid argument"):
        open_direct(path)
    files = BlockFiles(True)
    assert content_by(files, path) == path.read_bytes()
    assert files.buffered_paths == [str(path)]
    files.close()


def test_here_nothing_stands_between_a_reader_and_the_system() -> None:
    assert reading.FILES is os
    assert positional_files() is os


@pytest.mark.parametrize("lacks", ["preadv", "readv", "pwrite"])
def test_what_lacks_one_is_emulated(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, lacks)
    assert isinstance(positional_files(), EmulatedFiles)


@pytest.mark.parametrize("has_pread", [True, False])
def test_emulated_reads_are_those_of_the_system(has_pread: bool, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several threads on one descriptor, whose position they share; and at the end of the file."""
    content, files = path.read_bytes(), EmulatedFiles()
    if not has_pread:
        monkeypatch.delattr(os, "pread")
    fd = os.open(path, os.O_RDONLY)
    wrong: list[int] = []

    def read_all(step: int) -> None:
        buffer = memoryview(bytearray(1000))
        for offset in range(0, len(content), step):
            got = files.preadv(fd, [buffer], offset)
            if bytes(buffer[:got]) != content[offset : offset + 1000]:
                wrong.append(offset)

    threads = [threading.Thread(target=read_all, args=(step,)) for step in (313, 457, 611, 823)]
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switching)
    assert wrong == []
    assert files.preadv(fd, [memoryview(bytearray(10))], len(content)) == 0
    os.close(fd)


def test_emulated_reads_go_on_where_the_file_stands_and_writes_at_their_offset(tmp_path: Path) -> None:
    files = EmulatedFiles()
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert files.pwrite(fd, memoryview(b"later"), 6) == 5
    assert files.pwrite(fd, memoryview(b"first "), 0) == 6
    os.lseek(fd, 6, os.SEEK_SET)
    buffer = memoryview(bytearray(20))
    assert files.readv(fd, [buffer]) == 5
    assert bytes(buffer[:5]) == b"later"
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"first later"
