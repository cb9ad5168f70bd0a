"""Step 1 of the kernel compiled: what ``_compiled.c`` takes and gives.

It works on rows in memory, or reads them from open files, portion by portion; what is read is still
in the nearest cache when it is combined.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg.combination import Combination
from wavg.dtypes import DType
from wavg.leftovers import Portion

try:
    from wavg import _compiled
except ImportError:  # no compiler at hand when wavg was installed
    _compiled = None  # type: ignore[assignment]

__all__ = ["COMPILED", "Compiled", "reads_files", "scratch_bytes", "width"]

Array = npt.NDArray[Any]

COMPILED = _compiled is not None  # whether step 1 is
_FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2}
_PORTION = 640 << 10  # bytes of all inputs that are read, and combined while in the nearest cache
_SHORTEST = 8 << 10  # bytes that are worth a reading
_TILE = 1 << 13  # bytes that the compiled step keeps of an output
_NONE: Array = np.empty(0, np.uint8)


def reads_files(source: DType, target: DType) -> bool:
    """Whether this step is there for these formats."""
    return COMPILED and source.name in _FORMATS and target.name in _FORMATS


def width(inputs: int, source: DType) -> int:
    """Return the columns that are read from files at once."""
    return max(_SHORTEST, _PORTION // inputs) // source.itemsize


def scratch_bytes(inputs: int, outputs: int, source: DType, columns: int, *, reads: bool) -> int:
    """Bound what is allocated for portions of so many columns, read from files or not."""
    flags = outputs * (columns + 2 * _TILE)  # and a tile's sums, and what is checked at once
    return flags + inputs * columns * source.itemsize * reads


class Compiled:
    """A combination in the form that the compiled step takes, and scratch memory for it.

    Parameters
    ----------
    combination
        R rows of K weights.
    source, target
        The formats of what goes in and of what comes out.
    """

    def __init__(self, combination: Combination, source: DType, target: DType) -> None:
        self._source, self._formats = source, (_FORMATS[source.name], _FORMATS[target.name])
        self._left = self._block = _NONE
        self._weights = combination.matrix.copy()
        rows = []
        errors = combination.error(2.0**-53).tolist()
        for index, (bits, error) in enumerate(zip(combination.bits, errors, strict=True)):
            integers = combination.integers[index]
            total, window = float(combination.totals[index]), math.inf
            if bits >= 0:  # small whole numbers: exact while no term is too small for the others
                self._weights[index] = integers
                total = float(sum(integers))
                window = math.ldexp(sum(map(abs, integers)), source.precision - 52)
            vanished = (combination.matrix[index] != 0) != (np.array(integers) != 0)
            if not combination.tame[index] or vanished.any():  # it settles no more than zeros
                self._weights[index] = [(weight > 0) - (weight < 0) for weight in integers]
                total, error = 1.0, math.inf
            rows.append((total, window, error))
        self._rows = np.array(rows)
        self._counts = np.zeros(len(rows), np.int64)

    def in_files(self, descriptors: Array, offsets: Array, outs: Array) -> Iterator[Portion]:
        """Go through rows that lie in files as `in_memory` does; see `wavg.kernel.Combiner`."""
        inputs = len(descriptors)
        shape = inputs, width(inputs, self._source)
        if self._block.shape != shape:
            self._block = np.empty(shape, self._source.numpy)
        return self.in_memory(self._block, outs, descriptors, offsets)

    def in_memory(
        self, block: Array, outs: Array, descriptors: Array = _NONE, offsets: Array = _NONE
    ) -> Iterator[Portion]:
        """Write what this step settles to the outputs; yield portions in which it leaves some."""
        outputs, columns = outs.shape
        portion = block.shape[1]
        if self._left.shape != (outputs, portion):
            self._left = np.empty((outputs, portion), bool)
        stop = 0
        while stop < columns:
            first, stop, finite = _compiled.settle(
                _bytes(block),
                _bytes(outs),
                _bytes(self._left),
                _bytes(self._counts),
                _bytes(self._weights),
                _bytes(self._rows),
                *self._formats,
                stop,
                _bytes(descriptors),
                _bytes(offsets),
            )
            if first < stop:
                raw, left = _packed(block, stop - first), _packed(self._left, stop - first)
                yield Portion(first, raw, left if finite else None)


def _packed(array: Array, columns: int) -> Array:
    """Return the rows of so many columns that lie one behind the other at the start of an array."""
    return array.ravel()[: len(array) * columns].reshape(len(array), columns)


def _bytes(array: Array) -> Array:
    return array.ravel().view(np.uint8)
