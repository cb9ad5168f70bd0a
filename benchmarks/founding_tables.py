"""Tables of docs/founding.md, from benchmarks/results/founding.json.

Counts are of right answers to the held-out points. Differences are paired: an average with single
models of the same run. The standard errors are over runs.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tabular import table

ROOT = Path(__file__).parent.parent
SCHEDULES = {"equal": "equal", "linear": "linear", "exponential": "exponential:alpha=2"}
WAYS = ("as published", "points drawn anew", "ten times the rate")
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
def figures() -> dict:
    text = (ROOT / "benchmarks" / "results" / "founding.json").read_text("utf-8")
    return json.loads(text)["figures"]


def runs(way: str) -> list[dict]:
    return [run for run in figures()["runs"] if run["way"] == way]


def numbers(lines: Iterable[str]) -> np.ndarray:
    return np.array([line.split() for line in lines], np.float64)


def scores(way: str, name: str, what: str = "right") -> np.ndarray:
    """Return scores, shape (runs, n): of the n-th newest alone, or of averages of the newest n."""
    return numbers(run[what][SCHEDULES.get(name, name)] for run in runs(way))


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


def by_alpha(way: str) -> np.ndarray:
    """Return how many more right answers than the newest an exponential average of all gives.

    Shape (runs, alphas).
    """
    return numbers(run["right_by_alpha"] for run in runs(way)) - scores(way, "alone")[:, :1]


def standard_error(values: np.ndarray) -> float:
    return values.std(axis=0, ddof=1) / math.sqrt(len(values))


def told(values: np.ndarray, digits: int = 1) -> str:
    """Return a mean and its standard error as text."""
    mean = round(float(values.mean()), digits) + 0.0
    return f"{mean:+.{digits}f} ± {standard_error(values):.{digits}f}".replace("-", "−")


def share(values: np.ndarray) -> str:
    return f"{values.mean():.0%}"


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
        alone = np.atleast_2d(found["alone"]) / 1000
        averages = np.concatenate([found[name].ravel() for name in SCHEDULES]) / 1000
        apart = np.median(np.ptp(alone, axis=1))
        ranges = [f"{each.min():.3f}–{each.max():.3f}" for each in (alone, averages)]
        return " | ".join([what, *ranges, f"{apart:.3f}", f"{alone[:, 0].mean():.3f}"])

    def rows() -> Iterator[str]:
        yield row("the published run", {name: np.array(line) for name, line in PUBLISHED.items()})
        first = {name: scores(WAYS[0], name)[0, :TEN] for name in PUBLISHED}
        yield row("as published, seed 0", first)
        for way in WAYS:
            found = {name: scores(way, name)[:, :TEN] for name in PUBLISHED}
            yield row(f"{way}, {len(runs(way))} seeds", found)

    return table(
        "| single models | averages | best and worst of a run's ten apart, median | newest, mean",
        rows(),
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
        for position, alpha in enumerate(figures()["alphas"]):
            weights = np.exp(-np.arange(scores(WAYS[0], "alone").shape[1]) / alpha)
            cells = [f"{alpha:g}", f"{weights.sum() ** 2 / (weights**2).sum():.1f}"]
            for way in WAYS:
                found = by_alpha(way)[:, position]
                cells.append(f"{told(found)}, {share(found < 0)}")
            yield " | ".join(cells)

    return table(" | ".join(["alpha", "effective number", *WAYS]), rows())


def founding_loss() -> str:
    """Compare cross-entropies on the held-out points with that of the newest."""

    def rows() -> Iterator[str]:
        for way in WAYS:
            loss = {
                key: numbers(run["loss"][key] for run in runs(way))
                for key in ("newest", "ten", "all")
            }
            cells = [way, f"{loss['newest'].mean():.3f}"]
            found = np.hstack([loss["ten"], loss["all"]]) - loss["newest"]
            cells += [f"{told(each, 4)}, {share(each > 0)}" for each in found.T]
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
