"""The averages that a stream of models is taken into: for each schedule, a sum for each leaf."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from wavg.blocks import Scratch, blocks, largest, refuse_nonfinite
from wavg.errors import NonFiniteError, WeightError
from wavg.structure import AHEAD, Leaf, Moment, Structure
from wavg.sums import RunningSum
from wavg.weights import Schedule

__all__ = ["PRECISIONS", "Tracks"]

Array = npt.NDArray[Any]
Total: TypeAlias = "Fraction | float"

PRECISIONS = ("float64", "float32")
_MODEST = 2.0**800  # weights up to here cannot make a sum of float32 numbers exceed float64
_LARGEST = 2.0**1000  # of the sum of weights


class _Change(NamedTuple):
    """What the next model does to the sums of one schedule."""

    keep: float
    add: float
    total: Total


class Tracks:
    """The sums of models under several schedules, each model read once for all of them.

    Parameters
    ----------
    rules
        Schedules that stream.
    precision
        Of the sums.
    allow_nonfinite
        Let NaN and infinities into the sums.
    """

    ahead = AHEAD

    def __init__(self, rules: Sequence[Schedule], precision: str, allow_nonfinite: bool) -> None:
        for rule in rules:
            if rule.update is None:
                raise WeightError(
                    f"weights {rule} need to know how many models will come, so they do not "
                    "stream; window=n averages the last n models by them"
                )
        self._rules, self._precision, self._finite = rules, precision, not allow_nonfinite
        self._exact = [precision == "float64" and _only_adds(rule) for rule in rules]
        self.totals: list[Total] = [Fraction(0)] * len(rules)
        self._sums: list[list[RunningSum]] = []  # by leaf, by schedule; none for integers
        self._newest: dict[int, Array] = {}
        self._scratch = Scratch()
        self.torn = False  # an update has begun, and whoever asked for it has not yet noted it

    def update(self, structure: Structure, arrays: Sequence[Array], moment: Moment) -> None:
        """Take in the model of a moment; `torn` until the caller has noted the moment.

        Raises
        ------
        NonFiniteError, WeightError
            Nothing has changed then.
        """
        changes = [
            self._change(rule, exact, total, moment)
            for rule, exact, total in zip(self._rules, self._exact, self.totals, strict=True)
        ]
        if self._finite:
            refuse_nonfinite(structure.leaves, arrays, self._scratch)
            for number, (leaf, array) in enumerate(zip(structure.leaves, arrays, strict=True)):
                self._refuse_overflow(number, leaf, array, changes)
        if not self._sums:
            self.begin(structure)
        self.torn = True
        with np.errstate(all="ignore"):  # of infinity and NaN, where they are allowed
            for number, (array, sums) in enumerate(zip(arrays, self._sums, strict=True)):
                if not sums:
                    np.copyto(self._newest[number], array)
                    continue
                for change, running in zip(changes, sums, strict=True):
                    if change.keep == 0.0 and moment.position > 1:
                        running.forget()
                for start, block in blocks(array):
                    for change, running in zip(changes, sums, strict=True):
                        self._take(running, start, block, change)
        self.totals = [change.total for change in changes]

    def _take(self, running: RunningSum, start: int, block: Array, change: _Change) -> None:
        keep, add, total = change
        if keep == 0.0:
            keep = 1.0  # of nothing
        if isinstance(total, float):
            running.scale(start, block, keep, add, self._scratch)
        elif add:
            running.add(start, block, add, self._scratch, finite=self._finite)

    def _change(self, rule: Schedule, exact: bool, total: Total, moment: Moment) -> _Change:
        assert rule.update is not None
        if moment.position == 1:
            rule([moment.step])  # refuses a step that it cannot begin with
        keep, add = map(float, rule.update(*moment[:3]))
        if moment.position == 1:
            keep = 0.0  # of nothing; what the schedule says of it does not matter
        if not (math.isfinite(keep) and math.isfinite(add)):
            raise WeightError(f"weights {rule} say {keep} and {add} at step {moment.step:g}")
        after: Total
        if keep == 0.0:
            after = Fraction(add) if exact else add
        elif keep == 1.0 and isinstance(total, Fraction):
            after = total + Fraction(add)
        else:
            after = keep * float(total) + add
        if not -_LARGEST < after < _LARGEST:
            raise WeightError(f"the weights {rule} exceed float64 at step {moment.step:g}")
        return _Change(keep, add, after)

    def _refuse_overflow(
        self, number: int, leaf: Leaf, array: Array, changes: Sequence[_Change]
    ) -> None:
        risky = leaf.format.component.bits == 64 or self._precision == "float32"
        risky = risky or any(abs(float(change.total)) > _MODEST for change in changes)
        if not risky or not leaf.format.averaged:
            return
        limit = float(np.finfo(self._precision).max)
        highest = max((largest(block, self._scratch) for _, block in blocks(array)), default=0.0)
        for index, change in enumerate(changes):
            held = 0.0
            if self._sums and change.keep:
                held = self._sums[number][index].largest(self._scratch)
            if not abs(change.keep) * held + abs(change.add) * highest <= limit:
                raise NonFiniteError(
                    f"the sum for {leaf.path} exceeds {self._precision}", tensor=leaf.path
                )

    def begin(self, structure: Structure) -> None:
        """Make the sums of models of a structure, all zero."""
        newest, every = {}, []
        for number, leaf in enumerate(structure.leaves):
            sums = []
            if leaf.format.averaged:
                sums = [
                    RunningSum(leaf.numbers, leaf.format.component, self._precision, exact=exact)
                    for exact in self._exact
                ]
            else:
                newest[number] = np.zeros(leaf.shape, leaf.format.numpy)
            every.append(sums)
        self._newest, self._sums = newest, every  # all or none: memory may run out before

    def results(self, structure: Structure, which: Sequence[int]) -> Iterator[list[Array]]:
        """Yield the average by each of some schedules, as new arrays.

        Raises
        ------
        WeightError
            The weights so far sum to zero.
        NonFiniteError
            An average does not fit its dtype.
        """
        for index in which:
            rule, total = self._rules[index], self.totals[index]
            if not total:
                raise WeightError(f"the weights {rule} of the models so far sum to zero")
            yield [
                self._mean(leaf, sums[index], total) if sums else self._newest[number].copy()
                for number, (leaf, sums) in enumerate(
                    zip(structure.leaves, self._sums, strict=True)
                )
            ]

    def _mean(self, leaf: Leaf, running: RunningSum, total: Total) -> Array:
        mean = running.mean(total, leaf.format.component)
        if self._finite and not all(np.isfinite(block).all() for _, block in blocks(mean)):
            raise NonFiniteError(
                f"the average of {leaf.path} does not fit {leaf.format.name}", tensor=leaf.path
            )
        return leaf.array(mean)

    def pack(self, names: Sequence[str]) -> dict[str, Array]:
        """Return all numbers as named arrays; nothing is copied."""
        packed = {f"newest/{names[number]}": array for number, array in self._newest.items()}
        for name, sums in zip(names, self._sums, strict=True):
            for index, running in enumerate(sums):
                for depth, level in enumerate(running.levels):
                    packed[f"sum{index}.{depth}/{name}"] = level
                places, values = running.rest.arrays()
                if len(places):
                    packed[f"places{index}/{name}"], packed[f"values{index}/{name}"] = (
                        places,
                        values,
                    )
        return packed

    def unpack(
        self, structure: Structure, totals: Sequence[Total], packed: dict[str, Array]
    ) -> None:
        """Take up what `pack` returned; whatever is left in `packed` does not belong there."""
        if len(totals) != len(self._rules):
            raise ValueError(f"{len(totals)} totals of {len(self._rules)} schedules")
        names = structure.names()
        for leaf, name in zip(structure.leaves, names, strict=True):
            for index in range(len(totals)) if leaf.format.averaged else ():
                if packed[f"sum{index}.0/{name}"].shape != (leaf.numbers,):
                    raise ValueError(f"sum{index}.0/{name} is not of {leaf}")
            if not leaf.format.averaged and packed[f"newest/{name}"].shape != leaf.shape:
                raise ValueError(f"newest/{name} is not {leaf}")
        self.begin(structure)  # as large as what was read, whatever the table of leaves says
        self.totals = list(totals)
        for number, name in enumerate(names):
            if number in self._newest:
                _fill(self._newest[number], packed.pop(f"newest/{name}"))
            for index, running in enumerate(self._sums[number]):
                depth = 0
                while (level := packed.pop(f"sum{index}.{depth}/{name}", None)) is not None:
                    if depth == len(running.levels):
                        running.levels.append(np.empty_like(running.levels[0]))
                    _fill(running.levels[depth], level)
                    depth += 1
                if depth < len(running.levels):
                    raise KeyError(f"sum{index}.{depth}/{name}")
                if (places := packed.pop(f"places{index}/{name}", None)) is not None:
                    size = len(running.levels[0])
                    if places.dtype != np.int64 or not ((places >= 0) & (places < size)).all():
                        raise ValueError(f"places{index}/{name} has places beyond its {size}")
                    running.rest.fill(places, packed.pop(f"values{index}/{name}"))


def _fill(array: Array, values: Array) -> None:
    if (array.shape, array.dtype) != (values.shape, values.dtype):
        raise ValueError(f"expected {array.dtype}{list(array.shape)}")
    np.copyto(array, values)


def _only_adds(rule: Schedule) -> bool:
    """Whether the sum will only be added to: asked of a second model, for any may tell."""
    assert rule.update is not None
    return rule.update(2, 2.0, 1.0)[0] == 1.0
