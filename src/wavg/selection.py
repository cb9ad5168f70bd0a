"""Checkpoints chosen by recorded metrics: nothing is evaluated.

It reads the tables that training leaves (JSON, CSV) and finds each checkpoint's row, by name or by
step; what cannot be told apart is asked, not guessed.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wavg.errors import WavgError
from wavg.evaluation import direction_of
from wavg.formats import ending_of, open_file
from wavg.grid import newest
from wavg.inputs import PathLike
from wavg.places import look

__all__ = ["best_checkpoints", "metrics_of"]

_NAMES = ("name", "path", "file", "filename", "checkpoint")
_COUNTS = ("step", "global_step", "epoch")


def best_checkpoints(
    inputs: PathLike | Iterable[PathLike],
    metrics: PathLike | Mapping[str, float],
    *,
    best: int,
    maximize: bool,
    metric: str | None = None,
    first_epoch: int | None = None,
    steps: Sequence[float] | None = None,
    sort: bool | None = None,
) -> list[str]:
    r"""Choose the checkpoints whose recorded metric is best, in training order.

    Parameters
    ----------
    inputs
        Checkpoints, as for `average_checkpoints`.
    metrics
        A ``.json`` file: ``{name: number}``, or a list of objects with the metric and a ``name``,
        ``path``, ``step`` or ``epoch``, also as a ``log_history`` (Hugging Face's
        ``trainer_state.json``) or a line each (``.jsonl``). A ``.csv`` or ``.tsv`` file with such
        columns, as Keras' ``CSVLogger`` writes it. Or a dict from names to numbers. Of several rows
        for one checkpoint the last that has a number counts.
    best
        How many to choose; of equal ones the newer.
    maximize
        Whether a higher metric is better.
    metric
        The column, where there are several.
    first_epoch
        What the checkpoints' names call the first epoch of a table that counts from 0: Keras'
        callbacks write epoch 0 to the table and 1 into the name. Found out where only one fits.
    steps
        The checkpoints' steps, by default those in their names.
    sort
        As for `average_checkpoints`.

    Returns
    -------
    paths
        Oldest first.

    Raises
    ------
    WavgError
        The table cannot be understood, or has no metric for so many checkpoints.

    Examples
    --------
    >>> import os, tempfile, wavg
    >>> folder = tempfile.mkdtemp()
    >>> for epoch in (1, 2, 3):
    ...     wavg.save(f"{folder}/model_{epoch}.npz", {"w": [float(epoch)]})
    >>> with open(f"{folder}/log.csv", "w") as file:
    ...     _ = file.write("epoch,val_loss\n0,0.5\n1,0.4\n2,0.3\n")
    >>> paths = wavg.best_checkpoints(
    ...     f"{folder}/*.npz", f"{folder}/log.csv", best=2, maximize=False)
    >>> [os.path.basename(path) for path in paths]
    ['model_2.npz', 'model_3.npz']
    """
    maximize = direction_of(maximize)
    paths, numbers = newest(inputs, steps, (), sort, None, None, open_file)
    found = metrics_of(paths, numbers, metrics, metric, first_epoch)
    if not 1 <= best <= len(found):
        raise WavgError(
            f"cannot choose the best {best}: of {len(paths)} checkpoints {len(found)} have a "
            "recorded metric"
        )
    sign = -1.0 if maximize else 1.0
    order = sorted(found, key=lambda position: (sign * found[position], -position))
    return [paths[position] for position in sorted(order[:best])]


def metrics_of(
    paths: Sequence[str],
    steps: Sequence[float],
    metrics: PathLike | Mapping[str, float],
    metric: str | None,
    first_epoch: int | None,
) -> dict[int, float]:
    """Return the recorded metrics of checkpoints by their positions; see `best_checkpoints`."""
    if isinstance(metrics, Mapping):
        source, rows = "the metrics", _of_names(metrics)
    else:
        source = os.fspath(metrics)
        rows = [{_label(key): v for key, v in row.items()} for row in _rows(source)]
    column = _column(source, rows, metric)
    valued = [(row, value) for row in rows if (value := _number(row.get(column))) is not None]
    for label in (*_NAMES, *_COUNTS):
        labelled = [(row[label], value) for row, value in valued if _given(row.get(label))]
        if not labelled:
            continue
        if label in _NAMES:
            found = _by_name(paths, labelled)
        else:
            counted = {n: v for text, v in labelled if (n := _number(text)) is not None}
            counts = {n for row in rows if (n := _number(row.get(label))) is not None}
            first = _first(source, steps, counts, first_epoch) if label == "epoch" else 0
            found = {
                position: counted[step - first]
                for position, step in enumerate(steps)
                if step - first in counted
            }
        if found:
            return found
    raise WavgError(
        f"{source}: no row with a number in {column!r} belongs to any of the checkpoints, such as "
        f"{paths[-1]} of step {steps[-1]:g}; rows are found by a column of "
        f"{', '.join((*_NAMES, *_COUNTS))}"
    )


def _of_names(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "metric": value} for name, value in metrics.items()]


def _label(key: Any) -> str:
    """Return a column's name; those that rows are found by are known however they are written."""
    name = str(key).strip()
    folded = name.casefold()
    return folded if folded in (*_NAMES, *_COUNTS) else name


def _rows(path: str) -> list[dict[str, Any]]:
    """Read a table."""
    look(path)  # which tells a name that no file can have
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise WavgError(f"{path} is not UTF-8: {error.reason}; save it so", path=path) from None
    lines = text.splitlines()
    ending = os.path.splitext(path)[1].lower()
    if ending in (".csv", ".tsv"):
        delimiter = max(",;\t", key=lines[0].count) if lines else ","
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    try:
        content = (
            [json.loads(line) for line in lines if line.strip()]
            if ending == ".jsonl"
            else json.loads(text)
        )
    except ValueError as error:
        raise WavgError(
            f"{path} is no JSON: {error}; a CSV file's name ends with .csv, one of JSON lines "
            "with .jsonl",
            path=path,
        ) from None
    if isinstance(content, dict) and isinstance(content.get("log_history"), list):
        content = content["log_history"]
    if isinstance(content, dict) and content:
        if all(isinstance(value, dict) for value in content.values()):
            return [{"name": name, **value} for name, value in content.items()]
        if not any(isinstance(value, (dict, list)) for value in content.values()):
            return _of_names(content)
    if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
        return content
    raise WavgError(
        f"{path}: expected an object {{name: number}}, or a list of objects with the metric and a "
        "name, path, step or epoch",
        path=path,
    )


def _column(source: str, rows: Sequence[Mapping[str, Any]], metric: str | None) -> str:
    """Return the column of the metric."""
    columns = dict.fromkeys(key for row in rows for key in row)
    labels = {*_NAMES, *_COUNTS}
    numeric = [
        key
        for key in columns
        if key not in labels and any(_number(row.get(key)) is not None for row in rows)
    ]
    if metric is not None:
        if metric not in numeric:
            raise WavgError(
                f"{source} has no numbers in a column {metric!r}; there are "
                f"{', '.join(numeric) or 'none'}"
            )
        return metric
    if len(numeric) != 1:
        raise WavgError(
            f"{source} has {', '.join(numeric)}; say which with metric (--metric)"
            if numeric
            else f"{source} has no column of numbers to choose by"
        )
    return numeric[0]


def _number(value: Any) -> float | None:
    """Return a finite number, or None for what is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _given(value: Any) -> bool:
    return value is not None and value != ""


def _by_name(paths: Sequence[str], labelled: Iterable[tuple[Any, float]]) -> dict[int, float]:
    names: dict[str, set[int]] = {}
    for position, path in enumerate(paths):
        base, folder = os.path.basename(path), os.path.basename(os.path.dirname(path))
        ending = ending_of(path)
        for name in {path, os.path.realpath(path), base, base[: len(base) - len(ending)], folder}:
            names.setdefault(name, set()).add(position)
    found = {}
    for label, value in labelled:
        matching = names.get(str(label)) or names.get(os.path.realpath(str(label))) or set()
        if len(matching) == 1:  # a folder of many checkpoints names none of them
            found[next(iter(matching))] = value
    return found


def _first(source: str, steps: Sequence[float], counts: set[float], given: int | None) -> int:
    """Return what checkpoints' names call the first epoch of a table, if that counts from 0."""
    if 0.0 not in counts:
        return 0
    if given is not None:
        return given
    fitting = [shift for shift in (0, 1) if all(step - shift in counts for step in steps)]
    if len(fitting) != 1:
        raise WavgError(
            f"{source} counts epochs from 0, and the checkpoints' names "
            f"({steps[0]:g} … {steps[-1]:g}) might count from 0 or from 1: say what "
            "they call the first epoch with first_epoch (--first-epoch)"
        )
    return fitting[0]
