"""What a decode step asks of the host: nothing. RouterSample on the CPU by the operations that it dispatches.

Reading a value back, an output whose size depends on values, and a tensor made from Python's numbers would each stop a
GPU's stream, or not be captured at all. Paging is stubbed: its reference is plain Python.
"""

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foreroute.device.slot_math import GatheredSlotMath
from foreroute.engine.interfaces import StepInfo
from foreroute.generation.graph_decoder import GraphDecoder, _ScalarsOnDevice
from foreroute.loading.expert_math import describe_math
from tests.support.runs import ONE_PROMPT

# Reads a value; has as many outputs as values say; comes from the host.
STOPS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "lift_fresh"}


class HostWatch(TorchDispatchMode):
    """Notes the operations that would stop a stream, `seen`, and counts all."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.num_operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.num_operations += 1
        is_mask = name in ("index", "index_put_") and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        if name in STOPS or is_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class NoPaging:
    """Every expert lies in slot 0."""

    def plan(self, state, layer, ids, slots, copies, *, arrived) -> None:
        slots.zero_()

    def plan_prefetch(self, state, layer, guesses, copies, *, arrived) -> None:
        assert guesses.ndim == 1

    def fetch(self, *args, **kwargs) -> None:
        pass


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral"])
def decoder(checkpoints, load, request) -> Iterator[GraphDecoder]:
    model = load(checkpoints.get(request.param), "50%", control="device")
    tier = model.foreroute.engine
    made = GraphDecoder(model, 1, 64)
    token = made.prefill(ONE_PROMPT.ids).argmax(-1, keepdim=True)
    made.step(token)
    tier._paging = NoPaging()
    math = [describe_math(layer.experts) for layer in model.foreroute.layers]
    tier._slot_math = GatheredSlotMath(tier._pool, [one.layout for one in tier.table.layers], math, torch.float32)
    tier.begin_step(StepInfo("decode", 1, 1))
    return made


def test_a_step_asks_the_host_nothing(decoder):
    with HostWatch() as watch:
        decoder._run()
    assert watch.num_operations > 100
    assert watch.seen == []


def test_the_watch_goes_red():
    values = torch.arange(4)
    with HostWatch() as watch:
        int(values[1])
        values[values > 1]
        torch.tensor([1, 2])
    assert watch.seen == ["_local_scalar_dense", "index", "lift_fresh"]


def test_numbers_are_made_on_the_device():
    with HostWatch() as watch, _ScalarsOnDevice():
        made = [torch.tensor(0.5), torch.tensor(3, device="cpu"), torch.tensor(True), torch.tensor(0, dtype=torch.half)]
    assert watch.seen == []
    plain = [torch.tensor(0.5), torch.tensor(3), torch.tensor(True), torch.tensor(0, dtype=torch.half)]
    assert [(one.dtype, one.shape, one.item()) for one in made] == [(p.dtype, p.shape, p.item()) for p in plain]


def test_a_step_moves_its_own_position_on_and_nothing_else_does(decoder):
    before = decoder._positions.clone()
    lengths = [int(layer.cumulative_length) for layer in decoder._cache.layers]
    decoder._run()
    assert torch.equal(decoder._positions, before + 1)
    assert [int(layer.cumulative_length) for layer in decoder._cache.layers] == [length + 1 for length in lengths]
