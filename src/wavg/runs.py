"""Runs: neighbouring tensors that are read and averaged as one, so that small ones cost little."""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wavg.checkpoint import TensorSpec
from wavg.decisions import Decision
from wavg.extents import extent_table, in_order, side_by_side

__all__ = ["Run", "make_runs"]


class Run(NamedTuple):
    """Neighbouring tensors to average that every input stores in one piece; read as one.

    Attributes
    ----------
    decisions, starts
        The tensors, and where each begins in the run, in elements.
    sources
        In every layout of `wavg.plan.Plan.layouts`, one long tensor.
    size
        Elements in all.
    """

    decisions: tuple[Decision, ...]
    starts: tuple[int, ...]
    sources: tuple[TensorSpec, ...]
    size: int

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Decision, int, int, int]]:
        """Yield (tensor, its first element, first and end in the run) of a part of the run."""
        position = bisect.bisect_right(self.starts, start) - 1
        while start < stop:
            decision, begin = self.decisions[position], self.starts[position]
            end = min(stop, begin + decision.spec.size)
            yield decision, start - begin, start, end
            start, position = end, position + 1


def make_runs(decisions: Sequence[Decision]) -> Iterator[Run]:
    """Join the tensors to average where neighbours lie side by side in every input."""
    chosen = [d for d in decisions if d.action == "average" and 0 not in d.spec.shape]
    if not chosen:
        return
    table = extent_table([d.spec.extent for d in chosen])
    order = in_order(table)
    joined = side_by_side(table[order])
    for layout in range(1, len(chosen[0].sources)):  # the first is the reference's
        joined &= side_by_side(extent_table([d.sources[layout].extent for d in chosen])[order])
    chosen = [chosen[position] for position in order.tolist()]
    joined &= _equal_neighbours([d.spec.dtype for d in chosen])
    joined &= _equal_neighbours([d.output.dtype for d in chosen])
    bounds = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(chosen)]
    for first, end in itertools.pairwise(bounds):
        yield _join(chosen[first:end])


def _equal_neighbours(values: Sequence[str]) -> npt.NDArray[np.bool_]:
    if len(set(values)) == 1:  # mostly; and soon seen
        return np.ones(len(values) - 1, bool)
    return np.fromiter(map(operator.eq, values[1:], values), bool, len(values) - 1)


def _join(group: Sequence[Decision]) -> Run:
    *starts, size = itertools.accumulate((math.prod(d.spec.shape) for d in group), initial=0)
    sources = group[0].sources
    if len(group) > 1:  # then all lie somewhere
        sources = tuple(_lengthened(first, size) for first in sources)
    return Run(tuple(group), tuple(starts), sources, size)


def _lengthened(first: TensorSpec, size: int) -> TensorSpec:
    assert first.extent is not None  # only extents adjoin
    extent = first.extent._replace(length=size * first.entry.itemsize)
    return first._replace(shape=(size,), extent=extent, fortran=False)
