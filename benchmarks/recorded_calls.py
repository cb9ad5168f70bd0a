"""Record what a run does to a folder, as effects that `durable.Disk` knows, from its system calls.

A call that changes files and is not known here is an error, and so is one that changes files
elsewhere, or maps a file that may be written to. With ptrace, as tracing.py.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from durable import (
    Effect,
    File,
    Linked,
    Made,
    Moded,
    Removed,
    Renamed,
    Resized,
    Synced,
    Written,
)
from tracing import Tracer

HARMLESS = {
    "read", "readv", "pread64", "preadv", "preadv2", "lseek", "close", "dup", "dup2", "stat",
    "fstat", "lstat", "newfstatat", "statx", "statfs", "fstatfs", "access", "faccessat",
    "faccessat2", "readlink", "readlinkat", "getcwd", "getdents64", "flock", "fadvise64",
    "getxattr", "lgetxattr", "fgetxattr", "munmap", "mprotect", "mremap", "madvise", "brk", "futex",
    "rt_sigaction", "rt_sigprocmask", "sigaltstack", "sched_yield", "sched_getaffinity", "getpid",
    "gettid", "getuid", "getgid", "geteuid", "getegid", "getcpu", "getrandom", "getrusage",
    "sysinfo", "uname", "prctl", "prlimit64", "clock_gettime", "clock_nanosleep", "set_robust_list",
    "rseq", "exit", "exit_group", "sync_file_range",  # which makes nothing durable for certain
}  # fmt: skip
AT_PLACE = ("pwrite64", "pwritev", "pwritev2")
WRITES = ("write", "writev", *AT_PLACE, "sendfile", "copy_file_range")
ON_DESCRIPTORS = {**dict.fromkeys(WRITES, 0), "copy_file_range": 2} | dict.fromkeys(
    ("ftruncate", "fallocate", "fchmod", "fsync", "fdatasync"), 0
)  # which argument is the one that is changed
PATHS = {  # the arguments that are a folder's descriptor (-1: none) and a path, each
    "open": ((-1, 0),), "openat": ((0, 1),), "creat": ((-1, 0),),
    "mkdir": ((-1, 0),), "mkdirat": ((0, 1),), "rmdir": ((-1, 0),),
    "unlink": ((-1, 0),), "unlinkat": ((0, 1),),
    "link": ((-1, 0), (-1, 1)), "linkat": ((0, 1), (2, 3)),
    "rename": ((-1, 0), (-1, 1)), "renameat": ((0, 1), (2, 3)), "renameat2": ((0, 1), (2, 3)),
    "truncate": ((-1, 0),), "chmod": ((-1, 0),), "fchmodat": ((0, 1),),
}  # fmt: skip
HERE = -100  # AT_FDCWD
KEEP_SIZE, NO_REPLACE, EXCHANGE, THREAD = 1, 1, 2, 0x10000


class UnknownCallError(Exception):
    """A call changes files in a way that the model of a disk does not know."""


class Begun(NamedTuple):
    """A call that a thread has entered."""

    name: str
    arguments: list[int]
    effects: int  # that there were when it was entered
    paths: list[str]
    existed: bool  # whether there was what the call may make, or removes
    node: str  # of the descriptor


def standing(folder: Path) -> dict[str, File]:
    """Return what stands in a folder by path, folders with a slash behind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[f"{name}/"] = File(b"", mode)
        else:
            found[name] = File(path.read_bytes(), mode)
    return found


class Recorder(Tracer):
    """A copy of this process, of which every change to a folder is recorded.

    The run has returned when `told` is opened, which lies elsewhere; `returned` is the number of
    effects before that. What an `earlier` run did is taken over.
    """

    def __init__(
        self,
        begin: Callable[[Callable[[], object]], int],
        folder: Path,
        told: Path,
        earlier: Recorder | None = None,
    ) -> None:
        self.folder, self._told = os.path.realpath(folder), os.path.realpath(told)
        self.effects: list[Effect] = []
        self.returned: int | None = None
        self._nodes: dict[tuple[int, int], str] = {}
        if earlier is None:
            for name in standing(folder):
                self._nodes[_identity(os.lstat(folder / name))] = name
            self._nodes[_identity(os.stat(folder))] = ""
        else:
            self.effects += earlier.effects
            self._nodes |= earlier._nodes
        super().__init__(begin)

    def names(self) -> int:
        """Return how many names were given, exchanged or removed."""
        return sum(isinstance(effect, (Linked, Renamed, Removed)) for effect in self.effects)

    def record(self, names: int | None = None) -> int:
        """Let it run to its end, or kill it after so many `names`; return how it ended."""
        begun: dict[int, Begun] = {}

        def at(thread: int, entering: bool) -> bool:
            if entering:
                self.calls += 1
                begun[thread] = self._enter(*self.arguments(thread))
            elif (result := self.result(thread)) >= 0:  # what fails changes nothing
                self._leave(begun[thread], result)
            return names is not None and self.names() >= names

        if self._follow(at):
            os.kill(self.pid, signal.SIGKILL)
            self._reap()
        assert self.status is not None
        return self.status

    def _enter(self, name: str, arguments: list[int]) -> Begun:
        paths = [self._path(*(arguments[n] if n >= 0 else HERE for n in pair))
                 for pair in PATHS.get(name, ())]  # fmt: skip
        node = ""
        if name in ON_DESCRIPTORS:
            node = self._node(arguments[ON_DESCRIPTORS[name]], name)
        existed = bool(paths) and os.path.lexists(paths[0])
        if name == "fremovexattr":
            place = f"/proc/{self.pid}/fd/{arguments[0]}"
            existed = self._text(arguments[1]) in map(os.fsencode, os.listxattr(place))
        return Begun(name, arguments, len(self.effects), paths, existed, node)

    def _path(self, descriptor: int, pointer: int) -> str:
        """Return the path that a call is given, of which only the last part may be a link."""
        low = descriptor & 0xFFFFFFFF
        above = f"/proc/{self.pid}/" + ("cwd" if low == HERE & 0xFFFFFFFF else f"fd/{low}")
        path = os.path.join(os.readlink(above), os.fsdecode(self._text(pointer)))
        folder, name = os.path.split(path.rstrip("/"))
        return os.path.join(os.path.realpath(folder), name)

    def _text(self, pointer: int) -> bytes:
        text = b""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            while b"\0" not in text:  # up to the page's end, behind which there may be nothing
                memory.seek(pointer + len(text))
                text += memory.read(4096 - (pointer + len(text)) % 4096)
        return text.partition(b"\0")[0]

    def _node(self, descriptor: int, name: str) -> str:
        """Return the file or folder that a descriptor has open; nothing for a pipe or device."""
        place = f"/proc/{self.pid}/fd/{descriptor & 0xFFFFFFFF}"
        try:
            status, path = os.stat(place), os.readlink(place)
        except OSError:
            return "none"  # the call will fail
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return "none"
        if path == self._told:
            return "none"
        if _identity(status) not in self._nodes:
            raise UnknownCallError(f"{name} of a file elsewhere: {path}")
        return self._nodes[_identity(status)]

    def _inside(self, path: str, name: str) -> str:
        if os.path.commonpath((path, self.folder)) != self.folder:
            raise UnknownCallError(f"{name} elsewhere: {path}")
        return os.path.relpath(path, self.folder)

    def _leave(self, call: Begun, result: int) -> None:
        name, arguments = call.name, call.arguments
        if name in ("open", "openat", "creat"):
            self._opened(call, result)
        elif name in PATHS:
            self._named(call, [self._inside(path, name) for path in call.paths])
        elif name in WRITES and call.node != "none":
            self._wrote(call, result)
        elif name in ON_DESCRIPTORS and call.node != "none":
            self._changed(call)
        elif name == "mmap":
            self._mapped(arguments)
        elif name == "fcntl":
            if arguments[1] in (fcntl.F_SETFL,):
                raise UnknownCallError("fcntl changes how a file is written")
        elif name == "ioctl":
            if arguments[1] & 0xFF00 != 0x5400:  # a terminal's; FICLONE is another
                raise UnknownCallError(f"ioctl {arguments[1]:#x}")
        elif name == "clone":
            if not arguments[0] & THREAD:
                raise UnknownCallError("another process is started")
        elif name == "clone3":
            with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
                memory.seek(arguments[0])
                if not int.from_bytes(memory.read(8), "little") & THREAD:
                    raise UnknownCallError("another process is started")
        elif name == "fremovexattr":
            if call.existed:
                raise UnknownCallError("a list of access is removed")
        elif name not in HARMLESS and name not in ON_DESCRIPTORS:
            raise UnknownCallError(f"the call {name} is not known")

    def _opened(self, call: Begun, descriptor: int) -> None:
        (path,), name = call.paths, call.name
        flags = {"open": call.arguments[1], "openat": call.arguments[2]}.get(
            name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY
        )
        if path == self._told:
            self.returned = len(self.effects)
        elif flags & os.O_TMPFILE == os.O_TMPFILE:
            raise UnknownCallError("O_TMPFILE makes a file without a name")
        elif flags & os.O_CREAT and not call.existed:
            self._made(self._inside(path, name), f"/proc/{self.pid}/fd/{descriptor}")
        elif flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC):
            node = self._node(descriptor, name)
            if flags & os.O_TRUNC and node != "none":
                self.effects.append(Resized(node, 0))
            if flags & os.O_APPEND and node != "none":
                raise UnknownCallError(f"{path} is opened to be appended to")

    def _made(self, path: str, place: str, folder: bool = False) -> None:
        status = os.stat(place)
        node = f"{path} of {len(self.effects)}"  # a number may be given to another file later
        self._nodes[_identity(status)] = node
        self.effects.append(Made(path, node, stat.S_IMODE(status.st_mode), folder))

    def _named(self, call: Begun, paths: list[str]) -> None:
        name, arguments = call.name, call.arguments
        if name in ("mkdir", "mkdirat"):
            self._made(paths[0], call.paths[0], folder=True)
        elif name in ("unlink", "unlinkat", "rmdir"):
            self.effects.append(Removed(paths[0]))
        elif name in ("link", "linkat"):
            self.effects.append(Linked(*paths))
        elif name in ("rename", "renameat", "renameat2"):
            flags = arguments[4] if name == "renameat2" else 0
            if flags not in (0, NO_REPLACE, EXCHANGE):
                raise UnknownCallError(f"renameat2 with {flags}")
            self.effects.append(Renamed(paths[0], paths[1], flags == EXCHANGE))
        else:
            status = os.stat(call.paths[0])
            node = self._nodes[_identity(status)]
            if name == "truncate":
                self.effects.append(Resized(node, arguments[1]))
            else:
                self.effects.append(Moded(node, stat.S_IMODE(status.st_mode)))

    def _wrote(self, call: Begun, size: int) -> None:
        """Record what a call wrote, which is read from the file itself, by whatever call."""
        descriptor = call.arguments[ON_DESCRIPTORS[call.name]]
        if call.name in AT_PLACE and call.arguments[3] >= 0:
            offset = call.arguments[3]
        elif call.name == "copy_file_range" and call.arguments[3]:
            raise UnknownCallError("copy_file_range to a place of its own")
        else:  # where the file is now
            with open(f"/proc/{self.pid}/fdinfo/{descriptor}") as told:
                offset = int(told.readline().split()[1]) - size
        with open(f"/proc/{self.pid}/fd/{descriptor}", "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        assert len(data) == size
        if size:
            self.effects.append(Written(call.node, offset, data))

    def _changed(self, call: Begun) -> None:
        name, arguments, node = call.name, call.arguments, call.node
        if name in ("fsync", "fdatasync"):
            self.effects.append(Synced(node, call.effects, name == "fdatasync"))
            return
        status = os.stat(f"/proc/{self.pid}/fd/{arguments[0]}")
        if name == "fchmod":
            self.effects.append(Moded(node, stat.S_IMODE(status.st_mode)))
        elif name == "ftruncate":
            self.effects.append(Resized(node, arguments[1]))
        elif arguments[1] == 0:
            self.effects.append(Resized(node, status.st_size))
        elif arguments[1] != KEEP_SIZE:
            raise UnknownCallError(f"fallocate with {arguments[1]}")

    def _mapped(self, arguments: list[int]) -> None:
        """Refuse what could be written through a mapping, now or after a change of protection."""
        descriptor = arguments[4] & 0xFFFFFFFF
        if not arguments[3] & mmap.MAP_SHARED or descriptor == 0xFFFFFFFF:
            return
        with open(f"/proc/{self.pid}/fdinfo/{descriptor}") as told:
            flags = next(int(line.split()[1], 8) for line in told if line.startswith("flags"))
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise UnknownCallError("a file that may be written to is mapped")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
