"""Record what some functions do to a folder, each in a copy of this process; print what came of it.

    python tests/recorded_acts.py FOLDER

A process of its own, with benchmarks in its path: a copy of one with many threads may hang. See
test_power_loss.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import durable
import recorded_calls
import tracing

OLD = b"the old one"


def many_calls():
    os.mkdir("made", 0o700)
    out = os.open("made/out", os.O_RDWR | os.O_CREAT)
    other = os.open("old", os.O_RDWR | os.O_TRUNC)
    os.write(out, b"one, ")
    os.writev(out, [b"two, ", b"three, "])
    os.pwrite(out, b"ONE", 0)
    os.pwritev(out, [b"T", b"W"], 5)
    os.sendfile(other, out, 0, 9)
    os.lseek(out, 0, os.SEEK_SET)
    os.copy_file_range(out, other, 4)
    os.ftruncate(out, 30)
    os.posix_fallocate(out, 0, 40)
    os.fchmod(out, 0o640)
    os.fdatasync(out)
    os.fsync(os.open("made", os.O_RDONLY))
    os.link("made/out", "made/second", follow_symlinks=False)
    os.rename("made/second", "made/third")
    os.chmod("old", 0o604)
    os.truncate("old", 3)
    os.mkdir("gone")
    os.rmdir("gone")
    os.open("gone", os.O_CREAT | os.O_WRONLY)
    os.unlink("gone")
    with contextlib.suppress(FileNotFoundError):
        os.unlink("gone")


def unnamed():
    os.open(".", os.O_TMPFILE | os.O_WRONLY)


def appended():
    os.open("old", os.O_WRONLY | os.O_APPEND)


def mapped():
    with open("old", "r+b") as file:
        mmap.mmap(file.fileno(), 0)


def process():
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def elsewhere():
    os.open("../else", os.O_CREAT | os.O_WRONLY)


def elsewhere_by_descriptor():
    os.ftruncate(os.open("../theirs", os.O_RDWR), 0)


def symlinked():
    os.symlink("old", "link")


def punched():
    with open("old", "r+b") as file:
        ctypes.CDLL(None).fallocate(file.fileno(), 3, ctypes.c_long(0), ctypes.c_long(4))


ACTS = (many_calls, unnamed, appended, mapped, process, elsewhere, elsewhere_by_descriptor,
        symlinked, punched)  # fmt: skip


def recorded(folder, act):
    """Return the names of the effects, which have to make what stands there; or the error."""

    def begin(follow):
        child = os.fork()
        if child:
            return child
        try:
            os.chdir(folder)
            follow()
            act()
            os.open(f"{folder}.told", os.O_WRONLY | os.O_CREAT)
        finally:
            os._exit(0)

    before = recorded_calls.standing(folder)
    try:
        with recorded_calls.Recorder(begin, folder, Path(f"{folder}.told")) as recorder:
            recorder.record()
    except recorded_calls.UnknownCallError as error:
        return str(error)
    disk = durable.Disk(before)
    for effect in recorder.effects:
        disk.apply(effect)
    now = {path: disk.file(version) for path, version in disk.seen().items()}
    assert now == recorded_calls.standing(folder)
    assert recorder.returned == len(recorder.effects)
    return [type(effect).__name__ for effect in recorder.effects]


def main(root):
    if why := tracing.unavailable():
        sys.exit(why)
    (root / "theirs").write_bytes(OLD)
    found = {}
    for act in ACTS:
        folder = root / act.__name__
        folder.mkdir()
        (folder / "old").write_bytes(OLD)
        found[act.__name__] = recorded(folder, act)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
