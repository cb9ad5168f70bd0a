"""Renames that happen at one instant, and what makes them durable."""

from __future__ import annotations

import errno
import os
import sys

__all__ = ["EXCHANGE", "FAILING", "NOT_HERE", "NO_REPLACE", "rename", "sync_folder"]

NO_REPLACE, EXCHANGE = 1, 2  # flags of Linux's renameat2
NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP)  # no such call, or flag
# What a disk in trouble says; other errors mean that a file system lacks what was asked for.
FAILING = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM)


def rename(old: str, new: str, flag: int) -> None:
    """Rename as Linux's renameat2 does; where there is none, raise `OSError` with ENOSYS."""
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None or not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = ctypes.c_int(-100)  # AT_FDCWD
    if rename(here, os.fsencode(old), here, os.fsencode(new), ctypes.c_uint(flag)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), old)


def sync_folder(folder: str) -> None:
    """Make durable what appeared in a folder, or vanished."""
    if os.name != "posix":  # pragma: no cover
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
