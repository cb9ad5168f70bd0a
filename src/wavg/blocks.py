"""A model's numbers a block at a time, so that nothing of a model's size is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg.errors import NonFiniteError
from wavg.structure import Leaf

__all__ = ["BLOCK", "Scratch", "blocks", "largest", "refuse_nonfinite"]

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

BLOCK = 1 << 14  # numbers that are worked on while they are in the nearest cache


def blocks(array: Array) -> Iterator[tuple[int, F64]]:
    """Yield an array's numbers in C order as (start, float64 block), whatever its layout.

    A block is only to be read, and only until the next: it may be a view or a shared buffer.

    >>> [(start, block.tolist()) for start, block in blocks(np.float16([[1, 2], [3, 4]]).T)]
    [(0, [1.0, 3.0, 2.0, 4.0])]
    """
    if array.dtype.kind == "c":  # as pairs of reals
        array = array.reshape(*array.shape, 1).view(f"f{array.dtype.itemsize // 2}")
    if not array.size:
        return
    iterator = np.nditer(
        [array],
        flags=["external_loop", "buffered"],
        op_flags=[["readonly"]],
        op_dtypes=[np.float64],
        order="C",
        casting="unsafe",  # NumPy does not know that bfloat16 fits
        buffersize=BLOCK,
    )
    start = 0
    block: Any
    for block in iterator:
        yield start, block
        start += len(block)


class Scratch:
    """Arrays of a block's size, made once and used for every block of every sum."""

    def __init__(self) -> None:
        self.carry, self.total, self.part = np.empty((3, BLOCK))
        self.whole = np.empty(BLOCK, np.int64)
        self.flags = np.empty(BLOCK, bool)


def largest(block: F64, scratch: Scratch) -> float:
    """Return the largest magnitude in a block."""
    return float(np.abs(block, out=scratch.part[: len(block)]).max())


def refuse_nonfinite(leaves: Sequence[Leaf], arrays: Sequence[Array], scratch: Scratch) -> None:
    """Raise `NonFiniteError` if a number that is averaged is NaN or infinite."""
    for leaf, array in zip(leaves, arrays, strict=True):
        for start, block in blocks(array) if leaf.format.averaged else ():
            finite = np.isfinite(block, out=scratch.flags[: len(block)])
            if not finite.all():
                place = start + int(finite.argmin())
                flat = place * leaf.format.component.bits // leaf.format.bits
                index = tuple(map(int, np.unravel_index(flat, leaf.shape)))
                where = f", first at {list(index)}" if index else ""
                raise NonFiniteError(
                    f"{leaf.path or 'the leaf'} holds NaN or infinity{where}; "
                    "allow_nonfinite=True lets it through",
                    tensor=leaf.path,
                    index=index,
                )
