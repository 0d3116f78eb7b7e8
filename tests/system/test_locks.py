"""Locks where there is no flock, and files that cannot be renamed while they are open."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foreroute import whole_files
from foreroute.errors import TraceError
from foreroute.system import locks
from foreroute.trace import open_trace
from foreroute.whole_files import Claim, ClaimedError

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys; from pathlib import Path; from foreroute.system import locks; locks.FCNTL = None\n"
    "from foreroute.whole_files import Claim\nclaim = Claim(Path(sys.argv[1]))\nprint('held', flush=True)\ninput()"
)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are files beside, as on Windows, and open files stay where they are."""
    monkeypatch.setattr(locks, "FCNTL", None)
    monkeypatch.setattr(whole_files, "moves_open_files", lambda: False)
    replace, unlink = os.replace, Path.unlink

    def open_paths() -> set[str]:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return {os.readlink(link) for link in links if link.is_symlink()}

    def replacing(one: Path, other: Path) -> None:
        assert str(one) not in open_paths(), "Windows renames no open file"
        replace(one, other)

    def unlinking(path: Path, missing_ok: bool = False) -> None:
        assert path.suffix == ".lock" or str(path) not in open_paths(), "Windows removes no open file"
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(Path, "unlink", unlinking)


@pytest.mark.usefixtures("beside")
class TestWithoutFlock:
    def test_one_has_it_at_a_time(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with Claim(path) as first:
            os.write(first.fd, b"half")
            with pytest.raises(ClaimedError) as caught:
                Claim(path)
            assert caught.value.process_id is None
        with Claim(path) as second:
            assert os.read(second.fd, 10) == b"half", "the second finds what the first left"

    def test_it_is_renamed_and_free(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        claim = Claim(path)
        os.write(claim.fd, b"whole")
        claim.rename(tmp_path / "final")
        assert (tmp_path / "final").read_bytes() == b"whole"
        assert not path.exists()
        Claim(path).close()

    def test_it_is_discarded_and_free(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        claim = Claim(path)
        os.write(claim.fd, b"half")
        claim.discard()
        assert not path.exists()
        Claim(path).close()
        assert not path.exists(), "an empty one is removed"

    @pytest.mark.parametrize("way", ["rename", "discard", "close"])
    def test_it_is_free_after_what_the_system_refused(
        self, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As where a virus scanner has the file open: it can be claimed again all the same."""
        path = tmp_path / "file"

        def refused(*paths: object) -> None:
            raise PermissionError(13, "in use")

        claim = Claim(path)
        end = {"rename": lambda: claim.rename(tmp_path / "final"), "discard": claim.discard, "close": claim.close}[way]
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", refused)
            patched.setattr(Path, "unlink", lambda one, missing_ok=False: refused())
            with pytest.raises(PermissionError):
                end()
        assert claim.fd == -1
        claim.close()
        Claim(path).close()

    def test_another_process_has_it_until_it_ends(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ClaimedError):
                Claim(path)
            other.kill()
            other.wait()
        Claim(path).close()

    def test_a_trace_has_one_writer(self, tmp_path: Path) -> None:
        path = tmp_path / "run.jsonl"
        trace = open_trace(path)
        with pytest.raises(TraceError, match="another model is writing it"):
            open_trace(path)
        trace.begin(model="one")
        trace.close()
        assert json.loads(path.read_text())["model"] == "one"
        open_trace(path).close()


def test_who_holds_it_is_said_where_the_system_says_it(tmp_path: Path) -> None:
    with Claim(tmp_path / "file"):
        told = "FLOCK" in Path("/proc/locks").read_text()
        with pytest.raises(ClaimedError) as caught:
            Claim(tmp_path / "file")
    assert caught.value.process_id == (os.getpid() if told else None)
