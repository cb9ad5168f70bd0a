"""The command ``wavg`` at its very beginning and its very end, where signals are what counts.

Not in the package, for whoever imports from that imports NumPy first, and a Ctrl-C meanwhile would
end in a traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; return its exit code, or end by the signal that ended its work.

    A shell shows 130 for Ctrl-C and 143 for SIGTERM either way, but leaves a loop only if a command
    was ended by a signal.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a script ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is begun: it simply ends
    from wavg import cli

    code = cli.main()
    if code > 128 and os.name == "posix":
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # there may be none
                stream.flush()
        signal.signal(code - 128, signal.SIG_DFL)
        os.kill(os.getpid(), code - 128)  # without effect in a container's first process
    return code
