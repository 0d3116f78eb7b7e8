"""`foreroute run MODEL` as people type it, and completion by the shell."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foreroute.cli.commands import chat, generate
from foreroute.cli.main import build_parser, main

SRC = Path(chat.__file__).parents[3]


class Terminal(io.StringIO):
    """Standard input of someone who types."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("words", "is_terminal", "command"),
    [(["m"], True, chat), (["m", "hi"], True, generate), (["m"], False, generate), (["m", "--json"], True, generate)],
)
def test_run_is_chat_or_generate(monkeypatch, words: list[str], is_terminal: bool, command: Any) -> None:
    ran = []
    for one in (chat, generate):
        monkeypatch.setattr(one, "run", lambda args, one=one: ran.append((one, args)) or 0)
    monkeypatch.setattr(sys, "stdin", Terminal() if is_terminal else io.StringIO())
    assert main(["run", *words, "--temperature", "0.5"]) == 0
    ((one, args),) = ran
    assert one is command
    theirs = vars(build_parser().parse_args([command.__name__.split(".")[-1], "m"]))
    assert {*theirs} <= {*vars(args)}, "every flag that the command reads"
    assert (args.temperature, args.system) == (0.5, None)


def test_run_answers_a_prompt(run, tiny: Path) -> None:
    words = ("--max-new-tokens", "3", "--threads", "1", "--json")
    assert run("run", tiny, "hi", *words).json["text"] == run("generate", tiny, "hi", *words).json["text"]


def test_without_argcomplete_completion_says_what_to_install(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    ran = run("completion", "bash")
    assert (ran.code, "pip install 'foreroute[completion]'" in ran.err) == (2, True)


def completions(line: str) -> set[str]:
    """What a shell gets that asks about `line`, as argcomplete's function asks."""
    script = "from foreroute.cli.main import main; main([])"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SRC), os.environ.get("PYTHONPATH", "")]), "_ARGCOMPLETE": "1",
        "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout",
    }  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    return {word.strip() for word in ran.stdout.split("\n") if word.strip()}


def test_a_shell_completes_commands_flags_choices_and_models(run, config) -> None:
    pytest.importorskip("argcomplete")
    for shell, mark in {"bash": "complete -o", "zsh": "compdef", "fish": "complete --command foreroute"}.items():
        ran = run("completion", shell)
        assert (ran.code, mark in ran.out) == (0, True), shell
    assert completions("foreroute se") == {"serve"}
    assert completions("foreroute generate m --max-n") == {"--max-new-tokens"}
    assert completions("foreroute generate m --device ") == {"cpu", "cuda"}
    assert "foreroute-tiny" in completions("foreroute show forerou")
    config('[aliases]\nbiggest = "/data/big"\n')
    assert completions("foreroute chat bigg") == {"biggest"}
