"""Executes a plan: read a block of every input, combine, round once, write.

It knows no format and no schedule. Memory is a few buffers a worker, whatever the model's size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wavg.checkpoint import Checkpoint, Sink
from wavg.errors import NonFiniteError, StructureMismatchError
from wavg.kernel import Combination, combine
from wavg.plan import Decision, Plan

__all__ = ["run"]

Array = npt.NDArray[Any]


class _Task(NamedTuple):
    decision: Decision
    start: int
    stop: int


def run(
    plan: Plan,
    checkpoints: Sequence[Checkpoint],
    sink: Sink,
    *,
    executor: Executor | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Stream every block of the plan into the sink.

    Parameters
    ----------
    plan
        The decision.
    checkpoints
        The open inputs, oldest first.
    sink
        Takes the results.
    executor
        Runs the plan's workers; threads of its own by default.
    progress
        Called with the number of bytes each finished block has read.

    Returns
    -------
    names
        Of the carried-over tensors whose values differ between the inputs.

    Raises
    ------
    NonFiniteError
        NaN or infinity in an input; names file, tensor and index.
    StructureMismatchError
        Integers differ, and the plan's policy is to refuse that.
    """
    crew = _Crew(plan, checkpoints, sink, progress)
    if executor is None:
        with ThreadPoolExecutor(plan.workers, thread_name_prefix="wavg") as pool:
            crew.work_on(pool)
    else:
        crew.work_on(executor)
    return [d.spec.name for d in plan.decisions if d.spec.name in crew.differing]


class _Crew:
    """Workers that take tasks from one list until it is empty or one of them fails."""

    def __init__(
        self,
        plan: Plan,
        checkpoints: Sequence[Checkpoint],
        sink: Sink,
        progress: Callable[[int], object] | None,
    ) -> None:
        self._plan, self._checkpoints, self._sink = plan, checkpoints, sink
        self._progress = progress
        self._combination = Combination.of(plan.coefficients)
        self._tasks = _tasks(plan, sink)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.differing: set[str] = set()

    def work_on(self, executor: Executor) -> None:
        futures = [executor.submit(self._worker) for _ in range(self._plan.workers)]
        try:
            wait(futures)
        finally:
            self._stop.set()  # Ctrl-C in the line above: let the workers end at their next block
        for future in futures:
            future.result()

    def _worker(self) -> None:
        buffer = np.empty(0, np.uint8)
        try:
            while (task := self._next()) is not None:
                needed = _buffer_bytes(self._plan, task)
                if needed > buffer.nbytes:
                    buffer = np.empty(needed, np.uint8)
                read = (
                    self._average(task, buffer)
                    if task.decision.action == "average"
                    else (self._carry(task, buffer))
                )
                if self._progress is not None:
                    with self._lock:
                        self._progress(read)
        finally:
            self._stop.set()

    def _next(self) -> _Task | None:
        with self._lock:
            return None if self._stop.is_set() else next(self._tasks, None)

    def _average(self, task: _Task, buffer: Array) -> int:
        decision, count = task.decision, task.stop - task.start
        component = decision.spec.entry.component
        parts = decision.spec.entry.bits // component.bits  # 2 for complex numbers
        rows = len(self._checkpoints)
        block = _take(buffer, (rows, count * parts), component.numpy)
        for checkpoint, spec, row in zip(self._checkpoints, decision.sources, block, strict=True):
            checkpoint.read(spec, task.start, row.view(spec.entry.numpy))
        dtype = decision.output.entry
        out = _take(buffer[_aligned(block.nbytes) :], (1, count * parts), dtype.component.numpy)
        try:
            combine(
                self._combination, block, out, allow_nonfinite=self._plan.options.allow_nonfinite
            )
        except NonFiniteError as error:
            raise self._located(error, task, parts) from None
        self._sink.write(decision.spec.name, task.start, out[0].view(dtype.numpy))
        return int(block.nbytes)

    def _located(self, error: NonFiniteError, task: _Task, parts: int) -> NonFiniteError:
        spec = task.decision.spec
        index = task.start + error.index // parts
        place = np.unravel_index(index, spec.shape, order="F" if spec.fortran else "C")
        where = f"{spec.name}[{', '.join(map(str, place))}]"
        details = {"tensor": spec.name, "index": tuple(map(int, place))}
        if error.input is None:
            return NonFiniteError(
                f"the average at {where} does not fit {task.decision.output.dtype}; "
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

    def _carry(self, task: _Task, buffer: Array) -> int:
        decision = task.decision
        unit = 1 if decision.spec.entry.bits % 8 else decision.spec.entry.itemsize
        count = (task.stop - task.start) * unit
        kept, other = buffer[:count], buffer[count : 2 * count]
        dtype = np.dtype(np.uint8) if unit == 1 else decision.spec.entry.numpy
        reference = self._checkpoints[-1]
        reference.read(decision.sources[-1], task.start, kept.view(dtype))
        read = count
        if decision.compare and decision.spec.name not in self.differing:
            for checkpoint, spec in zip(self._checkpoints[:-1], decision.sources, strict=False):
                checkpoint.read(spec, task.start, other.view(dtype))
                read += count
                if not np.array_equal(kept, other):
                    self._differs(decision, checkpoint.path)
                    break
        if self._sink.wants(decision.spec.name):
            self._sink.write(decision.spec.name, task.start, kept.view(dtype))
        return read

    def _differs(self, decision: Decision, path: str) -> None:
        spec = decision.spec
        self.differing.add(spec.name)
        if self._plan.options.integers == "error" or spec.entry.kind == "code":
            advice = (
                "exclude it to take the newest's"
                if spec.entry.kind == "code"
                else "integers='reference' (--integers reference) takes the newest's"
            )
            raise StructureMismatchError(
                f"{spec.name} is {spec.dtype}, which is not averaged, and differs between {path} "
                f"and {self._checkpoints[-1].path}; {advice}",
                path=path,
                tensor=spec.name,
            )


def _tasks(plan: Plan, sink: Sink) -> Iterator[_Task]:
    for decision in plan.decisions:
        if decision.action == "average" or decision.compare or sink.wants(decision.spec.name):
            # Sub-byte numbers are only ever moved and compared, as bytes.
            size = decision.spec.nbytes if decision.spec.entry.bits % 8 else decision.spec.size
            for start in range(0, size, plan.block):
                yield _Task(decision, start, min(size, start + plan.block))


def _buffer_bytes(plan: Plan, task: _Task) -> int:
    count = task.stop - task.start
    if task.decision.action == "average":
        rows = len(plan.inputs) * count * task.decision.spec.entry.itemsize
        return _aligned(rows) + count * task.decision.output.entry.itemsize
    return 2 * count * max(1, task.decision.spec.entry.itemsize)


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _take(buffer: Array, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    """View the start of a byte buffer as an array."""
    count = shape[0] * shape[1] * dtype.itemsize
    return buffer[:count].view(dtype).reshape(shape)
