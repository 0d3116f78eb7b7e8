"""Several new tokens of one row, each with the bits that it has as the only one, as far as torch's products allow it.

Attention is computed token by token. Over the keys of all of them, with a mask, bits differ: sums are split by columns,
and a later token's are columns too. A call per token and layer takes some 20 us; there is no mask to make.

Routers that compute in float32 multiply token by token as well. torch's product of several rows in bfloat16 has mostly
the bits of one row, but not in float32; what a bfloat16 model rounds after its router can then differ in all its last
bit.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel

from foreroute.model.decode.attention import attends_by_interface, function_of

NAME = "foreroute_positions"
_KNOWN_KINDS = frozenset({"full_attention", "sliding_attention"})
# Per thread the name of the model's own attention: transformers' interface has one function of a name for all models.
_running = threading.local()


class PositionsAlike:
    """Replaces a model's own attention, and products of its routers, while several tokens of one row are computed.

    Args:
        model: one that `can_attend_by_position`. routers: those whose products torch computes.
    """

    def __init__(self, model: PreTrainedModel, routers: Sequence[nn.Module] = ()) -> None:
        self._config = model.config.get_text_config(decoder=True)
        self._own = self._config._attn_implementation
        self._routers = [(router.__dict__, _row_by_row(router)) for router in routers]
        AttentionInterface.register(NAME, attend)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, attention is computed token by token; no mask may be given. The caller has the model's lock."""
        _running.own = self._own
        before: list[Any] = [table.get("forward") for table, _ in self._routers]
        try:
            self._config._attn_implementation = NAME
            for table, forward in self._routers:
                table["forward"] = forward
            yield
        finally:
            self._config._attn_implementation = self._own
            for (table, _), own_forward in zip(self._routers, before, strict=True):
                if own_forward is None:
                    table.pop("forward", None)
                else:
                    table["forward"] = own_forward


class _RowByRow(TorchFunctionMode):
    """While active, F.linear multiplies the rows of a float32 input one by one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and args[0].dtype == torch.float32:
            x = args[0]
            rows = [F.linear(row, *args[1:], **(kwargs or {})) for row in x.reshape(-1, x.shape[-1]).split(1)]
            return torch.cat(rows).view(*x.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


def _row_by_row(router: nn.Module) -> Callable[..., Any]:
    own, mode = router.forward, _RowByRow()

    def forward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return own(*args, **kwargs)

    return forward


def can_attend_by_position(model: PreTrainedModel) -> bool:
    """Whether every attention of `model` asks transformers' interface, and sees all before it or a window of them."""
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    return not kinds - _KNOWN_KINDS and attends_by_interface(model)


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions: query [1, heads, positions, size]; keys, values [1, heads, tokens, size].

    The names of arguments are theirs: some families give the mask by name.
    """
    assert attention_mask is None, "attention token by token has no mask"
    own, count, window = function_of(module, _running.own), query.shape[2], kwargs.get("sliding_window")
    outs = []
    for at in range(count):
        end = key.shape[2] - count + at + 1
        start = max(0, end - window) if window else 0
        seen = slice(start, end)
        out, _ = own(module, query[:, :, at : at + 1], key[:, :, seen], value[:, :, seen], None, **kwargs)
        outs.append(out)
    return torch.cat(outs, 1), None
