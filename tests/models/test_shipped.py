"""The models that ship: ordinary checkpoints, small enough, with balanced routers, and as good as their cards say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from foreroute.evals import tasks
from foreroute.evals.answers import answer

MODELS = Path(__file__).resolve().parents[2] / "models"
MAX_BYTES = {"foreroute-tiny": 32 * 2**20, "foreroute-tiny-oss": 16 * 2**20, "foreroute-tiny-dsv3": 16 * 2**20}
MILLION_PARAMETERS = {"foreroute-tiny": (10, 16), "foreroute-tiny-oss": (3, 6), "foreroute-tiny-dsv3": (3, 6)}
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "README.md", "curves.png", "figures.json", "history.json")  # fmt: skip

SHIPPED = tuple(MAX_BYTES)
shipped = pytest.mark.parametrize("name", SHIPPED)


def test_every_exported_folder_is_named_here() -> None:
    assert {path.parent.name for path in MODELS.glob("*/config.json")} == set(SHIPPED)


def figures(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "figures.json").read_text())


@shipped
def test_the_folder_is_complete_and_small(name: str) -> None:
    folder = MODELS / name
    assert [file for file in FILES if not (folder / file).exists()] == []
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES[name]
    low, high = MILLION_PARAMETERS[name]
    assert low <= figures(name)["parameters"] / 1e6 <= high


@shipped
def test_no_layer_collapsed_and_routing_follows_the_text(name: str) -> None:
    trained, untrained = figures(name)["router"], figures(name)["router_untrained"]
    for layer in trained:
        assert layer["max_over_mean"] <= 2.5
        assert layer["entropy"] >= 0.95
        assert layer["dead_experts"] == 0
    assert sum(one["reuse"] for one in trained) < 0.8 * sum(one["reuse"] for one in untrained)


@shipped
def test_transformers_loads_it_alone_and_it_answers_as_its_card_says(name: str) -> None:
    folder = MODELS / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    accuracy = figures(name)["accuracy"]
    best = max((kind for kind in accuracy if kind != "define"), key=lambda kind: accuracy[kind])
    items = [item for item in tasks.held_out_suite(16, seed=5) if item.kind == best]
    found = tasks.accuracy_by_kind(items, answer(model, tokenizer, items))[best]
    # 16 items, seed unlike the card's: three of them are the sampling error of a share near one.
    assert found >= accuracy[best] - 3 / 16


@shipped
def test_a_chat_ends_by_itself(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12 + 30"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|user|>12 + 30<|assistant|>"
    assert tokenizer.eos_token == "<|end|>"
    config = json.loads((MODELS / name / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id
