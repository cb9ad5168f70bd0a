"""Runs of bytes in files, one by one and many at once.

What concerns all of a model's tensors is asked of columns, so that many small ones cost little.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Extent", "complement", "extent_table", "in_order", "side_by_side"]


class Extent(NamedTuple):
    """A run of bytes: which of the checkpoint's files, where, how long."""

    file: int
    offset: int
    length: int


def extent_table(extents: Sequence[Extent | None]) -> npt.NDArray[np.int64]:
    """Return extents as rows (file, offset, length); what has none comes last, beside nothing."""
    numbers = itertools.chain.from_iterable([extent or _NOWHERE for extent in extents])
    return np.fromiter(numbers, np.int64, 3 * len(extents)).reshape(-1, 3)


_NOWHERE = Extent((1 << 63) - 1, 0, 1)


def in_order(table: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Return the positions that sort extents by where they lie; equal ones keep their order."""
    return np.lexsort(table.T[::-1])


def side_by_side(table: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Say of each extent but the first whether it begins where the one before ends.

    >>> side_by_side(extent_table([Extent(0, 0, 4), Extent(0, 4, 8), Extent(0, 16, 4), None]))
    array([ True, False, False])
    """
    file, offset, length = table.T
    adjoining: npt.NDArray[np.bool_] = (file[1:] == file[:-1]) & (
        offset[1:] == offset[:-1] + length[:-1]
    )
    return adjoining


def complement(size: int, extents: Sequence[Extent]) -> list[tuple[Extent, int]]:
    """Return what of a file's bytes lies outside the extents, as a template's `carry`.

    >>> complement(10, [Extent(0, 2, 3), Extent(0, 8, 2)])
    [(Extent(file=0, offset=0, length=2), 0), (Extent(file=0, offset=5, length=3), 5)]
    """
    table = extent_table(extents)
    _, offsets, lengths = table[in_order(table)].T
    ends = np.maximum.accumulate(np.append(0, offsets + lengths))
    starts = np.append(offsets, size)
    holes = np.flatnonzero(starts > ends)
    pairs = zip(ends[holes].tolist(), starts[holes].tolist(), strict=True)
    return [(Extent(0, end, start - end), end) for end, start in pairs]
