"""A router's weight whose products in a step of single tokens have the same bits in any company.

torch's product of one row is rounded otherwise than that of several; ggml's is not. In prompts torch multiplies: that
is quicker for many rows, and a prompt's bits depend on the pieces that it is computed in anyway.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from foreroute.kernels.ggml.linear import BlockGroup, BlockMatrix, BlockProducts


class RouterWeight(nn.Parameter):
    """A float32 weight [experts, hidden] that F.linear multiplies by ggml while tokens are decoded."""

    products: BlockProducts
    matrix: BlockMatrix
    group: BlockGroup
    # Inputs [rows, hidden] whose product with this weight is known, and the product.
    ready: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multiply by ggml where this is what F.linear was given as its weight; anything else is torch's."""
        with torch._C.DisableTorchFunctionSubclass():
            weight = args[1] if func is nn.functional.linear and len(args) > 1 else None
            if type(weight) is RouterWeight and weight.products.decodes() and not kwargs:
                return _product(weight, *args[:1], *args[2:])
            return func(*args, **(kwargs or {}))


def keep_router_alike(router: nn.Module, products: BlockProducts) -> None:
    """Replace the float32 matrices of `router`, a module that chooses experts, by `RouterWeight`s."""
    for module in router.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if parameter.ndim == 2 and parameter.dtype == torch.float32 and parameter.is_contiguous():
                kind = products.library.types["F32"]
                weight = RouterWeight(parameter.detach(), requires_grad=False)
                weight.products = products
                blocks = parameter.detach().view(torch.uint8)
                weight.matrix = BlockMatrix(kind, parameter.shape[1], blocks)
                weight.group = BlockGroup([weight.matrix])
                setattr(module, name, weight)


def _product(weight: RouterWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    ready, weight.ready = weight.ready, None
    if ready is not None and ready[0].data_ptr() == x.data_ptr() and ready[0].numel() == x.numel():
        product = ready[1]
    else:
        (product,) = weight.products(x.reshape(-1, x.shape[-1]).float().contiguous(), weight.group)
    if bias is not None:
        product = product + bias
    return product.view(*x.shape[:-1], product.shape[-1]).to(x.dtype)
