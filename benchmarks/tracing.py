"""Follow a copy of this process from system call to system call: kill it there, or fail a call.

With ptrace, through ctypes: x86-64 Linux, where the process may trace its children. All threads of
the copy are followed, and counted together.
"""

from __future__ import annotations

import collections
import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self

TRACEME, PEEKUSER, POKEUSER, CONT, SETOPTIONS, SYSCALL = 0, 3, 6, 7, 0x4200, 24
OPTIONS = 0x01 | 0x08 | 0x100000  # mark stops at calls, follow threads, end with the tracer
ALL_THREADS = 0x40000000  # waitpid's __WALL
AT_CALL = signal.SIGTRAP | 0x80
R10, R9, R8, RAX, RDX, RSI, RDI, CALL = (8 * p for p in (7, 8, 9, 10, 12, 13, 14, 15))  # in user
NAMES = {
    0: "read", 1: "write", 2: "open", 3: "close", 4: "stat", 5: "fstat", 6: "lstat", 8: "lseek",
    9: "mmap", 10: "mprotect", 11: "munmap", 12: "brk", 13: "rt_sigaction", 14: "rt_sigprocmask",
    16: "ioctl", 17: "pread64", 18: "pwrite64", 20: "writev", 21: "access", 24: "sched_yield",
    25: "mremap", 28: "madvise", 32: "dup", 33: "dup2", 39: "getpid", 40: "sendfile", 56: "clone",
    60: "exit", 63: "uname", 72: "fcntl", 73: "flock", 74: "fsync", 75: "fdatasync", 76: "truncate",
    77: "ftruncate", 79: "getcwd", 82: "rename", 83: "mkdir", 84: "rmdir", 85: "creat", 86: "link",
    87: "unlink", 89: "readlink", 90: "chmod", 91: "fchmod", 98: "getrusage", 99: "sysinfo",
    102: "getuid", 104: "getgid", 107: "geteuid", 108: "getegid", 131: "sigaltstack", 137: "statfs",
    138: "fstatfs", 157: "prctl", 186: "gettid", 191: "getxattr", 192: "lgetxattr",
    193: "fgetxattr", 199: "fremovexattr", 202: "futex", 204: "sched_getaffinity",
    217: "getdents64", 221: "fadvise64", 228: "clock_gettime", 230: "clock_nanosleep",
    231: "exit_group", 257: "openat", 258: "mkdirat", 262: "newfstatat", 263: "unlinkat",
    264: "renameat", 265: "linkat", 267: "readlinkat", 268: "fchmodat", 269: "faccessat",
    273: "set_robust_list", 277: "sync_file_range", 285: "fallocate", 295: "preadv", 296: "pwritev",
    302: "prlimit64", 309: "getcpu", 316: "renameat2", 318: "getrandom", 326: "copy_file_range",
    327: "preadv2", 328: "pwritev2", 332: "statx", 334: "rseq", 435: "clone3", 439: "faccessat2",
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request: int, thread: int, place: int = 0, value: int = 0) -> int:
    return int(_libc.ptrace(request, thread, place, value & (1 << 64) - 1))


class Fault(NamedTuple):
    """What is to happen at the n-th call of a name (from 1): an error, or a shorter count."""

    name: str
    number: int
    error: int = 0
    short: int = 0


class Tracer:
    """A copy of this process, followed; leaving the ``with`` block ends it."""

    def __init__(self, begin: Callable[[Callable[[], object]], int]) -> None:
        self.pid = begin(self._ask)
        self.calls, self.last = 0, ""
        self.status: int | None = None
        self.counts: collections.Counter[str] = collections.Counter()
        self.places: dict[tuple[str, int], str] = {}  # of each call, what its descriptor has open
        self.failed = ""  # the call that a fault hit, with what its descriptor had open

    @staticmethod
    def _ask() -> None:
        _ptrace(TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)

    def __enter__(self) -> Self:
        os.waitpid(self.pid, ALL_THREADS)
        _ptrace(SETOPTIONS, self.pid, 0, OPTIONS)
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self._reap()

    def _reap(self) -> None:
        while self.status is None:
            thread, status = os.waitpid(-1, ALL_THREADS)
            if thread == self.pid and not os.WIFSTOPPED(status):
                self.status = status
            elif os.WIFSTOPPED(status):
                _ptrace(CONT, thread)

    def _follow(self, at: Callable[[int, bool], bool]) -> bool:
        """Call `at(thread, entering)` at every boundary until it says True; False at the end."""
        within: set[int] = set()
        _ptrace(SYSCALL, self.pid)
        while True:
            thread, status = os.waitpid(-1, ALL_THREADS)
            if not os.WIFSTOPPED(status):
                if thread == self.pid:
                    self.status = status
                    return False
                continue
            passed, what = 0, os.WSTOPSIG(status)
            if what == AT_CALL:
                entering = thread not in within
                within ^= {thread}
                if at(thread, entering):
                    return True
            elif what not in (signal.SIGTRAP, signal.SIGSTOP):  # a new thread's, or clone's
                passed = what
            _ptrace(SYSCALL, thread, 0, passed)

    def kill_at(self, boundary: int) -> bool:
        """End it at a boundary, from 0; False if it came to its end before."""
        seen = -1

        def at(thread: int, entering: bool) -> bool:
            nonlocal seen
            seen += 1
            self.calls += entering
            if seen < boundary:
                return False
            number = _ptrace(PEEKUSER, thread, CALL)
            self.last = f"{'entering' if entering else 'leaving'} {NAMES.get(number, number)}"
            os.kill(self.pid, signal.SIGKILL)
            return True

        if self._follow(at):
            self._reap()
            return True
        return False

    def run(self, fault: Fault | None = None) -> int:
        """Let it run to its end with a fault; return how it ended, as `os.wait` has it."""
        hit: set[int] = set()

        def at(thread: int, entering: bool) -> bool:
            if entering:
                self.calls += 1
                name = NAMES.get(_ptrace(PEEKUSER, thread, CALL), "")
                self.counts[name] += 1
                if fault is None:
                    self.places[name, self.counts[name]] = self._place(thread, name)
                elif (name, self.counts[name]) == fault[:2]:
                    self.failed = self._place(thread, name)
                    if fault.error:
                        _ptrace(POKEUSER, thread, CALL, -1)  # no call at all
                        hit.add(thread)
                    else:
                        size = _ptrace(PEEKUSER, thread, RDX)
                        _ptrace(POKEUSER, thread, RDX, min(fault.short, max(1, size - 1)))
            elif thread in hit:
                hit.remove(thread)
                assert fault is not None
                _ptrace(POKEUSER, thread, RAX, -fault.error)
            return False

        self._follow(at)
        assert self.status is not None
        return self.status

    def arguments(self, thread: int) -> tuple[str, list[int]]:
        """Return the name, or number, of the call that a thread is in, and its six arguments."""
        number, *found = (
            _ptrace(PEEKUSER, thread, place) for place in (CALL, RDI, RSI, RDX, R10, R8, R9)
        )
        return NAMES.get(number, str(number)), found

    def result(self, thread: int) -> int:
        """Return what the call that a thread leaves has given; an error is below zero."""
        return _ptrace(PEEKUSER, thread, RAX)

    def _place(self, thread: int, name: str) -> str:
        if name not in ("read", "write", "close", "fstat", "pread64", "pwrite64", "fsync", "flock",
                        "fdatasync", "ftruncate", "dup", "preadv", "pwritev", "lseek"):  # fmt: skip
            return ""
        try:
            return os.readlink(f"/proc/{self.pid}/fd/{_ptrace(PEEKUSER, thread, RDI)}")
        except OSError:
            return ""


def unavailable() -> str:
    """Return why processes cannot be followed here; nothing if they can."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return "system calls are followed on x86-64 Linux only"

    def begin(before: Callable[[], object]) -> int:
        child = os.fork()
        if not child:
            try:
                before()
            finally:
                os._exit(0)
        return child

    try:
        with Tracer(begin) as traced:
            return "" if traced.run() == 0 and traced.calls else "ptrace is not permitted here"
    except OSError as error:
        return f"ptrace is not permitted here ({error.strerror})"
