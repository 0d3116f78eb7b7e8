"""Substitute default vectors for experts that are still absent after the rest of their layer has been computed."""

from collections.abc import Sequence

from foreroute.engine.approximation import Approximation
from foreroute.engine.pool import ExpertPool
from foreroute.kernels.layer import LayerSum


def substitute_missing(
    pool: ExpertPool, policies: Approximation, layer: int, absent: Sequence[int], output: LayerSum
) -> list[int]:
    """Add a layer's `absent` experts to its `output` sum, without waiting for any of them.

    Those loaded by now are computed after all, as that costs no wait. The others are substituted, with deferred loads.

    Args:
        pool, policies: of the model. absent: keys of `layer` that the policies do not wait for.
    Returns:
        The keys that were pinned, for the caller to release.
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
