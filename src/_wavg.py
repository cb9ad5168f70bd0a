"""The command ``wavg`` at its very beginning and its very end, where signals are what counts.

Not in the package, for whoever imports from that imports NumPy first, and a Ctrl-C meanwhile would
end in a traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

__all__ = ["main"]


def main() -> int:
    """Run the command line; return its exit code, or end by the signal that ended its work.

    A shell shows 130 for Ctrl-C and 143 for SIGTERM either way, but leaves a loop only if a command
    was ended by a signal.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a script ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is begun: it simply ends
    try:
        with _threads_only_if_there_is_room():
            from wavg import cli
    except MemoryError:
        print("wavg: out of memory before anything was begun; allow it more", file=sys.stderr)
        return 1
    code = cli.main()
    if code > 128 and os.name == "posix":
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # there may be none
                stream.flush()
        signal.signal(code - 128, signal.SIG_DFL)
        os.kill(os.getpid(), code - 128)  # without effect in a container's first process
    return code


@contextlib.contextmanager
def _threads_only_if_there_is_room() -> Iterator[None]:
    """Have NumPy's OpenBLAS start no threads where a limit is set to this process's memory.

    It raises SIGINT if it cannot have them, which looks like a Ctrl-C; wavg needs none of them.
    """
    name = "OPENBLAS_NUM_THREADS"
    if name in os.environ or not _is_limited():
        yield
        return
    os.environ[name] = "1"  # read once, when it is loaded; programs that are started do not see it
    try:
        yield
    finally:
        del os.environ[name]


def _is_limited() -> bool:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
