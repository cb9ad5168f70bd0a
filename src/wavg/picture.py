"""Weights in a picture: a small panel for each schedule. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wavg.errors import MissingDependencyError, OutputError
from wavg.weights import Figures

__all__ = ["draw"]

_COLUMNS = 4
_LEGIBLE = 34  # characters of a title


def draw(path: str, steps: Sequence[float], weights: Sequence[tuple[str, Figures]]) -> None:
    """Draw the proportions that schedules give to checkpoints at some steps; replaces the file.

    Parameters
    ----------
    path
        Its ending tells the kind of picture.
    steps
        Where the checkpoints were saved, shape (N,).
    weights
        Each schedule's text and figures: of the latter the effective number, the mean age in steps
        and, where weights are negative, the amplification, ``×2.01``.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    OutputError
        No picture can be of that kind, or be written there.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"a picture needs matplotlib ({error}): pip install 'wavg[plot]'"
        ) from None
    columns = min(_COLUMNS, len(weights))
    rows = -(-len(weights) // columns)
    size = (3.1 * columns, 1.9 * rows + 0.5)
    figure = Figure(figsize=size if columns > 1 else (5, 3.2), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    width = _width(steps)
    for panel, (text, merit) in zip(panels, weights, strict=False):
        colors = np.where(merit.proportions < 0, "tab:red", "tab:blue")
        panel.bar(steps, merit.proportions, width, color=colors)
        panel.axhline(1 / len(steps), color="0.6", linewidth=0.8, linestyle=":")
        panel.axhline(0, color="0.2", linewidth=0.8)
        low, high = panel.get_ylim()
        panel.set_ylim(low, high + 0.2 * (high - low))  # room for the figures
        panel.set_title(_short(text), fontsize=9)
        said = f"{merit.effective_number:.3g} of {len(steps)}, mean age {_number(merit.mean_age)}"
        said += f", ×{merit.amplification:.3g}" * (merit.amplification > 1.0000001)
        panel.text(
            0.03,
            0.95,
            said,
            transform=panel.transAxes,
            verticalalignment="top",
            fontsize=8,
        )
        panel.tick_params(labelsize=8)
        if all(float(step).is_integer() for step in steps):
            panel.xaxis.get_major_locator().set_params(integer=True)
    for place, panel in enumerate(panels[len(weights) :], start=len(weights)):
        panel.set_visible(False)
        panels[place - columns].tick_params(labelbottom=True)  # nothing is below it
    figure.supxlabel(
        "step\nin a panel: effective number, mean age in steps, × amplification", fontsize=9
    )
    label = "weight, as a share of the sum; dotted: equal weights"
    figure.supylabel(label if rows > 1 else label.replace("; ", "\n"), fontsize=9)
    try:
        with mpl.rc_context({"svg.hashsalt": "wavg", "svg.fonttype": "none"}):
            # the same picture, the same bytes, and letters as letters
            figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    except ValueError as error:
        raise OutputError(f"{path}: {error}", path=path) from None


def _width(steps: Sequence[float]) -> float:
    """Return how wide a bar is: apart from its neighbours, and still to be seen."""
    gaps = np.diff(steps)
    gaps = gaps[gaps > 0]
    return max(0.8 * float(gaps.min()), float(gaps.sum()) / 200) if len(gaps) else 0.8


def _short(text: str) -> str:
    return text if len(text) <= _LEGIBLE else text[: _LEGIBLE - 1] + "…"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
