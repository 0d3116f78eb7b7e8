"""The one path of a conversation to the engine and back, whatever API it came by: the prompt, requests, parts."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreroute.batching.requests import AnswerEvent, Finished, NewToken, Request, Sampling
from foreroute.errors import GrammarError
from foreroute.server.api.answers import Answers, Choice
from foreroute.server.api.problems import not_possible, not_supported
from foreroute.server.api.structure import compiled, refused
from foreroute.server.backend import Serving
from foreroute.server.dialogue.enforced import Enforcement
from foreroute.server.dialogue.messages import Dialogue, Tool
from foreroute.server.dialogue.parsing.events import Event, ParsedAnswer, Reasoning
from foreroute.server.dialogue.parsing.held import HeldCalls
from foreroute.server.dialogue.turn import Turn
from foreroute.server.settings import ServerSettings
from foreroute.server.watching.metrics import ServerMetrics

if TYPE_CHECKING:
    from foreroute.structured.grammar import Grammar


@dataclass(frozen=True)
class TurnRequest:
    """What is asked of the next message, in no API's wire format.

    samplings: one for each of the answers. max_new_tokens, stop, num_top_logprobs, ignore_eos: see
    `batching.requests.Request`. grammar: of the answer behind its reasoning, and the field that asked for it.
    """

    dialogue: Dialogue
    samplings: Sequence[Sampling] = (Sampling(),)
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    num_top_logprobs: int | None = None
    ignore_eos: bool = False
    grammar: "tuple[str, Grammar] | None" = None


class TurnChoice(Choice):
    """An answer so far, and its parts.

    Attributes:
        parsed: content, reasoning and calls. parts: all of them, as they came.
        reasoning_tokens: tokens up to the end of its reasoning.
    """

    def __init__(self, turn: Turn, *, are_calls_certain: bool = False) -> None:
        """are_calls_certain: a grammar makes it nothing but calls; see `HeldCalls`."""
        super().__init__()
        self.parsed = ParsedAnswer(keeps_cut=are_calls_certain)
        self.parts: list[Event] = []
        self.reasoning_tokens = 0
        self._parser, self._held = turn.parser(), HeldCalls(are_certain=are_calls_certain)

    def take(self, event: AnswerEvent) -> list[Event]:
        """Add an event of the engine; returns the parts that it brings."""
        super().add(event)
        found: list[Event] = []
        if isinstance(event, (NewToken, Finished)) and event.text:
            found = self._parser.push(event.text)
        if isinstance(event, Finished):
            found += self._parser.finish()
        parts = list(self._held.pass_on(found))
        self.parsed.add(parts)
        self.parts += parts
        if any(isinstance(part, Reasoning) for part in parts):
            self.reasoning_tokens = len(self.steps)
        return parts

    def add(self, event: AnswerEvent) -> None:
        """Add an event of the engine."""
        self.take(event)

    @property
    def is_for_tools(self) -> bool:
        """Whether the answer, which has ended, wants tools called."""
        assert self.end is not None
        return self.end.reason == "stop" and bool(self.parsed.calls)


async def begin_turn(
    asked: TurnRequest, serving: Serving, metrics: ServerMetrics, settings: ServerSettings
) -> tuple[Answers, Callable[[], TurnChoice]]:
    """Queue what is asked; returns the answers to come, and what makes a choice for each of them.

    Raises:
        ApiError: it cannot be served; nothing has been queued.
    """
    turn = await serving.prompts.chat(asked.dialogue)
    if not turn.prompt_ids:
        raise not_possible("messages", "The conversation comes to no token at all.")
    told = await asyncio.to_thread(_enforced, asked, turn, serving)
    grammar = None if told is None else await compiled(*told, serving)
    requests = [
        Request(
            prompt_ids=turn.prompt_ids,
            max_new_tokens=asked.max_new_tokens,
            sampling=sampling,
            stop=[*asked.stop, *turn.stops],
            num_top_logprobs=asked.num_top_logprobs,
            ignore_eos=asked.ignore_eos,
            grammar=grammar,
            shown_special=turn.shown_special,
        )
        for sampling in asked.samplings
    ]
    answers = Answers(serving.engine, requests, metrics, settings, "messages")
    answers.submit()
    return answers, lambda: TurnChoice(turn, are_calls_certain=asked.dialogue.must_call)


def _enforced(asked: TurnRequest, turn: Turn, serving: Serving) -> "tuple[str, Grammar] | None":
    """The field by which something is enforced in the answer, and the grammar of the whole answer; None: nothing is.

    Raises:
        ApiError: it cannot be enforced, or two fields ask for what no answer can be.
    """
    choice, tools = asked.dialogue.choice, asked.dialogue.callable_tools
    is_required = asked.dialogue.must_call
    enforcement = Enforcement(turn, serving.prompts.special_id)
    name = "tool_choice" if is_required else "tools.strict"
    is_one = asked.dialogue.one_call or isinstance(choice, Tool)
    try:
        if asked.grammar is not None:
            name, told = asked.grammar
            if is_required:
                raise not_possible("tool_choice", f"tool_choice asks for a call, and {name} for something else.")
            if not tools:
                return name, enforcement.content(told)
            return name, enforcement.calls_or(told, tools, most=1 if is_one else None)
        if not is_required and not any(tool.is_strict for tool in tools):
            return None
        if serving.grammars is None:
            raise not_supported(name, f"{name}: a call cannot be enforced here: pip install 'foreroute[structured]'.")
        if asked.ignore_eos:
            raise not_possible("ignore_eos", f"{name} says where an answer ends: leave ignore_eos out.")
        return name, enforcement.calls(tools, is_required=is_required, most=1 if is_one else None)
    except GrammarError as error:
        raise refused(name, error) from error
