"""Weighted sums of many inputs at once: widen, combine, round.

It knows arrays of one number format and a matrix of weights; nothing of files, names or steps, nor
of running sums, which `wavg.sums` keeps.

The result is *defined* as the correctly rounded weighted mean: the exact value of
``Σ w_k x_k / Σ w_k`` over the given float64 weights, rounded once, to nearest even, into the output
format. That is what makes the bytes independent of block sizes, workers and the order of addition:
there is only one right answer. It is reached on a ladder; each step takes what the step before
could not settle:

1. The weighted sums of all elements. With ``e`` a bound on the error, an element is settled when
   ``q - e`` and ``q + e`` round to the same output: rounding is monotone, so the exact value rounds
   there too. What remains lies next to the midpoint of two outputs. This step exists twice:
   compiled (``_compiled.c``: float64, bounds column by column, exact sums recognised, at about the
   speed of memory; it can read the rows from open files itself), and in NumPy (one matrix product,
   in float32 for bfloat16, else in float64) for formats that the compiled one lacks and where no C
   compiler was at hand. As the result is defined, they cannot differ in a byte.
2. float64 for those, where it is known to hold every partial sum of these very numbers exactly, as
   it nearly always is for whole-number weights. This settles exact ties. In NumPy float16 starts
   here, for its sums are always exact.
3. Double-double, and then whole numbers of any length (`wavg.exact`).

Step 2 rounds a quotient ``S / T`` to float64 and then to at most 24 bits, twice. That is harmless
where the sum ``S`` is exact: a midpoint ``m`` of the narrow format has at most 25 bits and ``T`` at
most 28, so ``S`` and ``m T`` are multiples of a common quantum that exceeds ``T`` times half a unit
of float64 at ``m``; the quotient is the midpoint, or float64 tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg.combination import Combination
from wavg.dtypes import DType, dtype_of
from wavg.errors import NonFiniteError, WavgError
from wavg.exact import double_double, integer_mean
from wavg.rounding import bits_of, round_to

try:
    from wavg import _compiled
except ImportError:  # no compiler at hand when wavg was installed
    _compiled = None  # type: ignore[assignment]

__all__ = [
    "COMPILED",
    "Combiner",
    "combine",
    "reads_files",
    "scratch_bytes",
    "span",
]

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

COMPILED = _compiled is not None  # whether step 1 is
_COMPILED_FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2}
_TILE_ELEMENTS = 10 << 16  # widened at once, all rows together: 65,536 columns of ten inputs
_WIDEST_TILE = 1 << 16
_FEW = 400  # numbers in so few columns are settled sooner one by one than all at once
_DENSE = 8  # if more than one in so many columns is left over, it is sooner to do all of them
_PORTION = 640 << 10  # bytes of all inputs that are read, and combined while in the nearest cache
_SHORTEST = 8 << 10  # bytes that are worth a reading
_NONE: Array = np.empty(0, np.uint8)
_SETTLED = 1 << 13  # columns that steps 2 and 3 take at once, and
_SETTLED_NUMBERS = 1 << 17  # numbers in these, if inputs are many


def span(inputs: int, outputs: int, target: DType) -> int:
    """Return the columns that a `Combiner` settles at once: a whole number of its tiles."""
    tile = _tile_width(inputs, outputs)
    if target.precision == 53:
        return min(tile, _settled(inputs))  # step 3 for all of it
    return tile * max(1, 4 // outputs)


def _settled(inputs: int) -> int:
    """Columns that steps 2 and 3 take at once."""
    return max(64, min(_SETTLED, _SETTLED_NUMBERS // inputs))


def _tile_width(inputs: int, outputs: int) -> int:
    """Columns that are widened at once."""
    return max(256, min(_WIDEST_TILE, _TILE_ELEMENTS // (inputs + 2 * outputs - 2)))


def portion_of(inputs: int, source: DType) -> int:
    """Return the columns that `Combiner.from_files` reads at once."""
    return max(_SHORTEST, _PORTION // inputs) // source.itemsize


def scratch_bytes(
    inputs: int, outputs: int, source: DType, target: DType, block: int, *, from_files: bool = False
) -> int:
    """Bound what a `Combiner` allocates: its tile, and what settling left-over columns takes."""
    block *= 2  # a complex number is two
    if reads_files(source, target):
        width = portion_of(inputs, source) if from_files else block
        first_step = outputs * (width + (2 << 13))  # flags, a tile's sums, what is checked at once
        if from_files:
            first_step += inputs * portion_of(inputs, source) * source.itemsize
    else:
        width = min(span(inputs, outputs, target), block)
        tile = min(_tile_width(inputs, outputs), width)
        wide = 8 if _start(source, target) == np.float64 else 4
        first_step = tile * inputs * (wide + 4 * (source.name == "float16"))
        first_step += outputs * width * (2 * wide + 2 * target.itemsize + 1)
    left_over = min(_settled(inputs), width) * (inputs * (32 + source.itemsize) + 200)
    return first_step + width * 8 // _DENSE + left_over + (1 << 18)


def reads_files(source: DType, target: DType) -> bool:
    """Whether `Combiner.from_files` works for these formats: where step 1 is compiled for them."""
    formats = source.name in _COMPILED_FORMATS and target.name in _COMPILED_FORMATS
    return formats and _compiled is not None


def _start(source: DType, target: DType) -> type[np.float32] | type[np.float64]:
    return np.float32 if source.precision <= 8 and target.precision <= 8 else np.float64


class Combiner:
    """Applies a combination to blocks of one format; keeps its scratch memory between them.

    Parameters
    ----------
    combination
        R rows of K weights.
    source, target
        The formats of what goes in and of what comes out.
    allow_nonfinite
        Let NaN and infinities through by the rules of IEEE 754 in place of an error.

    Notes
    -----
    Not to be shared between threads.
    """

    def __init__(
        self,
        combination: Combination,
        source: DType,
        target: DType,
        *,
        allow_nonfinite: bool = False,
    ) -> None:
        self._combination, self._source, self._target = combination, source, target
        self._allow_nonfinite = allow_nonfinite
        outputs, inputs = combination.matrix.shape
        self._start = _start(source, target)
        self._tile = _tile_width(inputs, outputs)
        self._span = span(inputs, outputs, target)
        self._settled = _settled(inputs)
        self._sums = np.empty((outputs, 0), self._start)
        self._left = np.empty((outputs, 0), bool)
        self._block: Array = np.empty((0, 0), source.numpy)
        with np.errstate(all="ignore"):  # of rows that are not tame, nothing of this is used
            normal = combination.matrix / combination.totals[:, None]
            self._normal = normal.astype(self._start)
        self._exact_matrix = combination.matrix
        self._always_exact = target.precision < 53 and all(
            _fits(bits, _largest_exponent(source), source.min_exponent, source)
            for bits in combination.bits
        )
        if source.name == "float16":  # `_widen_half` leaves a factor for the weights
            with np.errstate(all="ignore"):
                self._normal = np.ldexp(normal, 112)
            self._exact_matrix = np.ldexp(combination.matrix, 112)
        # K products, K additions, rounded weights, and q ± e itself; a hundredth for slack.
        unit = float(np.finfo(self._start).epsneg)
        self._growth = np.abs(normal).sum(axis=1)
        self._error = 1.01 * (inputs + 6) * unit * self._growth
        self._least = (inputs + 6) * float(np.finfo(self._start).smallest_subnormal)
        self._range = float(np.finfo(self._start).max) / 4
        self._overflows = source != target or bool((combination.matrix < 0).any())
        self._compiled = reads_files(source, target)
        if self._compiled:
            self._compile()

    def __call__(self, block: Array, outs: Array) -> None:
        """Write ``outs = (W @ block) / totals``, block of shape (K, B), outs of shape (R, B).

        Raises
        ------
        NonFiniteError
            A value of the block is NaN or infinite, or a result does not fit the output format.
            Attributes: ``input`` (the row, None for a result), ``index`` (the column), ``value``.
        """
        with np.errstate(all="ignore"):
            if self._compiled and block.flags.c_contiguous and outs.flags.carray:
                self._combine_compiled(block, outs)
                return
            for start in range(0, block.shape[1], self._span):
                stop = min(block.shape[1], start + self._span)
                self._combine(block[:, start:stop], outs[:, start:stop], start)

    def from_files(self, descriptors: Array, offsets: Array, outs: Array) -> None:
        """Do what a call does for a block whose rows lie in files; read it piece by piece.

        What is read is still in the nearest cache when it is combined.

        Parameters
        ----------
        descriptors
            Of the open files, shape (K,), intc.
        offsets
            Of the first column, in bytes, shape (K,), int64.
        outs
            Shape (R, B), contiguous.

        Raises
        ------
        NonFiniteError
            As by a call.
        EOFError
            The file of the input that is its only argument ends too early.
        OSError
            A file cannot be read; ``filename`` is the number of the input.
        """
        inputs, portion = len(descriptors), portion_of(len(descriptors), self._source)
        if self._block.shape != (inputs, portion):
            self._block = np.empty((inputs, portion), self._source.numpy)
        with np.errstate(all="ignore"):
            self._combine_compiled(self._block, outs, descriptors, offsets)

    def _compile(self) -> None:
        """Put the combination into the form that the compiled step takes."""
        combination, rows = self._combination, []
        self._weights = combination.matrix.copy()
        for index, bits in enumerate(combination.bits):
            integers = combination.integers[index]
            total, window = float(combination.totals[index]), math.inf
            error = 1.01 * (len(integers) + 6) * 2.0**-53 * self._growth[index]
            if bits >= 0:  # small whole numbers: exact while no term is too small for the others
                self._weights[index] = integers
                total = float(sum(integers))
                window = math.ldexp(sum(map(abs, integers)), self._source.precision - 52)
            vanished = (combination.matrix[index] != 0) != (np.array(integers) != 0)
            if not combination.tame[index] or vanished.any():  # it settles no more than zeros
                self._weights[index] = np.sign(np.array(integers, dtype=object)).astype(np.float64)
                total = 1.0
                error = math.inf
            rows.append((total, window, error))
        self._rows = np.array(rows)
        self._counts = np.zeros(len(rows), np.int64)

    def _combine_compiled(
        self, block: Array, outs: Array, descriptors: Array = _NONE, offsets: Array = _NONE
    ) -> None:
        """Step 1 compiled, and what it leaves over, portion by portion."""
        outputs, columns = outs.shape
        inputs, portion = block.shape
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
                _COMPILED_FORMATS[self._source.name],
                _COMPILED_FORMATS[self._target.name],
                stop,
                _bytes(descriptors),
                _bytes(offsets),
            )
            width = stop - first
            raw = block.reshape(-1)[: inputs * width].reshape(inputs, width)
            if finite:
                left = self._left.reshape(-1)[: outputs * width].reshape(outputs, width)
                for index, count in enumerate(self._counts.tolist()):
                    self._settle_flagged(index, count, left[index], raw, outs[index, first:stop])
            else:
                self._combine_nonfinite(raw, outs[:, first:stop], first)
        self._check_range(outs, 0)

    def _reserve(self, width: int) -> None:
        """Make scratch arrays for a span; they are kept for the next span of this width."""
        if self._sums.shape[1] == width:
            return
        outputs, inputs = self._combination.matrix.shape
        tile = min(self._tile, width)
        self._wide = np.empty((inputs, tile), self._start)
        self._half = np.empty((inputs, tile * (self._source.name == "float16")), np.float32)
        self._sums = np.empty((outputs, width), self._start)
        self._shifted = np.empty((outputs, width), self._start)
        self._other = np.empty((outputs, width), self._target.numpy)
        self._flags = np.empty((outputs, width), bool)

    def _combine(self, raw: Array, outs: Array, start: int) -> None:
        largest = _largest(raw, self._source)
        if not math.isfinite(largest):
            self._combine_nonfinite(raw, outs, start)
        elif (
            self._target.precision == 53
            or not all(self._combination.tame)
            or not largest * self._growth.max() < self._range
        ):
            self._all_left_over(raw, outs)  # float64 cannot vouch for its own last bit
        elif self._always_exact:
            self._quotients_of_exact_sums(raw, outs)
        else:
            self._interval(raw, outs, largest)
        self._check_range(outs, start)

    def _check_range(self, outs: Array, start: int) -> None:
        if not self._overflows or self._allow_nonfinite:
            return
        found = _first_nonfinite(outs)
        if found is not None:
            column = start + found[1]
            raise NonFiniteError(
                f"the average at index {column} does not fit {self._target.name}; "
                "write a wider dtype",
                input=None,
                index=column,
            )

    def _multiply(self, matrix: Array, raw: Array) -> None:
        """Write ``matrix @ raw`` to the sums, a tile at a time.

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
            np.matmul(matrix, wide, out=self._sums[:, columns])

    def _interval(self, raw: Array, outs: Array, largest: float) -> None:
        """Step 1: settle what the error bound allows."""
        self._reserve(raw.shape[1])
        self._multiply(self._normal, raw)
        error = (self._error * largest + self._least * (1 + largest))[:, None].astype(self._start)
        np.subtract(self._sums, error, out=self._shifted)
        self._round(outs)
        np.add(self._sums, error, out=self._shifted)
        self._round(self._other)
        np.not_equal(bits_of(outs), bits_of(self._other), out=self._flags)
        if self._target.bits == 8:  # some of these formats have one NaN for both ends
            self._flags |= np.isnan(outs)
        for index, flags in enumerate(self._flags):
            self._settle_flagged(index, int(np.count_nonzero(flags)), flags, raw, outs[index])

    def _settle_flagged(self, index: int, count: int, flags: Array, raw: Array, out: Array) -> None:
        if count * _DENSE > len(out):  # all of them, rather than picking most
            self._settle_all(index, raw, out)
        elif count:
            for columns in _portions(np.flatnonzero(flags), self._settled):
                out[columns] = self._settle(index, np.take(raw, columns, axis=1))

    def _round(self, out: Array) -> None:
        """Round what is in `_shifted`, once."""
        if self._start == np.float64 and self._target.precision < 11:
            np.copyto(out, round_to(self._shifted.astype(np.float64, copy=False), self._target))
        else:
            np.copyto(out, self._shifted, casting="unsafe")

    def _quotients_of_exact_sums(self, raw: Array, outs: Array) -> None:
        """Step 2 for a whole span of a format whose sums are always exact."""
        self._reserve(raw.shape[1])
        self._multiply(self._exact_matrix, raw)
        sums: F64 = self._sums.astype(np.float64, copy=False)
        np.divide(sums, self._combination.totals[:, None], out=sums)
        for index, (quotients, out) in enumerate(zip(sums, outs, strict=True)):
            np.copyto(out, round_to(quotients, self._target))
            if not quotients.all():
                for zeros in _portions(np.flatnonzero(quotients == 0.0), self._settled):
                    out[zeros] = self._signed_zeros(index, np.take(raw, zeros, axis=1))

    def _all_left_over(self, raw: Array, outs: Array) -> None:
        for index, out in enumerate(outs):
            self._settle_all(index, raw, out)

    def _settle_all(self, index: int, raw: Array, out: Array) -> None:
        for start in range(0, len(out), self._settled):
            part = slice(start, start + self._settled)
            out[part] = self._settle(index, raw[:, part])

    def _settle(self, index: int, columns: Array) -> Array:
        """Take steps 2 and 3: return the rounded means of columns, for one row of weights."""
        wide = columns.astype(np.float64)
        bits = self._combination.bits[index]
        if not self._combination.tame[index]:
            return self._exactly(index, wide)
        if bits >= 0 and self._target.precision < 53:
            highest = math.frexp(float(np.abs(wide).max()))[1]
            lowest = _smallest_exponent(wide)
            if lowest > -900 and _fits(bits, highest, lowest, self._source):
                quotients = self._combination.matrix[index] @ wide
                quotients /= self._combination.totals[index]
                values = round_to(quotients, self._target)
                if not quotients.all():
                    zeros = np.flatnonzero(quotients == 0.0)
                    values[zeros] = self._signed_zeros(index, wide[:, zeros])
                return values
        if self._start == np.float32:  # what was too coarse for float32 need not be for float64
            values, settled = self._closer(index, wide)
            values[~settled] = self._exactly(index, wide[:, ~settled])
            return values
        return self._exactly(index, wide)

    def _closer(self, index: int, columns: F64) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Step 1 in float64; returns rounded values and which are settled."""
        combination = self._combination
        quotients = combination.matrix[index] @ columns / combination.totals[index]
        reach = float(np.abs(columns).max(initial=0.0)) * self._growth[index]
        error = 1.01 * (len(columns) + 6) * 2.0**-53 * reach + 2.0**-1000
        low, high = (round_to(quotients + side * error, self._target) for side in (-1, 1))
        return low, bits_of(low) == bits_of(high)

    def _exactly(self, index: int, columns: F64) -> Array:
        """Step 3; weights that nearly cancel are beyond double-double."""
        combination, target = self._combination, self._target
        values = self._signed_zeros(index, columns)
        integers = combination.integers[index]
        used = np.array(integers, dtype=bool)
        nonzero = np.flatnonzero(columns[used].any(axis=0))
        if columns.size > _FEW and len(nonzero) and combination.tame[index]:
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

    def _signed_zeros(self, index: int, columns: Array) -> Array:
        """Return what IEEE 754 gives a sum of zero terms: -0 only if every term is -0."""
        integers = self._combination.integers[index]
        used = np.array(integers, dtype=bool)
        weights = np.array([value < 0 for value in integers])
        negative = (np.signbit(columns) ^ weights[:, None])[used].all(axis=0)
        return np.where(negative, -0.0, 0.0).astype(self._target.numpy)

    def _combine_nonfinite(self, raw: Array, outs: Array, first: int) -> None:
        """Refuse NaN and infinities, or take IEEE 754 where they stand and be exact elsewhere."""
        if not self._allow_nonfinite:
            row, column = _first_nonfinite(raw) or (0, 0)  # there is one
            raise NonFiniteError(
                f"input {row} holds {float(raw[row, column])} at index {first + column}",
                input=row,
                index=first + column,
                value=float(raw[row, column]),
            )
        for start in range(0, raw.shape[1], self._settled):
            part = slice(start, start + self._settled)
            columns = raw[:, part].astype(np.float64)
            for index, out in enumerate(outs[:, part]):
                used = np.array(self._combination.integers[index], dtype=bool)
                weights = self._combination.matrix[index]
                values = (columns[used] * weights[used, None]).sum(axis=0)
                values[np.isnan(values)] = np.nan  # one NaN, whatever signs and payloads went in
                # An input that this row does not use may be what is not finite.
                usual = np.isfinite(columns[used]).all(axis=0)
                out[...] = round_to(values, self._target)
                if usual.any():
                    rest = np.where(used[:, None], columns[:, usual], 0.0)
                    out[usual] = self._settle(index, rest)


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

    Notes
    -----
    Every element is the exact weighted mean rounded once to nearest even; an exact zero is -0 where
    every term is -0, else +0. Scratch memory is that of `scratch_bytes`.

    Examples
    --------
    >>> out = np.empty((1, 3), np.float32)
    >>> combine(Combination.of([1, 3]), np.float32([[0, 4, 8], [4, 4, 4]]), out)
    >>> out
    array([[3., 4., 5.]], dtype=float32)
    """
    combiner = Combiner(combination, _entry(block), _entry(outs), allow_nonfinite=allow_nonfinite)
    combiner(block, outs)


def _entry(array: Array) -> DType:
    entry = dtype_of(array.dtype)
    if entry is None or entry.kind != "float" or not array.dtype.isnative:
        raise WavgError(f"dtype {array.dtype} cannot be averaged")
    return entry


def _bytes(array: Array) -> Array:
    return array.view(np.uint8).reshape(-1)


def _first_nonfinite(array: Array) -> tuple[int, int] | None:
    for start in range(0, array.shape[1], _SETTLED):
        finite = np.isfinite(array[:, start : start + _SETTLED])
        if not finite.all():
            row, column = np.argwhere(~finite)[0].tolist()
            return row, start + column
    return None


def _largest(raw: Array, source: DType) -> float:
    """Return the largest magnitude; NaN or infinite if anything is."""
    if not raw.size:
        return 0.0
    if source.bits != 16:
        low, high = raw.min(), raw.max()  # both are NaN where a NaN is
        return float(np.maximum(-low.astype(np.float64), high.astype(np.float64)))
    # As whole numbers: NumPy has no fast comparison of 16-bit floats. The largest signed one is the
    # largest positive number, the largest unsigned one the largest of the negative, if any.
    signed, unsigned = int(raw.view(np.int16).max()), int(raw.view(np.uint16).max())
    bits = np.array([max(signed, unsigned & 0x7FFF, 0)], np.uint16)
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


def _portions(columns: npt.NDArray[np.intp], size: int) -> Iterator[npt.NDArray[np.intp]]:
    return (columns[start : start + size] for start in range(0, len(columns), size))


def _fits(bits: int, highest: int, lowest: int, source: DType) -> bool:
    """Whether float64 holds every partial sum exactly, in every order.

    All terms are multiples of one quantum, the last bit of numbers of the lowest exponent; the sum
    of their magnitudes has to stay below 2**52 quanta.
    """
    quantum = max(lowest, source.min_exponent) - source.precision + 1
    return bits >= 0 and highest + bits <= quantum + 52


def _largest_exponent(source: DType) -> int:
    return 16 if source.name == "float16" else 1024


def _smallest_exponent(values: F64) -> int:
    magnitudes = np.abs(values)
    magnitudes[magnitudes == 0.0] = np.inf
    smallest = float(magnitudes.min(initial=np.inf))
    return math.frexp(smallest)[1] - 1 if smallest < np.inf else 1024
