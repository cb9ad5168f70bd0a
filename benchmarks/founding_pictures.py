"""Pictures of docs/founding.md, from benchmarks/results/founding.json."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from founding_tables import (
    PUBLISHED,
    TEN,
    WAYS,
    by_alpha,
    figures,
    gain,
    scores,
    standard_error,
)

mpl.use("Agg")

from matplotlib import pyplot as plt

COLORS = {"equal": "tab:blue", "linear": "tab:orange", "exponential": "tab:green"}
RIVALS = {"newest": "the newest", "mean": "the mean of the n", "best": "the best of the n"}
MORE = "right answers of 1,000, more than\n"


def draw(folder: Path) -> None:
    """Draw founding_run.svg, founding_gain.svg and founding_alpha.svg."""
    mpl.rcParams["svg.hashsalt"] = "wavg"
    for name, picture in (("run", one_run), ("gain", gains), ("alpha", rates)):
        figure = picture()
        figure.savefig(folder / f"founding_{name}.svg", metadata={"Date": None})
        plt.close(figure)


def one_run() -> plt.Figure:
    """Draw one run: the published one, ours, and ours with all that it kept."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, constrained_layout=True)
    first = {name: scores(WAYS[0], name)[0] for name in PUBLISHED}
    panels = {
        "the published run": PUBLISHED,
        "ours, seed 0": {name: line[:TEN] for name, line in first.items()},
        f"ours, seed 0, up to {len(first['alone'])}": first,
    }
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, line in lines.items():
            places, values = range(1, len(line) + 1), np.divide(line, 1000)
            if name == "alone":
                axis.plot(places, values, "o", color="0.6", markersize=4, label="alone")
            else:
                axis.plot(places, values, color=COLORS[name], label=name)
        axis.set(title=title, xlabel="n: the n-th newest alone, the newest n averaged")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on 1,000 held-out points")
    axes[0].legend(loc="lower left", fontsize="small")
    return figure


def gains() -> plt.Figure:
    """Draw, for every n, the gain over single models, and how often it is a loss."""
    figure, axes = plt.subplots(
        3, 3, figsize=(12, 9), sharex=True, sharey="row", constrained_layout=True
    )
    count = scores(WAYS[0], "alone").shape[1]
    counts = np.unique(np.geomspace(1, count, 36).round().astype(int))
    for column, way in zip(axes.T, WAYS, strict=True):
        column[0].set_title(way)
        for axis, over in zip(column, ("newest", "mean"), strict=False):
            for name, color in COLORS.items():
                found = np.stack([gain(way, name, n, over) for n in counts], axis=1)
                mean, error = found.mean(axis=0), standard_error(found)
                axis.plot(counts, mean, color=color, label=name)
                axis.fill_between(counts, mean - error, mean + error, color=color, alpha=0.2)
                if name == "equal":
                    for edge in np.quantile(found, (0.1, 0.9), axis=0):
                        axis.plot(counts, edge, ":", color=color, linewidth=1)
            axis.axhline(0, color="0.3", linewidth=0.8)
        for (over, label), style in zip(RIVALS.items(), ("-", "--", ":"), strict=True):
            worse = [(gain(way, "equal", n, over) < 0).mean() for n in counts[1:]]
            column[2].plot(counts[1:], worse, style, color=COLORS["equal"], label=label)
        column[2].set(xscale="log", ylim=(0, 1), xlabel="n: the newest n averaged")
        column[2].set_xticks([1, 2, 5, 10, 20, 50, 100], [1, 2, 5, 10, 20, 50, 100])
        column[2].minorticks_off()
        for axis in column:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(f"{MORE}{RIVALS['newest']}'s")
    axes[1, 0].set_ylabel(f"{MORE}{RIVALS['mean']} alone")
    axes[2, 0].set_ylabel("share of the runs in which the\nequal average is worse than")
    axes[0, 0].legend(fontsize="small", loc="upper left")
    axes[2, 0].legend(fontsize="small", loc="lower left")
    return figure


def rates() -> plt.Figure:
    """Draw the gain over the newest by the decay rate."""
    figure, axis = plt.subplots(figsize=(6.5, 3.8), constrained_layout=True)
    alphas = figures()["alphas"]
    for way, style in zip(WAYS, ("o-", "s-", "^-"), strict=True):
        found = by_alpha(way)
        axis.errorbar(
            alphas, found.mean(axis=0), standard_error(found), fmt=style, capsize=3, label=way
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set(xlabel="alpha", ylabel=f"{MORE}{RIVALS['newest']}'s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure
