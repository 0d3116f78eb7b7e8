"""What only a real process shows: signals, pipes, exit codes, and what is imported when."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from foreroute.checkpoint.records import STORE_NAME, PackedStore, partial_path
from tests.cli.harness import NUM_EXPERTS, NUM_LAYERS, start

SLOW_WRITES = """
import time
from foreroute.checkpoint.store_writer import StoreWriter
write = StoreWriter.write
StoreWriter.write = lambda *args: (time.sleep(0.1), write(*args))
"""

ENDLESS_TEXT = """
import itertools, sys
from foreroute.cli import figures
from foreroute.cli.commands import generate
generate.run = lambda args: [write("word ") for write in itertools.repeat(figures.writer(sys.stdout))]
"""


def table_of(folder: Path):
    from foreroute.checkpoint.locate import read_index
    from foreroute.model.build.skeleton import outline

    return outline(folder, read_index(folder)).table


def interrupt_when(process: subprocess.Popen[bytes], path: Path, by: int = signal.SIGINT) -> tuple[str, str]:
    """Send Ctrl-C, or another signal, some records after `path` has appeared; returns what the process wrote."""
    while not path.exists():
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(by)
    out, err = process.communicate()
    return out.decode(), err.decode()


def test_ctrl_c_while_generating_ends_the_answer_and_shows_the_figures(tiny: Path) -> None:
    process = start("generate", tiny, "hello", "--memory", "25%", "--max-new-tokens", "1000", "--threads", "1")
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err.decode()
    assert first
    text = (first + out).decode()  # raises where half a character was written
    assert text.endswith("\n")
    assert "Traceback" not in err.decode()
    assert "TTFT" in err.decode()
    assert "stopped by Ctrl-C" in err.decode()


@pytest.mark.parametrize(("by", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_while_packing_leaves_nothing_behind(copied: Path, by: int, code: int) -> None:
    """SIGTERM, as systemd and docker send it, does the same."""
    before = set(copied.iterdir())
    process = start("pack", copied, before=SLOW_WRITES)
    _, err = interrupt_when(process, partial_path(copied / STORE_NAME), by)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "interrupted" in err
    assert set(copied.iterdir()) == before


def test_a_kept_partial_file_is_continued(copied: Path, run, tmp_path: Path) -> None:
    process = start("pack", copied, "--keep-partial", before=SLOW_WRITES)
    _, err = interrupt_when(process, partial_path(copied / STORE_NAME))
    assert process.returncode == 130, err
    assert "continues there" in err
    assert partial_path(copied / STORE_NAME).exists()

    resumed = run("pack", copied)
    assert resumed.code == 0, resumed.err
    assert "Continuing a partial file" in resumed.err
    assert not partial_path(copied / STORE_NAME).exists()
    run("pack", copied, "--out", tmp_path / "fresh")
    assert (copied / STORE_NAME).read_bytes() == (tmp_path / "fresh").read_bytes()
    PackedStore(copied / STORE_NAME, table_of(copied))


def test_a_reader_who_leaves_is_no_error(tmp_path: Path) -> None:
    process = start("generate", tmp_path, "hello", before=ENDLESS_TEXT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 141, err
    assert err == ""


def test_help_imports_nothing_heavy() -> None:
    report = """
import atexit, sys
heavy = ("torch", "transformers", "numpy", "rich", "huggingface_hub")
atexit.register(lambda: print([name for name in heavy if name in sys.modules], file=sys.stderr))
"""
    for args in (["--help"], ["generate", "--help"], ["--version"]):
        process = start(*args, before=report)
        out, err = process.communicate()
        assert process.returncode == 0
        assert out
        assert err.decode() == "[]\n"


def test_an_error_is_one_line_and_code_2(tmp_path: Path) -> None:
    process = start("generate", tmp_path / "absent", "hello")
    out, err = process.communicate()
    assert process.returncode == 2
    assert out == b""
    (line,) = err.decode().splitlines()
    assert line.startswith("foreroute: error: ")
    assert "absent" in line


def test_the_model_of_these_tests_is_what_they_think(tiny: Path) -> None:
    assert table_of(tiny).total_slots == NUM_LAYERS * NUM_EXPERTS
