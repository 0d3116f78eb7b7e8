"""What a checkpoint's files say about generating: what ends an answer, and whether the settings can be used.

generation_config.json and config.json name some end tokens, the tokenizer one (`eos_token`), a GGUF file up to three;
and a chat template ends the assistant's turn with one that may be named nowhere else. A model stops at all of them. The
tokenizer's files are read for these few tokens alone: making the tokenizer takes seconds where the vocabulary is large.

generation_config.json is checked before, as transformers ignores one that it cannot read.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from transformers import PreTrainedModel

from foreroute.checkpoint.gguf_file import GgufIndex
from foreroute.errors import CheckpointError, named
from foreroute.model.gguf.vocabulary import Vocabulary
from foreroute.whole_files import read_object

_QUESTION, _ANSWER = "QUESTION", "ANSWER"
# Of a GGUF file: the end of the text, of a turn, of a message that calls a tool.
_GGUF_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Where tokenizer.json lists the added tokens, and more bytes than such a list has.
_ADDED, _MOST_LISTED = b'"added_tokens":', 2**22
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")

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


def complete_generation_config(model: PreTrainedModel, folder: Path, index: Any) -> None:
    """Complete `model.generation_config`: all end tokens, and use_cache on.

    A checkpoint that was saved in training says `use_cache: false`: each token would compute the whole text again.
    use_cache=False passed to generate() still works.

    Args:
        folder, index: the checkpoint, from `locate` and `read_index`.
    Raises:
        CheckpointError: an id is none, or an encoder-decoder has no start token.
    """
    settings = model.generation_config
    said = _ids(settings.eos_token_id)
    # A list in generation_config.json was chosen: some models write a turn's end between the parts of one answer too.
    ends = list(dict.fromkeys([*said, *_ends_of_files(model.config, folder, index, with_turns=len(said) < 2)]))
    if ends != said:
        if settings.pad_token_id is None:
            # generate() would take it to pad ended rows, with a warning each time.
            settings.pad_token_id = ends[0]
        settings.eos_token_id = ends[0] if len(ends) == 1 else ends
    if settings.use_cache is False:
        settings.use_cache = True
    decoder_start(model)


def end_tokens(settings: Any) -> frozenset[int]:
    """Return the end tokens in these settings (a GenerationConfig)."""
    return frozenset(_ids(settings.eos_token_id))


def decoder_start(model: PreTrainedModel) -> int | None:
    """Return the token that the decoder of `model` begins with; None where it is no encoder-decoder.

    Raises:
        CheckpointError: its settings name none.
    """
    if not model.config.is_encoder_decoder:
        return None
    settings = model.generation_config
    named = (settings.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None))
    found = next((one for one in (*named, settings.bos_token_id) if one is not None), None)
    if not _is_id(found):
        raise CheckpointError(
            f"{model.config.model_type}: decoder_start_token_id is {found!r:.60}: nothing says which token the decoder "
            "begins with. Set it in generation_config.json (T5 and Switch Transformers: pad_token_id)."
        )
    return found


def stop_strings(settings: Any) -> tuple[str, ...]:
    """Return the stop strings in these settings (a GenerationConfig)."""
    said = settings.stop_strings or ()
    return tuple(one for one in ((said,) if isinstance(said, str) else said) if one)


def _ends_of_files(config: Any, folder: Path, index: Any, *, with_turns: bool) -> Iterator[int]:
    text_config = config.get_text_config()
    named = [*_ids(getattr(config, "eos_token_id", None)), *_ids(getattr(text_config, "eos_token_id", None))]
    if isinstance(index, GgufIndex):
        for name in _GGUF_ENDS:
            named += _ids(index.settings.get(f"tokenizer.ggml.{name}"))
    special = _special_tokens(folder, index)
    named += special.ends(with_turns=with_turns)
    # A tokenizer may have tokens that the model lacks.
    return (token for token in named if 0 <= token < text_config.vocab_size)


def _special_tokens(folder: Path, index: Any) -> "SpecialTokens":
    """Those of the tokenizer that `load_tokenizer` takes, to which what cannot be read is left."""
    beside = folder.parent if folder.is_file() else folder
    if isinstance(index, GgufIndex) and not (beside / "tokenizer.json").is_file():
        with suppress(CheckpointError):
            vocabulary = Vocabulary.read(index)
            ids = {token: number for token, number, _ in vocabulary.added()}
            return SpecialTokens(ids, vocabulary.roles, vocabulary.templates().get("default"))
    return SpecialTokens.read(beside)


def _ids(said: Any) -> list[int]:
    found = [] if said is None else list(said) if isinstance(said, list | tuple) else [said]
    if not all(_is_id(one) for one in found):
        raise CheckpointError(
            f"eos_token_id of the model's settings is {said!r:.60}; it must be an id or a list of ids."
        )
    return found


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class SpecialTokens:
    """A tokenizer's special tokens, from its files.

    ids: of each added token. named: the tokens that have a role: "eos_token", ... template: for chats, if there is one.
    """

    ids: Mapping[str, int]
    named: Mapping[str, str]
    template: str | None

    @classmethod
    def read(cls, folder: Path) -> "SpecialTokens":
        """Read those of the tokenizer in `folder`; absent or unreadable files are left to `load_tokenizer`."""
        config = {**_object(folder / "special_tokens_map.json"), **_object(folder / "tokenizer_config.json")}
        named = {name: token for name in _NAMED if (token := _content(config.get(name)))}
        ids = dict(_added(folder))
        eos = named.get("eos_token")
        if eos is not None and eos not in ids:
            # An ordinary entry of the vocabulary.
            model = _object(folder / "tokenizer.json").get("model")
            vocabulary = model.get("vocab") if isinstance(model, dict) else None
            found = vocabulary.get(eos) if isinstance(vocabulary, dict) else None
            ids.update({eos: found} if _is_id(found) else {})
        return cls(ids, named, _template(folder, config))

    def ends(self, *, with_turns: bool = True) -> list[int]:
        """Return the end tokens: the one named so and, `with_turns`, the one that ends a turn."""
        found = [self.ids.get(self.named.get("eos_token", "")), self._turn_end() if with_turns else None]
        return [token for token in found if token is not None]

    def _turn_end(self) -> int | None:
        """Return the token after the assistant's message, in a chat that ends with one.

        If there is none, the one before the next turn. In this order, as gpt-oss ends past turns with a token that in
        an answer separates its parts.
        """
        chat = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        for messages in (chat, [*chat, chat[0]]):
            behind = self._behind_answer(messages)
            token = max((one for one in self.ids if one and behind.startswith(one)), key=len, default=None)
            if token is not None:
                begins = token in (self.named.get("bos_token"), self.named.get("unk_token"))
                return None if begins else self.ids[token]
        return None

    def _behind_answer(self, messages: list[dict[str, str]]) -> str:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        if self.template is None:
            return ""
        try:
            # Without a vocabulary: it puts the text together, and no tokens are asked of it.
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **self.named)
            text: str = tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False)
        except Exception:  # noqa: BLE001  a template that refuses this chat just names no end
            return ""
        return text.rpartition(_ANSWER)[2].lstrip()


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _added(folder: Path) -> Iterator[tuple[str, int]]:
    """Return every added token and its id. Of tokenizer.json only their list is parsed, as the vocabulary is large."""
    yield from ((token, number) for token, number in _object(folder / "added_tokens.json").items() if _is_id(number))
    decoder = _object(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if number.isdecimal() and len(number) < 20 and (token := _content(entry)):
            yield token, int(number)
    try:
        raw = (folder / "tokenizer.json").read_bytes()
        listed = raw[raw.find(_ADDED) + len(_ADDED) :][:_MOST_LISTED].decode(errors="replace").lstrip()
        entries = json.JSONDecoder().raw_decode(listed)[0] if _ADDED in raw else []
    except (OSError, ValueError, RecursionError):
        return
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and (token := _content(entry)) and _is_id(entry.get("id")):
            yield token, entry["id"]


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError):
        found = config.get("chat_template")
    if isinstance(found, list):
        named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None


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
