"""The process that renders chat templates, one after another: `python -m ...dialogue.template_worker BYTES`.

A template comes with a model, and may loop or grow without end. Here it can allocate at most BYTES beyond what the
process starts with, and the parent kills the process at a timeout. JSON lines come in on standard input and go out on
standard output:

    {"template": ..., "messages": [...], "tools": [...], "variables": {...}, "most_chars": ..., "most_s": ...}
    {"text": ...} or {"error": ...}

Without messages, the template is read, and the answer is {"reading": ...}, as dialogue/reading.py has it.
"""

import json
import os
import sys
from typing import Any

from foreroute.server.dialogue.reading import read_template
from foreroute.system.limits import end_after, limit_memory


def read(asked: dict[str, Any]) -> dict[str, Any]:
    """Find out what the template reads."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def rendered(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str | None:
        return render({**asked, "messages": messages, "tools": tools}).get("text")

    try:
        parsed = _compile_jinja_template(asked["template"]).environment.parse(asked["template"])
        names = {node.name for node in parsed.find_all(nodes.Name) if node.ctx == "load"}
    except Exception as error:  # noqa: BLE001 - whatever a template's source makes the parser raise
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"reading": read_template(rendered, sorted(names)).as_json()}


def render(asked: dict[str, Any]) -> dict[str, str]:
    """Render one template in transformers' own sandbox; whatever it raises becomes an error."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            conversations=[asked["messages"]],
            tools=asked["tools"],
            chat_template=asked["template"],
            add_generation_prompt=True,
            **asked["variables"],
        )
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except TemplateError as error:
        return {"error": str(error)[:500]}
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    if len(rendered[0]) > asked["most_chars"]:
        return {"error": f"it gives more than {asked['most_chars']:,} characters"}
    return {"text": rendered[0]}


def main() -> None:
    """Serve until standard input ends."""
    import transformers.utils.chat_template_utils  # noqa: F401 - imported before memory is limited

    limit_memory(int(sys.argv[1]))
    # Keep the real standard output for answers; prints of a library must not mix with them.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print("{}", file=answers, flush=True)
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        stop = end_after(2 * asked["most_s"])
        print(json.dumps(render(asked) if "messages" in asked else read(asked)), file=answers, flush=True)
        stop()


if __name__ == "__main__":
    main()
