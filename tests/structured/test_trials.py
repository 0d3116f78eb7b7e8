"""How grammars are tried: a few at a time, each once, in processes that see no secret; why one fails is told apart."""

import subprocess
import sys
import threading
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")

from foreroute.children import child_command, child_environment
from foreroute.errors import ForerouteError, GrammarError, QueueFullError
from foreroute.structured import trials
from foreroute.structured.compiler import GrammarCompiler
from foreroute.structured.grammar import Grammar

WAIT_S = 60


@pytest.fixture
def compiler(tokenizer: Any) -> Any:
    made = GrammarCompiler(tokenizer, 4096, (0, 4))
    yield made
    made.close()


class Held:
    """In place of trials: each waits for `gate`, then says `wrong`."""

    def __init__(self, wrong: str | Exception = "") -> None:
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)
        self.wrong, self.texts = wrong, list[str]()
        self._open, self.most_open, self._lock = 0, 0, threading.Lock()

    def attempt(self, text: str) -> str:
        with self._lock:
            self.texts.append(text)
            self._open += 1
            self.most_open = max(self.most_open, self._open)
        self.begun.release()
        assert self.gate.wait(WAIT_S)
        with self._lock:
            self._open -= 1
        if isinstance(self.wrong, Exception):
            raise self.wrong
        return self.wrong

    def close(self) -> None:
        self.gate.set()


def test_equal_ones_are_tried_once_and_few_at_a_time(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held()
    monkeypatch.setattr(compiler, "_trials", held)
    jobs = [compiler.submit(Grammar.choice([f"a{at // 3}"])) for at in range(18 * 3)]
    with pytest.raises(QueueFullError, match="18 grammars"):
        compiler.submit(Grammar.choice(["b"]))
    assert compiler.submit(Grammar.choice(["a5"])) is jobs[15], "one that is worked on already takes no place"
    held.gate.set()
    found = [job.result(WAIT_S) for job in jobs]
    assert (len(held.texts), len({id(one) for one in found}), held.most_open) == (18, 18, 2)
    compiler.compile(Grammar.choice(["b"]))
    assert compiler.compile(Grammar.choice(["a5"])) is found[15]
    assert len(held.texts) == 19


def test_what_was_refused_is_not_tried_again(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(GrammarError("It is too large."))
    held.gate.set()
    monkeypatch.setattr(compiler, "_trials", held)
    for _ in range(3):
        with pytest.raises(GrammarError, match="too large"):
            compiler.compile(Grammar.choice(["a"]))
    assert len(held.texts) == 1
    # What says nothing about the grammar is.
    held.wrong = QueueFullError("The machine is too busy.")
    for _ in range(2):
        with pytest.raises(QueueFullError):
            compiler.compile(Grammar.choice(["b"]))
    held.wrong = ""
    compiler.compile(Grammar.choice(["b"]))
    for at in range(300):
        held.wrong = GrammarError("no")
        with pytest.raises(GrammarError):
            compiler.compile(Grammar.choice([str(at)]))
    assert len(compiler._refused) == 256


KILLS = "import os, signal, sys; sys.stdin.read(); os.kill(os.getpid(), signal.{})"


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (KILLS.format("SIGSEGV"), GrammarError, r"compiler ends on it \(SIGSEGV\)"),
        (KILLS.format("SIGABRT"), GrammarError, r"compiler ends on it \(SIGABRT\)"),
        (KILLS.format("SIGXCPU"), GrammarError, "more than 5 s"),
        (KILLS.format("SIGKILL"), GrammarError, "more than 5 s"),
        ("import sys; sys.stdin.read(); raise MemoryError", GrammarError, "more than 160 MiB"),
        ("import no_such_module", ForerouteError, r"tries grammars fails \(exit 1\): ModuleNotFoundError: No module"),
    ],
)
def test_why_it_failed(code: str, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "child_command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(ForerouteError, match=message) as found:
        trials.Trials().attempt("{}")
    assert type(found.value) is kind


def test_closing_ends_those_that_run(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = "import sys, time; sys.stdin.read(); time.sleep(60)"
    monkeypatch.setattr(trials, "child_command", lambda *_: [sys.executable, "-c", wait])
    jobs = [compiler.submit(Grammar.choice([str(at)])) for at in range(4)]
    compiler.close()
    for job in jobs:
        with pytest.raises(QueueFullError, match="shutting down"):
            job.result(WAIT_S)
    with pytest.raises(QueueFullError, match="shutting down"):
        compiler.submit(Grammar.choice(["x"]))


def test_a_child_sees_no_secret_and_nothing_of_the_working_folder(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "AWS_SECRET", "DATABASE_URL", "HF_TOKEN", "PASSWORD"):
        monkeypatch.setenv(name, "secret")
    (tmp_path / "stray.py").write_text("def main():\n    print('of the working folder')\n")
    (tmp_path / "foreroute").mkdir()
    (tmp_path / "foreroute" / "__init__.py").write_text("raise SystemExit('of the working folder')")
    assert "secret" not in child_environment().values()
    assert {"PATH", "HOME"} & set(child_environment())
    for module, said in (("stray", b"No module named 'stray'"), ("foreroute.structured.trial", b"")):
        ran = subprocess.run(
            child_command(module, 2**28, 5), cwd=tmp_path, env=child_environment(), input=b"{}", capture_output=True
        )
        assert said in ran.stderr
        assert b"working folder" not in ran.stdout + ran.stderr
