"""Running sums of models: ``sum = keep * sum + add * model``, in place, a block at a time.

A sum that is only added to (equal, linear and all whose ``keep`` is 1) is exact. Every addition
gives its rounding error as well (Knuth); what one float64 number cannot hold goes to the next
*level*, another array, if many elements need it, or else to a table of the few that do
(Shewchuk 1997). Most models of float32 and below need no second array: their sums fit 53 bits but
for a few elements in a thousand. So the mean can be rounded once, as `wavg.average` does.

A sum that is also scaled (an EMA) has rounding errors anyway, and is one array.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg.blocks import BLOCK, Scratch, blocks, largest
from wavg.dtypes import DType
from wavg.exact import divide, ratio
from wavg.rounding import round_to

__all__ = ["RunningSum", "Table"]

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

_MANY = 64  # another array is made when one in so many elements needs it
_WEIGHT_BITS = 28  # as in `wavg.kernel`: a quotient of an exact sum may be rounded twice up to here
_HALF = 26  # bits of a piece: the product of one with 27 bits is exact
_MODEST = (2.0**-900, 2.0**960)  # magnitudes that `divide` can take without underflow or overflow


class Table:
    """Exact numbers at a few places of a long array, kept by block."""

    def __init__(self) -> None:
        self._blocks: dict[int, dict[int, Fraction]] = {}
        self.count = 0

    def items(self, start: int = 0, stop: int | None = None) -> list[tuple[int, Fraction]]:
        """Return places and numbers from `start` to `stop`, in order of the places."""
        end = math.inf if stop is None else stop
        keys = sorted(self._blocks) if stop is None else range(start // BLOCK, -(-stop // BLOCK))
        found = (item for key in keys for item in sorted(self._blocks.get(key, {}).items()))
        return [item for item in found if start <= item[0] < end]

    def set(self, place: int, value: Fraction) -> None:
        """Put a number in a place; zero is none."""
        block = self._blocks.setdefault(place // BLOCK, {})
        self.count += (value != 0) - (place in block)
        if value:
            block[place] = value
        else:
            block.pop(place, None)

    def arrays(self) -> tuple[Array, Array]:
        """Return the places, and numbers whose sums by place are the numbers there."""
        places, values = [], []
        for place, value in self.items():
            while value:
                places.append(place)
                values.append(float(value))
                value -= Fraction(values[-1])
        return np.array(places, np.int64), np.array(values, np.float64)

    def fill(self, places: Array, values: Array) -> None:
        """Take up what `arrays` returned."""
        for place, value in zip(places.tolist(), values.tolist(), strict=True):
            self.add(place, value)

    def add(self, place: int, value: float) -> None:
        """Add to what is in a place."""
        before = self._blocks.get(place // BLOCK, {}).get(place, Fraction(0))
        self.set(place, before + Fraction(value))


class RunningSum:
    """The weighted sum of one leaf of the models that have come.

    Parameters
    ----------
    size
        Real numbers in the leaf.
    source
        Their format.
    precision
        ``"float64"``, or ``"float32"``: rounded to that after every update, never exact.
    exact
        Whether sums are expected to be only added to; a leaf of float64 then gets a second level
        at once, rather than when the second model comes. Not with float32.

    Attributes
    ----------
    levels
        Arrays of shape (size,) whose unevaluated sum is the sum, the largest part first.
    rest
        What they cannot hold.
    """

    def __init__(self, size: int, source: DType, precision: str, *, exact: bool) -> None:
        self._source = source
        # -0.0 is the neutral element of addition: a sum of negative zeros stays one.
        self.levels: list[Array] = [np.full(size, -0.0, precision)]
        self.rest = Table()
        if exact and source.precision == 53:
            self.levels.append(np.zeros(size))

    def largest(self, scratch: Scratch) -> float:
        """Return the largest magnitude."""
        return max((largest(block, scratch) for _, block in blocks(self.levels[0])), default=0.0)

    def forget(self) -> None:
        """Begin anew."""
        self.levels[0].fill(-0.0)
        for level in self.levels[1:]:
            level.fill(0.0)
        self.rest = Table()

    def scale(self, start: int, values: F64, keep: float, add: float, scratch: Scratch) -> None:
        """Set ``sum = keep * sum + add * values`` for the elements from `start`, rounded."""
        place = slice(start, start + len(values))
        first = self.levels[0][place]
        total, part = scratch.total[: len(values)], scratch.part[: len(values)]
        np.copyto(total, first)
        for level in self.levels[1:]:  # what was exact so far is no longer
            np.add(total, level[place], out=total)
            level[place] = 0.0
        for index, value in self.rest.items(start, place.stop) if self.rest.count else ():
            total[index - start] += float(value)
            self.rest.set(index, Fraction(0))
        if keep != 1.0:
            np.multiply(total, keep, out=total)
        np.multiply(values, add, out=part)
        np.add(total, part, out=total)
        np.copyto(first, total, casting="same_kind")

    def add(
        self, start: int, values: F64, weight: float, scratch: Scratch, *, finite: bool
    ) -> None:
        """Add ``weight * values`` to the elements from `start`, exactly.

        Parameters
        ----------
        finite
            Whether all values are known to be.
        """
        if not finite:
            usual = np.isfinite(values)
            self.levels[0][start : start + len(values)][~usual] += weight * values[~usual]
            values = np.where(usual, values, -0.0)
        carry = scratch.carry[: len(values)]
        bits, precision = _significant_bits(weight), self._source.precision
        whole = bits == 1 or bits + precision <= 53
        for factor in (weight,) if whole else _pieces(weight):
            for take in (_all,) if whole or precision <= _HALF else (_upper, _lower):
                take(values, carry, scratch)
                if factor != 1.0:
                    np.multiply(carry, factor, out=carry)
                self._add_carry(start, carry, scratch, finite)

    def _add_carry(self, start: int, carry: F64, scratch: Scratch, finite: bool) -> None:
        """Add to the first level, its rounding error to the second, and so on; spoils `carry`."""
        place = slice(start, start + len(carry))
        total, part = scratch.total[: len(carry)], scratch.part[: len(carry)]
        for level in self.levels:
            _two_sum(level[place], carry, total, part)
            if not finite:
                carry[~np.isfinite(carry)] = 0.0
            if not carry.any():
                return
        left = np.flatnonzero(carry)
        if (self.rest.count + len(left)) * _MANY > len(self.levels[0]):
            self._deepen()
            _two_sum(self.levels[-1][place], carry, total, part)
            left = np.flatnonzero(carry)
        for index, value in zip((left + start).tolist(), carry[left].tolist(), strict=True):
            self.rest.add(index, value)

    def _deepen(self) -> None:
        """Add a level, and move to it what it can hold of what was in the table."""
        level = np.zeros_like(self.levels[0])
        for index, value in self.rest.items():
            level[index] = float(value)
            self.rest.set(index, value - Fraction(float(value)))
        self.levels.append(level)

    def mean(self, total: Fraction | float, target: DType) -> Array:
        """Return the sum over a total, shape (size,), rounded to a format.

        Parameters
        ----------
        total
            Of the weights; a fraction where the sum was only added to, and is exact.
        """
        out = np.empty(len(self.levels[0]), target.numpy)
        with np.errstate(all="ignore"):
            for start in range(0, len(out), BLOCK):
                place = slice(start, min(start + BLOCK, len(out)))
                if isinstance(total, Fraction):
                    out[place] = self._exact_mean(place, total, target)
                else:
                    out[place] = _quotients(self.levels[0][place], total, target)
        return out

    def _exact_mean(self, place: slice, total: Fraction, target: DType) -> Array:
        start, stop = place.start, place.stop
        first, few_bits = self.levels[0][place], _significant_bits(total) <= _WEIGHT_BITS
        rest = {index - start: value for index, value in self.rest.items(start, stop)}
        if len(self.levels) == 1 and target.precision <= 24 and few_bits:
            # The theorem in `wavg.kernel`: S / T may be rounded to float64 first if S is exact.
            values, certain = _quotients(first, float(total), target), np.ones(len(first), bool)
        else:
            values, certain = self._divide(place, total, target)
        certain[list(rest)] = False
        certain |= ~np.isfinite(first)
        for index in np.flatnonzero(~certain).tolist():
            parts = (Fraction(float(level[start + index])) for level in self.levels)
            exact = (sum(parts) + rest.get(index, 0)) / total
            values[index] = ratio(exact.numerator, exact.denominator, target)
        return values

    def _divide(
        self, place: slice, total: Fraction, target: DType
    ) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return the means, without what is in the table, and which of them are certain."""
        parts = [level[place] * math.copysign(1.0, total) for level in self.levels]
        first, low = parts[0], parts[1] if len(parts) > 1 else np.zeros_like(parts[0])
        error = np.zeros_like(first)
        for part in parts[2:]:
            error += np.abs(part) * 1.01
        high = float(abs(total))
        divisor = high, float(abs(total) - Fraction(high))
        exact = np.full(len(first), not divisor[1]) & (error == 0.0)
        values, certain = divide(first, low, error, divisor, target, exact=exact)
        magnitude = np.abs(first + low)
        certain &= (magnitude > _MODEST[0]) & (magnitude < _MODEST[1])
        plain = (first == 0.0) & (low == 0.0) & (error == 0.0)  # zeros, and infinity and NaN
        plain |= ~np.isfinite(first)
        values[plain] = _quotients(first[plain], high, target)
        return values, certain | plain


def _quotients(sums: Array, total: float, target: DType) -> Array:
    quotients = sums.astype(np.float64)
    np.divide(quotients, total, out=quotients)
    quotients[np.isnan(quotients)] = np.nan  # one NaN, whatever signs and payloads went in
    return round_to(quotients, target)


def _two_sum(a: F64, b: F64, total: F64, part: F64) -> None:
    """Set a to a + b and b to its rounding error, exactly (Knuth), by way of scratch arrays."""
    np.add(a, b, out=total)
    np.subtract(total, a, out=part)
    np.subtract(b, part, out=b)
    np.subtract(total, part, out=part)
    np.subtract(a, part, out=part)
    np.add(part, b, out=b)
    np.copyto(a, total)


def _all(values: F64, out: F64, scratch: Scratch) -> None:
    np.copyto(out, values)


def _upper(values: F64, out: F64, scratch: Scratch) -> None:
    """Write the upper 26 bits of each value."""
    whole = scratch.whole[: len(values)]
    np.bitwise_and(values.view(np.int64), -(1 << 27), out=whole)
    np.copyto(out, whole.view(np.float64))


def _lower(values: F64, out: F64, scratch: Scratch) -> None:
    """Write what `_upper` leaves: 27 bits, and the sign, of zeros as well."""
    _upper(values, out, scratch)
    np.subtract(values, out, out=out)
    np.copysign(out, values, out=out)


def _significant_bits(value: float | Fraction) -> int:
    """Return the bits from the first to the last that is set; those of a fraction's numerator."""
    whole = abs(value.as_integer_ratio()[0])
    return (whole // (whole & -whole)).bit_length() if whole else 0


def _pieces(weight: float) -> Iterator[float]:
    """Yield summands of a weight, of at most 26 bits each."""
    while weight:
        mantissa, exponent = math.frexp(weight)
        piece = math.ldexp(math.trunc(math.ldexp(mantissa, _HALF)), exponent - _HALF)
        yield piece
        weight -= piece
