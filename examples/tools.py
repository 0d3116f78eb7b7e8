"""Let a running server's model call a tool, by OpenAI's client: pip install openai.

foreroute serve foreroute-tiny --tool-parser hermes &
python examples/tools.py [URL]

The call is enforced: whatever the model, its arguments are two integers. A model that was trained on tools chooses them
well; the one that ships was not.
"""

import json
import sys

from openai import OpenAI

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 999},
                "b": {"type": "integer", "minimum": 0, "maximum": 999},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "12 + 30"}],
    tools=[ADD],
    tool_choice={"type": "function", "function": {"name": "add"}},
    temperature=0,
    max_tokens=256,
)
for call in answer.choices[0].message.tool_calls or ():
    given = json.loads(call.function.arguments)
    print(f"add({given['a']}, {given['b']}) = {given['a'] + given['b']}")
