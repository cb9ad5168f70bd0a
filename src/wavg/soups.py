"""Greedy soup: checkpoints join the average, best first, while that does not score worse."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from wavg import outputs
from wavg.errors import WavgError
from wavg.evaluation import Evaluate, direction_of, evaluator_of
from wavg.files import average_checkpoints, plan_average
from wavg.formats import open_file
from wavg.greedy import evaluated, greedy
from wavg.grid import newest
from wavg.inputs import PathLike
from wavg.journal import Journal
from wavg.printable import padded, printable
from wavg.results import written
from wavg.scoring import Scorer, described, journal_of, resumable
from wavg.selection import metrics_of
from wavg.subjects import Subjects

__all__ = ["Soup", "Trial", "soup"]

_UNBOUNDED = 1 << 50


@dataclass(frozen=True, slots=True)
class Trial:
    """A checkpoint's turn.

    Attributes
    ----------
    path, step
        The checkpoint.
    alone
        Its own score, by which it has its turn; None where that failed.
    score
        Of the soup with it; None where that failed, or was not tried.
    taken
        Whether it joined.
    error
        Why there is no score; else empty.
    standard_error
        Of the score, where the evaluator tells scores of single examples; else None.
    tie
        Whether the score differs from the soup's before by no more than the standard error of the
        difference, so that chance may have decided.
    """

    path: str
    step: float
    alone: float | None
    score: float | None
    taken: bool
    error: str = ""
    standard_error: float | None = None
    tie: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Soup:
    """A greedy soup, and how it came about.

    Attributes
    ----------
    chosen
        The paths of its checkpoints, oldest first; their equal average is the soup.
    score
        The soup's, on the data that it was chosen by.
    trials
        A decision for each checkpoint, in their order: best own score first.
    evaluate
        What scored.
    maximize
        Whether a higher score is better.
    evaluations
        How many there were, those of the journal included.
    bytes_read
        From the checkpoints, in this run.
    standard_error
        Of the score, where the evaluator tells scores of single examples; else None.
    """

    chosen: tuple[str, ...]
    score: float
    trials: tuple[Trial, ...]
    evaluate: str
    maximize: bool
    evaluations: int
    bytes_read: int
    standard_error: float | None = None

    def __repr__(self) -> str:
        return f"<Soup: {len(self.chosen)} of {len(self.trials)} checkpoints, {self.score:.5g}>"

    def __str__(self) -> str:
        return "\n".join(_table(self))

    def to_json(self, path: PathLike | None = None, *, overwrite: bool = False) -> str:
        """Return all there is as one JSON object; also written to `path` if given.

        A file that exists is replaced only with `overwrite`.
        """
        whole = {
            "evaluate": self.evaluate,
            "maximize": self.maximize,
            "chosen": list(self.chosen),
            "score": self.score,
            "standard_error": self.standard_error,
            "evaluations": self.evaluations,
            "bytes_read": self.bytes_read,
            "trials": [
                {name: getattr(trial, name) for name in Trial.__slots__} for trial in self.trials
            ],
        }
        return written(json.dumps(whole, indent=2) + "\n", path, overwrite=overwrite)


def soup(
    inputs: PathLike | Iterable[PathLike],
    evaluate: Evaluate | None = None,
    *,
    maximize: bool,
    evaluate_command: str | None = None,
    timeout: float | None = None,
    budget: int | None = None,
    metrics: PathLike | Mapping[str, float] | None = None,
    metric: str | None = None,
    first_epoch: int | None = None,
    last: int | None = None,
    steps: Sequence[float] | None = None,
    sort: bool | None = None,
    dtype: str | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    align: str = "name",
    allow_nonfinite: bool = False,
    opaque_dtype: str | None = None,
    isolate: bool = False,
    output: PathLike | None = None,
    overwrite: bool = False,
    journal: PathLike | None = None,
    progress: bool = False,
) -> Soup:
    """Average those checkpoints that do not make the average's score worse, best first.

    Parameters
    ----------
    inputs
        Checkpoints, as for `average_checkpoints`: of one run, or fine-tuned from one model.
    evaluate, evaluate_command, timeout
        As for `sweep`.
    maximize
        Whether a higher score is better, and so a higher metric: for an accuracy beside a table of
        losses, give the losses negated.
    budget
        The most evaluations in all: each checkpoint alone, unless `metrics` are given, then the
        trials. Checkpoints whose turn does not come stay out.
    metrics, metric, first_epoch
        Recorded own scores in place of evaluating each checkpoint, as for `best_checkpoints`.
        Checkpoints without stay out.
    last
        Only the newest so many.
    steps, sort, dtype, include, exclude, align, allow_nonfinite, opaque_dtype, isolate
        As for `average_checkpoints`.
    output
        Where to write the soup.
    overwrite
        Replace an existing output.
    journal
        A file that remembers every score at once, as for `sweep`.
    progress
        Show a progress bar on standard error if that is a terminal.

    Returns
    -------
    Soup
        What was chosen, and each decision; prints as a table.

    Raises
    ------
    WavgError
        Inputs that cannot be averaged, no checkpoint that can be scored, too small a budget.

    Notes
    -----
    The soup is chosen by the score that it is given, which is therefore optimistic: confirm it on
    other data. A checkpoint joins where the score with it is better or the same: of two that are
    alike, both are in. Equal own scores go newest first. An evaluation that fails keeps its
    checkpoint out. The average under way is a running sum, float64: each checkpoint is read once to
    be scored alone and once at its turn, whatever the soup's size.

    References
    ----------
    Wortsman et al. 2022, *Model soups*, arXiv:2203.05482, recipe 1.

    Examples
    --------
    >>> import numpy as np, tempfile, wavg
    >>> folder = tempfile.mkdtemp()
    >>> for step, value in enumerate([1.25, 2.0, 9.0, 1.625]):
    ...     wavg.save(f"{folder}/model_{step}.safetensors", {"w": np.float32([value])})
    >>> result = wavg.soup(folder, lambda model: abs(model["w"][0] - 1.5), maximize=False)
    >>> [(trial.step, trial.taken) for trial in result.trials]
    [(3.0, True), (0.0, True), (1.0, False), (2.0, False)]
    """
    maximize = direction_of(maximize)
    budget = None if budget is None else operator.index(budget)
    evaluator = evaluator_of(evaluate, evaluate_command, timeout)
    place = journal_of(journal, evaluator)
    open_ = partial(open_file, opaque_dtype=opaque_dtype, isolate=isolate)
    paths, numbers = newest(inputs, steps, (), sort, output, last, open_)
    own: dict[int, float] = {}
    if metrics is not None:
        own = metrics_of(paths, numbers, metrics, metric, first_epoch)
    elif budget is not None and budget <= len(paths):
        raise WavgError(
            f"a budget of {budget} evaluations leaves none for a soup: each of {len(paths)} "
            "checkpoints is scored alone first. Allow more, take fewer with last (--last), or "
            "give recorded scores with metrics (--metrics)"
        )
    options: dict[str, Any] = {
        "dtype": dtype,
        "include": include,
        "exclude": exclude,
        "align": align,
        "allow_nonfinite": allow_nonfinite,
        "opaque_dtype": opaque_dtype,
        "isolate": isolate,
    }
    if output is not None:
        plan_average(paths, output, steps=numbers, sort=False, max_memory=_UNBOUNDED, **options)
        outputs.refuse(os.fspath(output), paths[-1], overwrite=overwrite)
    files = evaluator.takes_files
    with (
        resumable(place),
        Subjects(paths, inputs, options, files=files) as subjects,
        Journal(
            place,
            {
                "series": "soup",
                "metrics": sorted(own.items()),
                **described(evaluator, maximize, numbers, subjects.checkpoints, options),
            },
            fatal=not files,
        ) as record,
        Scorer(
            evaluator,
            record,
            maximize=maximize,
            total=min(2 * len(paths) - 1, budget or 2 * len(paths)),
            progress=progress,
        ) as scorer,
    ):
        if metrics is None:
            for position in reversed(range(len(paths))):
                outcome = evaluated(subjects, scorer, [position])
                if outcome.score is not None:
                    own[position] = outcome.score
        turns, chosen, outcome = greedy(subjects, scorer, own, maximize, budget)
    assert outcome.score is not None  # else there was an error
    result = Soup(
        tuple(paths[position] for position in sorted(chosen)),
        outcome.score,
        tuple(
            Trial(
                paths[turn.position],
                numbers[turn.position],
                own.get(turn.position),
                turn.outcome.score,
                turn.taken,
                turn.outcome.error,
                turn.outcome.standard_error,
                turn.tie,
            )
            for turn in turns
        ),
        evaluator.text,
        maximize,
        len(record.outcomes),
        subjects.bytes_read,
        outcome.standard_error,
    )
    if output is not None:
        average_checkpoints(
            result.chosen,
            output,
            steps=[numbers[position] for position in sorted(chosen)],
            sort=False,
            overwrite=overwrite,
            **options,
        )
    return result


def _table(soup: Soup) -> Iterator[str]:
    direction = "higher" if soup.maximize else "lower"
    yield f"score by {printable(soup.evaluate)}, {direction} is better"
    title, *names = padded(["checkpoint, best first", *(trial.path for trial in soup.trials)])
    yield f"{title}  {'step':>8}  {'alone':>10}  {'soup with':>10}"
    wide = any(trial.standard_error is not None for trial in soup.trials)
    for name, trial in zip(names, soup.trials, strict=True):
        alone, score = (
            "-" if value is None else f"{value:.5g}" for value in (trial.alone, trial.score)
        )
        if wide:
            score = f"{score:>10}{_error(trial.standard_error):<10}" + (" ~" if trial.tie else "  ")
        verdict = "joins" if trial.taken else f"stays out{f': {trial.error}' * bool(trial.error)}"
        yield f"{name}  {trial.step:>8g}  {alone:>10}  {score:>10}  {printable(verdict)}"
    if any(trial.tie for trial in soup.trials):
        yield "~ within the standard error of the difference from the soup before: maybe chance"
    score = f"{soup.score:.5g}{_error(soup.standard_error)}"
    yield (
        f"soup of {len(soup.chosen)} of {len(soup.trials)} checkpoints: {score}, "
        f"after {soup.evaluations:,} evaluations"
    )


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f" ± {standard_error:.2g}"
