"""What `foreroute doctor` finds, on this machine and on ones that are made up."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foreroute.cli.machine import disk, doctor, host, software
from foreroute.cli.machine.findings import OK, PROBLEM, WARNING, Finding
from foreroute.kernels.ggml.library import GgmlError

NAMES = {"packages", "disk", "O_DIRECT", "free disk", "memory", "processors", "huge pages", "ggml", "CUDA"}
MIB = 2**20


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(20 * MIB + 5))
    return path


def test_everything_is_looked_at(run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("doctor", tiny, "--json")
    found = {one["name"]: one for one in ran.json["findings"]}
    assert {*found} >= NAMES - {"O_DIRECT"}
    assert all(one["advice"] for one in found.values() if one["status"] != OK)
    assert found["packages"]["status"] == OK, found["packages"]
    assert "torch " in found["packages"]["found"]
    assert ran.code == int(ran.json["status"] == PROBLEM)
    shown = run("doctor", tiny).out
    assert all(name in shown for name in NAMES - {"O_DIRECT"})


def test_a_problem_is_exit_code_1_and_a_warning_is_not(run, monkeypatch: pytest.MonkeyPatch) -> None:
    for status, code in ((PROBLEM, 1), (WARNING, 0)):
        found = [Finding("disk", OK, "fine"), Finding("memory", status, "[little]", "Buy some.")]
        monkeypatch.setattr(doctor, "examine", lambda files, found=found: found)
        ran = run("doctor")
        assert ran.code == code
        mark = "X" if status == PROBLEM else "!"
        assert ran.out.splitlines() == [
            "ok  disk        fine",
            f"{mark}   memory      [little]",
            "                Buy some.",
        ]
        assert run("doctor", "--json").json["status"] == status


def test_it_does_without_torch() -> None:
    script = (
        "import sys; from foreroute.cli.main import main; code = main(['doctor', '--json']);"
        "sys.exit(3 if 'torch' in sys.modules or 'transformers' in sys.modules else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, env=os.environ | {
        "PYTHONPATH": str(Path(doctor.__file__).parents[3])}, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_the_disk_is_read_in_whole_blocks_each_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets: list[int] = []
    whole = os.preadv

    def watched(fd: int, buffers: Any, offset: int) -> int:
        offsets.append(offset)
        return whole(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    speed = disk.measure(weights, block_bytes=4 * MIB)
    assert speed.nbytes == 20 * MIB
    assert sorted(offsets) == [block * 4 * MIB for block in range(5)]
    assert offsets != sorted(offsets)
    assert disk.measure(weights, limit_s=0).nbytes == 4 * MIB, "it ends when time is up"


def test_where_o_direct_is_refused_the_page_cache_is_named(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    speed, direct = disk.disk_findings([weights])
    assert (speed.status, direct.status) == (WARNING, WARNING)
    assert "perhaps RAM's speed" in speed.found
    assert "ext4 or xfs" in direct.advice


@pytest.mark.parametrize(
    ("speed", "status", "told"),
    [(3e9, OK, "3.00 GB/s"), (2e8, WARNING, "200 MB/s"), (None, WARNING, "too little")],
)
def test_how_fast_is_fast_enough(tmp_path: Path, speed: float | None, status: str, told: str) -> None:
    nbytes = 10**9 if speed else MIB
    found = disk._speed_finding(disk.DiskSpeed(tmp_path / "f", nbytes, nbytes / (speed or 1e9), True))
    assert (found.status, told in found.found) == (status, True)
    assert bool(found.advice) == (status != OK)


def test_no_model_and_a_file_that_cannot_be_read(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk.disk_findings([])[0].advice == "Name one: foreroute doctor MODEL."
    monkeypatch.setattr(disk, "measure", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    (found,) = disk.disk_findings([weights])
    assert (found.status, "Input/output error" in found.found) == (PROBLEM, True)


def machine(root: Path, free_kib: int, pages: str = "always [madvise] never") -> Path:
    for name, text in {"proc/meminfo": f"MemTotal: 16777216 kB\nMemAvailable: {free_kib} kB\n",
                       "sys/kernel/mm/transparent_hugepage/enabled": pages}.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_memory_pages_and_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = machine(tmp_path, 8 * MIB)
    found = host.memory_finding(ready)
    assert (found.status, found.found) == (OK, "8.0 GiB free of this machine's RAM (16.0 GiB)")
    assert host.pages_finding(ready) == Finding("huge pages", OK, "madvise")
    assert host.memory_finding(machine(tmp_path, 1024)).status == PROBLEM
    assert host.memory_finding(tmp_path / "absent").status == WARNING
    never = host.pages_finding(machine(tmp_path, 1024, "always madvise [never]"))
    assert (never.status, "echo madvise" in never.advice) == (WARNING, True)
    assert host.pages_finding(tmp_path / "absent").status == OK
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert host.processor_finding().status == OK
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert host.processor_finding().advice == "Threads would wait: unset OMP_NUM_THREADS."


def test_packages_of_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=2", "transformers<5", "absent>=1", "gone>=1; python_version < '3'", "more; extra == 'serve'"]
    monkeypatch.setattr(software.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(software, "_version", {"torch": "2.13.0+cpu", "transformers": "5.24.0"}.get)
    found = software.package_findings()
    assert [(one.found, one.advice) for one in found] == [
        ("transformers 5.24.0", "pip install 'transformers<5'"), ("no absent", "pip install 'absent>=1'"),
    ]  # fmt: skip
    assert {one.status for one in found} == {PROBLEM}


def test_ggml_that_cannot_be_used_is_a_warning() -> None:
    def refuse() -> Any:
        raise GgmlError("It is not installed. Install it.")

    found = software.ggml_finding(refuse)
    assert (found.status, found.advice) == (WARNING, "It is not installed. Install it.")


class Driver:
    """NVIDIA's, with this many GPUs."""

    def __init__(self, count: int, version: int = 13000, code: int = 0) -> None:
        self._count, self._version, self._code = count, version, code

    def cuInit(self, flags: int) -> int:
        return self._code

    def cuDeviceGetCount(self, count: Any) -> int:
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = self._count
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = self._version
        return 0


@pytest.mark.parametrize(
    ("driver", "build", "status", "told"),
    [
        (None, None, OK, "no NVIDIA driver"),
        (Driver(2), "13.0", OK, "2 GPUs, driver for CUDA 13.0; torch is built for CUDA 13.0"),
        (Driver(1, 12080), "13.0", WARNING, "driver for CUDA 12.8"),
        (Driver(1), None, WARNING, "torch is a CPU build"),
        (Driver(0), "13.0", WARNING, "no GPU"),
        (Driver(0, code=100), "13.0", WARNING, "code 100"),
    ],
)
def test_cuda_is_told_by_the_driver(
    driver: Any, build: str | None, status: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(software, "_torch_cuda", lambda: build)
    found = software.cuda_finding(lambda: driver)
    assert (found.status, told in found.found) == (status, True), found
