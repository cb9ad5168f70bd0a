"""Rounding float64 to the formats of `wavg.dtypes`, once, to nearest even."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg.dtypes import DType

__all__ = ["bits_of", "odd", "round_to"]

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


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
    last = (bits >> np.uint64(drop)) & np.uint64(1)
    rounded = bits + (last + np.uint64((1 << (drop - 1)) - 1))
    rounded &= np.uint64(2**64 - (1 << drop))
    result = rounded.view(np.float64)
    tiny = np.abs(values) < math.ldexp(1.0, target.min_exponent)
    if tiny.any():  # subnormal results have a fixed quantum: let an addition round to it
        magic = math.ldexp(1.5, 52 + target.min_exponent - target.precision + 1)
        small = values[tiny]
        result[tiny] = np.copysign((small + magic) - magic, small)
    return result.astype(target.numpy)


def odd(high: F64, low: F64, target: DType) -> F64:
    """Round a pair to one float64 such that rounding that again to fewer bits is still right.

    Where anything was cut off, the last bit is made odd (Boldo & Melquiond 2008).
    """
    if target.precision == 53:
        return high
    even = (low != 0.0) & (high.view(np.int64) & 1 == 0)
    away = np.where((low > 0.0) == (high > 0.0), 1, -1)
    return (high.view(np.int64) + np.where(even, away, 0)).view(np.float64)


def bits_of(array: Array) -> Array:
    """View numbers as unsigned integers of their width."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))
