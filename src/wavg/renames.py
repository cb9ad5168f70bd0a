"""Renames that happen at one instant, and what makes them durable."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "EXCHANGE",
    "FAILING",
    "MOVES_OPEN_FILES",
    "NOT_HERE",
    "NO_REPLACE",
    "open_folder",
    "rename",
    "rename_new",
    "settled",
    "sync_file",
    "sync_folder",
]

NO_REPLACE, EXCHANGE = 0, 1
# A system's call for both; its word for the working folder; its flags.
_CALLS = {"linux": ("renameat2", -100, (1, 2)), "darwin": ("renameatx_np", -2, (4, 2))}
NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP)  # no such call, or flag
# What a disk in trouble says; other errors mean that a file system lacks what was asked for.
FAILING = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM)
MOVES_OPEN_FILES = os.name == "posix"  # Windows neither renames nor removes them
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.ENOTTY)


def rename(old: str, new: str, flag: int) -> None:
    """Rename at one instant, as the flag says.

    Raises
    ------
    OSError
        With one of `NOT_HERE` if the system, or the file system, has no such call.
    """
    import ctypes

    name, here, flags = _CALLS.get(sys.platform, ("", 0, (0, 0)))
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    folder = ctypes.c_int(here)
    if call(folder, os.fsencode(old), folder, os.fsencode(new), ctypes.c_uint(flags[flag])):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), old)


def rename_new(old: str, new: str) -> None:
    """Rename where nothing stands; at one instant if the system can.

    Raises
    ------
    FileExistsError
        Something stands there.
    """
    try:
        rename(old, new, NO_REPLACE)
    except OSError as error:
        if error.errno not in NOT_HERE:
            raise
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new) from None
        os.rename(old, new)


def open_folder(folder: str) -> int:
    """Return a descriptor of a folder; -1 where the system opens none, as Windows."""
    return os.open(folder, os.O_RDONLY) if hasattr(os, "O_DIRECTORY") else -1


def sync_file(descriptor: int) -> None:
    """Have what was written to a file on the disk, whatever the system is asked for that."""
    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync leaves it in the disk's own memory
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
    os.fsync(descriptor)


def sync_folder(folder: str) -> None:
    """Make durable what appeared in a folder, or vanished, where a system knows such a thing."""
    try:
        descriptor = open_folder(folder)
    except PermissionError:  # what may be written to, not read
        return
    if descriptor < 0:
        return
    try:
        sync_file(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def settled(folder: str) -> bool:
    """Make durable what was done in a folder; return whether the disk confirms it.

    It is asked before what came out of use is removed: a loss of power may undo a rename that was
    not synced and keep what was done to files after it, those that have their name back.
    """
    try:
        sync_folder(folder)
    except OSError:
        return False
    return True
