"""Text that is not UTF-8, and locales that know ASCII alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.harness import ROOT

# Neither of Python's own ways out: what is left is ASCII everywhere.
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def start(*args: str | bytes | Path, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-m", "foreroute.cli.main", *args],
        env={**kept, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **env},
        input=stdin, capture_output=True, timeout=120, check=False,
    )  # fmt: skip


def is_one_line(done: subprocess.CompletedProcess[bytes], *words: str) -> None:
    said = done.stderr.decode()
    assert done.returncode == 2, said
    assert said.startswith("foreroute: error: "), said
    assert said.count("\n") == 1, said
    for word in words:
        assert word in said


@pytest.fixture
def accented(tiny: Path, tmp_path: Path) -> Path:
    """The model with settings whose names and values are no ASCII; JSON is written as it is."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny.iterdir():
        if path.name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            content = {**json.loads(path.read_text(encoding="utf-8")), "über": "中"}
            (folder / path.name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        else:
            os.link(path, folder / path.name)
    tokenizer = json.loads((tiny / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return folder


def test_settings_and_prompts_beyond_ascii_in_the_c_locale(accented: Path, tmp_path: Path) -> None:
    """Every file is read and written as UTF-8, arguments are taken for it, and text is printed so."""
    trace, flags = tmp_path / "é.jsonl", ("--memory", "50%", "--max-new-tokens", "2", "--json")
    first = start("generate", accented, "Où est 中?".encode(), "--trace", trace, *flags, **C_LOCALE)
    assert first.returncode == 0, first.stderr.decode()
    again = start("generate", accented, "-", *flags, stdin="Où est 中?".encode(), LC_ALL="C.UTF-8")
    assert again.returncode == 0, again.stderr.decode()
    ours, theirs = json.loads(first.stdout.decode("utf-8")), json.loads(again.stdout.decode("utf-8"))
    assert ours["text"] == theirs["text"]
    assert ours["token_ids"] == theirs["token_ids"]
    replayed = start("replay", trace, "--json", **C_LOCALE)
    assert replayed.returncode == 0, replayed.stderr.decode()


def test_prompts_that_are_not_utf8(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("Où".encode("latin-1"))
    is_one_line(start("generate", tiny, b"O\xf9"), "prompt is not UTF-8")
    is_one_line(start("generate", tiny, b"hello", b"--system", b"O\xf9"), "--system is not UTF-8")
    is_one_line(start("generate", tiny, "-", stdin=b"O\xf9"), "Standard input is not UTF-8")
    is_one_line(start("generate", tiny, "--file", tmp_path / "latin"), "latin is not UTF-8")
    is_one_line(start("chat", tiny, "--system", b"O\xf9"), "--system is not UTF-8")
    is_one_line(start("demo", b"O\xf9"), "prompt is not UTF-8")


def test_a_path_that_is_no_text(tiny: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/mod\xe8le"
    is_one_line(start("plan", folder), "mod\\udce8le", "not a folder")
    os.symlink(tiny, folder)
    is_one_line(start("plan", folder), "mod\\udce8le", "not text in this locale", "LC_ALL")


def test_an_argument_is_taken_for_utf8() -> None:
    from foreroute.cli.options import argument_text

    assert argument_text("Où 中", "It") == "Où 中"
    assert argument_text("Où".encode().decode("ascii", "surrogateescape"), "It") == "Où"
