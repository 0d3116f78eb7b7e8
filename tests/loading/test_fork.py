"""A process forked from the one that loaded a model: it is told so at once, never hangs, and spoils nothing."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WAIT_S = 180

PRELUDE = """
import multiprocessing, os, signal, subprocess, sys, threading, traceback
import torch, foreroute
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, Request
from foreroute.errors import RefusedError
from foreroute.generation.generate import generate
from foreroute.model.text import load_tokenizer

torch.set_num_threads(1)
folder, trace = sys.argv[1:]
config = foreroute.EngineConfig(packed="no", trace=trace)
model = foreroute.load(folder, "30%", config=config)
ids = torch.arange(5, 15)[None]

def answer():
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False).tolist()

alone = answer()

def in_a_fork(work, leave=os._exit):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        leave(0)
    assert os.waitpid(child, 0)[1] == 0, "the child failed"

def refused(work):
    try:
        work()
    except RefusedError as error:
        assert "forked" in str(error), error
    else:
        raise AssertionError("it was not refused")
"""


def run(folder: Path, tmp_path: Path, body: str) -> str:
    """Run the body after the prelude in a process of its own; what it prints."""
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + textwrap.dedent(body), folder, tmp_path / "trace.jsonl"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints.get("qwen3_moe")


def test_every_use_in_a_forked_process_is_refused(folder, tmp_path):
    run(folder, tmp_path, """
        def uses():
            refused(answer)
            refused(lambda: model(ids))
            refused(lambda: model.model(ids))
            refused(lambda: model.model.layers[0].mlp(torch.zeros(1, 1, 64)))
            refused(lambda: model.foreroute.set_policy("exact"))
            refused(lambda: generate(model, None, ids))
            assert model.foreroute.stats().decode.steps
            model.foreroute.close()
        in_a_fork(uses)
        # While another thread uses it: its lock has no holder in the child.
        inside, on = threading.Event(), threading.Event()
        class Held:
            def put(self, value):
                inside.set(); on.wait()
            def end(self): pass
        thread = threading.Thread(
            target=lambda: model.generate(ids, max_new_tokens=4, do_sample=False, streamer=Held()), daemon=True)
        thread.start()
        inside.wait()
        in_a_fork(uses)
        on.set()
        thread.join()
        assert answer() == alone
        # Who answers many requests has a thread for it, which is not in the child.
        engine = BatchEngine(model, load_tokenizer(folder), 64, max_num_seqs=2)
        over = threading.Event()
        def listen(event):
            if isinstance(event, Finished): over.set()
        def uses():
            refused(lambda: engine.submit(Request([5, 6, 7], 4), listen))
            engine.close()
        in_a_fork(uses)
        # While its thread holds its own lock.
        with engine._changed:
            in_a_fork(uses, leave=sys.exit)
        engine.submit(Request([5, 6, 7], 4), listen)
        assert over.wait(60)
        engine.close()
    """)  # fmt: skip


def test_a_fork_that_leaves_the_model_alone_ends_and_spoils_nothing(folder, tmp_path):
    printed = run(folder, tmp_path, """
        in_a_fork(lambda: None, leave=sys.exit)  # with Python's own way out: finalizers, files
        in_a_fork(lambda: globals().pop("model"), leave=sys.exit)
        loader = torch.utils.data.DataLoader(list(range(4)), num_workers=2, multiprocessing_context="fork")
        print([batch.item() for batch in loader])
        with multiprocessing.get_context("fork").Pool(1) as pool:
            print(pool.map(abs, [-1, 2]))
        print(subprocess.run([sys.executable, "-c", "print(3)"], capture_output=True, text=True).stdout.strip())
        print(subprocess.run(["echo", "4"], preexec_fn=os.getpid, capture_output=True, text=True).stdout.strip())
        def other():
            global model
            model = foreroute.load(folder, "30%", config=foreroute.EngineConfig(packed="no"))
            assert answer() == alone
            model.foreroute.close()
        in_a_fork(other, leave=sys.exit)
        assert answer() == alone
        model.foreroute.close()
    """)  # fmt: skip
    assert [line for line in printed.splitlines() if line] == ["[0, 1, 2, 3]", "[1, 2]", "3", "4"]
    lines = (tmp_path / "trace.jsonl").read_text().splitlines()
    assert sum('"event":"header"' in line for line in lines) == 1
    assert '"event":"end"' in lines[-1]
    assert len(set(lines)) == len(lines), "a child wrote what the parent had not written yet"
