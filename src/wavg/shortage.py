"""What a system can run out of while wavg works, told as errors of its own: memory and threads."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from wavg.errors import OutOfMemoryError, WavgError

__all__ = ["shortages"]

# What Python says of a library that gave none; and OpenSSL, which makes digests, where allocations
# fail (other reasons, as "unsupported" of an algorithm that is not allowed, are none of memory).
_NO_REASON = (
    r"without (setting an exception|exception set)"
    r"|^\[digital envelope routines\b.*\] "
    "(initialization error|not able to copy ctx|malloc failure)$"
)
_NO_THREAD = ("can't start new thread", "can't allocate")  # Python's words; it has no type for it


@contextlib.contextmanager
def shortages() -> Iterator[None]:
    """Turn a `MemoryError`, or the lack of a thread, into an `OutOfMemoryError`.

    >>> with shortages():
    ...     raise MemoryError("Unable to allocate 8. TiB")
    Traceback (most recent call last):
    wavg.errors.OutOfMemoryError: out of memory: Unable to allocate 8. TiB; max_memory ...
    """
    try:
        yield
    except MemoryError as error:
        if isinstance(error, WavgError):
            raise
        why = f": {error}" if str(error) else ""
        raise OutOfMemoryError(
            f"out of memory{why}; max_memory (--max-memory) and workers (--workers) "
            "bound what averaging takes"
        ) from error
    except (SystemError, ValueError) as error:
        if isinstance(error, WavgError) or not re.search(_NO_REASON, str(error)):
            raise
        raise OutOfMemoryError(
            f"a library failed and gave no reason, as for lack of memory ({error})"
        ) from error
    except RuntimeError as error:
        if not str(error).startswith(_NO_THREAD):
            raise
        raise OutOfMemoryError(
            "the system starts no more threads for this process; workers=1 (--workers 1) needs "
            "fewest"
        ) from error
