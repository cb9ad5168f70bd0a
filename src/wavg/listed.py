"""Weights listed in a file: numbers in order, or one for each name.

It owns the two layouts, JSON and CSV, and how a name finds its checkpoint.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from wavg.errors import WeightError
from wavg.places import look
from wavg.rules import explicit
from wavg.schedule import F64, Input, Schedule, spell_number

__all__ = ["ENDINGS", "named", "of_mapping", "read"]

ENDINGS = (".json", ".csv")


def read(path: str) -> Schedule:
    """Return the schedule that a file lists.

    JSON is a list of numbers, oldest checkpoint first, or an object from names to numbers, or what
    ``wavg weights --json`` prints of one schedule. CSV has in each row a number, or a name and a
    number; a first row without a number is a heading. See `named` for what a name is.

    Raises
    ------
    WeightError
        The file lists something else.
    FileNotFoundError
        There is no such file.
    """
    look(path)  # which tells a name that no file can have
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            is_json = path.lower().endswith(".json")
            content = json.load(file, object_pairs_hook=_once) if is_json else _rows(file)
        except (ValueError, csv.Error, RecursionError) as error:
            raise WeightError(f"{path}: cannot be read as weights: {error}", path=path) from None
    if isinstance(content, Mapping) and isinstance(content.get("coefficients"), list):
        content = content["coefficients"]
    if isinstance(content, Mapping):
        if content and all(_is_number(value) for value in content.values()):
            # A published model names the file, and not where it was.
            return named(content, os.path.basename(path), where=path)
    elif isinstance(content, list) and content and all(map(_is_number, content)):
        return _in_order(content, path)
    raise WeightError(
        f"{path}: expected a list of numbers, one a checkpoint, oldest first, or a number for each "
        "name",
        path=path,
    )


def _in_order(numbers: Sequence[float], path: str) -> Schedule:
    with _naming(path):
        schedule = explicit(numbers)

    def coefficients(steps: F64) -> F64:
        with _naming(path):
            return schedule(steps)

    return Schedule(schedule.text, coefficients, count=schedule.count)


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Put in front of an error where the weights come from."""
    try:
        yield
    except WeightError as error:
        raise WeightError(f"{where}: {error}") from None


def _once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Make an object of JSON; a name given twice would lose one of its numbers."""
    found = dict[str, object]()
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is listed twice")
        found[name] = value
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rows(lines: Iterable[str]) -> list[float] | dict[str, float]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
    rows = [row for row in rows if any(row)]
    if rows and not _number(rows[0][-1]):
        rows = rows[1:]
    if all(len(row) == 1 for row in rows):
        return [float(row[0]) for row in rows]
    found: dict[str, float] = {}
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"{','.join(row)!r} is not a name and a number")
        if row[0] in found:
            raise ValueError(f"{row[0]!r} is listed twice")
        found[row[0]] = float(row[1])
    return found


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def named(weights: Mapping[str, float], text: str, *, where: str | None = None) -> Schedule:
    """Give the checkpoint of each name its weight.

    A name is the checkpoint's file name, with or without the ending, or its folder's, if no other
    is in it, or its step. Every checkpoint has to have one, and every name a checkpoint. Errors say
    `where` the names are, or the text.

    >>> named({"100": 0.25, "200": 0.75}, "weights.json")([100, 200])
    array([0.25, 0.75])
    """
    origin = where or text

    def of_inputs(steps: F64, inputs: Sequence[Input]) -> F64:
        return _match(weights, origin, steps, [each.path for each in inputs])

    return Schedule(text, lambda steps: _match(weights, origin, steps, None), of_inputs=of_inputs)


def of_mapping(weights: Mapping[str, float]) -> Schedule:
    """Return the schedule of names and weights; its text has all of them.

    >>> str(of_mapping({"m_1": 0.25, "m_2": 0.75}))
    'm_1=0.25,m_2=0.75'
    """
    if not weights or not all(isinstance(name, str) for name in weights):
        raise WeightError(
            "weights by name must be a number for each name, such as {'model_490': 0.2, ...}, not "
            f"{weights!r}"
        )
    numbers = explicit(list(weights.values())).coefficients(np.zeros(len(weights))).tolist()
    text = ",".join(f"{name}={spell_number(x)}" for name, x in zip(weights, numbers, strict=True))
    return named(dict(zip(weights, numbers, strict=True)), text, where="the table of weights")


def _match(weights: Mapping[str, float], text: str, steps: F64, paths: Sequence[str] | None) -> F64:
    folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths or ()]
    values, used, without = [], set(), []
    for position, step in enumerate(steps.tolist()):
        names = {spell_number(step)}
        shown = f"step {spell_number(step)}"
        if paths is not None:
            shown = paths[position]
            base = os.path.basename(os.path.normpath(shown))
            names |= {base, os.path.splitext(base)[0]}
            if folders.count(folders[position]) == 1:
                names.add(folders[position])
        found = sorted(names & weights.keys())
        if not found:
            without.append(shown)
            continue
        if len(found) > 1 or found[0] in used:
            raise WeightError(
                f"{text}: {' and '.join(found)} would both be for {shown}"
                if len(found) > 1
                else f"{text}: {found[0]} is the name of several checkpoints; go by their steps"
            )
        used.add(found[0])
        values.append(weights[found[0]])
    unused = [name for name in weights if name not in used]
    if without or unused:
        parts = [
            f"{what}: {', '.join(names)}"
            for what, names in (("without a weight", without), ("names of no input", unused))
            if names
        ]
        raise WeightError(f"{text} does not match the checkpoints; {'; '.join(parts)}")
    with _naming(text):
        return explicit(values)(steps)
