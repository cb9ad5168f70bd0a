"""Which average is best: an experiment, with the newest n checkpoints for n = 1 … N."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wavg import outputs
from wavg import weights as schedules
from wavg.errors import WeightError
from wavg.evaluation import Evaluate, direction_of, evaluator_of
from wavg.files import average_checkpoints, plan_average
from wavg.formats import open_file
from wavg.grid import Grid, Open, newest, weigh
from wavg.inputs import PathLike
from wavg.journal import Journal
from wavg.options import parse_size
from wavg.prefix_sums import elements
from wavg.prefixes import most_sums, passes, programme
from wavg.results import Score, Sweep, best_of
from wavg.scoring import Scorer, described, journal_of, resumable
from wavg.subjects import Subjects

__all__ = ["sweep"]

F64 = npt.NDArray[np.float64]

_SUMS, _SUMS_ON_DISK = 4, 16  # kept at once unless more are allowed
_FREE_BYTES = 256 << 20  # as many as fit in so little, anyway
_ENOUGH = 1 << 50  # for what only plans and reads nothing


def sweep(
    inputs: PathLike | Iterable[PathLike],
    evaluate: Evaluate | None = None,
    *,
    maximize: bool,
    evaluate_command: str | None = None,
    timeout: float | None = None,
    weights: schedules.WeightsLike | Sequence[schedules.WeightsLike] = "equal",
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
    max_memory: int | str | None = None,
    progress: bool = False,
) -> Sweep:
    """Score the n-th newest checkpoint alone and the average of the newest n, for n = 1 … N.

    Parameters
    ----------
    inputs
        Checkpoints, as for `average_checkpoints`.
    evaluate
        A function of a model's tensors (an ordered dict of arrays, as `average_checkpoints` returns
        it), or its ``"module:function"``. It returns the score, or an array of the scores of single
        examples, whose mean is the score.
    maximize
        Whether a higher score is better (an accuracy), or a lower one (a loss).
    evaluate_command
        In place of `evaluate`, a command such as ``"python score.py {}"``: ``{}`` stands for the
        path of a checkpoint, and the last number printed is the score. Run without a shell.
    timeout
        Seconds after which a command is killed.
    weights
        A schedule, or a list of them.
    last
        Up to how many of the newest; all by default.
    steps, sort, dtype, include, exclude, align, allow_nonfinite, opaque_dtype, isolate
        As for `average_checkpoints`.
    output
        Where to write the best average.
    overwrite
        Replace an existing output.
    journal
        A file that remembers every score at once, so that a sweep that was stopped goes on where it
        was. One of another sweep is refused. It knows `evaluate` by its name, not by what it does.
    max_memory
        The most that running sums may take, in memory, or on disk for a command: at least one sum
        (float64, one a number) is kept. The default is four sums, sixteen on disk, or 256 MiB where
        that is more. Where it does not suffice the checkpoints are read more often.
    progress
        Show a progress bar on standard error if that is a terminal.

    Returns
    -------
    Sweep
        The scores; prints as a table.

    Raises
    ------
    WavgError
        Inputs that cannot be averaged, an evaluator that is not there, a journal of another sweep.

    Notes
    -----
    An evaluation that fails (an exception, a command's exit code, a score that is NaN) is recorded,
    and the sweep goes on; so it does where a checkpoint holds what is not finite, which fails with
    every average that holds it. Each checkpoint is read once (``.npz`` and ``.keras`` twice, for
    their checksums) while the running sums suffice: one for each of most schedules, two for
    ``linear``. The sums are float64, so that an average may differ from that of
    `average_checkpoints` in the last place, rarely; the `output` is made by the latter. In memory
    there are the sums, a checkpoint, and up to four averages; with a command a few blocks, and on
    disk, in the folder for temporary files, the sums and an average for each schedule. The best of
    many on one held-out set is optimistic: confirm it on another.

    Examples
    --------
    >>> import numpy as np, tempfile, wavg
    >>> folder = tempfile.mkdtemp()
    >>> for step, value in enumerate([2.5, 0.0, 2.0, 1.0]):
    ...     wavg.save(f"{folder}/model_{step}.safetensors", {"w": np.float32([value])})
    >>> result = wavg.sweep(folder, lambda model: abs(model["w"][0] - 1.4), maximize=False)
    >>> [round(score.score, 2) for score in result.averages], result.best.n
    ([0.4, 0.1, 0.4, 0.02], 4)
    """
    maximize = direction_of(maximize)
    evaluator = evaluator_of(evaluate, evaluate_command, timeout)
    place = journal_of(journal, evaluator)
    rules = Grid.of(weights, None).rules
    open_ = partial(open_file, opaque_dtype=opaque_dtype, isolate=isolate)
    paths, numbers = newest(inputs, steps, rules, sort, output, last, open_)
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
        plan_average(
            paths, output, steps=range(len(paths)), sort=False, max_memory=_ENOUGH, **options
        )
        outputs.refuse(os.fspath(output), paths[-1], overwrite=overwrite)
    cells = _cells(rules, paths, numbers, open_, plain=dtype is None)
    files = evaluator.takes_files
    with (
        resumable(place),
        Subjects(paths, inputs, options, files=files) as subjects,
        Journal(
            place,
            {
                "series": "sweep",
                "weights": list(map(str, rules)),
                **described(evaluator, maximize, numbers, subjects.checkpoints, options),
            },
            fatal=not files,
        ) as record,
        Scorer(
            evaluator,
            record,
            maximize=maximize,
            total=len(paths) + sum(cell.key == cell.same for cell in cells),
            progress=progress,
        ) as scorer,
    ):
        rounds, sums = _score(cells, subjects, scorer, max_memory)
    outcomes = [record.outcomes[cell.same] for cell in cells]
    best = best_of(outcomes, maximize)
    chosen = None if best is None else outcomes[best]
    result = Sweep(
        tuple(paths),
        numbers,
        evaluator.text,
        maximize,
        tuple(
            Score.of(n, None, record.outcomes[_alone(n)], chosen) for n in range(1, len(paths) + 1)
        ),
        tuple(
            Score.of(cell.n, str(cell.rule), outcome, None if position == best else chosen)
            for position, (cell, outcome) in enumerate(zip(cells, outcomes, strict=True))
        ),
        subjects.bytes_read,
        rounds,
        sums,
    )
    if output is not None and best is not None:
        cell = cells[best]
        average_checkpoints(
            paths[-cell.n :],
            output,
            weights=cell.rule,
            steps=numbers[-cell.n :],
            sort=False,
            overwrite=overwrite,
            **options,
        )
    return result


class _Cell(NamedTuple):
    """An average to be scored: its schedule, its weights, newest first, and their sum.

    `same` is the key of the first evaluation of the same model.
    """

    rule: schedules.Schedule
    n: int
    row: F64
    total: float
    key: str
    same: str


def _alone(n: int) -> str:
    return f"{n} alone"


def _cells(
    rules: Sequence[schedules.Schedule],
    paths: Sequence[str],
    steps: Sequence[float],
    open_: Open,
    *,
    plain: bool,
) -> list[_Cell]:
    """Return the averages that there are, by n; where weights cannot be had for an n, none."""
    cells: list[_Cell] = []
    seen: dict[bytes, str] = {}
    if plain:  # the average of the newest alone is the newest
        seen[np.ones(1).tobytes()] = _alone(1)
    problems: dict[str, WeightError] = {}
    for n in range(1, len(steps) + 1):
        for rule in rules:
            try:
                row = weigh(rule, paths[-n:], steps[-n:], open_)[::-1]
                total = _total(row)
            except WeightError as problem:
                problems[str(rule)] = problem
                continue
            key = f"{n} {rule}"
            proportions = np.trim_zeros(row / total, "b") + 0.0
            cells.append(
                _Cell(rule, n, row, total, key, seen.setdefault(proportions.tobytes(), key))
            )
    for rule in rules:
        if not any(cell.rule is rule for cell in cells):
            raise problems[str(rule)]
    if len({cell.key for cell in cells}) < len(cells):
        raise WeightError("the same weights are given twice")
    return cells


def _total(row: F64) -> float:
    total = math.fsum(row)
    if total == 0.0 or not math.isfinite(1.0 / total):
        raise WeightError("the weights sum to zero, so there is no average")
    return total


def _score(
    cells: Sequence[_Cell], subjects: Subjects, scorer: Scorer, max_memory: int | str | None
) -> tuple[int, int]:
    """Score what is left; return the passes over the checkpoints, and the sums kept at once."""
    count = len(subjects.checkpoints)
    pending = [cell for cell in cells if cell.key == cell.same and scorer.pending(cell.key)]
    singles = [n for n in range(1, count + 1) if scorer.pending(_alone(n))]
    size = max(1, 8 * elements(subjects.plan))
    usual = _SUMS_ON_DISK if subjects.on_disk else _SUMS
    allowed = max(_FREE_BYTES, usual * size) if max_memory is None else parse_size(max_memory)
    groups = passes([cell.row for cell in pending], max(1, allowed // size))
    if not groups and singles:
        groups = [[]]
    most = 0
    for group in groups:
        chosen = [pending[position] for position in group]
        programmed = programme([cell.row for cell in chosen])
        most = max(most, most_sums(programmed))
        totals = {row: cell.total for row, cell in enumerate(chosen)}
        last = max(singles, default=0) if group is groups[0] else 0
        with subjects.sums(most_sums(programmed)) as sums:
            for n in range(1, max(last, len(programmed)) + 1):
                step = programmed[n - 1] if n <= len(programmed) else None
                alone = scorer.pending(_alone(n))
                if step is None and not alone:
                    continue
                taken = subjects.take(count - n, sums, step, totals, alone=alone)
                with contextlib.closing(taken):
                    for row, model, problem in taken:
                        key = _alone(n) if row is None else chosen[row].key
                        if problem:
                            scorer.fail(key, problem)
                        else:
                            scorer.run(key, model)
                        del model  # before there is another
    return len(groups), most
