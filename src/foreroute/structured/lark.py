"""Lark's syntax: texts, special tokens by their ids, regular expressions, and text up to a mark."""

import json
import re
from collections.abc import Iterator, Mapping

# Any text at all.
ANY = r"/(.|\n)*/"
_OF_JSON = re.compile(r'"(?:[^"\\]|\\.)*"|\s+|.')


def quoted(text: str) -> str:
    """Return `text` as a string of Lark's syntax, or as a regex where that has no name for one of its characters."""
    if all(char >= " " or char in "\n\r\t" for char in text):
        return json.dumps(text, ensure_ascii=False)
    return "/" + "".join(f"\\x{{{ord(char):x}}}" for char in text) + "/"


def regex(pattern: str) -> str:
    """Return a regular expression in Lark's syntax."""
    escaped, at = [], 0
    while at < len(pattern):
        one = pattern[at : at + 2] if pattern[at] == "\\" else pattern[at]
        escaped.append({"/": "\\/", "\n": "\\n", "\\\n": "\\n"}.get(one, one))
        at += len(one)
    return f"/{''.join(escaped)}/"


class LarkWriter:
    """Writes texts in Lark's syntax; special tokens, which no text matches, by their ids.

    Args:
        special: id of each special token by its text.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        # Longest first: one token's text may begin another's.
        self._special = sorted(((text, one) for text, one in special.items() if text), key=lambda it: -len(it[0]))
        self._raw: dict[str, str] = {}

    def text(self, text: str) -> str:
        """A text, which may spell special tokens."""
        return " ".join(self._parts(text))

    def json_text(self, text: str) -> str:
        """A text that is JSON so far, in JSON's own parts: other JSON may be allowed in its place."""
        return " ".join(quoted(one) for one in _OF_JSON.findall(text))

    def _parts(self, text: str) -> Iterator[str]:
        if not text:
            return
        for spelt, one in self._special:
            before, found, behind = text.partition(spelt)
            if found:
                yield from self._parts(before)
                yield f"<[{one}]>"
                yield from self._parts(behind)
                return
        yield quoted(text)

    def raw_until(self, end: str, held: str = ANY) -> str:
        """Text up to and with `end`, which it does not contain. held: what it must be, as a terminal's expression."""
        if any(end.startswith(spelt) for spelt, _ in self._special):
            return f"{self._named('RAW', held)} {self.text(end)}"
        # Without the newlines around it: a parser of calls ends at the tag itself.
        mark = quoted(end.strip() or end)
        return self._named("raw", f"(({held}) & ~({ANY} {mark} {ANY})) {quoted(end)}", lazily=True)

    def _named(self, kind: str, rule: str, *, lazily: bool = False) -> str:
        name = f"{kind}_{len(self._raw)}"
        return self._raw.setdefault(f"{'[lazy]' if lazily else ''}: {rule}", name)

    def terminals(self) -> list[str]:
        """The rules that `raw_until` refers to."""
        return [f"{name}{rule}" for rule, name in self._raw.items()]
