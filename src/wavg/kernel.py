"""The only weighted-sum arithmetic: widen, combine, round.

It knows arrays of one number format and a matrix of weights; nothing of files, names or steps.

The result is *defined* as the correctly rounded weighted mean: the exact value of
``Σ w_k x_k / Σ w_k`` over the given float64 weights, rounded once, to nearest even, into the output
format. That is what makes the bytes independent of block sizes, workers and the order of addition:
there is only one right answer. It is reached in three steps, each for the few elements that the
step before could not settle:

1. float64, one matrix product for all elements. With ``e`` a bound on its error, an element is
   settled when ``q - e`` and ``q + e`` round to the same output: rounding is monotone, so the
   exact value rounds there too. Where every partial sum is known to be exact, ``e`` is zero.
2. Double-double (Dekker 1971; Ogita, Rump & Oishi 2005), about 106 bits, which also sees when
   nothing at all was lost and thereby settles exact ties.
3. `fractions.Fraction`.

Rounding a quotient ``S / T`` to float64 and then to at most 24 bits rounds twice. That is harmless
where the sum ``S`` is exact: a midpoint ``m`` of the narrow format has at most 25 bits and ``T`` at
most 29, so ``S`` and ``m T`` are multiples of a common quantum that exceeds ``T`` times half a unit
of float64 at ``m``; the quotient is the midpoint, or float64 tells them apart. Where the sum is
not exact, the interval of step 1 decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg.dtypes import DType, dtype_of
from wavg.errors import NonFiniteError, WavgError, WeightError

__all__ = ["Combination", "accumulate", "combine", "first_nonfinite", "round_to", "tile_width"]

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

_UNIT = 2.0**-53
_TILE_ELEMENTS = 1 << 17  # widened elements of one tile, K rows together: 1 MiB, a core's L2 cache
_SMALLEST = 2.0**-960  # products below this may lose bits to underflow
_LOST = 2.0**-1070  # bounds what underflow takes from a weight, or from a product
_WEIGHT_BITS = 29  # of integer weights' sum; more, and the theorem above no longer holds


@dataclass(frozen=True, slots=True)
class Combination:
    """A matrix of weights, prepared once and applied to every block.

    Attributes
    ----------
    matrix
        The weights, shape (outputs, inputs). Each row is divided by its common factor and scaled by
        a power of two, so that sums of products cannot overflow and its total is positive.
    totals, low_totals
        Each row's sum as an unevaluated pair of float64 numbers, shape (outputs,).
    exact
        For each row, its weights as exact fractions, to the same scale.
    lossless
        For each row, whether `matrix` and `totals` alone hold exactly those fractions.
    bits
        For a row of integers (up to a common factor), the bits of the sum of their magnitudes; -1
        where that exceeds 29 bits, for then sums are not known to be exact.
    """

    matrix: F64
    totals: F64
    low_totals: F64
    exact: tuple[tuple[Fraction, ...], ...]
    lossless: tuple[bool, ...]
    bits: tuple[int, ...]

    @classmethod
    def of(cls, weights: npt.ArrayLike) -> Combination:
        """Prepare weights of shape (inputs,) or (outputs, inputs).

        Raises
        ------
        WeightError
            For no weights, weights that are not finite, or a row that sums to exactly zero.

        Examples
        --------
        >>> Combination.of([1, 2, 3]).bits
        (3,)
        """
        rows = np.atleast_2d(np.asarray(weights, dtype=np.float64))
        if rows.ndim != 2 or rows.size == 0:
            raise WeightError("there must be at least one weight")
        if not np.isfinite(rows).all():
            raise WeightError(f"weights must be finite numbers, not {_short(rows)}")
        matrix, totals = np.empty_like(rows), np.empty((2, len(rows)))
        exact, lossless = [], []
        for index, row in enumerate(rows):
            fractions = _reduced(row)
            total = sum(fractions)
            if total == 0:
                raise WeightError(
                    f"the weights {_short(row)} sum to zero, so there is no average; "
                    "change one of them"
                )
            # A power of two: exact, but for weights some 2**1000 times smaller than the largest.
            scale = Fraction(2) ** -(_exponent(max(map(abs, fractions))) + len(row).bit_length())
            fractions = tuple(value * scale * (1 if total > 0 else -1) for value in fractions)
            matrix[index] = [float(value) for value in fractions]
            total = abs(total) * scale
            totals[:, index] = float(total), float(total - Fraction(float(total)))
            exact.append(fractions)
            same = all(Fraction(a) == b for a, b in zip(matrix[index], fractions, strict=True))
            lossless.append(same and Fraction(totals[0, index]) == total)
        bits = tuple(_integer_bits(row) for row in exact)
        return cls(matrix, totals[0], totals[1], tuple(exact), tuple(lossless), bits)


def _short(values: F64) -> str:
    text = [f"{value:g}" for value in values.ravel().tolist()]
    return "[" + ", ".join(text if len(text) <= 8 else [*text[:4], "…", *text[-3:]]) + "]"


def _reduced(row: F64) -> tuple[Fraction, ...]:
    """Divide out what the weights have in common: 0.1, 0.1 are 1, 1, and sum as exactly."""
    fractions = [Fraction(value) for value in row.tolist()]
    denominator = max(value.denominator for value in fractions)  # all are powers of two
    integers = [int(value * denominator) for value in fractions]
    return tuple(Fraction(value, math.gcd(*integers) or 1) for value in integers)


def _exponent(value: Fraction) -> int:
    return value.numerator.bit_length() - value.denominator.bit_length() + 1


def _integer_bits(row: tuple[Fraction, ...]) -> int:
    denominator = max(value.denominator for value in row)
    bits = int(sum(map(abs, row)) * denominator).bit_length()
    return bits if bits <= _WEIGHT_BITS else -1


def tile_width(inputs: int) -> int:
    """Columns that `combine` widens at once for so many inputs: what fits the cache."""
    return max(256, min(16384, _TILE_ELEMENTS // max(1, inputs)))


def combine(
    combination: Combination, block: Array, outs: Array, *, allow_nonfinite: bool = False
) -> None:
    """Write the weighted means of the rows of a block: ``outs = (W @ block) / totals``.

    Parameters
    ----------
    combination
        R rows of K weights.
    block
        Shape (K, B), one row an input, any real float dtype of `wavg.dtypes`.
    outs
        Shape (R, B), any real float dtype; overwritten. Must not share memory with `block`.
    allow_nonfinite
        Let NaN and infinities through by the rules of IEEE 754 in place of an error.

    Raises
    ------
    NonFiniteError
        A value of the block is NaN or infinite, or a result does not fit the output dtype.
        Attributes: ``input`` (the row, None for a result), ``index`` (the column), ``value``.

    Notes
    -----
    Every element is the exact weighted mean rounded once to nearest even; an exact zero is -0 where
    every term is -0, else +0. Scratch memory is a few MiB whatever K and B are.

    Examples
    --------
    >>> out = np.empty((1, 3), np.float32)
    >>> combine(Combination.of([1, 3]), np.float32([[0, 4, 8], [4, 4, 4]]), out)
    >>> out
    array([[3., 4., 5.]], dtype=float32)
    """
    source, target = _entry(block), _entry(outs)
    inputs, width = block.shape
    step = tile_width(inputs)
    wide = np.empty((inputs, min(step, width)))
    overflows = target != source or bool((combination.matrix < 0).any())
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        for start in range(0, width, step):
            out = outs[:, start : start + step]
            tile = wide[:, : out.shape[1]]
            np.copyto(tile, block[:, start : start + step], casting="unsafe")
            # Both extremes are NaN where a NaN is.
            magnitudes = np.maximum(-tile.min(axis=1), tile.max(axis=1))
            if np.isfinite(magnitudes).all():
                _combine_finite(combination, tile, magnitudes, out, source, target)
            elif allow_nonfinite:
                _combine_nonfinite(combination, tile, out, source, target)
            else:
                row, column = first_nonfinite(tile)
                raise NonFiniteError(
                    f"input {row} holds {tile[row, column]} at index {start + column}",
                    input=row,
                    index=start + column,
                    value=float(tile[row, column]),
                )
            if overflows and not allow_nonfinite and not np.isfinite(out).all():
                column = start + first_nonfinite(out)[1]
                raise NonFiniteError(
                    f"the average at index {column} does not fit {target.name}; "
                    "write a wider dtype",
                    input=None,
                    index=column,
                )


def first_nonfinite(array: Array) -> tuple[int, int]:
    """Return row and column of the first NaN or infinity, row by row."""
    row, column = np.argwhere(~np.isfinite(array))[0].tolist()
    return row, column


def accumulate(total: F64, array: Array, *, keep: float = 1.0, add: float = 1.0) -> None:
    """Update a running sum in place: ``total = keep * total + add * array``, in float64.

    >>> total = np.array([1.0, 2.0]); accumulate(total, np.array([3, 4], np.float32), keep=0.5)
    >>> total
    array([3.5, 5. ])
    """
    if keep != 1.0:
        np.multiply(total, keep, out=total)
    np.add(total, array if add == 1.0 else np.multiply(array, add, dtype=np.float64), out=total)


def round_to(values: F64, target: DType) -> Array:
    """Round float64 to a format of `wavg.dtypes`, once, to nearest even; overflow is infinite.

    >>> from wavg.dtypes import lookup
    >>> float(round_to(np.array([1 + 2**-8 + 2**-40]), lookup("bfloat16"))[0])  # just above a tie
    1.0078125
    """
    if target.precision >= 11:  # float64, float32, float16: NumPy rounds these once
        return values.astype(target.numpy)
    # ml_dtypes would go through float32, and so round twice.
    drop = 53 - target.precision
    bits = values.view(np.uint64)
    odd = (bits >> np.uint64(drop)) & np.uint64(1)
    rounded = bits + (odd + np.uint64((1 << (drop - 1)) - 1))
    rounded &= np.uint64(2**64 - (1 << drop))
    result = rounded.view(np.float64)
    tiny = np.abs(values) < math.ldexp(1.0, target.min_exponent)
    if tiny.any():  # subnormal results have a fixed quantum: let an addition round to it
        magic = math.ldexp(1.5, 52 + target.min_exponent - target.precision + 1)
        small = values[tiny]
        result[tiny] = np.copysign((small + magic) - magic, small)
    return result.astype(np.float32).astype(target.numpy)


def _entry(array: Array) -> DType:
    entry = dtype_of(array.dtype)
    if entry is None or entry.kind != "float":
        raise WavgError(f"dtype {array.dtype} cannot be averaged")
    return entry


def _combine_finite(
    combination: Combination, tile: F64, magnitudes: F64, outs: Array, source: DType, target: DType
) -> None:
    sums = combination.matrix @ tile
    for index, (values, out) in enumerate(zip(sums, outs, strict=True)):
        if target.precision == 53:
            unsettled = np.arange(tile.shape[1])  # float64 cannot vouch for its own last bit
        else:
            np.divide(values, combination.totals[index], out=values)
            unsettled = _round_quotients(combination, index, values, tile, magnitudes, out, source)
        if len(unsettled):
            out[unsettled] = _settle(combination, index, tile[:, unsettled], target)


def _round_quotients(
    combination: Combination,
    index: int,
    quotients: F64,
    tile: F64,
    magnitudes: F64,
    out: Array,
    source: DType,
) -> npt.NDArray[np.intp]:
    """Step 1: round into `out` and return the columns that are not certain."""
    target = _entry(out)
    zero = quotients == 0.0  # their sign is for `_settle` to find
    reach = float(np.abs(combination.matrix[index]) @ magnitudes)
    if not _sums_exactly(combination.bits[index], magnitudes, source.min_exponent, source):
        # K products, K additions, a rounded total and a division; twice that for slack.
        terms = 2 * (len(magnitudes) + 3)
        error = terms * (_UNIT * reach + _LOST * (1.0 + float(magnitudes.max())))
        error /= float(combination.totals[index])
        out[...] = round_to(quotients - error, target)
        unsettled = _bits(out) != _bits(round_to(quotients + error, target))
        unsettled |= zero
        columns = np.flatnonzero(unsettled)
        # Equal weights make many exact ties. Then it pays to look whether these very numbers,
        # rather than any of their format, sum exactly; most blocks of a real model do.
        if len(columns) * 64 < len(out) or not _sums_exactly(
            combination.bits[index], magnitudes, _smallest_exponent(tile), source
        ):
            return columns
    out[...] = round_to(quotients, target)
    return np.flatnonzero(zero)


def _sums_exactly(bits: int, magnitudes: F64, exponent: int, source: DType) -> bool:
    """Whether float64 holds every partial sum exactly, in every order.

    All terms are multiples of one quantum, the last bit of numbers of the smallest exponent; the
    sum of their magnitudes has to stay below 2**52 quanta.
    """
    quantum_exponent = max(exponent, source.min_exponent) - source.precision + 1
    largest_exponent = math.frexp(float(magnitudes.max()))[1]
    return bits >= 0 and largest_exponent + bits <= quantum_exponent + 52


def _smallest_exponent(tile: F64) -> int:
    magnitudes = np.abs(tile)
    magnitudes[magnitudes == 0.0] = np.inf
    return math.frexp(float(magnitudes.min(initial=1e300)))[1] - 1


def _combine_nonfinite(
    combination: Combination, tile: F64, outs: Array, source: DType, target: DType
) -> None:
    """Combine a tile with NaN or infinities: IEEE 754 where they stand, exact means elsewhere."""
    bad = ~np.isfinite(tile).all(axis=0)
    columns = tile[:, bad]
    tile[:, bad] = 0.0
    _combine_finite(combination, tile, np.abs(tile).max(axis=1), outs, source, target)
    for index, (weights, out) in enumerate(zip(combination.matrix, outs, strict=True)):
        used = np.array(combination.exact[index], bool)
        values = (columns[used] * weights[used, None]).sum(axis=0)
        # An input that this row does not use may be what is not finite: then all is as usual.
        usual = np.isfinite(values)
        values[np.isnan(values)] = np.nan  # one NaN, whatever signs and payloads went in
        out[bad] = values.astype(target.numpy)
        if usual.any():
            rest = np.where(used[:, None], columns[:, usual], 0.0)
            out[np.flatnonzero(bad)[usual]] = _settle(combination, index, rest, target)


def _bits(array: Array) -> Array:
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _settle(combination: Combination, index: int, columns: F64, target: DType) -> Array:
    """Take steps 2 and 3: return the rounded means of columns that float64 could not settle."""
    weights = combination.matrix[index]
    used = np.array(combination.exact[index], bool)
    # What IEEE 754 gives a sum of zero terms: -0 only if every term is -0.
    negative = (np.signbit(columns) ^ np.signbit(weights)[:, None])[used].all(axis=0)
    values = np.where(negative, -0.0, 0.0).astype(target.numpy)
    nonzero = np.flatnonzero(columns[used].any(axis=0))
    if len(nonzero):
        columns = columns[:, nonzero]
        result, settled = _double_double(combination, index, columns, target)
        for column in np.flatnonzero(~settled).tolist():
            result[column] = _exact_mean(combination.exact[index], columns[:, column], target)
        values[nonzero] = result
    return values


def _two_sum(a: F64, b: F64) -> tuple[F64, F64]:
    """Return a + b and its rounding error, exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _halves(values: F64) -> tuple[F64, F64]:
    """Split into two summands of 26 bits, exactly (Veltkamp); NaN above 2**996."""
    scaled = values * 134217729.0
    high = scaled - (scaled - values)
    return high, values - high


def _remainder(dividend: F64, quotient: F64, divisor: F64) -> F64:
    """Return ``dividend - quotient * divisor`` exactly, for the rounded quotient (Dekker)."""
    product = quotient * divisor
    (q_high, q_low), (d_high, d_low) = _halves(quotient), _halves(divisor)
    error = ((q_high * d_high - product) + q_high * d_low + q_low * d_high) + q_low * d_low
    return (dividend - product) - error


def _double_double(
    combination: Combination, index: int, columns: F64, target: DType
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Step 2: the rounded means, and which of them are certain."""
    high, low, reach = np.zeros((3, columns.shape[1]))
    exact = np.full(len(high), combination.lossless[index])
    terms = 4
    for weight, column in zip(combination.matrix[index], columns, strict=True):
        scales = [part for part in _halves(weight) if part]
        for part in (part for part in _halves(column) if part.any()):
            for scale in scales:
                product = part * scale
                high, carry = _two_sum(high, product)
                low, lost = _two_sum(low, carry)
                exact &= (lost == 0.0) & ((np.abs(product) >= _SMALLEST) | (part == 0.0))
                reach += np.abs(product)
                terms += 1
    high, low = _two_sum(high, low)
    divisor = np.full_like(high, combination.totals[index])
    quotient = high / divisor
    rest, lost = _two_sum(_remainder(high, quotient, divisor), low)
    exact &= lost == 0.0
    correction = (rest - quotient * combination.low_totals[index]) / divisor
    exact &= _remainder(rest, correction, divisor) == 0.0  # no row with a low total is exact
    error = reach * (terms**2 * 8 * _UNIT**2)
    error += terms * _LOST * (1.0 + np.abs(columns).max(axis=0))
    error = error / divisor + np.abs(correction) * (4 * _UNIT)
    error += np.abs(quotient) * (8 * _UNIT**2)
    error[exact] = 0.0
    bounds = [
        round_to(_to_odd(*_two_sum(quotient, correction + side * error), target), target)
        for side in (-1.0, 1.0)
    ]
    return bounds[0], (_bits(bounds[0]) == _bits(bounds[1])) & np.isfinite(correction)


def _to_odd(high: F64, low: F64, target: DType) -> F64:
    """Round a pair to one float64 such that rounding that again to fewer bits is still right.

    Where anything was cut off, the last bit is made odd (Boldo & Melquiond 2008).
    """
    if target.precision == 53:
        return high
    even = (low != 0.0) & (high.view(np.int64) & 1 == 0)
    away = np.where((low > 0.0) == (high > 0.0), 1, -1)
    return (high.view(np.int64) + np.where(even, away, 0)).view(np.float64)


def _exact_mean(weights: tuple[Fraction, ...], column: F64, target: DType) -> Any:
    """Step 3: the rounded mean of one column, in exact arithmetic."""
    terms = (w * Fraction(value) for w, value in zip(weights, column.tolist(), strict=True))
    mean = sum(terms) / sum(weights)
    nearest = float(mean)  # Python rounds a ratio of integers correctly
    if not nearest:  # below float64's range; every narrower format rounds it to that signed zero
        return np.array([nearest]).astype(target.numpy)[0]
    rest = float((mean > nearest) - (mean < nearest))
    return round_to(_to_odd(np.array([nearest]), np.array([rest]), target), target)[0]
