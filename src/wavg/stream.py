"""Executes a plan: read a block of every input, combine, round once, write.

It knows no format and no schedule. Memory is a few buffers a worker, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from wavg.blas import single_blas_thread
from wavg.checkpoint import Checkpoint, Sink
from wavg.digests import Digests
from wavg.errors import NonFiniteError, StructureMismatchError
from wavg.plan import Plan
from wavg.tasks import Chunk, chunks_of, ends_of
from wavg.workers import Job, Outcome

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

__all__ = ["run"]


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
    job = Job(plans, checkpoints, sinks)
    newest: dict[str, int] = {}
    chunks = chunks_of(plan, len(checkpoints), sinks)
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


@contextlib.contextmanager
def _damage_first(digests: Digests) -> Iterator[None]:
    """Have damaged bytes told as that, and not by what the numbers look like."""
    try:
        yield
    except (NonFiniteError, StructureMismatchError):
        digests.judge()
        raise


def _led(chunks: Iterator[Chunk], layouts: Sequence[int], digests: Digests) -> Iterator[Chunk]:
    """Let digests pass over every chunk before it is handed out."""
    for chunk in chunks:
        digests.reach(ends_of(chunk, layouts))
        yield chunk


def _submit_all(
    executor: Executor, job: Job, chunks: Iterator[Chunk], workers: int
) -> Iterator[Outcome]:
    """Keep the workers busy; whatever goes wrong, return only when none is at work."""
    from concurrent.futures import FIRST_COMPLETED, wait

    pending: set[Future[Outcome]] = set()
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
