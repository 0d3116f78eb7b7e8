"""`foreroute bench`: what it measures, shows and refuses, on a tiny model."""

import json
import os
import signal

import pytest

from foreroute.bench import session
from foreroute.bench.run import run_once
from foreroute.bench.rungs import RUNG_NAMES
from foreroute.cli.commands import bench
from tests.cli.harness import CONTEXT, start

LITTLE = ("--memory", "25%", "-p", "8", "-n", "6", "-b", "1", "-r", "1")


def test_flags_name_the_rungs_that_there_are():
    assert bench.RUNGS == RUNG_NAMES


def test_every_rung_of_every_budget_and_batch(tiny, run, tmp_path):
    picture = tmp_path / "ladder.png"
    done = run("bench", tiny, "--memory", "25%", "50%", "100%", "-p", "8", "24", "-n", "12", "-b", "1", "3", "-r", "2",
               "--json", "--png", picture)  # fmt: skip
    assert done.code == 0, done.err
    found = done.json
    assert found["same_tokens"]
    assert [(one["memory"], one["batch"]) for one in found["budgets"]] == [
        (memory, batch) for memory in ("25%", "50%", "100%") for batch in (1, 3)
    ]
    for budget in found["budgets"]:
        assert [test["test"] for test in budget["tests"]] == ["pp8", "tg12", "pp24"]
        for test in budget["tests"]:
            # Where every expert fits there is no ladder.
            wanted = ["resident"] if budget["memory"] == "100%" else list(RUNG_NAMES)
            assert list(test["rungs"]) == wanted
            assert all(rung["tokens_per_s"]["median"] > 0 for rung in test["rungs"].values())
    tokens = found["budgets"][0]["tests"][1]["rungs"]
    assert tokens["on-demand"]["miss_rate"] == 1
    assert 0 < tokens["cache"]["hit_rate"] < 1
    assert tokens["prefetch"]["prefetch_mb_per_token"] > 0
    assert tokens["oracle"]["miss_rate"] == 0
    assert tokens["oracle"]["prefetch_wasted_mb_per_token"] == 0
    assert tokens["resident"]["hit_rate"] == 1
    bound = tokens["belady"]["demand_mb_per_token"]
    moved = [rung["demand_mb_per_token"] + rung["prefetch_mb_per_token"]
             for name, rung in tokens.items() if name not in ("belady", "resident")]  # fmt: skip
    assert 0 < bound <= min(moved)
    # 2 budgets x 6 rungs and 1 x 1, of 2 batches x 2 prompts, three times.
    assert len(found["runs"]) == 13 * 4 * 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_says_what_was_measured(tiny, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = run("bench", tiny, *LITTLE)
    assert done.code == 0, done.err
    for words in ("4 x 16, top-2", "tg6  25%", "pp8  25%", "oracle prefetch", "Belady bound", "fully resident",
                  "all rungs chose the same tokens", "O_DIRECT", "built-in passage", "disk", "memory"):  # fmt: skip
        assert words in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert "…" not in done.out


def test_quick_is_little_and_other_flags_hold(tiny, run):
    done = run("bench", tiny, "--quick", "-r", "1", "--rungs", "resident", "cache", "--json")
    assert done.code == 0, done.err
    (budget,) = done.json["budgets"]
    assert (budget["memory"], [test["test"] for test in budget["tests"]]) == ("25%", ["pp32", "tg24"])
    assert list(budget["tests"][0]["rungs"]) == ["cache", "resident"]
    assert done.json["repeats"] == 1


def test_a_model_without_a_tokenizer_reads_random_tokens(without_tokenizer, run):
    done = run("bench", without_tokenizer, *LITTLE, "--rungs", "prefetch")
    assert done.code == 0, done.err
    assert "no tokenizer" in done.out


def test_quantised_experts(copied, run):
    assert run("pack", copied, "--quant", "q8_0").code == 0
    done = run("bench", copied, *LITTLE, "--packed", "q8_0", "--json")
    assert done.code == 0, done.err
    assert done.json["experts"]["stored_dtype"] == "q8_0"


def test_what_is_too_long_for_the_context_is_left_out(tiny, run):
    done = run("bench", tiny, "--memory", "25%", "-p", str(CONTEXT), "16", "4096", "-n", "4", "-b", "1", "-r", "1",
               "--rungs", "cache", "--json")  # fmt: skip
    assert done.code == 0, done.err
    (remark,) = done.json["remarks"]
    assert "4096" in remark
    # The new tokens follow the first prompt that leaves room for them.
    assert [test["test"] for test in done.json["budgets"][0]["tests"]] == [f"pp{CONTEXT}", "pp16", "tg4"]


def test_a_default_budget_that_is_too_small_is_left_out(tiny, run, monkeypatch):
    monkeypatch.setitem(bench._DEFAULTS, "memory", (["5%", "25%"], []))
    done = run("bench", tiny, *LITTLE[2:], "--rungs", "cache", "--json")
    assert done.code == 0, done.err
    assert [one["memory"] for one in done.json["budgets"]] == ["25%"]
    (remark,) = done.json["remarks"]
    assert remark.startswith("Memory 5% is left out")
    # One that was asked for is not.
    refused = run("bench", tiny, "--memory", "5%", "25%", *LITTLE[2:])
    assert refused.code == 2
    assert "one token needs 8" in refused.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--memory", "much"], "not an amount of memory"),
        (["--memory", "25%", "1%"], "one token needs 8"),
        (["--memory", "101%"], "more than all experts"),
        (["-n", "1"], "at least 2"),
        (["-p", "0"], "below 1"),
        (["-p", "5000"], "No prompt fits"),
        (["-p", "1000", "-n", "100"], "more than the model's context"),
        (["--rungs", "belady"], "arithmetic"),
        (["--rungs", "magic"], "invalid choice"),
        (["--text", "absent"], "cannot be read"),
        (["--png", "absent/x.png"], "not a folder"),
        (["--packed", "q4_k"], "foreroute pack"),
        (["--policy", "speculative"], "unrecognized"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(tiny, run, flags, words, monkeypatch):
    monkeypatch.setattr(session.Session, "run", lambda self: pytest.fail("it ran"))
    done = run("bench", tiny, *flags)
    assert done.code == 2
    assert words in done.err
    assert done.out == ""


def test_a_difference_in_tokens_shows_no_times(tiny, run, monkeypatch, tmp_path):
    calls = []

    def wrong(model, window, case):
        timed = run_once(model, window, case)
        calls.append(model)
        if len(calls) == 6:  # after the first look, and the runs of two rungs that warm up
            timed.choices[3][0] += 1
        return timed

    monkeypatch.setattr(session, "run_once", wrong)
    flags = (*LITTLE, "--rungs", "cache", "prefetch", "belady", "--png", str(tmp_path / "x.png"))
    done = run("bench", tiny, *flags)
    assert done.code == 1
    assert "+ prefetch at 25%" in done.out
    assert "repeat 1: row 1, new token 4" in done.out.replace("\n", " ")
    assert "tg6" not in done.out
    assert not (tmp_path / "x.png").exists()
    calls.clear()
    as_json = run("bench", tiny, *flags, "--json")
    assert as_json.code == 1
    assert (as_json.json["same_tokens"], as_json.json["budgets"]) == (False, [])


def test_ctrl_c_shows_what_was_measured(tiny, run, monkeypatch):
    calls = []

    def stopped(model, window, case):
        calls.append(model)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return run_once(model, window, case)

    monkeypatch.setattr(session, "run_once", stopped)
    done = run("bench", tiny, *LITTLE[:-1], "5", "--rungs", "on-demand", "cache")
    assert done.code == 130
    assert "Stopped by Ctrl-C: this is what had been measured." in done.out
    assert "tg6  25%" in done.out
    calls.clear()
    calls.extend(range(7))
    early = run("bench", tiny, *LITTLE, "--json")
    assert early.code == 130
    assert early.json["interrupted"]
    assert early.json["budgets"] == []


def test_ctrl_c_in_a_process_leaves_no_traceback(tiny):
    process = start("bench", tiny, "--memory", "25%", "-p", "8", "-n", "40", "-b", "1", "-r", "1000", "--threads", "1",
                    "--rungs", "cache", "--json", before=ANNOUNCE)  # fmt: skip
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err.decode()
    assert json.loads(out)["interrupted"]
    assert "Traceback" not in err.decode()


ANNOUNCE = """
import sys
from foreroute.bench import session
run = session.Session._run
def announced(self, one, memory, case, repeat):
    run(self, one, memory, case, repeat)
    if repeat == 1:
        print("measured", file=sys.stderr, flush=True)
session.Session._run = announced
"""


def test_rungs_that_do_not_fit_together_run_one_after_another(tiny, run, monkeypatch):
    monkeypatch.setattr(session, "available_ram", lambda: 2**20)
    done = run("bench", tiny, *LITTLE, "--json")
    assert done.code == 0, done.err
    assert not done.json["interleaved"]
    assert list(done.json["budgets"][0]["tests"][0]["rungs"]) == list(RUNG_NAMES)
    turns = [one["rung"] for one in done.json["runs"]]
    assert turns == [name for name in RUNG_NAMES if name != "belady" for _ in range(2)]
    assert "one after another" in run("bench", tiny, *LITTLE, "--rungs", "cache", "prefetch").out.replace("\n", " ")


def test_a_model_that_does_not_fit_has_no_resident_rung(tiny, run, monkeypatch):
    from foreroute.bench import asked

    choose = asked.choose_memory
    monkeypatch.setattr(
        asked, "choose_memory", lambda memory, *rest: 2**20 if memory is None else choose(memory, *rest)
    )
    done = run("bench", tiny, *LITTLE, "--json")
    assert done.code == 0, done.err
    assert "resident" not in done.json["budgets"][0]["tests"][0]["rungs"]
    assert "Fully resident is left out" in done.json["remarks"][0]


def test_every_model_is_closed(tiny, run, monkeypatch):
    models, load = [], session.load
    monkeypatch.setattr(session, "load", lambda *args, **kwargs: models.append(load(*args, **kwargs)) or models[-1])
    assert run("bench", tiny, *LITTLE).code == 0
    # One to look at the routes, and one for each measured rung.
    assert len(models) == 7
    assert all(layer.experts.engine_forward is None for model in models for layer in model.foreroute.layers)
