"""Repositories of GGUF files: which of them a tag behind a hub id means, and that nothing else is downloaded."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from foreroute.checkpoint.hub.choice import choose_gguf
from foreroute.errors import CheckpointError, UnsupportedModelError
from tests.hub.fake_hub import COMMIT, Found, names, serving

# As such repositories are: files at the top and in folders, in parts, of two kinds of recipe, and what is no model.
LISTING = (
    "Tiny-Q8_0.gguf",
    "Tiny-IQ4_XS.gguf",
    "Tiny-Q4_K_M.gguf",
    "Tiny-UD-Q4_K_M.gguf",
    "Tiny-UD-Q4_K_XL.gguf",
    "tiny.mxfp4_moe.gguf",
    "Tiny-F16.gguf",
    "BF16/Tiny-BF16-00001-of-00002.gguf",
    "BF16/Tiny-BF16-00002-of-00002.gguf",
    "Q6_K/weights-00001-of-00002.gguf",
    "Q6_K/weights-00002-of-00002.gguf",
    "mmproj-Tiny-Q5_0.gguf",
    "mtp-Tiny-Q5_1.gguf",
    "Tiny-imatrix-Q2_K.gguf",
    "config.json",
    "tokenizer_config.json",
    "README.md",
)
TAGS = "BF16, F16, IQ4_XS, Q4_K_M, Q6_K, Q8_0, UD-Q4_K_M, UD-Q4_K_XL, mxfp4_moe"


@pytest.mark.parametrize(
    ("tag", "files"),
    [
        ("Q8_0", ["Tiny-Q8_0.gguf"]),
        ("q8_0", ["Tiny-Q8_0.gguf"]),
        ("Q4_K_M", ["Tiny-Q4_K_M.gguf"]),
        ("UD-Q4_K_M", ["Tiny-UD-Q4_K_M.gguf"]),
        ("Q4_K_XL", ["Tiny-UD-Q4_K_XL.gguf"]),
        ("MXFP4_MOE", ["tiny.mxfp4_moe.gguf"]),
        ("F16", ["Tiny-F16.gguf"]),
        ("BF16", ["BF16/Tiny-BF16-00001-of-00002.gguf", "BF16/Tiny-BF16-00002-of-00002.gguf"]),
        ("q6_k", ["Q6_K/weights-00001-of-00002.gguf", "Q6_K/weights-00002-of-00002.gguf"]),
        ("Tiny-F16.gguf", ["Tiny-F16.gguf"]),
        ("weights-00002-of-00002.gguf", ["Q6_K/weights-00001-of-00002.gguf", "Q6_K/weights-00002-of-00002.gguf"]),
    ],
)
def test_a_tag_is_a_quantisation_or_a_file(tag: str, files: list[str]) -> None:
    assert list(choose_gguf(LISTING, "org/tiny", tag, "org/tiny").files) == files


@pytest.mark.parametrize("tag", ["Q4_K", "Q4", "Q4_XS", "Q5_0", "Q5_1", "Q2_K", "mmproj", "8_0"])
def test_a_tag_that_no_model_has_is_answered_with_those_that_there_are(tag: str) -> None:
    """Not even where a longer name begins or ends with it, or a projector, draft or importance matrix has it."""
    with pytest.raises(CheckpointError, match=re.escape(f"none is {tag}. It has {TAGS}.")):
        choose_gguf(LISTING, "org/tiny", tag, "org/tiny")


@pytest.mark.parametrize(
    ("tag", "file"),
    [("F16", None), ("Q4_0", "Model-F16-Q4_0.gguf"), ("Q8_0", None), ("Q2_K", "Kimi-Q8_0-MLA-Q2_K.gguf"),
     ("Q4_K_XL", "Model-UD-Q4_K_XL.gguf"), ("q4_k_xl", "Model-UD-Q4_K_XL.gguf"), ("K_XL", "Model-UD-Q4_K_XL.gguf"),
     ("i1-Q3_K_S", "Model.i1-Q3_K_S.gguf"), ("Kimi", "Kimi-Q8_0-MLA-Q2_K.gguf"), ("Q6_K", "Q6_K/all/weights.gguf")],
)  # fmt: skip
def test_of_several_quantisations_in_a_name_the_last_one_counts(tag: str, file: str | None) -> None:
    """The others are of single tensors, or of what the file was made from."""
    listing = (
        "Model-F16-Q4_0.gguf", "Kimi-Q8_0-MLA-Q2_K.gguf", "Model-UD-Q4_K_XL.gguf", "Model.i1-Q3_K_S.gguf",
        "Q6_K/all/weights.gguf",
    )  # fmt: skip
    if file is None:
        with pytest.raises(CheckpointError, match=f"of its GGUF files none is {tag}. It has "):
            choose_gguf(listing, "org/tiny", tag, "org/tiny")
    else:
        assert choose_gguf(listing, "org/tiny", tag, "org/tiny").files == (file,)


def test_a_whole_file_name_is_taken_whatever_it_says() -> None:
    for name in ("mixtral-imatrix-Q4_K_M.gguf", "mmproj-Tiny-Q5_0.gguf"):
        assert choose_gguf([name, "Tiny-Q8_0.gguf"], "org/tiny", name, "").files == (name,)
    parts = ("a/x-imatrix-00001-of-00002.gguf", "a/x-imatrix-00002-of-00002.gguf")
    assert choose_gguf(parts, "org/tiny", "x-imatrix-00002-of-00002.gguf", "").files == parts


def test_a_path_goes_before_a_name_in_a_folder() -> None:
    """The error for several tells to give one's path: it has to mean that one."""
    listing = ("Tiny.gguf", "old/Tiny.gguf", "tiny.gguf", "old/Other.gguf")
    for name in listing:
        assert choose_gguf(listing, "org/tiny", name, "").files == (name,)
    assert choose_gguf(listing, "org/tiny", "other.gguf", "").files == ("old/Other.gguf",)
    with pytest.raises(CheckpointError, match=r"is any of Tiny.gguf, tiny.gguf. Name one"):
        choose_gguf(listing, "org/tiny", "TINY.gguf", "")


def test_an_ending_in_capitals_is_one() -> None:
    assert choose_gguf(["Tiny-Q8_0.GGUF", "Tiny-F16.gguf"], "org/tiny", "q8_0", "").files == ("Tiny-Q8_0.GGUF",)
    parts = ("Tiny-Q8_0-00001-of-00002.GGUF", "Tiny-Q8_0-00002-of-00002.GGUF")
    assert choose_gguf(parts, "org/tiny", None, "").files == parts


IMATRIX = (
    "mixtral-imatrix-Q4_K_M.gguf is an importance matrix by its name; if it is a model, give "
    "org/tiny:mixtral-imatrix-Q4_K_M.gguf."
)
PIECE = (
    "X.Q8_0.gguf.part1of2 is a piece of a file: download all pieces and join them with cat, in order, into X.Q8_0.gguf."
)


@pytest.mark.parametrize("tag", ["Q4_K_M", "Q8_0", None])
def test_files_that_are_passed_over_are_named(tag: str | None) -> None:
    listing = ["X.Q8_0.gguf.part1of2", "X.Q8_0.gguf.part2of2", "mixtral-imatrix-Q4_K_M.gguf", "mtp-tiny.gguf"]
    with pytest.raises(UnsupportedModelError) as caught:
        choose_gguf(listing, "org/tiny", tag, "org/tiny")
    assert "no weights at all" not in str(caught.value)
    assert f"{PIECE} {IMATRIX} mtp-tiny.gguf is a draft head by its name" in str(caught.value)
    old = ["x.q6_K.gguf-split-a", "x.q6_K.gguf-split-b"]
    with pytest.raises(UnsupportedModelError, match=r"x.q6_K.gguf-split-a is a piece of a file: .* into x.q6_K.gguf\."):
        choose_gguf(old, "org/tiny", tag, "org/tiny")


@pytest.mark.parametrize(("tag", "hint"), [("Q4_K_M", IMATRIX), ("q8_0", PIECE), ("Q3_K", "")])
def test_beside_models_those_that_have_the_tag_are_named(tag: str, hint: str) -> None:
    listing = ["X.Q8_0.gguf.part1of2", "mixtral-imatrix-Q4_K_M.gguf", "X.Q2_K.gguf"]
    with pytest.raises(CheckpointError) as caught:
        choose_gguf(listing, "org/tiny", tag, "org/tiny")
    assert str(caught.value) == f"org/tiny: of its GGUF files none is {tag}. It has Q2_K. {hint}".rstrip()
    with pytest.raises(UnsupportedModelError) as caught:
        choose_gguf([*listing[:2], "model.safetensors"], "org/tiny", tag, "org/tiny")
    assert hint in str(caught.value)
    assert f"Leave :{tag} out for its safetensors." in str(caught.value)


def test_of_several_models_none_is_taken() -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"has 9 GGUF models: {TAGS}. Name one: org/tiny:")):
        choose_gguf(LISTING, "org/tiny", None, "org/tiny")
    both = ("a/Tiny-Q8_0.gguf", "b/Tiny-Q8_0.gguf", "a/Tiny-Q4_0.gguf")
    said = "any of a/Tiny-Q8_0.gguf, b/Tiny-Q8_0.gguf. Name one of these files: org/tiny:a/Tiny-Q8_0.gguf."
    with pytest.raises(CheckpointError, match=re.escape(said)):
        choose_gguf(both, "org/tiny", "Q8_0", "org/tiny")
    assert choose_gguf(both, "org/tiny", "b/Tiny-Q8_0.gguf", "").files == ("b/Tiny-Q8_0.gguf",)
    assert choose_gguf(["mmproj-F16.gguf", "Tiny.gguf"], "org/tiny", None, "").files == ("Tiny.gguf",)


def test_a_tag_where_there_are_safetensors_alone() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Q8_0 is no quantisation there.*Leave :Q8_0 out for its safet"):
        choose_gguf(["config.json", "model.safetensors"], "org/tiny", "Q8_0", "org/tiny:Q8_0")
    with pytest.raises(UnsupportedModelError, match="no weights at all"):
        choose_gguf(["config.json"], "org/tiny", "Q8_0", "org/tiny:Q8_0")
    with pytest.raises(UnsupportedModelError, match=r"mmproj-F16.gguf is a projector by its name"):
        choose_gguf(["config.json", "mmproj-F16.gguf"], "org/tiny", "Q8_0", "org/tiny:Q8_0")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    for name in LISTING:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else name)
    return folder


PARTS = {"BF16/Tiny-BF16-00001-of-00002.gguf", "BF16/Tiny-BF16-00002-of-00002.gguf"}


def test_all_parts_are_fetched_once_and_nothing_else(
    repository: Path, tmp_path: Path, look_up: Callable[..., Found]
) -> None:
    with serving(repository, claimed="Tiny-Q8_0.gguf", claimed_bytes=10**18) as hub:
        found, said = look_up(hub, "org/tiny:bf16")
        assert found is not None, said
        folder = found.parents[1]
        assert found == folder / "BF16" / "Tiny-BF16-00001-of-00002.gguf"
        assert set(hub.sent) == PARTS == names(folder)
        sent = dict(hub.sent)
        assert look_up(hub, "org/tiny:BF16", revision="v1")[0] == found
        assert look_up(hub, "hf.co/org/tiny:BF16")[0] == found
        assert look_up(hub, "https://huggingface.co/org/tiny:BF16/Tiny-BF16-00001-of-00002.GGUF")[0] == found
        assert hub.sent == sent, "a later look-up fetches nothing"
        assert "no such revision" in look_up(hub, "org/tiny:BF16", revision="v9")[1]
        assert "TiB more in" in look_up(hub, "org/tiny:Q8_0")[1], "the disk has to have room for that one"
        assert "has 9 GGUF models" in look_up(hub)[1]
        num_asked = len(hub.asked)
        offline, said = look_up(hub, "org/tiny:BF16", HF_HUB_OFFLINE="1")
        assert offline == found, said
        assert "has 9 GGUF models" in look_up(hub, HF_HUB_OFFLINE="1")[1], "as with a network"
        assert "HF_HUB_OFFLINE is set" in look_up(hub, "org/tiny:Q6_K", HF_HUB_OFFLINE="1")[1]
        assert "none is Q3_K" in look_up(hub, "org/tiny:Q3_K", HF_HUB_OFFLINE="1")[1]
        assert len(hub.asked) == num_asked, "offline asks no server"
        hub.down = True
        assert look_up(hub, "org/tiny:BF16")[0] == found, "the cache does where the hub is down"
        said = look_up(hub, "org/tiny:Q6_K")[1]
        assert "the hub cannot be reached (no answer, and Q6_K/weights-00001-of-00002.gguf is not in the cache)" in said
    shutil.rmtree(folder.parents[1] / "trees")
    offline, said = look_up(hub, "org/tiny:BF16", HF_HUB_OFFLINE="1")
    assert offline == found, "as other programs fill the cache"
    said = look_up(hub, HF_HUB_OFFLINE="1")[1]
    assert "what else the repository has is not known there" in said
    (folder / sorted(PARTS)[1]).unlink()
    assert "the cache does not have it" in look_up(hub, "org/tiny:BF16", HF_HUB_OFFLINE="1")[1]


def test_a_repository_of_one_model_needs_no_tag(repository: Path, look_up: Callable[..., Found]) -> None:
    """Projectors do not count. With a tokenizer beside the file, as a copy of the folder would have it."""
    for path in repository.rglob("*.gguf"):
        if path.name.startswith("Tiny-") and path.name not in ("Tiny-F16.gguf", "Tiny-imatrix-Q2_K.gguf"):
            path.unlink()
    shutil.rmtree(repository / "Q6_K")
    (repository / "tiny.mxfp4_moe.gguf").unlink()
    (repository / "tokenizer.json").write_text("{}")
    with serving(repository) as hub:
        found, said = look_up(hub)
        assert found is not None, said
        assert found.name == "Tiny-F16.gguf"
        assert names(found.parent) == {"Tiny-F16.gguf", "config.json", "tokenizer.json", "tokenizer_config.json"}
        assert look_up(hub, HF_HUB_OFFLINE="1")[0] == found
        (repository / "model.safetensors").write_text("the original")
    with serving(repository) as hub:
        folder, said = look_up(hub, access={"cache_dir": str(repository.parent / "another")})
        assert folder is not None, said
        assert names(folder) == {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
        found, said = look_up(hub, "org/tiny:F16", access={"cache_dir": str(repository.parent / "another")})
        assert found == folder / "Tiny-F16.gguf", said


def test_what_a_tag_cannot_have_is_said(repository: Path, look_up: Callable[..., Found]) -> None:
    (repository / "BF16" / "Tiny-BF16-00002-of-00002.gguf").unlink()
    with serving(repository) as hub:
        said = look_up(hub, "org/tiny:BF16", revision=COMMIT)[1]
        assert "BF16 at revision" in said
        assert "names BF16/Tiny-BF16-00002-of-00002.gguf, which is not in the repository" in said
        assert "none is Q3_K" in look_up(hub, "org/tiny:Q3_K")[1]
        assert "no such model, or a private one" in look_up(hub, "org/absent:Q3_K")[1]
        assert "no hub id" in look_up(hub, "org/tiny:")[1]
        assert not hub.sent


def test_a_path_with_a_colon_is_a_path(tmp_path: Path, look_up: Callable[..., Found]) -> None:
    folder = tmp_path / "name:Q4_K_M"
    folder.mkdir()
    (folder / "Tiny-Q8_0.gguf").touch()
    (folder / "imatrix.gguf").touch()
    assert look_up("http://127.0.0.1:9", str(folder))[0] == folder / "Tiny-Q8_0.gguf"
