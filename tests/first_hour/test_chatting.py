"""Chat as people type it: blocks and pastes of several lines, /undo and /retry, leaving, and a context that is full."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from foreroute.cli.chat_session import Conversation
from foreroute.cli.terminal.lines import joined
from tests.cli.harness import ROOT, Ran
from tests.cli.test_chat import Screen

MODEL = "foreroute-tiny"
FAST = ("--memory", "25%", "--threads", "1", "--max-new-tokens", "16")


@pytest.fixture
def chat(run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Say these lines to a model, piped."""

    def chatting(*lines: str, model: str | Path = MODEL, flags: tuple[str, ...] = FAST) -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode())))
        return run("chat", model, *flags)

    return chatting


def saved(chat: Callable[..., Ran], folder: Path, *lines: str, **options: object) -> tuple[list[str], Ran]:
    """What each message of the chat says after these lines."""
    file = folder / "kept.json"
    file.unlink(missing_ok=True)
    ran = chat(*lines, f"/save {file}", **options)
    return [turn["content"] for turn in json.loads(file.read_text())["messages"]], ran


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["one", "two"], ["one", "two"]),
        (["one\\", "two", "three"], ["one\ntwo", "three"]),
        (['"""one', "", '  two"""', "three"], ["one\n\n  two", "three"]),
        (['"""', "one\\", "two", '"""', "three"], ["one\\\ntwo", "three"]),
        (['"""one"""', "two"], ["one", "two"]),
        (['say """one', "two"], ['say """one', "two"]),
        (['"""one', "two"], ["one\ntwo"]),
        (["pasted\nlines", "two"], ["pasted\nlines", "two"]),
    ],
)
def test_lines_that_belong_together_are_one_message(lines: list[str], said: list[str]) -> None:
    assert list(joined(iter(lines))) == said


def test_a_block_is_one_question(chat, tmp_path: Path) -> None:
    messages, _ = saved(chat, tmp_path, '"""12', "+", '30"""')
    assert len(messages) == 2
    assert messages[0] == "12\n+\n30"


def test_undo_takes_back_and_retry_answers_again(chat, tmp_path: Path) -> None:
    messages, ran = saved(chat, tmp_path, "12 + 30", "40 + 7", "/undo")
    assert [messages[0], len(messages)] == ["12 + 30", 2]
    assert "taken back: 40 + 7" in ran.err
    again, ran = saved(chat, tmp_path, "12 + 30", "/retry")
    assert again == messages, "the likeliest tokens are the same again"
    assert ran.out == 2 * chat("12 + 30").out
    assert chat("/undo", "/retry").err.count("Nothing was asked yet") == 2


def test_a_retry_that_is_refused_leaves_what_was_said(chat, tmp_path: Path, monkeypatch) -> None:
    from foreroute.errors import PromptError
    from foreroute.generation import generate as generation

    made = []

    def once(*args: object, **options: object) -> object:
        if made:
            raise PromptError("no")
        made.append(generate(*args, **options))
        return made[0]

    generate = generation.generate
    monkeypatch.setattr(generation, "generate", once)
    messages, ran = saved(chat, tmp_path, "12 + 30", "/retry")
    assert "error: no" in ran.err
    assert [messages[0], len(messages)] == ["12 + 30", 2]


@pytest.mark.parametrize("leaving", ["/exit", "/quit", "/bye"])
def test_there_are_three_words_to_leave(chat, leaving: str) -> None:
    ran = chat(leaving, "12 + 30")
    assert (ran.code, ran.out) == (0, "")


def test_exit_alone_is_asked_about_before_it_is_said(chat, tmp_path: Path) -> None:
    ran = chat("Quit")
    assert ran.out == ""
    assert "/exit or Ctrl-D leaves" in ran.err
    messages, _ = saved(chat, tmp_path, "exit", "exit")
    assert messages[0] == "exit", "said twice, it is meant"


def test_a_paste_that_begins_with_a_path_is_no_command(chat, tmp_path: Path) -> None:
    messages, _ = saved(chat, tmp_path, "/etc/hosts\\", "is a file")
    assert messages[0] == "/etc/hosts\nis a file"
    assert "no command /etc/hosts" in chat("/etc/hosts").err


def test_a_full_context_leaves_out_the_oldest_turns_and_says_so(chat, tiny: Path, tmp_path: Path) -> None:
    """The context holds 1024 tokens, a byte each."""
    lines = [f"{number} " + "x" * 240 for number in range(8)]
    messages, ran = saved(chat, tmp_path, *lines, model=tiny)
    assert ran.code == 0
    assert "error" not in ran.err
    assert "the context of 1,024 tokens is full: the oldest 4 messages are left out" in ran.err
    assert [text for text in messages if "xxx" in text] == lines, "all is saved"
    # One message that is too long alone is refused as before, and leaves nothing out.
    ran = chat("12", "y" * 2000, "13", model=tiny)
    assert "/clear begins anew" in ran.err
    assert "left out" not in ran.err


def test_what_is_left_out_is_whole_turns() -> None:
    talk = Conversation([{"role": role, "content": "x"} for role in ("user", "assistant") * 2 + ("user",)])
    assert [talk.drop_oldest(), talk.first, talk.drop_oldest(), talk.first] == [True, 2, True, 4]
    assert not talk.drop_oldest(), "the last question stays"
    assert (talk.take_back(), talk.first, len(talk.messages)) == ("x", 4, 4)
    assert (talk.take_back(), talk.first, len(talk.messages)) == ("x", 2, 2)


def test_a_loaded_chat_shows_where_it_had_come_to(chat, tmp_path: Path) -> None:
    saved(chat, tmp_path, "12 + 30")
    ran = chat("/exit", flags=(*FAST, "--load", str(tmp_path / "kept.json")))
    assert "2 messages so far" in ran.err
    assert "> 12 + 30" in ran.err


def test_a_paste_is_one_message_and_lines_are_recalled_in_the_next_chat(tiny: Path, tmp_path: Path) -> None:
    """On a terminal, with the bytes that terminals send around what is pasted."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TERM": "xterm", "COLUMNS": "80",
                   "XDG_STATE_HOME": str(tmp_path / "state")}  # fmt: skip
    script = "import sys\nfrom foreroute.cli.main import main\nsys.exit(main())"
    file, history = tmp_path / "kept.json", tmp_path / "state" / "foreroute" / "chat_history"
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", script, "chat", str(tiny), *FAST],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    screen = Screen(ours)
    try:
        screen.until("> ")
        os.write(ours, b"\x1b[200~one\ntwo\nthree\x1b[201~\r")
        screen.until("cut off")
        screen.until("> ")
        os.write(ours, f"/save {file}\r".encode())
        screen.until("2 messages")
        screen.until("> ")
        os.write(ours, b"\x04")
        assert child.wait(30) == 0
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait()
        os.close(ours)
    assert json.loads(file.read_text())["messages"][0]["content"] == "one\ntwo\nthree"
    assert "three" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0, "for its owner alone"
