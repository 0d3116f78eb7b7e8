"""Hub ids: which files are fetched, what is not fetched twice, and errors when they cannot be downloaded."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from foreroute.errors import ForerouteError
from foreroute.loading.arguments import read_arguments
from tests.hub.fake_hub import COMMIT, LATER_COMMIT, Found, names, serving

_WANTED = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "model.safetensors.index.json", "shard-a.safetensors", "shard-b.safetensors",
}  # fmt: skip
_NOT_WANTED = {
    "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "model-q4.gguf", "README.md",
    "original/params.json", "original/consolidated.00.pth", "metal/model.bin", "onnx/model.onnx", "other.safetensors",
}  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository as they are: two shards, and everything else that people put beside them."""
    folder = tmp_path / "repository"
    for name in _WANTED | _NOT_WANTED:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if name.endswith(".json") else name)
    weight_map = {"a": "shard-a.safetensors", "b": "shard-b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "shard-b.safetensors").write_bytes(bytes(range(256)) * 96_000)
    return folder


def test_what_is_needed_is_fetched_once_and_nothing_else(repository: Path, look_up: Callable[..., Found]) -> None:
    with serving(repository) as hub:
        folder, said = look_up(hub)
        assert folder is not None, said
        assert names(folder) == _WANTED
        assert said == "", "quiet"
        assert (folder / "shard-b.safetensors").read_bytes() == (repository / "shard-b.safetensors").read_bytes()
        sent = dict(hub.sent)
        again, _ = look_up(hub)
        by_tag, _ = look_up(hub, revision="v1")
        assert (again, by_tag) == (folder, folder), "one commit, one folder"
        assert hub.sent == sent, "a later look-up fetches nothing"
        offline, said = look_up(hub, HF_HUB_OFFLINE="1")
        assert offline == folder, said
        num_asked = len(hub.asked)
        look_up(hub, HF_HUB_OFFLINE="1")
        assert len(hub.asked) == num_asked, "offline asks no server"
        hub.down = True
        assert look_up(hub)[0] == folder, "the cache does where the hub is down"
    away, said = look_up(hub.endpoint)
    assert away == folder, said


@pytest.mark.parametrize(
    ("named", "fetched"),
    [(None, {"model.safetensors"}), ("other.safetensors", {"other.safetensors"}),
     ("model.safetensors.index.json", {"shard-a.safetensors", "shard-b.safetensors"})],
)  # fmt: skip
def test_of_several_sets_of_weights_that_of_transformers(
    repository: Path, look_up: Callable[..., Found], named: str | None, fetched: set[str]
) -> None:
    """The file that the config names, else the single file, else the shards; and that alone."""
    (repository / "model.safetensors").write_text("newer")
    (repository / "config.json").write_text(json.dumps({"transformers_weights": named} if named else {}))
    with serving(repository) as hub:
        folder, said = look_up(hub)
        assert folder is not None, said
        assert {name for name in names(folder) if name.endswith(".safetensors")} == fetched


def test_a_branch_that_moves_on_meanwhile(repository: Path, tmp_path: Path, look_up: Callable[..., Found]) -> None:
    """Between the list of files and their download: all of them are of the commit that was listed."""
    later = shutil.copytree(repository, tmp_path / "later")
    (later / "shard-a.safetensors").write_text("trained for longer")
    (later / "shard-b.safetensors").rename(later / "shard-c.safetensors")
    weight_map = {"a": "shard-a.safetensors", "b": "shard-c.safetensors"}
    (later / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with serving(repository, moves_to=later) as hub:
        folder, said = look_up(hub)
        assert folder is not None, said
        assert hub.has_moved
        assert folder.name == COMMIT
        assert names(folder) == _WANTED
        for name in _WANTED:
            assert (folder / name).read_bytes() == (repository / name).read_bytes(), name
        assert look_up(hub, HF_HUB_OFFLINE="1")[0] == folder, "without a network the branch is what was fetched"
        after, said = look_up(hub)
        assert after is not None, said
        assert after.name == LATER_COMMIT
        assert names(after) == _WANTED - {"shard-b.safetensors"} | {"shard-c.safetensors"}
        assert (after / "shard-a.safetensors").read_text() == "trained for longer"
        assert look_up(hub, HF_HUB_OFFLINE="1")[0] == after
        by_commit, said = look_up(hub, revision=COMMIT)
        assert by_commit == folder, said
        assert sorted(path.name for path in (folder.parents[1] / "refs").iterdir()) == ["main"]


def test_a_cache_that_cannot_note_the_commit(repository: Path, look_up: Callable[..., Found]) -> None:
    """As where it may only be read; a file in the folder's place stops a superuser too."""
    with serving(repository) as hub:
        folder, said = look_up(hub)
        assert folder is not None, said
        refs = folder.parents[1] / "refs"
        shutil.rmtree(refs)
        refs.write_text("")
        again, said = look_up(hub)
        assert again == folder, said
        assert "error while caching commit hash for 'org/tiny'" in said
        refs.unlink()
        (refs / "main").mkdir(parents=True)
        again, said = look_up(hub)
        assert again == folder, said
        assert "error while caching commit hash for 'org/tiny'" in said
        assert [path.name for path in refs.iterdir()] == ["main"], "no half of it is left"


def test_a_download_that_broke_off_goes_on_where_it_was(repository: Path, look_up: Callable[..., Found]) -> None:
    whole = (repository / "shard-b.safetensors").stat().st_size
    with serving(repository, cut_at=12_000_000) as hub:
        folder, said = look_up(hub)
        assert folder is not None, said
        assert hub.cuts == 1
        assert [line for line in hub.ranges if line.startswith("shard-b")], "it goes on with a range"
        # huggingface_hub keeps what came in whole pieces of 10 MB.
        assert hub.sent["shard-b.safetensors"] < whole + hub.cut_at - 9_000_000
        assert (folder / "shard-b.safetensors").read_bytes() == (repository / "shard-b.safetensors").read_bytes()


def test_a_download_shows_bars_unless_it_is_to_be_quiet(repository: Path, look_up: Callable[..., Found]) -> None:
    with serving(repository) as hub:
        folder, said = look_up(hub, bars="bars")
    assert folder is not None
    assert "%" in said


def test_the_token_is_sent(repository: Path, look_up: Callable[..., Found]) -> None:
    with serving(repository, token="hf_secret") as hub:
        folder, said = look_up(hub)
        assert folder is None
        assert "no such model, or a private one" in said
        assert "HF_TOKEN" in said
        assert look_up(hub, HF_TOKEN="hf_secret")[0] is not None


def test_a_token_and_a_cache_of_the_call_itself(
    repository: Path, tmp_path: Path, look_up: Callable[..., Found]
) -> None:
    """Where load() is given them, as from_pretrained is."""
    cache = tmp_path / "elsewhere"
    with serving(repository, token="hf_secret") as hub:
        folder, said = look_up(hub, access={"token": "hf_secret", "cache_dir": str(cache)})
        assert folder is not None, said
        assert cache in folder.parents
        assert names(folder) == _WANTED
        assert not list(tmp_path.glob("home/hub/models--*")), "nothing lies in the usual cache"
        num_asked = len(hub.asked)
        kept, said = look_up(hub, access={"local_files_only": True, "cache_dir": str(cache)})
        assert kept == folder, said
        absent, said = look_up(hub, access={"local_files_only": True})
        assert absent is None
        assert "local_files_only is set" in said
        assert len(hub.asked) == num_asked, "no server was asked"


def test_what_cannot_be_had_is_said(repository: Path, look_up: Callable[..., Found]) -> None:
    with serving(repository) as hub:
        assert "no such model, or a private one" in look_up(hub, "org/absent")[1]
        assert "no such revision" in look_up(hub, revision="v9")[1]
        assert "HF_HUB_OFFLINE is set" in look_up(hub, HF_HUB_OFFLINE="1")[1]
        hub.gated = True
        assert "is gated: accept its terms" in look_up(hub)[1]
        hub.gated, hub.down = False, True
        assert "the hub cannot be reached" in look_up(hub)[1]
    said = look_up(hub.endpoint)[1]
    assert "the hub cannot be reached" in said
    assert "CheckpointError" in said


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (("model-q4.gguf", "pytorch_model.bin"), "GGUF files beside other weights: q4. Name one: org/tiny:q4."),
        (("pytorch_model.bin",), "pickled weights (pytorch_model.bin)"),
        (("consolidated.safetensors",), "consolidated.safetensors, which no index names"),
        ((), "no weights at all"),
    ],
)
def test_a_repository_without_safetensors_is_refused_before_a_download(
    repository: Path, look_up: Callable[..., Found], kept: tuple[str, ...], said: str
) -> None:
    for path in repository.rglob("*"):
        if path.is_file() and path.name not in (*kept, "config.json"):
            path.unlink()
    with serving(repository) as hub:
        folder, error = look_up(hub)
        assert folder is None
        assert said in error
        assert "UnsupportedModelError" in error
        # A config may name a file of another name as the weights.
        assert set(hub.sent) == ({"config.json"} if "consolidated.safetensors" in kept else set())


def test_too_little_disk_is_said_before_a_download(repository: Path, look_up: Callable[..., Found]) -> None:
    (repository / "model.safetensors.index.json").unlink()
    (repository / "model.safetensors").write_bytes(b"some")
    with serving(repository, claimed_bytes=10**18) as hub:
        folder, error = look_up(hub)
        assert folder is None
        assert "TiB more in" in error
        assert "HF_HOME" in error
        assert "model.safetensors" not in hub.sent


def test_a_leftover_of_another_download_makes_no_room(
    repository: Path, tmp_path: Path, look_up: Callable[..., Found]
) -> None:
    (repository / "model.safetensors.index.json").unlink()
    (repository / "model.safetensors").write_bytes(b"some")
    leftover = tmp_path / "home/hub/models--org--tiny/blobs/0f5e.1234abcd.incomplete"
    leftover.parent.mkdir(parents=True)
    with leftover.open("wb") as file:
        file.truncate(8 * 2**30)  # a sparse file
    with serving(repository, claimed_bytes=shutil.disk_usage(tmp_path).free + 4 * 2**30) as hub:
        folder, error = look_up(hub)
        assert folder is None, "a partial file is not continued"
        assert "more in" in error
        assert "model.safetensors" not in hub.sent


def test_files_of_another_commit_need_no_room(repository: Path, tmp_path: Path, look_up: Callable[..., Found]) -> None:
    """As where the README alone was edited: the weights are linked, not downloaded."""
    later = shutil.copytree(repository, tmp_path / "later")
    (later / "README.md").write_text("more is said")
    with serving(repository, claimed="shard-b.safetensors", moves_to=later) as hub:
        folder, said = look_up(hub, revision=COMMIT)
        assert folder is not None, said
        sent = dict(hub.sent)
        hub.claimed_bytes = 10**18
        after, said = look_up(hub, revision=LATER_COMMIT)
        assert after is not None, said
        assert after.name == LATER_COMMIT
        assert names(after) == _WANTED
        assert hub.sent == sent
        hub.claimed = "shard-a.safetensors"
        (later / hub.claimed).write_text("trained for longer")
        shutil.rmtree(after)
        assert "TiB more in" in look_up(hub, revision=LATER_COMMIT)[1], "another content of the same name does"


def test_what_is_kept_of_a_download_that_failed(repository: Path, look_up: Callable[..., Found]) -> None:
    with serving(repository, lost="shard-a.safetensors") as hub:
        folder, said = look_up(hub)
        assert folder is None
        assert "Files that were fetched whole are kept; one that was cut off begins anew." in said
        assert "What was fetched is kept" not in said
        hub.lost = ""
        assert look_up(hub)[0] is not None


def test_a_partial_file_is_not_continued(repository: Path, tmp_path: Path, look_up: Callable[..., Found]) -> None:
    """As the texts say; a process that was killed leaves one."""
    content = (repository / "shard-b.safetensors").read_bytes()
    blob = tmp_path / "home/hub/models--org--tiny/blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True)
    for name in (f"{blob.name}.incomplete", f"{blob.name}.1234abcd.incomplete"):
        blob.with_name(name).write_bytes(content[:12_000_000])
    with serving(repository) as hub:
        folder, said = look_up(hub)
        assert folder is not None, said
        assert hub.sent["shard-b.safetensors"] == len(content)
    with pytest.raises(ForerouteError, match="one that was cut off begins anew"):
        read_arguments("org/tiny", None, "auto", None, None, None, print, {"resume_download": "always"})


def test_a_commit_is_a_revision_and_a_folder_has_none(repository: Path, look_up: Callable[..., Found]) -> None:
    with serving(repository) as hub:
        folder, said = look_up(hub, revision=COMMIT)
        assert folder is not None, said
        assert names(folder) == _WANTED
        said = look_up(hub, str(folder), revision="main")[1]
        assert "is for hub ids" in said
