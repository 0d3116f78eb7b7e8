"""Files that are whole or not there, whatever ends the one who writes; and one writer at a time."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from foreroute.errors import ForerouteError
from foreroute.whole_files import Claim, ClaimedError, atomic_write, save_figure

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestAtomicWrite:
    def test_the_file_comes_in_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("older")
        with atomic_write(path) as beside:
            assert beside.parent == path.parent
            beside.write_text("newer")
            assert path.read_text() == "older"
        assert path.read_text() == "newer"
        assert names(tmp_path) == {"file"}

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError(), SystemExit(1)])
    def test_an_error_leaves_the_older_one(self, tmp_path: Path, error: BaseException) -> None:
        path = tmp_path / "file"
        path.write_text("older")

        def write() -> None:
            with atomic_write(path) as beside:
                beside.write_text("half")
                raise error

        with pytest.raises(type(error)):
            write()
        assert path.read_text() == "older"
        assert names(tmp_path) == {"file"}

    @pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
    def test_a_disk_that_fails_in_the_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        path = tmp_path / "file"
        path.write_text("older")

        def fails(*args: object) -> None:
            raise OSError(errno.EIO, "broken")

        monkeypatch.setattr(os, call, fails)
        with pytest.raises(OSError, match="broken"), atomic_write(path) as beside:
            beside.write_text("newer")
        assert path.read_text() == "older"
        assert names(tmp_path) == {"file"}

    def test_it_is_on_the_disk_before_it_has_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        did: list[str] = []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (did.append("sync"), fsync(fd))[1])
        monkeypatch.setattr(os, "replace", lambda one, other: (did.append("rename"), replace(one, other))[1])
        with atomic_write(tmp_path / "file") as beside:
            beside.write_text("bytes")
        assert did == ["sync", "rename", "sync"], "its bytes, its name, and the folder that has the name"

    def test_two_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with atomic_write(path) as one, atomic_write(path) as other:
            assert one != other
            one.write_text("one")
            other.write_text("other")
        assert path.read_text() == "one", "it ended last"
        assert names(tmp_path) == {"file"}

    def test_permissions(self, tmp_path: Path) -> None:
        """As any file of this user; those of a file that is replaced stay."""
        path = tmp_path / "file"
        before = os.umask(0o027)
        try:
            with atomic_write(path) as beside:
                # As safetensors does: another file in its place, its owner's alone.
                beside.unlink()
                os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        with atomic_write(path) as beside:
            beside.write_text("newer")
        assert stat.S_IMODE(path.stat().st_mode) == 0o604

    def test_a_long_name(self, tmp_path: Path) -> None:
        path = tmp_path / ("é" * 127)
        with atomic_write(path) as beside:
            beside.write_text("bytes")
        assert path.read_text() == "bytes"

    def test_readers_see_one_or_the_other(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("0" * 5000)
        seen, is_over = set[str](), threading.Event()

        def read() -> None:
            while not is_over.is_set():
                seen.add(path.read_text())

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(100):
            with atomic_write(path) as beside:
                beside.write_text(str(number % 10) * 5000)
        is_over.set()
        reader.join()
        assert {(len(text), len(set(text))) for text in seen} == {(5000, 1)}


class TestFigures:
    class Figure:
        """What of matplotlib's is used."""

        def savefig(self, path: Path, dpi: int, format: str) -> None:
            if format == "odd":
                raise ValueError("Format 'odd' is not supported")
            path.write_text(format)

    @pytest.mark.parametrize(("name", "kind"), [("a.png", "png"), ("a.SVG", "svg"), ("a", "png")])
    def test_the_name_says_which_kind(self, tmp_path: Path, name: str, kind: str) -> None:
        save_figure(self.Figure(), tmp_path / name)
        (path,) = tmp_path.iterdir()
        assert path.name == (name if "." in name else f"{name}.png")
        assert path.read_text() == kind

    @pytest.mark.parametrize("name", ["a.odd", "absent/a.png"])
    def test_what_cannot_be_written(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ForerouteError, match="cannot be written"):
            save_figure(self.Figure(), tmp_path / name)
        assert names(tmp_path) == set()


class TestClaim:
    def test_one_has_it(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with Claim(path) as first:
            os.write(first.fd, b"begun")
            with pytest.raises(ClaimedError) as caught:
                Claim(path)
            assert caught.value.process_id in (os.getpid(), None)
            assert path.read_bytes() == b"begun"
        with Claim(path) as second:
            assert os.read(second.fd, 10) == b"begun"

    def test_an_empty_file_is_not_left(self, tmp_path: Path) -> None:
        with Claim(tmp_path / "file"):
            assert names(tmp_path) == {"file"}
        assert names(tmp_path) == set()

    def test_a_claim_is_on_the_file_that_has_the_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One opens the file, another finishes and renames it, then the first gets the lock: of what is whole now."""
        import fcntl

        path, final = tmp_path / "file.partial", tmp_path / "file"
        finished = Claim(path)
        os.write(finished.fd, b"whole")
        flock, calls = fcntl.flock, []

        def late(fd: int, how: int) -> None:
            calls.append(fd)
            if len(calls) == 1:
                finished.rename(final)
            flock(fd, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with Claim(path) as claim:
            assert len(calls) == 2, "opened again"
            os.write(claim.fd, b"next")
            assert final.read_bytes() == b"whole"
            assert path.read_bytes() == b"next"

    def test_a_removed_file_is_no_longer_claimed(self, tmp_path: Path) -> None:
        """Whoever removes it by hand while it is written: both go on, each in a file of its own."""
        path = tmp_path / "file"
        first = Claim(path)
        path.unlink()
        with Claim(path) as second:
            os.write(second.fd, b"second")
            first.discard()
            assert path.read_bytes() == b"second", "it was not the first one's to remove"

    def test_discarded_after_it_was_renamed(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        claim = Claim(path)
        os.write(claim.fd, b"whole")
        claim.rename(tmp_path / "final")
        path.write_text("another's")
        claim.discard()
        assert names(tmp_path) == {"file", "final"}

    def test_it_ends_with_its_process(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        script = (
            "import sys, os, time\nfrom pathlib import Path\nfrom foreroute.whole_files import Claim\n"
            "claim = Claim(Path(sys.argv[1]))\nos.write(claim.fd, b'half')\n"
            "print('claimed', flush=True)\ntime.sleep(60)"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path)], env=environment, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "claimed\n"
            with pytest.raises(ClaimedError) as caught:
                Claim(path)
            assert caught.value.process_id in (other.pid, None)
            other.send_signal(signal.SIGKILL)
            other.wait()
        with Claim(path) as claim:
            assert os.read(claim.fd, 10) == b"half"

    def test_where_files_cannot_be_locked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is no other process that has it."""
        import fcntl

        def refuses(fd: int, how: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", refuses)
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="No locks available"):
            Claim(tmp_path / "file")
        assert set(os.listdir("/proc/self/fd")) == before
        assert names(tmp_path) == set()
