"""Show a chat's answers while they are generated: rendered as markdown, or as plain text."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from foreroute.cli import figures
from foreroute.config import Plan
from foreroute.units import format_memory

if TYPE_CHECKING:
    from rich.markdown import Markdown

    from foreroute.generation.generate import GenerationReport

_FENCES = ("```", "~~~")


@contextmanager
def plain_answer() -> Iterator[Callable[[str], None]]:
    """While inside, a function that writes pieces of an answer unchanged; at the end a newline."""
    write = figures.writer(sys.stdout)
    yield write
    write("\n")


class MarkdownAnswer:
    """Renders markdown: finished blocks stay as printed, the current one is redrawn a few times a second.

    So a long answer scrolls like any text, and the cost of drawing does not grow with it.
    """

    def __init__(self) -> None:
        from rich.live import Live

        self._text = ""
        self._shown_at = 0  # the text up to here is printed for good
        self._live = Live(
            console=figures.stdout_console(), refresh_per_second=8, transient=True, vertical_overflow="crop"
        )

    def __enter__(self) -> Callable[[str], None]:
        self._live.start()
        return self.write

    def __exit__(self, *error: object) -> None:
        from rich.text import Text

        self._live.update(Text(""))
        self._live.stop()
        if self._text[self._shown_at :].strip():
            self._live.console.print(_markdown(self._text[self._shown_at :]))

    def write(self, piece: str) -> None:
        """Show the next piece of text; it ends with a whole character."""
        self._text += figures.printable(piece)
        end = finished_blocks(self._text, self._shown_at)
        if end > self._shown_at:
            self._live.console.print(_markdown(self._text[self._shown_at : end]))
            self._live.console.print()
            self._shown_at = end
        tail = self._text[self._shown_at :]
        # Of a block that is taller than the terminal, only the end is shown until it is finished.
        most = max(self._live.console.size.height - 2, 4)
        lines = tail.splitlines()
        is_code = tail.lstrip().startswith(_FENCES)
        shown = lines[:1] + lines[1 - most :] if is_code and len(lines) > most else lines[-most:]
        self._live.update(_markdown("\n".join(shown)))


def _markdown(text: str) -> "Markdown":
    from rich.markdown import Markdown

    # No links: a model must not choose where a click leads.
    return Markdown(hard_breaks(text), hyperlinks=False)


def hard_breaks(text: str) -> str:
    """Keep the model's line breaks; plain markdown would join the lines."""
    fence, lines = "", []
    for line in text.split("\n"):
        mark = line.lstrip()[:3]
        if fence:
            fence = "" if mark == fence else fence
        elif mark in _FENCES:
            fence = mark
        elif line.strip():
            line += "  "
        lines.append(line)
    return "\n".join(lines)


def finished_blocks(text: str, start: int = 0) -> int:
    """Find where the last finished block of markdown after `start` ends: at an empty line outside fenced code.

    Returns:
        An index into the text; `start` where nothing is finished. The text before it will not be rendered differently.
    """
    end = at = start
    fence = ""
    for line in text[start:].splitlines(keepends=True):
        at += len(line)
        mark = line.lstrip()[:3]
        if fence:
            fence = "" if mark == fence else fence
        elif mark in _FENCES:
            fence = mark
        elif line.strip() == "" and line.endswith("\n"):
            end = at
    return end


def stats_rows(report: "GenerationReport", plan: Plan, num_turns: int) -> list[figures.Row]:
    """Rows of the last answer's `report` under `plan`, the turns so far (num_turns), and the prompt tokens reused."""
    reused = f"of the prompt's {report.prompt_tokens:,}; the chat keeps {format_memory(report.prompt_cache_bytes)}"
    return [
        ("answer", f"{num_turns}", "of this chat, the last one:"),
        ("reused", f"{report.prompt_tokens_reused:,} tokens", reused),
        *figures.report_rows(report, plan),
    ]
