"""Columns that the kernel's first step could not settle: steps 2 and 3 of its ladder.

It takes any columns and has the right answer for each, by the cheapest way that is known to be
exact there. How the first step goes, and what it leaves over, it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wavg.combination import Combination
from wavg.dtypes import DType
from wavg.errors import NonFiniteError
from wavg.exact import double_double, integer_mean
from wavg.ieee import first_nonfinite, signed_zeros, sums
from wavg.rounding import bits_of, round_to

__all__ = ["Leftovers", "Portion", "at_once", "fits", "scratch_bytes"]

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

_FEW = 400  # numbers in so few columns are settled sooner one by one than all at once
_DENSE = 8  # if more than one in so many columns is left over, it is sooner to do all of them
_COLUMNS = 1 << 13  # that are taken at once, and
_NUMBERS = 1 << 17  # numbers in these, if inputs are many


class Portion(NamedTuple):
    """Columns that the first step went through, and what it left over.

    Attributes
    ----------
    first
        The first of them, counted in the outputs.
    raw
        Their numbers, shape (inputs, width).
    flags
        Shape (outputs, width): which means are left over. None if some number is not finite; then
        none is settled.
    """

    first: int
    raw: Array
    flags: npt.NDArray[np.bool_] | None


def at_once(inputs: int) -> int:
    """Columns that steps 2 and 3 take at once."""
    return max(64, min(_COLUMNS, _NUMBERS // inputs))


def scratch_bytes(inputs: int, source: DType, width: int) -> int:
    """Bound what is allocated for portions of this width."""
    columns = min(at_once(inputs), width)
    return columns * (inputs * (32 + source.itemsize) + 200) + width * 8 // _DENSE


def fits(bits: int, highest: int, lowest: int, source: DType) -> bool:
    """Whether float64 holds every partial sum exactly, in every order.

    All terms are multiples of one quantum, the last bit of numbers of the lowest exponent; the sum
    of their magnitudes has to stay below 2**52 quanta, and no product may underflow.

    Parameters
    ----------
    bits
        Of the sum of the weights' magnitudes, whole numbers; -1 if it is not known.
    highest, lowest
        Numbers are below ``2**highest``, and at least ``2**lowest`` or zero.
    source
        Their format.
    """
    quantum = max(lowest, source.min_exponent) - source.precision + 1
    return bits >= 0 and lowest > -900 and highest + bits <= quantum + 52


class Leftovers:
    """Settles what the first step left over.

    Parameters
    ----------
    combination
        R rows of K weights.
    source, target
        The formats of what goes in and of what comes out.
    allow_nonfinite
        Let NaN and infinities through by the rules of IEEE 754 in place of an error.
    """

    def __init__(
        self, combination: Combination, source: DType, target: DType, *, allow_nonfinite: bool
    ) -> None:
        self._combination, self._source, self._target = combination, source, target
        self._allow_nonfinite = allow_nonfinite
        self._at_once = at_once(combination.matrix.shape[1])

    def settle(self, portion: Portion, outs: Array) -> None:
        """Write the means that are left over to the outputs, of which the portion is a part."""
        raw = portion.raw
        part = outs[:, portion.first : portion.first + raw.shape[1]]
        if portion.flags is None:
            self._settle_nonfinite(raw, part, portion.first)
            return
        for index, (flags, out) in enumerate(zip(portion.flags, part, strict=True)):
            count = np.count_nonzero(flags)
            if count * _DENSE > len(out):  # all of them, rather than picking most
                for some in self._slices(len(out)):
                    out[some] = self._means(index, raw[:, some])
            elif count:
                places = np.flatnonzero(flags)
                for some in self._slices(len(places)):
                    out[places[some]] = self._means(index, np.take(raw, places[some], axis=1))

    def _slices(self, length: int) -> Iterator[slice]:
        return (slice(n, n + self._at_once) for n in range(0, length, self._at_once))

    def _means(self, index: int, columns: Array) -> Array:
        """Return the rounded means of columns, for one row of weights."""
        wide = columns.astype(np.float64)
        combination, target = self._combination, self._target
        if not combination.tame[index]:
            return self._exact_means(index, wide)
        bits = combination.bits[index]
        if fits(bits, *_exponents(wide), self._source):
            quotients = combination.matrix[index] @ wide / combination.totals[index]
            values = round_to(quotients, target)
            if not quotients.all():
                zeros = np.flatnonzero(quotients == 0.0)
                values[zeros] = signed_zeros(combination.integers[index], wide[:, zeros])
            return values
        if self._source.precision <= 8 and target.precision <= 8:
            # What was too coarse for float32 need not be for float64.
            values, settled = self._closer(index, wide)
            values[~settled] = self._exact_means(index, wide[:, ~settled])
            return values
        return self._exact_means(index, wide)

    def _closer(self, index: int, columns: F64) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Step 1 in float64; returns rounded values and which are settled."""
        combination = self._combination
        quotients = combination.matrix[index] @ columns / combination.totals[index]
        reach = float(np.abs(columns).max())
        error = combination.error(2.0**-53)[index] * reach + 2.0**-1000
        low, high = (round_to(quotients + side * error, self._target) for side in (-1, 1))
        return low, bits_of(low) == bits_of(high)

    def _exact_means(self, index: int, columns: F64) -> Array:
        """Step 3; weights that nearly cancel are beyond double-double."""
        combination, target = self._combination, self._target
        integers = combination.integers[index]
        values = signed_zeros(integers, columns).astype(target.numpy)
        used = np.array(integers, dtype=bool)
        nonzero = np.flatnonzero(columns[used].any(axis=0))
        if columns.size > _FEW and combination.tame[index]:
            matrix, totals = combination.matrix[index], combination.totals[index]
            total = float(totals), float(combination.low_totals[index])
            lossless = combination.lossless[index]
            values[nonzero], settled = double_double(
                matrix, total, lossless, columns[:, nonzero], target
            )
            nonzero = nonzero[~settled]
        for column in nonzero.tolist():
            values[column] = integer_mean(integers, columns[:, column].tolist(), target)
        return values

    def _settle_nonfinite(self, raw: Array, outs: Array, first: int) -> None:
        """Refuse NaN and infinities, or take IEEE 754 where they stand and be exact elsewhere."""
        if not self._allow_nonfinite:
            found = first_nonfinite(raw)
            assert found is not None  # or the first step would not say so
            row, column = found
            value = float(raw[row, column])
            raise NonFiniteError(
                f"input {row} holds {value} at index {first + column}",
                input=row,
                index=first + column,
                value=value,
            )
        for some in self._slices(raw.shape[1]):
            columns = raw[:, some].astype(np.float64)
            for index, out in enumerate(outs[:, some]):
                used = np.array(self._combination.integers[index], dtype=bool)
                weights = self._combination.matrix[index]
                out[...] = round_to(sums(weights[used], columns[used]), self._target)
                # An input that this row does not use may be what is not finite.
                usual = np.isfinite(columns[used]).all(axis=0)
                if usual.any():
                    rest = np.where(used[:, None], columns[:, usual], 0.0)
                    out[usual] = self._means(index, rest)


def _exponents(values: F64) -> tuple[int, int]:
    """Return h and l: magnitudes are below 2**h, and at least 2**l or zero."""
    magnitudes = np.abs(values)
    highest = math.frexp(float(magnitudes.max()))[1]
    magnitudes[magnitudes == 0.0] = np.inf
    smallest = float(magnitudes.min())
    return highest, math.frexp(smallest)[1] - 1 if smallest < np.inf else 1024
