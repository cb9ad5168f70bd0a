"""Have the system fail: one call, one allocation, or the room on the disk; and see what is left.

    python benchmarks/injected.py FOLDER [--calls] [--allocations] [--full] [--formats NAME,...]

Each run averages two small checkpoints over an existing output, in a fresh copy of this process.

``--calls``: every call of the run that writes, truncates, syncs, renames, links, removes, opens,
closes or reads fails once with each error that it can have, and every write and read is once cut
short. By ptrace: it is the kernel's answer that is changed, HDF5's calls included (x86-64 Linux).
``--allocations``: the n-th ``malloc`` fails, for every n, by a library loaded before the C library
(needs a C compiler). Small objects of Python come out of larger blocks; with PYTHONMALLOC=malloc in
the environment each is an allocation of its own.
``--full``: the output lies on a file system of its own (tmpfs, and ext4 on a loop device; needs
root) with n free pages, for every n that is too few; the look at the free room is left out.

What must be: an error of wavg's own (or success, where the failure is of no account), the old
output byte for byte (or, with success, the new one), no temporary left, the files of others
untouched. Writes injected_calls.json, injected_allocations.json, injected_full_tmpfs.json and
injected_full_ext4.json to results; exit code 1 if anything was bad.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a copy of a process has only the thread that made it

from common import record
from small_runs import DONE, KINDS, TYPED, Small, ended, recorded
from tracing import Fault, Tracer, unavailable

from wavg import outputs

HERE = Path(__file__).parent
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
ERRORS: dict[str, tuple[int, ...]] = {
    "pwrite64": (*DISK, errno.EINTR),
    "write": (*DISK, errno.EINTR),
    "ftruncate": (*DISK, errno.EINTR),
    "fsync": (*DISK, errno.EINTR),
    "fdatasync": (*DISK, errno.EINTR),
    "rename": DISK,
    "renameat2": DISK,
    "link": DISK,
    "mkdir": DISK,
    "chmod": (errno.EIO, errno.EPERM),
    "unlink": (errno.EIO,),
    "rmdir": (errno.EIO,),
    "close": (*DISK, errno.EINTR),
    "openat": (errno.EIO, errno.ENOSPC, errno.EMFILE),
    "dup": (errno.EMFILE,),
    "flock": (errno.ENOLCK,),
    "getdents64": (errno.EIO,),
    "pread64": (errno.EIO, errno.EINTR),
    "preadv": (errno.EIO, errno.EINTR),
    "read": (errno.EIO, errno.EINTR),
}
READS, MOST_READS = ("pread64", "preadv", "read"), 60  # of each, evenly spread
PATIENCE = 10  # seconds; a run takes 0.05
NEEDLESS = (errno.EINTR,)  # the system asks for the same call again, and gets it


def verdict(small: Small, fate: str, *, must_fail: bool = False) -> str:
    """Return what came of a fault: ``typed error``, ``went on``, or what is bad about it."""
    state, strays = small.state()
    message = small.message()
    if fate == "done" and must_fail:
        return "bad: went on"
    if strays and "cannot be removed" in message and {fate, state} == {"done", "new"}:
        return "went on, a temporary left to the next run"
    if not strays:
        if fate == "done" and state == "new":
            return "went on"
        if fate == "typed error" and state in ("old", "new"):
            return "typed error" if state == "old" else "typed error, the new output complete"
    return f"bad: {fate}, {state}, {strays} temporaries, {message[:200]}"


class Tally:
    """What came of the faults of one format, by what failed."""

    def __init__(self, small: Small) -> None:
        self.small = small
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self.bad: list[str] = []

    def add(self, what: str, where: str, outcome: str) -> None:
        self.counts[what][outcome.partition(":")[0]] += 1
        if outcome.startswith("bad"):
            self.bad.append(f"{where}: {outcome}")
            print("   ", self.bad[-1], flush=True)

    def reclaimed(self) -> None:
        """Have a run that nothing fails end, and leave nothing."""
        after = ended(self.small.begin()), *self.small.state()
        if after != ("done", "new", 0):
            self.bad.append(f"the run after: {after}")

    def figures(self) -> dict:
        counts = {name: dict(sorted(found.items())) for name, found in self.counts.items()}
        return {"faults": counts, "bad": len(self.bad), "examples": self.bad[:5]}


def fate_of(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {os.WTERMSIG(status)}"
    return {DONE: "done", TYPED: "typed error"}.get(os.WEXITSTATUS(status), "untyped error")


def calls(small: Small) -> dict:
    """Fail every call of the table, each in a run of its own."""
    tally = Tally(small)
    with Tracer(small.begin) as traced:
        assert fate_of(traced.run()) == "done"
        counts, places = traced.counts, traced.places
    small.restore()
    for name in ERRORS:
        step = max(1, -(-counts[name] // MOST_READS)) if name in READS else 1
        for number in range(1, counts[name] + 1, step):
            faults = [Fault(name, number, error) for error in ERRORS[name]]
            if name in ("pwrite64", "write"):
                faults += [Fault(name, number, short=1), Fault(name, number, short=5)]
            if name in ("pread64", "read"):
                faults.append(Fault(name, number, short=1))
            for fault in faults:
                with Tracer(small.begin) as traced:
                    fate = fate_of(traced.run(fault))
                    place = traced.failed or places.get((name, number), "")
                what = errno.errorcode[fault.error] if fault.error else "short"
                inside = place.startswith(str(small.out))
                must_fail = (
                    inside
                    and fault.error not in (0, *NEEDLESS)
                    and name in ("pwrite64", "write", "ftruncate", "fsync", "fdatasync")
                )
                outcome = verdict(small, fate, must_fail=must_fail)
                if outcome.endswith("complete"):  # only for lack of memory
                    outcome = f"bad: {outcome}"
                kind = (
                    "fsync of the folder" if name == "fsync" and place == str(small.out) else name
                )
                tally.add(f"{kind} {what}", f"{fault}, {Path(place).name}", outcome)
                if outcome.endswith("next run") and small.replaces:
                    tally.reclaimed()
                small.restore()
    return tally.figures()


def armed() -> ctypes.CDLL | None:
    """Return the library that fails allocations, if this process has been started with it."""
    loaded = ctypes.CDLL(None)
    return loaded if hasattr(loaded, "failing_malloc_arm") else None


def start_again(folder: Path, arguments: list[str]) -> None:
    """Replace this process by one with the library that fails allocations."""
    library = folder / "failing_malloc.so"
    folder.mkdir(parents=True, exist_ok=True)
    source = HERE / "failing_malloc.c"
    command = ["cc", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"--allocations needs a C compiler: {error}")
    variables = {**os.environ, "LD_PRELOAD": str(library)}
    os.execve(sys.executable, [sys.executable, *arguments], variables)


def allocations(small: Small, library: ctypes.CDLL, most: int) -> dict:
    """Fail every allocation of the run, or `most` of them, evenly spread."""
    tally = Tally(small)
    report = small.root / "allocations"

    original = small.run

    def counted() -> None:
        original()
        report.write_text(str(library.failing_malloc_count()))

    small.run = counted  # type: ignore[method-assign]
    assert ended(small.begin(lambda: library.failing_malloc_arm(0))) == "done"
    small.run = original  # type: ignore[method-assign]
    total = int(report.read_text())
    small.restore()
    step = max(1, total // most) if most else 1
    for number in range(1, total + 1, step):
        child = small.begin(lambda number=number: library.failing_malloc_arm(number))
        fate = ended(child, PATIENCE)
        state, strays = small.state()
        message = small.message()
        if fate.startswith(("killed", "hung", "exit code")) and state in ("old", "new"):
            tally.add(fate, "", "the interpreter or a library")
            tally.reclaimed()
        elif fate == "untyped error" and state == "old" and not strays:
            tally.add(message.partition(":")[0], message[:100], fate)
            if tally.counts[message.partition(":")[0]][fate] < 4:
                print("   ", number, message[:200], flush=True)
        else:
            tally.add("all", f"allocation {number} of {total}", verdict(small, fate))
        small.restore()
    return {"allocations": total, "step": step, **tally.figures()}


@contextlib.contextmanager
def mounted(folder: Path, kind: str) -> Iterator[Path]:
    """Mount a file system of its own, of a few MiB."""
    place, image = folder / kind, folder / "image"
    place.mkdir(parents=True, exist_ok=True)
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    else:
        image.write_bytes(b"")
        os.truncate(image, 16 << 20)
        quiet = ["mkfs.ext4", "-q", "-m", "0", "-b", "4096", "-O", "^has_journal", str(image)]
        subprocess.run(quiet, check=True)
        command = ["mount", "-o", "loop", str(image), str(place)]
    subprocess.run(command, check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
        image.unlink(missing_ok=True)


def free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def full(small: Small) -> dict:
    """Leave n pages free, for every n up to what the run takes."""
    tally, filler = Tally(small), small.root / "filler"
    page = os.statvfs(small.out).f_frsize

    def room(pages: int) -> None:
        with open(filler, "ab") as file:
            os.ftruncate(file.fileno(), 0)
            file.flush()
            while (extra := free(small.root) - pages * page) > 0:
                size = os.fstat(file.fileno()).st_size
                os.posix_fallocate(file.fileno(), size, min(extra, max(page, extra // 2)))

    def unwarned() -> None:
        outputs.refuse_full = lambda plans: None  # the room goes after it was looked at

    pages = 0
    while True:
        room(pages)
        fate = ended(small.begin(unwarned))
        message = small.message()
        filler.unlink()
        outcome = verdict(small, fate)
        told = "No space left" in message or fate == "done"
        tally.add("no room", f"{pages} pages", outcome if told else f"bad: {fate}, {message}")
        if fate == "done" or pages > 600:
            break
        small.restore()
        pages += 1
    small.restore()
    return {"enough_pages": pages, "page": page, **tally.figures()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calls", action="store_true")
    parser.add_argument("--allocations", action="store_true")
    parser.add_argument("--most", type=int, default=0, help="allocations to fail; all by default")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--systems", default="tmpfs,ext4", help="of --full")
    parser.add_argument("--formats", default="", help="names, separated by commas; all by default")
    parser.add_argument("--no-record", action="store_true", help="only print")
    options = parser.parse_args()
    if options.calls and (why := unavailable()):
        sys.exit(f"--calls: {why}")
    library = armed()
    if options.allocations and library is None:
        start_again(options.folder, sys.argv)
    wanted = [name for name in options.formats.split(",") if name]
    kinds = [kind for kind in KINDS if not wanted or kind.name in wanted]
    bad = 0

    def each(name: str, make: Callable[[Small], dict], folder: Path) -> None:
        nonlocal bad
        found = recorded(f"injected_{name}", wanted)
        for kind in kinds:
            small = Small(kind, folder / "injected")
            found[kind.name] = make(small)
            bad += found[kind.name]["bad"]
            print(f"{kind.name}, {name}: {found[kind.name]}", flush=True)
            if not options.no_record:
                record(f"injected_{name}", "inputs in the page cache", found)

    if options.calls:
        each("calls", calls, options.folder)
    if options.allocations and library is not None:
        allocator = os.environ.get("PYTHONMALLOC", "default")
        name = "allocations" if allocator == "default" else f"allocations_{allocator}"
        each(name, lambda small: allocations(small, library, options.most), options.folder)
    if options.full:
        for kind in options.systems.split(","):
            with mounted(options.folder, kind) as place:
                each(f"full_{kind}", full, place)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
