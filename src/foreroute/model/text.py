"""Convert between text and tokens: a model's tokenizer, prompts, whole characters from tokens, stop strings."""

from collections.abc import Collection, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from foreroute.checkpoint.gguf_file import is_gguf, read_gguf
from foreroute.errors import CheckpointError, PromptError, named
from foreroute.model.config_file import read_config
from foreroute.model.gguf.tokenizer import gguf_tokenizer
from foreroute.model.tokenizer_files import check_tokenizer_files, check_vocabulary, default_template, has_tokenizer

_FILES = "tokenizer.json, tokenizer_config.json"
_REPLACEMENT = "\ufffd"


def load_tokenizer(folder: str | Path) -> Any:
    """Load transformers' tokenizer of the checkpoint in `folder`; no remote code is run.

    Raises:
        CheckpointError: there is none; or config.json, which names its class, is not a config.
        CorruptCheckpointError: it cannot be read.
    """
    path = Path(folder)
    if is_gguf(path):
        tokenizer = _gguf_tokenizer(path)
    elif path.is_dir():
        tokenizer = _tokenizer_in(path)
    else:
        tokenizer = _from_pretrained(str(folder))
    with named(f"{folder}: its tokenizer ({_FILES}) cannot encode a text"):
        is_empty = not tokenizer.encode("a", add_special_tokens=False)
    if is_empty:
        raise _no_tokenizer(folder)
    return tokenizer


def _tokenizer_in(folder: Path) -> Any:
    # First, as transformers looks there for the tokenizer's class.
    config = read_config(folder) if (folder / "config.json").is_file() else None
    if not has_tokenizer(folder):
        raise _no_tokenizer(folder)
    check_tokenizer_files(folder)
    return _from_pretrained(str(folder), config=config)


def _no_tokenizer(folder: str | Path) -> CheckpointError:
    return CheckpointError(f"{folder} has no tokenizer (tokenizer.json). Get it from where the weights came from.")


def _from_pretrained(folder: str, **settings: Any) -> Any:
    from transformers import AutoTokenizer

    with named(f"{folder} has no tokenizer that transformers can read ({_FILES})"):
        try:
            # False, not left out: transformers would ask on the terminal whether code of the folder may be run.
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **settings)
        except Exception:
            # This one of the two files is damaged more often; then the message names it alone.
            check_vocabulary(Path(folder) / "tokenizer.json")
            raise


def _gguf_tokenizer(path: Path) -> Any:
    """Load the tokenizer in the file's folder, or else make it of the file's metadata."""
    index = read_gguf(path)
    if (path.parent / "tokenizer.json").is_file():
        tokenizer, whose = _tokenizer_in(path.parent), f"tokenizer.json in {path.parent} is another model's."
    else:
        tokenizer, whose = gguf_tokenizer(index), "Download it again."
    vocabulary = read_config(path).vocab_size
    if not 0 < max(tokenizer.get_vocab().values(), default=-1) < vocabulary:
        raise CheckpointError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}. {whose}")
    return tokenizer


def sentinels(tokenizer: Any) -> tuple[int, ...]:
    """The ids of `<extra_id_0>`, `<extra_id_1>` ..., which stand for gaps in a text; empty without any."""
    if tokenizer not in _SENTINELS:
        found: list[int] = []
        vocabulary = tokenizer.get_vocab()
        while (name := f"<extra_id_{len(found)}>") in vocabulary:
            found.append(vocabulary[name])
        _SENTINELS[tokenizer] = tuple(found)
    return _SENTINELS[tokenizer]


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool | None = None, system: str | None = None) -> torch.Tensor:
    """Encode a prompt to tokens [1, tokens].

    Args:
        chat: put the prompt into the model's chat template; None does so when it has one.
        system: the chat's system message.
    Raises:
        PromptError: empty; a chat without a template; a template that refuses the messages.
    """
    if not prompt:
        raise PromptError("The prompt is empty: there is no token to start from.")
    has_template = chat is not False and default_template(tokenizer) is not None
    if chat and not has_template:
        raise PromptError("This model has no chat template. Leave --chat out.")
    if system is not None and not has_template:
        raise PromptError("A system message needs the model's chat template, which is off here or does not exist.")
    if has_template:
        ids = _chat_ids(tokenizer, prompt, system)
    else:
        ids = torch.tensor([with_one_start(tokenizer, prompt, tokenizer(prompt)["input_ids"])])
    if ids.shape[1] == 0:
        raise PromptError("The prompt is empty: there is no token to start from.")
    return ids.long()


def with_one_start(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """Return the tokens `ids` of a text without a second start token.

    The tokenizer adds one, and a text from a chat template begins with one already. Models are trained with one.
    """
    start = getattr(tokenizer, "bos_token", None)
    is_double = start is not None and text.startswith(start) and ids[:2] == [tokenizer.bos_token_id] * 2
    return ids[1:] if is_double else ids


def _chat_ids(tokenizer: Any, prompt: str, system: str | None) -> torch.Tensor:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return chat_ids(tokenizer, [*messages, {"role": "user", "content": prompt}])


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> torch.Tensor:
    """Encode a chat up to where the answer begins, by the model's chat template, to tokens [1, tokens].

    Raises:
        PromptError: the template refuses the messages, or fails on them.
    """
    with named("The model's chat template refuses this", PromptError):
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids: torch.Tensor = encoded["input_ids"]
        return ids.long()


class TextPieces:
    """Decodes tokens piece by piece; a character that spans several tokens is held back until it is complete.

    The pieces together equal all tokens decoded at once, without an incomplete character at the end. Special tokens are
    left out, but for sentinels, which are part of what an encoder-decoder says.

    Args:
        tokenizer: a transformers tokenizer.
        shown: special tokens whose text is part of the pieces; others are left out.
    """

    def __init__(self, tokenizer: Any, shown: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        special, always = special_tokens(tokenizer), sentinels(tokenizer)
        self._hidden = {
            token_id: text for token_id, text in special.items() if text not in shown and token_id not in always
        }
        self._skips_special = len(self._hidden) == len(special)
        self._ids: list[int] = []
        # Decoded again with each token, as spaces and characters depend on the token before: [context | pending].
        self._context_at = self._pending_at = 0

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; "" within a character."""
        if token_id in self._hidden:
            return ""
        self._ids.append(token_id)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context_at, self._pending_at = self._pending_at, len(self._ids)
        return text

    def hidden(self, token_id: int) -> str:
        """Return the text of a special token that is left out; "" of any other token."""
        return self._hidden.get(token_id, "")

    def finish(self) -> str:
        """Return the text that was held back, without an incomplete character."""
        text = self._pending().rstrip(_REPLACEMENT)
        self._pending_at = len(self._ids)
        return text

    def _pending(self) -> str:
        context = self._decode(self._ids[self._context_at : self._pending_at])
        return self._decode(self._ids[self._context_at :])[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skips_special, clean_up_tokenization_spaces=False)


# Building these tables takes milliseconds (50 of a vocabulary of 151,000), and every answer needs them.
_SENTINELS: "WeakKeyDictionary[Any, tuple[int, ...]]" = WeakKeyDictionary()
_SPECIAL: "WeakKeyDictionary[Any, dict[int, str]]" = WeakKeyDictionary()


def special_tokens(tokenizer: Any) -> Mapping[int, str]:
    """Return the texts of a tokenizer's special tokens, by id: those that decoding may leave out."""
    if tokenizer not in _SPECIAL:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        found = {token_id: token.content for token_id, token in added.items() if token.special}
        named_ids = getattr(tokenizer, "all_special_ids", [])
        found.update(zip(named_ids, getattr(tokenizer, "all_special_tokens", []), strict=False))
        _SPECIAL[tokenizer] = found
    return _SPECIAL[tokenizer]


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Return the ids of a tokenizer's special tokens, by their texts: see `special_tokens`."""
    return {text: token_id for token_id, text in special_tokens(tokenizer).items()}


class StopText:
    """Holds text back while it may become a stop string.

    Attributes:
        is_over: a stop string has come. found: which; None: none has.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held, self.is_over = stop, "", False
        self.found: str | None = None
        # For each character held back, whether it is shown.
        self._shown: list[bool] = []

    def push(self, piece: str, hidden: str = "") -> str:
        """Return the text that may be shown now that `piece` has come.

        Args:
            hidden: what has come before it and is not shown (a special token); a stop string may have such text.
        """
        if self.is_over:
            return ""
        if hidden and self._stop:
            self._held += hidden
            self._shown += [False] * len(hidden)
        self._held += piece
        self._shown += [True] * len(piece)
        found = [(at, one) for one in self._stop if (at := self._held.find(one)) >= 0]
        if found:
            self.is_over = True
            begin, self.found = min(found)
            said = self._release(begin)
            self._held, self._shown = "", []
            return said
        return self._release(len(self._held) - max((self._beginning_of(one) for one in self._stop), default=0))

    def rest(self) -> str:
        """Return the text that was held back, at the answer's end."""
        return self._release(len(self._held))

    def _release(self, num_chars: int) -> str:
        """Return the first characters that are held back, as far as they are shown."""
        said = "".join(compress(self._held[:num_chars], self._shown))
        self._held, self._shown = self._held[num_chars:], self._shown[num_chars:]
        return said

    def _beginning_of(self, stop: str) -> int:
        """Return how many of the last characters are a beginning of `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)
