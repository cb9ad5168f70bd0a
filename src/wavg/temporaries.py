"""Temporaries beside an output: their names, who holds them, and what becomes of them.

A temporary is locked while the process that made it lives, and so is what it replaced, which lies
there until the end. What nobody holds a lock on a killed run has left; only a run to the same
output removes it. Who keeps something shares the lock with others who do: one run may replace what
another has just made. Who removes it wants the lock alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence

from wavg.printable import printable
from wavg.renames import sync_folder

try:
    import fcntl
except ImportError:  # Windows: strays are then left for a person to remove
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "NEW",
    "OLD",
    "beside",
    "claimed",
    "held",
    "reclaim",
    "reclaim_unnamed",
    "remove",
    "remove_stray",
    "stands_at",
]

NEW, OLD = ".wavg-tmp", ".wavg-old"  # what is in the making; what was replaced a moment ago


_LONGEST = 200  # bytes of a name that temporaries repeat; file systems take 255, some fewer


def beside(destination: str, ending: str = NEW) -> str:
    """Return a new name for a temporary beside a destination."""
    folder, name = os.path.split(destination)
    return os.path.join(folder, f".{_short(name)}.{os.urandom(6).hex()}{ending}")


def _short(name: str) -> str:
    data = os.fsencode(name)
    return name if len(data) <= _LONGEST else hashlib.sha256(data).hexdigest()


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def claimed(descriptor: int, path: str) -> bool:
    """Lock a new temporary; False if another run has just taken it for a stray and removes it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # there are no locks here, so nobody reclaims anything
        return True
    return stands_at(path, os.fstat(descriptor))


def held(path: str) -> int:
    """Keep other runs from what is to be replaced, until the descriptor returned is closed.

    It is -1 where there is nothing, or this user, or system, cannot hold it.
    """
    if fcntl is None:
        return -1
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, PermissionError):
        return -1
    with contextlib.suppress(OSError):  # there are no locks here, or it is locked for other ends
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def stands_at(path: str, status: os.stat_result) -> bool:
    """Whether what stands at a path is that of which this is the status."""
    try:
        return os.path.samestat(os.lstat(path), status)
    except FileNotFoundError:
        return False


def reclaim(destination: str) -> None:
    """Remove what killed runs to this destination left beside it."""
    for stray, _ in _strays(destination, NEW, OLD):
        with contextlib.suppress(OSError):
            sync_folder(os.path.dirname(destination))  # it may have stood there: `renames.settled`
            remove(stray)


def reclaim_unnamed(naming: str, paths: Sequence[str]) -> None:
    """Remove what a killed run let appear of an output of several files, if not all of it.

    Without the file that names them they are nothing. They are known by their second names: those
    under which they were made.
    """
    if os.path.lexists(naming):
        return
    for path in paths:
        destination = os.path.realpath(path)
        if os.path.isfile(destination):
            for _, descriptor in _strays(destination, NEW):
                with contextlib.suppress(OSError):  # it is refused then, like any file there
                    if stands_at(destination, os.fstat(descriptor)):
                        sync_folder(
                            os.path.dirname(destination)
                        )  # what named it may be gone just now
                        os.unlink(destination)


def _strays(destination: str, *endings: str) -> Iterator[tuple[str, int]]:
    """Yield temporaries of runs that live no more, each locked, with an open descriptor."""
    folder, name = os.path.split(destination)
    ending = "|".join(map(re.escape, endings))
    own = re.compile(rf"\.{re.escape(_short(name))}\.[0-9a-f]{{12}}({ending})")
    try:
        entries = os.listdir(folder)
    except PermissionError:  # a folder to put files into, not to look around in
        return
    for entry in entries:
        if own.fullmatch(entry):
            stray = os.path.join(folder, entry)
            try:
                descriptor = _open_to_lock(stray)
            except OSError:
                continue  # gone, or not to be opened by this user
            try:
                if _lock(descriptor) and stands_at(stray, os.fstat(descriptor)):
                    yield stray, descriptor
            finally:
                os.close(descriptor)


def _open_to_lock(path: str) -> int:
    if not os.path.isdir(path):
        with contextlib.suppress(PermissionError):  # it has the mode of what it was to replace
            return os.open(path, os.O_RDWR)  # NFS locks nothing else
    return os.open(path, os.O_RDONLY)


def remove(path: str) -> None:
    """Remove a file, or a folder of files; what holds folders was not made here."""
    if not os.path.isdir(path) or os.path.islink(path):
        os.unlink(path)
        return
    if os.stat(path).st_mode & 0o700 != 0o700:
        os.chmod(path, 0o700)  # it has the mode of what it was to replace, or replaced
    for name in os.listdir(path):
        with contextlib.suppress(FileNotFoundError):  # another run removes it, too
            os.unlink(os.path.join(path, name))
    os.rmdir(path)


def remove_stray(path: str) -> None:
    """Remove what is not needed any more; that it fails changes nothing of what was done."""
    try:
        with contextlib.suppress(FileNotFoundError):  # or another run has done so
            remove(path)
    except OSError as error:
        warnings.warn(
            f"{printable(path)} cannot be removed ({error.strerror}); the next run to the same "
            "output tries again",
            RuntimeWarning,
            stacklevel=2,
        )
