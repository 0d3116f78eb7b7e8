"""`foreroute chat`: piped, in this process; and on a terminal, where Ctrl-C stops an answer and not the chat."""

import errno
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from foreroute.cli.chat_session import Conversation, read_setting
from foreroute.cli.chat_view import finished_blocks, hard_breaks
from foreroute.cli.commands import demo
from foreroute.errors import PromptError
from tests.cli.harness import ROOT, Ran

FAST = ("--memory", "25%", "--threads", "1", "--max-new-tokens", "16")


@pytest.fixture
def chat(run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Say these lines to the model that ships: what a random one says is no text to go on with."""

    def chatting(*lines: str, flags: tuple[str, ...] = FAST) -> Ran:
        text = "".join(line + "\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        return run("chat", demo.find_model(), *flags)

    return chatting


def test_answers_go_to_stdout_and_a_turn_computes_only_what_is_new(chat, run) -> None:
    ran = chat("12 + 30", "40 + 7", "/stats", "/exit", "never said")
    assert ran.code == 0
    first = run("generate", demo.find_model(), "12 + 30", "--quiet", *FAST).out
    assert ran.out.startswith(first)
    assert ran.out.count("\n") >= 2
    reused = next(line for line in ran.err.splitlines() if line.startswith("reused"))
    # The first turn, its answer, and of the template what is between them.
    assert int(reused.split()[1]) >= 20
    for name in ("hits", "MB/token", "stall", "TPOT"):
        assert name in ran.err


def test_commands_and_settings_that_are_not_known_are_named_and_the_chat_goes_on(chat) -> None:
    ran = chat(
        "/nope", "/set sharpness 3", "/set temperature hot", "/set policy sloth", "/set top_k", "/stats", "hello"
    )
    assert ran.code == 0
    for said in ("no command /nope", "/help, /system", "no setting 'sharpness'", "temperature is to be a number",
                 "Policy 'sloth' is not known", "/set top_k needs a value", "no answer yet"):  # fmt: skip
        assert said in ran.err
    assert ran.out


def test_settings_take_effect(chat) -> None:
    sampled = ("/set temperature 3", "/set seed 1", "hello")
    first, second = chat(*sampled).out, chat(*sampled).out
    assert first == second
    assert chat("hello").out != first
    assert chat("/set max_new_tokens 1", "hello").out != chat("hello").out
    assert "cut off" in chat("/set max_new_tokens 1", "hello").err
    assert chat("/set temperature 3", "/set temperature default", "hello").out == chat("hello").out


def test_a_chat_is_kept_and_gone_on_with(chat, tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    whole = chat("/system be kind", "hello", f"/save {file}", "and then?")
    kept = json.loads(file.read_text())
    assert kept["system"] == "be kind"
    assert [turn["role"] for turn in kept["messages"]] == ["user", "assistant"]
    answers = whole.out.removeprefix(kept["messages"][1]["content"] + "\n")
    assert answers
    assert chat(f"/load {file}", "and then?").out == answers
    assert chat("and then?", flags=(*FAST, "--load", str(file))).out == answers
    assert chat("x", f"/load {file}", "/clear", "/system", "hello").out.endswith(chat("hello").out)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("hello", "it is not JSON"),
        ("[1]", "not a saved chat"),
        ('{"format": "foreroute-chat", "version": 9}', "another version"),
        ('{"format": "foreroute-chat", "version": 1, "messages": [{"role": "cat"}]}', "message 1 has no role"),
        ('{"format": "foreroute-chat", "version": 1, "messages": [], "settings": {"x": 1}}', "no setting 'x'"),
    ],
)
def test_a_file_that_is_no_chat_is_refused_by_what_is_wrong(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "chat.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(PromptError, match=said):
        Conversation.load(file)
    if content in ("hello", "[1]"):
        with pytest.raises(PromptError, match="Choose another name"):
            Conversation().save(file, "model")
        assert file.read_text() == content, "what is no chat is not written over"


def test_a_disk_that_is_full_leaves_the_saved_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "chat.json"
    Conversation([{"role": "user", "content": "hello"}]).save(file, "model")
    before = file.read_bytes()

    def full(path: Path, text: str, **options: object) -> None:
        path.write_bytes(text[:9].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PromptError, match="No space left on device"):
        Conversation().save(file, "model")
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_chat_that_outgrows_the_context_says_what_to_do(chat) -> None:
    ran = chat("hello" * 3000, "hello")
    assert "context" in ran.err
    assert "/clear begins anew" in ran.err
    assert ran.out == chat("hello").out, "what could not be answered is not kept"


def test_a_model_without_a_template_goes_on_with_the_text(run, copied: Path, tmp_path, monkeypatch) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        file = copied / name
        if file.exists():
            text = file.read_text()
            file.unlink()
            if name.endswith("json"):
                file.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "chat_template"}))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n/system x\n")))
    ran = run("chat", copied, *FAST)
    assert "no chat template" in ran.err
    assert "no system message" in ran.err
    assert ran.out == run("generate", copied, "hello\n", "--no-chat", "--quiet", *FAST).out


@pytest.mark.parametrize(
    ("text", "end"),
    [("one", 0), ("one\n\ntwo", 5), ("```\na\n\nb", 0), ("```\na\n\nb\n```\n\nc", 14), ("a\n\n~~~\nb\n\n", 3)],
)
def test_a_block_is_finished_at_an_empty_line_outside_of_code(text: str, end: int) -> None:
    assert finished_blocks(text) == end


def test_lines_of_an_answer_stay_lines_and_code_stays_code() -> None:
    assert hard_breaks("a\nb\n\n```\nc\n```") == "a  \nb  \n\n```\nc\n```"


def test_a_setting_reads_what_it_takes() -> None:
    assert (read_setting("top_p", "0.5"), read_setting("seed", "7"), read_setting("top_k", "default")) == (0.5, 7, None)
    with pytest.raises(PromptError, match="min_p: 2 must be at least 0, at most 1"):
        read_setting("min_p", "2")


class Screen:
    """What a terminal shows, read until something is there."""

    def __init__(self, terminal: int) -> None:
        self._terminal, self._unread = terminal, ""

    def until(self, said: str, within_s: float = 60.0) -> None:
        """Wait for this; what comes after it is for the next call."""
        deadline = time.monotonic() + within_s
        while said not in self._unread:
            readable, _, _ = select.select([self._terminal], [], [], max(deadline - time.monotonic(), 0))
            assert readable, f"{said!r} is not in {self._unread!r}"
            self._unread += os.read(self._terminal, 4096).decode(errors="replace")
        self._unread = self._unread.partition(said)[2]


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_chat(tiny: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    script = "import sys\nfrom foreroute.cli.main import main\nsys.exit(main())"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "TERM": "xterm",
        "COLUMNS": "80",
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    flags = ("--memory", "25%", "--threads", "1", "--max-new-tokens", "900")
    file = tmp_path / "kept.json"
    child = subprocess.Popen(
        [sys.executable, "-c", script, "chat", str(tiny), *flags],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    screen = Screen(ours)
    try:
        screen.until("> ")
        os.write(ours, b"hello\n")
        screen.until("hello")
        time.sleep(0.5)  # so that some of the answer is there; where none is, the test fails below
        child.send_signal(signal.SIGINT)
        screen.until("what was said stays")
        screen.until("> ")
        os.write(ours, f"/save {file}\n".encode())
        screen.until("2 messages")
        screen.until("> ")
        os.write(ours, b"\x04")
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    said = json.loads(file.read_text())["messages"]
    assert [turn["role"] for turn in said] == ["user", "assistant"]
    assert said[1]["content"]
