"""Answers as models write them, in every format of tool calls, and what is in them."""

from typing import NamedTuple

from foreroute.server.dialogue.messages import Tool


class Written(NamedTuple):
    """An answer: the format's name, its text, and what it says: content, reasoning, calls as (name, arguments)."""

    format: str
    text: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()


_SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "share": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "flag": {"type": ["boolean", "null"]},
        "more": {"type": "object"},
    },
}
TOOLS = {
    name: Tool(name, {"name": name, "description": f"Does {name}.", "parameters": _SCHEMA})
    for name in ("write", "look")
}
# A string with all that could be taken for an end, in JSON and in tags.
_HARD = 'a "b" \\ {[é漢😀]} </tool_call> <b>'
_JSON = '{"text": "a \\"b\\" \\\\ {[é漢😀]} </tool_call> <b>", "count": 3}'
_TAGGED = (
    '{"text": "a \\"b\\" \\\\ {[é漢😀]} </tool_call> <b>", "count": 3, "share": null, "flag": true, "more": {"k": [1]}}'
)
_LINES = '{"text": "one\\n\\ttwo\\n", "count": -3}'


def _marked(*calls: str) -> str:
    return "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>"


_CODER_VALUES = (("text", _HARD), ("count", "3"), ("share", "None"), ("flag", "True"), ("more", '{"k": [1]}'))
VALID = [
    Written(
        "hermes",
        f'<tool_call>\n{{"name": "write", "arguments": {_JSON}}}\n</tool_call>',
        calls=(("write", _JSON),),
    ),
    Written(
        "hermes",
        '<think>\nI should.\n\nYes.\n</think>\n\nI look twice. \n<tool_call>\n'
        '{"name": "look", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"count": 1}, "name": "look"}\n</tool_call>\n',
        "I look twice.", "I should.\n\nYes.", (("look", "{}"), ("look", '{"count": 1}')),
    ),
    # Arguments as text, with an id, and with newlines that JSON does not allow in a string.
    Written(
        "hermes",
        '<tool_call>{"id": "x", "name": "look", "arguments": "{\\"count\\": 1}"}</tool_call>Done.<tool_call>'
        '{"type": "function", "name": "write", "arguments": {"text": "one\n\ttwo\n", "count": -3}, "id": 5}',
        "Done.", calls=(("look", '{"count": 1}'), ("write", _LINES)),
    ),
    Written(
        "hermes", '<tool_call>{"function": {"name": "look", "arguments": null}}</tool_call>', calls=(("look", "{}"),)
    ),
    Written(
        "qwen3_coder",
        "I write.\n\n<tool_call>\n<function=write>\n"
        + "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in _CODER_VALUES)
        + "</function>\n</tool_call>\n<tool_call>\n<function=look>\n</function>\n</tool_call>",
        "I write.", calls=(("write", _TAGGED), ("look", "{}")),
    ),
    # Without the outer tag, and text of several lines.
    Written(
        "qwen3_coder",
        "<function=write>\n<parameter=text>\none\n\ttwo\n\n</parameter>\n<parameter=count>-3</parameter></function>",
        calls=(("write", _LINES),),
    ),
    Written(
        "minimax",
        '<think>Hm.</think><minimax:tool_call>\n<invoke name="write">\n'
        + "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in _CODER_VALUES)
        + '</invoke>\n<invoke name="look">\n</invoke>\n</minimax:tool_call>',
        reasoning="Hm.", calls=(("write", _TAGGED), ("look", "{}")),
    ),
    Written(
        "glm",
        "\n<think>Hm.</think>\nI write.\n<tool_call>write\n"
        + "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in _CODER_VALUES)
        + "</tool_call>\n<tool_call>look\n</tool_call>"
        + "<tool_call>look<arg_key>count</arg_key><arg_value>1.0</arg_value></tool_call>",
        "I write.", "Hm.", (("write", _TAGGED), ("look", "{}"), ("look", '{"count": 1}')),
    ),
    Written(
        "deepseek_dsml",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="write">\n'
        '<｜DSML｜parameter name="text" string="true">one\n\ttwo\n</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="count" string="false">-3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
        calls=(("write", _LINES),),
    ),
    Written(
        "deepseek",
        "I write." + _marked(
            f"<｜tool▁call▁begin｜>write<｜tool▁sep｜>{_JSON}<｜tool▁call▁end｜>",
            "<｜tool▁call▁begin｜>look<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        ),
        "I write.", calls=(("write", _JSON), ("look", "{}")),
    ),
    Written(
        "deepseek",
        _marked(
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>write\n```json\n{_JSON}\n```<｜tool▁call▁end｜>",
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{}\n```<｜tool▁call▁end｜>",
        ),
        calls=(("write", _JSON), ("look", "{}")),
    ),
    Written(
        "kimi",
        "I write.<|tool_calls_section_begin|><|tool_call_begin|>functions.write:0<|tool_call_argument_begin|>"
        f"{_JSON}<|tool_call_end|><|tool_call_begin|>functions.look:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "I write.", calls=(("write", _JSON), ("look", "{}")),
    ),
    Written(
        "mistral",
        f'[TOOL_CALLS] [{{"name": "write", "arguments": {_JSON}}}, '
        '{"name": "look", "arguments": {}, "id": "abcDEF123"}]',
        calls=(("write", _JSON), ("look", "{}")),
    ),
    Written(
        "mistral",
        f"I write.[TOOL_CALLS]write[ARGS]{_JSON}[TOOL_CALLS]look[CALL_ID]abcDEF123[ARGS]{{}}",
        "I write.", calls=(("write", _JSON), ("look", "{}")),
    ),
    Written(
        "llama",
        f'{{"name": "write", "parameters": {_JSON}}}; {{"name": "look", "parameters": {{}}}}',
        calls=(("write", _JSON), ("look", "{}")),
    ),
    Written(
        "llama",
        f'<|python_tag|>{{"type": "function", "name": "write", "parameters": {_JSON}}}',
        calls=(("write", _JSON),),
    ),
    Written(
        "llama",
        'I write.\n<|python_start|>{"name": "look", "parameters": {}}<|python_end|>',
        "I write.", calls=(("look", "{}"),),
    ),
    Written(
        "gemma",
        'I write.<|tool_call>call:write{count:-3,text:<|"|>one\n\ttwo, {"a": ]}\n<|"|>,'
        'more:{<|"|>k<|"|>: [1, null],b:{}}}'
        "<tool_call|><|tool_call>call:look{}<tool_call|>",
        "I write.",
        calls=(
            ("write", '{"count": -3, "text": "one\\n\\ttwo, {\\"a\\": ]}\\n", "more": {"k": [1, null], "b": {}}}'),
            ("look", "{}"),
        ),
    ),
    Written(
        "pythonic",
        '<|tool_call_start|>[write(text="one\\n\\ttwo\\n", count=-3), look()]<|tool_call_end|>I write.',
        "I write.", calls=(("write", _LINES), ("look", "{}")),
    ),
    Written(
        "json_list",
        f'I write.\n<tool_calls>\n[{{"name": "write", "arguments": {_JSON}}},\n'
        '{"name": "look", "arguments": {}}]\n</tool_calls>',
        "I write.", calls=(("write", _JSON), ("look", "{}")),
    ),
    Written("granite", f'<|tool_call|>[{{"name": "write", "arguments": {_JSON}}}]', calls=(("write", _JSON),)),
    Written(
        "harmony",
        "<|channel|>analysis<|message|>I should.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I write.<|end|>"
        f"<|start|>assistant<|channel|>commentary to=functions.write <|constrain|>json<|message|>{_JSON}<|call|>",
        "I write.", "I should.", (("write", _JSON),),
    ),
    Written(
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|>"
        f"<|start|>assistant to=functions.write<|channel|>commentary json<|message|>{_JSON}",
        reasoning="Hm.", calls=(("write", _JSON),),
    ),
    Written(
        "harmony",
        "<|channel|>analysis<|message|>Two times 23.<|end|><|start|>assistant<|channel|>analysis<|message|>46.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 46.\n<|return|>",
        "It is 46.\n", "Two times 23.\n\n46.",
    ),
]  # fmt: skip

# No valid call: all of it is text. (format, text)
TEXT = [
    ("hermes", ' {"a": 1} plain <b> \n\n text \n'),
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>\n</tool_call> <tool_call"),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "look", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "look", "arguments": "no"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "look"'),
    ("hermes", '<tool_call>{"name": "look", "arguments": {"text": }}\n</tool_call> and on'),
    ("hermes", '<tool_call>{"name": "look", "arguments": {"text": "cut of'),
    ("hermes", '<tool_call>{"name": "look", "arguments": {"count": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "look", "arguments": {"count": 1e999}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "look", "arguments": {"place": "\\ud83d"}}</tool_call>'),
    ("hermes", "<tool_call>[[[[" + "{" * 50),
    ("qwen3_coder", "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=look>\n<parameter=text>\ncut of"),
    ("qwen3_coder", "<tool_call>\n<function=look>\nwhat is this</function>"),
    ("qwen3_coder", "<function=look"),
    ("minimax", '<minimax:tool_call>\n<invoke name="unknown">\n</invoke>'),
    ("glm", "<tool_call>unknown\n</tool_call>"),
    ("glm", "<tool_call>look\n<arg_key>text</arg_key>\n<arg_value>cut of"),
    ("deepseek", "<｜tool▁calls▁begin｜>no<｜tool▁calls▁end｜>"),
    ("deepseek", "<｜tool▁call▁begin｜>unknown<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
    ("deepseek", '<｜tool▁call▁begin｜>look<｜tool▁sep｜>{"text": "cut of'),
    ("kimi", "<|tool_calls_section_begin|><|tool_call_begin|>look:0"),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS]unknown[ARGS]{}"),
    ("mistral", '[TOOL_CALLS] [{"name": "look"'),
    ("llama", '{"name": "unknown", "parameters": {}}'),
    ("llama", "[1, 2] is a list"),
    ("llama", '{"cut of'),
    ("gemma", "<|tool_call>call:unknown{}<tool_call|>"),
    ("gemma", "<|tool_call>call:look{count:}<tool_call|>"),
    ("gemma", "<|tool_call>call:look{" + "a:{" * 50),
    ("gemma", '<|tool_call>call:look{text:<|"|>cut of'),
    ("pythonic", "<|tool_call_start|>[look(1)]<|tool_call_end|>"),
    ("pythonic", "<|tool_call_start|>[look(text=__import__('os'))]<|tool_call_end|>"),
    ("pythonic", "<|tool_call_start|>" + "(" * 3000),
    ("pythonic", "<|tool_call_start|>[unknown()]"),
    ("harmony", "Plain text without channels."),
    ("harmony", "to= be or not"),
]
