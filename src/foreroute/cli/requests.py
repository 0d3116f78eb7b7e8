"""Plan requests that are answered together: their number, length and memory. For the commands that plan or serve."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.cli import options
from foreroute.config import EngineConfig
from foreroute.memory.serving_budget import ServingNeeds, choose_kv_tokens
from foreroute.units import format_memory

if TYPE_CHECKING:
    from argparse import _ArgumentGroup

    from foreroute.loading.offloaded_model import OffloadedModel

MAX_NUM_SEQS = 8
# Default length of a request where neither the user nor the model gives one.
_CONTEXT = 4096


def add_request_options(group: "_ArgumentGroup", max_num_seqs: int | None = MAX_NUM_SEQS) -> None:
    """Add --ctx-size and --max-num-seqs to `group`; max_num_seqs is the default, None to see if it was given."""
    group.add_argument(
        "--ctx-size", "--max-model-len", type=options.at_least(16), metavar="N",
        help="tokens of a request, prompt and answer (default: the model's)",
    )  # fmt: skip
    group.add_argument(
        "--max-num-seqs", type=options.at_least(1), default=max_num_seqs, metavar="N",
        help=f"most requests computed together, which share reads (default: {MAX_NUM_SEQS})",
    )  # fmt: skip


def with_room(folder: Path, config: EngineConfig, args: argparse.Namespace) -> tuple[EngineConfig, int]:
    """Reserve KV cache for requests to the model in `folder`, by `args`; return `config` and the tokens of a request.

    Raises:
        BudgetError: the context does not fit --kv-tokens. CheckpointError, UnsupportedModelError: no usable config.
    """
    from foreroute.model.config_file import read_config

    own = getattr(read_config(folder).get_text_config(), "max_position_embeddings", None)
    context = min(args.ctx_size or own or _CONTEXT, own or 2**31)
    kv_tokens = choose_kv_tokens(config.kv_tokens, context, args.max_num_seqs or MAX_NUM_SEQS)
    return replace(config, kv_tokens=kv_tokens), context


def needs_of(model: "OffloadedModel", context: int) -> ServingNeeds | None:
    """RAM that serving takes with a model from `with_room`, for requests of `context`; None for experts on a GPU."""
    from foreroute.batching.rows import why_not_batched
    from foreroute.memory.serving import serving_needs

    plan = model.foreroute.plan
    if plan.kv_bytes_per_token is None:
        return None
    kv_tokens = min(plan.kv_tokens, context) if why_not_batched(model) else plan.kv_tokens
    residency = model.foreroute.host_engine.pool.residency
    return serving_needs(model, plan, model.foreroute.layers, residency, kv_tokens, context)


def in_words(needs: ServingNeeds) -> str:
    """Format the needs in one line."""
    return (
        f"at most {format_memory(needs.total_bytes, round_up=True)}: experts {format_memory(needs.expert_bytes)}, "
        f"dense {format_memory(needs.dense_bytes)}, KV {format_memory(needs.kv_bytes)}, earlier prompts "
        f"{format_memory(needs.kept_bytes)}, working memory {format_memory(needs.all_working_bytes)}"
    )


def as_json(needs: ServingNeeds) -> dict[str, Any]:
    """The needs as figures, sums included."""
    sums = ("kv_bytes", "kept_bytes", "all_working_bytes", "total_bytes")
    return asdict(needs) | {name: getattr(needs, name) for name in sums}
