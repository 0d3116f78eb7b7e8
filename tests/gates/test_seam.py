"""The seam to transformers: no expert is ever allocated, and what is changed while loading is changed back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from foreroute.checkpoint.locate import read_index
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError
from foreroute.model.blocks import probe
from foreroute.model.build.skeleton import load_skeleton, offloaded_modules, outline, swapped_experts
from foreroute.model.caches import CACHE_NAME, cache_of
from foreroute.model.experts import is_experts_class
from tests.support.checkpoints import save_hollow
from tests.support.families import FAMILIES
from tests.support.runs import ONE_PROMPT, assert_same_bits, expert_table, generate

ROOT = Path(__file__).parents[2]


def experts_in(module):
    return {name: value for name, value in vars(module).items() if isinstance(value, type) and is_experts_class(value)}


def modeling_module(family):
    return sys.modules[f"transformers.models.{family}.modeling_{family}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_g30_no_expert_is_a_parameter(checkpoints, references, load, family):
    folder = checkpoints.get(family)
    model, table = load(folder), expert_table(folder)
    shapes = {part.shape for layer in table.layers for part in layer.layout.parts}
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert not [name for name, tensor in tensors.items() if tuple(tensor.shape[1:]) in shapes and tensor.ndim == 3]
    assert not [name for name in tensors if ".experts." in name]
    assert not [name for name, tensor in tensors.items() if tensor.is_meta]
    resident = references.model(folder)
    expert_params = [p for name, p in resident.named_parameters() if ".experts." in name]
    assert expert_params
    of_experts = sum(p.numel() for p in expert_params)
    assert sum(p.numel() for p in model.parameters()) + of_experts == resident.num_parameters()
    for without in (False, True):
        assert model.num_parameters(exclude_embeddings=without) == resident.num_parameters(exclude_embeddings=without)
    assert sum(p.nbytes for p in expert_params) == table.expert_nbytes


@pytest.mark.parametrize("family", FAMILIES)
def test_g31_the_modeling_module_is_as_it_was(checkpoints, references, load, family):
    """After a load; and transformers loads the same folder as before."""
    from transformers import AutoModelForCausalLM

    folder = checkpoints.get(family)
    expected = references.output(folder)
    before = experts_in(modeling_module(family))
    assert len(before) == 1
    load(folder)
    assert experts_in(modeling_module(family)) == before
    again = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", dtype="auto")
    assert_same_bits(generate(again), expected)
    assert any(type(module) in before.values() for module in again.modules())


def test_g31_after_a_failed_load_too(checkpoints, references, load, tmp_path):
    import shutil

    folder = tmp_path / "lacking"
    shutil.copytree(checkpoints.get("qwen3_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    before = experts_in(modeling_module("qwen3_moe"))
    with pytest.raises(CorruptCheckpointError, match=r"lacks model\.norm\.weight"):
        load(folder)
    assert experts_in(modeling_module("qwen3_moe")) == before


def test_g31_after_an_interrupt_too(checkpoints, load, monkeypatch):
    """And it was really changed while loading: else the gates above compare nothing."""
    from transformers import Qwen3MoeForCausalLM

    before, seen = experts_in(modeling_module("qwen3_moe")), {}

    def interrupted(*args, **kwargs):
        seen.update(vars(modeling_module("qwen3_moe")))
        raise KeyboardInterrupt

    monkeypatch.setattr(Qwen3MoeForCausalLM, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(checkpoints.get("qwen3_moe"))
    assert experts_in(modeling_module("qwen3_moe")) == before
    assert seen["Qwen3MoeExperts"] is not before["Qwen3MoeExperts"]
    assert issubclass(seen["Qwen3MoeExperts"], before["Qwen3MoeExperts"])


def test_g32_two_loads_at_a_time(checkpoints, references):
    """One waits for the other: the swap is seen by all threads."""
    from concurrent.futures import ThreadPoolExecutor

    import foreroute

    folders = [checkpoints.get("qwen3_moe"), checkpoints.get("qwen3_moe", seed=5), checkpoints.get("olmoe")]
    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(lambda folder: foreroute.load(folder, "50%"), folders))
    for model, folder in zip(models, folders, strict=True):
        assert_same_bits(generate(model, new_tokens=8), generate(references.model(folder), new_tokens=8))
        model.foreroute.close()


def test_g33_experts_are_built_without_memory(checkpoints):
    """Building the experts module of any size takes no memory: its tensors are dropped before they exist."""
    from foreroute.checkpoint.locate import read_index

    folder = checkpoints.get("mixtral")
    sketch = outline(folder, read_index(folder))
    (original,) = sketch.experts_classes
    with swapped_experts(sketch.experts_classes):
        swapped = modeling_module("mixtral").MixtralExperts
    sketch.config.hidden_size = sketch.config.intermediate_size = 2**20  # a petabyte
    module = swapped(sketch.config)
    assert not list(module.parameters())
    assert [(p.name, p.shape) for p in module.expert_parameters] == [
        ("gate_up_proj", (2**21, 2**20)),
        ("down_proj", (2**20, 2**20)),
    ]
    assert module.num_offloaded == sketch.config.num_local_experts
    assert isinstance(module, original)


# Both print {"peak": bytes, "dense": ..., "budget": ...} of a process that loads and generates.
MEASURE = """
import json, resource, sys
import torch, foreroute
torch.set_num_threads(1)
model = foreroute.load(sys.argv[1], sys.argv[2])
ids = torch.arange(1, 25)[None]
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
plan, stats = model.foreroute.plan, model.foreroute.stats()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "dense": plan.dense_bytes, "budget": plan.memory_bytes, "experts":
    plan.total_expert_bytes, "evictions": stats.evictions}))
"""


def measured(folder: Path, memory: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), memory],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_g34_memory_stays_within_the_budget(checkpoints, tmp_path):
    """A checkpoint of 800 MB with 48 MiB for its experts takes the budget, the dense weights, and little more."""
    config = FAMILIES["qwen3_moe"]()
    config.hidden_size = config.moe_intermediate_size = 512
    config.num_experts = 170
    large = measured(save_hollow(config, tmp_path / "large"), "48MiB")
    tiny = measured(checkpoints.get("qwen3_moe"), "25%")
    assert large["experts"] > 800e6
    assert large["evictions"] > 0
    assert large["peak"] - tiny["peak"] < large["budget"] + large["dense"] + 150e6


@pytest.mark.parametrize("name", sorted({CACHE_NAME, "past_key_values"}))
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_g35_a_step_with_a_cache_is_decoding_under_every_name_of_the_cache(checkpoints, load, name):
    model = load(checkpoints.get("mixtral"))
    cache = cache_of(model(ONE_PROMPT.ids, use_cache=True))
    before = model.foreroute.stats()
    model(torch.tensor([[5]]), **{name: cache})
    after = model.foreroute.stats().minus(before)
    assert (after.prefill.steps, after.decode.steps) == (0, 1)


def test_g36_layers_that_are_passed_several_times_are_refused(checkpoints):
    folder = checkpoints.get("mixtral")
    model = load_skeleton(folder, outline(folder, read_index(folder)), "auto")
    assert probe(model, offloaded_modules(model))
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers += 1
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\..* several times for one token"):
        probe(model, offloaded_modules(model))
