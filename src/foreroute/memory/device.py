"""Divide a GPU's memory between the dense part, buffers and experts; then move the dense part there."""

from typing import Any

import torch
from transformers import PreTrainedModel

from foreroute.checkpoint.codecs import orders_of
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.records import PackedStore
from foreroute.config import EngineConfig
from foreroute.errors import DeviceError
from foreroute.memory.device_budget import (
    DeviceNeeds,
    check_dense,
    choose_device_memory,
    choose_host_records,
    prefill_bytes,
)
from foreroute.memory.kv import kv_bytes_without_experts
from foreroute.model.expert_set import ExpertSet
from foreroute.transfer.memory import memory_of, out_of_memory_named
from foreroute.transfer.placing import LESS_MEMORY

# Tokens of KV cache that a GPU reserves memory for by default.
DEVICE_KV_TOKENS = 4096
# Rows of the largest decode graph (generation/graph_decoder.py).
MAX_GRAPH_ROWS = 8


def check_store(store: PackedStore | None, stored: str) -> None:
    """Check that the experts of `store` are in the codec `stored`, which a device can compute.

    Raises:
        DeviceError: they are quantised for the CPU, or laid out for its kernels.
    """
    if store is not None and orders_of(store.table):
        raise DeviceError(
            f"{store.path} has eight rows of a matrix side by side, for kernels of the CPU. Pack the model again with "
            "`foreroute pack --layout plain --force`, or use --packed no."
        )
    if store is not None and store.codec != stored:
        raise DeviceError(
            f"{store.codec} stores are computed by kernels of the CPU and are not supported yet with experts on a GPU. "
            "Use --packed no, or leave --device out."
        )


def check_room(device: torch.device, asked: EngineConfig, config: Any, dense_bytes: int) -> None:
    """Before any weight is read: check that everything but experts and KV cache, which is unknown yet, may fit.

    Args:
        device: the GPU. asked: the configuration. config: of the model. dense_bytes: of the dense part.
    Raises:
        DeviceError: it cannot.
    """
    text = config.get_text_config()
    chunk = prefill_bytes(asked.prefill_chunk, text.hidden_size, text.vocab_size, itemsize=2)
    check_dense(DeviceNeeds(dense_bytes, 0, chunk), *memory_of(device))


def choose_budget(device: torch.device, asked: EngineConfig, model: PreTrainedModel, experts: ExpertSet) -> int:
    """Bytes of `device` for `experts`, beside the dense part of `model` and all memory of computing, within `asked`.

    Raises:
        DeviceError, BudgetError: it does not fit.
    """
    text, itemsize = model.config.get_text_config(), experts.dtype.itemsize
    table = experts.table
    needs = DeviceNeeds(
        dense_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        kv_bytes=kv_bytes_without_experts(model, experts.layers)
        * (asked.kv_tokens or min(DEVICE_KV_TOKENS, _longest(text))),
        prefill_bytes=prefill_bytes(asked.prefill_chunk, text.hidden_size, text.vocab_size, itemsize),
        buffer_bytes=2 * table.num_experts * table.slot_bytes if asked.control == "device" else 0,
        max_rows=MAX_GRAPH_ROWS if asked.control == "device" else 0,
    )
    free_and_total = memory_of(device)
    return choose_device_memory(asked.memory, needs, *free_and_total, experts.total_bytes, experts.token_demand_bytes)


def move_dense(model: PreTrainedModel, device: torch.device) -> None:
    """Move the dense part of `model` to `device`.

    Raises:
        DeviceError: the allocation failed.
    """
    with out_of_memory_named("the dense weights", LESS_MEMORY):
        model.to(device)


def host_records(asked: EngineConfig, available_bytes: int, table: ExpertTable) -> int:
    """Experts of `table` to hold in host RAM (`available_bytes` free), as `asked`. Raises: `choose_host_records`'."""
    return choose_host_records(
        asked.host_memory,
        available_bytes,
        table.slot_bytes,
        table.total_slots,
        must_hold_all=asked.control == "device",
    )


def _longest(text_config: Any) -> int:
    return int(getattr(text_config, "max_position_embeddings", None) or 2**31)
