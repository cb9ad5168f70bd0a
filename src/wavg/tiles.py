"""Step 1 of the kernel in NumPy: a matrix product a tile, in float32 for bfloat16, else in float64.

It is for the formats that the compiled step lacks, and where no compiler was at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg.combination import Combination
from wavg.dtypes import DType
from wavg.ieee import signed_zeros
from wavg.leftovers import Portion, at_once, fits
from wavg.rounding import bits_of, round_to

__all__ = ["Tiles", "scratch_bytes", "span"]

Array = npt.NDArray[Any]

_TILE_ELEMENTS = 10 << 16  # widened at once, all rows together: 65,536 columns of ten inputs
_WIDEST_TILE = 1 << 16


def span(inputs: int, outputs: int, target: DType) -> int:
    """Return the columns that are gone through at once: a whole number of tiles."""
    tile = _tile_width(inputs, outputs)
    if target.precision == 53:
        return min(tile, at_once(inputs))  # all of it is left over
    return tile * max(1, 4 // outputs)


def scratch_bytes(inputs: int, outputs: int, source: DType, target: DType, columns: int) -> int:
    """Bound what is allocated for portions of so many columns."""
    tile = min(_tile_width(inputs, outputs), columns)
    wide = np.dtype(_start(source, target)).itemsize
    widened = tile * inputs * (wide + 4 * (source.name == "float16"))
    return widened + outputs * columns * (2 * wide + 2 * target.itemsize + 1)


def _tile_width(inputs: int, outputs: int) -> int:
    """Columns that are widened at once."""
    return max(256, min(_WIDEST_TILE, _TILE_ELEMENTS // (inputs + 2 * outputs - 2)))


def _start(source: DType, target: DType) -> type[np.float32] | type[np.float64]:
    return np.float32 if source.precision <= 8 and target.precision <= 8 else np.float64


class Tiles:
    """Applies a combination to blocks; keeps its scratch memory between them.

    Parameters
    ----------
    combination
        R rows of K weights.
    source, target
        The formats of what goes in and of what comes out.
    """

    def __init__(self, combination: Combination, source: DType, target: DType) -> None:
        self._combination, self._source, self._target = combination, source, target
        outputs, inputs = combination.matrix.shape
        self._start = _start(source, target)
        self._tile = _tile_width(inputs, outputs)
        self._span = span(inputs, outputs, target)
        self._reserved = 0
        # The sums of float16 need no bound where float64 holds them exactly, whatever the numbers.
        self._exact = (
            source.name == "float16"
            and target.precision < 53
            and all(fits(bits, 16, source.min_exponent, source) for bits in combination.bits)
        )
        with np.errstate(all="ignore"):  # of rows that are not tame, nothing of this is used
            matrix = combination.matrix / (1.0 if self._exact else combination.totals[:, None])
            if source.name == "float16":  # `_widen_half` leaves a factor for the weights
                matrix = np.ldexp(matrix, 112)
            self._matrix = matrix.astype(self._start)
        limits = np.finfo(self._start)
        self._error = combination.error(float(limits.epsneg))
        self._least = (inputs + 6) * float(limits.smallest_subnormal)  # what products may lose
        self._range = float(limits.max) / 4

    def portions(self, block: Array, outs: Array) -> Iterator[Portion]:
        """Write what this step settles to the outputs; yield portions in which it leaves some."""
        for start in range(0, block.shape[1], self._span):
            raw, part = (array[:, start : start + self._span] for array in (block, outs))
            largest = _largest(raw, self._source)
            if not math.isfinite(largest):
                yield Portion(start, raw, None)
            elif self._hopeless(largest):
                yield Portion(start, raw, np.broadcast_to(True, part.shape))
            elif self._exact:
                self._quotients(raw, part)
            else:
                yield Portion(start, raw, self._bracket(raw, part, largest))

    def _hopeless(self, largest: float) -> bool:
        """Whether this arithmetic cannot vouch for the last bit of the outputs."""
        growth = self._combination.growth.max()
        return (
            self._target.precision == 53
            or not all(self._combination.tame)
            or not largest * growth < self._range
        )

    def _reserve(self, width: int) -> None:
        """Make scratch arrays for a span; they are kept for the next span of this width."""
        if self._reserved == width:
            return
        self._reserved = width
        outputs, inputs = self._combination.matrix.shape
        tile = min(self._tile, width)
        self._wide = np.empty((inputs, tile), self._start)
        self._half = np.empty((inputs, tile * (self._source.name == "float16")), np.float32)
        self._sums: Array = np.empty((outputs, width), self._start)
        self._shifted: Array = np.empty((outputs, width), self._start)
        self._other = np.empty((outputs, width), self._target.numpy)
        self._flags = np.empty((outputs, width), bool)

    def _multiply(self, raw: Array) -> None:
        """Write the products of the weights and the numbers to the sums, a tile at a time.

        What follows works on whole spans. NumPy gives the interpreter's lock up and takes it back
        with every operation, and threads that do so every ten microseconds run one after the other.
        """
        for start in range(0, raw.shape[1], self._tile):
            columns = slice(start, min(start + self._tile, raw.shape[1]))
            wide = self._wide[:, : columns.stop - start]
            if self._source.name == "float16":
                half = self._half[:, : columns.stop - start]
                _widen_half(raw[:, columns], half)
                np.copyto(wide, half)
            else:
                np.copyto(wide, raw[:, columns], casting="unsafe")
            np.matmul(self._matrix, wide, out=self._sums[:, columns])

    def _bound(self, largest: float) -> Array:
        """Bound what each row's means may be off, of numbers up to the largest."""
        bound: Array = self._error * largest + self._least
        return bound

    def _bracket(self, raw: Array, outs: Array, largest: float) -> npt.NDArray[np.bool_]:
        """Write the lower ends of the intervals, rounded; return where the upper ones differ."""
        self._reserve(raw.shape[1])
        self._multiply(raw)
        error = self._bound(largest)[:, None].astype(self._start)
        np.subtract(self._sums, error, out=self._shifted)
        self._round(outs)
        np.add(self._sums, error, out=self._shifted)
        self._round(self._other)
        np.not_equal(bits_of(outs), bits_of(self._other), out=self._flags)
        if self._target.bits == 8:  # some of these formats have one NaN for both ends
            self._flags |= np.isnan(outs)
        return self._flags

    def _round(self, out: Array) -> None:
        """Round what is in `_shifted`, once."""
        if self._start == np.float64 and self._target.precision < 11:
            np.copyto(out, round_to(self._shifted, self._target))
        else:
            np.copyto(out, self._shifted, casting="unsafe")

    def _quotients(self, raw: Array, outs: Array) -> None:
        """Write the means, whose sums are exact: step 2 for a whole span."""
        self._reserve(raw.shape[1])
        self._multiply(raw)
        np.divide(self._sums, self._combination.totals[:, None], out=self._sums)
        for integers, quotients, out in zip(
            self._combination.integers, self._sums, outs, strict=True
        ):
            np.copyto(out, round_to(quotients, self._target))
            zeros, most = np.flatnonzero(quotients == 0.0), at_once(len(raw))
            for start in range(0, len(zeros), most):
                some = zeros[start : start + most]
                out[some] = signed_zeros(integers, np.take(raw, some, axis=1))


def _largest(raw: Array, source: DType) -> float:
    """Return the largest magnitude; NaN or infinite if anything is."""
    if source.bits != 16:
        low, high = raw.min(), raw.max()  # both are NaN where a NaN is
        return float(np.maximum(-low.astype(np.float64), high.astype(np.float64)))
    # As whole numbers: NumPy has no fast comparison of 16-bit floats. The largest signed one is the
    # largest positive number, the largest unsigned one the largest of the negative, if any.
    signed, unsigned = int(raw.view(np.int16).max()), int(raw.view(np.uint16).max())
    bits = np.array([max(signed, unsigned & 0x7FFF)], np.uint16)
    return float(bits.view(source.numpy).astype(np.float64)[0])


def _widen_half(raw: Array, out: Array) -> None:
    """Write ``raw * 2**-112`` for finite float16 as float32: exact, and faster than NumPy's cast.

    A float16 has the layout of a float32 that lost 13 bits of its mantissa and three of its
    exponent, but for the bias: put in its place it is the number over 2**112. Sign extension fills
    the exponent's upper bits, which the mask clears again.
    """
    whole = out.view(np.int32)
    np.copyto(whole, raw.view(np.int16))
    np.left_shift(whole, 13, out=whole)
    np.bitwise_and(whole, np.int32(-0x70002000), out=whole)
