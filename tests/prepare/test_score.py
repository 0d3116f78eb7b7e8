"""How much of the gap to the late ceiling is closed: a share, or nothing where there is no gap."""

from types import SimpleNamespace
from typing import Any

import pytest

from foreroute.prepare.score import Scores, gap_closed


def scores_of(**means: tuple[float, float, float]) -> Scores:
    """By predictor its mean recall @k, @k+2 and missed mass."""
    names = ("recall_k", "recall_k2", "missed_mass")
    tallies: dict[str, Any] = {
        name.replace("_", " "): SimpleNamespace(
            as_dict=lambda values=values: {"mean": dict(zip(names, values, strict=True))}
        )
        for name, values in means.items()
    }
    return Scores(top_k=2, num_tokens=1, tallies=tallies, cost_us={})


def test_the_share_of_the_way_counts_in_the_direction_of_better() -> None:
    scores = scores_of(default_vectors=(0.5, 0.6, 0.3), hybrid=(0.6, 0.75, 0.15), before_attention=(0.7, 0.8, 0.1))
    assert gap_closed(scores) == pytest.approx({"recall_k": 0.5, "recall_k2": 0.75, "missed_mass": 0.75})


def test_where_there_is_no_gap_there_is_no_share() -> None:
    same = scores_of(default_vectors=(1.0, 1.0, 0.1), hybrid=(1.0, 1.0, 0.1), before_attention=(1.0, 0.9, 0.2))
    assert gap_closed(same) == {"recall_k": None, "recall_k2": None, "missed_mass": None}
    assert gap_closed(scores_of(hybrid=(1.0, 1.0, 0.0))) is None
