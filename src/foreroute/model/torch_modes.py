"""Torch modes that callers switch on for a while: which of them the engine works under, and which it refuses.

Everything that the engine keeps (slots, buffers, sums, graphs) is made and changed outside of inference mode, and on
the device that the code names or the CPU: otherwise a later caller without these modes could not use it.
"""

import contextlib
from collections.abc import Iterator

import torch

from foreroute.errors import RefusedError

_CPU = torch.device("cpu")


def is_ordinary() -> bool:
    """Whether neither inference mode nor another default device is on. Cost: 0.2 us."""
    return not torch.is_inference_mode_enabled() and _is_on_cpu()


def _is_on_cpu() -> bool:
    """Whether tensors are made on the CPU where no device is named."""
    return torch._C._len_torch_function_stack() == 0 or torch.get_default_device() == _CPU


def kept() -> contextlib.AbstractContextManager[None]:
    """Within the context, make tensors that are kept: no inference mode, no other default device, no gradients."""
    return contextlib.nullcontext() if is_ordinary() else _ordinary()


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    # Without gradients autograd's dispatch may be left out, as inference mode does: 5 % of a layer of small products.
    # A default device costs 3 us for each operation, which torch then passes through Python: only where one is on.
    device = contextlib.nullcontext() if _is_on_cpu() else _CPU
    # Made in its turn: torch's guard holds from when it is made.
    with torch.inference_mode(False), torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), device:
        yield


@contextlib.contextmanager
def as_if_alone() -> Iterator[None]:
    """The same for loading, where autocast is off too, so that measurements made there hold at any time.

    Gradients stay on or off: loaded tensors have `requires_grad` as transformers sets it.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not _is_on_cpu():
            stack.enter_context(_CPU)
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def refuse_autocast(device: torch.device) -> None:
    """Raise where torch.autocast is on for this device. Cost: 0.2 us.

    Raises:
        RefusedError: products would be in another dtype than the experts are computed in.
    """
    if torch.is_autocast_enabled(device.type):
        raise RefusedError(
            "torch.autocast is on: it would compute a part of the model in another dtype than its experts. Leave it "
            "out, and choose the dtype when loading: foreroute.load(..., dtype='bfloat16')."
        )
