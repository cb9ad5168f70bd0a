"""What a sweep found: scores, the best, ties; as a table, CSV, JSON, a picture."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg.errors import WavgError
from wavg.evaluation import Outcome, is_tie
from wavg.inputs import PathLike
from wavg.printable import printable
from wavg.publish import write_file
from wavg.scoring import better
from wavg.sweep_picture import Points, draw

__all__ = ["Score", "Sweep", "best_of", "written"]


@dataclass(frozen=True, slots=True)
class Score:
    """One evaluated model of a sweep.

    Attributes
    ----------
    n
        Of the n-th newest checkpoint alone, or of the average of the newest n.
    weights
        The average's schedule; None for a checkpoint alone.
    score
        What the evaluator said; None where it failed.
    error
        Why it failed; else empty.
    standard_error
        Of the score, where the evaluator tells scores of single examples; else None.
    tie
        Whether the difference from the best average is within its standard error.
    seconds
        How long the evaluation took.
    examples
        The scores of single examples, or None.
    """

    n: int
    weights: str | None
    score: float | None
    error: str = ""
    standard_error: float | None = None
    tie: bool = False
    seconds: float = 0.0
    examples: npt.NDArray[np.float64] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, n: int, weights: str | None, outcome: Outcome, best: Outcome | None) -> Score:
        """Describe an outcome beside the best one; None for the best itself."""
        return cls(
            n,
            weights,
            outcome.score,
            outcome.error,
            outcome.standard_error,
            best is not None and is_tie(outcome, best),
            outcome.seconds,
            outcome.examples,
        )

    def __str__(self) -> str:
        return self.told(5)

    def told(self, digits: int) -> str:
        """Return a line that says what it is, its score with so many digits."""
        what = f"the newest {self.n}, {self.weights}" if self.weights else f"{_nth(self.n)} alone"
        if self.score is None:
            return f"{what}: failed, {printable(self.error)}"
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2g}"
        return f"{self.score:.{digits}g}{error}, {what}"


def best_of(outcomes: Sequence[Outcome], maximize: bool) -> int | None:
    """Return the position of the best, of equals the first; None if all failed."""
    best: int | None = None
    for position, outcome in enumerate(outcomes):
        if outcome.score is None:
            continue
        before = None if best is None else outcomes[best].score
        if before is None or better(outcome.score, before, maximize):
            best = position
    return best


@dataclass(frozen=True, slots=True, repr=False)
class Sweep:
    """The scores of single checkpoints and of averages of the newest n.

    Attributes
    ----------
    inputs, steps
        The checkpoints, oldest first, and their steps.
    evaluate
        What scored them.
    maximize
        Whether a higher score is better.
    singles
        Of the n-th newest checkpoint alone, n = 1 … N.
    averages
        Of the average of the newest n; for each n one a schedule that has weights for so many.
    bytes_read
        From the checkpoints, in this run.
    passes
        How many times this run went through the checkpoints.
    sums
        How many running sums it kept at once, at most.
    """

    inputs: tuple[str, ...]
    steps: tuple[float, ...]
    evaluate: str
    maximize: bool
    singles: tuple[Score, ...]
    averages: tuple[Score, ...]
    bytes_read: int
    passes: int
    sums: int

    @property
    def best(self) -> Score:
        """The best average; of equal scores that of the fewest checkpoints.

        Raises
        ------
        WavgError
            No evaluation succeeded.
        """
        return self._first(self.averages)

    @property
    def best_single(self) -> Score:
        """The best checkpoint alone; of equal scores the newest."""
        return self._first(self.singles)

    @property
    def schedules(self) -> list[str]:
        """The averages' schedules, in the order asked for."""
        return list(dict.fromkeys(score.weights for score in self.averages if score.weights))

    def _first(self, scores: Sequence[Score]) -> Score:
        position = best_of([Outcome(score.score) for score in scores], self.maximize)
        if position is None:
            reason = next((score.error for score in scores if score.error), "there was none")
            raise WavgError(f"no evaluation succeeded; the first failed so: {reason}")
        return scores[position]

    def __repr__(self) -> str:
        return f"<Sweep: {len(self.singles)} checkpoints, {len(self.averages)} averages>"

    def __str__(self) -> str:
        return "\n".join(_table(self))

    def to_csv(self, path: PathLike | None = None, *, overwrite: bool = False) -> str:
        """Return the scores as CSV, one evaluated model a line; also written to `path` if given.

        A file that exists is replaced only with `overwrite`.
        """
        text = io.StringIO()
        rows = _records(self)
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return written(text.getvalue(), path, overwrite=overwrite)

    def to_json(self, path: PathLike | None = None, *, overwrite: bool = False) -> str:
        """Return all there is as one JSON object; also written to `path` if given.

        A file that exists is replaced only with `overwrite`.
        """
        try:
            best = {"n": self.best.n, "weights": self.best.weights, "score": self.best.score}
        except WavgError:
            best = None
        whole = {
            "evaluate": self.evaluate,
            "maximize": self.maximize,
            "inputs": [
                {"path": path, "step": step}
                for path, step in zip(self.inputs, self.steps, strict=True)
            ],
            "best": best,
            "bytes_read": self.bytes_read,
            "passes": self.passes,
            "sums": self.sums,
            "scores": _records(self),
        }
        return written(json.dumps(whole, indent=2) + "\n", path, overwrite=overwrite)

    def plot(self, path: PathLike, *, overwrite: bool = False) -> None:
        """Draw single scores as dots, averages as a line a schedule, and mark the best.

        Parameters
        ----------
        path
            The picture to write: its ending (``.png``, ``.svg``, ``.pdf``) tells the format.
        overwrite
            Replace a file that exists.

        Raises
        ------
        OutputExistsError
            There is a file, and it was not to be replaced.
        MissingDependencyError
            Matplotlib is not installed.
        """
        best = self.best
        lines = {
            name: _points([score for score in self.averages if score.weights == name])
            for name in self.schedules
        }
        marked = best.n, _or_nan(best.score), best.standard_error
        name = os.fspath(path)
        picture = draw(name, _points(self.singles), lines, marked, maximize=self.maximize)
        write_file(name, picture, overwrite=overwrite)


def _points(scores: Sequence[Score]) -> Points:
    return Points([score.n for score in scores], [_or_nan(score.score) for score in scores])


def _or_nan(score: float | None) -> float:
    return math.nan if score is None else score


def written(text: str, path: PathLike | None, *, overwrite: bool) -> str:
    """Return a text, written to `path` if there is one."""
    if path is not None:
        write_file(os.fspath(path), text.encode(), overwrite=overwrite)
    return text


def _records(sweep: Sweep) -> list[dict[str, Any]]:
    best = best_of([Outcome(score.score) for score in sweep.averages], sweep.maximize)
    chosen = None if best is None else sweep.averages[best]
    return [
        {
            "n": score.n,
            "step": sweep.steps[-score.n],
            "path": sweep.inputs[-score.n],
            "weights": score.weights or "alone",
            "score": score.score,
            "standard_error": score.standard_error,
            "best": score is chosen,
            "tie": score.tie,
            "error": score.error,
            "seconds": score.seconds,
        }
        for score in (*sweep.singles, *sweep.averages)
    ]


def _table(sweep: Sweep) -> Iterator[str]:
    """Yield a line for each n, what the marks mean, the best, and what failed."""
    scores = (*sweep.singles, *sweep.averages)
    names = ["alone", *sweep.schedules]
    cells = {(score.n, score.weights or "alone"): score for score in scores}
    best = best_of([Outcome(score.score) for score in sweep.averages], sweep.maximize)
    chosen = None if best is None else sweep.averages[best]
    values = [score.score for score in scores if score.score is not None]
    digits, form = _form(values)
    texts = {key: _cell(score, form, score is chosen) for key, score in cells.items()}
    widths = [
        max(
            10, *(len(text) for (_, column), text in texts.items() if column == name), len(name) + 1
        )
        for name in names
    ]
    direction = "higher" if sweep.maximize else "lower"
    yield f"score by {printable(sweep.evaluate)}, {direction} is better:"
    yield "of the n-th newest checkpoint alone, and of the average of the newest n by each schedule"
    yield f"{'n':>4}  {'step':>8}" + "".join(
        f"  {name:>{width - 1}} " for name, width in zip(names, widths, strict=True)
    )
    for n in range(1, len(sweep.singles) + 1):
        line = f"{n:>4}  {sweep.steps[-n]:>8g}"
        for name, width in zip(names, widths, strict=True):
            line += f"  {texts.get((n, name), '- '):>{width}}"
        yield line.rstrip()
    if any(score.tie for score in scores):
        yield "~ within the standard error of the difference from the best: a tie with it"
    failed = [score for score in scores if score.score is None]
    for score in failed[:_MOST_FAILURES]:
        yield f"! {score}"
    if len(failed) > _MOST_FAILURES:
        yield f"! and {len(failed) - _MOST_FAILURES:,} more failed"
    if chosen is None:
        yield "* no average could be scored"
        return
    yield f"* best average: {chosen.told(digits)}"
    alone = best_of([Outcome(score.score) for score in (chosen, *sweep.singles)], sweep.maximize)
    if alone:
        single = sweep.singles[alone - 1]
        tie = ", though it is a tie" * single.tie
        yield f"  a checkpoint alone scores better{tie}: {single.told(digits)}"


_MOST_FAILURES = 10


def _form(values: Sequence[float]) -> tuple[int, str]:
    """Return how many digits the largest of some scores has, and their format.

    There are five, or as many as show three of the difference of the most from the least.

    >>> [format(1234.5, _form([1234.51, 1234.55])[1]), format(5e-9, _form([5e-9])[1])]
    ['1234.5000', '5.0000e-09']
    """
    largest = max(map(abs, values), default=1.0) or 1.0
    place = math.floor(math.log10(largest))
    spread = max(values, default=0.0) - min(values, default=0.0)
    if not 1e-12 * largest < spread < math.inf:  # but rounding errors
        spread = largest
    digits = min(15, max(5, place - math.floor(math.log10(spread)) + 3))
    if -5 < place < 15:
        return digits, f".{max(0, digits - 1 - place)}f"
    return digits, f".{digits - 1}e"


def _cell(score: Score, form: str, best: bool) -> str:
    if score.score is None:
        return "failed!"
    return f"{score.score:{form}}" + ("*" if best else "~" if score.tie else " ")


def _nth(n: int) -> str:
    if n == 1:
        return "the newest"
    ending = {1: "st", 2: "nd", 3: "rd"}.get(n % 10 if n % 100 not in (11, 12, 13) else 0, "th")
    return f"the {n}{ending} newest"
