"""Executes a plan: read a block of every input, combine, round once, write.

It knows no format and no schedule. Memory is a few buffers a worker, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from wavg.blas import single_blas_thread
from wavg.checkpoint import Checkpoint, Sink, TensorSpec, reading
from wavg.combination import Combination
from wavg.decisions import Decision
from wavg.digests import Digests
from wavg.dtypes import DType
from wavg.errors import NonFiniteError, StructureMismatchError
from wavg.kernel import Combiner, reads_files
from wavg.plan import Plan
from wavg.runs import Run, make_runs

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

__all__ = ["run"]

Array = npt.NDArray[Any]

_CHUNK_BYTES = 32 << 20  # read for one submission to the executor: some milliseconds of work


def run(
    plans: Sequence[Plan],
    checkpoints: Sequence[Checkpoint],
    sinks: Sequence[Sink],
    *,
    digests: Digests | None = None,
    executor: Executor | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[tuple[str, ...]]:
    """Stream every block of every input once, and what the plans make of it into their sinks.

    Parameters
    ----------
    plans
        The averages to make of one pass, as `wavg.plan.make_plans` decides them together.
    checkpoints
        The open inputs, oldest first; each plan takes the newest of them.
    sinks
        For each plan, what takes its results.
    digests
        Of the checkpoints: they are kept ahead of the blocks, and not finished.
    executor
        Runs the plan's workers; threads of its own by default. What workers elsewhere (processes)
        make comes back with their outcome and is written here.
    progress
        Called with numbers of bytes read, as the work goes on.

    Returns
    -------
    names
        For each plan, the carried-over tensors whose values differ between its inputs.

    Raises
    ------
    NonFiniteError
        NaN or infinity in an input; names file, tensor and index.
    StructureMismatchError
        Integers differ, and the plan's policy is to refuse that.
    CheckpointFormatError
        The bytes of an input are not those of its checksum; it is raised before the others.
    """
    plan = plans[0]  # alike in all but their inputs and weights
    job = _Job(plans, checkpoints, sinks)
    newest: dict[str, int] = {}
    chunks = _chunks(plan, len(checkpoints), sinks)
    with contextlib.ExitStack() as stack:
        stack.enter_context(single_blas_thread())
        if digests:
            stack.enter_context(_damage_first(digests))
            chunks = _led(chunks, plan.layouts, digests)
        if executor is None:
            from concurrent.futures import ThreadPoolExecutor  # a tenth of `import wavg`

            executor = stack.enter_context(
                ThreadPoolExecutor(plan.workers, thread_name_prefix="wavg")
            )
        for outcome in _submit_all(executor, job, chunks, plan.workers):
            for sink, writes in zip(sinks, outcome.writes, strict=False):
                for write in writes:
                    sink.write(*write)
            for name, position in outcome.differing:
                newest[name] = max(position, newest.get(name, -1))
            if progress is not None:
                progress(outcome.bytes_read)
    firsts = [len(checkpoints) - len(plan.inputs) for plan in plans]
    names = [d.spec.name for d in plan.decisions if d.compare and d.spec.name in newest]
    return [tuple(name for name in names if newest[name] >= first) for first in firsts]


class _Average(NamedTuple):
    """A part of a run to be averaged; `joined` if sinks take the run in one piece, too."""

    run: Run
    start: int
    stop: int
    joined: bool


class _Carry(NamedTuple):
    """A part of a tensor to be carried over, compared, or both."""

    decision: Decision
    start: int
    stop: int


_Write = tuple[str, int, Array]  # the arguments of `Sink.write`


class _Outcome(NamedTuple):
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
    writes: tuple[list[_Write], ...] = ()


def _chunks(plan: Plan, inputs: int, sinks: Sequence[Sink]) -> Iterator[list[_Average | _Carry]]:
    """Group the work so that a submission is worth its cost, and neighbours stay together."""
    chunk: list[_Average | _Carry] = []
    size = 0
    tasks: Iterator[_Average | _Carry] = itertools.chain(
        _averages(plan, sinks), _carries(plan, sinks)
    )
    for task in tasks:
        chunk.append(task)
        spec = task.run.sources[0] if isinstance(task, _Average) else task.decision.spec
        size += (task.stop - task.start) * max(1, spec.entry.itemsize) * inputs
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _damage_first(digests: Digests) -> Iterator[None]:
    """Have damaged bytes told as that, and not by what the numbers look like."""
    try:
        yield
    except (NonFiniteError, StructureMismatchError):
        digests.judge()
        raise


def _led(
    chunks: Iterator[list[_Average | _Carry]], layouts: Sequence[int], digests: Digests
) -> Iterator[list[_Average | _Carry]]:
    """Let digests pass over every chunk before it is handed out."""
    for chunk in chunks:
        digests.reach(_ends(chunk, layouts))
        yield chunk


def _ends(
    chunk: Sequence[_Average | _Carry], layouts: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Yield, for every input of every task, its number, its file, and where in that it ends."""
    for task in chunk:
        sources = task.run.sources if isinstance(task, _Average) else task.decision.sources
        for number, layout in enumerate(layouts):
            spec = sources[layout]
            if spec.extent is not None:
                file, offset, _ = spec.extent
                yield number, file, offset + task.stop * max(1, spec.entry.itemsize)


def _averages(plan: Plan, sinks: Sequence[Sink]) -> Iterator[_Average]:
    for piece in make_runs(plan.decisions):
        names = [decision.spec.name for decision in piece.decisions]
        joined = all(sink.joined(names) for sink in sinks)
        for start in range(0, piece.size, plan.block):
            yield _Average(piece, start, min(piece.size, start + plan.block), joined)


def _carries(plan: Plan, sinks: Sequence[Sink]) -> Iterator[_Carry]:
    for decision in plan.carried:
        if decision.compare or any(sink.wants(decision.spec.name) for sink in sinks):
            # Sub-byte numbers are only ever moved and compared, as bytes.
            spec = decision.spec
            size = spec.nbytes if spec.entry.bits % 8 else spec.size
            for start in range(0, size, plan.block):
                yield _Carry(decision, start, min(size, start + plan.block))


def _submit_all(
    executor: Executor, job: _Job, chunks: Iterator[list[_Average | _Carry]], workers: int
) -> Iterator[_Outcome]:
    """Keep the workers busy; whatever goes wrong, return only when none is at work."""
    from concurrent.futures import FIRST_COMPLETED, wait

    pending: set[Future[_Outcome]] = set()
    try:
        while True:
            for chunk in itertools.islice(chunks, 2 * workers - len(pending)):
                pending.add(executor.submit(job, chunk))
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        job.stop.set()
        for future in pending:
            future.cancel()
        wait(pending)


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


class _Job:
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

    def __call__(self, chunk: Sequence[_Average | _Carry]) -> _Outcome:
        """Do a chunk; ends early once `stop` is set."""
        read = 0
        differing: list[tuple[str, int]] = []
        scratch = self._idle.get()
        try:
            for task in chunk:
                if self.stop.is_set():
                    break
                if isinstance(task, _Average):
                    outcome = self._average(task, scratch)
                else:
                    outcome = self._carry(task, scratch)
                read += outcome.bytes_read
                differing += outcome.differing
        finally:
            self._idle.put(scratch)
        return _Outcome(read, differing)

    def _combiner(self, source: DType, target: DType, scratch: _Scratch) -> Combiner:
        key = source.name, target.name
        if scratch.formats != key or scratch.combiner is None:
            scratch.combiner = None  # free before allocating
            allow = self._options.allow_nonfinite
            scratch.combiner = Combiner(self._combination, source, target, allow_nonfinite=allow)
            scratch.formats = key
        return scratch.combiner

    def _average(self, task: _Average, scratch: _Scratch) -> _Outcome:
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
        return _Outcome(read, [])

    def _combine_from_files(self, combiner: Combiner, task: _Average, outs: Array) -> None:
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

    def _located(self, error: NonFiniteError, task: _Average, parts: int) -> NonFiniteError:
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

    def _carry(self, task: _Carry, scratch: _Scratch) -> _Outcome:
        """Write the reference's numbers where they are wanted; compare the others with them."""
        spec = task.decision.spec
        reference = self._read(task, -1, 0, scratch)
        for sink in self._sinks:
            if sink.wants(spec.name):
                sink.write(spec.name, task.start, reference)
        if not task.decision.compare:
            return _Outcome(reference.nbytes, [])
        differing = []
        for position, checkpoint in enumerate(self._checkpoints[:-1]):
            values = self._read(task, position, 1, scratch)
            if not np.array_equal(values.view(np.uint8), reference.view(np.uint8)):
                differing.append((spec.name, position))
                self._refuse_difference(spec, checkpoint.path)
        return _Outcome(reference.nbytes * len(self._checkpoints), differing)

    def _read(self, task: _Carry, which: int, half: int, scratch: _Scratch) -> Array:
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

    def __call__(self, chunk: Sequence[_Average | _Carry]) -> _Outcome:
        """Do a chunk with the inputs opened for it."""
        sinks = [_Parcel(names) for names in self._wanted]
        with contextlib.ExitStack() as stack:
            checkpoints = [stack.enter_context(Checkpoint(*parts)) for parts in self._opening]
            stack.enter_context(single_blas_thread())
            outcome = _Job(self._plans, checkpoints, sinks)(chunk)
        return outcome._replace(writes=tuple(sink.writes for sink in sinks))


class _Parcel:
    """Keeps what is to be written elsewhere."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self.writes: list[_Write] = []

    def wants(self, name: str) -> bool:
        return name in self._names

    def write(self, name: str, start: int, values: Array) -> None:
        self.writes.append((name, start, values.copy()))


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _view(buffer: Array, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    """View the start of a byte buffer as an array."""
    return buffer[: shape[0] * shape[1] * dtype.itemsize].view(dtype).reshape(shape)
