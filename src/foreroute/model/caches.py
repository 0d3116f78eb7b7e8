"""Which caches of keys and values a model works with, and what may be done with them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

# Its name among the arguments of generate() and of a model, and in a model's output: transformers renamed it in 5.24,
# and a model of it takes the old name too.
_OLD_NAME = "past_key_values"
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else _OLD_NAME

# A family that prepares its inputs in its own way needs generate()'s loop, which asks it to before every token.
_NOT_OVERRIDDEN = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_prepare_position_ids_for_generation",
    "_prepare_cache_for_generation",
    "_sample",
)
# Rotary embeddings whose frequencies depend on the length of what is computed at once.
_LENGTH_DEPENDENT_ROPES = frozenset({"dynamic", "longrope"})


def is_ordinary(model: Any) -> bool:
    """Whether the family prepares what its forward is given as all do: token ids, positions and a cache."""
    cls = type(model)
    return all(getattr(cls, name, None) is getattr(GenerationMixin, name, None) for name in _NOT_OVERRIDDEN)


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands the cache to generate() or to a model: `model(ids, **cache_argument(cache))`."""
    return {CACHE_NAME: cache}


def cache_of(output: Any) -> Any:
    """The cache that a model's output holds; None where the model keeps none."""
    return getattr(output, CACHE_NAME)


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a caller's keyword arguments, under any name that this transformers takes; None without one."""
    cache = arguments.get(CACHE_NAME)
    return arguments.get(_OLD_NAME) if cache is None else cache


def new_cache(model: Any) -> DynamicCache | None:
    """An empty cache of the class that generate() would make; None where the family has one of its own."""
    if "mamba" in type(model).__name__.lower() or not model._supports_default_dynamic_cache():
        return None
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def can_be_continued(model: Any, cache: DynamicCache) -> bool:
    """Whether several tokens may follow what the cache holds: all its layers are known, and positions are fixed."""
    config = model.config.get_text_config(decoder=True)
    ropes = _rope_types(getattr(config, "rope_parameters", None))
    is_known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return is_known and bool(cache.layers) and not ropes & _LENGTH_DEPENDENT_ROPES


def can_be_cut(cache: DynamicCache) -> bool:
    """Whether its last tokens can be taken away: nothing has left a sliding window."""
    return all(
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() < layer.sliding_window)
        for layer in cache.layers
    )


def _rope_types(parameters: Any) -> set[str]:
    """Every `rope_type` in the parameters, which some families nest by kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    found = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    return found.union(*(_rope_types(value) for value in parameters.values()))
