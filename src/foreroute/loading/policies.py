"""Which policies a loaded model can decode under, and what each of them needs."""

from collections.abc import Sequence

import torch

from foreroute.config import EngineConfig
from foreroute.engine.approximation import Approximation
from foreroute.model.blocks import MoeLayer
from foreroute.model.residual import ResidualTap
from foreroute.policy import EXACT, PAPER, SPECULATIVE, TOLERANCE
from foreroute.predict.build import default_vectors, own_router
from foreroute.predict.lookahead import RouterLookahead
from foreroute.predict.prefetch import PrefetchGuesses
from foreroute.predict.sidecar import Sidecar


def approximation(
    layers: Sequence[MoeLayer],
    dtype: torch.dtype,
    sidecar: Sidecar | None,
    asked: EngineConfig,
    guesses: PrefetchGuesses | None,
    *,
    own_math: bool,
) -> Approximation:
    """What policies other than exact need of the model, and why some cannot be had.

    Args:
        guesses: that are fetched; they are told when some misses are not waited for.
        own_math: all experts are computed one by one here, so that some of them can be left out.
    """
    why_not: dict[str, str] = {}
    if sidecar is None:
        reason = "it needs default vectors, and none are fitted. Run `foreroute fit MODEL --text FILES...` first."
        if asked.prefetch == "none" and asked.policy == EXACT and asked.predictor != "no":
            reason = (
                "with prefetch none and policy exact nothing fitted was read, and no slot is kept for it. Load the "
                "model with the policy, and set it to exact until then."
            )
        why_not = dict.fromkeys((TOLERANCE, SPECULATIVE, PAPER), reason)
        return Approximation(list, lambda: RouterLookahead([]), lambda: ResidualTap(layers), why_not, guesses)
    # A layer that nobody guesses waits: little would be there.
    waits = [asked.prefetch != "none" and not choice for choice in [None, *sidecar.choice[:-1]]]
    can_stand_in = [rows is not None and not wait for rows, wait in zip(sidecar.default_vectors, waits, strict=True)]
    if not own_math or not any(can_stand_in[1:]):
        reason = "this model's experts are computed by its family's own code, all at once. Use exact."
        why_not |= dict.fromkeys((TOLERANCE, SPECULATIVE), reason)
    elif asked.prefetch == "none" and not asked.cache:
        reason = "with cache off and prefetch none nothing would ever be there. Turn one of them on."
        why_not |= dict.fromkeys((TOLERANCE, SPECULATIVE), reason)
    blind = [layer for layer in range(len(layers) - 1) if not _has_paper_guess(layers, layer, sidecar)]
    if blind:
        why_not[PAPER] = (
            "it needs the residual stream after attention, default vectors, and a router that runs on its own; after "
            f"MoE layer {blind[0]} of this model ({type(layers[0].experts).__name__}) one is missing. Use speculative."
        )
    return Approximation(
        lambda: [
            rows.to(dtype) if rows is not None and may else None
            for rows, may in zip(sidecar.default_vectors, can_stand_in, strict=True)
        ],
        lambda: default_vectors(layers, sidecar),
        lambda: ResidualTap(layers),
        why_not,
        guesses,
    )


def _has_paper_guess(layers: Sequence[MoeLayer], layer: int, sidecar: Sidecar) -> bool:
    """From that layer the next one's route can be guessed as the paper does."""
    has_vectors = sidecar.default_vectors[layer] is not None
    has_norms = layers[layer].norm is not None and layers[layer + 1].norm is not None
    return has_vectors and has_norms and own_router(layers[layer + 1]) is not None
