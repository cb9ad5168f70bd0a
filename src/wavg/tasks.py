"""What there is to do: parts of runs to be averaged, parts of tensors to be carried over.

They are plain data in an order that reads files forwards, in chunks that are worth a submission.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from wavg.checkpoint import Sink
from wavg.decisions import Decision
from wavg.plan import Plan
from wavg.runs import Run, make_runs

__all__ = ["Average", "Carry", "Chunk", "chunks_of", "ends_of"]

_CHUNK_BYTES = 32 << 20  # read for one submission to the executor: some milliseconds of work


class Average(NamedTuple):
    """A part of a run to be averaged; `joined` if sinks take the run in one piece, too."""

    run: Run
    start: int
    stop: int
    joined: bool


class Carry(NamedTuple):
    """A part of a tensor to be carried over, compared, or both."""

    decision: Decision
    start: int
    stop: int


Chunk = list[Average | Carry]


def chunks_of(plan: Plan, inputs: int, sinks: Sequence[Sink]) -> Iterator[Chunk]:
    """Group the work so that a submission is worth its cost, and neighbours stay together."""
    chunk: Chunk = []
    size = 0
    tasks: Iterator[Average | Carry] = itertools.chain(
        _averages(plan, sinks), _carries(plan, sinks)
    )
    for task in tasks:
        chunk.append(task)
        spec = task.run.sources[0] if isinstance(task, Average) else task.decision.spec
        size += (task.stop - task.start) * max(1, spec.entry.itemsize) * inputs
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def ends_of(chunk: Chunk, layouts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield, for every input of every task, its number, its file, and where in that it ends."""
    for task in chunk:
        sources = task.run.sources if isinstance(task, Average) else task.decision.sources
        for number, layout in enumerate(layouts):
            spec = sources[layout]
            if spec.extent is not None:
                file, offset, _ = spec.extent
                yield number, file, offset + task.stop * max(1, spec.entry.itemsize)


def _averages(plan: Plan, sinks: Sequence[Sink]) -> Iterator[Average]:
    for piece in make_runs(plan.decisions):
        names = [decision.spec.name for decision in piece.decisions]
        joined = all(sink.joined(names) for sink in sinks)
        for start in range(0, piece.size, plan.block):
            yield Average(piece, start, min(piece.size, start + plan.block), joined)


def _carries(plan: Plan, sinks: Sequence[Sink]) -> Iterator[Carry]:
    for decision in plan.carried:
        if decision.compare or any(sink.wants(decision.spec.name) for sink in sinks):
            # Sub-byte numbers are only ever moved and compared, as bytes.
            spec = decision.spec
            size = spec.nbytes if spec.entry.bits % 8 else spec.size
            for start in range(0, size, plan.block):
                yield Carry(decision, start, min(size, start + plan.block))
