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
    """By how many right answers the average of the newest n beats single models, in each run."""
    alone = scores(way, "alone")[:, :n]
    rival = {"mean": alone.mean(axis=1), "newest": alone[:, 0], "best": alone.max(axis=1)}
    return scores(way, name)[:, n - 1] - rival[over]


def standard_error(values: np.ndarray) -> float:
    return values.std(axis=0, ddof=1) / math.sqrt(len(values))


def told(values: np.ndarray, digits: int = 1) -> str:
    """A mean and its standard error."""
    mean = round(values.mean(), digits) + 0.0
    return f"{mean:+.{digits}f} ± {standard_error(values):.{digits}f}"


def worse(values: np.ndarray) -> str:
    return f"{(values < 0).mean():.0%}"


def table(header: str, rows: Iterator[str]) -> str:
    columns = header.count("|") + 1
    return "\n".join([f"| {header} |", "|" + "---|" * columns, *(f"| {row} |" for row in rows)])


def founding_one() -> str:
    names = tuple(PUBLISHED)
    header = " | ".join(["n", *(f"{name}, published" for name in names), *(f"{x}, ours" for x in names)])

    def rows() -> Iterator[str]:
        for n in range(1, TEN + 1):
            theirs = [PUBLISHED[name][n - 1] for name in names]
            ours = [scores(WAYS[0], name)[0, n - 1] for name in names]
            yield " | ".join([f"{n}", *(f"{score / 1000:.3f}" for score in (*theirs, *ours))])

    return table(header, rows())


def founding_gain() -> str:
    def rows() -> Iterator[str]:
        for way in WAYS:
            for name in SCHEDULES:
                cells = [way, name]
                for over in ("mean", "newest", "best"):
                    found = gain(way, name, TEN, over)
                    cells += [told(found), worse(found)]
                yield " | ".join(cells)

    return table(
        "| average of ten | against the mean of the ten | worse in | against the newest | worse in"
        " | against the best of the ten | worse in",
        rows(),
    )


def founding_spread() -> str:
    """What one sees of single models: their mean, how far the ten of a run lie apart."""

    def rows() -> Iterator[str]:
        for way in WAYS:
            alone = scores(way, "alone")[:, :TEN]
            newest = alone[:, 0]
            apart = alone.max(axis=1) - alone.min(axis=1)
            yield (
                f"{way} | {newest.mean():.1f} | {newest.min():.0f}–{newest.max():.0f} | "
                f"{np.median(apart):.0f} | {apart.min():.0f}–{apart.max():.0f}"
            )

    return table(
        "| the newest, mean of the runs | from–to | best and worst of the last ten are apart by,"
        " median | from–to",
        rows(),
    )


def founding_many() -> str:
    def rows() -> Iterator[str]:
        for n in MANY:
            cells = [f"{n}"]
            for way in WAYS:
                for name in ("equal", "linear"):
                    found = gain(way, name, n, "newest")
                    cells.append(f"{told(found)}, {worse(found)}")
            yield " | ".join(cells)

    names = [f"{way}, {name}" for way in WAYS for name in ("equal", "linear")]
    return table(" | ".join(["n", *names]), rows())


def founding_alpha() -> str:
    def rows() -> Iterator[str]:
        for alpha in runs(WAYS[0])[0]["right_by_alpha"]:
            weights = np.exp(-np.arange(scores(WAYS[0], "alone").shape[1]) / float(alpha))
            cells = [alpha, f"{weights.sum() ** 2 / (weights**2).sum():.1f}"]
            for way in WAYS:
                found = np.array([run["right_by_alpha"][alpha] for run in runs(way)])
                found = found - scores(way, "alone")[:, 0]
                cells.append(f"{told(found)}, {worse(found)}")
            yield " | ".join(cells)

    return table(" | ".join(["alpha", "effective number", *WAYS]), rows())


def founding_loss() -> str:
    def rows() -> Iterator[str]:
        for way in WAYS:
            newest = scores(way, "alone", "loss")[:, 0]
            cells = [way, f"{newest.mean():.4f}"]
            for n in (TEN, 100):
                for name in SCHEDULES:
                    found = newest - scores(way, name, "loss")[:, n - 1]
                    cells.append(f"{told(-found, 4)}, {worse(found)}")
            yield " | ".join(cells)

    names = [f"{name} of {n}" for n in (TEN, 100) for name in SCHEDULES]
    return table(" | ".join(["", "the newest", *names]), rows())


TABLES = {
    made.__name__: made
    for made in (
        founding_one,
        founding_gain,
        founding_spread,
        founding_many,
        founding_alpha,
        founding_loss,
    )
}
