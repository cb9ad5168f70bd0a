"""Reading an index in a process of its own, so that a file can crash or hang only that.

HDF5 is a large library in C and not safe on hostile files. A child process opens them here: it is
started when first needed, kept for the next files, limited in time and memory, and ends with its
standard input, so that it does not outlive its parent; one that hangs is ended by its own timers.
Requests and answers are lines of JSON.

On Windows only the limit of wall-clock time holds; that of memory needs Linux. No format is known
here: a module is named, and loaded in the child.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from wavg.checkpoint import Index
from wavg.errors import CheckpointFormatError, WavgError
from wavg.formats import wire

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Limits", "Reader", "read_index", "serve"]

_MIB = 1 << 20
_LONGEST_ANSWER = 64 * _MIB
_READY = b"ready\n"
_START = "import sys; sys.path[:] = sys.argv[1:]; from wavg.formats.isolated import serve; serve()"


class Limits(NamedTuple):
    """What reading one index may cost: seconds of processor and of clock, bytes beyond idle.

    ``stall`` is what one call of the HDF5 library may take of the processor, in which it does not
    come back: a sound file's take milliseconds, and a hostile one's may have no end.
    """

    cpu: float = 30.0  # 40,000 tensors take 9
    wall: float = 120.0
    memory: int = 512 * _MIB
    stall: float = 2.0


class Reader:
    """A child process that reads indexes, one at a time; threads may share it."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def read_index(self, module: str, path: str, *, opaque_dtype: str | None = None) -> Index:
        """Return or raise what a format module's ``read_index`` does.

        Raises
        ------
        CheckpointFormatError
            Also where that crashed or exceeded a limit, or where the child talks nonsense.
        """
        folder = None if os.path.isabs(path) else os.getcwd()
        request = json.dumps([module, path, opaque_dtype, folder, self.limits])
        with self._lock:
            try:
                answer = self._ask(path, request.encode() + b"\n")
                result = wire.decode(path, answer)
            except BaseException:
                self.close()  # interrupted, its answer would be taken for the next file's
                raise
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """End the child; the next file gets a new one."""
        if self.process is not None:
            process, self.process = self.process, None
            process.kill()
            with contextlib.suppress(OSError), process:
                pass  # leaving it closes the pipes, of which nothing more is wanted, and waits

    def forget(self) -> None:
        """In a copy of this process made by fork: leave the child to the original."""
        if self.process is not None:
            self.process.returncode = 0  # not ours to wait for
            for pipe in (self.process.stdin, self.process.stdout):
                pipe.raw.close()  # type: ignore[union-attr] # a vanished thread may hold the buffer
        self.process, self._lock = None, threading.Lock()

    def _ask(self, path: str, request: bytes) -> bytes:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self.limits.wall, end)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(request)
                process.stdin.flush()
            answer = process.stdout.readline(_LONGEST_ANSWER)
        finally:
            timer.cancel()
        if answer.endswith(b"\n") and not late.is_set():
            return answer
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        fate = self._fate(process.poll(), late.is_set())
        raise CheckpointFormatError(f"{path}: {fate}", path=path)

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.close()
        # It imports from where this process does, whatever the flags and variables of that. In a
        # session of its own it gets no Ctrl-C: that ends the parent, and the parent's end its own.
        flags = ["-I", "-X", f"utf8={sys.flags.utf8_mode}", *["-B"] * sys.dont_write_bytecode]
        paths = [*map(os.path.abspath, sys.path), str(Path(__file__).parents[2])]
        with contextlib.suppress(OSError):
            self.process = subprocess.Popen(
                [sys.executable, *flags, "-c", _START, *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # it does no arithmetic
                start_new_session=True,
            )
            assert self.process.stdout is not None
            if self.process.stdout.readline(len(_READY)) == _READY:
                return self.process
        raise WavgError(
            f"no process for reading HDF5 files could be started with {sys.executable!r}; "
            "isolate=False (--no-isolate) reads them in this one"
        )

    def _fate(self, code: int | None, late: bool) -> str:
        unlimited = "; of a file that you trust isolate=False (--no-isolate) sets no limit"
        ended = _name_of(-code) if code is not None and code < 0 else ""
        if late or ended == "SIGALRM":
            return f"reading it took more than {self.limits.wall:g} s{unlimited}"
        if ended == "SIGPROF":
            return f"reading it took more than {self.limits.cpu:g} s of processor time{unlimited}"
        if ended == "SIGXCPU":
            return (
                f"the HDF5 library did not come back within {self.limits.stall:g} s of processor "
                "time: the file is damaged or hostile"
            )
        if code is None:
            return "reading it gave an answer without end"
        if ended:
            return f"the HDF5 library crashed on it ({ended})"
        return f"the process that read it ended without an answer (exit code {code})"


def _name_of(number: int) -> str:
    names = [one.name for one in signal.Signals if one == number]
    return names[0] if names else f"signal {number}"  # as most real-time ones


_READER = Reader()  # one a process: the files of a run share it
atexit.register(_READER.close)
if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows
    os.register_at_fork(after_in_child=_READER.forget)


def read_index(module: str, path: str, *, opaque_dtype: str | None = None) -> Index:
    """Return or raise what `Reader.read_index` does; this process has one reader."""
    return _READER.read_index(module, path, opaque_dtype=opaque_dtype)


def serve() -> None:
    """Answer requests until standard input ends: what the child does."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)  # the parent may have ignored or blocked them
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    answers.write(_READY)
    answers.flush()
    like: dict[tuple[str, str | None], Index] = {}  # files of one layout are parsed once, here too
    for line in sys.stdin.buffer:
        module, path, opaque_dtype, folder, limits = json.loads(line)
        try:
            if folder is not None:
                os.chdir(folder)
            reader = importlib.import_module(module)
            with _limited(Limits(*limits)):
                key = module, opaque_dtype
                index = reader.read_index(path, opaque_dtype=opaque_dtype, like=like.get(key))
                like[key] = index
                answer = wire.encode(index)
        except Exception as error:
            answer = wire.encode_error(path, error)
        answers.write(answer.encode() + b"\n")
        answers.flush()


@contextlib.contextmanager
def _limited(limits: Limits) -> Iterator[None]:
    """Have the system end this process when it takes too long, and refuse it too much memory."""
    if resource is None:
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError):  # no /proc but on Linux
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        allowed = pages * resource.getpagesize() + limits.memory
        if before == resource.RLIM_INFINITY or allowed < before:
            resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    end, (fewest, most) = time.process_time() + limits.cpu, resource.getrlimit(resource.RLIMIT_CPU)

    def came_back(*_: object) -> None:
        """Python calls this, four times a `stall`, unless a library is at work."""
        now = time.process_time()
        if now > end:  # pragma: no cover - what is counted ends with the process
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.raise_signal(signal.SIGPROF)
        allowed = math.ceil(now + limits.stall)  # or the system ends this process with SIGXCPU
        allowed = allowed if fewest == resource.RLIM_INFINITY else min(allowed, fewest)
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, most))

    signal.signal(signal.SIGPROF, came_back)
    came_back()
    signal.setitimer(signal.ITIMER_PROF, limits.stall / 4, limits.stall / 4)
    signal.setitimer(signal.ITIMER_REAL, limits.wall)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (fewest, most))
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
