"""BLAS kept from starting threads of its own beside ours."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

__all__ = ["single_blas_thread"]


class _BlasLimit:
    """Counts who wants BLAS on one thread, and restores it when nobody does any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limiter: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                from threadpoolctl import threadpool_limits

                with contextlib.suppress(OSError):  # what is loaded cannot be read: then slower
                    self._limiter = threadpool_limits(1, user_api="blas")
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._limiter is not None:
                limiter, self._limiter = self._limiter, None
                limiter.restore_original_limits()


_blas_limit = _BlasLimit()


def single_blas_thread() -> _BlasLimit:
    """Keep BLAS from starting threads beside ours: they would wait for each other.

    The setting is the process's; it is restored at the end.
    """
    return _blas_limit
