"""The GPU's memory: how much is free, and an error that says what did not fit."""

import contextlib
from collections.abc import Iterator

import torch

from foreroute.errors import DeviceError


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes of the GPU: free, and in all."""
    free, total = torch.cuda.mem_get_info(device)
    return int(free), int(total)


@contextlib.contextmanager
def out_of_memory_named(what: str, advice: str) -> Iterator[None]:
    """While inside, a GPU that runs out of memory is a DeviceError that says what did not fit, and what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free = "" if not torch.cuda.is_available() else f" ({torch.cuda.mem_get_info()[0] >> 20} MiB are free)"
        raise DeviceError(f"The GPU ran out of memory for {what}{free}. {advice}") from error
