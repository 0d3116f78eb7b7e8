"""What the caller has switched on in torch for a while: what of it the engine works under, and what not.

Everything that the engine keeps (slots, buffers, sums, graphs) is made and changed outside of inference mode, and on
the device that the code names or the CPU: else the next caller, who has none of it switched on, could not use it.
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
    """Inside, tensors may be made that are kept: not in inference mode, nor on another default device; no gradients."""
    return contextlib.nullcontext() if is_ordinary() else _ordinary()


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    # A default device costs 3 us for each operation, which torch then passes through Python: only where one is on.
    with torch.inference_mode(False), torch.no_grad(), contextlib.nullcontext() if _is_on_cpu() else _CPU:
        yield


@contextlib.contextmanager
def as_if_alone() -> Iterator[None]:
    """The same for loading, where autocast is off too: what is measured there shall hold at any time.

    Gradients stay as they are: what is loaded has `requires_grad` as transformers sets it.
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
