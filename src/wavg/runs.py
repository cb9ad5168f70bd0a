"""Runs: neighbouring tensors that are read and averaged as one, so that small ones cost little."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from wavg.checkpoint import TensorSpec
from wavg.plan import Decision

__all__ = ["Run", "make_runs"]


class Run(NamedTuple):
    """Neighbouring tensors to average that every input stores in one piece; read as one.

    Attributes
    ----------
    decisions, starts
        The tensors, and where each begins in the run, in elements.
    sources
        In every input, one long tensor.
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
    chosen = [d for d in decisions if d.action == "average" and d.spec.size]
    placed = sorted((d for d in chosen if d.spec.extent), key=operator.attrgetter("spec.extent"))
    group: list[Decision] = []
    for decision in itertools.chain(placed, (d for d in chosen if d.spec.extent is None)):
        if group and not _adjoins(group[-1], decision):
            yield _join(group)
            group = []
        group.append(decision)
    if group:
        yield _join(group)


def _adjoins(a: Decision, b: Decision) -> bool:
    if a.spec.dtype != b.spec.dtype or a.output.dtype != b.output.dtype:
        return False
    if not _side_by_side(a.spec, b.spec):  # the last of the sources
        return False
    if _is_one(a.sources) and _is_one(b.sources):  # one layout for all inputs
        return True
    return all(map(_side_by_side, a.sources, b.sources))


def _side_by_side(left: TensorSpec, right: TensorSpec) -> bool:
    if left.extent is None or right.extent is None:
        return False
    file, offset, length = left.extent
    return right.extent.file == file and right.extent.offset == offset + length


def _is_one(sources: Sequence[TensorSpec]) -> bool:
    """Whether all inputs share one index; the ends tell most that do not."""
    first = sources[0]
    return first is sources[-1] and sources.count(first) == len(sources)


def _join(group: Sequence[Decision]) -> Run:
    starts = tuple(itertools.accumulate((d.spec.size for d in group[:-1]), initial=0))
    size = starts[-1] + group[-1].spec.size
    if len(group) == 1:
        return Run(tuple(group), starts, group[0].sources, size)
    sources = []
    for first in group[0].sources:
        assert first.extent is not None  # only extents adjoin
        extent = first.extent._replace(length=size * first.entry.itemsize)
        sources.append(first._replace(shape=(size,), extent=extent, fortran=False))
    return Run(tuple(group), starts, tuple(sources), size)
