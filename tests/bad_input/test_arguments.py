"""What load and EngineConfig are called with: honoured, or refused by name; nothing vanishes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import foreroute
from foreroute.checkpoint.hub.fetch import HubAccess
from foreroute.errors import ForerouteError
from foreroute.loading.arguments import read_arguments


@pytest.fixture(scope="module")
def folder(checkpoints: Any) -> Path:
    return checkpoints.get("qwen3_moe")


def refused(*patterns: str, args: tuple[Any, ...], **kwargs: Any) -> None:
    with pytest.raises(ForerouteError) as caught:
        foreroute.load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in: {caught.value}"


@pytest.mark.parametrize("path", [5, None, "", b"model", [], Path])
def test_a_path_that_is_none(path: Any) -> None:
    refused("give the folder of a checkpoint", args=(path,))


@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        ("memory", [], "amount of memory"),
        ("memory", True, "amount of memory"),
        ("memory", "lots", "amount of memory"),
        ("device", 3, 'give "cpu" or "cuda"'),
        ("device", "mps", "cpu, cuda"),
        ("device", "cuda:7", "current GPU"),
        ("config", {}, r"EngineConfig\(\.\.\.\)"),
        ("revision", 3, "branch, a tag"),
        ("progress", 3, "function"),
        ("dtype", "float99", "float32, bfloat16, float16"),
        ("dtype", torch.int8, "float32, bfloat16, float16"),
        ("dtype", 3, "float32, bfloat16, float16"),
        ("torch_dtype", "int8", "float32, bfloat16, float16"),
        ("attn_implementation", 3, "sdpa"),
        ("attn_implementation", "someone/kernels", "not run"),
        ("attn_implementation", "none_such", "none_such"),
        ("token", [1], "token is a list"),
        ("local_files_only", "x", "local_files_only is a str"),
        ("cache_dir", 3, "cache_dir is a int"),
        ("eviction", "lru", r"EngineConfig\(eviction='lru'\)"),
        ("prefetch_width", 3, r"EngineConfig\(prefetch_width=3\)"),
        ("evicton", "lru", "eviction"),
        ("device_map", "auto", "device="),
        ("max_memory", {0: "1GiB"}, "memory="),
        ("offload_folder", "x", "packed store"),
        ("offload_state_dict", True, "packed store"),
        ("low_cpu_mem_usage", False, "never has all its weights"),
        ("key_mapping", {"a": "b"}, "rename"),
        ("state_dict", {}, "safetensors"),
        ("use_safetensors", False, "safetensors"),
        ("subfolder", "x", "folder"),
        ("variant", "fp16", "folder"),
        ("trust_remote_code", True, "not run"),
        ("quantization_config", {"load_in_4bit": True}, "foreroute pack"),
        ("tp_plan", "auto", "one process"),
        ("experts_implementation", "grouped_mm", "eager"),
        ("force_download", True, "cache"),
        ("proxies", {"http": "secret"}, "HTTPS_PROXY"),
        ("generation_config", 3, r"model\.generation_config"),
        ("num_hidden_layers", 1, "no argument num_hidden_layers"),
    ],
)
def test_an_argument_that_cannot_be_honoured(folder: Path, name: str, value: Any, pattern: str) -> None:
    refused(name if name not in ("memory", "torch_dtype") else "", pattern, args=(folder,), **{name: value})


def test_secrets_are_not_shown(folder: Path) -> None:
    for name, value in (("use_auth_token", "hf_secret"), ("proxies", {"http": "hf_secret"}), ("token", ["hf_secret"])):
        with pytest.raises(ForerouteError) as caught:
            foreroute.load(folder, **{name: value})
        assert "hf_secret" not in str(caught.value)


def test_what_says_what_happens_anyway_is_taken(load: Any, folder: Path) -> None:
    with_device = foreroute.load(folder, "25%", device=torch.device("cpu"))
    assert with_device.foreroute.plan.device == "cpu"
    with_device.foreroute.close()
    model = load(
        folder, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True, device_map=None,
        trust_remote_code=False, use_safetensors=True, attn_implementation="eager", token="x", local_files_only=True,
        quantization_config=None, tp_plan=None, experts_implementation="eager",
    )  # fmt: skip
    assert model.dtype == torch.bfloat16
    assert model.foreroute.plan.compute_dtype == "bfloat16"
    assert model.config._attn_implementation == "eager"


def test_how_the_hub_is_asked() -> None:
    told = {"token": "x", "local_files_only": True, "cache_dir": "/a"}
    call = read_arguments("a/b", None, "auto", None, None, None, print, told)
    assert call.hub == HubAccess("x", True, Path("/a"))
    assert "x" not in repr(call.hub).split("HubAccess")[1].split("local")[0], "a token is not shown"


def test_dtype_and_its_older_name(load: Any, folder: Path) -> None:
    assert load(folder, dtype="torch.bfloat16", torch_dtype="bfloat16").dtype == torch.bfloat16
    assert load(folder, dtype=None).dtype == torch.float32
    refused("dtype=float32 and torch_dtype=bfloat16", args=(folder,), dtype="float32", torch_dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "value"),
    [("prefetch_width", "5"), ("policy", 5), ("governor", 1), ("governor", "no"), ("prefill_chunk", None),
     ("memory", []), ("memory", True), ("reader_threads", 1.5), ("packed", 3), ("eviction", []),
     ("policy", Path("exact"))],
)  # fmt: skip
def test_a_field_of_another_type(name: str, value: Any) -> None:
    with pytest.raises(ForerouteError, match=name):
        foreroute.EngineConfig(**{name: value})


def test_paths_may_be_paths(tmp_path: Path) -> None:
    config = foreroute.EngineConfig(packed=tmp_path, predictor=tmp_path, trace=tmp_path / "a.jsonl")  # type: ignore[arg-type]
    assert config.packed == tmp_path
