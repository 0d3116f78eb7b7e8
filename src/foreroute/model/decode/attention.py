"""Attention of one new token in one pass over the KV cache, where a model's bits need not be transformers'.

One operation of ggml's: transformers' own functions copy keys and values that heads share for each head (eager), or
walk them once per head (sdpa on a CPU), as torch operations with two threads that have to be woken in every layer.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any, Literal

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from foreroute.kernels.ggml.decoder.attention import TokenAttention
from foreroute.kernels.ggml.graph import Runner
from foreroute.model.caches import new_cache

# transformers' names of the functions that this replaces -> ours.
_NAMES = {"sdpa": "foreroute_sdpa", "eager": "foreroute_eager"}
_OF_TOKEN = "_foreroute_of_token"

# How a prompt's attention is computed: its context and itself apart; some tokens at a time; or by the family's own
# function, with a mask, and with all products of all heads written where that function is no `PRODUCTS`.
PromptAttention = Literal["joined", "blocks", "masked", "written"]
# Names of attention functions that are torch's scaled_dot_product_attention where several tokens attend.
PRODUCTS = ("sdpa", "foreroute_sdpa")
# What attention of a prompt takes where the products of all heads are written, in copies of float32; more where the
# fewest tokens of a block take more. Keys and values are copied for each block: with 16 tokens over 8,192 of gpt-oss
# that took half as long again as all tokens at once, with 32 as long.
BLOCK_BYTES = 64 * 2**20
_COPIES, _LEAST_BLOCK = 4, 32
# Attention to other tokens than all before, or a window of them.
_OTHER_KINDS = frozenset({"chunked_attention"})

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def group_heads(model: PreTrainedModel, runner: Runner) -> None:
    """Replace the attention function of `model`, while one token is decoded; otherwise it is transformers' own.

    A model whose attentions do not ask transformers' interface by one config keeps what it has.

    Args:
        runner: computes it.
    """
    config = model.config.get_text_config(decoder=True)
    own = config._attn_implementation
    if own not in _NAMES or not attends_by_interface(model):
        return
    of_token = TokenAttention(runner)
    for module in _attentions(model):
        # transformers' interface has one function of a name for all models: what is this model's is at its modules.
        module.__dict__[_OF_TOKEN] = of_token

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        mask = attention_mask  # some families (afmoe) name it when they call
        if not _can_group(module, query, key, mask, kwargs, own):
            return function_of(module, own)(module, query, key, value, mask, **kwargs)
        of_token = module.__dict__[_OF_TOKEN]
        if module.layer_idx == 0:
            of_token.begin_step()
        if not of_token.takes(query, key, value, mask):
            return function_of(module, own)(module, query, key, value, mask, **kwargs)
        return of_token(query, key, value, mask, kwargs["scaling"], None if own == "sdpa" else module.sinks), None

    AttentionInterface.register(_NAMES[own], attend)
    AttentionMaskInterface.register(_NAMES[own], partial(_mask, sdpa_mask if own == "sdpa" else eager_mask))
    config._attn_implementation = _NAMES[own]


def _mask(
    own: Callable[..., torch.Tensor | None],
    *,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    config: Any = None,
    **others: Any,
) -> torch.Tensor | None:
    """What transformers' function `own` makes; nothing for one token per row that sees all that its cache returns.

    Such masks took 1 ms of a token of gpt-oss, and hid nothing. `attention_mask` [rows, tokens] is the padding's.
    """
    # A window's cache returns no more than its tokens; a chunk's may return some of the chunk before.
    sees_window = local_size is None or kv_length <= local_size
    is_window = getattr(config, "attention_chunk_size", None) is None
    # transformers takes a shorter one's missing tokens for padding.
    end = kv_length + int(others.get("kv_offset", 0))
    is_whole = attention_mask is None or (
        attention_mask.ndim == 2 and attention_mask.shape[-1] >= end and bool(attention_mask.all())
    )
    if q_length == 1 and allow_is_causal_skip and sees_window and is_window and is_whole:
        return None
    return own(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        local_size=local_size,
        config=config,
        **others,
    )


def attends_by_interface(model: PreTrainedModel, num_attentions: int | None = None) -> bool:
    """Whether every attention of `model` asks transformers' interface for its function, by one config.

    num_attentions: layers with one; None: all of them.
    """
    config = model.config.get_text_config(decoder=True)
    attentions = _attentions(model)
    wanted = config.num_hidden_layers if num_attentions is None else num_attentions
    is_one = len(attentions) == wanted and all(one.config is config for one in attentions)
    is_known = config._attn_implementation in (*_NAMES, *_NAMES.values())
    return is_one and is_known and all(_asks(one) for one in attentions) and not _depends_on_names(model)


def attends_in_chunks(model: PreTrainedModel) -> bool:
    """Whether a prompt's attention can be computed by chunks on a CPU, without the family's own masks.

    Then every layer sees all that is before a token, or a window of it, as its cache says.
    """
    cache = new_cache(model)
    if cache is None or model.device.type != "cpu":
        return False
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    held = sum(isinstance(layer, DynamicLayer) for layer in cache.layers)
    is_known = held > 0 and not kinds & _OTHER_KINDS and attends_by_interface(model, held)
    # Some attend to other things than tokens too (inkling2, to its layers' outputs).
    return is_known and sum(map(_calls_interface, model.modules())) == held


def prompt_attention(model: PreTrainedModel) -> PromptAttention:
    """How a prompt's attention is computed in the rows of a server."""
    config = model.config.get_text_config(decoder=True)
    is_product = config._attn_implementation in PRODUCTS
    if not attends_in_chunks(model):
        return "masked" if is_product else "written"
    sizes = getattr(config, "qk_head_dim", None), getattr(config, "v_head_dim", None)
    layers: list[Any] = getattr(new_cache(model), "layers", [])
    is_sliding = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
    return "joined" if is_product and sizes[0] == sizes[1] and not is_sliding else "blocks"


def heads_of(config: Any) -> tuple[int, int]:
    """The number of a text model's query heads, and the size of one."""
    heads = config.num_attention_heads
    if not isinstance(heads, int):  # of each layer
        heads = max(heads)
    sizes = (getattr(config, name, None) for name in ("qk_head_dim", "head_dim"))
    return heads, next((size for size in sizes if isinstance(size, int)), config.hidden_size // heads)


def tokens_of_block(heads: int, columns: int) -> int:
    """Tokens whose attention to `columns` others is computed at once, where all products of all heads are written."""
    return max(_LEAST_BLOCK, BLOCK_BYTES // (_COPIES * 4 * heads * columns))


def block_bytes(heads: int, columns: int) -> int:
    """Bytes of such a block at most."""
    return max(BLOCK_BYTES, _LEAST_BLOCK * _COPIES * 4 * heads * columns)


def _attentions(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "o_proj")]


def function_of(module: Any, name: str) -> AttentionFunction:
    """The attention function of this name, for the attention `module`."""
    if name == "eager":
        eager: AttentionFunction = sys.modules[type(module).__module__].eager_attention_forward
        return eager
    if name == "sdpa":
        return sdpa_attention_forward
    own: AttentionFunction = AttentionInterface()[name]
    return own


def sees_all(module: Any, mask: Any) -> bool:
    """Whether one row's new token sees all before it, and ggml's operation computes that here."""
    of_token: TokenAttention | None = module.__dict__.get(_OF_TOKEN)
    if of_token is None:
        return False
    # Otherwise the model asks for another function than `attend`, or `attend` for the family's.
    if module.config._attn_implementation != _NAMES["eager" if hasattr(module, "sinks") else "sdpa"]:
        return False
    if module.layer_idx == 0:
        of_token.begin_step()
    return mask is None or of_token.hides_nothing(mask)


def _asks(module: Any) -> bool:
    home = sys.modules[type(module).__module__]
    return hasattr(home, "eager_attention_forward") and hasattr(home, "ALL_ATTENTION_FUNCTIONS")


def _calls_interface(module: Any) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return inspect.isfunction(forward) and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _depends_on_names(model: PreTrainedModel) -> bool:
    """Whether code of the model's family does one thing or another by the name of the attention function.

    That of sparse attention does (DeepSeek-V3.2): under a name that it does not know, it would attend to all tokens.
    """
    home = type(model).__module__
    classes = {type(module) for module in model.modules() if type(module).__module__ == home}
    functions = [inspect.unwrap(one) for kind in classes for one in vars(kind).values() if inspect.isroutine(one)]
    return any(_has_names(one.__code__) for one in functions if inspect.isfunction(one))


def _has_names(code: CodeType) -> bool:
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and _has_names(constant):
            return True
        names = constant if isinstance(constant, tuple | frozenset) else (constant,)
        if any(name in _NAMES for name in names if isinstance(name, str)):
            return True
    return False


def _can_group(module: Any, query: torch.Tensor, key: torch.Tensor, mask: Any, kwargs: Any, own: str) -> bool:
    """Whether this is one token whose heads share keys, without what ggml's operation does not know."""
    is_plain = kwargs.get("softcap") is None and kwargs.get("position_bias") is None and "scaling" in kwargs
    is_one = query.shape[2] == 1 and query.shape[1] > key.shape[1]
    has_known_mask = mask is None or mask.shape[1] == 1
    return is_one and is_plain and has_known_mask and (own == "sdpa" or hasattr(module, "sinks"))
