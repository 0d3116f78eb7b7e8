"""The models that ship: ordinary checkpoints, small enough, with balanced routers, and as good as their cards say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from foreroute.evals import tasks
from foreroute.evals.answers import answer
from models import acceptance
from models.families import RECIPES
from models.seq2seq import figures as seq2seq

MODELS = Path(__file__).resolve().parents[2] / "models"
MAX_BYTES = {"foreroute-tiny": 32 * 2**20, "foreroute-tiny-oss": 16 * 2**20, "foreroute-tiny-dsv3": 16 * 2**20,
             "foreroute-tiny-draft": 8 * 2**20, "foreroute-tiny-switch": 13 * 2**20}  # fmt: skip
MILLION_PARAMETERS = {"foreroute-tiny": (10, 16), "foreroute-tiny-oss": (3, 6), "foreroute-tiny-dsv3": (3, 6),
                      "foreroute-tiny-draft": (1, 3), "foreroute-tiny-switch": (3, 6)}  # fmt: skip
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "README.md", "curves.png", "figures.json", "history.json")  # fmt: skip

# Experts that hardly any token chooses, by layer: a top-1 router that was trained for a tenth of the others' tokens.
_DEAD = {"foreroute-tiny-switch": {1: 1}}

SHIPPED = tuple(MAX_BYTES)
DECODERS = tuple(name for name in SHIPPED if not name.endswith("-switch"))
WITH_EXPERTS = tuple(name for name in SHIPPED if not name.endswith("-draft"))
shipped = pytest.mark.parametrize("name", SHIPPED)
decoder = pytest.mark.parametrize("name", DECODERS)
with_experts = pytest.mark.parametrize("name", WITH_EXPERTS)


def test_every_exported_folder_is_named_here() -> None:
    assert {path.parent.name for path in MODELS.glob("*/config.json")} == set(SHIPPED) == set(RECIPES)


def figures(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "figures.json").read_text())


@shipped
def test_the_card_tells_the_figures_and_the_recipe_made_the_weights(name: str) -> None:
    card, found = (MODELS / name / "README.md").read_text(), figures(name)
    assert f"{found['parameters'] / 1e6:.2f} M parameters" in card
    (all_text,) = re.findall(r"^\| all \|.*\| ([\d.]+) \|$", card, re.MULTILINE)
    assert all_text == f"{found.get('bits_per_char_tail', found['bits_per_char'])['all']:.3f}"
    for kind, share in found["accuracy"].items():
        assert re.search(rf"^\| {kind} \|.*\| {share:.0%} \|$", card, re.MULTILINE), kind
    made, recipe = AutoConfig.from_pretrained(MODELS / name), RECIPES[name].config()
    sizes = [key for key, value in recipe.to_dict().items() if isinstance(value, int) and key in made.to_dict()]
    assert {key: getattr(made, key) for key in sizes} == {key: getattr(recipe, key) for key in sizes}


@shipped
def test_the_folder_is_complete_and_small(name: str) -> None:
    folder = MODELS / name
    assert [file for file in FILES if not (folder / file).exists()] == []
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES[name]
    low, high = MILLION_PARAMETERS[name]
    assert low <= figures(name)["parameters"] / 1e6 <= high


@with_experts
def test_no_layer_collapsed_and_routing_follows_the_text(name: str) -> None:
    trained, untrained = figures(name)["router"], figures(name)["router_untrained"]
    for layer in trained:
        assert layer["max_over_mean"] <= 2.5
        assert layer["entropy"] >= 0.95
        assert layer["dead_experts"] == _DEAD.get(name, {}).get(layer["layer"], 0)
    assert sum(one["reuse"] for one in trained) < 0.8 * sum(one["reuse"] for one in untrained)


@shipped
def test_transformers_loads_it_alone_and_it_answers_as_its_card_says(name: str) -> None:
    folder = MODELS / name
    sort = AutoModelForCausalLM if name in DECODERS else AutoModelForSeq2SeqLM
    model = sort.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    accuracy = figures(name)["accuracy"]
    best = max((kind for kind in accuracy if kind != "define"), key=lambda kind: accuracy[kind])
    items = [item for item in tasks.held_out_suite(16, seed=5) if item.kind == best]
    answers = (answer if name in DECODERS else seq2seq.answer)(model, tokenizer, items)
    found = tasks.accuracy_by_kind(items, answers)[best]
    # 16 items, seed unlike the card's: three of them are the sampling error of a share near one.
    assert found >= accuracy[best] - 3 / 16


def test_the_draft_has_the_tokenizer_of_the_decoders_and_their_tokens_as_often_as_its_card_says() -> None:
    name = "foreroute-tiny-draft"
    vocabularies = {(MODELS / one / "tokenizer.json").read_bytes() for one in DECODERS}
    assert len(vocabularies) == 1
    draft, target = acceptance.load(MODELS / name), acceptance.load(MODELS / "foreroute-tiny")
    items = [item for item in tasks.held_out_suite(8, seed=5) if item.kind in ("add", "calendar")]
    found = acceptance.on_tasks(draft, target, AutoTokenizer.from_pretrained(MODELS / name), items)
    told = figures(name)["acceptance"]["foreroute-tiny"]["tasks"]
    assert found["add"] >= told["add"] - 0.1
    assert found["calendar"] >= told["calendar"] - 0.1


def test_the_switch_model_answers_a_sentinel_with_it_and_text_and_knows_the_shared_vocabulary() -> None:
    folder = MODELS / "foreroute-tiny-switch"
    tokenizer, shared = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(MODELS / "foreroute-tiny")
    text = "def area(width, height):\n    return width * height"
    assert tokenizer(text).input_ids == [*shared(text).input_ids, tokenizer.eos_token_id]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("for number in range(<extra_id_0>):\n    print(<extra_id_1>)", return_tensors="pt").input_ids
    written = tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0, 1:])
    assert re.match(r"<extra_id_0>[^<]", written), written


@decoder
def test_a_chat_ends_by_itself(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12 + 30"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|user|>12 + 30<|assistant|>"
    assert tokenizer.eos_token == "<|end|>"
    config = json.loads((MODELS / name / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id
