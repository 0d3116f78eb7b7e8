"""Build a model's engine: what guides it, and one of three kinds.

What guides it is a predictor of the next layer's experts, and the policies that the model supports. The kinds: experts
on disk, behind a host tier, or paged by the GPU itself.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import torch
from transformers import PreTrainedModel

from foreroute.config import EngineConfig
from foreroute.device.build import build_tier
from foreroute.engine.approximation import Approximation
from foreroute.engine.interfaces import MoeEngine
from foreroute.engine.moe_step import MoeStep
from foreroute.engine.pool import ExpertPool
from foreroute.engine.prefetcher import Prefetcher
from foreroute.kernels.ggml.experts import ExpertGraphs
from foreroute.kernels.ggml.graph import shared_runner
from foreroute.kernels.ggml.layer import GgmlLayer
from foreroute.kernels.ggml.slots import HostSlots
from foreroute.kernels.layer import LayerKernels
from foreroute.kernels.slot_views import SlotViews
from foreroute.kernels.torch.experts import OneToken
from foreroute.kernels.torch.layer import TorchLayer
from foreroute.loading.expert_math import family_forward_over, stored_operands
from foreroute.memory.plan import MemoryPlan
from foreroute.model.blocks import MoeLayer, first_decoded
from foreroute.model.expert_set import ExpertSet
from foreroute.model.hooks import ResidualTap
from foreroute.policy import EXACT, PAPER, SPECULATIVE, TOLERANCE, Policy
from foreroute.predict.build import check_layout, default_vectors, own_router, prefetch_guesses
from foreroute.predict.governor import Governor
from foreroute.predict.lookahead import RouterLookahead
from foreroute.predict.prefetch import PrefetchGuesses
from foreroute.predict.sidecar import Sidecar
from foreroute.residency.eviction import eviction_of
from foreroute.residency.sized import residency_of
from foreroute.trace import Trace
from foreroute.transfer.placing import SlotMemory, place, place_behind_arena
from foreroute.types import Progress, SlotClass

# Of the pool, the most that deferred loads may take; and never more than a layer's top-k.
_DEFERRED_SHARE = 8
# Routed slots per expert from which prefetching pays in prefill: nearly every expert is used then, so few are wrong.
# Measured on two models: it loses up to 16, and wins from 32 (benchmarks/prefill.py).
_PREFILL_PREFETCH_FROM = {"on": 0.0, "auto": 24.0, "off": inf}
# Experts of this size take a millisecond to read: prefetching was measured to pay. At 74 KB it lost (docs/LOG.md).
_LARGE_EXPERT_BYTES, _TRUSTED_STEPS = 2**20, 128


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
    first = first_decoded(layers)
    if sidecar is None:
        reason = "it needs default vectors, and none are fitted. Run `foreroute fit MODEL --text FILES...` first."
        if asked.prefetch == "none" and asked.policy == EXACT and asked.predictor != "no":
            reason = (
                "with prefetch none and policy exact nothing fitted was read, and no slot is kept for it. Load the "
                "model with the policy, and set it to exact until then."
            )
        why_not = dict.fromkeys((TOLERANCE, SPECULATIVE, PAPER), reason)
        return Approximation(
            list,
            lambda: RouterLookahead([]),
            lambda: ResidualTap([layer.norm for layer in layers]),
            why_not,
            guesses,
            first,
        )
    # A layer without a predictor waits: few of its experts would be resident.
    waits = [asked.prefetch != "none" and not choice for choice in [None, *sidecar.choice[:-1]]]
    vectors = [None if wait else rows for rows, wait in zip(sidecar.default_vectors, waits, strict=True)]
    has_substitutes = any(rows is not None for rows in vectors[first + 1 :])
    why_not = _why_no_substitutes(asked, can_leave_out=own_math and has_substitutes) | _why_no_paper(layers, sidecar)
    return Approximation(
        lambda: [None if rows is None else rows.to(dtype) for rows in vectors],
        lambda: default_vectors(layers, sidecar),
        lambda: ResidualTap([layer.norm for layer in layers]),
        why_not,
        guesses,
        first,
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
    decoded = range(first_decoded(layers), len(layers) - 1)
    blind = [layer for layer in decoded if not _has_paper_guess(layers, layer, sidecar)]
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


def has_one_slot_length(asked: EngineConfig, device: torch.device) -> bool:
    """Whether all slots of the engine that is asked for, with its slots on `device`, are of one length.

    A device's slots and an arena's records are; only slots in RAM with the experts on disk have several lengths.
    """
    return asked.control == "device" or device.type != "cpu" or asked.host_memory is not None


def start_engine(
    asked: EngineConfig,
    experts: ExpertSet,
    memory: MemoryPlan,
    guidance: Guidance,
    trace: Trace | None,
    progress: Progress,
) -> MoeEngine:
    """Start the engine that is asked for, and its readers.

    A GPU that pages for itself (`DeviceTier`); or a `MoeStep` over slots in RAM with the experts on disk, or over slots
    on `experts.device` with the experts in host memory, and on disk as far as that does not hold them.
    """
    if asked.control == "device":
        return build_tier(asked, experts, memory.slots, guidance.policies, progress)
    table, store, slots, device = experts.table, experts.store, memory.slots, experts.device
    if not has_one_slot_length(asked, device):
        placed = place(asked, table, store, slots.classes, trace)
    else:
        placed = place_behind_arena(
            asked,
            table,
            store,
            slots.num_slots,
            trace,
            device=device,
            num_records=memory.host_records,
            progress=progress,
        )
    return _step_over(placed, asked, experts, memory, guidance)


def _step_over(
    placed: SlotMemory, asked: EngineConfig, experts: ExpertSet, memory: MemoryPlan, guidance: Guidance
) -> MoeStep:
    table, classes = experts.table, memory.slots.classes
    residency = residency_of(
        classes,
        table.num_keys,
        table.num_experts,
        partial(eviction_of, asked.eviction),
        prefetches=memory.staging_slots > 0,
        deferred_slots=[
            min(max(experts.top_k[layer] for layer in one.layers), one.num_slots // _DEFERRED_SHARE) for one in classes
        ],
    )
    first = first_decoded(experts.layers)
    pool = ExpertPool(
        table.keys, table.key_nbytes, residency, placed.transfer, keeps_across_tokens=asked.cache, first_layer=first
    )
    governor = _governor(asked, experts) if guidance.predictor is not None else None
    layers = _layers(experts, placed, classes)
    step = MoeStep(
        pool,
        layers,
        Prefetcher(pool, guidance.predictor, guidance.policies, governor=governor, first_layer=first),
        guidance.policies,
        free_slots=placed.free,
        hits_first=asked.hits_first,
        prefill_prefetch_from=inf if asked.deterministic else _PREFILL_PREFETCH_FROM[asked.prefetch_prefill],
    )
    alive = weakref.ref(step)

    def verifies() -> bool:
        running = alive()
        return running is not None and running.phase == "verify"

    for layer in layers:
        if isinstance(layer, TorchLayer):
            layer.rows_apart = verifies
    return step


def _layers(experts: ExpertSet, placed: SlotMemory, classes: Sequence[SlotClass]) -> list[LayerKernels]:
    """Build each layer's backend: ggml's where its experts are stored in blocks that it multiplies, else torch's."""
    layers: list[LayerKernels] = [*_torch_layers(experts, placed, classes)]
    if any(form is not None for form in experts.forms):
        runner = shared_runner(torch.get_num_threads())
        for one in classes:
            graphs = ExpertGraphs(runner, HostSlots(placed.memory, one))
            for at in one.layers:
                if (form := experts.forms[at]) is not None:
                    layers[at] = GgmlLayer(at, experts.table.keys.key(at, 0), graphs.of(form))
    return layers


def _torch_layers(experts: ExpertSet, placed: SlotMemory, classes: Sequence[SlotClass]) -> list[TorchLayer]:
    """Build the torch backend over these slots."""
    table = experts.table
    slots_of = {layer: one for one in classes for layer in one.layers}
    views = SlotViews(
        placed.memory,
        [slots_of[layer] for layer in range(len(table.layers))],
        [layer.layout for layer in table.layers],
        stored_operands(experts.math, table, experts.dtype),
        experts.dtype,
    )
    forwards = family_forward_over(experts.layers, table, experts.dtype)
    return [
        TorchLayer(layer, table.keys.key(layer, 0), views, *parts)
        for layer, parts in enumerate(zip(experts.math, _workspaces(experts), forwards, strict=True))
    ]


def _governor(asked: EngineConfig, experts: ExpertSet) -> Governor | None:
    """Make a governor where prefetches change only the time, and their width was not asked for; else None.

    Under other policies, prefetches decide what is resident, and so the output, which must not depend on the clock.
    """
    is_exact = Policy.parse(asked.policy).is_exact
    if not asked.governor or asked.prefetch_width is not None or not is_exact or asked.deterministic:
        return None
    is_large = max(layer.layout.nbytes for layer in experts.table.layers) >= _LARGE_EXPERT_BYTES
    return Governor(trusted_steps=_TRUSTED_STEPS if is_large else 0)


def _workspaces(experts: ExpertSet) -> list[OneToken | None]:
    """Make each layer's buffers for a decode step, shared by layers of one shape; None where our kernels do not run."""
    shared: dict[tuple[int, int, int], OneToken] = {}
    workspaces: list[OneToken | None] = []
    for layer, described, entry in zip(experts.layers, experts.table.layers, experts.math, strict=True):
        if entry is None:
            workspaces.append(None)
            continue
        shape = (layer.top_k, *entry.widths([part.shape for part in described.layout.parts]))
        if shape not in shared:
            shared[shape] = OneToken(*shape, experts.dtype, experts.device)
        workspaces.append(shared[shape])
    return workspaces
