"""Grammars of tool calls, by the format in which a model writes them, and what may stand before what is enforced."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from foreroute.errors import GrammarError
from foreroute.server.dialogue.messages import Tool
from foreroute.server.dialogue.parsing import named_calls, xml_calls
from foreroute.server.dialogue.turn import Turn

if TYPE_CHECKING:
    from foreroute.structured.grammar import Grammar
    from foreroute.structured.tools import JsonCall, TaggedCall

_MOST_CALLS = 16
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class CallForm:
    """How a model writes calls. call: each. begins: what only a call begins with. The others: see `tool_calls`."""

    call: "JsonCall | TaggedCall"
    begins: str
    separator: str = ""
    opening: str = ""
    closing: str = ""
    most: int = _MOST_CALLS

    def without_mark(self) -> "CallForm":
        """The same behind its first `begins`."""
        if self.opening.startswith(self.begins):
            return replace(self, opening=self.opening[len(self.begins) :])
        call = replace(self.call, begin=self.call.begin[len(self.begins) :])
        return replace(self, call=call, separator=self.separator + self.begins)


def form_of(name: str) -> CallForm | None:
    """The form of the format with this name; None: it has none that a grammar could hold."""
    from foreroute.structured.tools import JsonCall, TaggedCall

    glm, minimax = xml_calls.GLM, xml_calls.MINIMAX
    seek, kimi = named_calls.DEEPSEEK, named_calls.KIMI
    listed = JsonCall('{"name": "', '", "arguments": ', "}")
    forms = {
        "hermes": CallForm(
            JsonCall('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"), "<tool_call>", "\n"
        ),
        "qwen3_coder": CallForm(
            TaggedCall(
                "<tool_call>\n<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n", "</function>\n</tool_call>"
            ),
            "<tool_call>",
            "\n",
        ),
        "glm": CallForm(
            TaggedCall(
                glm.block, "\n", glm.key, f"{glm.key_end}\n{glm.value}", f"{glm.value_end}\n", glm.block_end
            ),
            glm.block,
            "\n",
        ),
        "minimax": CallForm(
            TaggedCall(
                minimax.call, '">\n', minimax.key, minimax.key_end, f"{minimax.value_end}\n", f"{minimax.call_end}\n"
            ),
            minimax.block,
            opening=f"{minimax.block}\n",
            closing=minimax.block_end,
        ),
        "deepseek": CallForm(
            JsonCall(seek.call, seek.separator, seek.call_end), seek.section, "", seek.section, seek.section_end
        ),
        # Each call has its number there.
        "kimi": CallForm(
            JsonCall(f"{kimi.call}functions.", f":0{kimi.separator}", kimi.call_end),
            kimi.section, "", kimi.section, kimi.section_end, 1,
        ),
        "mistral": CallForm(listed, "[TOOL_CALLS]", ", ", "[TOOL_CALLS][", "]"),
        "granite": CallForm(listed, "<|tool_call|>", ", ", "<|tool_call|>[", "]"),
        "json_list": CallForm(listed, "<tool_calls>", ", ", "<tool_calls>[", "]</tool_calls>"),
        "llama": CallForm(JsonCall('{"name": "', '", "parameters": ', "}"), "", most=1),
        "harmony": CallForm(
            JsonCall("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", ""), "", most=1
        ),
    }  # fmt: skip
    return forms.get(name)


class Enforcement:
    """What a turn's answer must be, behind its reasoning.

    Args:
        turn: whose answer it is. special_id: the id of a special token by its text; None: it is none.
    """

    def __init__(self, turn: Turn, special_id: Callable[[str], int | None]) -> None:
        self._turn = turn
        texts = dict.fromkeys((*turn.shown_special, *(turn.format.markers if turn.format is not None else ())))
        found = {text: special_id(text) for text in texts if text}
        self._special = {text: one for text, one in found.items() if one is not None}

    def calls(self, tools: Sequence[Tool], *, is_required: bool, most: int | None = None) -> "Grammar":
        """The grammar of an answer that calls `tools`, or may call them.

        Args:
            is_required: it calls one at least, with arguments by its schema; else those of strict tools alone are held.
            most: calls at most; None: several.
        Raises:
            GrammarError: the format has no grammar, or a tool's schema cannot be enforced.
        """
        from foreroute.structured.tools import CallableTool, JsonCall, tool_calls

        name = self._turn.format.name if self._turn.format is not None else ""
        form = form_of(name)
        if form is None:
            raise GrammarError(f"Calls in the format {name or 'of this model'} cannot be enforced.")
        is_json = isinstance(form.call, JsonCall)
        told = [
            CallableTool(
                tool.name, _ANY_OBJECT if is_json and not (is_required or tool.is_strict) else _parameters(tool)
            )
            for tool in tools
        ]
        # Its first mark, which is text, is part of what is free before it.
        is_cut = not is_required and bool(form.begins) and form.begins not in self._special
        form = form.without_mark() if is_cut else form
        grammar = tool_calls(
            told, form.call, special=self._special, opening=form.opening, separator=form.separator,
            closing=form.closing, most=min(form.most, most or form.most),
        )  # fmt: skip
        return self._behind(grammar, "@answer" if is_required else self._optional(form), form)

    def content(self, grammar: "Grammar") -> "Grammar":
        """The same for an answer's content: behind its reasoning, and in gpt-oss's last channel.

        Raises:
            GrammarError: the model has no such channel.
        """
        if self._turn.format is not None and self._turn.format.has_channels:
            return self._behind(grammar, f"{self._marks('<|channel|>final<|message|>')} @answer")
        if self._turn.is_open and self._turn.thinks is not None:
            end = self._turn.thinks[1]
            return grammar.after(self._special.get(end, end))
        return grammar

    def _optional(self, form: CallForm) -> str:
        """Free text, and calls behind it or none."""
        if self._turn.format is not None and self._turn.format.has_channels:
            return f'@answer | {self._marks("<|channel|>")} ("final" | "commentary") {self._marks("<|message|>")} TEXT'
        if not form.begins:
            return "@answer | OTHER"
        return "TEXT? @answer?" if form.begins in self._special else "(until_mark @answer | OTHER?)"

    def _behind(self, grammar: "Grammar", answer: str, form: CallForm | None = None) -> "Grammar":
        """The grammar whose answer is as the rule `answer` says, behind reasoning. form: of calls."""
        from foreroute.structured.grammar import Grammar, quoted

        mark = form.begins if form is not None else ""
        other = f"/(.|\\n)*/ {quoted(mark)} /(.|\\n)*/" if mark else "/[ \\n\\r\\t]*\\{(.|\\n)*/"
        rules = {
            "TEXT": "TEXT: /(.|\\n)+/",
            "OTHER": f"OTHER: /(.|\\n)+/ & ~({other})",
            "SPACE": "SPACE: /[ \\n\\r\\t]{1,8}/",
            "until_mark": f"until_mark[lazy]: /(.|\\n)*/ {quoted(mark or ' ')}",
        }
        # Free text has its spaces, and tags that are text, itself.
        is_free = "until_mark" in answer or answer.startswith("TEXT")
        before = self._reasoning(rules, is_free=is_free)
        start = f"start: {before} ({answer})"
        used = [rule for name, rule in rules.items() if re.search(rf"\b{name}\b", start)]
        if grammar.kind != "lark" or not form:
            return Grammar(grammar.kind, grammar.source, "\n".join([start, *used]))
        # In one grammar: what begins alike in two of them is read as the first one's.
        source = grammar.source.replace("start:", "answer:", 1)
        return Grammar("lark", "\n".join([start.replace("@answer", "answer"), *used, source]))

    def _reasoning(self, rules: dict[str, str], *, is_free: bool) -> str:
        """What may stand before an answer; its rules are added to `rules`. is_free: text may be there anyway."""
        turn, marks = self._turn, self._marks
        if turn.format is not None and turn.format.has_channels:
            if "<|channel|>" not in self._special:
                raise GrammarError("The marks of this model's channels are no tokens of their own.")
            thought = f'{marks("<|channel|>")} "analysis" {marks("<|message|>")} {self._until("<|end|>", rules)}'
            return f"({thought} {marks('<|start|>assistant')})*"
        if turn.thinks is None:
            return ""
        begin, end = turn.thinks
        thought = self._until(end, rules) + ("" if is_free else " SPACE?")
        if turn.is_open:
            return thought
        return "" if is_free and begin not in self._special else f"(SPACE? {marks(begin)} {thought})?"

    def _until(self, end: str, rules: dict[str, str]) -> str:
        """Free text up to and with `end`, which may be a special token."""
        from foreroute.structured.grammar import quoted

        if end in self._special:
            return f"TEXT? {self._marks(end)}"
        rules["until_end"] = f"until_end[lazy]: /(.|\\n)*/ {quoted(end)}"
        return "until_end"

    def _marks(self, text: str) -> str:
        return marks_of(text, self._special)


def marks_of(text: str, special: dict[str, int]) -> str:
    """A text in Lark's syntax, in which special tokens are meant by their ids."""
    from foreroute.structured.tools import written

    return written(text, special)


def _parameters(tool: Tool) -> dict[str, Any]:
    found = tool.definition.get("parameters")
    return dict(found) if isinstance(found, dict) and found else {"type": "object", "properties": {}}
