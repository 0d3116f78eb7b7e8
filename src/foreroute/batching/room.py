"""How much of the KV cache an answer gets, and when it gets more: numbers alone, no tensors.

The cache holds rows of one width, so that it takes as many tokens as rows times the longest of them. What an answer may
have in all is no demand: clients ask for 32,000 tokens and use 300. So each begins with its prompt and a fair share of
the cache, and gets more while there is some.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from foreroute.batching.answer import Answer

# Tokens that an answer gets when its room is used up.
_MORE_AT_ONCE = 64


@dataclass(frozen=True)
class CacheRoom:
    """The room of the KV cache: `kv_tokens` in all, for `rows` answers at most, each within `context`."""

    kv_tokens: int
    rows: int
    context: int

    def most_new(self, num_prompt: int, asked: int | None, own: int | None) -> int:
        """Most new tokens of an answer: as asked, else by the model's own setting, and what the context has left."""
        wanted = own or self.context if asked is None else asked
        return min(wanted, self.context - num_prompt)

    def first(self, num_tokens: int, most: int) -> int:
        """Tokens reserved for a row that begins with `num_tokens`, and has `most` at its end.

        What is computed again after a pause is worth some tokens of its own: an eighth.
        """
        share = self.share
        return min(most, num_tokens + max(share - num_tokens, share // 4, num_tokens // 8, 1))

    @property
    def share(self) -> int:
        """A row's fair share, in tokens."""
        return self.kv_tokens // self.rows

    def held(self, admitted: Iterable[Answer]) -> int:
        """Most tokens that these rows can come to hold, padding included."""
        lengths = [answer.reserved for answer in admitted]
        return len(lengths) * max(lengths, default=0)

    def fits(self, admitted: Iterable[Answer]) -> bool:
        """Whether these rows fit together."""
        return self.held(admitted) <= self.kv_tokens

    def extend(self, answer: Answer, admitted: Collection[Answer]) -> bool:
        """Reserve more for one of the rows `admitted`, if there is more."""
        wider = min(answer.reserved + _MORE_AT_ONCE, answer.most, self.kv_tokens // len(admitted))
        if wider <= answer.reserved:
            return False
        answer.reserved = wider
        return True
