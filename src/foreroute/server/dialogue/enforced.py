"""Grammars of tool calls, by the format in which a model writes them, and what may stand before what is enforced."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from foreroute.errors import GrammarError
from foreroute.server.dialogue.messages import Tool
from foreroute.server.dialogue.parsing import named_calls, xml_calls
from foreroute.server.dialogue.turn import Turn

if TYPE_CHECKING:
    from foreroute.structured.grammar import Grammar
    from foreroute.structured.tagged import TaggedCall
    from foreroute.structured.tools import JsonCall

_MOST_CALLS = 16


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
    from foreroute.structured.tagged import TaggedCall
    from foreroute.structured.tools import JsonCall

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
        from foreroute.structured.reasoning import BeforeAnswer

        self._turn = turn
        texts = dict.fromkeys((*turn.shown_special, *(turn.format.markers if turn.format is not None else ())))
        found = {text: special_id(text) for text in texts if text}
        self._special = {text: one for text, one in found.items() if one is not None}
        self._has_channels = turn.format is not None and turn.format.has_channels
        thinks = None if turn.has_thought else turn.thinks
        self._before = BeforeAnswer(thinks, turn.is_open, self._has_channels, self._special)

    def calls(self, tools: Sequence[Tool], *, is_required: bool, most: int | None = None) -> "Grammar":
        """The grammar of an answer that calls `tools`, or may call them.

        Args:
            is_required: it calls one at least, with arguments by its schema; else those of strict tools alone are held.
            most: calls at most; None: several.
        Raises:
            GrammarError: the format has no grammar, or a tool's schema cannot be enforced.
        """
        from foreroute.structured.grammar import Grammar
        from foreroute.structured.reasoning import free_rules, with_rules

        form = self._form()
        # Its first mark, which is text, is part of what is free before it.
        is_cut = not is_required and bool(form.begins) and form.begins not in self._special
        form = form.without_mark() if is_cut else form
        answer = "answer" if is_required else self._optional(form)
        rules = {**free_rules(), **_rules_beside(form.begins)}
        # Free text has its spaces, and tags that are text, itself.
        is_free = "until_mark" in answer or answer.startswith("TEXT")
        start = with_rules(f"start: {self._before.rule(rules, is_free=is_free)} ({answer})", rules)
        # In one grammar: what begins alike in two of them is read as the first one's.
        return Grammar("lark", f"{start}\n{self._calls(tools, form, 'answer', is_required=is_required, most=most)}")

    def content(self, grammar: "Grammar") -> "Grammar":
        """The same for an answer's content: behind its reasoning, and in gpt-oss's last channel.

        Raises:
            GrammarError: the model's channels have no tokens of their own.
        """
        return self._before.behind(grammar)

    def calls_or(self, content: "Grammar", tools: Sequence[Tool], most: int | None = None) -> "Grammar":
        """The grammar of an answer that calls `tools` (strict ones by their schemas), or else has this `content`.

        Args:
            most: see `calls`.
        Raises:
            GrammarError: as `calls`.
        """
        from foreroute.structured.grammar import Grammar
        from foreroute.structured.reasoning import free_rules, with_rules

        rules = free_rules()
        said = f"{self._before.final} @answer" if self._has_channels else "@answer"
        start = with_rules(f"start: {self._before.rule(rules)} (calls | {said})", rules)
        form = self._form("Beside tools, leave this out, or say tool_choice none.")
        calls = self._calls(tools, form, "calls", is_required=False, most=most)
        return Grammar(content.kind, content.source, f"{start}\n{calls}")

    def _form(self, advice: str = "") -> CallForm:
        name = self._turn.format.name if self._turn.format is not None else ""
        form = form_of(name)
        if form is None:
            raise GrammarError(f"Calls in the format {name or 'of this model'} cannot be enforced. {advice}".rstrip())
        return form

    def _calls(self, tools: Sequence[Tool], form: CallForm, name: str, *, is_required: bool, most: int | None) -> str:
        """The rule `name` of one call or several, and those that it refers to."""
        from foreroute.structured.tools import CallableTool, tool_calls

        told = [CallableTool(tool.name, _parameters(tool) if is_required or tool.is_strict else None) for tool in tools]
        grammar = tool_calls(
            told, form.call, special=self._special, opening=form.opening, separator=form.separator,
            closing=form.closing, most=min(form.most, most or form.most),
        )  # fmt: skip
        return grammar.source.replace("start:", f"{name}:", 1)

    def _optional(self, form: CallForm) -> str:
        """Free text, and calls behind it or none."""
        marks = self._before.marks
        if self._has_channels:
            return f'answer | {marks("<|channel|>")} ("final" | "commentary") {marks("<|message|>")} TEXT'
        if not form.begins:
            return "answer | OTHER"
        return "TEXT? answer?" if form.begins in self._special else "(until_mark answer | OTHER?)"


def _rules_beside(mark: str) -> dict[str, str]:
    """The rules of free text beside calls that begin with `mark`; "": that are JSON."""
    from foreroute.structured.lark import ANY, quoted

    other = f"{ANY} {quoted(mark)} {ANY}" if mark else "/[ \\n\\r\\t]*\\{(.|\\n)*/"
    return {
        "OTHER": f"OTHER: /(.|\\n)+/ & ~({other})",
        "until_mark": f"until_mark[lazy]: {ANY} {quoted(mark or ' ')}",
    }


def _parameters(tool: Tool) -> dict[str, Any]:
    found = tool.definition.get("parameters")
    return dict(found) if isinstance(found, dict) and found else {"type": "object", "properties": {}}
