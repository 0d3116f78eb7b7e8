"""The RAM that serving needs: its KV cache, measured by running the model, and the experts' budget beside it.

Families store keys and values in many ways: latent attention keeps one narrow vector per token, some layers have their
own head width, linear attention keeps a state that does not grow. No formula over a config was right for all families.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from foreroute.config import EngineConfig, Plan
from foreroute.memory.host import mappings
from foreroute.memory.serving_budget import (
    CHOSEN_RESERVE_BYTES,
    MOST_SCORED_WHOLE,
    ROWS_WITH_STATES,
    SCORED_AT_ONCE,
    ServingNeeds,
    activation_bytes,
    attention_bytes,
    check_serving,
    logit_bytes,
    moving_bytes,
    working_bytes,
)
from foreroute.model.blocks import MoeLayer
from foreroute.model.build.dense_blocks import dense_nbytes, dense_weights
from foreroute.model.caches import (
    CACHE_NAME,
    cache_of,
    can_be_continued,
    decoder_call,
    encode,
    has_linear_states,
    is_ordinary_on_text,
    linear_state_bytes,
    new_cache,
)
from foreroute.model.decode.attention import block_bytes, heads_of, prompt_attention
from foreroute.model.expert_set import ExpertSet
from foreroute.residency.sized import SizedResidency, parts_of
from foreroute.residency.slots import Residency
from foreroute.units import kept_bytes

_TOKEN = 1

# Loaded and made at first use, after a server is ready: one request of each kind of each API adds 35 MB (code, kernels,
# the pages of libraries), compiled grammars of agents' tools 13.
_FIRST_USE_BYTES = 48 * 2**20
# Tokens of KV cache allocated ahead of their use.
_COLUMNS_AHEAD = 1024


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes by which `model`'s cache grows per token and row, while no sliding window is full; 0 without growth.

    Two tokens' less one's: constant state does not count. Of an encoder-decoder, by a prompt's token or by an answer's,
    whichever takes more. Experts must be computable. Cost: two forward passes.
    """
    sizes = []
    with torch.no_grad():
        for num_tokens in (1, 2):
            ids = torch.full((1, num_tokens), _TOKEN, device=model.device)
            is_of_two = model.config.is_encoder_decoder
            given = decoder_call(ids, encode(model, ids)) if is_of_two else {"input_ids": ids}
            cache = getattr(model(**given, use_cache=True), CACHE_NAME, None)
            sizes.append([_held_bytes(one) for one in _parts(cache)])
    return max((two - one for one, two in zip(*sizes, strict=True)), default=0)


def _parts(cache: Any) -> Sequence[Any]:
    """The caches in one: an encoder-decoder has one for its own tokens and one for its prompt's."""
    if isinstance(cache, EncoderDecoderCache):
        return (cache.self_attention_cache, cache.cross_attention_cache)
    return (cache,)


def _held_bytes(cache: Any) -> int:
    held = [value for layer in getattr(cache, "layers", []) for value in vars(layer).values()]
    return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))


def state_bytes(model: PreTrainedModel) -> int:
    """Bytes of a row's states that do not grow, of linear attention, convolutions and Mamba. Cost: one forward pass."""
    if not has_linear_states(model):
        return 0
    with torch.no_grad():
        output = model(input_ids=torch.full((1, 1), _TOKEN, device=model.device), use_cache=True)
    return sum(map(linear_state_bytes, cache_of(output).layers))


def kv_bytes_without_experts(model: PreTrainedModel, layers: Sequence[MoeLayer]) -> int:
    """`kv_bytes_per_token` while `layers` of `model` compute no experts, which changes no cache size."""
    return _without_experts(model, layers, kv_bytes_per_token)


def state_bytes_without_experts(model: PreTrainedModel, layers: Sequence[MoeLayer]) -> int:
    """`state_bytes` while `layers` of `model` compute no experts, which changes no state's size."""
    return _without_experts(model, layers, state_bytes)


def _without_experts(
    model: PreTrainedModel, layers: Sequence[MoeLayer], measure: Callable[[PreTrainedModel], int]
) -> int:
    """Measure `model` while `layers` return zeros in place of their experts."""

    def nothing(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden)

    forwards = [layer.experts.engine_forward for layer in layers]
    for layer in layers:
        layer.experts.engine_forward = nothing
    try:
        return measure(model)
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.experts.engine_forward = forward


def planned_kv_bytes_per_token(model: PreTrainedModel, plan: Plan, layers: Sequence[MoeLayer]) -> int:
    """The value measured when `model` was loaded with kv_tokens, as its `plan` says, else measured now (see above)."""
    known = plan.kv_bytes_per_token
    return kv_bytes_without_experts(model, layers) if known is None else known


def draft_bytes_per_token(draft: PreTrainedModel) -> int:
    """Bytes per token and row of the cache that a model which drafts has of its own, also while a layer's share grows.

    Cost: two forward passes of `draft`.
    """
    each = kv_bytes_per_token(draft)
    return each + moving_bytes(each, draft.config.get_text_config().num_hidden_layers)


def keeps_prompts(model: PreTrainedModel) -> bool:
    """Whether `model`'s KV cache can be kept for later prompts, and its prompts be computed in chunks."""
    cache = new_cache(model)
    return cache is not None and is_ordinary_on_text(model) and can_be_continued(model, cache)


def fit_serving(
    asked: EngineConfig,
    model: PreTrainedModel,
    experts: ExpertSet,
    budget_bytes: int,
    free_ram_bytes: int,
    kv_bytes_per_token: int,
    host_bytes: int = 0,
    draft_bytes_per_token: int = 0,
) -> int:
    """The budget for `experts` of `model`, once the size of a KV cache of asked.kv_tokens tokens is known.

    Args:
        budget_bytes: as asked, or as chosen without a KV cache. kv_bytes_per_token: measured on the model.
        free_ram_bytes: before the dense part was read. host_bytes: experts in RAM behind the budget.
        draft_bytes_per_token: of a draft's own cache (see below).
    Returns:
        `budget_bytes` where it was asked for; else what is left.
    Raises:
        BudgetError: it does not fit together; names what to lower.
    """
    assert asked.kv_tokens is not None, "memory is to be kept"
    whole, least = experts.total_bytes, experts.token_demand_bytes
    # How long a request may be is not known here: as long as all of the cache.
    requests = _request_bytes(model, asked.prefill_chunk, asked.kv_tokens, kv_bytes_per_token, asked.kv_tokens)
    working = working_bytes(requests)
    if asked.memory is None:
        working = max(working, CHOSEN_RESERVE_BYTES)
    expert_bytes = min(budget_bytes, whole) + host_bytes
    kept = kept_bytes(asked.prefix_cache)
    states = state_bytes_without_experts(model, experts.layers)
    tokens = (asked.kv_tokens, kv_bytes_per_token, draft_bytes_per_token)
    needs = _needs(model, expert_bytes, tokens, working, dense_nbytes(model), kept, states)
    if asked.memory is None:
        budget_bytes = min(whole, max(0, free_ram_bytes - host_bytes - (needs.total_bytes - expert_bytes)))
        needs = replace(needs, expert_bytes=max(least, budget_bytes) + host_bytes)
    check_serving(needs, free_ram_bytes, least)
    return budget_bytes


def serving_needs(
    model: PreTrainedModel,
    plan: Plan,
    layers: Sequence[MoeLayer],
    residency: Residency | SizedResidency,
    kv_tokens: int,
    context: int | None = None,
) -> ServingNeeds:
    """RAM that serving `model` with a KV cache of `kv_tokens` tokens needs, most of which is allocated later.

    plan: what loading it decided. layers: its MoE layers. residency: which of its experts are in slots now.
    context: tokens of one request, at most; None: `kv_tokens`.
    Beside dense part, experts and KV cache that is what this process takes so far (Python, torch, other libraries),
    measured now, and what it will load at first use; and, calculated, the most that one chunk of a prompt takes.
    """
    per_token = planned_kv_bytes_per_token(model, plan, layers)
    requests = _request_bytes(model, plan.prefill_chunk, kv_tokens, per_token, min(context or kv_tokens, kv_tokens))
    working = _program_bytes(model, plan, residency) + _FIRST_USE_BYTES + requests
    states = state_bytes_without_experts(model, layers)
    experts = plan.pool_bytes + plan.host_records * plan.slot_bytes
    tokens = (kv_tokens, per_token, plan.draft_bytes_per_token)
    return _needs(model, experts, tokens, working, plan.dense_bytes, plan.prefix_cache, states)


def _needs(
    model: PreTrainedModel,
    experts: int,
    tokens: tuple[int, int, int],
    working: int,
    dense: int,
    kept: int | None,
    states: int,
) -> ServingNeeds:
    """The same, with the memory of computing per token.

    tokens: how many, and the bytes of each in the KV cache and in that of a draft.
    """
    kv_tokens, kv_bytes_per_token, draft_bytes_per_token = tokens
    text, keeps = model.config.get_text_config(), keeps_prompts(model)
    each = moving_bytes(kv_bytes_per_token, text.num_hidden_layers) + draft_bytes_per_token
    if not keeps:
        # The whole prompt is computed in one step.
        each += activation_bytes(1, text.hidden_size, model.dtype.itemsize)
    working += ROWS_WITH_STATES * states
    return ServingNeeds(dense, experts, kv_tokens, kv_bytes_per_token, working, keeps, each, kept, states)


def _request_bytes(model: PreTrainedModel, chunk: int, kv_tokens: int, kv_bytes_per_token: int, context: int) -> int:
    """Bytes of computing requests, beside their KV cache and what is counted per token (see _needs)."""
    text, itemsize = model.config.get_text_config(), model.dtype.itemsize
    ahead = _COLUMNS_AHEAD * kv_bytes_per_token
    if not keeps_prompts(model):
        return ahead + logit_bytes(min(kv_tokens, MOST_SCORED_WHOLE), text.vocab_size, itemsize)
    chunk = min(chunk, getattr(text, "max_position_embeddings", None) or chunk)
    scored = logit_bytes(min(chunk, SCORED_AT_ONCE), text.vocab_size, itemsize)
    return (
        ahead
        + max(activation_bytes(chunk, text.hidden_size, itemsize), _attention_bytes(model, chunk, context))
        + scored
    )


def _attention_bytes(model: PreTrainedModel, chunk: int, context: int) -> int:
    """Bytes of attention, which is computed at another time than the experts that `activation_bytes` is of."""
    text, itemsize = model.config.get_text_config(), model.dtype.itemsize
    heads, head_size = heads_of(text)
    context = min(context, getattr(text, "max_position_embeddings", None) or context)
    block = block_bytes(heads, context)
    return attention_bytes(prompt_attention(model), chunk, context, heads, head_size, itemsize, block)


def _program_bytes(model: PreTrainedModel, plan: Plan, residency: Residency | SizedResidency) -> int:
    """Bytes of this process in RAM that are neither dense weights nor experts.

    Dense weights may be pages of the checkpoint's files, in RAM once they have been used.
    """
    place = Path(plan.folder)
    # The hub cache's folders hold links.
    paths = {str(path.resolve()) for path in (place.iterdir() if place.is_dir() else [place])}
    everything = list(mappings())
    files = [mapping.addresses for mapping in everything if mapping.path in paths]
    resident = sum(mapping.resident_bytes for mapping in everything if mapping.path not in paths)
    own = sum(
        tensor.nbytes
        for _, tensor in dense_weights(model)
        if not any(tensor.data_ptr() in addresses for addresses in files)
    )
    parts = parts_of(residency)
    slots = sum(part.num_resident * length for part, (length, _) in zip(parts, plan.slot_classes, strict=True))
    return max(0, resident - own - slots - plan.host_records * plan.slot_bytes)
