"""Default vectors in the place of experts that are absent when the rest of their layer has been computed."""

from collections.abc import Sequence

from foreroute.engine.approximation import Approximation
from foreroute.engine.pool import ExpertPool
from foreroute.kernels.layer import LayerSum


def substitute_missing(
    pool: ExpertPool, policies: Approximation, layer: int, absent: Sequence[int], output: LayerSum
) -> list[int]:
    """Complete a layer's sum with its `absent` experts, without waiting for any of them.

    Those that arrived while others were computed are used after all: it cost no wait. Default vectors take the place of
    the rest, which is read later.

    Args:
        absent: keys of the layer that are not waited for.
    Returns:
        The keys that were pinned, and that the caller releases.
    """
    missing, pinned = list(absent), list[int]()
    while arrived := pool.pin_arrived(missing):
        output.add(arrived)
        pinned += [key for key, _ in arrived]
        missing = [key for key in missing if key not in pinned]
    if missing:
        output.substitute(missing, policies.vectors(layer, pool.keys.experts_of(layer, missing)))
        pool.substitute(missing)
    return pinned
