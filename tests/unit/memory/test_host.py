"""What this process may have of the machine: control groups of both versions, ulimit, affinity; and what is chosen."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from foreroute.errors import BudgetError
from foreroute.memory import host
from foreroute.memory.host import Ram, cpu_limit, ram, usable_cpus
from foreroute.memory.plan import choose_memory

ROOT = Path(__file__).parents[3]
MIB, GIB = 2**20, 2**30
TOTAL, FREE = 64 * GIB, 40 * GIB
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MEMORY = "31 23 0:27 {root} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory"
V1_CPU = "32 23 0:28 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
NO_LIMIT = 9223372036854771712  # of version 1


@dataclass
class Machine:
    """A machine's /proc and /sys/fs/cgroup, with 64 GiB of RAM of which 40 are free."""

    root: Path

    def write(self, name: str, text: object) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def groups(self, *lines: str, mounts: tuple[str, ...], mounted: str = "/") -> None:
        """This process's groups, and where their trees are mounted."""
        self.write("proc/self/cgroup", "\n".join(lines))
        others = "23 1 8:1 / / rw - ext4 /dev/sda1 rw"
        self.write("proc/self/mountinfo", "\n".join([others, *(mount.format(root=mounted) for mount in mounts)]))

    def group(self, path: str, **values: object) -> None:
        """The files of a group: memory_max=... is memory.max."""
        for name, value in values.items():
            self.write(f"sys/fs/cgroup/{path}/{name.replace('_', '.', 1)}", value)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    made = Machine(tmp_path / "root")
    made.write("proc/meminfo", f"MemTotal: {TOTAL // 1024} kB\nMemFree: 1 kB\nMemAvailable: {FREE // 1024} kB")
    return made


def test_no_limit(machine: Machine) -> None:
    assert ram(machine.root) == Ram(TOTAL, FREE, None)
    assert usable_cpus(machine.root) == 16
    machine.groups("0::/user.slice/a", mounts=(V2,))
    machine.group("user.slice/a", memory_max="max", memory_high="max", memory_current=GIB, cpu_max="max 100000")
    assert ram(machine.root) == Ram(TOTAL, FREE, None)
    assert usable_cpus(machine.root) == 16
    assert str(ram(machine.root)) == "this machine's RAM (64.0 GiB)"


def test_version_2(machine: Machine) -> None:
    machine.groups("0::/a", mounts=(V2,))
    machine.group("a", memory_max=450 * MIB, memory_current=100 * MIB, cpu_max="150000 100000")
    there = ram(machine.root)
    assert there == Ram(450 * MIB, 350 * MIB, "memory.max of its control group")
    assert str(there) == "the RAM that this process may use (450.0 MiB, by memory.max of its control group)"
    assert usable_cpus(machine.root) == 2, "a part of a third processor is worth a thread"
    limit = cpu_limit(machine.root)
    assert limit is not None
    assert limit.cpus == 1.5


def test_file_pages_of_a_group_are_free(machine: Machine) -> None:
    """As they are in MemAvailable: a checkpoint that was read before fills a group's memory, and goes when asked."""
    machine.groups("0::/a", mounts=(V2,))
    stat = f"anon {100 * MIB}\nfile {900 * MIB}\ninactive_file {500 * MIB}\nactive_file {300 * MIB}\nshmem {100 * MIB}"
    machine.group("a", memory_max=GIB, memory_current=GIB, memory_stat=f"{stat}\nslab_reclaimable {8 * MIB}")
    assert ram(machine.root).free_bytes == 808 * MIB


def test_memory_high_is_a_limit_too(machine: Machine) -> None:
    """Beyond it a process is slowed down until it does not move."""
    machine.groups("0::/a", mounts=(V2,))
    machine.group("a", memory_max=4 * GIB, memory_high=GIB, memory_current=0)
    assert ram(machine.root) == Ram(GIB, GIB, "memory.high of its control group")


@pytest.mark.parametrize("tight", ["a", "a/b", "a/b/c"])
def test_the_tightest_of_nested_groups_holds(machine: Machine, tight: str) -> None:
    machine.groups("0::/a/b/c", mounts=(V2,))
    for path in ("a", "a/b", "a/b/c"):
        is_tight = path == tight
        machine.group(
            path, memory_max=2 * GIB if is_tight else 8 * GIB, memory_current=GIB,
            cpu_max="300000 100000" if is_tight else "800000 100000",
        )  # fmt: skip
    assert ram(machine.root) == Ram(2 * GIB, GIB, "memory.max of its control group")
    assert usable_cpus(machine.root) == 3


def test_a_group_above_may_be_fuller(machine: Machine) -> None:
    """The least that is left need not be where the limit is least: others are in the group above."""
    machine.groups("0::/a/b", mounts=(V2,))
    machine.group("a", memory_max=8 * GIB, memory_current=8 * GIB - 5 * MIB)
    machine.group("a/b", memory_max=2 * GIB, memory_current=GIB)
    assert ram(machine.root) == Ram(2 * GIB, 5 * MIB, "memory.max of its control group")
    machine.group("a", memory_current=9 * GIB)
    assert ram(machine.root).free_bytes == 0


def test_version_1(machine: Machine) -> None:
    machine.groups("4:memory:/docker/a", "3:cpu,cpuacct:/docker/a", mounts=(V1_MEMORY, V1_CPU))
    stat = f"cache 7\ninactive_file 1\ntotal_inactive_file {50 * MIB}\ntotal_active_file {25 * MIB}"
    machine.group(
        "memory/docker/a", memory_limit_in_bytes=450 * MIB, memory_usage_in_bytes=400 * MIB,
        memory_stat=f"{stat}\nhierarchical_memory_limit {NO_LIMIT}",
    )  # fmt: skip
    machine.group("memory", memory_limit_in_bytes=NO_LIMIT, memory_usage_in_bytes=12 * GIB)
    machine.group("cpu,cpuacct/docker/a", cpu_cfs_quota_us=50_000, cpu_cfs_period_us=100_000)
    machine.group("cpu,cpuacct", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100_000)
    assert ram(machine.root) == Ram(450 * MIB, 125 * MIB, "memory.limit_in_bytes of its control group")
    assert usable_cpus(machine.root) == 1


def test_version_1_tells_of_groups_above_that_are_not_to_be_seen(machine: Machine) -> None:
    machine.groups("4:memory:/docker/a", mounts=(V1_MEMORY,), mounted="/docker/a")
    machine.group(
        "memory", memory_limit_in_bytes=NO_LIMIT, memory_usage_in_bytes=GIB,
        memory_stat=f"hierarchical_memory_limit {3 * GIB}",
    )  # fmt: skip
    assert ram(machine.root) == Ram(3 * GIB, 2 * GIB, "hierarchical_memory_limit of its control group")


def test_both_versions_at_once(machine: Machine) -> None:
    """The hybrid of systemd: memory and processors in version 1, and a tree of version 2 that limits neither."""
    unified = V2.replace("/sys/fs/cgroup rw", "/sys/fs/cgroup/unified rw")
    machine.groups("4:memory:/a", "1:name=systemd:/a", "0::/a", mounts=(V1_MEMORY, unified))
    machine.group("unified/a", cgroup_procs="1")
    machine.group("memory/a", memory_limit_in_bytes=GIB, memory_usage_in_bytes=0)
    assert ram(machine.root) == Ram(GIB, GIB, "memory.limit_in_bytes of its control group")


@pytest.mark.parametrize(
    ("own", "mounted"),
    [
        ("/", "/"),  # a namespace of its own: its root is the container's group
        ("/docker/a", "/docker/a"),  # the host's names, and its tree mounted from the container's group on
        ("/elsewhere/b", "/docker/a"),  # the names of one and the tree of another
        ("/../b", "/"),  # beside the namespace's root
        ("/docker/a", "/"),  # the folders above are not there
    ],
)
def test_in_a_container(machine: Machine, own: str, mounted: str) -> None:
    machine.groups(f"0::{own}", mounts=(V2,), mounted=mounted)
    machine.group(".", memory_max=GIB, memory_current=256 * MIB, cpu_max="100000 100000")
    assert ram(machine.root) == Ram(GIB, 768 * MIB, "memory.max of its control group")
    assert usable_cpus(machine.root) == 1


def test_a_mount_with_a_blank_in_its_name(machine: Machine) -> None:
    machine.groups("0::/", mounts=(V2.replace("cgroup rw", r"my\040groups rw"),))
    machine.write("sys/fs/my groups/memory.max", GIB)
    assert ram(machine.root).total_bytes == GIB


@pytest.mark.parametrize("value", ["", "max", "-1", "lots", "12 34"])
def test_what_is_no_number_is_no_limit(machine: Machine, value: str) -> None:
    machine.groups("0::/a", mounts=(V2,))
    machine.group("a", memory_max=value, memory_current=value, memory_stat=value, cpu_max=value)
    assert ram(machine.root) == Ram(TOTAL, FREE, None)
    if value != "12 34":
        assert usable_cpus(machine.root) == 16


def test_files_that_cannot_be_read(machine: Machine) -> None:
    """As a folder cannot: a superuser may read what others may not."""
    machine.groups("0::/a/b", mounts=(V2, "no mount at all", "1 2 - cgroup2"))
    machine.group("a", memory_max=GIB)
    machine.group("a/b", memory_max=2 * GIB, memory_current=0, cpu_max="200000 100000")
    (machine.root / "sys/fs/cgroup/a/b/memory.max").unlink()
    (machine.root / "sys/fs/cgroup/a/b/memory.max").mkdir()
    assert ram(machine.root) == Ram(GIB, GIB, "memory.max of its control group"), "what is taken is not known"
    assert usable_cpus(machine.root) == 2
    for name in ("cgroup", "mountinfo"):
        (machine.root / "proc/self" / name).unlink()
        assert ram(machine.root) == Ram(TOTAL, FREE, None)


def test_a_limit_above_what_the_machine_has(machine: Machine) -> None:
    machine.groups("0::/a", mounts=(V2,))
    machine.group("a", memory_max=2 * TOTAL, memory_current=0, cpu_max="6400000 100000")
    assert ram(machine.root) == Ram(TOTAL, FREE, None)
    assert cpu_limit(machine.root) is None
    assert usable_cpus(machine.root) == 16


def test_processors_that_a_process_may_run_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.groups("0::/a", mounts=(V2,))
    machine.group("a", cpu_max="400000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert usable_cpus(machine.root) == 2
    assert cpu_limit(machine.root) is None, "it is no limit to two"


@pytest.mark.parametrize(("name", "taken", "shown"), [("address space", "VmSize", "-v"), ("data size", "VmData", "-d")])
def test_ulimit(machine: Machine, name: str, taken: str, shown: str) -> None:
    """The system refuses memory beyond it, and whoever asks for that much ends."""
    machine.write("proc/self/limits", f"Limit  Soft Limit  Hard Limit  Units\nMax {name}   {GIB}   unlimited   bytes")
    machine.write("proc/self/status", f"Name: python\n{taken}: {256 * 1024} kB\nVmRSS: 1 kB")
    assert ram(machine.root) == Ram(GIB, 768 * MIB, f"ulimit {shown}")
    machine.write("proc/self/limits", f"Max {name}   unlimited   unlimited   bytes")
    assert ram(machine.root) == Ram(TOTAL, FREE, None)


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="how much RAM is free"):
        ram(tmp_path)


@dataclass
class Experts:
    """As much of a table as is asked for."""

    whole_bytes: int = 21_000 * MIB


def test_memory_is_chosen_from_what_a_container_has(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.groups("0::/a", mounts=(V2,))
    machine.group("a", memory_max=6 * GIB, memory_current=GIB)
    whole = ram
    monkeypatch.setattr(host, "ram", lambda: whole(machine.root))
    assert choose_memory(None, Experts(), dense_bytes=GIB) == 2 * GIB  # and 2 are left free
    machine.group("a", memory_max=450 * MIB, memory_current=100 * MIB)
    assert choose_memory(None, Experts(), dense_bytes=GIB) == 0
    with pytest.raises(BudgetError) as caught:
        choose_memory("20GiB", Experts(), dense_bytes=GIB)
    assert "the RAM that this process may use (450.0 MiB, by memory.max of its control group)" in str(caught.value)
    assert "Leave --memory out" in str(caught.value)
    with pytest.raises(BudgetError, match="more than all experts need"):
        choose_memory("30GiB", Experts(), dense_bytes=GIB)


# Limits that the kernel keeps: the same code in a process that has one.

_ASK = "from foreroute.memory.host import ram, usable_cpus; print(ram().total_bytes, ram().free_bytes, usable_cpus())"


def _asked(command: list[str], before: str = "") -> list[int]:
    done = subprocess.run(
        [*command, sys.executable, "-c", before + _ASK],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_a_real_ulimit_and_a_real_affinity() -> None:
    before = (
        "import os, resource; resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29));"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
    )
    total, free, cpus = _asked([], before)
    assert total == 2**29
    assert 0 < free < 2**29
    assert cpus == 1


def test_a_real_group() -> None:
    """Made by systemd, for the time of one process."""
    scope = ["systemd-run", "--scope", "--quiet", "-p", "MemoryMax=300M", "-p", "CPUQuota=100%"]
    if shutil.which("systemd-run") is None or not Path("/run/systemd/system").is_dir():
        pytest.skip("systemd does not run here: it cannot make a control group")
    ways = ([*scope, "--"], [*scope, "--user", "--"])
    allowed = [way for way in ways if subprocess.run([*way, "true"], capture_output=True, check=False).returncode == 0]
    if not allowed:
        pytest.skip("systemd gives this user no control group")
    total, free, cpus = _asked(allowed[0])
    assert total == 300 * MIB
    assert free < 300 * MIB
    assert cpus == 1
