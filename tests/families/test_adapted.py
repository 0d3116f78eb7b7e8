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
from foreroute.drafting.draft import draft_for
from foreroute.errors import RefusedError, UnsupportedModelError
from foreroute.model.adapters.registry import adapter_of
from foreroute.model.adapters.resident import ResidentBlock
from foreroute.model.caches import cache_argument, cache_of
from foreroute.model.draft_model import PROMPT_LOOKUP
from tests.families.checks import answer, assert_same, auto_class, load_tight, resident_answer, save_tiny
from tests.families.installed import Family, adapted_modules, families
from tests.families.shrink import tiny_config
from tests.support.broken import copied
from tests.support.checkpoints import save_tokenizer

UNGOVERNED = foreroute.EngineConfig(governor=False, packed="no")
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


@pytest.mark.parametrize(
    "family", [one for one in ADAPTED if one.model_type != "llama4"], ids=lambda one: one.model_type
)
def test_planned_packed_and_verified(folders, prompts, capsys, opened, tmp_path, family: Family) -> None:
    """From a packed store the same bits; and `verify` compares each layer with transformers' own."""
    folder = copied(folders[family.model_type], tmp_path / "model")
    assert main(["plan", str(folder)]) == 0
    assert "expert" in capsys.readouterr().out
    verify = ["verify", str(folder), "--prompts", str(prompts), "--threads", "1", "--tokens", "4", "--reference",
              "resident"]  # fmt: skip
    assert main(verify) == 0, capsys.readouterr().out
    plain = load_tight(folder)
    opened.append(plain)
    expected = answer(plain)
    assert main(["pack", str(folder)]) == 0
    packed = load_tight(folder)
    opened.append(packed)
    assert [plain.foreroute.plan.source, packed.foreroute.plan.source] == ["safetensors", "packed"]
    assert_same(answer(packed), expected)
    assert main(verify) == 0, capsys.readouterr().out


def test_a_misread_expert_is_found(folders, prompts, monkeypatch, capsys) -> None:
    """`verify` names the expert that another's bytes were read for."""
    reads = ExpertTable.reads
    monkeypatch.setattr(ExpertTable, "reads", lambda table, key: reads(table, 3 if key == 2 else key))
    folder = folders[named("jetmoe").model_type]
    assert main(["verify", str(folder), "--prompts", str(prompts), "--threads", "1", "--packed", "no"]) == 1
    assert "those of expert 3 of MoE layer 0" in re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ADAPTED, ids=lambda one: one.model_type)
def test_the_adapter_computes_the_familys_block(folders, family: Family, dtype: torch.dtype) -> None:
    """With the block's own weights, for one row and for many: its bits, though experts sum only what is routed."""
    model = auto_class(family).from_pretrained(folders[family.model_type], experts_implementation="eager", dtype=dtype)
    names = [f"{name}.experts" for name, one in model.named_modules() if adapter_of(type(one)) is not None]
    assert names
    same: list[bool] = []

    def compare(name: str) -> Any:
        block = ResidentBlock.of(model, name)
        assert block is not None
        for parameter in block.block.parameters():
            parameter.data = parameter.data.clone()
        return block.block.register_forward_hook(
            lambda _, args, kwargs, output: same.append(block.replay(args, kwargs, output).is_same), with_kwargs=True
        )

    handles = [compare(name) for name in names]
    with torch.no_grad():
        for num_tokens in (1, 2, 5, 16, 23):
            for num_rows in (1, 2):
                model(input_ids=torch.arange(num_rows * num_tokens).view(num_rows, -1) * 7 % 256)
    for handle in handles:
        handle.remove()
    assert len(same) == 10 * len(names)
    assert all(same), f"{same.count(False)} of {len(same)} blocks differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ADAPTED, ids=lambda one: one.model_type)
def test_two_rows_have_transformers_bits(folders, opened, family: Family, dtype: torch.dtype) -> None:
    """Computed by our kernels, several rows at once, also where sums are rounded to bfloat16."""
    folder, ids = folders[family.model_type], torch.stack([torch.arange(1, 9) * 7, torch.arange(3, 11) * 11 % 256])
    theirs = auto_class(family).from_pretrained(folder, experts_implementation="eager", dtype=dtype).eval()
    for parameter in theirs.parameters():
        parameter.data = parameter.data.clone()
    ours = foreroute.load(folder, "90%", dtype=str(dtype).removeprefix("torch."), config=UNGOVERNED)
    opened.append(ours)
    assert ours.foreroute.plan.math == "own"
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    made, expected = (
        one.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **settings)
        for one in (ours, theirs)
    )
    assert made.sequences.tolist() == expected.sequences.tolist()
    assert all(torch.equal(left, right) for left, right in zip(made.logits, expected.logits, strict=True))
    assert ours.foreroute.stats().decode.prefetch_loads > 0


def test_llama4_reads_what_it_routes_and_no_more(folders, opened) -> None:
    """Each decoded token reads one expert of each layer, though transformers multiplies all of them with it."""
    folder = folders[named("llama4_text").model_type]
    config = foreroute.EngineConfig(prefetch="none", predictor="no", cache=False, packed="no")
    model = foreroute.load(folder, "20%", config=config)
    opened.append(model)
    routed: list[tuple[int, set[int]]] = []
    model.foreroute.engine.routing_listener = lambda layer, _, ids, weights: routed.append(
        (layer, set(ids.flatten().tolist()))
    )
    layers = model.foreroute.table.layers
    ids, cache, stats = torch.arange(1, 13)[None] * 7, None, model.foreroute.stats()
    for num_tokens in (12, 1, 1, 1, 1, 1):
        out = model(input_ids=ids[:, -num_tokens:], **cache_argument(cache), use_cache=True)
        cache, ids = cache_of(out), torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
        now = model.foreroute.stats()
        assert [layer for layer, _ in routed] == list(range(len(layers)))
        assert num_tokens > 1 or all(len(experts) == 1 for _, experts in routed)
        of_routed = sum(len(experts) * layers[layer].expert_nbytes for layer, experts in routed)
        since = now.minus(stats)
        assert since.prefill.demand_bytes + since.decode.demand_bytes == of_routed
        # Whole blocks of the file, at both ends of an expert's two matrices.
        most_around = 4 * 4096 * sum(len(experts) for _, experts in routed)
        assert of_routed <= since.read_bytes <= of_routed + most_around
        stats = now
        routed.clear()


def test_llama4_with_its_vision_tower_runs_on_text(folders, tmp_path, opened) -> None:
    """A published checkpoint is of the multimodal model, whose text part generates."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = tiny_config(named("llama4_text").model_type)
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
              "image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32,
              "projector_output_dim": 32}  # fmt: skip
    config = Llama4Config(text_config=text.to_dict(), vision_config=vision)
    torch.manual_seed(0)
    whole = Llama4ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    model = load_tight(tmp_path)
    opened.append(model)
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()
    assert answer(model).tokens.tolist() == answer(whole.language_model).tokens.tolist()


def test_llama4_of_several_experts_is_refused(tmp_path) -> None:
    """Their inputs are scaled each by its own gate weight, so that no weighted sum of outputs gives the block's."""
    config = tiny_config(named("llama4_text").model_type)
    config.num_experts_per_tok = 2
    family = named("llama4_text")
    auto_class(family).from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"num_experts_per_tok 2.*transformers itself"):
        load_tight(tmp_path)


def test_longcat_as_published_stores_no_experts_that_compute_nothing(folders, tmp_path, opened) -> None:
    """transformers saves the first matrix of those too; without it the model is the same."""
    family = named("longcat_flash")
    folder = folders[family.model_type]
    expected = resident_answer(family, folder)
    published = copied(folder, tmp_path / "published")
    state = load_file(published / "model.safetensors")
    kept = {name: one for name, one in state.items() if not re.search(r"\.experts\.(8|9|10|11)\.", name)}
    assert len(kept) < len(state)
    save_file(kept, published / "model.safetensors", {"format": "pt"})
    opened.append(load_tight(published))
    made = answer(opened[-1])
    assert made.tokens.tolist() == expected.tokens.tolist()
    # Not in bits: dense weights lie at other offsets of the file.
    torch.testing.assert_close(torch.stack(made.logits), torch.stack(expected.logits), atol=1e-5, rtol=0)


def test_dbrx_quantises_each_matrix_along_its_rows(folders, tmp_path, opened) -> None:
    """The second matrix is stored the other way round; a store of eight bits stays close to the model."""
    family, folder = named("dbrx"), tmp_path / "model"
    config = tiny_config(family.model_type)
    config.ffn_config.ffn_hidden_size = 96
    save_tiny(family, folder, config)
    plain = load_tight(folder)
    opened.append(plain)
    assert main(["pack", str(folder), "--quant", "q8_0"]) == 0
    packed = foreroute.load(folder, "50%", config=foreroute.EngineConfig(packed="q8_0"))
    opened.append(packed)
    # ggml multiplies rows of [out, in]: of a matrix that was quantised the other way round it makes nonsense.
    assert [packed.foreroute.plan.source, packed.foreroute.plan.math] == ["packed", "ggml"]
    ids = torch.arange(1, 13)[None] * 7
    ours, theirs = packed(input_ids=ids).logits, plain(input_ids=ids).logits
    # Not of all: where two gates are near, a token takes another expert.
    assert float((ours - theirs).abs().median()) < 0.1 * float(theirs.abs().median())


def test_llama4_is_not_drafted_for(folders, opened) -> None:
    """Its attention in chunks would give verified tokens other bits; refused by name, in Python and by a server."""
    model = foreroute.load(folders[named("llama4_text").model_type], "50%", config=foreroute.EngineConfig(packed="no"))
    opened.append(model)
    with pytest.raises(RefusedError, match=r"No draft for a llama4_text model here: .*attention in chunks"):
        draft_for(model, PROMPT_LOOKUP)
