"""Weighted means of a few columns, exactly rounded: what the kernel's fast arithmetic leaves over.

Two ways to the one right answer. `double_double` takes about 106 bits for all columns at once
(Dekker 1971; Ogita, Rump & Oishi 2005); it also sees when nothing at all was lost, and so settles
exact ties, and says which columns it is certain of. `integer_mean` takes one column in whole
numbers of any length. Their last steps, `divide` and `ratio`, serve sums made elsewhere as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg.dtypes import DType
from wavg.rounding import bits_of, odd, round_to

__all__ = ["divide", "double_double", "integer_mean", "ratio"]

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

_UNIT = 2.0**-53
_SMALLEST = 2.0**-960  # products below this may lose bits to underflow
_LOST = 2.0**-1070  # bounds what underflow takes from a weight, or from a product


def double_double(
    weights: F64, total: tuple[float, float], lossless: bool, columns: F64, target: DType
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return the rounded means of columns, and which of them are certain.

    Parameters
    ----------
    weights
        Shape (inputs,), their magnitudes summing to at most one.
    total
        Their sum as an unevaluated pair.
    lossless
        Whether weights and the first of the pair are exactly what was asked for.
    columns
        Shape (inputs, columns).
    target
        The format to round to.
    """
    high, low, reach = np.zeros((3, columns.shape[1]))
    exact = np.full(len(high), lossless)
    terms = 4
    for weight, column in zip(weights, columns, strict=True):
        scales = [part for part in _halves(weight) if part]
        for part in (part for part in _halves(column) if part.any()):
            for scale in scales:
                product = part * scale
                high, carry = _two_sum(high, product)
                low, lost = _two_sum(low, carry)
                exact &= (lost == 0.0) & ((np.abs(product) >= _SMALLEST) | (part == 0.0))
                reach += np.abs(product)
                terms += 1
    error = reach * (terms**2 * 8 * _UNIT**2)
    error += terms * _LOST * (1.0 + np.abs(columns).max(axis=0))
    return divide(high, low, error, total, target, exact=exact)


def divide(
    high: F64,
    low: F64,
    error: F64,
    total: tuple[float, float],
    target: DType,
    *,
    exact: npt.NDArray[np.bool_],
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return rounded quotients ``(high + low) / total``, and which of them are certain.

    Parameters
    ----------
    high, low
        The dividends as unevaluated pairs, shape (columns,).
    error
        A bound on what the pairs may be off, what underflow takes included.
    total
        The divisor, positive, as a pair.
    target
        The format to round to.
    exact
        Where the pair and the first of the divisor are all there is: if their quotient comes out
        even, there is no error.
    """
    high, low = _two_sum(high, low)
    divisor = np.full_like(high, total[0])
    quotient = high / divisor
    rest, lost = _two_sum(_remainder(high, quotient, divisor), low)
    exact = exact & (lost == 0.0)
    correction = (rest - quotient * total[1]) / divisor
    exact &= _remainder(rest, correction, divisor) == 0.0  # what is not lossless never is
    error = error / divisor + np.abs(correction) * (4 * _UNIT)
    error += np.abs(quotient) * (8 * _UNIT**2)
    error[exact] = 0.0
    bounds = [
        round_to(odd(*_two_sum(quotient, correction + side * error), target), target)
        for side in (-1.0, 1.0)
    ]
    return bounds[0], (bits_of(bounds[0]) == bits_of(bounds[1])) & np.isfinite(correction)


def integer_mean(weights: Sequence[int], column: Sequence[float], target: DType) -> Any:
    """Return the rounded mean of one column; the weights are whole numbers of positive sum.

    >>> from wavg.dtypes import lookup
    >>> float(integer_mean([1, 2], [1.0, 2.5], lookup("float64")))
    2.0
    """
    ratios = [value.as_integer_ratio() for value in column]
    denominator = max(below for _, below in ratios)  # all are powers of two
    pairs = zip(weights, ratios, strict=True)
    above = sum(weight * top * (denominator // below) for weight, (top, below) in pairs)
    return ratio(above, denominator * sum(weights), target)


def ratio(above: int, below: int, target: DType) -> Any:
    """Return the quotient of two whole numbers, the second positive, rounded once.

    >>> from wavg.dtypes import lookup
    >>> float(ratio(1, 3, lookup("bfloat16")))
    0.333984375
    """
    try:
        nearest = above / below  # Python rounds a ratio of integers correctly
    except OverflowError:
        return np.array([np.inf if above > 0 else -np.inf]).astype(target.numpy)[0]
    if not nearest:  # below float64's range; every narrower format rounds it to that signed zero
        return np.array([nearest]).astype(target.numpy)[0]
    top, bottom = nearest.as_integer_ratio()
    rest = float((above * bottom > top * below) - (above * bottom < top * below))
    return round_to(odd(np.array([nearest]), np.array([rest]), target), target)[0]


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
