"""What stands in the way of an output, told before the work begins."""

from __future__ import annotations

import errno
import os
import stat

from wavg.errors import OutputError, OutputExistsError

__all__ = [
    "bare",
    "is_stream",
    "refuse_device",
    "refuse_existing",
    "refuse_full",
    "refuse_unnamable",
]


def refuse_existing(path: str, overwrite: bool, *, folder: bool = False) -> None:
    """Raise an error if what is at `path`, or is not, keeps an output from being there.

    Raises
    ------
    OutputExistsError
        There is something that was not to be replaced.
    OutputError
        What is there is of another kind, a device for example; the folder it is to be in is
        missing or may not be written to, or the system refuses the path.
    """
    refuse_unnamable(path)
    path_of_folder = bare(path)
    try:
        mode = os.stat(path_of_folder if folder else path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except OSError as error:  # a name too long, links in a circle, a folder that may not be entered
        raise OutputError(
            f"cannot write {path}: {error.strerror}; nothing was begun",
            path=path,
            errno=error.errno,
        ) from error
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise _no_place(path)
    if os.path.lexists(path_of_folder if folder else path) and not overwrite:
        raise OutputExistsError(
            f"{path} exists; choose another output, or pass overwrite=True (--overwrite)", path=path
        )
    if not folder and mode is not None and stat.S_ISDIR(mode):
        raise OutputError(f"{path} is a folder; the output is a file", path=path)
    if folder and mode is not None and stat.S_ISREG(mode):
        raise OutputError(f"{path} is a file; the output is a folder", path=path)
    parent = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(parent):
        raise OutputError(f"cannot write {path}: there is no folder {parent}", path=path)
    if not os.access(
        parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
    ):
        number = errno.EROFS if _is_read_only(parent) else errno.EACCES
        raise OutputError(
            f"cannot write {path}: {os.strerror(number)} for the folder {parent}; name an output "
            "in one that you may write to",
            path=path,
            errno=number,
        )


def refuse_device(path: str) -> None:
    """Raise `OutputError` if what is at a path is neither file nor folder."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # nothing, or what is told of a name that has an ending
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise _no_place(path)


def _no_place(path: str) -> OutputError:
    return OutputError(
        f"{path} is a device, pipe or socket, which is not replaced; name a file, or, to write "
        "nothing, use plan_average (--dry-run)",
        path=path,
    )


def _is_read_only(folder: str) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def refuse_unnamable(path: str) -> None:
    """Raise `OutputError` if no file can have the name: it has a zero byte, or half a character."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise OutputError(
            f"cannot write {path!a}: no file can have this name; nothing was begun",
            path=path,
            errno=errno.EINVAL,
        )


def bare(path: str) -> str:
    """Return a path without the separator at its end, if it has one."""
    head, tail = os.path.split(path)
    return path if tail else head


def is_stream(path: str) -> bool:
    """Whether a path is a pipe or a device that takes bytes, as /dev/stdout may be."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # nothing, or nothing that there could be
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def refuse_full(path: str, size: int) -> None:
    """Raise `OutputError` if the disk has no room for `size` more bytes where `path` is to be.

    Nothing is told where the system does not know.
    """
    try:
        free = _free(os.path.dirname(os.path.realpath(path)))
    except OSError:
        return
    if free is not None and size > free:
        raise OutputError(
            f"cannot write {path}: it takes {size:,} bytes, and {free:,} are free on the disk; "
            "nothing was begun",
            path=path,
            errno=errno.ENOSPC,
        )


def _free(folder: str) -> int | None:
    """Return the bytes that are free where a folder lies; None if the file system has no size."""
    if hasattr(os, "statvfs"):
        disk = os.statvfs(folder)
        return disk.f_bavail * disk.f_frsize if disk.f_blocks else None
    import shutil  # a tenth of `import wavg`

    return shutil.disk_usage(folder).free
