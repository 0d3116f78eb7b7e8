"""Between text and tokens: a model's tokenizer, a prompt for it, and whole characters out of single tokens."""

from pathlib import Path
from typing import Any

import torch

from foreroute.checkpoint.gguf_file import is_gguf
from foreroute.errors import CheckpointError, ForerouteError, PromptError
from foreroute.model.skeleton import read_config

_REPLACEMENT = "\ufffd"


def load_tokenizer(folder: str | Path) -> Any:
    """transformers' tokenizer of the checkpoint in `folder`; no remote code is run.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        if is_gguf(Path(folder)):
            return _gguf_tokenizer(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder} has no tokenizer that transformers can read: {reason}") from error
    if not tokenizer.encode("a", add_special_tokens=False):
        raise CheckpointError(f"{folder} has no tokenizer (tokenizer.json). Get it from where the weights came from.")
    return tokenizer


def _gguf_tokenizer(path: Path) -> Any:
    """The one in the file's folder, if there is one; else as transformers makes it of the file's metadata."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (path.parent / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(path.parent)
    else:
        # Not the Auto class: it makes a config first, which stumbles over positions by YaRN (5.23).
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    vocabulary = read_config(path).vocab_size
    if not 0 < max(tokenizer.get_vocab().values(), default=-1) < vocabulary:
        raise CheckpointError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}. tokenizer.json in "
            f"{path.parent} is another model's."
        )
    return tokenizer


def read_text(path: Path, error: type[ForerouteError]) -> str:
    """A file's text.

    Raises:
        error: it cannot be read, or is not UTF-8.
    """
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}.") from failure
    except UnicodeDecodeError as failure:
        raise error(f"{path} is not UTF-8 text (byte {failure.start}).") from None


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool | None = None, system: str | None = None) -> torch.Tensor:
    """The prompt's tokens [1, tokens].

    Args:
        chat: put the prompt into the model's chat template; None does so when it has one.
        system: the chat's system message.
    Raises:
        PromptError: empty; a chat without a template; a template that refuses the messages.
    """
    if not prompt:
        raise PromptError("The prompt is empty: there is no token to start from.")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise PromptError("This model has no chat template. Leave --chat out.")
    if system is not None and (chat is False or not has_template):
        raise PromptError("A system message needs the model's chat template, which is off here or does not exist.")
    if chat is False or not has_template:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        ids = _chat_ids(tokenizer, prompt, system)
    if ids.shape[1] == 0:
        raise PromptError("The prompt is empty: there is no token to start from.")
    return ids.long()


def _chat_ids(tokenizer: Any, prompt: str, system: str | None) -> torch.Tensor:
    from jinja2 import TemplateError

    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:
        raise PromptError(f"The model's chat template refuses this: {error}") from error
    return encoded["input_ids"]


class TextPieces:
    """Turns tokens into text piece by piece; a character whose bytes come in several tokens is held until it is whole.

    The pieces together are what decoding all tokens at once gives, less a half character at the very end.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Decoded again with each token, as spaces and characters depend on the token before: [context | pending].
        self._context_at = self._pending_at = 0

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is half there."""
        self._ids.append(token_id)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context_at, self._pending_at = self._pending_at, len(self._ids)
        return text

    def finish(self) -> str:
        """What was still held, without a half character."""
        text = self._pending().rstrip(_REPLACEMENT)
        self._pending_at = len(self._ids)
        return text

    def _pending(self) -> str:
        context = self._decode(self._ids[self._context_at : self._pending_at])
        return self._decode(self._ids[self._context_at :])[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
