"""Running sums of whole models: in memory, or on disk where memory must not grow with the model.

It carries out a `wavg.prefixes` programme on tensors, block by block: a block of the sums and of
the next model in, a block of the sums and of the averages that end here out.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wavg.checkpoint import Sink, TensorSpec
from wavg.decisions import Decision
from wavg.errors import NonFiniteError
from wavg.plan import Plan
from wavg.positional import read_exactly, write_exactly
from wavg.prefixes import Step
from wavg.rounding import round_to

__all__ = ["PrefixSums", "elements"]

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]


_BLOCK = 1 << 14  # numbers: a few sums of so many stay in the nearer caches


class _Piece(NamedTuple):
    """A part of a tensor, and where it begins in the sums."""

    decision: Decision
    start: int
    size: int
    place: int


class _Problems(NamedTuple):
    """A number of the model that is not finite; rows that are not finite, or not in their dtype."""

    found: NonFiniteError | None
    spoilt: list[int]
    overflown: list[int]


def elements(plan: Plan) -> int:
    """Return the numbers of a model that are averaged; a complex one is two."""
    return sum(_size(decision) for decision in plan.averaged)


class PrefixSums:
    """Sums of models, float64, one number an averaged element.

    Parameters
    ----------
    plan
        Which tensors are averaged.
    most
        How many sums are kept at once, at most.
    on_disk
        Keep them in a temporary file without a name, and only blocks in memory.
    """

    def __init__(self, plan: Plan, most: int, *, on_disk: bool) -> None:
        self._plan, self._kept = plan, 0
        self._found: NonFiniteError | None = None  # the last number that is not finite
        self._length = elements(plan)
        self._file: IO[bytes] | None = None
        if on_disk and most:
            import tempfile

            self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._memory = np.empty((0 if on_disk else most, self._length))
        in_place = all(s.extent is not None for d in plan.averaged for s in d.sources)
        self._width = min(plan.block, _BLOCK) if in_place else plan.block  # compressed: as planned
        # One a worker: blocks of the sums and the model, of sums anew, of a result and a product.
        self._idle: queue.SimpleQueue[list[F64]] = queue.SimpleQueue()
        width = min(self._width, self._length)
        for _ in range(plan.workers):
            self._idle.put([np.empty((rows, width)) for rows in (most + 1, most, 2)])

    def __enter__(self) -> PrefixSums:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._memory = np.empty((0, 0))

    def step(
        self,
        step: Step,
        totals: Mapping[int, float],
        sinks: Mapping[int, Sink],
        read: Callable[[Decision, int, Array], None],
        located: Callable[[Decision, tuple[int, ...], Any], NonFiniteError] | None,
    ) -> dict[int | None, str]:
        """Take in the next model and write the averages that end with it.

        Parameters
        ----------
        step
            What to do.
        totals, sinks
            For each row that ends here, by what to divide its sum, and what takes the average.
        read
            Fills a flat array with the model's elements of a tensor from a position.
        located
            Makes the error of a number that is not finite; None lets these through.

        Returns
        -------
        problems
            For rows that hold a number that is not finite, or do not fit their dtype, what is
            wrong; under None, of the model.

        Notes
        -----
        A number that is not finite makes every sum and average that it enters not finite: so it is
        known what holds it.
        """
        from concurrent.futures import ThreadPoolExecutor  # a tenth of `import wavg`

        def work(piece: _Piece) -> _Problems:
            scratch = self._idle.get()
            try:
                with np.errstate(over="ignore", invalid="ignore"):  # told otherwise
                    return self._piece(piece, scratch, step, totals, sinks, read, located)
            finally:
                self._idle.put(scratch)

        found: NonFiniteError | None = None
        overflown: dict[int, str] = {}
        spoilt: set[int] = set()
        pieces = list(self._pieces())
        pool = ThreadPoolExecutor(self._plan.workers, thread_name_prefix="wavg-sums")
        try:
            for piece, problems in zip(pieces, pool.map(work, pieces), strict=True):
                found = found or problems.found
                spoilt.update(problems.spoilt)
                for row in problems.overflown:
                    overflown.setdefault(row, piece.decision.spec.name)
        finally:
            pool.shutdown(cancel_futures=True)
        self._kept = len(step.sums)
        self._found = found or self._found
        told: dict[int | None, str] = {
            row: f"the average of {name} does not fit its dtype" for row, name in overflown.items()
        }
        if self._found is not None:
            told.update(dict.fromkeys(spoilt, f"it holds what is not finite: {self._found}"))
        return {**told, None: str(found)} if found else told

    def _pieces(self) -> Iterator[_Piece]:
        offset = 0
        for decision in self._plan.averaged:
            parts = _parts(decision.spec)
            width = max(1, self._width // parts)
            for start in range(0, decision.spec.size, width):
                count = min(width, decision.spec.size - start)
                yield _Piece(decision, start, count, offset + start * parts)
            offset += _size(decision)

    def _piece(
        self,
        piece: _Piece,
        scratch: Sequence[F64],
        step: Step,
        totals: Mapping[int, float],
        sinks: Mapping[int, Sink],
        read: Callable[[Decision, int, Array], None],
        located: Callable[[Decision, tuple[int, ...], Any], NonFiniteError] | None,
    ) -> _Problems:
        """Do a piece of a step."""
        spec, output = piece.decision.spec, piece.decision.output.entry
        columns = piece.size * _parts(spec)
        block, moved, (result, product) = (part[:, :columns] for part in scratch)
        lines = [*self._lines(piece.place, block), block[-1]]
        found, spoilt, overflown = None, list[int](), list[int]()
        if step.takes:
            raw = np.empty(piece.size, spec.entry.numpy)
            read(piece.decision, piece.start, raw)
            lines[-1][...] = raw.view(spec.entry.component.numpy)
            if located is not None and not np.isfinite(lines[-1]).all():
                found = _first(piece, raw, located)
        else:
            lines[-1][...] = 0.0  # it has no weight, and is not read
        for weights, row in zip(step.outputs.tolist(), step.ended, strict=True):
            _combine(weights, lines, result, product)
            result /= totals[row]
            values = round_to(result, output.component)
            if located is not None and not np.isfinite(values).all():
                overflown.append(row)
                if not np.isfinite(result).all():
                    spoilt.append(row)
            sinks[row].write(spec.name, piece.start, values.view(output.numpy))
        grown = [row for row, weights in enumerate(step.sums) if _grows(weights, row)]
        others = [row for row in range(len(step.sums)) if row not in grown]
        for row in others:  # from the sums as they were
            _combine(step.sums[row].tolist(), lines, moved[row], product)
        for row in grown:
            if step.sums[row, -1] == 0.0:
                continue  # it is as it was
            np.multiply(lines[-1], step.sums[row, -1], out=product)
            np.add(lines[row], product, out=lines[row])
            self._store(row, piece.place, lines[row])
        for row in others:
            self._store(row, piece.place, moved[row])
        return _Problems(found, spoilt, overflown)

    def check(
        self,
        read: Callable[[Decision, int, Array], None],
        located: Callable[[Decision, tuple[int, ...], Any], NonFiniteError],
    ) -> str:
        """Return what is not finite in a model; else nothing."""
        for piece in self._pieces():
            raw = np.empty(piece.size, piece.decision.spec.entry.numpy)
            read(piece.decision, piece.start, raw)
            values = raw.view(piece.decision.spec.entry.component.numpy)
            if not np.isfinite(values).all():
                return str(_first(piece, raw, located))
        return ""

    def _lines(self, place: int, block: F64) -> list[F64]:
        """Return the sums kept, a part of each: themselves, or read into a block."""
        size = block.shape[1]
        if self._file is None:
            return list(self._memory[: self._kept, place : place + size])
        for row, line in enumerate(block[: self._kept]):
            if not read_exactly(self._file.fileno(), 8 * (row * self._length + place), line):
                raise OSError("the temporary file of the running sums became shorter")
        return list(block[: self._kept])

    def _store(self, row: int, place: int, values: F64) -> None:
        if self._file is None:
            kept = self._memory[row, place : place + len(values)]
            if not np.may_share_memory(kept, values):
                kept[...] = values
            return
        offset = 8 * (row * self._length + place)
        write_exactly(self._file.fileno(), values.view(np.uint8).data, offset)


def _grows(weights: F64, row: int) -> bool:
    """Whether a sum is what it was, and a multiple of the model."""
    return row < len(weights) - 1 and bool(
        weights[row] == 1.0 and np.count_nonzero(weights[:-1]) == 1
    )


def _combine(weights: Sequence[float], lines: Sequence[F64], out: F64, product: F64) -> None:
    """Write ``weights @ lines``, leaving out what has no weight."""
    first = True
    for weight, line in zip(weights, lines, strict=True):
        if weight == 0.0:
            continue
        if first:
            np.multiply(line, weight, out=out)
            first = False
        elif weight == 1.0:
            np.add(out, line, out=out)
        else:
            np.multiply(line, weight, out=product)
            np.add(out, product, out=out)
    if first:
        out[...] = 0.0


def _parts(spec: TensorSpec) -> int:
    return spec.entry.bits // spec.entry.component.bits  # 2 for complex numbers


def _size(decision: Decision) -> int:
    return decision.spec.size * _parts(decision.spec)


def _first(
    piece: _Piece,
    raw: Array,
    located: Callable[[Decision, tuple[int, ...], Any], NonFiniteError],
) -> NonFiniteError:
    spec = piece.decision.spec
    position = int(np.flatnonzero(~np.isfinite(raw))[0])
    place = piece.start + position
    index = np.unravel_index(place, spec.shape, order="F" if spec.fortran else "C")
    return located(piece.decision, tuple(map(int, index)), raw[position])
