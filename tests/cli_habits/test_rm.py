"""Models are removed from the hub's cache and stores from beside a model, after asking, and nothing else is."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import copied as copied

COMMIT = "a" * 40
FILES = {"m-Q4_K_M.gguf": 4000, "m-Q8_0-00001-of-00002.gguf": 5000, "m-Q8_0-00002-of-00002.gguf": 600, "README.md": 10}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache as huggingface_hub writes it: links to blobs; two models and a data set."""
    from huggingface_hub import constants

    for folder, files in {"models--org--many-GGUF": FILES, "models--org--one": {"only-Q4_K_M.gguf": 300},
                          "datasets--org--many-GGUF": {"data.txt": 7}}.items():  # fmt: skip
        repo = tmp_path / "hub" / folder
        snapshot = repo / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir()
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMIT)
        for name, nbytes in files.items():
            (repo / "blobs" / f"blob-of-{name}").write_bytes(b"G" * nbytes)
            (snapshot / name).symlink_to(repo / "blobs" / f"blob-of-{name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot_of(cache: Path, name: str = "models--org--many-GGUF") -> Path:
    return cache / name / "snapshots" / COMMIT


class Terminal(io.StringIO):
    """Standard input that someone types on."""

    def isatty(self) -> bool:
        return True


def test_it_says_what_it_frees_and_asks(run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("rm", "org/many-GGUF")
    assert ran.code == 2
    assert "This would remove org/many-GGUF: 9.4 KiB in 4 files. Add --yes" in ran.err
    monkeypatch.setattr(sys, "stdin", Terminal("\n"))
    ran = run("rm", "org/many-GGUF")
    assert (ran.code, ran.out) == (0, "")
    assert "[y/N] Nothing was removed." in ran.err
    assert snapshot_of(cache).is_dir()
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    ran = run("rm", "org/many-GGUF")
    assert (ran.code, ran.out) == (0, "Removed org/many-GGUF: 9.4 KiB are free again.\n")
    assert {path.name for path in cache.iterdir()} == {"models--org--one", "datasets--org--many-GGUF"}


def test_one_quantisation_is_removed_with_its_stores_and_the_others_stay(run, cache: Path) -> None:
    snapshot = snapshot_of(cache)
    for name in ("m-Q8_0-00001-of-00002.gguf.experts.foreroute", "m-Q4_K_M.gguf.experts.foreroute"):
        (snapshot / name).write_bytes(b"S" * 100)
    ran = run("rm", "org/many-GGUF:Q8_0", "--yes", "--json")
    assert (ran.code, ran.json["bytes"]) == (0, 5700)
    assert {path.name for path in snapshot.iterdir()} == {
        "m-Q4_K_M.gguf", "m-Q4_K_M.gguf.experts.foreroute", "README.md",
    }  # fmt: skip
    assert {path.name for path in (snapshot.parents[1] / "blobs").iterdir()} == {
        "blob-of-m-Q4_K_M.gguf", "blob-of-README.md",
    }  # fmt: skip


def test_the_only_model_of_a_repository_is_removed_with_it(run, cache: Path) -> None:
    assert run("rm", "org/one:Q4_K_M", "--yes").code == 0
    assert not (cache / "models--org--one").exists()


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("org/absent", "is not in the hub's cache"),
        ("org/many-GGUF:Q2_K", "It has Q4_K_M, Q8_0"),
        ("foreroute-tiny", "ships with foreroute"),
        ("here/model", "a folder or file of your own is yours to remove"),
        ("no-such", "is none of the hub's cache"),
        ("../hub", "is none of the hub's cache"),
    ],
)
def test_what_is_not_in_the_cache_is_not_removed(
    run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, told: str
) -> None:
    (tmp_path / "work" / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    before = sorted(tmp_path.rglob("*"))
    ran = run("rm", model, "--yes")
    assert ran.code == 2
    assert told in ran.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_in_use_or_being_downloaded_stays(run, cache: Path) -> None:
    from huggingface_hub.utils import WeakFileLock

    script = "import sys; file = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    blob = snapshot_of(cache) / "m-Q4_K_M.gguf"
    with subprocess.Popen([sys.executable, "-Sc", script, str(blob)], stdin=-1, stdout=-1) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"open\n"
        ran = run("rm", "org/many-GGUF", "--yes")
        reader.communicate()
    assert (ran.code, blob.exists()) == (2, True)
    assert f"is in use by process {reader.pid}. End it first" in ran.err
    locks = cache / ".locks" / "models--org--many-GGUF"
    locks.mkdir(parents=True)
    with WeakFileLock(locks / "blob.lock"):
        ran = run("rm", "org/many-GGUF", "--yes")
    assert (ran.code, blob.exists()) == (2, True)
    assert "is being downloaded" in ran.err
    assert run("rm", "org/many-GGUF", "--yes").code == 0


def test_where_the_system_tells_no_users(run, copied: Path, tmp_path: Path, monkeypatch) -> None:
    from foreroute.cli.models import remove

    store = copied / "experts.foreroute"
    store.write_bytes(b"S")
    assert "does not say" not in run("rm", copied, "--packed", "auto", "--yes").err
    monkeypatch.setattr(remove, "_PROCESSES", tmp_path / "absent")
    store.write_bytes(b"S")

    def held(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "The process cannot access the file", str(path))

    with monkeypatch.context() as windows:
        windows.setattr(Path, "unlink", held)
        ran = run("rm", copied, "--packed", "auto", "--yes")
    assert ran.code == 2
    assert "cannot access the file. End the programs that use it." in ran.err
    ran = run("rm", copied, "--packed", "auto", "--yes")
    assert (ran.code, store.exists()) == (0, False)
    assert "This system does not say which programs use it" in ran.err


def test_packed_stores_are_removed_and_the_model_stays(run, copied: Path) -> None:
    files = {path.name for path in copied.iterdir()}
    for name in ("experts.foreroute", "experts.q4_k.foreroute", "experts.q8_0.foreroute", "experts.fit.safetensors"):
        (copied / name).write_bytes(b"S" * 2048)
    assert run("rm", copied, "--packed", "q2_k", "--yes").err.endswith("There are: auto, q4_k, q8_0.\n")
    ran = run("rm", copied, "--packed", "q4_k", "--yes")
    assert (ran.code, ran.out) == (0, f"Removed {copied / 'experts.q4_k.foreroute'}: 2.0 KiB are free again.\n")
    ran = run("rm", copied, "--packed", "all", "--yes", "--json")
    assert ran.json["bytes"] == 4096
    assert {path.name for path in copied.iterdir()} == {*files, "experts.fit.safetensors"}
    assert "There is none." in run("rm", copied, "--packed", "all", "--yes").err


def test_a_store_that_pack_writes_stays(run, copied: Path) -> None:
    from foreroute.checkpoint.records import partial_path
    from foreroute.whole_files import Claim

    store = copied / "experts.foreroute"
    store.write_bytes(b"S")
    with Claim(partial_path(store)) as claim:
        os.write(claim.fd, b"begun")
        ran = run("rm", copied, "--packed", "auto", "--yes")
    assert (ran.code, store.exists()) == (2, True)
    assert "is being written by `foreroute pack`" in ran.err


def test_one_revision_is_removed(run, cache: Path) -> None:
    assert "is not in the hub's cache" in run("rm", "org/one", "--revision", "other", "--yes").err
    assert run("rm", "org/one", "--revision", "main", "--yes").code == 0
    assert snapshot_of(cache).is_dir(), "another model's revision of the same commit stays"
