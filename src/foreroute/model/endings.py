"""Find what ends an answer: end tokens, of which each of a checkpoint's files names only some, and stop strings.

generation_config.json and config.json name some, the tokenizer one (`eos_token`), a GGUF file up to three; and a chat
template ends the assistant's turn with one that may be named nowhere else. A model stops at all of them. The
tokenizer's files are read for these few tokens alone: making the tokenizer takes seconds where the vocabulary is large.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from transformers import PreTrainedModel

from foreroute.checkpoint.gguf_file import GgufIndex
from foreroute.errors import CheckpointError

_QUESTION, _ANSWER = "QUESTION", "ANSWER"
# Of a GGUF file: the end of the text, of a turn, of a message that calls a tool.
_GGUF_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Where tokenizer.json lists the added tokens, and more bytes than such a list has.
_ADDED, _MOST_LISTED = b'"added_tokens":', 2**22
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def complete_generation_config(model: PreTrainedModel, folder: Path, index: Any) -> None:
    """Complete `model.generation_config`: all end tokens, and use_cache on.

    A checkpoint that was saved in training says `use_cache: false`: each token would compute the whole text again.
    use_cache=False passed to generate() still works.

    Args:
        folder, index: the checkpoint, from `locate` and `read_index`.
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


def end_tokens(settings: Any) -> frozenset[int]:
    """Return the end tokens in these settings (a GenerationConfig)."""
    return frozenset(_ids(settings.eos_token_id))


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
    special = SpecialTokens.read(folder.parent if folder.is_file() else folder)
    named += special.ends(with_turns=with_turns)
    # A tokenizer may have tokens that the model lacks.
    return (token for token in named if 0 <= token < text_config.vocab_size)


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
