"""The picture of a sweep."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from wavg.errors import MissingDependencyError, OutputError
from wavg.results import Score, Sweep

__all__ = ["draw", "require"]


def require(path: str) -> None:
    """Raise an error unless a picture can be drawn into such a file."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise MissingDependencyError(
            "a picture needs matplotlib: `pip install matplotlib`, or leave the plot out"
        ) from None
    ending = os.path.splitext(path)[1].lower().removeprefix(".")
    if ending not in FigureCanvasBase.get_supported_filetypes():
        raise OutputError(f"cannot draw {path}: end its name with .png, .svg or .pdf", path=path)


def draw(sweep: Sweep, path: str) -> None:
    """Draw single scores as dots, averages as a line a schedule, and mark the best."""
    require(path)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    def points(scores: Sequence[Score]) -> tuple[list[int], list[float]]:
        return (
            [score.n for score in scores],
            [math.nan if score.score is None else score.score for score in scores],
        )

    axes.plot(*points(sweep.singles), "o", color="0.6", label="n-th newest alone", zorder=2)
    names = sweep.schedules
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    if len(names) <= 8:
        colors = mpl.colormaps["tab10"](range(len(names)))
    styles = ("-", "--", "-.", ":")
    for number, (name, color) in enumerate(zip(names, colors, strict=True)):
        line = [score for score in sweep.averages if score.weights == name]
        axes.plot(
            *points(line),
            styles[number % 4],
            color=color,
            linewidth=2,
            marker="." if len(line) <= 30 else None,
            label=f"average, {name}",
        )
    best = sweep.best
    score = math.nan if best.score is None else best.score
    axes.errorbar(
        best.n,
        score,
        yerr=best.standard_error,
        fmt="*",
        markersize=15,
        color="black",
        markerfacecolor="gold",
        capsize=4,
        zorder=5,
        label=f"best: {best.score:.5g}, newest {best.n}",
    )
    axes.set_xlabel("n, newest checkpoint first")
    axes.set_ylabel("score" + (" (higher is better)" if sweep.maximize else " (lower is better)"))
    axes.set_title("The n-th newest checkpoint alone, and the average of the newest n")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(names) <= 4:
        axes.legend()
    else:
        figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path)
