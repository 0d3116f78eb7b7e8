"""Read text that arrives in pieces: generators that stop where more is needed, whatever the pieces are."""

import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import TypeVar

_T = TypeVar("_T")
# Yields whenever more text is needed; returns _T.
Steps = Generator[None, None, _T]


class TextReader:
    """The text that has arrived and has not been taken.

    What its generators return depends on the text alone, not on the pieces in which it arrives.

    Attributes:
        text: as above. is_over: no more will arrive.
    """

    def __init__(self) -> None:
        self.text, self.is_over = "", False
        self._since_mark: list[str] = []

    def take(self, num_chars: int) -> str:
        """Take the next characters."""
        taken, self.text = self.text[:num_chars], self.text[num_chars:]
        self._since_mark.append(taken)
        return taken

    def mark(self) -> None:
        """Remember this place, for `since_mark` and `back`."""
        self._since_mark = []

    @property
    def since_mark(self) -> str:
        """All that was taken since the mark."""
        return "".join(self._since_mark)

    def back(self) -> None:
        """Go back to the mark."""
        self.text = self.since_mark + self.text
        self._since_mark = []

    def next_is(self, *texts: str, skip_space: bool = False) -> Steps[str | None]:
        """Take the one of `texts` that comes next; None, and nothing is taken, if none of them does.

        Args:
            skip_space: spaces and newlines may stand before it, and are taken with it.
        """
        longest_first = sorted(texts, key=len, reverse=True)
        while True:
            ahead = self.text.lstrip() if skip_space else self.text
            for text in longest_first:
                if ahead.startswith(text):
                    self.take(len(self.text) - len(ahead) + len(text))
                    return text
                if text.startswith(ahead) and not self.is_over:
                    break
            else:
                return None
            yield

    def until(self, markers: Sequence[str], write: Callable[[str], object]) -> Steps[str | None]:
        """Take what comes before the first of `markers`, and pass it to `write` as it comes.

        Returns:
            The marker, which is not taken; None: the text is over without one.
        """
        pattern = _any_of(tuple(markers))
        while True:
            found = pattern.search(self.text)
            if found is not None:
                write(self.take(found.start()))
                return found[0]
            if self.is_over:
                write(self.take(len(self.text)))
                return None
            write(self.take(len(self.text) - max((_beginning(self.text, one) for one in markers), default=0)))
            yield

    def taken_until(self, markers: Sequence[str]) -> Steps[tuple[str, str | None]]:
        """Take what comes before the first of `markers`; returns it, and the marker."""
        parts: list[str] = []
        found = yield from self.until(markers, parts.append)
        return "".join(parts), found

    def next_char(self) -> Steps[str]:
        """The character that comes next, which is not taken; "" when the text is over."""
        while not self.text and not self.is_over:
            yield
        return self.text[:1]

    def skip(self, chars: str = " \t\r\n") -> Steps[None]:
        """Take all of `chars` that come next."""
        while True:
            left = self.text.lstrip(chars)
            self.take(len(self.text) - len(left))
            if left or self.is_over:
                return
            yield


@lru_cache(maxsize=256)
def _any_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern of these texts; of two that begin at the same place, the longer one is found."""
    return re.compile("|".join(re.escape(one) for one in sorted(markers, key=len, reverse=True)) or r"(?!)")


def _beginning(text: str, marker: str) -> int:
    """How many of the last characters of `text` are a beginning of `marker`."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
