"""Tokens in logprobs: each token's text and bytes, and a name that is unique."""

from functools import lru_cache
from typing import Any

_REPLACEMENT = "\ufffd"


@lru_cache(maxsize=1)
def _byte_of_letter() -> dict[str, int]:
    """Map GPT-2's alphabet to bytes: a printable letter for each, itself or one from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


class TokenTexts:
    """Looks up the texts of tokens, and caches them.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def text(self, token_id: int) -> str:
        """Decode the token alone, special tokens included; part of a character is U+FFFD."""
        return self._look_up(token_id)[0]

    def bytes(self, token_id: int) -> list[int]:
        """The token's bytes, also where they are part of a character."""
        return self._look_up(token_id)[1]

    def name(self, token_id: int) -> str:
        """The token's text, or its bytes written out where that would be part of a character."""
        text, token_bytes = self._look_up(token_id)
        return text if _REPLACEMENT not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

    def unique(self, token_ids: list[int]) -> list[str]:
        """A name for each of the tokens; its id where another of them has the same name."""
        texts = [self.name(token_id) for token_id in token_ids]
        return [
            text if texts.count(text) == 1 else f"token_id:{token_id}"
            for text, token_id in zip(texts, token_ids, strict=True)
        ]

    def _look_up(self, token_id: int) -> tuple[str, list[int]]:
        if token_id not in self._known:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            self._known[token_id] = text, self._bytes_of(token_id, text)
        return self._known[token_id]

    def _bytes_of(self, token_id: int, text: str) -> list[int]:
        if _REPLACEMENT not in text:
            return list(text.encode())
        stored = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        # SentencePiece writes a single byte as <0xE4>; byte-level BPE has a letter for each byte.
        if len(stored) == 6 and stored.startswith("<0x") and stored.endswith(">"):
            return [int(stored[3:5], 16)]
        letters = _byte_of_letter()
        if stored and all(letter in letters for letter in stored):
            return [letters[letter] for letter in stored]
        return list(text.encode())
