"""The Python API as a newcomer meets it: names, `with`, the tokenizer, counts, and errors in Python's words."""

import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import foreroute
from foreroute.cli.main import main
from foreroute.errors import BudgetError, DeviceError, ForerouteError, RefusedError
from foreroute.loading.wording import as_arguments


def test_load_shows_among_the_names_and_is_not_imported_for_it() -> None:
    script = "import sys, foreroute; print('load' in dir(foreroute), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
    assert set(foreroute.__all__) <= set(dir(foreroute))


def test_load_has_types() -> None:
    from foreroute.loading.offloaded_model import OffloadedModel

    assert typing.get_type_hints(foreroute.load)["return"] is OffloadedModel
    assert typing.get_type_hints(foreroute.load)["config"] == foreroute.EngineConfig | None
    assert foreroute.load.__doc__.startswith("Load a Mixture-of-Experts model")


def test_a_with_block_closes_the_model(tiny: Path) -> None:
    ids = torch.arange(6)[None]
    with foreroute.load(tiny, "25%") as model:
        assert model(ids).logits.shape[1] == 6
    with pytest.raises(RefusedError, match="closed"):
        model(ids)
    with foreroute.load(tiny, "25%").foreroute as handle:
        assert handle.plan.num_slots == 16
    assert handle.stats().read_bytes == 0


def test_the_tokenizer_comes_with_the_model(tiny: Path) -> None:
    with foreroute.load(tiny, "25%") as model:
        tokenizer = model.foreroute.tokenizer()
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"


def test_a_model_counts_its_experts_numbers(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    resident = AutoModelForCausalLM.from_pretrained(tiny)
    with foreroute.load(tiny, "25%") as model:
        assert model.num_parameters() == resident.num_parameters() > 3 * 2**20 // 4
        assert model.num_parameters(exclude_embeddings=True) == resident.num_parameters(exclude_embeddings=True)
        assert model.num_parameters(only_trainable=True) == 0, "nothing of it can be trained"


def said(**kwargs: Any) -> str:
    with pytest.raises(ForerouteError) as caught:
        foreroute.load(**kwargs)
    return str(caught.value)


def test_a_wrong_argument_is_told_the_right_one_and_what_it_takes(tiny: Path) -> None:
    assert "EngineConfig (lfu, lru): load(..., config=foreroute.EngineConfig(eviction='lru'))" in said(
        path_or_hub_id=tiny, eviction="lru"
    )
    assert "Is eviction, a field of EngineConfig, meant?" in said(path_or_hub_id=tiny, evicton="lru")
    assert "Is memory meant?" in said(path_or_hub_id=tiny, memry="8GiB")
    assert "give foreroute.EngineConfig(...)" in said(path_or_hub_id=tiny, config={})
    assert "give foreroute.EngineConfig(eviction='lru')" in said(path_or_hub_id=tiny, config={"eviction": "lru"})
    assert "Choose one of lfu, lru" in said_of_config(eviction="fifo")


def said_of_config(**fields: Any) -> str:
    with pytest.raises(ForerouteError) as caught:
        foreroute.EngineConfig(**fields)
    return str(caught.value)


@pytest.mark.parametrize("device", [torch.device("cpu"), "cpu", "cpu:0"])
def test_a_device_is_a_device_however_it_is_written(tiny: Path, device: Any) -> None:
    with foreroute.load(tiny, "25%", device=device) as model:
        assert model.foreroute.plan.device == "cpu"
    config = foreroute.EngineConfig(device=device)
    assert config.device == "cpu"


def test_a_gpu_may_have_its_number(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    for device in ("cuda:0", torch.device("cuda"), torch.device("cuda", 0)):
        with pytest.raises(
            DeviceError, match=r'^device="cuda": this PyTorch was built without CUDA.*leave device= out'
        ):
            foreroute.load(tiny, device=device)
    # Which GPU is the current one is not known there.
    assert foreroute.EngineConfig(device=torch.device("cuda")).device == "cuda"
    assert "Choose one of cpu, cuda" in said_of_config(device="cuda:0")


def test_errors_speak_of_arguments_in_python_and_of_flags_on_the_command_line(
    tiny: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BudgetError, match=r"Raise memory= to [\d.]+ KiB\.$"):
        foreroute.load(tiny, "8KiB")
    assert main(["generate", str(tiny), "hi", "--memory", "8KiB"]) == 2
    assert "Raise --memory to" in capfd.readouterr().err
    with pytest.raises(BudgetError, match="Raise memory= to"):
        foreroute.load(tiny, "8KiB")


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("Raise --memory to 2.3 GiB.", "Raise memory= to 2.3 GiB."),
        ("take --memory 3.0MiB.", 'take memory="3.0MiB".'),
        ("--memory 25% is", 'memory="25%" is'),
        ("Leave --memory out", "Leave memory= out"),
        ("Use --control host.", 'Use control="host".'),
        ("--no-cache, --trace and", "cache=False, trace= and"),
        ("Lower --kv-tokens to 4096", "Lower kv_tokens= to 4096"),
        ("--reader-threads 2", "reader_threads=2"),
        ("--policy tolerance:0.1 is not", 'policy="tolerance:0.1" is not'),
        ("`foreroute pack --dense q8_0`, or --packed no.", '`foreroute pack --dense q8_0`, or packed="no".'),
        ("(foreroute pack --quant q4_k)", "(foreroute pack --quant q4_k)"),
        ("a revision (--revision) is", "a revision (revision=) is"),
    ],
)
def test_flags_become_arguments(flags: str, arguments: str) -> None:
    assert as_arguments(flags) == arguments
