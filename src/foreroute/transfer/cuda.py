"""GPU memory: its size and free bytes, and an error that names what did not fit."""

import contextlib
from collections.abc import Iterator

import torch

from foreroute.errors import DeviceError


def memory_of(device: torch.device) -> tuple[int, int]:
    """Return the GPU's free and total bytes."""
    free, total = torch.cuda.mem_get_info(device)
    return int(free), int(total)


@contextlib.contextmanager
def out_of_memory_named(what: str, advice: str) -> Iterator[None]:
    """Turn running out of GPU memory inside the block into a DeviceError with `what` did not fit, and `advice`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free = "" if not torch.cuda.is_available() else f" ({torch.cuda.mem_get_info()[0] >> 20} MiB are free)"
        raise DeviceError(f"The GPU ran out of memory for {what}{free}. {advice}") from error
