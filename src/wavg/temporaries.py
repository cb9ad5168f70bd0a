"""Temporaries beside an output: their names, who holds them, and what becomes of them.

A temporary is locked while the process that made it lives. What nobody holds a lock on a killed run
has left; only a run to the same output removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: strays are then left for a person to remove
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "NEW",
    "OLD",
    "beside",
    "claimed",
    "is_open_as",
    "reclaim",
    "reclaim_unnamed",
    "remove",
    "remove_stray",
]

NEW, OLD = ".wavg-tmp", ".wavg-old"  # what is in the making; what was replaced a moment ago


def beside(destination: str, ending: str = NEW) -> str:
    """Return a new name for a temporary beside a destination."""
    folder, name = os.path.split(destination)
    return os.path.join(folder, f".{name}.{os.urandom(6).hex()}{ending}")


def _lock(descriptor: int) -> bool:
    if fcntl is None:  # pragma: no cover
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def claimed(descriptor: int, path: str) -> bool:
    """Lock a new temporary; False if another run has just taken it for a stray and removes it."""
    if fcntl is None:  # pragma: no cover
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # there are no locks here, so nobody reclaims anything
        return True
    return is_open_as(path, descriptor)


def is_open_as(path: str, descriptor: int) -> bool:
    """Whether what stands at a path is what a descriptor has open."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def reclaim(destination: str) -> None:
    """Remove what killed runs to this destination left beside it."""
    for stray, _ in _strays(destination, NEW, OLD):
        with contextlib.suppress(OSError):
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
                    if is_open_as(destination, descriptor):
                        os.unlink(destination)


def _strays(destination: str, *endings: str) -> Iterator[tuple[str, int]]:
    """Yield temporaries of runs that live no more, each locked, with an open descriptor."""
    folder, name = os.path.split(destination)
    own = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{12}}({'|'.join(map(re.escape, endings))})")
    for entry in os.listdir(folder):
        if own.fullmatch(entry):
            stray = os.path.join(folder, entry)
            try:
                descriptor = _open_to_lock(stray)
            except OSError:
                continue  # gone, or not to be opened by this user
            try:
                if _lock(descriptor):
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
    for name in os.listdir(path):
        os.unlink(os.path.join(path, name))
    os.rmdir(path)


def remove_stray(path: str) -> None:
    """Remove what is not needed any more; that it fails changes nothing of what was done."""
    try:
        with contextlib.suppress(FileNotFoundError):  # or another run has done so
            remove(path)
    except OSError as error:
        warnings.warn(
            f"{path} cannot be removed ({error.strerror}); the next run to the same output tries "
            "again",
            RuntimeWarning,
            stacklevel=2,
        )
