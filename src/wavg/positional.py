"""Bytes read and written at an offset, all of them: the system may do less than it was asked for.

Threads can share a descriptor so, for it has no position.
"""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["read_exactly", "write_exactly"]


def read_exactly(descriptor: int, offset: int, out: npt.NDArray[Any]) -> bool:
    """Fill a contiguous array from a file's bytes at `offset`; False if the file ends before."""
    view = out.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def write_exactly(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write bytes at an offset; what is written short is gone on with."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        count = os.pwrite(descriptor, view[done:], offset + done)
        if count == 0:  # it would go on for ever
            raise OSError(errno.EIO, "the system writes nothing and says no reason")
        done += count
