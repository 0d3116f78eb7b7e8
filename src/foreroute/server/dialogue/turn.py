"""The next message of a conversation: its prompt, and how the answer is to be read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from foreroute.server.dialogue.messages import Dialogue, Tool
from foreroute.server.dialogue.parsing.formats import AnswerParser, Format
from foreroute.structured.reasoning import ThinkTags, is_open, is_over


@dataclass(frozen=True)
class Turn:
    """What the engine is asked for one answer of a conversation, and how its text is read.

    prompt_ids: up to where the answer begins. format: of calls; None: calls are text. tools: those that may be called,
    by name. thinks: tags of reasoning; None: none is told apart. is_open: the prompt ends within reasoning.
    has_thought: it ends with reasoning that is over. one_call: at most one call.
    """

    prompt_ids: Sequence[int]
    format: Format | None = None
    tools: Mapping[str, Tool] = field(default_factory=dict)
    thinks: ThinkTags | None = None
    is_open: bool = False
    one_call: bool = False
    has_thought: bool = False

    def parser(self) -> AnswerParser:
        """A parser of one answer."""
        return AnswerParser(self.format, self.tools, self.thinks, is_open=self.is_open, one_call=self.one_call)

    @property
    def shown_special(self) -> tuple[str, ...]:
        """Special tokens that the parser needs to see in the text."""
        tags = (part for tag in self.thinks or () for part in (tag, tag.removesuffix("thought")))
        return (*dict.fromkeys(tags), *(self.format.markers if self.format is not None else ()))

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        if self.format is None:
            return ()
        ends = (self.format.call_end,) if self.one_call and self.tools and self.format.call_end else ()
        return (*self.format.stops, *ends)


def turn_of(
    dialogue: Dialogue, prompt: str, prompt_ids: Sequence[int], format_: Format | None, thinks: ThinkTags | None
) -> Turn:
    """Make the turn that follows `prompt`, the conversation as rendered. format_, thinks: the model's."""
    tools = {tool.name: tool for tool in dialogue.callable_tools}
    has_channels = format_ is not None and format_.has_channels
    return Turn(
        prompt_ids,
        format_ if tools or has_channels else None,
        tools,
        None if has_channels else thinks,
        thinks is not None and is_open(prompt, thinks),
        dialogue.one_call,
        thinks is not None and is_over(prompt, thinks),
    )
