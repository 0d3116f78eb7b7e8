"""Build a model's predictor of the next layer's experts, and the policies that it supports."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from foreroute.config import EngineConfig
from foreroute.engine.approximation import Approximation
from foreroute.model.blocks import MoeLayer
from foreroute.model.expert_set import ExpertSet
from foreroute.model.residual import ResidualTap
from foreroute.policy import EXACT, PAPER, SPECULATIVE, TOLERANCE, Policy
from foreroute.predict.build import check_layout, default_vectors, own_router, prefetch_guesses
from foreroute.predict.lookahead import RouterLookahead
from foreroute.predict.prefetch import PrefetchGuesses
from foreroute.predict.sidecar import Sidecar


@dataclass(frozen=True)
class Guidance:
    """predictor: of prefetches; None: prefetch is off. policies: how decoding treats misses."""

    predictor: PrefetchGuesses | None
    policies: Approximation


def guidance_for(asked: EngineConfig, model: PreTrainedModel, experts: ExpertSet, sidecar: Sidecar | None) -> Guidance:
    """Predictor and policies of a model, with the asked policy set.

    Raises:
        PredictorError: the fitted predictors have other shapes than the model.
        PolicyError: this model does not support the policy.
    """
    hidden = model.config.get_text_config().hidden_size
    check_layout(sidecar, experts.layers, hidden, model.config.get_text_config().vocab_size)
    predictor = prefetch_guesses(asked, experts.layers, experts.dtype, sidecar)
    policies = _approximation(experts.layers, experts.dtype, sidecar, asked, predictor, own_math=experts.has_own_math)
    policies.set([Policy.parse(asked.policy)])
    return Guidance(predictor, policies)


def _approximation(
    layers: Sequence[MoeLayer],
    dtype: torch.dtype,
    sidecar: Sidecar | None,
    asked: EngineConfig,
    guesses: PrefetchGuesses | None,
    *,
    own_math: bool,
) -> Approximation:
    """Build what policies other than exact need, with the reasons why some are not supported.

    Args:
        guesses: the source of prefetches; may widen when some misses are not waited for.
        own_math: our kernels compute all experts, one by one, so that some of them can be left out.
    """
    if sidecar is None:
        reason = "it needs default vectors, and none are fitted. Run `foreroute fit MODEL --text FILES...` first."
        if asked.prefetch == "none" and asked.policy == EXACT and asked.predictor != "no":
            reason = (
                "with prefetch none and policy exact nothing fitted was read, and no slot is kept for it. Load the "
                "model with the policy, and set it to exact until then."
            )
        why_not = dict.fromkeys((TOLERANCE, SPECULATIVE, PAPER), reason)
        return Approximation(list, lambda: RouterLookahead([]), lambda: ResidualTap(layers), why_not, guesses)
    # A layer without a predictor waits: few of its experts would be resident.
    waits = [asked.prefetch != "none" and not choice for choice in [None, *sidecar.choice[:-1]]]
    vectors = [None if wait else rows for rows, wait in zip(sidecar.default_vectors, waits, strict=True)]
    has_substitutes = any(rows is not None for rows in vectors[1:])
    why_not = _why_no_substitutes(asked, can_leave_out=own_math and has_substitutes) | _why_no_paper(layers, sidecar)
    return Approximation(
        lambda: [None if rows is None else rows.to(dtype) for rows in vectors],
        lambda: default_vectors(layers, sidecar),
        lambda: ResidualTap(layers),
        why_not,
        guesses,
    )


def _why_no_substitutes(asked: EngineConfig, *, can_leave_out: bool) -> dict[str, str]:
    """Why default vectors cannot replace missing experts; empty where they can."""
    if not can_leave_out:
        reason = "this model's experts are computed by its family's own code, all at once. Use exact."
    elif asked.prefetch == "none" and not asked.cache:
        reason = "with cache off and prefetch none no expert would ever be resident. Turn one of them on."
    else:
        return {}
    return dict.fromkeys((TOLERANCE, SPECULATIVE), reason)


def _why_no_paper(layers: Sequence[MoeLayer], sidecar: Sidecar) -> dict[str, str]:
    """Why routes cannot be replaced by guesses; empty where they can."""
    blind = [layer for layer in range(len(layers) - 1) if not _has_paper_guess(layers, layer, sidecar)]
    if not blind:
        return {}
    reason = (
        "it needs the residual stream after attention, default vectors, and a router that runs on its own; after MoE "
        f"layer {blind[0]} of this model ({type(layers[0].experts).__name__}) one is missing. Use speculative."
    )
    return {PAPER: reason}


def _has_paper_guess(layers: Sequence[MoeLayer], layer: int, sidecar: Sidecar) -> bool:
    """Whether the next layer's route can be guessed from `layer` as the paper does."""
    has_vectors = sidecar.default_vectors[layer] is not None
    has_norms = layers[layer].norm is not None and layers[layer + 1].norm is not None
    return has_vectors and has_norms and own_router(layers[layer + 1]) is not None
