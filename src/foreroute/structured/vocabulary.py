"""A tokenizer as llguidance needs it: the bytes of every token, and which tokens end an answer."""

from collections.abc import Collection
from typing import Any

from foreroute.errors import GrammarError
from foreroute.model.text import special_tokens

_SAMPLE = '{"key": [1, -2.5, true]}\n  some text'
_REPLACEMENT = "\ufffd"


def vocabulary_of(tokenizer: Any, vocab_size: int, ends: Collection[int]) -> Any:
    """Return llguidance's LLTokenizer of a tokenizer of transformers.

    Args:
        vocab_size: of the model; tokens beyond it are never allowed. ends: tokens that end an answer; without any, the
            vocabulary has one that the model lacks, so that an answer ends where its grammar does.
    Raises:
        GrammarError: llguidance is not installed, or the bytes of this tokenizer's tokens are not known.
    Cost: up to a second for 150,000 tokens.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise GrammarError("Structured output needs llguidance: pip install 'foreroute[structured]'.") from error
    real = sorted(end for end in ends if 0 <= end < vocab_size)
    size, named = (vocab_size, real) if real else (vocab_size + 1, [vocab_size])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.get_vocab_size(with_added_tokens=True) <= vocab_size:
        try:
            found = LLTokenizer(backend.to_str(), n_vocab=size, eos_token=named)
        except ValueError:
            found = None  # neither of bytes nor with bytes to fall back to: its tokens are decoded one by one
        if found is not None and _is_right(found, tokenizer):
            return found
    decoded: Any = _Decoded(tokenizer, size, named)
    found = LLTokenizer(decoded, n_vocab=size, eos_token=named)
    if not _is_right(found, tokenizer):
        raise GrammarError("The bytes of this tokenizer's tokens are not known: no structured output with this model.")
    return found


def _is_right(found: Any, tokenizer: Any) -> bool:
    """Whether the tokens of a text have its bytes; SentencePiece begins with a space of its own."""
    ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    return bool(found.decode_bytes(ids).removeprefix(b" ") == _SAMPLE.encode())


class _Decoded:
    """llguidance's interface of a tokenizer: the bytes of each token as it is decoded behind another one."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Any, size: int, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = ends[0]
        special = set(special_tokens(tokenizer)) | set(ends)
        self.special_token_ids = sorted(special)
        before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        known = min(size, len(tokenizer))
        texts = tokenizer.batch_decode([[*before, one] for one in range(known)], clean_up_tokenization_spaces=False)
        behind = len(tokenizer.decode(before, clean_up_tokenization_spaces=False))
        self.tokens = [
            f"<special{at}>".encode() if at in special else b"" if _REPLACEMENT in text else text[behind:].encode()
            for at, text in enumerate(texts)
        ]
        self.tokens += [f"<special{at}>".encode() if at in special else b"" for at in range(known, size)]

    def __call__(self, text: str | bytes) -> list[int]:
        given = text.decode(errors="replace") if isinstance(text, bytes) else text
        return list(self._tokenizer(given, add_special_tokens=False)["input_ids"])
