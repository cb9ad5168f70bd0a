"""What fractions lack: signs of zeros, infinities and NaN, by the rules of IEEE 754."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["first_nonfinite", "signed_zeros", "sums"]

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

_AT_ONCE = 1 << 13  # columns


def first_nonfinite(array: Array) -> tuple[int, int] | None:
    """Return row and column of a number that is NaN or infinite, or None if there is none."""
    for start in range(0, array.shape[1], _AT_ONCE):
        finite = np.isfinite(array[:, start : start + _AT_ONCE])
        if not finite.all():
            row, column = np.argwhere(~finite)[0].tolist()
            return row, start + column
    return None


def signed_zeros(weights: Sequence[int], columns: Array) -> F64:
    """Return what a sum is whose terms are zeros: -0 only if every term is -0.

    A weight of zero makes no term.

    >>> signed_zeros([1, 2, 0], np.array([[-0.0, -0.0], [-0.0, 0.0], [0.0, 0.0]]))
    array([-0.,  0.])
    """
    used = np.array(weights, dtype=bool)
    below = np.array([weight < 0 for weight in weights])
    negative = (np.signbit(columns) ^ below[:, None])[used].all(axis=0)
    return np.where(negative, -0.0, 0.0)


def sums(weights: F64, columns: F64) -> F64:
    """Return weighted sums of columns, infinities and NaN included; all weights are used.

    There is one NaN, whatever signs and payloads went in.
    """
    values: F64 = (columns * weights[:, None]).sum(axis=0)
    values[np.isnan(values)] = np.nan
    return values
