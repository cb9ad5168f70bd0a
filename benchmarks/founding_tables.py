"""Tables and pictures of docs/founding.md, from benchmarks/results/founding.json.

Counts are of right answers to the held-out points. Differences are paired: an average with single
models of the same run. The standard errors are over runs.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
SCHEDULES = {"equal": "equal", "linear": "linear", "exponential": "exponential:alpha=2"}
WAYS = ("as published", "points drawn anew", "ten times the rate")
COLORS = {"equal": "tab:blue", "linear": "tab:orange", "exponential": "tab:green"}
TEN = 10
MANY = (2, 5, 10, 20, 50, 100)
# J. Brownlee's tutorial (see docs/founding.md): one run, n = 1 … 10.
PUBLISHED = {
    "alone": (814, 814, 811, 805, 807, 805, 802, 805, 805, 810),
    "equal": (814, 814, 813, 813, 811, 807, 809, 808, 808, 807),
    "linear": (814, 815, 814, 813, 813, 813, 811, 810, 809, 809),
    "exponential": (814, 815, 814, 814, 813, 813, 813, 813, 813, 813),
}


@functools.cache
def runs(way: str) -> list[dict]:
    text = (ROOT / "benchmarks" / "results" / "founding.json").read_text("utf-8")
    return [run for run in json.loads(text)["figures"]["runs"] if run["way"] == way]


def scores(way: str, name: str, what: str = "right") -> np.ndarray:
    """Return scores, shape (runs, n): of the n-th newest alone, or of averages of the newest n."""
    lines = [run[what][SCHEDULES.get(name, name)] for run in runs(way)]
    return np.array([line.split() for line in lines], np.float64)


def gain(way: str, name: str, n: int, over: str) -> np.ndarray:
    """Return how many more right answers than single models the average gives, in each run."""
    alone = scores(way, "alone")[:, :n]
    rival = {"mean": alone.mean(axis=1), "newest": alone[:, 0], "best": alone.max(axis=1)}
    return scores(way, name)[:, n - 1] - rival[over]


def at_ends(way: str, name: str) -> np.ndarray:
    """Return right answers had the run ended at every tenth epoch, shape (runs, ends)."""
    if name == "alone":
        return scores(way, "alone")[:, ::TEN][:, ::-1]
    return scores(way, name, "right_by_end")


def by_alpha(way: str, alpha: str) -> np.ndarray:
    """Return how many more right answers than the newest an exponential average of all gives."""
    found = np.array([run["right_by_alpha"][alpha] for run in runs(way)])
    return found - scores(way, "alone")[:, 0]


def alphas() -> list[str]:
    return list(runs(WAYS[0])[0]["right_by_alpha"])


def standard_error(values: np.ndarray) -> float:
    return values.std(axis=0, ddof=1) / math.sqrt(len(values))


def told(values: np.ndarray, digits: int = 1) -> str:
    """Return a mean and its standard error as text."""
    mean = round(float(values.mean()), digits) + 0.0
    return f"{mean:+.{digits}f} ± {standard_error(values):.{digits}f}".replace("-", "−")


def share(values: np.ndarray) -> str:
    return f"{values.mean():.0%}"


def table(header: str, rows: Iterator[str]) -> str:
    columns = header.count("|") + 1
    return "\n".join([f"| {header} |", "|" + "---|" * columns, *(f"| {row} |" for row in rows)])


def founding_one() -> str:
    """Put the accuracies of ours, seed 0, beside those of the published run."""

    def rows() -> Iterator[str]:
        for n in range(1, TEN + 1):
            theirs = [PUBLISHED[name][n - 1] for name in PUBLISHED]
            ours = [scores(WAYS[0], name)[0, n - 1] for name in PUBLISHED]
            yield " | ".join([f"{n}", *(f"{score / 1000:.3f}" for score in (*theirs, *ours))])

    names = [f"{name}{whose}" for whose in (", published", ", ours") for name in PUBLISHED]
    return table(" | ".join(["n", *names]), rows())


def founding_ranges() -> str:
    """Say from where to where single models and averages of 1 … 10 go."""

    def row(what: str, found: dict[str, np.ndarray]) -> str:
        averages = np.concatenate([found[name].ravel() for name in SCHEDULES])
        cells = [
            f"{values.min() / 1000:.3f}–{values.max() / 1000:.3f}"
            for values in (found["alone"], averages)
        ]
        apart = np.ptp(np.atleast_2d(found["alone"]), axis=1)
        return " | ".join([what, *cells, f"{np.median(apart) / 1000:.3f}"])

    def rows() -> Iterator[str]:
        yield row("published run", {name: np.array(line) for name, line in PUBLISHED.items()})
        first = {name: scores(WAYS[0], name)[0, :TEN] for name in PUBLISHED}
        yield row("as published, seed 0", first)
        for way in WAYS:
            found = {name: scores(way, name)[:, :TEN] for name in PUBLISHED}
            yield row(f"{way}, {len(runs(way))} seeds", found)

    return table(
        "| single models | averages | best and worst of a run's last ten apart by (median)", rows()
    )


def founding_gain() -> str:
    """Compare the average of ten with single models of its run."""

    def rows() -> Iterator[str]:
        for way in WAYS:
            for name in SCHEDULES:
                cells = [way, name]
                for over in ("mean", "newest", "best"):
                    found = gain(way, name, TEN, over)
                    cells += [told(found), share(found < 0)]
                yield " | ".join(cells)

    return table(
        "| average of ten | against the mean of the ten | worse in | against the newest | worse in"
        " | against the best of the ten | worse in",
        rows(),
    )


def founding_ends() -> str:
    """Compare it with the newest at ten ends of a run: less a matter of luck."""

    def rows() -> Iterator[str]:
        for way in WAYS:
            newest = at_ends(way, "alone")
            cells = [way, f"{newest.std(axis=1, ddof=1).mean():.1f}"]
            for name in SCHEDULES:
                found = at_ends(way, name)
                difference = found - newest
                cells += [
                    f"{told(difference.mean(axis=1))}, {share(difference < 0)}",
                    f"{found.std(axis=1, ddof=1).mean():.1f}",
                ]
            yield " | ".join(cells)

    names = [text for name in SCHEDULES for text in (name, "varies by")]
    return table(" | ".join(["", "the newest varies by", *names]), rows())


def founding_many() -> str:
    """Compare averages of ever more with the newest."""

    def rows() -> Iterator[str]:
        for n in MANY:
            cells = [f"{n}"]
            for way in WAYS:
                for name in ("equal", "linear"):
                    found = gain(way, name, n, "newest")
                    cells.append(f"{told(found)}, {share(found < 0)}")
            yield " | ".join(cells)

    names = [f"{way}, {name}" for way in WAYS for name in ("equal", "linear")]
    return table(" | ".join(["n", *names]), rows())


def founding_alpha() -> str:
    """Compare decay rates, by the gain over the newest."""

    def rows() -> Iterator[str]:
        for alpha in alphas():
            weights = np.exp(-np.arange(scores(WAYS[0], "alone").shape[1]) / float(alpha))
            cells = [alpha, f"{weights.sum() ** 2 / (weights**2).sum():.1f}"]
            for way in WAYS:
                found = by_alpha(way, alpha)
                cells.append(f"{told(found)}, {share(found < 0)}")
            yield " | ".join(cells)

    return table(" | ".join(["alpha", "effective number", *WAYS]), rows())


def founding_loss() -> str:
    """Compare cross-entropies on the held-out points with that of the newest."""

    def rows() -> Iterator[str]:
        for way in WAYS:
            losses = [run["loss"] for run in runs(way)]
            newest = np.array([loss["newest"] for loss in losses])
            cells = [way, f"{newest.mean():.3f}"]
            for which in ("ten", "all"):
                for position, name in enumerate(SCHEDULES):
                    if (which, name) == ("all", "exponential"):
                        continue  # what is older than ten hardly counts in it
                    found = np.array([loss[which][position] for loss in losses]) - newest
                    cells.append(f"{told(found, 4)}, {share(found > 0)}")
            yield " | ".join(cells)

    count = scores(WAYS[0], "alone").shape[1]
    names = [f"{name} of {TEN}" for name in SCHEDULES]
    names += [f"{name} of {count}" for name in ("equal", "linear")]
    return table(" | ".join(["", "the newest", *names]), rows())


TABLES = {
    made.__name__: made
    for made in (
        founding_one,
        founding_ranges,
        founding_gain,
        founding_ends,
        founding_many,
        founding_alpha,
        founding_loss,
    )
}


def draw(folder: Path) -> None:
    """Draw founding_run.svg, founding_gain.svg and founding_alpha.svg."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "wavg"
    for name, picture in (("run", _run), ("gain", _gain), ("alpha", _alpha)):
        figure = picture(plt)
        figure.savefig(folder / f"founding_{name}.svg", metadata={"Date": None})
        plt.close(figure)


def _run(plt: Any) -> Any:
    """Draw one run: the published one, ours, and ours with all that it kept."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, constrained_layout=True)
    first = {name: scores(WAYS[0], name)[0] for name in PUBLISHED}
    count = len(first["alone"])
    panels = {
        "the published run": PUBLISHED,
        "ours, seed 0": {name: line[:TEN] for name, line in first.items()},
        f"ours, seed 0, up to {count}": first,
    }
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, line in lines.items():
            numbers = range(1, len(line) + 1)
            if name == "alone":
                axis.plot(numbers, np.divide(line, 1000), "o", color="0.6", ms=4, label="alone")
            else:
                axis.plot(numbers, np.divide(line, 1000), color=COLORS[name], label=name)
        axis.set(title=title, xlabel="n: the n-th newest alone, the newest n averaged")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on 1,000 held-out points")
    axes[0].legend(loc="lower left", fontsize="small")
    return figure


def _gain(plt: Any) -> Any:
    """Draw, for every n, the gain over the newest and how often it is a loss."""
    figure, axes = plt.subplots(
        2, 3, figsize=(12, 6.4), sharex=True, sharey="row", constrained_layout=True
    )
    for column, way in zip(axes.T, WAYS, strict=True):
        newest = scores(way, "alone")[:, :1]
        for name, color in COLORS.items():
            found = scores(way, name) - newest
            numbers = np.arange(1, found.shape[1] + 1)
            mean, error = found.mean(axis=0), standard_error(found)
            column[0].plot(numbers, mean, color=color, label=name)
            column[0].fill_between(numbers, mean - error, mean + error, color=color, alpha=0.2)
            if name == "equal":
                for edge in np.quantile(found, (0.1, 0.9), axis=0):
                    column[0].plot(numbers, edge, ":", color=color, linewidth=1)
            column[1].plot(numbers[1:], (found < 0).mean(axis=0)[1:], color=color, label=name)
        column[0].set_title(way)
        column[1].set(xlabel="n: the newest n averaged", ylim=(0, 1))
        column[0].axhline(0, color="0.3", linewidth=0.8)
        column[1].axhline(0.5, color="0.3", linewidth=0.8)
        for axis in column:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("right answers of 1,000,\nmore than the newest's")
    axes[1, 0].set_ylabel("share of the runs in which the\naverage is worse than the newest")
    axes[0, 0].legend(fontsize="small")
    return figure


def _alpha(plt: Any) -> Any:
    """Draw the gain over the newest by the decay rate."""
    figure, axis = plt.subplots(figsize=(6.5, 3.8), constrained_layout=True)
    for way, style in zip(WAYS, ("o-", "s-", "^-"), strict=True):
        found = [by_alpha(way, alpha) for alpha in alphas()]
        errors = [standard_error(values) for values in found]
        places = [float(alpha) for alpha in alphas()]
        means = [values.mean() for values in found]
        axis.errorbar(places, means, errors, fmt=style, capsize=3, label=way)
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, alphas())
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set(xlabel="alpha", ylabel="right answers of 1,000,\nmore than the newest's")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure
