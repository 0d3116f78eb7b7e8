"""Messages for templates that lack a place for them: a system's in the first question, tools in the system's."""

import json
from collections.abc import Sequence
from dataclasses import replace

from foreroute.server.dialogue.messages import Dialogue, DialogueMessage, ToolCall

# As Hermes models are told of tools, whose format many others know too.
_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def with_described_tools(dialogue: Dialogue) -> Dialogue:
    """The same dialogue with its tools described in the system's message, and calls and their answers as text."""
    tools = dialogue.tools if dialogue.choice != "none" else ()
    messages = list(_plain(dialogue.messages))
    if tools:
        listed = "\n".join(
            json.dumps({"type": "function", "function": dict(tool.definition)}, ensure_ascii=False) for tool in tools
        )
        told = _TOOLS.format(tools=listed)
        if messages and messages[0].role in ("system", "developer"):
            messages[0] = replace(messages[0], text=f"{messages[0].text or ''}\n\n{told}".lstrip("\n"))
        else:
            messages.insert(0, DialogueMessage("system", told))
    return replace(dialogue, messages=tuple(messages), tools=())


def _plain(messages: Sequence[DialogueMessage]) -> Sequence[DialogueMessage]:
    """The messages with calls as text, and answers to them as a user's; those that follow each other as one."""
    found: list[DialogueMessage] = []
    answers: list[str] = []
    for message in messages:
        if message.role == "tool":
            answers.append(f"<tool_response>\n{message.text or ''}\n</tool_response>")
            continue
        found += _answered(answers)
        answers = []
        if message.calls:
            said = [message.text] if message.text else []
            found.append(replace(message, text="\n".join([*said, *map(_written, message.calls)]), calls=()))
        else:
            found.append(message)
    return [*found, *_answered(answers)]


def _answered(answers: Sequence[str]) -> list[DialogueMessage]:
    return [DialogueMessage("user", "\n".join(answers))] if answers else []


def _written(call: ToolCall) -> str:
    arguments = call.arguments.strip() or "{}"
    return f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {arguments}}}\n</tool_call>'


def with_folded_system(messages: Sequence[DialogueMessage]) -> tuple[DialogueMessage, ...]:
    """The messages with a system's at the beginning of the next question; where none follows, it is one itself."""
    found: list[DialogueMessage] = []
    held: list[str] = []
    for message in messages:
        if message.role in ("system", "developer"):
            held += [message.text] if message.text else []
        elif message.role == "user" and held:
            found.append(replace(message, text="\n\n".join([*held, message.text or ""])))
            held = []
        else:
            found.append(message)
    if held:
        found.append(DialogueMessage("user", "\n\n".join(held)))
    return tuple(found)
