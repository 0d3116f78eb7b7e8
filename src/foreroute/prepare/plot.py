"""Plot recall per layer, one line per predictor."""

import importlib.util
from pathlib import Path
from typing import Any

from foreroute.errors import ForerouteError
from foreroute.predict.build import HYBRID
from foreroute.prepare.score import Scores
from foreroute.whole_files import save_figure

_CONTROLS = ("oracle", "shuffled", "previous token", "popularity", "random")


def check(path: Path) -> None:
    """Check that `draw` can work, before minutes are spent on measuring.

    Raises:
        ForerouteError: matplotlib is not installed, or the folder does not exist.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ForerouteError("Plots need matplotlib: pip install matplotlib, or leave --png out.")
    if not path.absolute().parent.is_dir():
        raise ForerouteError(f"{path.parent} is not a folder. Choose another --png.")


def _style(name: str) -> dict[str, Any]:
    if name in _CONTROLS:
        return {"linestyle": ":", "linewidth": 1.0}
    # It lies on the line of whichever predictor it chose: that one must stay visible.
    return {"linestyle": "--", "linewidth": 1.5, "color": "black"} if name == HYBRID else {"linewidth": 2.5}


def draw(scores: Scores, path: Path, title: str) -> None:
    """Write the picture of `scores` under `title` (the suffix of `path` chooses the format).

    Raises:
        ForerouteError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, entry in scores.as_dict()["predictors"].items():
        points = [(layer, 100 * value) for layer, value in enumerate(entry["recall_k"]) if value is not None]
        axes.plot(*zip(*points, strict=True), marker=".", label=name, **_style(name))
    axes.set(xlabel="MoE layer that is guessed", ylabel=f"recall of the top-{scores.top_k} (%)", title=title)
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, path)
