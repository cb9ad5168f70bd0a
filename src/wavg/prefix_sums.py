"""Running sums of whole models: in memory, or on disk where memory must not grow with the model.

It carries out a `wavg.prefixes` programme on tensors, block by block: a block of the sums and of
the next model in, a block of the sums and of the averages that end here out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from wavg.checkpoint import Sink, TensorSpec, read_exactly
from wavg.errors import NonFiniteError
from wavg.plan import Decision, Plan
from wavg.prefixes import Step
from wavg.rounding import round_to

__all__ = ["PrefixSums", "elements"]

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]


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
        self._length = elements(plan)
        self._file: IO[bytes] | None = None
        if on_disk and most:
            import tempfile

            self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._memory = np.empty((0 if on_disk else most, self._length))
        longest = max((_size(decision) for decision in plan.averaged), default=0)
        width = min(longest, plan.block)
        self._block = np.empty((most + 1, width))
        self._result, self._scratch = np.empty(width), np.empty(width)

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
    ) -> dict[int, str]:
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
        overflown
            For rows that do not fit their dtype, the name of the first such tensor.
        """
        overflown: dict[int, str] = {}
        offset = 0
        used = bool(step.sums[:, -1].any() or step.outputs[:, -1].any())
        for decision in self._plan.averaged:
            spec, output = decision.spec, decision.output.entry
            parts = _parts(spec)
            width = max(1, self._plan.block // parts)
            for start in range(0, spec.size, width):
                count = min(width, spec.size - start)
                raw = np.zeros(count, spec.entry.numpy)
                if used:
                    read(decision, start, raw)
                block = self._block[: self._kept + 1, : count * parts]
                place = offset + start * parts
                for row, line in enumerate(block[:-1]):
                    self._load(row, place, line)
                block[-1] = raw.view(spec.entry.component.numpy)
                if located is not None and not np.isfinite(block[-1]).all():
                    raise _first(decision, start, raw, located)
                result = self._result[: count * parts]
                for weights, row in zip(step.outputs, step.ended, strict=True):
                    self._combine(weights, block, result)
                    result /= totals[row]
                    with np.errstate(over="ignore"):
                        values = round_to(result, output.component)
                    if located is not None and not np.isfinite(values).all():
                        overflown.setdefault(row, spec.name)
                    sinks[row].write(spec.name, start, values.view(output.numpy))
                for row, weights in enumerate(step.sums):
                    self._combine(weights, block, result)
                    self._store(row, place, result)
            offset += _size(decision)
        self._kept = len(step.sums)
        return overflown

    def _combine(self, weights: F64, block: F64, out: F64) -> None:
        """Write ``weights @ block``, leaving out what has no weight."""
        scratch = self._scratch[: len(out)]
        first = True
        for weight, line in zip(weights.tolist(), block, strict=True):
            if weight == 0.0:
                continue
            if first:
                np.multiply(line, weight, out=out)
                first = False
            elif weight == 1.0:
                np.add(out, line, out=out)
            else:
                np.multiply(line, weight, out=scratch)
                np.add(out, scratch, out=out)
        if first:
            out[...] = 0.0

    def _load(self, row: int, place: int, out: F64) -> None:
        if self._file is None:
            out[...] = self._memory[row, place : place + len(out)]
        elif not read_exactly(self._file.fileno(), 8 * (row * self._length + place), out):
            raise OSError("the temporary file of the running sums became shorter")

    def _store(self, row: int, place: int, values: F64) -> None:
        if self._file is None:
            self._memory[row, place : place + len(values)] = values
            return
        view, done = values.view(np.uint8).data, 0
        while done < len(view):
            offset = 8 * (row * self._length + place) + done
            done += os.pwrite(self._file.fileno(), view[done:], offset)


def _parts(spec: TensorSpec) -> int:
    return spec.entry.bits // spec.entry.component.bits  # 2 for complex numbers


def _size(decision: Decision) -> int:
    return decision.spec.size * _parts(decision.spec)


def _first(
    decision: Decision,
    start: int,
    raw: Array,
    located: Callable[[Decision, tuple[int, ...], Any], NonFiniteError],
) -> NonFiniteError:
    spec = decision.spec
    position = int(np.flatnonzero(~np.isfinite(raw))[0])
    index = np.unravel_index(start + position, spec.shape, order="F" if spec.fortran else "C")
    return located(decision, tuple(map(int, index)), raw[position])
