"""The formats in which models write tool calls, and which of them a chat template describes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from foreroute.errors import ServerError
from foreroute.server.dialogue.messages import Tool
from foreroute.server.dialogue.parsing import gemma, harmony, named_calls, pythonic, xml_calls
from foreroute.server.dialogue.parsing.draft import Draft, long_id, short_id
from foreroute.server.dialogue.parsing.events import CallEnded, Event
from foreroute.server.dialogue.parsing.json_calls import json_calls
from foreroute.server.dialogue.parsing.reader import Steps
from foreroute.server.dialogue.parsing.thinking import reasoning
from foreroute.structured.reasoning import ThinkTags


@dataclass(frozen=True)
class Format:
    """A format of tool calls.

    name: for --tool-parser. signs: texts of a template that describes it. parse: reads an answer. markers: texts that
    are special tokens in some models. has_channels: it also tells reasoning from content. stops: texts that end any
    answer in it. call_end: the text that ends a call; "" where none does.
    """

    name: str
    signs: tuple[str, ...]
    parse: Callable[[Draft], Steps[None]]
    markers: tuple[str, ...]
    has_channels: bool = False
    stops: tuple[str, ...] = ()
    call_end: str = ""
    new_id: Callable[[], str] = long_id


_QWEN, _MINIMAX, _GLM, _DSML = xml_calls.QWEN3_CODER, xml_calls.MINIMAX, xml_calls.GLM, xml_calls.DEEPSEEK_DSML
_LLAMA = ("<|python_tag|>", "<|python_start|>", "<|python_end|>")
# The first whose sign a template has: <tool_call> is the tag of several, told apart by what stands in it.
FORMATS = (
    Format("harmony", ("<|channel|>",), harmony.harmony, harmony.MARKS, has_channels=True, stops=harmony.STOPS),
    Format("minimax", (_MINIMAX.block,), xml_calls.tagged_calls(_MINIMAX), (_MINIMAX.block, _MINIMAX.block_end)),
    Format("qwen3_coder", (_QWEN.call,), xml_calls.tagged_calls(_QWEN), (_QWEN.block, _QWEN.block_end)),
    Format(
        "glm", (_GLM.key,), xml_calls.tagged_calls(_GLM),
        (_GLM.block, _GLM.block_end, _GLM.key, _GLM.key_end, _GLM.value, _GLM.value_end),
    ),
    Format("deepseek_dsml", (_DSML.block, "｜DSML｜"), xml_calls.tagged_calls(_DSML), (_DSML.block, _DSML.block_end)),
    Format(
        "deepseek", (named_calls.DEEPSEEK.section, named_calls.DEEPSEEK.call),
        named_calls.marked_calls(named_calls.DEEPSEEK), named_calls.DEEPSEEK.all,
        call_end=named_calls.DEEPSEEK.call_end,
    ),
    Format(
        "kimi", (named_calls.KIMI.section, named_calls.KIMI.call), named_calls.marked_calls(named_calls.KIMI),
        named_calls.KIMI.all, call_end=named_calls.KIMI.call_end,
    ),
    Format("mistral", (named_calls.MISTRAL[0],), named_calls.mistral_calls, named_calls.MISTRAL, new_id=short_id),
    Format("gemma", (gemma.START,), gemma.gemma_calls, (gemma.START, gemma.END, gemma.QUOTE)),
    Format("pythonic", (pythonic.START,), pythonic.pythonic_calls, (pythonic.START, pythonic.END)),
    Format(
        "hermes", ("<tool_call>",), json_calls("<tool_call>", end="</tool_call>"), ("<tool_call>", "</tool_call>"),
        call_end="</tool_call>",
    ),
    Format(
        "json_list", ("<tool_calls>",), json_calls("<tool_calls>", end="</tool_calls>"),
        ("<tool_calls>", "</tool_calls>"),
    ),
    Format("granite", ("<|tool_call|>",), json_calls("<|tool_call|>"), ("<|tool_call|>",)),
    Format(
        "llama", (*_LLAMA[:2], '"parameters"'), json_calls(*_LLAMA[:2], end=_LLAMA[2], is_bare=True), _LLAMA
    ),
)  # fmt: skip


def format_of(template: str) -> Format | None:
    """The format that a chat template describes; None: none that is known here."""
    return next((one for one in FORMATS if any(sign in template for sign in one.signs)), None)


def format_named(name: str) -> Format:
    """The format of this name.

    Raises:
        ServerError: there is none.
    """
    found = next((one for one in FORMATS if one.name == name), None)
    if found is None:
        raise ServerError(f"There is no tool parser {name!r}. There are {', '.join(one.name for one in FORMATS)}.")
    return found


class AnswerParser:
    """Reads one answer as it arrives.

    Args:
        format_: of its calls; None: calls are text. tools: those that may be called. thinks: the tags of reasoning;
            None: none is told apart. is_open: the prompt ends within reasoning. one_call: what follows the first call
            is left out.
    """

    def __init__(
        self,
        format_: Format | None,
        tools: Mapping[str, Tool],
        thinks: ThinkTags | None,
        *,
        is_open: bool = False,
        one_call: bool = False,
    ) -> None:
        self._draft = Draft(tools, long_id if format_ is None else format_.new_id)
        self._one_call, self._is_over = one_call, False
        self._steps = self._read(format_ if tools or (format_ and format_.has_channels) else None, thinks, is_open)
        next(self._steps)

    def push(self, text: str) -> list[Event]:
        """Add the next text; returns what is certain now."""
        self._draft.reader.text += text
        next(self._steps, None)
        return self._collect()

    def finish(self) -> list[Event]:
        """The text is over; returns the rest."""
        self._draft.reader.is_over = True
        for _ in self._steps:
            pass
        return self._collect()

    def _read(self, format_: Format | None, thinks: ThinkTags | None, is_open: bool) -> Steps[None]:
        draft = self._draft
        yield
        if thinks is not None:
            yield from reasoning(draft, thinks, is_open=is_open)
        if format_ is None:
            yield from draft.reader.until((), draft.content.write)
        else:
            yield from format_.parse(draft)
        draft.reasoning.end()
        draft.content.end()

    def _collect(self) -> list[Event]:
        found, self._draft.events[:] = list(self._draft.events), []
        if not self._one_call:
            return found
        if self._is_over:
            return []
        for at, event in enumerate(found):
            if isinstance(event, CallEnded) and event.is_valid:
                self._is_over = True
                return found[: at + 1]
        return found
