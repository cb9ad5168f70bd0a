"""Weights prepared for the kernel: scaled, summed, as whole numbers, with what is known of them.

It knows a matrix of weights, and no arrays of numbers to be weighed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from wavg.errors import WeightError

__all__ = ["Combination"]

F64 = npt.NDArray[np.float64]

_WEIGHT_BITS = 28  # of whole-number weights' sum; more, and the kernel's theorem no longer holds


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
    integers
        For each row, its weights as whole numbers of a common factor, exactly.
    lossless
        For each row, whether `matrix` and `totals` alone hold exactly those.
    tame
        For each row, whether its weights do not nearly cancel: float64 can divide by its total.
    bits
        For a row of small whole numbers, the bits of the sum of their magnitudes; -1 where that
        exceeds 28 bits, for then sums are not known to be exact.
    growth
        For each row, how many times its largest number a mean may be; of no use if it is not tame.
    """

    matrix: F64
    totals: F64
    low_totals: F64
    integers: tuple[tuple[int, ...], ...]
    lossless: tuple[bool, ...]
    tame: tuple[bool, ...]
    bits: tuple[int, ...]
    growth: F64

    @classmethod
    def of(cls, weights: npt.ArrayLike) -> Combination:
        """Prepare weights of shape (inputs,) or (outputs, inputs).

        Raises
        ------
        WeightError
            For no weights, weights that are not finite, or a row that sums to exactly zero.

        Examples
        --------
        >>> Combination.of([[1, 2, 3], [0.1, 0.1, 0.1]]).integers
        ((1, 2, 3), (1, 1, 1))
        """
        rows = np.atleast_2d(np.asarray(weights, dtype=np.float64))
        if rows.ndim != 2 or rows.size == 0:
            raise WeightError("there must be at least one weight")
        if not np.isfinite(rows).all():
            raise WeightError(f"weights must be finite numbers, not {_short(rows)}")
        matrix, totals = np.empty_like(rows), np.empty((2, len(rows)))
        integers, lossless, bits = [], [], []
        for index, row in enumerate(rows):
            whole = _whole_numbers(row)
            if sum(whole) == 0:
                raise WeightError(
                    f"the weights {_short(row)} sum to zero, so there is no average; "
                    "change one of them"
                )
            # A power of two: exact, but for weights some 2**1000 times smaller than the largest.
            scale = Fraction(1, 1 << (max(map(abs, whole)).bit_length() + len(row).bit_length()))
            matrix[index] = [float(value * scale) for value in whole]
            total = sum(whole) * scale
            totals[:, index] = float(total), float(total - Fraction(float(total)))
            integers.append(whole)
            same = all(Fraction(a) == b * scale for a, b in zip(matrix[index], whole, strict=True))
            lossless.append(same and Fraction(totals[0, index]) == total)
            size = sum(map(abs, whole)).bit_length()
            bits.append(size if size <= _WEIGHT_BITS else -1)
        with np.errstate(all="ignore"):  # of rows that are not tame
            growth = np.abs(matrix / totals[0, :, None]).sum(axis=1)
        return cls(
            matrix,
            totals[0],
            totals[1],
            tuple(integers),
            tuple(lossless),
            tuple((totals[0] > 2.0**-900).tolist()),
            tuple(bits),
            growth,
        )

    def error(self, unit: float) -> F64:
        """Bound what a mean in floating point may be off, in parts of the largest number.

        Inputs give as many products and additions, and weights are rounded; so is what is done with
        the bound. A hundredth is for slack.

        Parameters
        ----------
        unit
            Half the distance from 1 to the next number.
        """
        errors: F64 = 1.01 * (self.matrix.shape[1] + 6) * unit * self.growth
        return errors


def _short(values: F64) -> str:
    text = [f"{value:g}" for value in values.ravel().tolist()]
    return "[" + ", ".join(text if len(text) <= 8 else [*text[:4], "…", *text[-3:]]) + "]"


def _whole_numbers(row: F64) -> tuple[int, ...]:
    """Return whole numbers in the same proportions, without a common factor, of sum >= 0."""
    fractions = [Fraction(value) for value in row.tolist()]
    denominator = max(value.denominator for value in fractions)  # all are powers of two
    whole = [int(value * denominator) for value in fractions]
    factor = (math.gcd(*whole) or 1) * (1 if sum(whole) >= 0 else -1)
    return tuple(value // factor for value in whole)
