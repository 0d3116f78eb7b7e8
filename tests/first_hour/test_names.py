"""Models by name: those that ship and those of the hub's cache are listed, found, described and pulled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import foreroute
from foreroute import shipped
from foreroute.checkpoint.locate import locate
from foreroute.errors import CheckpointError
from tests.cli.harness import NUM_EXPERTS, NUM_LAYERS, TOP_K

COMMIT = "a" * 40
NAME = "foreroute-tiny"


@pytest.fixture
def hub_cache(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with a model of safetensors, and two GGUF quantisations of which one lacks a part."""
    from huggingface_hub import constants

    for name, files in {
        "org--tiny": [],
        "org--many-GGUF": ["m-Q4_K_M.gguf", "m-Q8_0-00001-of-00002.gguf"],
        "org--pictures": ["README.md"],
    }.items():
        repo = tmp_path / "hub" / f"models--{name}"
        snapshot = repo / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir()
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMIT)
        for file in files:
            (snapshot / file).write_bytes(b"GGUF" * 1000)
    for file in tiny.iterdir():
        os.link(file, tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT / file.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_what_ships_and_what_is_cached_is_listed(run, hub_cache: Path) -> None:
    snapshot = hub_cache / "models--org--tiny" / "snapshots" / COMMIT
    (snapshot / "experts.q4_k.foreroute").touch()
    ran = run("list", "--json")
    assert (ran.code, ran.err) == (0, "")
    models = {one["name"]: one for one in ran.json["models"]}
    assert {NAME, "org/tiny", "org/many-GGUF:Q4_K_M", "org/many-GGUF:Q8_0"} <= set(models)
    assert not any("pictures" in name for name in models), "no weights"
    assert models[NAME]["where"] == "ships"
    assert models["org/tiny"] == {
        "name": "org/tiny", "path": str(snapshot), "bytes": (snapshot / "model.safetensors").stat().st_size,
        "format": "safetensors", "family": "qwen3_moe", "where": "hub cache", "whole": True,
        "beside": ["experts.q4_k.foreroute"],
    }  # fmt: skip
    assert models["org/many-GGUF:Q4_K_M"]["whole"]
    assert (models["org/many-GGUF:Q8_0"]["bytes"], models["org/many-GGUF:Q8_0"]["whole"]) == (4000, False)
    assert locate("org/many-GGUF:Q4_K_M") == Path(models["org/many-GGUF:Q4_K_M"]["path"]), "the name works"
    shown = run("list").out
    assert "GGUF, hub cache, not whole: pull it again" in " ".join(shown.split())
    assert shown.index(NAME) < shown.index("org/tiny")


def test_an_empty_cache_says_how_to_fill_it(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert "foreroute pull ORG/NAME" in run("list").out


def test_a_model_that_ships_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(NAME) == shipped.shipped_models()[NAME]
    with pytest.raises(CheckpointError, match="Did you mean foreroute-tiny, which ships"):
        locate("foreroute-tin")
    with pytest.raises(CheckpointError, match="ships with foreroute: a revision"):
        locate(NAME, revision="main")
    # A folder of that name here is the user's own.
    shutil.copytree(shipped.shipped_models()[NAME], tmp_path / NAME)
    assert locate(NAME) == Path(NAME)


def test_generate_finds_it_too(run) -> None:
    ran = run("generate", NAME, "12 + 30", "--quiet", "--memory", "25%", "--max-new-tokens", "4", "--threads", "1")
    assert (ran.code, bool(ran.out.strip())) == (0, True)


def test_a_model_is_shown_from_its_headers(run, tiny: Path, hub_cache: Path) -> None:
    ran = run("show", "org/tiny", "--json")
    assert (ran.code, ran.err) == (0, "")
    found = ran.json
    assert (found["family"], found["format"], found["stored_as"]) == ("qwen3_moe", "safetensors", "F32")
    assert (found["moe_layers"], found["experts"]) == (NUM_LAYERS, NUM_LAYERS * NUM_EXPERTS)
    assert (found["experts_per_layer"], found["experts_per_token_and_layer"]) == ([NUM_EXPERTS], TOP_K)
    assert found["expert_bytes"] == NUM_LAYERS * NUM_EXPERTS * 3 * 64 * 64 * 4
    assert found["expert_bytes"] + found["dense_bytes"] == found["checkpoint_bytes"]
    assert (found["context_tokens"], found["chat_template"]) == (1024, True)
    shown = run("show", tiny).out
    for said in (
        "qwen3_moe",
        f"{NUM_LAYERS} MoE layers x {NUM_EXPERTS} experts, top-{TOP_K}",
        "1,024 tokens",
        "3.0 MiB",
    ):
        assert said in shown


def test_what_is_not_here_is_not_downloaded_to_be_shown(run, hub_cache: Path) -> None:
    ran = run("show", "org/absent")
    assert ran.code == 2
    assert "`foreroute pull org/absent`" in ran.err
    assert "no folder" not in ran.err


def test_pull_says_where_it_is_and_what_is_next(run, hub_cache: Path) -> None:
    ran = run("pull", "org/tiny")
    assert (ran.code, ran.err) == (0, "")
    assert str(hub_cache / "models--org--tiny" / "snapshots" / COMMIT) in ran.out
    assert "foreroute chat org/tiny" in ran.out
    assert run("pull", "org/tiny", "--json").json["bytes"] > 3 * 2**20
    assert "HF_HUB_OFFLINE is set" in run("pull", "org/absent").err


def test_python_m_foreroute_is_the_command() -> None:
    told = subprocess.run([sys.executable, "-m", "foreroute", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout == f"foreroute {foreroute.__version__}\n"
