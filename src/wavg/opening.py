"""Inputs opened together, and files for all of them."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator, Sequence

from wavg.checkpoint import Checkpoint
from wavg.formats import open_file
from wavg.shortage import shortages

__all__ = [
    "available_cores",
    "opened",
    "uncollected",
    "verify_unchanged",
]


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _allow_open_files(count: int) -> None:
    """Raise this process's limit on open files where so many inputs need it and it is allowed."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    needed = count + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        ceiling = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS has a lower one, which it keeps
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, ceiling), hard))


@contextlib.contextmanager
def opened(
    paths: Sequence[str], opaque_dtype: str | None, isolate: bool, outputs: int = 1
) -> Iterator[list[Checkpoint]]:
    """Open checkpoints, oldest first, so that those of one layout share what they can."""
    most = 64  # files of a checkpoint, until one has more
    _allow_open_files(most * (len(paths) + outputs))
    with shortages(), contextlib.ExitStack() as stack:
        checkpoints: list[Checkpoint] = []
        with uncollected():
            for path in paths:
                like = checkpoints[-1].index if checkpoints else None
                opened = open_file(path, opaque_dtype=opaque_dtype, like=like, isolate=isolate)
                checkpoints.append(stack.enter_context(opened))
                if len(opened.index.files) > most:
                    most = len(opened.index.files)
                    _allow_open_files(most * (len(paths) + outputs))
        yield checkpoints


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Hold the garbage collector while very many small objects appear, none of them garbage."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def verify_unchanged(checkpoints: Iterable[Checkpoint]) -> None:
    """Raise `CheckpointChangedError` unless all inputs are what they were when opened."""
    for checkpoint in checkpoints:
        checkpoint.verify_unchanged()
