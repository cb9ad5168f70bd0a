"""Numbers computed beside those of a file: which to look at, and a sink that compares.

It knows neither where the numbers come from nor what they are to be.
"""

from __future__ import annotations

import bisect
import itertools
import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wavg.checkpoint import Checkpoint, TensorSpec
from wavg.decisions import Decision

__all__ = ["Comparison", "Part", "sample"]

_BLOCK = 4096


class Part(NamedTuple):
    """A decision on a block of a tensor, as if that were one of its own; or on all of it."""

    decision: Decision
    name: str
    start: int


def sample(
    decisions: Sequence[Decision], made: Checkpoint, blocks: int, rng: random.Random
) -> list[Part]:
    """Return random blocks of tensors, at most so many."""
    counts = [_blocks_of(decision) for decision in decisions]
    ends = list(itertools.accumulate(counts))
    total = ends[-1] if ends else 0
    sampled = []
    for number in sorted(rng.sample(range(total), min(blocks, total))):
        place = bisect.bisect_right(ends, number)
        first = (number - (ends[place] - counts[place])) * _BLOCK
        sampled.append(_part(decisions[place], first, counts[place], made))
    return sampled


def _blocks_of(decision: Decision) -> int:
    whole = any(spec.extent is None or spec.entry.bits % 8 for spec in decision.sources)
    return 1 if whole else -(-decision.spec.size // _BLOCK)


def _part(decision: Decision, start: int, count: int, made: Checkpoint) -> Part:
    stop = min(start + _BLOCK, decision.spec.size)
    name = f"{decision.spec.name}[{start}:{stop}]"
    if count == 1 or name in made:
        return Part(decision, decision.spec.name, 0)

    def cut(spec: TensorSpec) -> TensorSpec:
        extent, size = spec.extent, spec.entry.itemsize
        if extent is not None:
            offset = extent.offset + start * size
            extent = extent._replace(offset=offset, length=(stop - start) * size)
        return spec._replace(name=name, shape=(stop - start,), extent=extent)

    block = decision._replace(
        spec=cut(decision.spec),
        sources=tuple(map(cut, decision.sources)),
        output=decision.output._replace(name=name, shape=(stop - start,), extent=None),
    )
    return Part(block, decision.spec.name, start)


class Comparison:
    """A sink that compares results with what a file has in their places."""

    def __init__(self, made: Checkpoint, parts: Iterable[Part]) -> None:
        self._made = made
        self._places = {
            part.decision.spec.name: (made.spec(part.name), part.start) for part in parts
        }
        self._wrong: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()  # threads write, also parts of one tensor

    def wants(self, name: str) -> bool:
        """Do as `wavg.checkpoint.Sink.wants` says."""
        return name in self._places

    def joined(self, names: Sequence[str]) -> bool:
        """Do as `wavg.checkpoint.Sink.joined` says."""
        return len(names) == 1

    def write(self, name: str, start: int, values: npt.NDArray[Any]) -> None:
        """Compare in place of writing."""
        spec, first = self._places[name]
        there = np.empty_like(values)
        self._made.read(spec, first + start, there)
        if values.tobytes() == there.tobytes():
            return
        size = values.itemsize
        rows = [array.view(np.uint8).reshape(-1, size) for array in (values, there)]
        wrong = np.flatnonzero((rows[0] != rows[1]).any(axis=1))
        place = first + start + int(wrong[0])
        with self._lock:
            count, before = self._wrong.get(spec.name, (0, place))
            self._wrong[spec.name] = count + len(wrong), min(before, place)

    def faults(self) -> Iterator[str]:
        """Tell what differs, tensor by tensor."""
        for name, (count, first) in sorted(self._wrong.items()):
            yield (
                f"{name}: {count:,} of the numbers compared differ{'s' * (count == 1)} from the "
                f"average, the first at position {first:,}"
            )
