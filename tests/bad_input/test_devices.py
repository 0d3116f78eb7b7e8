"""No GPU, an old driver, no Triton, too little memory: each is said before anything is loaded, with what would do."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from foreroute import EngineConfig
from foreroute.errors import DeviceError, ForerouteError, RefusedError
from foreroute.loading import arguments as devices
from foreroute.memory.plan import check_store, choose_budget
from foreroute.memory.serving import kv_bytes_per_token
from foreroute.model.expert_set import ExpertSet
from foreroute.transfer.memory import out_of_memory_named

CUDA = EngineConfig(device="cuda")
DEVICE_CONTROL = EngineConfig(device="cuda", control="device")


@pytest.fixture
def fake_gpu(monkeypatch):
    """A machine with one GPU of 24 GB, as far as `open_device` can tell."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of the test")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (23 * 2**30, 24 * 2**30))
    return monkeypatch


def test_a_gpu_that_will_do(fake_gpu) -> None:
    assert devices.open_device(CUDA) == torch.device("cuda", 0)
    assert devices.open_device(DEVICE_CONTROL) == torch.device("cuda", 0)
    assert devices.open_device(EngineConfig()) == torch.device("cpu")


def test_a_torch_without_cuda(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match=r"built without CUDA.*pytorch.org.*leave --device out"):
        devices.open_device(CUDA)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("The NVIDIA driver on your system is too old (found version 11040).", "too old.*CUDA 13.0: update the driver"),
        ("Found no NVIDIA driver on your system.", "no NVIDIA driver is found.*Install it"),
        ("CUDA unknown error\nmore", r"CUDA unknown error\. See nvidia-smi"),
    ],
)
def test_a_driver_that_does_not_do(fake_gpu, said: str, told: str) -> None:
    def init() -> None:
        raise RuntimeError(said)

    fake_gpu.setattr(torch.cuda, "init", init)
    with pytest.raises(DeviceError, match=told):
        devices.open_device(CUDA)


def test_no_gpu_is_visible(fake_gpu) -> None:
    fake_gpu.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES"):
        devices.open_device(CUDA)


def test_an_old_gpu_and_no_triton_leave_the_host_plane(fake_gpu) -> None:
    fake_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(DeviceError, match=r"capability 7\.5.*Use --control host"):
        devices.open_device(DEVICE_CONTROL)
    assert devices.open_device(CUDA).type == "cuda"
    fake_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    fake_gpu.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="pip install triton"):
        devices.open_device(DEVICE_CONTROL)


@pytest.mark.parametrize(
    ("switches", "told"),
    [
        ({"policy": "speculative"}, "use exact"),
        ({"predictor": "fitted.safetensors"}, "Fitted predictors"),
        ({"control": "device", "trace": "x.jsonl"}, "need --control host"),
        ({"control": "device", "cache": False}, "need --control host"),
    ],
)
def test_what_no_device_can_do_yet(fake_gpu, switches, told: str) -> None:
    with pytest.raises(DeviceError, match=told):
        devices.open_device(EngineConfig(device="cuda", **switches))


def test_nothing_is_read_where_there_is_no_gpu(checkpoints, monkeypatch) -> None:
    import foreroute

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(
        "foreroute.loading.checkpoint.read_index", lambda folder: pytest.fail("the checkpoint was read")
    )
    with pytest.raises(DeviceError, match="without CUDA"):
        foreroute.load(checkpoints.get("qwen3_moe"), device="cuda")


def test_a_gpu_too_small_for_the_dense_part_is_found_before_weights_are_read(fake_gpu, checkpoints) -> None:
    import foreroute

    fake_gpu.setattr(torch.cuda, "mem_get_info", lambda device=None: (200 * 2**20, 2**30))
    fake_gpu.setattr("foreroute.loading.load.load_skeleton", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(DeviceError, match=r"200\.0 MiB free.*without a single expert"):
        foreroute.load(checkpoints.get("qwen3_moe"), device="cuda")


def test_running_out_of_memory_is_named() -> None:
    with (
        pytest.raises(DeviceError, match=r"ran out of memory for the dense weights.*Lower --memory"),
        out_of_memory_named("the dense weights", "Lower --memory."),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RefusedError), out_of_memory_named("x", "y"):
        raise RefusedError("another")


def test_quantised_for_the_cpu_is_refused() -> None:
    plain = SimpleNamespace(layers=())
    with pytest.raises(DeviceError, match=r"q4_k stores.*--packed no"):
        check_store(SimpleNamespace(codec="q4_k", table=plain), "stored")
    check_store(SimpleNamespace(codec="stored", table=plain), "stored")
    check_store(None, "stored")


def test_what_the_model_wants_is_counted_on_the_model_itself(fake_gpu, checkpoints, load) -> None:
    model = load(checkpoints.get("qwen3_moe"), "100%")
    handle = model.foreroute
    table, layers, text = handle.table, handle.layers, model.config.get_text_config()
    asked = EngineConfig(device="cuda", kv_tokens=64, prefill_chunk=32)
    weights = sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))
    kv = 64 * kv_bytes_per_token(model)
    chunk = 32 * (16 * text.hidden_size * 4 + text.vocab_size * 8)
    wanted = weights + kv + chunk + (256 + 192) * 2**20
    room = 20 * table.slot_bytes
    fake_gpu.setattr(torch.cuda, "mem_get_info", lambda device=None: (wanted + room, 2**30))
    experts = ExpertSet(tuple(layers), table, table, None, (), (), model.dtype, torch.device("cpu"))
    assert choose_budget(torch.device("cpu"), asked, model, experts) == room
    paged = replace(asked, control="device")
    with pytest.raises(DeviceError, match=r"one token's experts need|without a single expert"):
        choose_budget(torch.device("cpu"), paged, model, experts)


def test_values_that_make_no_sense() -> None:
    for wrong in ({"device": "tpu"}, {"control": "nobody"}, {"kv_tokens": 1}):
        with pytest.raises(ForerouteError, match=next(iter(wrong))):
            EngineConfig(**wrong)


def test_the_cache_is_measured_on_the_model_itself(checkpoints, load) -> None:
    model = load(checkpoints.get("qwen3_moe"), "100%")
    text = model.config.get_text_config()
    expected = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    assert kv_bytes_per_token(model) == expected
