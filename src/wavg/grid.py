"""The averages that one call asks for: their weights, how many inputs each takes, their paths."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wavg import weights as schedules
from wavg.errors import OutputError, WeightError
from wavg.formats import format_of_output, is_folder_output
from wavg.inputs import PathLike, expand, read_steps

__all__ = ["Grid", "select"]

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

    def outputs(self, output: PathLike | None, inputs: Sequence[str]) -> list[str]:
        """Return the averages' paths; none for arrays."""
        count = len(inputs)
        if output is None:
            return []
        template = os.fspath(output)
        unknown = (
            set(re.findall(r"\{\w*\}", os.path.basename(template.rstrip("/")))) - _PLACEHOLDERS
        )
        if unknown:
            raise OutputError(
                f"{template}: {min(unknown)} stands for nothing in an output's name; "
                "{weights} and {last} do",
                path=template,
            )
        paths = []
        for rule, number in self.cells(count):
            text = str(rule).replace(":", "-").replace("/", "-")
            path = template.replace("{weights}", text).replace("{last}", str(number))
            if not is_folder_output(path, inputs[-1]):
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


def select(
    inputs: PathLike | Iterable[PathLike],
    steps: Sequence[float] | None,
    grid: Grid,
    sort: bool | None,
    output: PathLike | None,
) -> tuple[list[str], tuple[float, ...]]:
    """Return the paths that any average takes and their steps, oldest first."""
    paths = expand(inputs, sort=sort, output=None if output is None else os.fspath(output))
    if steps is not None and len(steps) != len(paths):
        raise WeightError(f"{len(steps)} steps were given for {len(paths)} checkpoints")
    numbers = read_steps(paths) if steps is None else schedules.check_steps(steps)
    lasts = [len(paths) if last is None else last for last in grid.lasts]
    for last in lasts:
        if not 1 <= last <= len(paths):
            raise WeightError(
                f"last must be between 1 and {len(paths)}, the number of checkpoints, not {last}"
            )
    return paths[-max(lasts) :], numbers[-max(lasts) :]
