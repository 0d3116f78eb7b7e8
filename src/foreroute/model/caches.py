"""Which KV caches a model works with, and whether they can be continued and cut; and what else its calls take."""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, MoEModelOutput

# Name of the cache as an argument of generate() and of models, and in their output: transformers renamed it in 5.24,
# whose models take the old name too.
_OLD_NAME = "past_key_values"
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else _OLD_NAME

# A family that overrides these prepares inputs its own way, and needs generate()'s loop, which calls them per token.
_NOT_OVERRIDDEN = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_prepare_position_ids_for_generation",
    "_prepare_cache_for_generation",
    "_sample",
)
# These override one for images, or for what is no matter where a call gets positions and asks for its logits: on text
# that is given so they are as the others (tests/families/test_rows.py).
_ORDINARY_ON_TEXT = frozenset({"gemma4", "glm4v_moe", "nemotron_h", "phimoe", "qwen3_vl_moe"})
# Families with states whose code continues them by several tokens at once (tests/families/test_rows.py); others begin
# anew, and would be wrong without a word. Of older transformers none is known to.
_CONTINUE_STATES = frozenset({
    "bailing_hybrid", "granitemoehybrid", "inkling2_text", "inkling_text", "kimi_linear", "lara_mini", "lfm2_moe",
    "nemotron_h", "qwen3_5_moe_text", "qwen3_next", "zaya",
})  # fmt: skip
# A layer that keeps nothing; older transformers have none.
NoLayer: type = getattr(cache_utils, "DummyLayer", type("NoLayer", (), {}))
# Of the tokens in `grown_tensors`.
TOKEN_AXIS = -2
_ATTENTIONS = (DynamicLayer, DynamicSlidingWindowLayer)
_WITH_STATES = (
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
# Rotary embeddings whose frequencies depend on the length of the step's input.
_LENGTH_DEPENDENT_ROPES = frozenset({"dynamic", "longrope"})


def is_ordinary(model: PreTrainedModel) -> bool:
    """Whether the family prepares its forward's inputs in the standard way: token ids, positions and a cache."""
    cls = type(model)
    return all(getattr(cls, name, None) is getattr(GenerationMixin, name, None) for name in _NOT_OVERRIDDEN)


def is_ordinary_on_text(model: PreTrainedModel) -> bool:
    """Whether forwards that are given token ids, positions and a cache are all that the family needs for text."""
    return is_ordinary(model) or model.config.model_type in _ORDINARY_ON_TEXT


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument that passes a cache to generate() or to a model: `model(ids, **cache_argument(cache))`."""
    return {CACHE_NAME: cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None where the model keeps none."""
    return getattr(output, CACHE_NAME)


def encode(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    """Run the encoder of `model` on a prompt `ids` [rows, tokens]; its output, as `decoder_call` takes it."""
    return model.get_encoder()(input_ids=ids, return_dict=True)


def decoder_call(ids: torch.Tensor, encoded: Any) -> dict[str, Any]:
    """How an encoder-decoder is called for its decoder's tokens `ids` [rows, positions], the prompt being `encoded`."""
    return {"encoder_outputs": encoded, "decoder_input_ids": ids}


def one_decoded(model: PreTrainedModel, token: torch.Tensor) -> dict[str, Any]:
    """How `model` is called to decode `token` [1, 1] alone; an encoder-decoder with a prompt of one zero vector."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": token}
    prompt = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype, device=token.device)
    return decoder_call(token, MoEModelOutput(last_hidden_state=prompt))


def last_logits_only(model: PreTrainedModel) -> dict[str, Any]:
    """The argument for the last position's logits alone, as generate() gives it: a prompt's can be larger than `model`.

    Empty for a family that takes none.
    """
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Find the cache in a caller's keyword arguments, under any name that this transformers takes; None without one."""
    cache = arguments.get(CACHE_NAME)
    return arguments.get(_OLD_NAME) if cache is None else cache


def new_cache(model: PreTrainedModel) -> DynamicCache | None:
    """An empty cache of the class that generate() would make; None where the family uses its own class.

    None for encoder-decoders too: theirs holds the decoder's own keys and values, and those of the prompt.
    """
    if model.config.is_encoder_decoder:
        return None
    if "mamba" in type(model).__name__.lower() or not model._supports_default_dynamic_cache():
        return None
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def can_be_continued(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether several tokens may follow those in `cache`: fixed positions in `model`, all cache layers known."""
    config = model.config.get_text_config(decoder=True)
    if _has_linear_states(cache) and (config.model_type not in _CONTINUE_STATES or CACHE_NAME == _OLD_NAME):
        return False
    return has_fixed_rows(model, cache)


def has_fixed_rows(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether what a row of `cache` holds does not depend on other rows: fixed positions, all cache layers known."""
    config = model.config.get_text_config(decoder=True)
    are_known = bool(cache.layers) and all(map(is_known, cache.layers))
    return are_known and not _turn_by_length(getattr(config, "rope_parameters", None))


def is_known(layer: Any) -> bool:
    """Whether a cache layer is of a kind whose tensors are known, so that it can be kept and continued."""
    return type(layer) in (*_ATTENTIONS, *_WITH_STATES, NoLayer)


def grown_tensors(layer: Any) -> tuple[str, ...]:
    """The names of a cache layer's tensors [rows, heads, tokens, size] that get longer by each token."""
    is_growing = isinstance(layer, DynamicLayer) and not isinstance(layer, DynamicSlidingWindowLayer)
    return ("keys", "values") if is_growing else ()


def has_state(layer: Any) -> bool:
    """Whether a layer has a state that does not grow with the tokens: the latest of a window, or of all of them."""
    return isinstance(layer, (DynamicSlidingWindowLayer, LinearAttentionLayer))


def linear_state_bytes(layer: Any) -> int:
    """Bytes of a layer's states of linear attention, a convolution or Mamba."""
    states = [*vars(layer).get("conv_states", {}).values(), *vars(layer).get("recurrent_states", {}).values()]
    return sum(one.nbytes for one in states if one is not None)


def has_linear_states(model: PreTrainedModel) -> bool:
    """Whether a model's cache has states of linear attention, convolutions or Mamba, which padding must not reach."""
    cache = new_cache(model)
    return cache is not None and _has_linear_states(cache)


def _has_linear_states(cache: DynamicCache) -> bool:
    return any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers)


def needs_state(model: PreTrainedModel) -> bool:
    """Whether a model's cache can be continued only where its state was kept (see `has_state`)."""
    cache = new_cache(model)
    return cache is not None and any(map(has_state, cache.layers))


def only_windows(model: PreTrainedModel) -> bool:
    """Whether all states of a model's cache are sliding windows, which can be cut while they hold more than is seen."""
    return not has_linear_states(model)


def can_be_cut(cache: DynamicCache) -> bool:
    """Whether the last tokens can be removed: none has left a sliding window."""
    return all(
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() < layer.sliding_window)
        for layer in cache.layers
    )


def _turn_by_length(parameters: Any) -> bool:
    """Whether positions depend on how long the text is; some families nest the parameters by kind of layer."""
    if not isinstance(parameters, dict):
        return False
    if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPES:
        short = parameters.get("short_factor")
        return short is None or short != parameters.get("long_factor")
    return any(_turn_by_length(value) for value in parameters.values())
