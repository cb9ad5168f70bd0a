"""The averages that one call asks for: their weights, how many inputs each takes, their paths."""

from __future__ import annotations

import itertools
import operator
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from wavg import weights as schedules
from wavg.destinations import bare, refuse_device
from wavg.errors import OutputError, WeightError
from wavg.formats import format_of_output, is_folder_output
from wavg.inputs import PathLike, expand
from wavg.names import named_steps, read_steps
from wavg.recorded import Open, own_steps, recorded_steps, recorded_weights

__all__ = ["Grid", "Open", "Selection", "in_time", "newest", "select", "weigh"]

_PLACEHOLDERS = {"{weights}", "{last}"}


@dataclass(frozen=True, slots=True)
class Grid:
    """The averages that one call makes: every schedule with every number of newest inputs."""

    rules: tuple[schedules.Schedule, ...]
    lasts: tuple[int | None, ...]
    many: bool

    @classmethod
    def of(
        cls,
        weights: schedules.WeightsLike | Sequence[schedules.WeightsLike],
        last: int | Sequence[int] | None,
    ) -> Grid:
        """Read the arguments of `wavg.average_checkpoints`; a list of either makes it many."""
        many = isinstance(last, Iterable) and np.ndim(last) > 0
        given: tuple[Any, ...] = tuple(last) if isinstance(last, Iterable) and many else (last,)
        try:
            lasts = tuple(None if n is None else operator.index(n) for n in given)
        except TypeError:
            raise WeightError(f"last must be a whole number, not {last!r}") from None
        if schedules.is_several(weights):
            rules, many = tuple(map(schedules.resolve, weights)), True
        else:
            rules = (schedules.resolve(weights),)
        if not rules or not lasts:
            raise WeightError("weights or last is an empty list: there is no average to make")
        return cls(rules, lasts, many)

    def cells(self, count: int) -> list[tuple[schedules.Schedule, int]]:
        """Return the averages of so many inputs, each as a schedule and the inputs it takes."""
        return [(rule, last or count) for rule in self.rules for last in self.lasts]

    def outputs(self, output: PathLike | None, selection: Selection) -> list[str]:
        """Return the averages' paths; none for arrays."""
        count, newest = selection.count, selection.paths[-1]
        if output is None:
            return []
        template = os.fspath(output)
        unknown = set(re.findall(r"\{\w*\}", os.path.basename(bare(template)))) - _PLACEHOLDERS
        if unknown:
            raise OutputError(
                f"{template}: {min(unknown)} stands for nothing in an output's name; "
                "{weights} and {last} do",
                path=template,
            )
        paths = []
        for rule, number in self.cells(count):
            text = re.sub(r"[:/\\]", "-", str(rule))  # would lead elsewhere
            path = template.replace("{weights}", text).replace("{last}", str(number))
            refuse_device(path)
            if not is_folder_output(path, newest):
                format_of_output(path)
            if path in paths:
                advice = "put {weights} and {last} into the output's name"
                asked = [(str(rule), number) for rule, number in self.cells(count)]
                if asked.count((str(rule), number)) > 1:
                    advice = "one of them is asked for twice"
                raise OutputError(
                    f"two of these averages would be written to {path}; {advice}", path=path
                )
            paths.append(path)
        return paths


@dataclass(frozen=True, slots=True)
class Selection:
    """What the averages of one call are made of.

    Attributes
    ----------
    paths, steps
        The checkpoints that have a weight in any of them, oldest first, and the newest.
    rows
        For each cell of the grid the weights of the newest of these.
    count
        How many checkpoints there were, those without a weight included.
    """

    paths: list[str]
    steps: tuple[float, ...]
    rows: list[schedules.F64]
    count: int


def select(
    inputs: PathLike | Iterable[PathLike],
    steps: Sequence[float] | None,
    grid: Grid,
    sort: bool | None,
    output: PathLike | None,
    open_: Open,
) -> Selection:
    """Return the checkpoints that any average needs, with their weights.

    One without a weight is not read at all, so that its values cannot matter; the newest stays, for
    outputs follow it.
    """
    paths = expand(inputs, sort=sort, output=None if output is None else os.fspath(output))
    paths, numbers = in_time(paths, steps, grid.rules, open_)
    most = max(_checked(last, len(paths)) for last in grid.lasts)
    paths, numbers = paths[-most:], numbers[-most:]
    rows = [weigh(rule, paths[-n:], numbers[-n:], open_) for rule, n in grid.cells(len(paths))]
    used = np.zeros(len(paths), np.bool_)
    used[-1] = True
    for row in rows:
        used[-len(row) :] |= row != 0
    return Selection(
        list(itertools.compress(paths, used)),
        tuple(itertools.compress(numbers, used)),
        [row[used[-len(row) :]] for row in rows],
        len(paths),
    )


def newest(
    inputs: PathLike | Iterable[PathLike],
    steps: Sequence[float] | None,
    rules: Sequence[schedules.Schedule],
    sort: bool | None,
    output: PathLike | None,
    last: int | None,
    open_: Open,
) -> tuple[list[str], tuple[float, ...]]:
    """Return the newest checkpoints, all by default, oldest first, and their steps."""
    paths = expand(inputs, sort=sort, output=None if output is None else os.fspath(output))
    paths, numbers = in_time(paths, steps, rules, open_)
    count = _checked(last, len(paths))
    return paths[-count:], numbers[-count:]


def _checked(last: int | None, count: int) -> int:
    if last is not None and not 1 <= last <= count:
        advice = f"; leave it away for all, or take lawa:last={last}, which takes what there is"
        raise WeightError(
            f"last (--last) must be between 1 and {count}, the number of checkpoints, not {last}"
            + advice * (last > count)
        )
    return last or count


def in_time(
    paths: list[str],
    steps: Sequence[float] | None,
    rules: Sequence[schedules.Schedule],
    open_: Open,
) -> tuple[list[str], tuple[float, ...]]:
    """Return paths, oldest first, with their steps: given, or told by names, or by metadata.

    Averages tracked side by side share steps; they are put in the order of these. Any numbers make
    such a series, so wavg's own records are believed before names.
    """
    if steps is not None and len(steps) != len(paths):
        raise WeightError(f"{len(steps)} steps were given for {len(paths)} checkpoints")
    if not any(rule.repeats for rule in rules):
        if steps is not None:
            return paths, schedules.check_steps(steps)
        return paths, read_steps(paths, lambda paths: recorded_steps(paths, open_))
    numbers = schedules.as_numbers(steps) if steps is not None else own_steps(paths, open_)
    numbers = numbers or named_steps(paths, repeats=True)
    numbers = numbers or recorded_steps(paths, open_, repeats=True)
    if numbers is None:
        raise WeightError("neither names nor metadata tell the inputs' steps; pass steps (--steps)")
    order = sorted(range(len(paths)), key=numbers.__getitem__)
    for rule in rules:
        schedules.check_steps([numbers[place] for place in order], repeats=rule.repeats)
    return [paths[place] for place in order], tuple(numbers[place] for place in order)


def weigh(
    rule: schedules.Schedule, paths: Sequence[str], steps: Sequence[float], open_: Open
) -> schedules.F64:
    """Return the weights of checkpoints by a schedule, which may ask what they are."""
    inputs = [schedules.Input(path, partial(recorded_weights, path, open_)) for path in paths]
    return rule(steps, inputs)
