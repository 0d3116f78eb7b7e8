"""The vocabulary in a GGUF file's metadata: tokens, their kinds, tokens with a role, chat templates."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeGuard

from foreroute.checkpoint.gguf_file import GgufIndex, read_array
from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError
from foreroute.model.tokenizer_files import check_template

# llama.cpp's kinds of tokens (enum llama_token_type).
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
_ADDED = (UNKNOWN, CONTROL, USER_DEFINED)
# What to do where a file's own tokenizer does not do.
ADVICE = "Put the model's tokenizer.json and tokenizer_config.json beside it: they are read first."
_PREFIX = "tokenizer.ggml."
# By transformers' name; "seperator" is llama.cpp's spelling.
_ROLES: Mapping[str, str] = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id", "sep_token": "seperator_token_id", "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}  # fmt: skip
# Ids that llama.cpp takes where none is said (llama_vocab::impl::load), by the kind of vocabulary.
_USUAL: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos_token": 1, "eos_token": 2, "unk_token": 0},
    "bert": {"bos_token": 101, "unk_token": 100, "sep_token": 102, "pad_token": 0, "mask_token": 103},
}
_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of one GGUF file.

    index: the file. kind: llama.cpp's name of the algorithm ("gpt2", "llama", "bert" ...). tokens: the texts, by id.
    types: their kinds, by id. marks: tokens that the file gives a role, by transformers' name of it ("eos_token" ...).
    roles: those of `marks` that are no text: some converters say id 0 where there is none, and that may be "!".
    """

    index: GgufIndex
    kind: str
    tokens: list[str]
    types: list[int]
    marks: Mapping[str, str]
    roles: Mapping[str, str]

    @classmethod
    def read(cls, index: GgufIndex) -> "Vocabulary":
        """Read it. Cost: 50 ms for 100,000 tokens.

        Raises:
            CheckpointError: there is none. CorruptCheckpointError: it contradicts itself.
        """
        kind = index.settings.get(f"{_PREFIX}model")
        tokens = read_array(index, f"{_PREFIX}tokens")
        if not isinstance(kind, str) or not tokens:
            raise CheckpointError(f"{index.folder} has no tokenizer. {ADVICE}")
        # As llama.cpp names them.
        tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
        if not all(isinstance(token, str) for token in tokens) or len(set(tokens)) != len(tokens):
            raise CorruptCheckpointError(f"{index.folder}: a token is listed twice, or is no text. Download it again.")
        given = _as_many(index, "token_type", len(tokens))
        types = [1] * len(tokens) if given is None else list(given)
        file = cls(index, kind, tokens, types, {}, {})
        marks, roles = dict[str, str](), dict[str, str]()
        for role, name in _ROLES.items():
            said, usual = file.get(name), _USUAL.get(kind, {}).get(role)
            if said is None and _is_id(usual, tokens) and types[usual] in _ADDED:
                said = usual
            # An id out of range is an old converter's way to say that there is none.
            if not _is_id(said, tokens):
                continue
            marks[role] = tokens[said]
            if given is None:
                types[said] = CONTROL
            if types[said] in _ADDED:
                roles[role] = tokens[said]
        return cls(index, kind, tokens, types, marks, roles)

    def get(self, name: str, default: Any = None) -> Any:
        """What the metadata say of `name` of the tokenizer."""
        return self.index.settings.get(f"{_PREFIX}{name}", default)

    def array(self, name: str) -> list[Any] | None:
        """The list `name` of the tokenizer; None where there is none."""
        return read_array(self.index, f"{_PREFIX}{name}")

    def scores(self) -> list[float]:
        """A number for each token: of two pairs the one that makes the token with the greater one is merged first.

        Raises:
            CorruptCheckpointError: there are none, or not as many as tokens, or one is no number.
        """
        scores = _as_many(self.index, "scores", len(self.tokens))
        if scores is None or not all(map(isfinite, scores)):
            raise CorruptCheckpointError(
                f"{self.index.folder} has no {_PREFIX}scores, or one that is no number. {ADVICE}"
            )
        return scores

    def adds(self, name: str, default: bool) -> bool:
        """Whether `name` is on: add_bos_token, add_space_prefix ..."""
        found = self.get(name, default)
        if not isinstance(found, bool):
            raise CorruptCheckpointError(f"{self.index.folder}: {_PREFIX}{name} is {found!r:.40}, not true or false.")
        return found

    def ids(self) -> dict[str, int]:
        """Id of each token that a text may have: those that are not used are left out, as in the model's own files."""
        return {
            token: at for at, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)) if kind != UNUSED
        }

    def added(self) -> Iterator[tuple[str, int, bool]]:
        """Tokens that are found in a text before it is split: text, id, and whether it is left out of what is shown."""
        for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in _ADDED:
                yield token, number, kind != USER_DEFINED

    def templates(self) -> dict[str, str]:
        """The chat templates by name; the one without a name is "default".

        Raises:
            CorruptCheckpointError: one does not parse.
        """
        found = {}
        for name, text in self.index.settings.items():
            if name == _TEMPLATE or name.startswith(f"{_TEMPLATE}."):
                if not isinstance(text, str):
                    raise CorruptCheckpointError(f"{self.index.folder}: {name} is {text!r:.40}, not a text.")
                check_template(text, f"{self.index.folder}: {name}")
                found[name.removeprefix(_TEMPLATE).removeprefix(".") or "default"] = text
        return found

    def refused(self, what: str) -> UnsupportedModelError:
        """An error about what the file says of its tokenizer."""
        return UnsupportedModelError(f"{self.index.folder}: {what}. {ADVICE}")


def _is_id(number: Any, tokens: list[str]) -> TypeGuard[int]:
    return type(number) is int and 0 <= number < len(tokens)


def _as_many(index: GgufIndex, name: str, count: int) -> list[Any] | None:
    found = read_array(index, f"{_PREFIX}{name}")
    # llama.cpp accepts more, and does not look at them.
    if found is not None and (len(found) < count or not all(isinstance(one, int | float) for one in found)):
        raise CorruptCheckpointError(
            f"{index.folder}: {_PREFIX}{name} has {len(found)} numbers, or not only such, for {count} tokens. "
            "Download it again."
        )
    return found and found[:count]
