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
   compiled (`wavg.compiled`: float64, bounds column by column, exact sums recognised, at about the
   speed of memory; it can read the rows from open files itself), and in NumPy (`wavg.tiles`) for
   formats that the compiled one lacks and where no C compiler was at hand. As the result is
   defined, they cannot differ in a byte.
2. float64 for those, where it is known to hold every partial sum of these very numbers exactly, as
   it nearly always is for whole-number weights. This settles exact ties. In NumPy float16 starts
   here, for its sums are always exact.
3. Double-double, and then whole numbers of any length (`wavg.exact`).

Steps 2 and 3 are in `wavg.leftovers`. Step 2 rounds a quotient ``S / T`` to float64 and, for other
outputs, again to at most 24 bits. That is harmless where the sum ``S`` is exact: a midpoint ``m``
of the narrow format has at most 25 bits and ``T`` at most 28, so ``S`` and ``m T`` are multiples of
a common quantum that exceeds ``T`` times half a unit of float64 at ``m``; the quotient is the
midpoint, or float64 tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg import compiled, leftovers, tiles
from wavg.combination import Combination
from wavg.compiled import COMPILED, Compiled, reads_files
from wavg.dtypes import DType, dtype_of
from wavg.errors import NonFiniteError, WavgError
from wavg.ieee import first_nonfinite
from wavg.leftovers import Leftovers, Portion
from wavg.tiles import Tiles

__all__ = ["COMPILED", "Combiner", "combine", "reads_files", "scratch_bytes"]

Array = npt.NDArray[Any]

_REST = 1 << 18  # bytes of small arrays, and of what NumPy keeps


def scratch_bytes(
    inputs: int, outputs: int, source: DType, target: DType, block: int, *, from_files: bool = False
) -> int:
    """Bound what a `Combiner` allocates for blocks of so many elements."""
    block *= 2  # a complex number is two
    if reads_files(source, target):
        width = compiled.width(inputs, source) if from_files else block
        first_step = compiled.scratch_bytes(inputs, outputs, source, width, reads=from_files)
    else:
        width = min(tiles.span(inputs, outputs, target), block)
        first_step = tiles.scratch_bytes(inputs, outputs, source, target, width)
    return first_step + leftovers.scratch_bytes(inputs, source, width) + _REST


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
        self._target = target
        wider = source != target or bool((combination.matrix < 0).any())
        self._may_overflow = wider and not allow_nonfinite
        self._tiles = Tiles(combination, source, target)
        self._leftovers = Leftovers(combination, source, target, allow_nonfinite=allow_nonfinite)
        if reads_files(source, target):
            self._compiled: Compiled | None = Compiled(combination, source, target)
        else:
            self._compiled = None

    def __call__(self, block: Array, outs: Array) -> None:
        """Write ``outs = (W @ block) / totals``, block of shape (K, B), outs of shape (R, B).

        Raises
        ------
        NonFiniteError
            A value of the block is NaN or infinite, or a result does not fit the output format.
            Attributes: ``input`` (the row, None for a result), ``index`` (the column), ``value``.
        """
        if self._compiled and block.flags.c_contiguous and outs.flags.carray:
            self._settle(self._compiled.in_memory(block, outs), outs)
        else:
            self._settle(self._tiles.portions(block, outs), outs)

    def from_files(self, descriptors: Array, offsets: Array, outs: Array) -> None:
        """Do what a call does for a block whose rows lie in files; read it piece by piece.

        Only for formats of which `reads_files` says so.

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
        assert self._compiled
        self._settle(self._compiled.in_files(descriptors, offsets, outs), outs)

    def _settle(self, portions: Iterable[Portion], outs: Array) -> None:
        """Have the first step go through its portions, settle what it leaves, look at all of it."""
        with np.errstate(all="ignore"):
            for portion in portions:
                self._leftovers.settle(portion, outs)
        found = first_nonfinite(outs) if self._may_overflow else None
        if found is not None:
            raise NonFiniteError(
                f"the average at index {found[1]} does not fit {self._target.name}; "
                "write a wider dtype",
                input=None,
                index=found[1],
            )


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
