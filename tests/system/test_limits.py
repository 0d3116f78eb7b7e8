"""What the system says of a process and holds it to, where its usual ways are absent."""

import errno
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from foreroute.checkpoint import source_files
from foreroute.memory import host
from foreroute.system import limits, memory, pipes, writing

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
WORKER = (
    "import sys, time\nfor line in sys.stdin.buffer:\n"
    "    if line == b'sleep\\n':\n        time.sleep(60)\n"
    "    if line == b'end\\n':\n        sys.exit(3)\n"
    "    sys.stdout.buffer.write(line[::-1].strip() + b'\\n')\n    sys.stdout.buffer.flush()\n"
)


def test_without_affinity_all_processors_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert limits.usable_processors() != 7
    monkeypatch.delattr(os, "sched_getaffinity")
    assert limits.usable_processors() == 7


def test_open_files_without_rlimits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RESOURCE", None)
    assert source_files.room_for_files(500) == 500
    assert source_files.room_for_files(10_000) < 8192
    assert "8192" in source_files.explained(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))


@pytest.mark.parametrize("is_macos", [True, False])
def test_the_peak_is_in_bytes_everywhere(is_macos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """getrusage counts KiB on Linux and bytes on macOS."""
    usage = types.SimpleNamespace(ru_maxrss=5000)
    fake = types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setattr(memory, "RESOURCE", fake)
    monkeypatch.setattr(memory.sys, "platform", "darwin" if is_macos else "linux")
    assert memory.peak_resident_bytes() == (5000 if is_macos else 5000 * 1024)


def test_the_peak_by_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "RESOURCE", None)
    here = memory.peak_resident_bytes()
    assert here > 10e6
    asked = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(rss=1, peak_wset=2))
    monkeypatch.setitem(sys.modules, "psutil", types.SimpleNamespace(Process=lambda: asked))
    assert memory.peak_resident_bytes() == 2, "Windows' own peak"


def test_ram_by_psutil_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    found = types.SimpleNamespace(total=16 * 2**30, available=3 * 2**30)
    monkeypatch.setitem(sys.modules, "psutil", types.SimpleNamespace(virtual_memory=lambda: found))
    monkeypatch.setattr(host, "read_text", lambda path: None)
    assert host.ram() == host.Ram(16 * 2**30, 3 * 2**30, None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(host.BudgetError, match="psutil"):
        host.ram()


def test_memory_is_mapped_without_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MAP_PRIVATE")
    with memory.map_private(10_000) as mapped:
        mapped[:4] = b"here"
        assert mapped[:6] == b"here\0\0"


class TestWriting:
    def test_room_is_looked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "posix_fallocate")
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        writing.reserve(fd, 5000, tmp_path)
        assert os.fstat(fd).st_size == 5000
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=6000))
        writing.reserve(fd, 10_000, tmp_path)
        with pytest.raises(OSError, match="No space left"):
            writing.reserve(fd, 20_000, tmp_path)
        os.close(fd)

    def test_bytes_are_synced_in_another_way(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[int] = []
        monkeypatch.delattr(os, "fdatasync")
        monkeypatch.setattr(os, "fsync", synced.append)
        writing.sync_bytes(7)
        assert synced == [7]

    def test_what_a_file_takes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "sparse"
        path.touch()
        os.truncate(path, 2**20)
        assert writing.allocated_bytes(path) < 2**20
        monkeypatch.setattr(Path, "stat", lambda self: types.SimpleNamespace(st_size=12))
        assert writing.allocated_bytes(path) == 12


def ended(script: str) -> "subprocess.CompletedProcess[bytes]":
    lines = f"from foreroute.system import limits\n{script}"
    return subprocess.run([sys.executable, "-c", lines], env=ENVIRONMENT, capture_output=True, check=False, timeout=60)


class TestTime:
    def test_a_signal_ends_it(self) -> None:
        assert ended("limits.end_after(0.2); import time; time.sleep(30)").returncode == -signal.SIGALRM

    def test_a_timer_ends_it_where_there_is_no_such_signal(self) -> None:
        lost = "limits._ALARMS = None\n"
        done = ended(f"{lost}limits.end_after(0.2); import time; time.sleep(30)")
        assert done.returncode == limits.TIME_IS_UP
        done = ended(f"{lost}stop = limits.end_after(0.2); stop(); import time; time.sleep(0.6)")
        assert done.returncode == 0

    def test_time_of_a_processor(self) -> None:
        by = -ended("limits.limit_processor_time(1)\nwhile True: pass").returncode
        assert by in (signal.SIGXCPU, signal.SIGKILL)
        lost = "limits.RESOURCE = limits._ALARMS = None\n"
        assert ended(f"{lost}limits.limit_processor_time(1)\nwhile True: pass").returncode == limits.TIME_IS_UP


class TestMemory:
    TAKE = "\ntry:\n    taken = bytearray(2**29)\n    print('had')\nexcept MemoryError:\n    print('refused')"

    def test_it_is_limited(self) -> None:
        assert ended(f"limits.limit_memory(2**26){self.TAKE}").stdout == b"refused\n"

    @pytest.mark.parametrize("lost", ["limits.RESOURCE = None", "limits._IS_MACOS = True"])
    def test_where_there_is_no_limit_that_is_said(self, lost: str) -> None:
        assert ended(f"{lost}\nassert not limits.limit_memory(2**26){self.TAKE}").stdout == b"had\n"


@pytest.fixture(params=["polled", "by threads"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "by threads":
        monkeypatch.setattr(pipes, "_set_blocking", None)
    return pipes.exchange


class TestPipes:
    def test_lines_go_and_come(self, exchange: Any) -> None:
        with worker() as one:
            assert exchange(one, b"abc\n", 20) == b"cba\n"
            long = b"x" * 500_000 + b"y\n"
            assert exchange(one, long, 20) == long.strip()[::-1] + b"\n"

    def test_it_ends(self, exchange: Any) -> None:
        with worker() as one:
            assert exchange(one, b"end\n", 20) is None
            assert one.poll() == 3

    def test_it_takes_too_long(self, exchange: Any) -> None:
        with worker() as one:
            began_s = time.perf_counter()
            assert exchange(one, b"sleep\n", 0.3) is None
            assert time.perf_counter() - began_s < 15
            assert one.poll() is None
            one.kill()


def worker() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
