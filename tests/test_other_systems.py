"""What other systems lack, or do otherwise, taken from this one: averages as on Windows and macOS.

It is no proof for those, but every way round what is missing is gone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import small_files
import wavg
from wavg import (
    OutputError,
    OutputExistsError,
    access,
    checkpoint,
    compiled,
    destinations,
    formats,
    journal,
    opening,
    positional,
    publish,
    publish_folder,
    record,
    renames,
    temporaries,
)
from wavg.evaluation import Command, Outcome
from wavg.formats import is_folder_output, isolated
from wavg.grid import Grid
from wavg.journal import Journal
from wavg.publish import AtomicFile
from wavg.publish_folder import AtomicFolder

linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks at files by /proc")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- Windows --------------------------------------------------------------------------------------

MISSING = ["pread", "preadv", "pwrite", "pwritev", "chown", "fchmod", "fchown", "fdatasync"]
MISSING += ["getxattr", "setxattr", "removexattr", "listxattr", "statvfs", "sched_getaffinity"]
MISSING += ["O_DIRECTORY", "O_CLOEXEC", "killpg", "register_at_fork", "geteuid"]
BINARY = 1 << 28  # the flag without which Windows changes bytes


def held(path) -> bool:
    """Whether this process has a file open, or one of a folder's files."""
    for name in os.listdir("/proc/self/fd"):
        try:
            place = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # of the listing itself
        if place == os.path.realpath(path) or place.startswith(os.path.realpath(path) + "/"):
            return True
        if os.path.exists(place) and os.path.exists(path) and os.path.samefile(place, path):
            return True  # by another of its names
    return False


def refuse_held(*paths) -> None:
    for path in paths:
        if held(path):
            raise PermissionError(errno.EACCES, "used by another process", os.fspath(path))


def like_windows(monkeypatch) -> None:
    """Take away what is missing there; let no open file be renamed, replaced or removed."""
    for name in MISSING:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(os, "supports_fd", set())
    monkeypatch.setattr(access, "_LISTS", ())
    monkeypatch.setattr(publish, "_sync_data", os.fsync)
    monkeypatch.setattr(renames, "_CALLS", {})
    monkeypatch.setattr(compiled, "COMPILED", False)
    for module in (renames, temporaries, journal):
        monkeypatch.setattr(module, "fcntl", None)
    for module in (publish, publish_folder):
        monkeypatch.setattr(module, "MOVES_OPEN_FILES", False)
    monkeypatch.setattr(os, "O_BINARY", BINARY, raising=False)
    monkeypatch.setattr(checkpoint, "_O_BINARY", BINARY)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    real_open, real_rename, real_replace, real_unlink = os.open, os.rename, os.replace, os.unlink

    def opened(path, flags, mode=0o777, **rest):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        assert flags & BINARY or "pytest" not in path, path
        return real_open(path, flags & ~BINARY, mode, **rest)

    def renamed(old, new, **rest):
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, "File exists", new)
        refuse_held(old)
        real_rename(old, new, **rest)

    def replaced(old, new, **rest):
        refuse_held(old, new)
        real_replace(old, new, **rest)

    def unlinked(path, **rest):
        refuse_held(path)
        real_unlink(path, **rest)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "unlink", unlinked)


@pytest.fixture
def windows(monkeypatch):
    like_windows(monkeypatch)


def averaged(folder, suffix, **options):
    """All that an average of small files leaves in a folder."""
    paths = small_files.inputs(folder / "in", suffix)
    (folder / "out").mkdir()
    wavg.average_checkpoints(paths, small_files.output(folder / "out", suffix), **options)
    return small_files.contents(folder / "out")


@pytest.fixture
def here(tmp_path):
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def there(tmp_path):
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


@linux
@pytest.mark.parametrize("suffix", small_files.ALL)
def test_an_average_has_the_same_bytes_where_windows_lacks_half_of_it(
    here, there, monkeypatch, suffix
):
    expected = averaged(here, suffix)
    like_windows(monkeypatch)
    assert averaged(there, suffix) == expected


@linux
@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_so_has_one_that_hdf5_writes_anew(here, there, monkeypatch, suffix):
    expected = averaged(here, suffix, dtype="float16")
    like_windows(monkeypatch)
    assert averaged(there, suffix, dtype="float16") == expected


@linux
@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("suffix", small_files.REPLACED[:-1])
def test_windows_replaces_a_file_that_was_an_input(here, windows, monkeypatch, suffix, link):
    def refuse(*_):
        raise OSError(errno.EINVAL, "no hard links here")

    if not link:
        monkeypatch.setattr(os, "link", refuse)
    paths = small_files.inputs(here, suffix)
    expected = wavg.average_checkpoints(paths)
    names = set(small_files.contents(here))
    wavg.average_checkpoints(paths, paths[-1], overwrite=True)
    assert set(small_files.contents(here)) == names
    found = wavg.load(paths[-1])
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


@linux
def test_windows_takes_back_what_the_disk_does_not_confirm(here, windows, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(publish, "sync_folder", fail)
    for kind in (AtomicFile, AtomicFolder):
        with pytest.raises(OutputError, match="untouched"), kind(f"{here}/out") as made:
            made.commit()
    assert os.listdir(here) == []


@linux
def test_windows_leaves_no_trace_of_what_failed(here, windows):
    for kind in (AtomicFile, AtomicFolder):
        with kind(f"{here}/out") as made:
            (made if kind is AtomicFile else made.file("a")).write(b"x", 0)
    assert os.listdir(here) == []


@linux
def test_windows_leaves_what_appeared_meanwhile(here, windows, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    with AtomicFile(f"{here}/out") as file:
        (here / "out").write_bytes(b"theirs")
        with pytest.raises(OutputExistsError, match="appeared"):
            file.commit()
    assert small_files.contents(here) == {"out": b"theirs"}


@linux
def test_windows_does_not_replace_a_folder_and_says_why(here, windows):
    averaged(here, "/")
    with pytest.raises(OutputExistsError, match="cannot replace a folder at one instant"):
        wavg.average_checkpoints(f"{here}/in/*", f"{here}/out/out/", overwrite=True)
    assert os.listdir(here / "out") == ["out"]


def test_a_full_disk_is_told_without_statvfs(here, monkeypatch):
    monkeypatch.delattr(os, "statvfs", raising=False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    destinations.refuse_full(f"{here}/out", 10)
    with pytest.raises(OutputError, match="10 are free"):
        destinations.refuse_full(f"{here}/out", 11)


@linux
def test_streams_journals_and_sums_on_disk_do_with_what_windows_has(here, windows):
    averager = wavg.StreamingAverager("linear", window=2, folder=here / "ring")
    for step in (1, 2, 3):
        averager.update({"w": np.float32([step])})
    assert averager.result()["w"] == 8 / 3  # (2×2 + 3×3) / 5, rounded below
    plain = wavg.StreamingAverager("linear")
    plain.update({"w": np.float32([2])})
    plain.save(here / "state.safetensors")
    plain.save(here / "state.safetensors")
    with Journal(f"{here}/j", {"a": 1}) as first:
        first.begin("x")
        first.end("x", Outcome(1.0))
    assert (here / "j").read_bytes().count(b"\r") == 0
    paths = small_files.inputs(here / "in", ".safetensors")
    kept = wavg.sweep(paths, lambda model: 1.0, maximize=True, max_memory="32MiB")
    assert len(kept.averages) == 2


def test_threads_that_share_a_descriptor_take_turns_where_it_has_a_position(here, monkeypatch):
    for name in ("pread", "preadv", "pwrite"):
        monkeypatch.delattr(os, name, raising=False)
    path, size = here / "shared", 1 << 13
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0))
    wrong = []

    def work(number):
        out = np.empty(16, np.uint8)
        for place in range(number * 16, size * 16, 4 * 16):
            positional.write_exactly(descriptor, bytes([place // 16 % 251]) * 16, place)
            if (
                not positional.read_exactly(descriptor, place, out)
                or (out != place // 16 % 251).any()
            ):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert os.fstat(descriptor).st_size == size * 16
    os.close(descriptor)


def at_most(most, real):
    """A call that refuses more bytes at once, as macOS does with 2 GiB."""

    def call(descriptor, what, offset):
        size = what if isinstance(what, int) else len(what[0] if isinstance(what, list) else what)
        if size > most:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, what, offset)

    return call


@pytest.mark.parametrize("missing", [(), ("preadv",), ("preadv", "pread", "pwrite")])
def test_reads_and_writes_larger_than_the_system_takes_are_done_in_parts(
    here, monkeypatch, missing
):
    for name in missing:
        monkeypatch.delattr(os, name, raising=False)
    for name in {"preadv", "pread", "pwrite"} - set(missing):
        monkeypatch.setattr(os, name, at_most(5, getattr(os, name)))
    monkeypatch.setattr(positional, "_MOST", 5)
    monkeypatch.setattr(positional, "_COPIED", 3)
    descriptor = os.open(here / "f", os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0))
    positional.write_exactly(descriptor, b"abcdefghijklm", 2)
    out = np.empty(14, np.uint8)
    assert positional.read_exactly(descriptor, 1, out)
    assert out.tobytes() == b"\0abcdefghijklm"
    assert not positional.read_exactly(descriptor, 2, out)
    assert positional.read_at(descriptor, 4, 3) == b"bcde"
    assert positional.read_at(descriptor, 9, 3) == b"bcdef"
    assert positional.read_at(descriptor, 4, 15) == b""
    os.close(descriptor)


def test_a_command_that_takes_too_long_ends_where_groups_cannot_be_killed(monkeypatch):
    monkeypatch.delattr(os, "killpg", raising=False)
    command = Command(f"{sys.executable} -c 'import time; time.sleep(60)' {{}}", timeout=0.2)
    assert "took more than 0.2 s" in command("model").error


BARE = """
import sys
for name in ("fcntl", "resource", "wavg._compiled"):
    sys.modules[name] = None  # importing it fails
import os
for name in ("pread", "preadv", "pwrite"):
    delattr(os, name)
import numpy as np, wavg, wavg.cli, wavg.formats.isolated
from wavg.kernel import COMPILED
assert not COMPILED
folder = sys.argv[1]
for suffix in ("safetensors", "npz", "h5"):
    for step in (1, 2):
        wavg.save(f"{folder}/m_{step}.{suffix}", {"a/w": np.float32([step, 4])})
    words = [f"{folder}/m_1.{suffix}", f"{folder}/m_2.{suffix}", "--no-isolate", "--quiet"]
    for more in ([], ["--overwrite"]):
        assert not wavg.cli.main(["average", *words, "-o", f"{folder}/out.{suffix}", *more])
    assert wavg.load(f"{folder}/out.{suffix}")["a/w"].tolist() == [1.5, 4]
assert len(os.listdir(folder)) == 9, os.listdir(folder)
"""


def test_it_imports_and_averages_without_the_modules_that_only_unix_has(here):
    subprocess.run([sys.executable, "-W", "error", "-c", BARE, str(here)], check=True)


def test_names_with_backslashes_and_several_drives(monkeypatch):
    import ntpath

    monkeypatch.setattr(os, "path", ntpath)
    monkeypatch.setattr(os, "sep", "\\")
    assert record.names_within([r"C:\run\a\m.safetensors", r"C:\run\b\m.safetensors"]) == [
        "a/m.safetensors",
        "b/m.safetensors",
    ]
    several = [r"C:\m.safetensors", r"D:\m.safetensors"]
    assert record.names_within(several) == ["C:/m.safetensors", "D:/m.safetensors"]
    assert destinations.bare("run\\out\\") == r"run\out"


def test_a_schedules_name_is_part_of_a_files_name_and_no_path():
    rule = wavg.Schedule(r"a:b/c\d", np.ones_like)
    (path,) = Grid.of(rule, None).outputs("{weights}.npz", SimpleNamespace(count=2, paths=["m"]))
    assert path == "a-b-c-d.npz"


def test_a_folders_name_may_end_with_the_systems_own_separator(monkeypatch):
    import ntpath

    monkeypatch.setattr(formats, "has_folder", lambda path: True)
    assert is_folder_output("out.npz/", "model")
    monkeypatch.setattr(os, "path", ntpath)
    assert is_folder_output("out.npz\\", "model")


# --- macOS ----------------------------------------------------------------------------------------


class FullSync:
    """The module fcntl of macOS, whose F_FULLFSYNC reaches the platter."""

    F_FULLFSYNC = 51

    def __init__(self, error=0):
        self.error, self.done = error, []

    def fcntl(self, descriptor, what):
        assert what == self.F_FULLFSYNC
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self.done.append(os.fstat(descriptor).st_ino)


def test_on_macos_a_file_and_its_folder_reach_the_platter(here, monkeypatch):
    full = FullSync()
    monkeypatch.setattr(renames, "fcntl", full)
    monkeypatch.setattr(os, "fsync", None)  # would leave it in the disk's own memory
    with AtomicFile(f"{here}/out") as file:
        file.commit()
    assert full.done == [os.stat(here / "out").st_ino, os.stat(here).st_ino]


def test_where_a_file_system_has_no_such_sync_the_plain_one_is_asked(here, monkeypatch):
    synced = []
    monkeypatch.setattr(renames, "fcntl", FullSync(errno.ENOTSUP))
    monkeypatch.setattr(os, "fsync", synced.append)
    with AtomicFile(f"{here}/out") as file:
        file.commit()
    assert len(synced) == 2


def test_a_full_sync_that_fails_is_no_success(here, monkeypatch):
    monkeypatch.setattr(renames, "fcntl", FullSync(errno.EIO))
    with pytest.raises(OutputError) as caught, AtomicFile(f"{here}/out") as file:
        file.commit()
    assert caught.value.errno == errno.EIO
    assert os.listdir(here) == []


@pytest.fixture
def macos(monkeypatch):
    """Renames by the call of macOS, which is Linux's with other names and numbers."""
    real = ctypes.CDLL(None, use_errno=True).renameat2

    class Library:
        @staticmethod
        def renameatx_np(old_folder, old, new_folder, new, flag):
            assert (old_folder.value, new_folder.value) == (-2, -2)
            here = ctypes.c_int(-100)
            return real(here, old, here, new, ctypes.c_uint({4: 1, 2: 2}[flag.value]))

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library)


@linux
def test_macos_replaces_folders_at_one_instant(here, macos):
    before = averaged(here, "/")
    wavg.average_checkpoints(f"{here}/in/*", f"{here}/out/out/", overwrite=True)
    assert small_files.contents(here / "out").keys() == before.keys()
    with AtomicFolder(f"{here}/new") as folder:
        (here / "new").mkdir()
        with pytest.raises(OutputExistsError, match="appeared"):
            folder.commit()


def test_a_limit_on_open_files_that_the_system_keeps_is_kept(monkeypatch):
    import resource

    def refuse(*_):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    opening._allow_open_files(10_000)


# --- file systems of a network, and odd ones ------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_without_locks_outputs_are_made_and_strays_are_left(here, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    stray = here / ".out.0123456789ab.wavg-tmp"
    stray.write_bytes(b"")
    monkeypatch.setattr(temporaries.fcntl, "flock", refuse)
    for kind in (AtomicFile, AtomicFolder):
        with kind(f"{here}/out{kind.__name__}") as made:
            made.commit()
    with Journal(f"{here}/j", {}):
        pass
    assert sorted(os.listdir(here)) == [stray.name, "j", "outAtomicFile", "outAtomicFolder"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_folder_that_no_file_system_syncs_is_not_waited_for(here, monkeypatch, code):
    real = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with AtomicFile(f"{here}/out") as file:
        file.commit()
    assert os.listdir(here) == ["out"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES])
def test_without_hard_links_what_appears_meanwhile_is_left_too(here, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    for flags in (True, False):
        if not flags:
            monkeypatch.setattr(renames, "_CALLS", {})
        with AtomicFile(f"{here}/out") as file:
            (here / "out").write_bytes(b"theirs")
            with pytest.raises(OutputExistsError, match="appeared"):
                file.commit()
        assert small_files.contents(here) == {"out": b"theirs"}
        os.unlink(here / "out")
        with AtomicFile(f"{here}/out") as file:
            file.commit()
        assert small_files.contents(here) == {"out": b""}
        os.unlink(here / "out")


def test_an_answerless_end_of_the_process_for_hdf5_is_told_where_signals_are_missing(monkeypatch):
    for name in ("SIGALRM", "SIGPROF"):
        monkeypatch.delattr(signal, name)
    assert "ended without an answer (exit code 0)" in isolated.Reader()._fate(0, False)
