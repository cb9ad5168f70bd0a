"""What an evaluator is given: checkpoints alone, and averages from running sums.

As arrays for a function, as files in a temporary folder for a command.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy.typing as npt

from wavg import outputs
from wavg.checkpoint import Checkpoint, Sink
from wavg.decisions import Decision
from wavg.destinations import bare
from wavg.digests import verify_checksums
from wavg.errors import NonFiniteError
from wavg.files import plan_average
from wavg.formats import is_checkpoint_name
from wavg.formats.folders import checkpoint_in
from wavg.inputs import PathLike
from wavg.opening import opened
from wavg.plan import Plan
from wavg.prefix_sums import PrefixSums
from wavg.prefixes import Step
from wavg.sinks import MemorySink

__all__ = ["Subject", "Subjects"]

Array = npt.NDArray[Any]

_AVERAGES = 4  # made at once in memory; one at a time, three take nearly twice the processor time
_UNBOUNDED = 1 << 50  # memory for what only plans and reads nothing


class Subject(NamedTuple):
    """A model to be scored.

    Attributes
    ----------
    row
        Which average of a step it is; None for the checkpoint alone.
    model
        Its tensors, or the path of its file or folder.
    problem
        Why it cannot be scored; else empty.
    """

    row: int | None
    model: Any
    problem: str = ""


class Subjects:
    """Open checkpoints, oldest first, and the averages made of them.

    Parameters
    ----------
    paths
        The checkpoints, oldest first.
    inputs
        What a person gave for them: folders are then given to a command as such.
    options
        Of `wavg.plan_average`.
    files
        Whether models are given as files.
    """

    def __init__(
        self,
        paths: Sequence[str],
        inputs: PathLike | Iterable[PathLike],
        options: Mapping[str, Any],
        *,
        files: bool,
    ) -> None:
        self._paths, self._options = paths, options
        given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
        self._as_files = any(is_checkpoint_name(os.fspath(name)) for name in given)
        self._stack = contextlib.ExitStack()
        self._target: str | None = None
        self._plans: dict[int, Plan] = {}
        self._carried: tuple[int, dict[str, Array]] = -1, {}
        self._verified = False
        self.bytes_read = 0
        with contextlib.ExitStack() as stack:
            if files:
                import tempfile  # with shutil a tenth of `import wavg`

                prefix = "wavg-scores-"
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix))
                whole = self._whole(paths[-1])
                name = os.path.basename(os.path.abspath(whole))
                slash = "/" if os.path.isdir(whole) else ""  # a folder is made like it
                self._target = os.path.join(folder, name) + slash
            self.plan = self._plan_of(len(paths) - 1)
            opaque_dtype, isolate = options["opaque_dtype"], options["isolate"]
            self.checkpoints = stack.enter_context(opened(paths, opaque_dtype, isolate))
            self._stack = stack.pop_all()

    def __enter__(self) -> Subjects:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def on_disk(self) -> bool:
        """Whether models and sums are on disk, and memory does not grow with them."""
        return self._target is not None

    def sums(self, most: int) -> PrefixSums:
        """Return running sums for `take`: so many at once, at most."""
        return PrefixSums(self.plan, most, on_disk=self.on_disk)

    def take(
        self,
        position: int,
        sums: PrefixSums | None = None,
        step: Step | None = None,
        totals: Mapping[int, float] | None = None,
        *,
        alone: bool = False,
        reference: int | None = None,
    ) -> Generator[Subject, None, None]:
        """Take in a checkpoint, and yield the averages that end with it, then it, if `alone`.

        Each is there until the next is asked for.

        Parameters
        ----------
        position
            Of the checkpoint, oldest first.
        sums, step, totals
            Of the averages; see `PrefixSums.step`.
        alone
            Whether the checkpoint is to be scored itself.
        reference
            The position of the averages' reference; the newest's by default.
        """
        if not self._verified:
            self._verified = True
            verify_checksums(self.checkpoints, self.plan.workers)
            for checkpoint in self.checkpoints:
                self.bytes_read += sum(c.extent.length for c in checkpoint.index.checksums)
        basis = len(self._paths) - 1 if reference is None else reference
        how = self._in_memory if self._target is None else self._in_files
        return how(position, sums, step, totals or {}, alone, basis)

    def _in_memory(
        self,
        position: int,
        sums: PrefixSums | None,
        step: Step | None,
        totals: Mapping[int, float],
        alone: bool,
        reference: int,
    ) -> Generator[Subject, None, None]:
        checkpoint, layout = self.checkpoints[position], self.plan.layouts[position]
        specs = list(checkpoint.index.tensors)
        if not alone:
            specs = [decision.sources[layout] for decision in self.plan.averaged]
        flats: dict[str, Array] = {}
        for spec in specs:
            flats[spec.name] = spec.empty()
            checkpoint.read(spec, 0, flats[spec.name])
            self.bytes_read += spec.nbytes
        checkpoint.verify_unchanged()

        def read(decision: Decision, start: int, out: Array) -> None:
            flat = flats[decision.sources[layout].name]
            out[...] = flat[start : start + len(out)]

        located, problem = self._located(checkpoint, layout), ""
        if step is not None and sums is not None:
            for part in step.divided(_AVERAGES):
                made = {row: MemorySink(self._plan_of(reference)) for row in part.ended}
                for sink in made.values():
                    for name, values in self._carry(reference).items():
                        sink.write(name, 0, values)
                sinks = {row: self._named(sink, reference) for row, sink in made.items()}
                problems = sums.step(part, totals, sinks, read, located)
                problem = problem or problems.get(None, "")
                del sinks
                for row in part.ended:
                    yield Subject(row, made.pop(row).arrays(), problems.get(row, ""))
        if alone:
            if step is None or not step.takes:
                problem = self._spoilt(read, located)
            model = {spec.name: spec.array(flats[spec.name]) for spec in specs}
            flats.clear()
            yield Subject(None, model, problem)

    def _in_files(
        self,
        position: int,
        sums: PrefixSums | None,
        step: Step | None,
        totals: Mapping[int, float],
        alone: bool,
        reference: int,
    ) -> Generator[Subject, None, None]:
        checkpoint, layout = self.checkpoints[position], self.plan.layouts[position]

        def read(decision: Decision, start: int, out: Array) -> None:
            checkpoint.read(decision.sources[layout], start, out)

        located = self._located(checkpoint, layout)
        if (alone and located is not None) or (step is not None and step.takes):
            self.bytes_read += sum(d.spec.nbytes for d in self.plan.averaged)
        if step is None or sums is None:
            if alone:
                problem = self._spoilt(read, located)
                checkpoint.verify_unchanged()
                yield Subject(None, self._whole(checkpoint.path), problem)
            return

        with self._folders(step.ended) as paths:
            with contextlib.ExitStack() as stack:
                made = {}
                for row, path in paths.items():
                    plan, template = self._plan_of(reference), self.checkpoints[reference]
                    made[row] = stack.enter_context(
                        outputs.planned(plan, template, path, None, overwrite=False)
                    )
                sinks = {row: self._named(output.sink, reference) for row, output in made.items()}
                problems = sums.step(step, totals, sinks, read, located)
                checkpoint.verify_unchanged()
                for output in made.values():
                    self.bytes_read += sum(e.length for t in output.templates for e, _ in t.carry)
                    output.finish()
                    output.commit()
            for row, path in paths.items():
                yield Subject(row, bare(path), problems.get(row, ""))
        if alone:
            problem = problems.get(None, "") if step.takes else self._spoilt(read, located)
            checkpoint.verify_unchanged()
            yield Subject(None, self._whole(checkpoint.path), problem)

    @contextlib.contextmanager
    def _folders(self, rows: Sequence[int]) -> Iterator[dict[int, str]]:
        """Give each average a path in a folder of its own; all are removed at the end."""
        import shutil

        assert self._target is not None  # models are given as files
        name = self._target.removeprefix(os.path.dirname(bare(self._target)))
        root = self._target.removesuffix(name)
        folders = {row: os.path.join(root, f"average-{row}") for row in rows}
        try:
            for folder in folders.values():
                os.mkdir(folder)
            yield {row: folder + name for row, folder in folders.items()}
        finally:
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)

    def _plan_of(self, reference: int) -> Plan:
        """Return the plan of an average whose newest checkpoint is the reference."""
        if reference not in self._plans:
            self._plans[reference] = plan_average(
                self._paths[: reference + 1],
                self._target,
                steps=range(reference + 1),  # of no concern here
                sort=False,
                max_memory=_UNBOUNDED,
                **self._options,
            )
        return self._plans[reference]

    def _named(self, sink: Sink, reference: int) -> Sink:
        """Give a sink the names that tensors have in an average's reference."""
        layout = self.plan.layouts[reference]
        if not layout:
            return sink
        return _Renamed(sink, {d.spec.name: d.sources[layout].name for d in self.plan.averaged})

    def _carry(self, reference: int) -> dict[str, Array]:
        """Return what is carried over from the reference; read once."""
        if self._carried[0] != reference:
            flats = {}
            for decision in self._plan_of(reference).carried:
                flat = flats[decision.spec.name] = decision.spec.empty()
                self.checkpoints[reference].read(decision.spec, 0, flat)
                self.bytes_read += decision.spec.nbytes
            self._carried = reference, flats
        return self._carried[1]

    def _whole(self, path: str) -> str:
        """Return the folder that a checkpoint is, if it was not given as a file."""
        folder = os.path.dirname(os.path.abspath(path))
        found = None if self._as_files else checkpoint_in(folder)
        return folder if found and os.path.samefile(found, path) else path

    def _spoilt(
        self,
        read: Callable[[Decision, int, Array], None],
        located: Callable[[Decision, tuple[int, ...], Any], NonFiniteError] | None,
    ) -> str:
        """Return what is not finite in a checkpoint that no sum takes in; else nothing."""
        if located is None:
            return ""
        with self.sums(0) as none:
            return none.check(read, located)

    def _located(
        self, checkpoint: Checkpoint, layout: int
    ) -> Callable[[Decision, tuple[int, ...], Any], NonFiniteError] | None:
        """Return what makes the error of a number that is not finite; None if they are allowed."""
        if self._options["allow_nonfinite"]:
            return None

        def error(decision: Decision, index: tuple[int, ...], value: Any) -> NonFiniteError:
            name = decision.sources[layout].name
            return NonFiniteError(
                f"{checkpoint.path}: {name}[{', '.join(map(str, index))}] is {value}; "
                "allow_nonfinite=True (--allow-nonfinite) lets such values through",
                path=checkpoint.path,
                tensor=name,
                index=index,
            )

        return error


class _Renamed:
    """A sink that knows tensors by other names (see `wavg.checkpoint.Sink`)."""

    def __init__(self, sink: Sink, names: Mapping[str, str]) -> None:
        self._sink, self._names = sink, names

    def wants(self, name: str) -> bool:
        return self._sink.wants(self._names[name])

    def joined(self, names: Sequence[str]) -> bool:
        return self._sink.joined([self._names[name] for name in names])

    def write(self, name: str, start: int, values: Array) -> None:
        self._sink.write(self._names[name], start, values)
