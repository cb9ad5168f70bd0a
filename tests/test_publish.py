"""The destination is the old file whole or the new file whole; no trace is left of a failure."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest

import wavg
from wavg import OutputError, OutputExistsError, publish, renames, temporaries
from wavg.destinations import refuse_full
from wavg.publish import AtomicFile
from wavg.publish_folder import AtomicFolder
from wavg.temporaries import NEW, OLD, remove


def write(path, data=b"new", **options):
    with AtomicFile(str(path), **options) as file:
        file.resize(len(data))
        file.write(data, 0)
        file.commit()


def test_a_file_appears_with_its_content(tmp_path):
    write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_appears_before_commit_nor_without_it(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    with AtomicFile(str(tmp_path / "out"), overwrite=True) as file:
        file.write(b"new", 0)
        assert (tmp_path / "out").read_bytes() == b"old"
    assert (tmp_path / "out").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_an_existing_file_is_refused_unless_told(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write(tmp_path / "out")
    with pytest.raises(FileExistsError):
        write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_bytes() == b"new"


def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path):
    with AtomicFile(str(tmp_path / "out")) as file:
        file.write(b"new", 0)
        (tmp_path / "out").write_bytes(b"theirs")
        with pytest.raises(OutputExistsError, match="appeared"):
            file.commit()
    assert (tmp_path / "out").read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["out"]


def test_without_hard_links_a_rename_publishes(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_is_no_destination(tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        write(tmp_path, overwrite=True)


def test_permissions_follow_the_umask_or_the_file_replaced(tmp_path):
    old = os.umask(0o027)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o640
    os.chmod(tmp_path / "new", 0o604)
    write(tmp_path / "new", overwrite=True)
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o604


def test_a_symbolic_link_is_followed_not_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/real").write_bytes(b"old")
    os.symlink("store/real", tmp_path / "link")
    write(tmp_path / "link", overwrite=True)
    assert os.path.islink(tmp_path / "link")
    assert (tmp_path / "store/real").read_bytes() == b"new"


SITES = ["ftruncate", "pwrite", "fsync", "replace", "open", "listdir"]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_system_call_leaves_the_old_file_and_no_trace(tmp_path, monkeypatch, site, code):
    (tmp_path / "out").write_bytes(b"old")

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, site, fail)
        with pytest.raises(OutputError, match="untouched") as caught:
            write(tmp_path / "out", overwrite=True)
    assert caught.value.errno == code
    assert (tmp_path / "out").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_short_writes_are_completed(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1], offset))
    write(tmp_path / "out", b"a longer content")
    assert (tmp_path / "out").read_bytes() == b"a longer content"


def test_what_a_killed_run_left_is_reclaimed_by_the_next_and_a_living_ones_is_not(tmp_path):
    script = (
        "import sys, time; from wavg.publish import AtomicFile\n"
        "file = AtomicFile(sys.argv[1], overwrite=True).__enter__()\n"
        "print(file.temporary, flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    stray = child.stdout.readline().strip()
    write(tmp_path / "out")
    assert os.path.exists(stray)  # its owner lives
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    child.stdin.close()
    other = tmp_path / ".another.0123.wavg-tmp"
    other.write_bytes(b"")
    write(tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [other.name, "out"]


def test_a_folder_that_does_not_exist_is_said_so(tmp_path):
    with pytest.raises(OutputError, match="there is no folder"):
        wavg.save(tmp_path / "nowhere/m.npz", {"w": np.ones(1)})


def test_the_disk_is_set_to_work_before_the_end(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(publish, "_SYNC_BYTES", 100)
    monkeypatch.setattr(publish, "_sync_data", synced.append)
    with AtomicFile(str(tmp_path / "out")) as file:
        for start in range(0, 1000, 50):
            file.write(b"x" * 50, start)
        file.commit()
    assert synced
    assert (tmp_path / "out").read_bytes() == b"x" * 1000


def test_a_failure_of_the_disk_at_work_is_told_and_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(publish, "_SYNC_BYTES", 100)
    monkeypatch.setattr(publish, "_sync_data", fail)
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="Input/output error"):
        write(path, b"x" * 200, overwrite=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


# --- folders --------------------------------------------------------------------------------------


def write_folder(path, files=("a", "b"), **options):
    with AtomicFolder(str(path), **options) as folder:
        for name in files:
            file = folder.file(name)
            file.resize(3)
            file.write(b"new", 0)
        folder.commit()


def old_folder(path):
    path.mkdir()
    (path / "a").write_bytes(b"old")


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def refuse_flags(monkeypatch):
    """A system that renames, but knows neither exchange nor refusal to replace."""

    def rename(old, new, flag):
        raise OSError(errno.EINVAL, "no such flag")

    monkeypatch.setattr(renames, "rename", rename)


def test_a_folder_appears_with_its_files(tmp_path):
    with AtomicFolder(f"{tmp_path}/out") as folder:
        folder.file("a").write(b"new", 0)
        assert [name[:5] for name in os.listdir(tmp_path)] == [".out."]
        folder.commit()
    assert contents(tmp_path / "out") == {"a": b"new"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_without_commit_leaves_no_trace(tmp_path):
    with AtomicFolder(f"{tmp_path}/out") as folder:
        folder.file("a").write(b"new", 0)
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_refused_or_replaced_whole(tmp_path):
    old_folder(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_folder(tmp_path / "out", ["b"])
    write_folder(tmp_path / "out", ["b"], overwrite=True)
    assert contents(tmp_path / "out") == {"b": b"new"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_holds_folders_is_not_replaced(tmp_path):
    (tmp_path / "out/deep").mkdir(parents=True)
    with pytest.raises(OutputError, match="holds the folder deep, which would be lost"):
        write_folder(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["deep"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    for path in ("out", "out/"):
        with pytest.raises(OutputError, match="is a file; the output is a folder"):
            write_folder(f"{tmp_path}/{path}", overwrite=True)
    assert (tmp_path / "out").read_bytes() == b"old"


@pytest.mark.parametrize("flags", [True, False])
def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path, monkeypatch, flags):
    if not flags:
        refuse_flags(monkeypatch)
    with AtomicFolder(f"{tmp_path}/out") as folder:
        folder.file("a").write(b"new", 0)
        old_folder(tmp_path / "out")
        with pytest.raises(OutputExistsError):
            folder.commit()
    assert contents(tmp_path / "out") == {"a": b"old"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_system_that_cannot_exchange_folders_makes_new_ones_only(tmp_path, monkeypatch):
    refuse_flags(monkeypatch)
    write_folder(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="cannot replace a folder at one instant"):
        write_folder(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == {"a": b"new", "b": b"new"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_follows_links_the_umask_and_the_folder_replaced(tmp_path):
    old = os.umask(0o027)
    try:
        write_folder(tmp_path / "real")
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(tmp_path / "real").st_mode) == 0o750
    assert stat.S_IMODE(os.stat(tmp_path / "real/a").st_mode) == 0o640
    os.chmod(tmp_path / "real", 0o705)
    os.symlink("real", tmp_path / "link")
    write_folder(tmp_path / "link", ["c"], overwrite=True)
    assert os.path.islink(tmp_path / "link")
    assert contents(tmp_path / "real") == {"c": b"new"}
    assert stat.S_IMODE(os.stat(tmp_path / "real").st_mode) == 0o705


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", [AtomicFile, AtomicFolder])
def test_what_was_published_can_be_withdrawn(tmp_path, kind, overwrite):
    with kind(f"{tmp_path}/out", overwrite=overwrite) as made:
        made.commit()
        assert os.listdir(tmp_path).count("out") == 1
        assert made.withdraw()
    assert os.listdir(tmp_path) == []


def test_what_was_replaced_comes_back_when_that_is_withdrawn(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    old_folder(tmp_path / "folder")
    for name, kind in (("file", AtomicFile), ("folder", AtomicFolder)):
        with kind(f"{tmp_path}/{name}", overwrite=True) as made:
            made.commit()
            assert made.withdraw()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert contents(tmp_path / "folder") == {"a": b"old"}
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("kind", [AtomicFile, AtomicFolder])
def test_what_was_replaced_and_is_there_no_more_cannot_come_back_and_the_new_one_stays(
    tmp_path, kind
):
    """Another run to the same output may take the old one, under its second name, for a stray."""
    for overwrite in (False, True):
        with kind(f"{tmp_path}/out", overwrite=overwrite) as made:
            made.commit()
            if overwrite:
                for name in os.listdir(tmp_path):
                    if name.endswith((OLD, NEW)) and "out" in name:
                        remove(f"{tmp_path}/{name}")
                assert not made.withdraw()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", [AtomicFile, AtomicFolder])
def test_a_temporary_that_another_run_is_about_to_remove_is_left_to_it(tmp_path, monkeypatch, kind):
    real, asked = temporaries.fcntl.flock, []

    def flock(descriptor, how):
        asked.append(how)
        if len(asked) == 1:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        real(descriptor, how)

    monkeypatch.setattr(temporaries.fcntl, "flock", flock)
    with kind(f"{tmp_path}/out") as made:
        made.commit()
    assert len(asked) == 2
    assert [name for name in os.listdir(tmp_path) if name != "out"] != []  # the other's to remove


def test_a_temporary_folder_that_another_run_has_just_removed_is_made_anew(tmp_path, monkeypatch):
    real, made = os.mkdir, []

    def mkdir(path, *rest):
        real(path, *rest)
        made.append(path)
        if len(made) == 1:
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with AtomicFolder(f"{tmp_path}/out") as folder:
        folder.commit()
    assert len(made) == 2
    assert os.listdir(tmp_path) == ["out"]


def test_two_runs_that_remove_one_folder_do_not_stop_each_other(tmp_path, monkeypatch):
    old_folder(tmp_path / "stray")
    (tmp_path / "stray/b").touch()
    real = os.listdir

    def listdir(path):
        names = real(path)
        os.unlink(f"{path}/a")  # the other's work
        return names

    monkeypatch.setattr(os, "listdir", listdir)
    remove(str(tmp_path / "stray"))
    assert real(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_link_that_the_disk_refuses_is_no_lack_of_links(tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        with pytest.raises(OutputError) as caught:
            write(tmp_path / "out")
    assert caught.value.errno == code
    assert os.listdir(tmp_path) == []


def test_a_trial_exchange_that_fails_is_told_and_leaves_the_old_folder(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    old_folder(tmp_path / "out")
    monkeypatch.setattr(renames, "rename", fail)
    with pytest.raises(OutputError) as caught:
        write_folder(tmp_path / "out", overwrite=True)
    assert caught.value.errno == errno.EIO
    assert contents(tmp_path / "out") == {"a": b"old"}
    assert os.listdir(tmp_path) == ["out"]


FOLDER_SITES = ["mkdir", "ftruncate", "pwrite", "fsync", "open", "listdir", "scandir"]


@pytest.mark.parametrize("site", FOLDER_SITES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_system_call_leaves_the_old_folder_and_no_trace(
    tmp_path, monkeypatch, site, code
):
    old_folder(tmp_path / "out")

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, site, fail)
        with pytest.raises(OutputError, match="untouched") as caught:
            write_folder(tmp_path / "out", overwrite=True)
    assert caught.value.errno == code
    assert contents(tmp_path / "out") == {"a": b"old"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_failing_exchange_leaves_the_old_folder_and_no_trace(tmp_path, monkeypatch):
    old_folder(tmp_path / "out")
    real = renames.rename

    def fail(old, new, flag):
        if new == str(tmp_path / "out"):
            raise OSError(errno.EIO, "Input/output error")
        real(old, new, flag)

    monkeypatch.setattr(renames, "rename", fail)
    with pytest.raises(OutputError, match="untouched"):
        write_folder(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == {"a": b"old"}
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_run_left_of_a_folder_is_reclaimed_and_a_living_ones_is_not(tmp_path):
    script = (
        "import sys; from wavg.publish_folder import AtomicFolder\n"
        "folder = AtomicFolder(sys.argv[1]).__enter__(); folder.file('a').write(b'x', 0)\n"
        "print(folder.temporary, flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    stray = child.stdout.readline().strip()
    write_folder(tmp_path / "out")
    assert os.listdir(stray) == ["a"]  # its owner lives
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    child.stdin.close()
    write_folder(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def noted(monkeypatch, module, name, notes):
    """Have every call of a function noted by its name."""
    real = getattr(module, name)
    note = name.removesuffix("_folder")
    monkeypatch.setattr(module, name, lambda *given: (notes.append(note), real(*given))[1])


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_is_withdrawn_for_certain_before_a_file_of_it_is_removed(
    tmp_path, monkeypatch, overwrite
):
    """Else a loss of power could give it its name back, without the files removed meanwhile."""
    notes = []
    if overwrite:
        old_folder(tmp_path / "out")
    with AtomicFolder(str(tmp_path / "out"), overwrite=overwrite) as folder:
        folder.file("a").write(b"new", 0)
        folder.commit()
        noted(monkeypatch, renames if overwrite else os, "rename", notes)
        noted(monkeypatch, renames, "sync_folder", notes)
        noted(monkeypatch, os, "unlink", notes)
        assert folder.withdraw()
    assert notes == ["rename", "sync", "unlink"]
    assert os.listdir(tmp_path) == ["out"] * overwrite


def test_nor_is_one_removed_if_the_disk_does_not_confirm_that_and_the_next_run_removes_it(
    tmp_path, monkeypatch
):
    def refuse(folder):
        raise OSError(errno.EIO, "the disk says no")

    old_folder(tmp_path / "out")
    monkeypatch.setattr(renames, "sync_folder", refuse)
    monkeypatch.setattr(publish, "sync_folder", refuse)
    with (
        pytest.warns(RuntimeWarning, match="is left: the disk does not confirm"),
        pytest.raises(OutputError, match="untouched"),
    ):
        write_folder(tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    (stray,) = set(os.listdir(tmp_path)) - {"out"}
    assert contents(tmp_path / "out") == {"a": b"old"}
    assert contents(tmp_path / stray) == {"a": b"new", "b": b"new"}
    write_folder(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("confirmed", [True, False])
def test_what_a_killed_run_left_is_removed_when_the_names_in_the_folder_are_durable(
    tmp_path, monkeypatch, confirmed
):
    """Else a loss of power could undo the dead run's rename: what is removed stood there before."""
    notes = []
    write_folder(tmp_path / "out")
    old_folder(tmp_path / ".out.0123456789ab.wavg-tmp")

    def sync(folder):
        notes.append((folder, len(os.listdir(tmp_path))))
        if not confirmed:
            raise OSError(errno.EIO, "the disk says no")

    monkeypatch.setattr(temporaries, "sync_folder", sync)
    temporaries.reclaim(str(tmp_path / "out"))
    assert notes == [(str(tmp_path), 2)]
    assert len(os.listdir(tmp_path)) == 1 + (not confirmed)


# --- room -----------------------------------------------------------------------------------------


def test_a_full_disk_is_told_before_anything_is_begun(tmp_path):
    refuse_full(f"{tmp_path}/out", 1)
    with pytest.raises(OutputError, match="nothing was begun") as caught:
        refuse_full(f"{tmp_path}/out", 1 << 62)
    assert caught.value.errno == errno.ENOSPC


def test_a_file_system_that_does_not_know_its_size_is_trusted(tmp_path, monkeypatch):
    unknown = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: unknown)
    refuse_full(f"{tmp_path}/out", 1 << 62)
    monkeypatch.undo()
    refuse_full(f"{tmp_path}/missing/out", 1 << 62)


def test_a_folder_that_cannot_be_withdrawn_is_told_as_that(tmp_path, monkeypatch):
    def refuse(old, new):
        raise OSError(errno.EIO, "the disk says no")

    with AtomicFolder(str(tmp_path / "out")) as folder:
        folder.file("a").write(b"new", 0)
        folder.commit()
        monkeypatch.setattr(os, "rename", refuse)
        assert not folder.withdraw()
    assert (tmp_path / "out" / "a").read_bytes() == b"new"
