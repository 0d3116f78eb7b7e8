"""Families that an adapter serves: what is read, packed and verified, and what is refused."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import foreroute
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.cli.main import main
from foreroute.errors import UnsupportedModelError
from tests.families.checks import answer, assert_same, load_tight, resident_answer, save_tiny
from tests.families.installed import Family, adapted_modules, families
from tests.support.checkpoints import save_tokenizer

ADAPTED = [one for one in families() if one.module in adapted_modules()]


def named(model_type: str) -> Family:
    found = [one for one in ADAPTED if one.model_type == model_type]
    return found[0] if found else pytest.skip(f"this transformers has no {model_type}")


@pytest.fixture(scope="module")
def folders(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint with a tokenizer, by model type."""
    base = tmp_path_factory.mktemp("adapted")
    made = {family.model_type: save_tiny(family, base / family.model_type) for family in ADAPTED}
    for folder in made.values():
        save_tokenizer(folder)
    return made


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    models: list[Any] = []
    yield models
    for model in models:
        model.foreroute.close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("The ship came in.\n1 + 1 = \n")
    return path


@pytest.mark.parametrize("family", ADAPTED, ids=lambda one: one.model_type)
def test_planned_packed_and_verified(folders, prompts, capsys, opened, family: Family) -> None:
    """From a packed store the same bits; and `verify` compares each layer with transformers' own."""
    folder = folders[family.model_type]
    assert main(["plan", str(folder)]) == 0
    assert "expert" in capsys.readouterr().out
    verify = ["verify", str(folder), "--prompts", str(prompts), "--threads", "1", "--tokens", "4", "--reference",
              "resident"]  # fmt: skip
    assert main(verify) == 0, capsys.readouterr().out
    plain = load_tight(folder)
    opened.append(plain)
    expected = answer(plain)
    assert main(["pack", str(folder), "--force"]) == 0
    packed = load_tight(folder)
    opened.append(packed)
    assert [plain.foreroute.plan.source, packed.foreroute.plan.source] == ["safetensors", "packed"]
    assert_same(answer(packed), expected)
    assert main(verify) == 0, capsys.readouterr().out
