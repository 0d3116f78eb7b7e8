"""Comparing engines: divergences as defined, and differences that are ties told from those that are not."""

import numpy as np
import pytest

from benchmarks.beside_llama_cpp import Said, kl, near, prompts_of, same_greedy


def said(*rows: list[list[float]]) -> Said:
    logits = np.array(rows, dtype=np.float32)
    return Said(logits.argmax(-1), logits)


def test_divergence() -> None:
    ours, theirs = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]]) + 7
    assert kl(ours, theirs)[0] == pytest.approx(0.25 * np.log(2), rel=1e-9)
    assert kl(ours, ours)[0] == 0


def test_a_difference_is_a_tie_only_where_the_likeliest_are_near() -> None:
    ours = said([[1, 0], [0.51, 0.5], [1, 0]], [[1, 0], [2, 0], [0, 1]], [[1, 0], [1, 0], [1, 0]])
    theirs = said([[1, 0], [0.5, 0.51], [0, 1]], [[1, 0], [0, 2], [0, 1]], [[1, 0], [1, 0], [1, 0]])
    told = same_greedy(ours, theirs, 0.05)
    assert (told["same"], told["prompts"], told["not_ties"]) == (1, 3, 1)
    first, second = told["differences"]
    assert (first["prompt"], first["token"], first["is_tie"]) == (0, 1, True)
    assert (second["prompt"], second["token"], second["is_tie"]) == (1, 1, False)
    assert second["gaps"] == [2, 2]
    assert near(ours, theirs)["same_top"] == pytest.approx(6 / 9)


def test_prompts_are_of_all_kinds() -> None:
    prompts = prompts_of(24)
    assert len(prompts) == 24
    assert len({tuple(one) for one in prompts}) == 24
    assert all(0 < len(one) < 256 for one in prompts)
