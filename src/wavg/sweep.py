"""Which average is best: the scores of the newest n checkpoints averaged, n = 1 … N, by experiment."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wavg import outputs
from wavg import weights as schedules
from wavg.checkpoint import Checkpoint
from wavg.errors import NonFiniteError, WeightError
from wavg.evaluation import Command, Evaluate, Function, evaluator_of
from wavg.files import average_checkpoints, plan_average
from wavg.formats import is_checkpoint_name
from wavg.formats.folders import checkpoint_in
from wavg.grid import Grid, select
from wavg.inputs import PathLike
from wavg.journal import Journal
from wavg.opening import opened, verify_checksums
from wavg.plan import Decision, Plan, parse_size
from wavg.prefixes import Step, most_sums, passes, programme
from wavg.results import Score, Sweep, best_of
from wavg.scoring import Scorer, resumable
from wavg.sinks import MemorySink
from wavg.prefix_sums import PrefixSums, elements

__all__ = ["sweep"]

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

_SUMS = 4  # kept at once unless more are allowed
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
        was. One of another sweep is refused.
    max_memory
        The most that running sums may take, in memory, or on disk for a command: at least one sum
        (float64, one a number) is kept. The default is four sums, or 256 MiB where that is more.
        Where it does not suffice the checkpoints are read more often.
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
    and the sweep goes on. Each checkpoint is read once (``.npz`` and ``.keras`` twice, for their
    checksums) while the running sums suffice: one for each of most schedules, two for ``linear``.
    The sums are float64, so that an average may differ from that of `average_checkpoints` in the
    last place, rarely; the `output` is made by the latter. In memory there are the sums, a
    checkpoint, and an average for each schedule; with a command a few blocks, and the rest on disk,
    in the folder for temporary files. The best of many on one held-out set is optimistic: confirm
    it on another.

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
    evaluator = evaluator_of(evaluate, evaluate_command, timeout)
    grid = Grid.of(weights, last)
    paths, numbers = select(inputs, steps, grid, sort, output)
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
        plan_average(paths, output, steps=numbers, sort=False, max_memory=_ENOUGH, **options)
        outputs.refuse(os.fspath(output), paths[-1], overwrite=overwrite)
    cells = _cells(grid.rules, numbers, plain=dtype is None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(resumable(None if journal is None else os.fspath(journal)))
        target = None
        if evaluator.takes_files:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="wavg-sweep-"))
            target = _target(folder, paths[-1], inputs)
        plan = plan_average(
            paths, target, steps=numbers, sort=False, max_memory=_ENOUGH, **options
        )
        checkpoints = stack.enter_context(opened(paths, opaque_dtype, isolate))
        record = stack.enter_context(
            Journal(
                None if journal is None else os.fspath(journal),
                _series(evaluator, maximize, grid, numbers, checkpoints, options),
            )
        )
        total = len(paths) + sum(cell.key == cell.same for cell in cells)
        scorer = stack.enter_context(
            Scorer(evaluator, record, maximize=maximize, total=total, progress=progress)
        )
        work = _Work(plan, checkpoints, scorer, inputs, target)
        work.run(cells, max_memory)
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
            Score.of(cell.n, str(cell.rule), outcome, chosen)
            for cell, outcome in zip(cells, outcomes, strict=True)
        ),
        work.bytes_read,
        work.passes,
        work.sums,
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
    rules: Sequence[schedules.Schedule], steps: Sequence[float], *, plain: bool
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
                row = np.array(rule(steps[-n:]), np.float64)[::-1]
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


def _target(folder: str, newest: str, inputs: PathLike | Iterable[PathLike]) -> str:
    """Return the path of an average for a command, named like the newest checkpoint."""
    whole = _whole(newest, inputs)
    name = os.path.basename(os.path.abspath(whole))
    return os.path.join(folder, name, "") if os.path.isdir(whole) else os.path.join(folder, name)


def _whole(path: str, inputs: PathLike | Iterable[PathLike]) -> str:
    """Return the folder that a checkpoint is, if it was not given as a file."""
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    if any(is_checkpoint_name(os.fspath(name)) for name in given):
        return path
    folder = os.path.dirname(os.path.abspath(path))
    found = checkpoint_in(folder)
    return folder if found and os.path.samefile(found, path) else path


def _series(
    evaluator: Function | Command,
    maximize: bool,
    grid: Grid,
    steps: Sequence[float],
    checkpoints: Sequence[Checkpoint],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a journal tells two sweeps apart by."""
    return {
        "series": "sweep",
        "evaluate": evaluator.text,
        "maximize": maximize,
        "weights": [str(rule) for rule in grid.rules],
        "steps": list(steps),
        "inputs": [
            [os.path.realpath(identity.path), identity.size, identity.mtime_ns]
            for checkpoint in checkpoints
            for identity in checkpoint.index.files
        ],
        "options": {
            name: options[name]
            for name in ("dtype", "include", "exclude", "align", "allow_nonfinite", "opaque_dtype")
        },
    }


class _Work:
    """Goes through the checkpoints, newest first, and has scored what ends with each."""

    def __init__(
        self,
        plan: Plan,
        checkpoints: Sequence[Checkpoint],
        scorer: Scorer,
        inputs: PathLike | Iterable[PathLike],
        target: str | None,
    ) -> None:
        self._plan, self._checkpoints, self._scorer = plan, checkpoints, scorer
        self._inputs, self._target = inputs, target
        self._carried: dict[str, Array] | None = None
        self.bytes_read = self.passes = self.sums = 0

    def run(self, cells: Sequence[_Cell], max_memory: int | str | None) -> None:
        pending = [c for c in cells if c.key == c.same and self._scorer.pending(c.key)]
        singles = [n for n in range(1, len(self._checkpoints) + 1) if self._waits(n)]
        if not pending and not singles:
            return
        verify_checksums(self._checkpoints, self._plan.workers)
        for checkpoint in self._checkpoints:
            self.bytes_read += sum(c.extent.length for c in checkpoint.index.checksums)
        size = 8 * elements(self._plan)
        allowed = max(_FREE_BYTES, _SUMS * size) if max_memory is None else parse_size(max_memory)
        groups = passes([cell.row for cell in pending], max(1, allowed // max(1, size)))
        for group in groups:
            self._pass([pending[position] for position in group])
        if any(map(self._waits, singles)):
            self._pass([])

    def _waits(self, n: int) -> bool:
        return self._scorer.pending(_alone(n))

    def _pass(self, cells: Sequence[_Cell]) -> None:
        """Score averages, and single checkpoints on the way."""
        programmed = programme([cell.row for cell in cells])
        most = most_sums(programmed)
        self.sums = max(self.sums, most)
        self.passes += 1
        with PrefixSums(self._plan, most, on_disk=self._target is not None) as sums:
            for n in range(1, len(self._checkpoints) + 1):
                step = programmed[n - 1] if n <= len(programmed) else None
                score = self._in_files if self._target is not None else self._in_memory
                if step is not None or self._waits(n):
                    score(n, step, sums, cells)

    def _in_memory(
        self, n: int, step: Step | None, sums: PrefixSums, cells: Sequence[_Cell]
    ) -> None:
        checkpoint, layout = self._checkpoints[-n], self._plan.layouts[-n]
        flats: dict[str, Array] = {}
        specs = list(checkpoint.index.tensors)
        if not self._waits(n):
            specs = [decision.sources[layout] for decision in self._plan.averaged]
        for spec in specs:
            flats[spec.name] = spec.empty()
            checkpoint.read(spec, 0, flats[spec.name])
            self.bytes_read += spec.nbytes
        checkpoint.verify_unchanged()
        sinks: dict[int, MemorySink] = {}
        overflown: dict[int, str] = {}
        if step is not None:

            def read(decision: Decision, start: int, out: Array) -> None:
                flat = flats[decision.sources[layout].name]
                out[...] = flat[start : start + len(out)]

            for row in step.ended:
                sinks[row] = MemorySink(self._plan)
                for name, values in self._carry().items():
                    sinks[row].write(name, 0, values)
            totals = {row: cells[row].total for row in step.ended}
            overflown = sums.step(step, totals, sinks, read, self._located(checkpoint, layout))
        if self._waits(n):
            single = {spec.name: spec.array(flats[spec.name]) for spec in specs}
            flats.clear()
            self._scorer.run(_alone(n), single)
            del single
        flats.clear()
        for row in list(sinks):
            arrays = sinks.pop(row).arrays()
            self._score(cells[row], arrays, overflown.get(row))

    def _carry(self) -> dict[str, Array]:
        """Return what is carried over from the newest; read once."""
        if self._carried is None:
            self._carried = {}
            for decision in self._plan.carried:
                flat = self._carried[decision.spec.name] = decision.spec.empty()
                self._checkpoints[-1].read(decision.spec, 0, flat)
                self.bytes_read += decision.spec.nbytes
        return self._carried

    def _in_files(
        self, n: int, step: Step | None, sums: PrefixSums, cells: Sequence[_Cell]
    ) -> None:
        checkpoint, layout = self._checkpoints[-n], self._plan.layouts[-n]
        if self._waits(n):
            self._scorer.run(_alone(n), _whole(checkpoint.path, self._inputs))
        if step is None:
            return
        with self._files(step.ended) as made:

            def read(decision: Decision, start: int, out: Array) -> None:
                checkpoint.read(decision.sources[layout], start, out)
                self.bytes_read += out.nbytes

            totals = {row: cells[row].total for row in step.ended}
            sinks = {row: output.sink for row, (_, output) in made.items()}
            overflown = sums.step(step, totals, sinks, read, self._located(checkpoint, layout))
            checkpoint.verify_unchanged()
            for row, (_, output) in made.items():
                self.bytes_read += sum(e.length for t in output.templates for e, _ in t.carry)
                output.finish()
                output.commit()
            for row, (path, _) in made.items():
                self._score(cells[row], path, overflown.get(row))

    @contextlib.contextmanager
    def _files(self, rows: Sequence[int]) -> Iterator[dict[int, tuple[str, outputs.Output]]]:
        """Begin the files of averages, each in a folder of its own, and remove them at the end."""
        assert self._target is not None  # that of a command
        folder, name = os.path.split(self._target.rstrip("/"))
        slash = self._target.endswith("/")
        folders = [os.path.join(folder, str(row)) for row in rows]
        try:
            with contextlib.ExitStack() as stack:
                made = {}
                for row, place in zip(rows, folders, strict=True):
                    os.mkdir(place)
                    path = os.path.join(place, name)
                    output = stack.enter_context(
                        outputs.planned(
                            self._plan,
                            self._checkpoints[-1],
                            path + "/" * slash,
                            overwrite=False,
                        )
                    )
                    made[row] = path, output
                yield made
        finally:
            for place in folders:
                shutil.rmtree(place, ignore_errors=True)

    def _score(self, cell: _Cell, subject: Any, overflown: str | None) -> None:
        if overflown is None:
            self._scorer.run(cell.key, subject)
        else:
            self._scorer.fail(cell.key, f"the average of {overflown} does not fit its dtype")

    def _located(self, checkpoint: Checkpoint, layout: int) -> Any:
        """Return what makes the error of a number that is not finite; None if they are allowed."""
        if self._plan.options.allow_nonfinite:
            return None

        def error(decision: Decision, index: tuple[int, ...], value: Any) -> NonFiniteError:
            name = decision.sources[layout].name
            return NonFiniteError(
                f"{checkpoint.path}: {name}[{', '.join(map(str, index))}] is {value}; "
                "allow_nonfinite=True (--allow-nonfinite) lets such values through",
                path=checkpoint.path,
                tensor=name,
                index=index,
            )

        return error
