"""`foreroute fit` and `foreroute score` in this process."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import foreroute
from foreroute.cli.main import main
from foreroute.loading import engines
from foreroute.predict.governor import Governor
from foreroute.predict.sidecar import SIDECAR_NAME
from tests.support.broken import replace

FIGURES = {"recall_k", "recall_k2", "recall_2k", "missed_mass"}


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The checkpoint in a folder in which a test may write."""
    copy = tmp_path / "copied"
    copy.mkdir()
    for file in folder.iterdir():
        os.link(file, copy / file.name)
    return copy


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run_command(*args: object) -> tuple[int, str, str]:
        code = main([*map(str, args), "--context", "32", "--rows", "4", "--threads", "1"])
        return (code, *capfd.readouterr())

    return run_command


def test_fit_then_score(run, copied: Path, text: Path) -> None:
    code, out, err = run("score", copied, "--text", text, "--tokens", 256, "--json")
    assert code == 0, err
    assert next(iter(json.loads(out)["predictors"])) == "lookahead"
    assert "ridge" not in json.loads(out)["predictors"]

    code, out, err = run("fit", copied, "--text", text, "--tokens", 1024, "--json")
    assert code == 0, err
    fitted = json.loads(out)
    assert fitted["found_automatically"]
    assert fitted["tokens"] == {"fitted": 896, "held_out": 128}
    assert (copied / SIDECAR_NAME).stat().st_size == fitted["nbytes"]

    code, out, err = run("score", copied, "--text", text, "--tokens", 256, "--json", "--png", copied / "plot.png")
    assert code == 0, err
    scores = json.loads(out)
    assert scores["k"] == 3
    for name, entry in scores["predictors"].items():
        assert entry.keys() >= FIGURES, name
        assert all(len(entry[figure]) == 3 for figure in FIGURES)
        assert entry["mean"].keys() >= FIGURES
    assert (copied / "plot.png").read_bytes().startswith(b"\x89PNG")

    code, out, _ = run("score", copied, "--text", text, "--tokens", 256)
    assert code == 0
    assert "hybrid" in out
    assert "oracle" in out


def test_timeliness_counts_every_demanded_expert_once(
    run, copied: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A governor that would switch prefetch off at once: what is scored is the predictor.
    monkeypatch.setattr(engines, "Governor", partial(Governor, (0.0,)))
    asked = ("score", copied, "--text", text, "--tokens", 256, "--memory", "50%", "--decode", 128)
    code, out, err = run(*asked, "--json")
    assert code == 0, err
    timely = json.loads(out)["timeliness"]
    assert timely["tokens"] == 2 * 63
    demanded = timely["resident"] + timely["in_time"] + timely["late_hits"] + timely["misses"]
    assert demanded == timely["tokens"] * 3 * 3
    assert 0 < timely["in_time"] + timely["late_hits"] <= timely["prefetched"]
    assert timely["misses"] > 0
    code, out, err = run(*asked)
    assert code == 0, err
    assert "demanded, with no read in flight" in out


def test_a_fit_that_is_there_is_not_replaced_unasked(run, copied: Path, text: Path) -> None:
    (copied / SIDECAR_NAME).write_text("somebody's notes")
    code, _, err = run("fit", copied, "--text", text, "--tokens", 256)
    assert code == 2
    assert "--force" in err
    assert (copied / SIDECAR_NAME).read_text() == "somebody's notes"
    code, _, err = run("score", copied, "--text", text, "--tokens", 256)
    assert code == 2
    assert "--predictor no" in err
    assert run("fit", copied, "--text", text, "--tokens", 256, "--force", "--estimator")[0] == 0
    code, out, _ = run("score", copied, "--text", text, "--tokens", 256)
    assert code == 0
    assert "estimator" in out


def test_what_is_missing_is_named(run, copied: Path, tmp_path: Path) -> None:
    code, _, err = run("fit", copied, "--text", tmp_path / "absent.txt")
    assert code == 2
    assert "absent.txt cannot be read" in err
    code, _, err = run("fit", copied, "--text", tmp_path / "absent.txt", "--out", tmp_path / "no" / "where")
    assert code == 2
    assert "--out" in err


def test_a_checkpoint_that_is_replaced_while_it_is_loaded(run, checkpoints, tmp_path, text, monkeypatch) -> None:
    """What is fitted to one model must not be said to fit another."""
    copy = shutil.copytree(checkpoints.get("qwen3_moe"), tmp_path / "copy")
    load = foreroute.load

    def late(*args, **kwargs):
        replace(copy / "model.safetensors", (checkpoints.get("qwen3_moe", seed=5) / "model.safetensors").read_bytes())
        return load(*args, **kwargs)

    monkeypatch.setattr(foreroute, "load", late)
    code, _, err = run("fit", copy, "--text", text, "--tokens", 1024)
    assert code == 2
    assert "has changed" in " ".join(err.split())
    assert not (copy / SIDECAR_NAME).exists()
