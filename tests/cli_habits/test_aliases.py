"""A local model has a name in the config file, which stands for it everywhere."""

from pathlib import Path

import pytest

from foreroute.cli import options
from foreroute.cli.main import build_parser


def test_an_alias_stands_for_its_model(run, tiny: Path, config) -> None:
    config(f'[aliases]\nbig = "{tiny}"\nships = "foreroute-tiny"\naway = "org/away"\n')
    ran = run("show", "big", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert (ran.json["model"], ran.json["path"]) == ("big", str(tiny))
    assert run("show", "ships", "--json").json["path"].endswith("foreroute-tiny")
    assert "`foreroute pull away`" in run("show", "away").err
    args = build_parser().parse_args(["serve", "-m", "big", "--draft", "ships"])
    assert options.engine_config(args).draft == "foreroute-tiny"
    ran = run("generate", "big", "hi", "--max-new-tokens", "2", "--threads", "1", "--json")
    assert (ran.code, ran.json["model"]) == (0, "big")


def test_a_folder_here_is_meant_before_an_alias(run, tiny: Path, config, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config('[aliases]\nbig = "/absent"\n')
    (tmp_path / "big").symlink_to(tiny)
    assert run("show", "big", "--json").json["family"] == "qwen3_moe"


def test_list_shows_aliases(run, tiny: Path, config, monkeypatch: pytest.MonkeyPatch) -> None:
    config(f'[aliases]\nbig = "{tiny}"\naway = "org/away"\n')
    models = {one["name"]: one for one in run("list", "--json").json["models"]}
    assert (models["big"]["where"], models["big"]["whole"]) == (f"alias of {tiny}", True)
    assert models["big"]["family"] == "qwen3_moe"
    assert (models["away"]["where"], models["away"]["whole"]) == ("alias of org/away", False)
    monkeypatch.setenv("COLUMNS", "200")
    assert "alias of org/away, not on this machine" in " ".join(run("list").out.split())
