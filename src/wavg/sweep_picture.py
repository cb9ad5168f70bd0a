"""The picture of a sweep."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from wavg.errors import MissingDependencyError, OutputError

__all__ = ["Points", "draw", "require"]


def require(path: str) -> None:
    """Raise an error unless a picture can be drawn into such a file."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise MissingDependencyError(
            "a picture needs matplotlib: pip install 'wavg[plot]', or leave the plot out"
        ) from None
    ending = os.path.splitext(path)[1].lower().removeprefix(".")
    if ending not in FigureCanvasBase.get_supported_filetypes():
        raise OutputError(f"cannot draw {path}: end its name with .png, .svg or .pdf", path=path)


class Points(NamedTuple):
    """Scores over n; one that is missing is NaN."""

    counts: list[int]
    scores: list[float]


def draw(
    path: str,
    singles: Points,
    averages: Mapping[str, Points],
    best: tuple[int, float, float | None],
    *,
    maximize: bool,
) -> bytes:
    """Draw single scores as dots, averages as a line a schedule, and mark the best.

    Parameters
    ----------
    path
        Where the picture is to be: its ending tells the format.
    singles, averages
        Scores of checkpoints alone, and for each schedule those of averages.
    best
        The best average: its n, score, and standard error if known.
    maximize
        Whether a higher score is better.

    Returns
    -------
    picture
        What the file is to hold.
    """
    require(path)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    below = len(averages) > 4  # a legend within would hide the lines
    height = 4.5 + below * 0.22 * (len(averages) // 3 + 1)
    figure = Figure(figsize=(7.5, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    axes.plot(*singles, "o", color="0.6", label="n-th newest alone", zorder=2)
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(averages)))
    if len(averages) <= 8:
        colors = mpl.colormaps["tab10"](range(len(averages)))
    styles = ("-", "--", "-.", ":")
    for number, ((name, line), color) in enumerate(zip(averages.items(), colors, strict=True)):
        axes.plot(
            *line,
            styles[number % 4],
            color=color,
            linewidth=2,
            marker="." if len(line.counts) <= 30 else None,
            label=f"average, {name}",
        )
    n, score, error = best
    axes.errorbar(
        n,
        score,
        yerr=error,
        fmt="*",
        markersize=15,
        color="black",
        markerfacecolor="gold",
        capsize=4,
        zorder=5,
        label=f"best: {score:.5g}, newest {n}",
    )
    axes.set_xlabel("n, newest checkpoint first")
    axes.set_ylabel("score" + (" (higher is better)" if maximize else " (lower is better)"))
    axes.set_title("The n-th newest checkpoint alone, and the average of the newest n")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if below:
        figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    else:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format=os.path.splitext(path)[1].lower().removeprefix("."))
    return picture.getvalue()
