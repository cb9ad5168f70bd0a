"""What a worker does with a chunk of tasks: read, combine, write; here or in another process.

A worker has the memory that the plan counts, and keeps it from block to block.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from wavg.blas import single_blas_thread
from wavg.checkpoint import Checkpoint, TensorSpec, reading
from wavg.combination import Combination
from wavg.dtypes import DType
from wavg.errors import NonFiniteError, StructureMismatchError
from wavg.kernel import Combiner, reads_files
from wavg.plan import Plan
from wavg.tasks import Average, Carry, Chunk

__all__ = ["Job", "Outcome"]

Array = npt.NDArray[Any]

Write = tuple[str, int, Array]  # the arguments of `Sink.write`


class Outcome(NamedTuple):
    """What came of a chunk.

    Attributes
    ----------
    bytes_read
        Of all inputs.
    differing
        Tensors that differ from the reference, each with an input's position.
    writes
        For each sink, what a worker of another process wants written to it.
    """

    bytes_read: int
    differing: list[tuple[str, int]]
    writes: tuple[list[Write], ...] = ()


class _Scratch:
    """The memory of one worker, kept from block to block."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)
        self.formats = ("", "")
        self.combiner: Combiner | None = None

    def take(self, size: int) -> Array:
        """Return so many bytes; what was taken before is given back."""
        if self._buffer.nbytes < size:
            self._buffer = np.empty(0, np.uint8)  # free before allocating
            self._buffer = np.empty(size, np.uint8)
        return self._buffer[:size]


class _Taker(Protocol):
    """What workers ask of a `Sink`; whether it is joined, their tasks say."""

    def wants(self, name: str) -> bool: ...

    def write(self, name: str, start: int, values: Array) -> None: ...


class Job:
    """What the workers share; called with one chunk after the other."""

    def __init__(
        self, plans: Sequence[Plan], checkpoints: Sequence[Checkpoint], sinks: Sequence[_Taker]
    ) -> None:
        self._plans, self._checkpoints, self._sinks = plans, checkpoints, sinks
        self._options, self._layouts = plans[0].options, plans[0].layouts
        matrix = np.zeros((len(plans), len(checkpoints)))
        for plan, row in zip(plans, matrix, strict=True):
            row[len(row) - len(plan.inputs) :] = plan.coefficients
        self._combination = Combination.of(matrix)
        # One a worker, whatever threads an executor lends: this is the memory that the plan counts.
        self._idle: queue.SimpleQueue[_Scratch] = queue.SimpleQueue()
        for _ in range(plans[0].workers):
            self._idle.put(_Scratch())
        self.stop = threading.Event()

    def __reduce__(self) -> tuple[Any, ...]:
        names = [decision.spec.name for decision in self._plans[0].decisions]
        wanted = [frozenset(filter(sink.wants, names)) for sink in self._sinks]
        opening = [checkpoint.__reduce__()[1] for checkpoint in self._checkpoints]
        return _Elsewhere, (self._plans, opening, wanted)

    def __call__(self, chunk: Chunk) -> Outcome:
        """Do a chunk; ends early once `stop` is set."""
        read = 0
        differing: list[tuple[str, int]] = []
        scratch = self._idle.get()
        try:
            for task in chunk:
                if self.stop.is_set():
                    break
                if isinstance(task, Average):
                    outcome = self._average(task, scratch)
                else:
                    outcome = self._carry(task, scratch)
                read += outcome.bytes_read
                differing += outcome.differing
        finally:
            self._idle.put(scratch)
        return Outcome(read, differing)

    def _combiner(self, source: DType, target: DType, scratch: _Scratch) -> Combiner:
        key = source.name, target.name
        if scratch.formats != key or scratch.combiner is None:
            scratch.combiner = None  # free before allocating
            allow = self._options.allow_nonfinite
            scratch.combiner = Combiner(self._combination, source, target, allow_nonfinite=allow)
            scratch.formats = key
        return scratch.combiner

    def _average(self, task: Average, scratch: _Scratch) -> Outcome:
        piece, count = task.run, task.stop - task.start
        entry, output = piece.sources[0].entry, piece.decisions[0].output.entry
        source, target = entry.component, output.component
        parts = entry.bits // source.bits  # 2 for complex numbers
        rows, results = len(self._checkpoints), len(self._sinks)
        in_place = all(spec.extent is not None for spec in piece.sources)
        reads = in_place and reads_files(source, target)
        read = rows * count * entry.itemsize
        taken = 0 if reads else _aligned(read)
        buffer = scratch.take(taken + results * count * output.itemsize)
        outs = _view(buffer[taken:], (results, count * parts), target.numpy)
        combiner = self._combiner(source, target, scratch)
        try:
            if reads:
                self._combine_from_files(combiner, task, outs)
            else:
                block = _view(buffer, (rows, count * parts), source.numpy)
                for checkpoint, layout, row in zip(
                    self._checkpoints, self._layouts, block, strict=True
                ):
                    checkpoint.read(piece.sources[layout], task.start, row.view(entry.numpy))
                combiner(block, outs)
        except NonFiniteError as error:
            raise self._located(error, task, parts) from None
        for sink, values in zip(self._sinks, outs.view(output.numpy), strict=True):
            if task.joined:
                sink.write(piece.decisions[0].spec.name, task.start, values)
                continue
            for decision, first, start, stop in piece.pieces(task.start, task.stop):
                part = values[start - task.start : stop - task.start]
                sink.write(decision.spec.name, first, part)
        return Outcome(read, [])

    def _combine_from_files(self, combiner: Combiner, task: Average, outs: Array) -> None:
        """Have the kernel read the rows from where they lie."""
        specs = [task.run.sources[layout] for layout in self._layouts]
        pairs = list(zip(self._checkpoints, specs, strict=True))
        places = [checkpoint.place(spec, task.start) for checkpoint, spec in pairs]
        descriptors, offsets = zip(*places, strict=True)
        try:
            combiner.from_files(np.array(descriptors, np.intc), np.array(offsets, np.int64), outs)
        except EOFError as error:
            checkpoint, spec = pairs[error.args[0]]
            raise checkpoint.ends_within(spec) from None
        except OSError as error:
            checkpoint, spec = pairs[error.filename]  # which input, in place of a name
            with reading(checkpoint.path_of(spec)):
                raise

    def _located(self, error: NonFiniteError, task: Average, parts: int) -> NonFiniteError:
        index = task.start + error.index // parts
        decision, first, _, _ = next(task.run.pieces(index, index + 1))
        spec = decision.spec
        place = np.unravel_index(first, spec.shape, order="F" if spec.fortran else "C")
        where = f"{spec.name}[{', '.join(map(str, place))}]"
        details = {"tensor": spec.name, "index": tuple(map(int, place))}
        if error.input is None:
            return NonFiniteError(
                f"the average at {where} does not fit {decision.output.dtype}; "
                "choose a wider one with dtype (--dtype)",
                **details,
            )
        path = self._checkpoints[error.input].path
        return NonFiniteError(
            f"{path}: {where} is {error.value}; "
            "allow_nonfinite=True (--allow-nonfinite) lets such values through",
            path=path,
            **details,
        )

    def _carry(self, task: Carry, scratch: _Scratch) -> Outcome:
        """Write the reference's numbers where they are wanted; compare the others with them."""
        spec = task.decision.spec
        reference = self._read(task, -1, 0, scratch)
        for sink in self._sinks:
            if sink.wants(spec.name):
                sink.write(spec.name, task.start, reference)
        if not task.decision.compare:
            return Outcome(reference.nbytes, [])
        differing = []
        for position, checkpoint in enumerate(self._checkpoints[:-1]):
            values = self._read(task, position, 1, scratch)
            if not np.array_equal(values.view(np.uint8), reference.view(np.uint8)):
                differing.append((spec.name, position))
                self._refuse_difference(spec, checkpoint.path)
        return Outcome(reference.nbytes * len(self._checkpoints), differing)

    def _read(self, task: Carry, which: int, half: int, scratch: _Scratch) -> Array:
        entry = task.decision.spec.entry
        dtype = np.dtype(np.uint8) if entry.bits % 8 else entry.numpy
        size = (task.stop - task.start) * dtype.itemsize
        values = scratch.take(2 * size)[half * size : (half + 1) * size].view(dtype)
        spec = task.decision.sources[self._layouts[which]]
        self._checkpoints[which].read(spec, task.start, values)
        return values

    def _refuse_difference(self, spec: TensorSpec, path: str) -> None:
        if spec.entry.kind == "code":
            advice = "exclude it to take the newest's"
        elif self._options.integers == "error":
            advice = "integers='reference' (--integers reference) takes the newest's"
        else:
            return
        raise StructureMismatchError(
            f"{spec.name} is {spec.dtype}, which is not averaged, and differs between {path} and "
            f"{self._checkpoints[-1].path}; {advice}",
            path=path,
            tensor=spec.name,
        )


class _Elsewhere:
    """The job as it arrives in another process: its results go home with the outcome."""

    def __init__(
        self,
        plans: Sequence[Plan],
        opening: Sequence[tuple[Any, ...]],
        wanted: Sequence[frozenset[str]],
    ) -> None:
        self._plans, self._opening, self._wanted = plans, opening, wanted

    def __call__(self, chunk: Chunk) -> Outcome:
        """Do a chunk with the inputs opened for it."""
        sinks = [_Parcel(names) for names in self._wanted]
        with contextlib.ExitStack() as stack:
            checkpoints = [stack.enter_context(Checkpoint(*parts)) for parts in self._opening]
            stack.enter_context(single_blas_thread())
            outcome = Job(self._plans, checkpoints, sinks)(chunk)
        return outcome._replace(writes=tuple(sink.writes for sink in sinks))


class _Parcel:
    """Keeps what is to be written elsewhere."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self.writes: list[Write] = []

    def wants(self, name: str) -> bool:
        return name in self._names

    def write(self, name: str, start: int, values: Array) -> None:
        self.writes.append((name, start, values.copy()))


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _view(buffer: Array, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    """View the start of a byte buffer as an array."""
    return buffer[: shape[0] * shape[1] * dtype.itemsize].view(dtype).reshape(shape)
