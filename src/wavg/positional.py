"""Bytes read and written at an offset, all of them: the system may do less than it was asked for.

Threads can share a descriptor so, for it has no position. Where the system knows only files with
one, as Windows does, they take turns.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["in_pieces", "read_at", "read_exactly", "write_exactly"]

_MOST = 1 << 30  # at once: macOS refuses 2 GiB
_COPIED = 1 << 18  # at once, where what is read is copied or a new object
_TURNS = [threading.Lock() for _ in range(61)]  # by descriptor


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Return up to `size` bytes of a file from `offset` on; none at its end."""
    size = min(size, _MOST)
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _TURNS[descriptor % len(_TURNS)]:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


def in_pieces(descriptor: int, offset: int, length: int) -> Iterator[bytes]:
    """Read a part of a file, little by little; it ends early where the file does."""
    end = offset + length
    while offset < end and (data := read_at(descriptor, min(_COPIED, end - offset), offset)):
        yield data
        offset += len(data)


def _read_into(descriptor: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view[:_MOST]], offset)
    data = read_at(descriptor, min(len(view), _COPIED), offset)
    view[: len(data)] = data
    return len(data)


def _write_at(descriptor: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, view[:_MOST], offset)
    with _TURNS[descriptor % len(_TURNS)]:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, view[:_MOST])


def read_exactly(descriptor: int, offset: int, out: npt.NDArray[Any]) -> bool:
    """Fill a contiguous array from a file's bytes at `offset`; False if the file ends before."""
    view = out.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        count = _read_into(descriptor, view[done:], offset + done)
        if count == 0:
            return False
        done += count
    return True


def write_exactly(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write bytes at an offset; what is written short is gone on with."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        count = _write_at(descriptor, view[done:], offset + done)
        if count == 0:  # it would go on for ever
            raise OSError(errno.EIO, "the system writes nothing and says no reason")
        done += count
