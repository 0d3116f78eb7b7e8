"""Check generation_config.json, the settings of sampling and end tokens: transformers ignores one it cannot read."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from foreroute.errors import CheckpointError, named
from foreroute.whole_files import read_object

_WHOLE = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "decoder_start_token_id", "forced_bos_token_id",
    "prefill_chunk_size", "num_beam_groups", "max_cache_len",
})  # fmt: skip
_NUMBERS = frozenset({
    "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "length_penalty", "diversity_penalty", "guidance_scale", "max_time", "penalty_alpha",
})  # fmt: skip
_SWITCHES = frozenset({
    "do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "output_scores", "output_attentions",
    "output_hidden_states", "return_dict_in_generate", "token_healing",
})  # fmt: skip
_TOKENS = frozenset({"eos_token_id", "pad_token_id", "bos_token_id", "forced_eos_token_id"})
_TOKEN_LISTS = frozenset({"suppress_tokens", "begin_suppress_tokens"})
# Allowed ranges of settings that transformers would refuse only later, while answering.
_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1), "typical_p": (1e-9, 1), "top_h": (1e-9, 1),
    "top_k": (0, 2**31 - 1), "repetition_penalty": (1e-6, math.inf), "max_new_tokens": (1, math.inf),
    "min_length": (0, math.inf), "min_new_tokens": (0, math.inf), "num_beams": (1, 1000),
    "num_return_sequences": (1, 1000), "no_repeat_ngram_size": (0, 2**31 - 1),
}  # fmt: skip
# transformers refuses integers for these, except a neutral 0 or 1.
_WITH_A_POINT = frozenset({"temperature", "repetition_penalty", "encoder_repetition_penalty"})
# Ids go to an int64 tensor; -1 means "none" in some older files.
_LEAST_TOKEN, _MOST_TOKEN = -1, 2**31 - 1


def check_generation_settings(folder: Path) -> None:
    """Check that generation_config.json, if `folder` has one, is complete and has usable values.

    Raises:
        CorruptCheckpointError: it is truncated, a git-LFS pointer, or not a JSON object.
        CheckpointError: a setting has a meaningless value; file and key are named.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    settings = read_object(path)
    _check_values(settings, settings, path)
    with named(f"{path} is not accepted by transformers", CheckpointError):
        from transformers import GenerationConfig

        GenerationConfig.from_dict(settings)
        _try_processors(settings)
    if settings.get("do_sample") and settings.get("temperature") == 0:
        raise CheckpointError(f"{path}: do_sample is true and temperature is 0, which takes the likeliest token.")


def _try_processors(settings: Mapping[str, Any]) -> None:
    """Build what an answer builds from the settings, where the values are too many to check one by one."""
    from transformers.generation import logits_process

    makers: Mapping[str, Callable[[Any], Any]] = {
        "bad_words_ids": lambda value: logits_process.NoBadWordsLogitsProcessor(value, eos_token_id=None),
        "sequence_bias": logits_process.SequenceBiasLogitsProcessor,
        "exponential_decay_length_penalty": lambda value: logits_process.ExponentialDecayLengthPenalty(
            value, eos_token_id=0, input_ids_seq_length=1
        ),
    }
    for name in makers.keys() & settings.keys():
        if settings[name] is not None:
            makers[name](settings[name])


def check_token_ids(settings: Mapping[str, Any], path: Path) -> None:
    """Check that the begin and end tokens in `settings`, those of config.json at `path`, are token ids.

    Raises:
        CheckpointError: one is not; file and key are named.
    """
    _check_values(settings, _TOKENS & settings.keys(), path)


def _check_values(settings: Mapping[str, Any], names: Iterable[str], path: Path) -> None:
    for name in names:
        wanted = None if settings[name] is None else _wanted(name, settings[name])
        if wanted is not None:
            raise CheckpointError(f"{path}: {name} is {settings[name]!r:.60}; it must be {wanted}.")


def _wanted(name: str, value: Any) -> str | None:
    """What the value should be; None if it is valid."""
    kinds: tuple[tuple[frozenset[str], Callable[[Any], bool], str], ...] = (
        (_WHOLE, lambda one: type(one) is int, "a whole number"),
        (_NUMBERS, _is_number, "a number"),
        (_SWITCHES, lambda one: isinstance(one, bool), "true or false"),
        (_TOKENS, lambda one: _is_token(one) or _are_tokens(one), "a token's number, or a list of them"),
        (_TOKEN_LISTS, _are_tokens, "a list of tokens' numbers"),
    )
    for names, fits, wanted in kinds:
        if name in names and not fits(value):
            return wanted
    if name in _WITH_A_POINT and type(value) is int and value not in (0, 1):
        return f"written with a point ({value:.1f})"
    if name in _RANGES and not _RANGES[name][0] <= value <= _RANGES[name][1]:
        least, most = _RANGES[name]
        return f"at least {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _is_token(value: Any) -> bool:
    return type(value) is int and _LEAST_TOKEN <= value <= _MOST_TOKEN


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(_is_token(one) for one in value)
