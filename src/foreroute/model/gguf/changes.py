"""How a dense parameter is made of stored tensors where llama.cpp's converter did more than rename it: undo that.

`config` is transformers' config of the model. Those that only move or join rows do so with rows of blocks, too; and
those that move columns, if no block is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TensorChange:
    """What has to be done to stored tensors.

    make: their numbers (or rows, see `of_rows`) and the config -> the parameter's.
    stored: names of the tensors within their block; empty for the one that the gguf package's map names.
    of_rows: rows are moved or joined, and stay as they are. of_columns: columns are moved, in as many equal parts as
        this setting says.
    """

    make: Callable[[Sequence[torch.Tensor], Any], torch.Tensor]
    stored: tuple[str, ...] = ()
    of_rows: bool = False
    of_columns: str = ""


def _unpermuted(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a head whose halves alternate -> one half after the other."""
    shape = (num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return rows.reshape(shape).transpose(1, 2).reshape(rows.shape)


def _grouped(rows: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of value heads [round, key head], as many of each -> those of a key head together."""
    heads = config.linear_num_key_heads
    shape = (config.linear_num_value_heads // heads, heads, -1, *rows.shape[1:])
    return rows.reshape(shape).transpose(0, 1).reshape(rows.shape)


def _grouped_values(rows: torch.Tensor, config: Any) -> torch.Tensor:
    """The same for the values behind queries and keys."""
    first = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return torch.cat((rows[:first], _grouped(rows[first:], config)))


def _qkvz(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Queries, keys and values of all heads, and gates -> all four of each key head."""
    heads, width = config.linear_num_key_heads, config.linear_key_head_dim
    qkv, gates = tensors
    parts = (*qkv.split((heads * width, heads * width, len(qkv) - 2 * heads * width)), gates)
    by_head = [part.reshape(heads, -1, qkv.shape[1]) for part in parts]
    return torch.cat(by_head, 1).reshape(-1, qkv.shape[1])


def _kv_b(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Keys [heads, rank, width] and values [heads, width, rank] -> [heads * (both widths), rank]."""
    keys, values = tensors
    return torch.cat((keys.transpose(1, 2), values), 1).reshape(-1, values.shape[-1])


QUERIES = TensorChange(lambda t, config: _unpermuted(t[0], config.num_attention_heads), of_rows=True)
KEYS = TensorChange(lambda t, config: _unpermuted(t[0], config.num_key_value_heads), of_rows=True)
SHARED_GATE_UP = TensorChange(lambda t, _: torch.cat([*t]), ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), True)
SPLIT_KV_B = TensorChange(_kv_b, ("attn_k_b.weight", "attn_v_b.weight"))
LOG_DECAY = TensorChange(lambda t, _: torch.log(-t[0]))
NORM_PLUS_ONE = TensorChange(lambda t, _: t[0] - 1)
QKVZ = TensorChange(_qkvz, ("attn_qkv.weight", "attn_gate.weight"), of_rows=True)
VALUE_LOG_DECAY = TensorChange(lambda t, config: _grouped(torch.log(-t[0]), config))
VALUE_ROWS = TensorChange(lambda t, config: _grouped(t[0], config), of_rows=True)
VALUES_OF_QKV = TensorChange(lambda t, config: _grouped_values(t[0], config), of_rows=True)
VALUE_COLUMNS = TensorChange(lambda t, config: _grouped(t[0].t(), config).t(), of_columns="linear_num_value_heads")
ROUTER_SCALE = TensorChange(lambda t, _: t[0], ("ffn_gate_inp.scale",))
EXPERT_SCALES = TensorChange(lambda t, _: t[0], ("ffn_down_exps.scale",))
