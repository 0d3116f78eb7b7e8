"""The page's Markdown: what an answer's text becomes, in node, without a browser."""

import json
import shutil
import subprocess
from importlib.resources import files
from typing import Any

import pytest

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no node on this machine")
PAGE = files("foreroute.server") / "page"


def parsed(*texts: str) -> list[Any]:
    program = (
        "const {parse} = await import(process.argv[1]); let text = '';"
        "for await (const part of process.stdin) text += part;"
        "console.log(JSON.stringify(JSON.parse(text).map((one) => parse(one))));"
    )
    command = [str(NODE), "--input-type=module", "-e", program, (PAGE / "markdown.js").as_uri()]  # type: ignore[attr-defined]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def short(part: Any) -> Any:
    """A part as [tag, child, ...], a text as itself."""
    if isinstance(part, str):
        return part
    told = part.get("text") if part["tag"] == "pre" else None
    if told is not None:
        return ["pre", part["language"], told]
    return [part["tag"], *([part["href"]] if "href" in part else []), *map(short, part["children"])]


CASES = {
    "Hi *there*, **you** and `x < y`.": [
        ["p", "Hi ", ["em", "there"], ", ", ["strong", "you"], " and ", ["code", "x < y"], "."]
    ],
    "a\nb\n\nc": [["p", "a\nb"], ["p", "c"]],
    "# One\n### Two": [["h3", "One"], ["h5", "Two"]],
    "```py\nif a < b:\n\n    x()\n```\nrest": [["pre", "py", "if a < b:\n\n    x()"], ["p", "rest"]],
    "```\nnot closed yet": [["pre", "", "not closed yet"]],
    "- a\n- b\n  - c\n\nend": [
        ["ul", ["li", ["p", "a"]], ["li", ["p", "b"], ["ul", ["li", ["p", "c"]]]]],
        ["p", "end"],
    ],
    "1. a\n2. b": [["ol", ["li", ["p", "a"]], ["li", ["p", "b"]]]],
    "> said\n> so": [["blockquote", ["p", "said\nso"]]],
    "---": [["hr"]],
    "| a | b |\n|---|---|\n| 1 | 2 |": [["table", ["tr", ["th", "a"], ["th", "b"]], ["tr", ["td", "1"], ["td", "2"]]]],
    "[site](https://example.com/x)": [["p", ["a", "https://example.com/x", "site"]]],
    # Nothing that runs, and nothing that is loaded.
    "[x](javascript:alert(1))": [["p", "[x](javascript:alert(1))"]],
    "[x](data:text/html,a)": [["p", "[x](data:text/html,a)"]],
    "<img src=x onerror=a>": [["p", "<img src=x onerror=a>"]],
    "2 * 3 * 4 and snake_case_name, **open": [["p", "2 * 3 * 4 and snake_case_name, **open"]],
    "\\*not\\* `a": [["p", "*not* `a"]],
    "": [],
}


def test_texts() -> None:
    for (text, wanted), found in zip(CASES.items(), parsed(*CASES), strict=True):
        assert [short(part) for part in found] == wanted, text


@pytest.mark.parametrize(
    "piece", ["*", "**", "`", "[", "](", "> ", "- ", "```\n", "_a", "|-", "# ", "\\", "a|b\n-|-\n", "  - \n"]
)
def test_a_text_that_repeats_itself_takes_no_time(piece: str) -> None:
    """Within the time of the process: a parser that goes back for each mark takes hours."""
    parsed(piece * 20_000)


def test_nothing_of_the_page_makes_markup_of_a_text() -> None:
    for script in PAGE.iterdir():
        if script.name.endswith(".js"):
            text = script.read_text(encoding="utf-8")
            for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
                assert word not in text, (script.name, word)
