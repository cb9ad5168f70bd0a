"""What the system refuses in the middle of a run: a typed error, the old output, no trace.

The scripts kills.py, injected.py, truncations.py, bombs.py and concurrent_runs.py of benchmarks do
the same to the system's own calls, and many times; here the calls of `os` fail, each once. See
docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

import small_files
import wavg
from wavg import (
    InputError,
    OutOfMemoryError,
    OutputError,
    kernel,
    outputs,
    publish,
    publish_folder,
    renames,
    temporaries,
)
from wavg.checkpoint import Checkpoint
from wavg.formats import hdf5, hdf5_rewrite
from wavg.formats.hdf5_links import linked_order
from wavg.positional import write_exactly
from wavg.publish import AtomicFile
from wavg.publish_folder import AtomicFolder
from wavg.shortage import shortages
from wavg.temporaries import reclaim, remove

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


class Small:
    """An average of two small checkpoints over an existing output."""

    def __init__(self, folder, suffix):
        self.out = folder / "out"
        self.out.mkdir()
        self.inputs = []
        for step in (1, 2):
            tensors = {"a/w": np.float32([[step, 2], [3, 4]]), "b/w": np.float16([step])}
            if suffix == "/":
                place = folder / f"model_{step}"
                place.mkdir()
                wavg.save(place / "model.safetensors", tensors)
                (place / "config.json").write_text("{}")
            else:
                place = folder / f"model_{step}{suffix}"
                wavg.save(place, tensors)
            self.inputs.append(str(place))
        self.output = f"{self.out}/model{suffix}"
        wavg.average_checkpoints(self.inputs, self.output, weights=[3, 1])
        self.old = self.content()

    def run(self):
        wavg.average_checkpoints(self.inputs, self.output, overwrite=True, workers=1)

    def restore(self):
        for name, data in self.old.items():
            (self.out / name).write_bytes(data)

    def content(self):
        files = (path for path in self.out.rglob("*") if path.is_file())
        return {str(path.relative_to(self.out)): path.read_bytes() for path in files}


CALLS = ["pwrite", "ftruncate", "fsync", "replace", "link", "mkdir", "chmod", "dup"]
CALLS += ["pread", "preadv"]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".h5", "/"])
def test_whichever_call_fails_the_old_output_stands_and_nothing_else(tmp_path, monkeypatch, suffix):
    small = Small(tmp_path, suffix)
    failed = 0
    for name in CALLS:
        real = getattr(os, name)
        for number in range(1, 40):
            calls = 0

            def fails(*arguments, real=real, number=number, **options):
                nonlocal calls
                calls += 1
                if calls == number:
                    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
                return real(*arguments, **options)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, fails)
                error = error_of(small.run)
            if calls < number:
                assert error is None
                assert small.content() != small.old
                small.restore()
                break
            assert isinstance(error, wavg.WavgError), (name, number)
            assert "model" in str(error)
            assert small.content() == small.old, (name, number)
            failed += 1
    assert failed > 8
    small.run()
    assert small.content() != small.old


def error_of(function):
    try:
        function()
    except Exception as error:
        return error
    return None


def disk_error(*_, **__):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def once(real, which=1):
    """A call that fails one time, and succeeds when it is tried again."""
    calls = itertools.count(1)

    def call(*arguments):
        if next(calls) == which:
            disk_error()
        return real(*arguments)

    return call


@pytest.mark.parametrize(
    ("kind", "which"),
    [(AtomicFile, 1), (AtomicFolder, 1), (AtomicFolder, 2)],  # the file's, the folder's own
)
def test_a_sync_that_failed_stays_failed(tmp_path, monkeypatch, kind, which):
    with kind(f"{tmp_path}/out") as made:
        file = made if kind is AtomicFile else made.file("a")
        file.write(b"new", 0)
        monkeypatch.setattr(os, "fsync", once(os.fsync, which))
        for attempt in (made.sync, made.sync, made.commit):
            with pytest.raises(OutputError, match="Input/output error"):
                attempt()
    assert os.listdir(tmp_path) == []


def write(path, kind, data=b"new", **options):
    with kind(f"{path}", **options) as made:
        (made if kind is AtomicFile else made.file("a")).write(data, 0)
        made.commit()


def read(path):
    return {path.name: path.read_bytes()} if path.is_file() else {
        f"{path.name}/{each.name}": each.read_bytes() for each in path.iterdir()
    }  # fmt: skip


@pytest.mark.parametrize("kind", [AtomicFile, AtomicFolder])
@pytest.mark.parametrize("before", [True, False])
def test_a_rename_that_the_disk_does_not_confirm_is_undone(tmp_path, monkeypatch, kind, before):
    if before:
        write(tmp_path / "out", kind, b"old")
    monkeypatch.setattr(publish, "sync_folder", disk_error)
    with pytest.raises(OutputError, match="untouched") as caught:
        write(tmp_path / "out", kind, overwrite=before)
    assert caught.value.errno == errno.EIO
    assert os.listdir(tmp_path) == ["out"] * before
    if before:
        assert [*read(tmp_path / "out").values()] == [b"old"]


@pytest.mark.parametrize("kind", [AtomicFile, AtomicFolder])
def test_no_other_run_removes_what_is_replaced_before_the_disk_confirms(
    tmp_path, monkeypatch, kind
):
    write(tmp_path / "out", kind, b"old")

    def fail(folder):
        reclaim(f"{tmp_path}/out")  # as another run does that begins now
        disk_error()

    monkeypatch.setattr(publish, "sync_folder", fail)
    with pytest.raises(OutputError, match="untouched"):
        write(tmp_path / "out", kind, overwrite=True)
    assert [*read(tmp_path / "out").values()] == [b"old"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", [AtomicFile, AtomicFolder])
def test_nor_if_it_is_what_a_run_made_that_still_lives(tmp_path, kind):
    path = f"{tmp_path}/out"
    with kind(path) as second:
        with kind(path) as first:
            first.commit()
            second._overwrite = True  # it began before there was anything
            second.commit()
        reclaim(path)
        assert second.withdraw()
        assert os.path.samestat(os.stat(path), first._status)
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_came_in_the_last_instant_is_not_taken_for_the_one_that_was_held(
    tmp_path, monkeypatch
):
    write(tmp_path / "out", AtomicFolder, b"old")
    real = publish_folder.held

    def held(path):
        descriptor = real(path)
        os.rename(path, tmp_path / "old")
        os.mkdir(path)
        return descriptor

    monkeypatch.setattr(publish_folder, "held", held)
    monkeypatch.setattr(publish, "sync_folder", disk_error)
    with pytest.raises(OutputError, match="is written, but the disk does not confirm"):
        write(tmp_path / "out", AtomicFolder, overwrite=True)
    assert [*read(tmp_path / "out").values()] == [b"new"]


def test_a_stray_that_became_another_before_it_was_locked_is_left(tmp_path, monkeypatch):
    stray = tmp_path / ".out.0123456789ab.wavg-tmp"
    stray.write_bytes(b"a living run's")
    real = temporaries._lock

    def lock(descriptor):
        os.rename(stray, tmp_path / "out")
        stray.write_bytes(b"what it replaced")
        return real(descriptor)

    monkeypatch.setattr(temporaries, "_lock", lock)
    reclaim(f"{tmp_path}/out")
    assert stray.read_bytes() == b"what it replaced"


def test_where_a_rename_cannot_be_undone_the_error_says_what_stands_there(tmp_path, monkeypatch):
    write(tmp_path / "out", AtomicFile, b"old")

    def no_links(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(publish, "sync_folder", disk_error)
    with pytest.raises(OutputError, match="is written, but the disk does not confirm"):
        write(tmp_path / "out", AtomicFile, overwrite=True)
    assert read(tmp_path / "out") == {"out": b"new"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", [AtomicFile, AtomicFolder])
def test_what_could_not_be_undone_is_not_undone_later_when_it_was_told(tmp_path, monkeypatch, kind):
    write(tmp_path / "out", kind, b"old")
    left = contextlib.nullcontext()
    if kind is AtomicFolder:  # a loss of power may bring the old one back, with all that is in it
        left = pytest.warns(RuntimeWarning, match="is left")
    with left, monkeypatch.context() as patch, kind(f"{tmp_path}/out", overwrite=True) as made:
        (made if kind is AtomicFile else made.file("a")).write(b"new", 0)
        patch.setattr(publish, "sync_folder", disk_error)
        if kind is AtomicFile:
            patch.setattr(os, "replace", once(os.replace, 2))
        else:
            patch.setattr(renames, "rename", once(renames.rename, 2))
        with pytest.raises(OutputError, match="is written, but the disk does not confirm"):
            made.commit()
        assert not made.withdraw()
    assert [*read(tmp_path / "out").values()] == [b"new"]


def test_a_failing_close_is_told_before_anything_is_replaced(tmp_path, monkeypatch):
    write(tmp_path / "out", AtomicFile, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", once(os.close))
        with pytest.raises(OutputError, match="untouched"):
            write(tmp_path / "out", AtomicFile, overwrite=True)
    assert read(tmp_path / "out") == {"out": b"old"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", [AtomicFile, AtomicFolder])
def test_what_cannot_be_cleared_away_changes_nothing_and_is_told(tmp_path, monkeypatch, kind):
    write(tmp_path / "out", kind, b"old")
    with monkeypatch.context() as patch:
        real = kind.commit
        patch.setattr(
            kind, "commit", lambda made: (real(made), patch.setattr(os, "unlink", disk_error))
        )
        with pytest.warns(RuntimeWarning, match="cannot be removed"):
            write(tmp_path / "out", kind, overwrite=True)
    assert [*read(tmp_path / "out").values()] == [b"new"]
    assert len(os.listdir(tmp_path)) > 1
    write(tmp_path / "out", kind, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def test_strays_are_known_by_their_whole_name(tmp_path):
    theirs = [".out.x.0123456789ab.wavg-tmp", ".out.0123.wavg-tmp", ".out.wavg-tmp"]
    for name in [*theirs, ".out.0123456789ab.wavg-tmp"]:
        (tmp_path / name).touch()
    write(tmp_path / "out", AtomicFile)
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "out"])


def test_a_stray_that_cannot_be_written_is_reclaimed_too(tmp_path, monkeypatch):
    (tmp_path / ".out.0123456789ab.wavg-tmp").touch(0o444)
    real = os.open

    def as_a_user(path, flags, *mode):
        if flags == os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", as_a_user)
    write(tmp_path / "out", AtomicFile)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", [AtomicFile, AtomicFolder])
def test_a_temporary_that_another_run_took_for_a_stray_is_made_anew(tmp_path, monkeypatch, kind):
    module = publish if kind is AtomicFile else publish_folder
    real, taken = module.claimed, []

    def claimed(descriptor, path):
        if not taken:
            taken.append(path)
            remove(path)
        return real(descriptor, path)

    monkeypatch.setattr(module, "claimed", claimed)
    write(tmp_path / "out", kind)
    assert taken
    assert os.listdir(tmp_path) == ["out"]


def test_where_nothing_can_be_locked_strays_are_left_to_a_person(tmp_path, monkeypatch):
    stray = tmp_path / ".out.0123456789ab.wavg-tmp"
    stray.touch()
    monkeypatch.setattr(temporaries, "fcntl", None)
    write(tmp_path / "out", AtomicFile)
    assert sorted(os.listdir(tmp_path)) == [stray.name, "out"]


def test_shards_that_a_killed_run_let_appear_unnamed_are_reclaimed(tmp_path):
    place = tmp_path / "in"
    place.mkdir()
    wavg.save(place / "model.safetensors", {"a": np.ones(8, "f4"), "b": np.ones(8, "f4")})
    output = tmp_path / "out" / "model.safetensors.index.json"
    output.parent.mkdir()
    shard = output.parent / "model-00001-of-00002.safetensors"
    stray = output.parent / f".{shard.name}.0123456789ab.wavg-tmp"
    stray.write_bytes(b"of a run that was killed")
    os.link(stray, shard)
    wavg.average_checkpoints([place], output, max_shard_size=32)
    assert len(wavg.load(output)) == 2
    assert len(os.listdir(output.parent)) == 3


@pytest.mark.parametrize("second_name", [False, True])  # as of a file that was being replaced
def test_a_shard_of_somebody_else_is_not_reclaimed(tmp_path, second_name):
    place = tmp_path / "in"
    place.mkdir()
    wavg.save(place / "model.safetensors", {"a": np.ones(8, "f4"), "b": np.ones(8, "f4")})
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(b"theirs")
    (tmp_path / f".{shard.name}.0123456789ab.wavg-tmp").write_bytes(b"of a run that was killed")
    if second_name:
        os.link(shard, tmp_path / f".{shard.name}.0123456789ab.wavg-old")
    with pytest.raises(wavg.OutputExistsError):
        wavg.average_checkpoints(
            [place], tmp_path / "model.safetensors.index.json", max_shard_size=32
        )
    assert shard.read_bytes() == b"theirs"


def test_an_interrupt_while_several_files_appear_withdraws_them(tmp_path, monkeypatch):
    place = tmp_path / "in"
    place.mkdir()
    wavg.save(place / "model.safetensors", {"a": np.ones(8, "f4"), "b": np.ones(8, "f4")})
    out = tmp_path / "out"
    out.mkdir()
    real = publish.sync_folder

    def interrupted(folder):
        real(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(publish, "sync_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wavg.average_checkpoints([place], out / "model.safetensors.index.json", max_shard_size=32)
    assert os.listdir(out) == []


def test_of_several_files_the_one_that_names_the_others_is_withdrawn_first_or_all_stay(
    tmp_path, monkeypatch
):
    wavg.save(tmp_path / "model.safetensors", {"a": np.ones(8, "f4"), "b": np.ones(8, "f4")})
    out = tmp_path / "out"
    out.mkdir()
    real, unlink = publish.sync_folder, os.unlink

    def interrupted(folder):
        real(folder)
        if (out / "x.safetensors.index.json").exists():
            raise KeyboardInterrupt

    def refused(path):
        if path.endswith("x.safetensors.index.json"):
            disk_error()
        unlink(path)

    monkeypatch.setattr(publish, "sync_folder", interrupted)
    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(wavg.OutputError, match=r"index\.json cannot be removed"):
        wavg.average_checkpoints(
            [tmp_path / "model.safetensors"], out / "x.safetensors.index.json", max_shard_size=32
        )
    assert len(os.listdir(out)) == 3
    assert len(wavg.load(out / "x.safetensors.index.json")) == 2


def test_shards_get_their_names_when_those_of_their_temporaries_are_durable(tmp_path, monkeypatch):
    """Else a loss of power may leave a shard alone, which no run takes for its own."""
    wavg.save(tmp_path / "model.safetensors", {"a": np.ones(8, "f4"), "b": np.ones(8, "f4")})
    out = tmp_path / "out"
    out.mkdir()
    done, link, sync = [], os.link, outputs.sync_folder
    monkeypatch.setattr(os, "link", lambda *paths: (done.append("link"), link(*paths)))
    monkeypatch.setattr(
        outputs, "sync_folder", lambda folder: (done.append(os.listdir(folder)), sync(folder))
    )
    wavg.average_checkpoints(
        [tmp_path / "model.safetensors"], out / "x.safetensors.index.json", max_shard_size=32
    )
    assert [len(done[0]), *done[1:]] == [3, "link", "link", "link"]


def test_names_that_the_disk_does_not_confirm_are_told_and_nothing_appears(tmp_path, monkeypatch):
    wavg.save(tmp_path / "model.safetensors", {"a": np.ones(8, "f4"), "b": np.ones(8, "f4")})
    out = tmp_path / "out"
    out.mkdir()

    monkeypatch.setattr(outputs, "sync_folder", disk_error)
    with pytest.raises(wavg.OutputError, match=r"x\.safetensors\.index\.json: Input/output error"):
        wavg.average_checkpoints(
            [tmp_path / "model.safetensors"], out / "x.safetensors.index.json", max_shard_size=32
        )
    assert os.listdir(out) == []


# --- bytes ----------------------------------------------------------------------------------------


def test_a_write_that_writes_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="writes nothing"):
        write_exactly(0, b"new", 0)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_an_output_is_whole_however_short_the_system_writes(tmp_path, monkeypatch, suffix):
    small = Small(tmp_path, suffix)
    small.run()
    whole = small.content()
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    small.run()
    assert small.content() == whole


def test_chunks_are_whole_however_short_the_system_reads_and_writes(tmp_path, monkeypatch):
    paths = [tmp_path / f"model_{step}.h5" for step in (1, 2)]
    for step, path in enumerate(paths):
        wavg.save(path, {"a/w": np.full((9, 7), step, np.float32)})
        with h5py.File(path, "r+") as file:
            name = name_of_dataset(file)
            values = file[name][...]
            del file[name]
            file.create_dataset(name, data=values, chunks=(4, 3), compression="gzip")
    wavg.average_checkpoints(paths, tmp_path / "whole.h5")
    for call in ("preadv", "pwrite"):
        monkeypatch.setattr(os, call, shortened(getattr(os, call)))
    wavg.average_checkpoints(paths, tmp_path / "out.h5")
    assert (tmp_path / "out.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    with h5py.File(tmp_path / "out.h5") as file:
        assert (file[name_of_dataset(file)][...] == 0.5).all()
    monkeypatch.setattr(hdf5_rewrite, "read_exactly", lambda *_: False)
    with pytest.raises(OutputError, match="Input/output error"):
        wavg.average_checkpoints(paths, tmp_path / "third.h5")


def shortened(real):
    def call(descriptor, what, offset):
        return real(descriptor, [what[0][:3]] if isinstance(what, list) else what[:3], offset)

    return call


def name_of_dataset(file):
    found = []
    file.visititems(lambda name, thing: found.append(name) if hasattr(thing, "chunks") else None)
    return found[0]


class Short:
    """A file that reads and writes a few bytes at once."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def readinto(self, view):
        return self.file.readinto(view[:3])

    def write(self, data):
        return self.file.write(bytes(data)[:3])


def test_a_part_of_an_archive_is_whole_however_short_the_system_reads_and_writes(tmp_path):
    path = tmp_path / "part"
    path.write_bytes(bytes(5))
    with open(path, "r+b", buffering=0) as file:
        with h5py.File(hdf5._Window(Short(file), 5, 0), "w") as made:
            made["w"] = np.arange(50)
        window = hdf5._Window(Short(file), 5, os.path.getsize(path) - 5)
        with h5py.File(window, "r") as made:
            assert made["w"][...].tolist() == list(range(50))


def write_datasets(source):
    with hdf5.opened(source, "w") as made:
        for name in "abcdefgh":
            made[name] = np.arange(9)
            made.flush()


@pytest.mark.parametrize("base", [0, 64])
def test_what_the_system_refuses_while_hdf5_writes_is_told(tmp_path, monkeypatch, base):
    source = hdf5.Source(str(tmp_path / "model.h5"), base)
    (tmp_path / "model.h5").write_bytes(bytes(base))
    for number in range(1, 9):
        calls = iter(range(1, 99))

        def fails(*_, calls=calls, number=number):
            if next(calls) == number:
                disk_error()

        with monkeypatch.context() as patch:
            patch.setattr(hdf5, "write_exactly", fails)
            with pytest.raises(OutputError, match="Input/output error"):
                write_datasets(source)


def test_a_file_that_hdf5_does_not_close_is_told(tmp_path, monkeypatch):
    """It goes on without a word where it has no memory for that, and what it held is lost."""
    path = tmp_path / "model.h5"
    path.touch()
    close, opened_for_writing = h5py.File.close, 1

    def marked(self):
        close(self)
        content = bytearray(path.read_bytes())
        content[{0: 20, 2: 11, 3: 11}[content[8]]] |= opened_for_writing
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(h5py.File, "close", marked)
        with pytest.raises(OutputError, match="did not close it"):
            write_datasets(hdf5.Source(str(path)))
    write_datasets(hdf5.Source(str(path)))


@pytest.mark.parametrize("compressed", [True, False])
def test_an_archive_that_became_another_file_while_it_is_read_is_told(tmp_path, compressed):
    path = tmp_path / "model.npz"
    (np.savez_compressed if compressed else np.savez)(path, w=np.arange(9.0))
    with wavg.open_checkpoint(path) as checkpoint:
        path.write_bytes(b"something else")
        with pytest.raises(wavg.CheckpointFormatError, match=r"model\.npz"):
            checkpoint["w"].read()


def old_style(path):
    with h5py.File(path, "w", libver="earliest") as file:
        for name in ("second", "first"):
            file.create_group(name)
    return hdf5.Source(str(path))


def test_the_order_of_links_is_the_same_however_short_the_system_reads(tmp_path, monkeypatch):
    source = old_style(tmp_path / "model.h5")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: real(fd, min(size, 7), offset))
    with source.reader() as read:
        assert list(linked_order(read)) == ["second", "first"]
        assert read(source.length() - 2, 100) == read(source.length() - 2, 2)
        assert read(1 << 70, 8) == b""


def test_an_order_of_links_that_cannot_be_read_is_an_error_and_no_other_order(
    tmp_path, monkeypatch
):
    source = old_style(tmp_path / "model.h5")
    monkeypatch.setattr(os, "pread", disk_error)
    with pytest.raises(InputError, match=r"model\.h5: Input/output error"), source.reader() as read:
        linked_order(read)


# --- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])  # read by the compiled step, and not
def test_an_input_that_the_disk_does_not_give_is_named(tmp_path, monkeypatch, dtype):
    for step in (1, 2):
        wavg.save(tmp_path / f"model_{step}.safetensors", {"w": np.ones(9, dtype)})
    folder = os.open(tmp_path, os.O_RDONLY)  # reading it fails
    real = Checkpoint.place

    def place(self, spec, start):
        return (folder, 0) if "_1" in self.path else real(self, spec, start)

    monkeypatch.setattr(Checkpoint, "place", place)
    with pytest.raises(InputError, match=r"cannot read .*model_1\.safetensors: Is a dir") as caught:
        wavg.average_checkpoints(tmp_path, tmp_path / "average.safetensors")
    os.close(folder)
    assert caught.value.errno == errno.EISDIR
    assert caught.value.path == str(tmp_path / "model_1.safetensors")
    assert len(os.listdir(tmp_path)) == 2


def test_an_input_that_cannot_be_opened_is_named_and_a_missing_one_stays_pythons_own(
    tmp_path, monkeypatch
):
    wavg.save(tmp_path / "model.npz", {"w": np.ones(3)})
    with pytest.raises(FileNotFoundError):
        wavg.load(tmp_path / "other.npz")
    monkeypatch.setattr("builtins.open", disk_error)
    with pytest.raises(InputError, match=r"model\.npz"):
        wavg.load(tmp_path / "model.npz")


@pytest.mark.parametrize("suffix", small_files.SUFFIXES)
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_an_input_that_is_gone_when_the_output_begins_is_no_fault_of_the_output(
    tmp_path, monkeypatch, suffix, dtype
):
    paths = small_files.inputs(tmp_path / "in", suffix)
    original = outputs._templates

    def gone(row, plan, reference, *rest):
        for file in reference.index.files:
            os.unlink(file.path)
        return original(row, plan, reference, *rest)

    monkeypatch.setattr(outputs, "_templates", gone)
    with pytest.raises(wavg.CheckpointChangedError) as caught:
        wavg.average_checkpoints(paths, small_files.output(tmp_path, suffix), dtype=dtype)
    assert os.path.dirname(caught.value.path) in (paths[1], str(tmp_path / "in"))
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("suffix", [".safetensors", "/", ".weights.json"])
def test_nor_is_one_that_the_disk_does_not_give_then(tmp_path, monkeypatch, suffix):
    paths = small_files.inputs(tmp_path / "in", suffix)
    original = outputs._templates

    def unreadable(*arguments):
        monkeypatch.setattr("builtins.open", disk_error)
        return original(*arguments)

    monkeypatch.setattr(outputs, "_templates", unreadable)
    with pytest.raises(InputError, match=r"cannot read .*: Input/output error") as caught:
        wavg.average_checkpoints(paths, small_files.output(tmp_path, suffix))
    assert os.path.dirname(caught.value.path) in (paths[1], str(tmp_path / "in"))
    assert os.listdir(tmp_path) == ["in"]


def test_closing_inputs_cannot_fail_a_run(tmp_path, monkeypatch):
    small = Small(tmp_path, ".safetensors")
    real = Checkpoint.close

    def close(self):
        with monkeypatch.context() as patch:
            patch.setattr(os, "close", disk_error)
            real(self)

    monkeypatch.setattr(Checkpoint, "close", close)
    small.run()
    assert small.content() != small.old


def test_chunks_that_declare_a_thousand_times_the_files_size_are_refused(tmp_path):
    chunk = 1 << 28
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        made = file.create_dataset(
            "layers/dense/vars/0", (4 * chunk,), "f4", chunks=(chunk,), compression="gzip"
        )
        for number in range(4):
            made.id.write_direct_chunk((number * chunk,), b"x")
    with pytest.raises(wavg.CheckpointFormatError, match="times the file's size"):
        wavg.open_checkpoint(tmp_path / "model.weights.h5")


# --- memory and threads ---------------------------------------------------------------------------


def test_no_memory_in_the_middle_of_a_run_is_told_and_leaves_the_old_output(tmp_path, monkeypatch):
    small = Small(tmp_path, ".npz")

    def full(*_):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(kernel.Combiner, "from_files", full)
    monkeypatch.setattr(kernel.Combiner, "__call__", full)
    with pytest.raises(OutOfMemoryError, match="Unable to allocate 9 GiB; max_memory"):
        small.run()
    assert small.content() == small.old


def test_no_thread_to_be_had_is_told_and_leaves_the_old_output(tmp_path, monkeypatch):
    small = Small(tmp_path, ".safetensors")

    def refused(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(OutOfMemoryError, match="no more threads"):
        small.run()
    assert small.content() == small.old


def test_other_errors_are_not_taken_for_shortages():
    own = (
        wavg.MemoryBudgetError("too little"),
        wavg.WeightError("[digital envelope routines] initialization error"),
        OutOfMemoryError("told already"),
    )
    refused = ValueError("[digital envelope routines] unsupported")  # the algorithm, by OpenSSL
    for error in (RuntimeError("else"), SystemError("else"), ValueError("else"), refused, *own):
        with pytest.raises(type(error)) as caught, shortages():
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        SystemError("<method> returned NULL without setting an exception"),
        ValueError("[digital envelope routines] initialization error"),  # of hashlib
        ValueError("[digital envelope routines] not able to copy ctx"),
        ValueError("[digital envelope routines: EVP_DigestInit_ex] malloc failure"),  # OpenSSL 1.1
    ],
)
def test_a_library_that_gives_no_reason_is_taken_to_lack_memory(error):
    with pytest.raises(OutOfMemoryError, match="gave no reason"), shortages():
        raise error


# --- the scripts ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "kills.py FOLDER --moments 30",
        "kills.py FOLDER --boundaries --step 37",
        "injected.py FOLDER --calls --formats safetensors,.npz",
        "injected.py FOLDER --allocations --most 60 --formats safetensors,.h5",
        "truncations.py FOLDER --step 11 --cuts 100 --changes 20",
        "bombs.py FOLDER",
        "concurrent_runs.py FOLDER --rounds 12",
        "hdf5_mutations.py FOLDER --count 200 --parts 100 --plain-every 50 --workers 1",
    ],
)
def test_the_scripts_find_nothing_bad(tmp_path, arguments):
    script(tmp_path, *arguments.split())


def test_of_several_runs_to_one_output_one_wins_whole(tmp_path):
    formats = "safetensors,folder of safetensors"
    few = ["--rounds", "2", "--runs", "3", "--kill", "2", "--formats", formats]
    script(tmp_path, "concurrent_runs.py", "FOLDER", *few)


def script(folder, *arguments):
    if not sys.platform.startswith("linux"):
        pytest.skip("the scripts are for Linux")
    words = [str(folder) if word == "FOLDER" else word for word in arguments]
    command = [sys.executable, str(SCRIPTS / words[0]), *words[1:], "--no-record"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode and ("ptrace" in done.stderr or "C compiler" in done.stderr):
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
