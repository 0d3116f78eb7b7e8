"""What may stand before an answer: reasoning between tags or in channels. A grammar holds behind it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from foreroute.errors import GrammarError
from foreroute.structured.grammar import Grammar
from foreroute.structured.lark import LarkWriter, quoted

ThinkTags = tuple[str, str]
# In the order in which a template is searched for them.
KNOWN: tuple[ThinkTags, ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
    # Gemma 4: a channel's token and its name.
    ("<|channel>thought", "<channel|>"),
)
_CHANNEL = "<|channel|>"
_CHANNEL_MARKS = (_CHANNEL, "<|message|>", "<|end|>", "<|start|>")


def tags_of(template: str) -> ThinkTags | None:
    """The tags that a chat template knows; None: it knows none."""
    return next((tags for tags in KNOWN if tags[0] in template or tags[1] in template), None)


def is_open(prompt: str, tags: ThinkTags) -> bool:
    """Whether a prompt ends within reasoning: its template opened it, and the model goes on."""
    return prompt.rstrip().endswith(tags[0])


def is_over(prompt: str, tags: ThinkTags) -> bool:
    """Whether a prompt ends with reasoning that is over: the model is not to reason."""
    return prompt.rstrip().endswith(tags[1])


@dataclass(frozen=True)
class BeforeAnswer:
    """What may stand before an answer.

    thinks: tags of reasoning; None: there is none. is_open: the prompt ends within it. has_channels: reasoning and
    answer are in gpt-oss's channels. special: id of each special token by its text.
    """

    thinks: ThinkTags | None = None
    is_open: bool = False
    has_channels: bool = False
    special: Mapping[str, int] = field(default_factory=dict)

    def behind(self, grammar: Grammar) -> Grammar:
        """Return the grammar of an answer whose content is by `grammar`: reasoning before it is free.

        Raises:
            GrammarError: the model has channels, and their marks are no tokens of their own.
        """
        rules = free_rules()
        before = self.rule(rules)
        if self.has_channels:
            before = f"{before} {self.final}"
        return replace(grammar, start=with_rules(f"start: {before} @answer", rules)) if before else grammar

    @property
    def final(self) -> str:
        """What begins gpt-oss's last channel."""
        return self.marks(f"{_CHANNEL}final<|message|>")

    def rule(self, rules: dict[str, str], *, is_free: bool = False) -> str:
        """Return what may stand before an answer, in Lark's syntax; its rules are added to `rules`.

        Args:
            is_free: the answer may be any text, which has tags that are text, and spaces, itself.
        Raises:
            GrammarError: see `behind`.
        """
        marks = self.marks
        if self.has_channels:
            if _CHANNEL not in self.special:
                raise GrammarError("The marks of this model's channels are no tokens of their own.")
            thought = f'{marks(_CHANNEL)} "analysis" {marks("<|message|>")} {self._until("<|end|>", rules)}'
            return f"({thought} {marks('<|start|>assistant')})*"
        if self.thinks is None:
            return ""
        begin, end = self.thinks
        thought = self._until(end, rules) + ("" if is_free else " SPACE?")
        if self.is_open:
            return thought
        if is_free:
            return f"(SPACE? {marks(begin)} {thought})?" if begin in self.special else ""
        # No space before it: a model that begins with one would have to reason.
        return f"({marks(begin)} {thought})?"

    def _until(self, end: str, rules: dict[str, str]) -> str:
        """Free text up to and with `end`, which may be a special token."""
        if end in self.special:
            return f"TEXT? {self.marks(end)}"
        rules["until_end"] = f"until_end[lazy]: /(.|\\n)*/ {quoted(end)}"
        return "until_end"

    def marks(self, text: str) -> str:
        """Return a text in Lark's syntax, in which special tokens are meant by their ids."""
        return LarkWriter(self.special).text(text)


def free_rules() -> dict[str, str]:
    """Return the rules of free text and of space, by their names."""
    return {"TEXT": "TEXT: /(.|\\n)+/", "SPACE": "SPACE: /[ \\n\\r\\t]{1,8}/"}


def with_rules(start: str, rules: Mapping[str, str]) -> str:
    """Return the rule `start`, and those of `rules` that it refers to."""
    return "\n".join([start, *(rule for name, rule in rules.items() if re.search(rf"\b{name}\b", start))])


def behind_reasoning(grammar: Grammar, tokenizer: Any, prompt: str) -> Grammar:
    """Return the grammar of an answer to a chat: reasoning is free, and what follows it is by `grammar`.

    Args:
        tokenizer: of transformers; its chat template says how the model reasons.
        prompt: the conversation as its template renders it, up to where the answer begins.
    Raises:
        GrammarError: the model has channels (gpt-oss's), and their marks are no tokens of their own.
    """
    # Not before the server listens: torch comes with them.
    from foreroute.model.text import special_ids
    from foreroute.model.tokenizer_files import default_template

    template = default_template(tokenizer)
    if template is None:
        return grammar
    thinks, has_channels = tags_of(template), _CHANNEL in template
    known = special_ids(tokenizer)
    wanted = (*(thinks or ()), *_CHANNEL_MARKS)
    special = {text: known[text] for text in wanted if text in known}
    if has_channels or thinks is None or is_over(prompt, thinks):
        return BeforeAnswer(None, has_channels=has_channels, special=special).behind(grammar)
    return BeforeAnswer(thinks, is_open(prompt, thinks), special=special).behind(grammar)
