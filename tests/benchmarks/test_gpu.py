"""benchmarks.gpu without a GPU: it says so, and its trial shows that the program runs to its table."""

import json

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu.routes import Routes, random_routes
from benchmarks.gpu.rungs import LADDER


def test_without_cuda_it_says_so_and_measures_nothing(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(program, "measure", lambda *args: pytest.fail("something was measured"))
    assert program.main([]) == program.NO_CUDA != 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "no CUDA: nothing is measured" in said.err


def test_a_trial_runs_every_rung_to_the_table(capsys) -> None:
    assert program.main(["--trial"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["skipped"] == []
    assert "mechanics" in lines[0]
    rows = {(line[15:31].strip(), line[32:50].strip()): line.split() for line in lines[2:-1]}
    assert len(rows) == 2 * len(LADDER)
    for routes in ("trained model's", "i.i.d."):
        assert rows[routes, "on demand"][-1] == "0.0%"
        assert rows[routes, "resident"][-1] == "100.0%"
        # All but the first layer of three are guessed, rightly.
        assert rows[routes, "paper's mode"][-1] == "66.7%"
        hits = [float(rows[routes, name][-1][:-1]) for name in ("cache 12.5%", "cache 25.0%", "cache 50.0%")]
        assert hits == sorted(hits)
        assert float(rows[routes, "oracle 25.0%"][-1][:-1]) > float(rows[routes, "cache 25.0%"][-1][:-1])


def test_recall_counts_past_the_first_layer() -> None:
    chosen = torch.tensor([[[0, 1], [2, 3], [4, 5]]])
    guessed = torch.tensor([[[9, 9], [3, 9], [5, 4]]])
    assert Routes("x", chosen, guessed).recall == 0.75
    drawn = random_routes(3, 2, 8, 4)
    assert drawn.chosen.shape == (3, 2, 4)
    assert all(len(set(row)) == 4 for row in drawn.chosen.flatten(0, 1).tolist())
