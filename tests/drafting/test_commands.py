"""--draft on the command line, and what cannot be drafted for is named before work."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import foreroute
from foreroute import EngineConfig
from foreroute.drafting.draft import draft_for
from foreroute.errors import CheckpointError, DeviceError, PolicyError, RefusedError, UnsupportedModelError
from foreroute.generation.generate import generate
from tests.cli.harness import SPECIAL, make_tokenizer, save_model

PROMPT = "a b c a b c a b"


def save_draft(folder: Path, vocabulary: int = len(SPECIAL) + 256) -> Path:
    """A random dense model, with the tokenizer of `save_model`'s."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=1.0,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A model, and a draft for it."""
    root = tmp_path_factory.mktemp("drafting")
    save_model(root / "model")
    threads = torch.get_num_threads()
    yield root / "model", save_draft(root / "draft")
    torch.set_num_threads(threads)


def run(capfd: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    from foreroute.cli.main import main

    code = main([str(arg) for arg in args])
    return code, *capfd.readouterr()


@pytest.mark.parametrize("kind", ["prompt-lookup", "model"])
def test_generate_says_the_same_with_a_draft(folders, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    import json

    model, small = folders
    draft = small if kind == "model" else kind
    flags = ("generate", model, PROMPT, "--no-chat", "--max-new-tokens", "60", "--memory", "50%", "--json")
    code, without, _ = run(capfd, *flags)
    drafted_code, out, _ = run(capfd, *flags, "--draft", draft)
    assert code == drafted_code == 0
    plain, drafted = json.loads(without), json.loads(out)
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["plan"]["draft"] == str(draft)
    assert (drafted["plan"]["draft_bytes"] > 0) == (kind == "model")
    assert drafted["figures"]["verify_steps"] > 0
    assert plain["figures"]["verify_steps"] == 0


def test_the_figures_tell_what_was_drafted(folders, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ("generate", folders[0], PROMPT, "--no-chat", "--max-new-tokens", "40", "--draft", "prompt-lookup")
    code, _, err = run(capfd, *flags)
    assert code == 0
    assert "drafted" in err
    assert "tokens a step" in err


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        os.link(file, to / file.name)
    return to


def test_a_draft_with_another_tokenizer_is_named(folders, tmp_path: Path) -> None:
    model, draft = folders
    other = copied(draft, tmp_path / "other")
    text = (other / "tokenizer.json").read_text(encoding="utf-8").replace('"<|user|>"', '"<|person|>"')
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"another tokenizer.*'<\|user\|>'"):
        foreroute.load(model, "50%", config=EngineConfig(draft=str(other)))


def test_a_draft_larger_than_the_model_is_named(folders) -> None:
    model, draft = folders
    with pytest.raises(CheckpointError, match="Take a smaller draft"):
        foreroute.load(copied_model(draft, model), "50%", config=EngineConfig(draft=str(model)))


def copied_model(draft: Path, model: Path) -> Path:
    """A mixture smaller than `model`, beside it."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = draft.parent / "smaller"
    config = Qwen3MoeConfig.from_pretrained(model)
    config.num_hidden_layers, config.moe_intermediate_size = 2, 32
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_what_is_no_draft_is_named(folders, tmp_path: Path) -> None:
    model, draft = folders
    with pytest.raises(CheckpointError, match="no hub id"):
        foreroute.load(model, "50%", config=EngineConfig(draft=str(tmp_path / "nothing")))
    pickled = copied(draft, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="pickled"):
        foreroute.load(model, "50%", config=EngineConfig(draft=str(pickled)))


@pytest.mark.parametrize(
    ("switches", "error"), [({"policy": "speculative"}, PolicyError), ({"device": "cuda"}, DeviceError)]
)
def test_what_a_draft_is_not_for_is_refused_before_work(folders, switches: dict[str, str], error: Any) -> None:
    with pytest.raises(error, match="draft="):
        foreroute.load(folders[0], "50%", config=EngineConfig(draft="prompt-lookup", **switches))


def test_beams_and_several_prompts_are_refused_beside_a_draft(folders, load) -> None:
    model, tokenizer = load(folders[0]), make_tokenizer()
    one = torch.tensor([[10, 11, 12]])
    for ids, options in ((one, {"num_beams": 2}), (one.repeat(2, 1), {})):
        with pytest.raises(RefusedError, match="one row"):
            generate(model, tokenizer, ids, max_new_tokens=4, draft="prompt-lookup", **options)
    assert len(generate(model, tokenizer, one, max_new_tokens=4, draft="prompt-lookup").token_ids) == 4


def test_a_policy_that_is_set_later_is_refused_beside_a_draft(folders, load, monkeypatch) -> None:
    from foreroute.policy import Policy

    model = load(folders[0], draft="prompt-lookup")
    monkeypatch.setattr(model.foreroute.engine.policies, "policies", (Policy.parse("speculative"),))
    with pytest.raises(PolicyError, match="needs the policy exact"):
        draft_for(model, None)


def test_attention_whose_tokens_would_get_other_bits_is_refused(folders, load, monkeypatch) -> None:
    """Attention in chunks, as Llama 4 has it: its tokens cannot be computed one by one within a step."""
    model = load(folders[0], draft="prompt-lookup")
    layers = ["chunked_attention"] * model.config.num_hidden_layers
    for name, value in (("layer_types", layers), ("attention_chunk_size", 16)):
        monkeypatch.setattr(type(model.config), name, value, raising=False)
    with pytest.raises(RefusedError, match="the bits that it has alone"):
        draft_for(model, None)


def test_memory_is_chosen_beside_the_draft(folders, load, monkeypatch) -> None:
    """Without --memory, what the draft takes is not the experts'."""
    from foreroute.memory import host, plan

    monkeypatch.setattr(plan, "CHOSEN_RESERVE_BYTES", 0)
    free = 3 * 2**20
    monkeypatch.setattr(host, "available_ram", lambda: free)
    without = load(folders[0], None).foreroute.plan
    beside = load(folders[0], None, draft=str(folders[1])).foreroute.plan
    assert beside.draft_bytes > 0
    assert without.memory_bytes - beside.memory_bytes == pytest.approx(beside.draft_bytes, abs=4096)


@pytest.mark.parametrize("is_lean", [True, False])
def test_a_drafts_own_cache_is_in_the_plan(folders, load, monkeypatch, is_lean: bool) -> None:
    """As many bytes a token as it takes, for all tokens that are reserved; the rest is the experts'."""
    from foreroute.drafting import drafters
    from foreroute.memory import host, serving

    if not is_lean:
        monkeypatch.setattr(drafters, "lean_llama", lambda model: None)
    monkeypatch.setattr(serving, "CHOSEN_RESERVE_BYTES", 0)
    free = 265 * 2**20  # beside 262 of libraries, KV cache and prompts: two thirds of the experts
    monkeypatch.setattr(host, "available_ram", lambda: free)
    without = load(folders[0], None, kv_tokens=512).foreroute.plan
    model = load(folders[0], None, kv_tokens=512, draft=str(folders[1]))
    plan = model.foreroute.plan
    assert without.draft_bytes_per_token == 0
    assert without.memory_bytes < without.total_expert_bytes, "all experts fit: the test shows nothing"
    taken = plan.draft_bytes + 512 * plan.draft_bytes_per_token
    assert without.memory_bytes - plan.memory_bytes == taken

    drafter = draft_for(model, None).drafter
    list(drafter.draft([*range(10, 200)], 1, 0.0))
    of_layers = [one for layer in drafter._cache.layers for one in (layer.keys, layer.values)]
    kept = drafter._lean._kept if is_lean else of_layers
    a_layer = sum(one.nbytes for one in kept) // kept[0].shape[2]
    # The draft has one layer, which exists twice while it grows.
    assert plan.draft_bytes_per_token == 2 * a_layer


def test_a_lean_draft_has_its_weights_once(folders) -> None:
    """What stands in one matrix there is what transformers' layers have."""
    from foreroute.checkpoint.locate import read_index
    from foreroute.drafting.lean_llama import lean_llama
    from foreroute.model.draft_model import find_draft

    draft = find_draft(folders[1], folders[0], read_index(folders[0])).load()
    lean = lean_llama(draft.model)
    assert lean is not None
    joined = lean._layers[0].gate_up
    own = draft.model.model.layers[0].mlp
    assert own.gate_proj.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    assert own.up_proj.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()


def test_a_draft_that_reads_its_values_is_measured_too(folders, load, tmp_path: Path) -> None:
    """A rotary embedding that grows with the text asks how long it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    draft = tmp_path / "draft"
    shutil.copytree(folders[1], draft)
    config = AutoConfig.from_pretrained(draft)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    AutoModelForCausalLM.from_config(config).save_pretrained(draft)
    plan = load(folders[0], "50%", draft=str(draft)).foreroute.plan
    assert (
        plan.draft_bytes_per_token
        == load(folders[0], "50%", draft=str(folders[1])).foreroute.plan.draft_bytes_per_token
    )
    assert plan.draft_bytes_per_token > 0
