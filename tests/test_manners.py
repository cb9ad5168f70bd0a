"""Outputs among other files: permissions, owners, links, read-only places, odd kinds of files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import small_files
import wavg
from wavg import (
    CheckpointFormatError,
    OutputError,
    OutputExistsError,
    access,
    cli,
    publish,
    results,
)
from wavg.journal import Journal
from wavg.publish import AtomicFile
from wavg.publish_folder import AtomicFolder

posix = pytest.mark.skipif(os.name != "posix", reason="modes, owners and links of POSIX")
root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="needs root")
pytestmark = posix
USER, GROUP, OTHER = 12_345, 12_345, 23_456


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def place():
    """A folder that another user, too, can reach; pytest's own are for one."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder).resolve()


@contextlib.contextmanager
def unprivileged(*groups):
    """Be an ordinary user, if this process is root's; what is imported late must be loaded."""
    if os.geteuid():
        yield
        return
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(GROUP)
    os.seteuid(USER)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


def give_all(folder):
    """Have everything belong to the ordinary user."""
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, USER, GROUP)


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


class Small:
    """An average of small files, and where it goes."""

    def __init__(self, folder, suffix):
        self.suffix, self.folder = suffix, folder / "place"
        self.folder.mkdir()
        self.inputs = small_files.inputs(folder / "in", suffix)
        self.output = small_files.output(self.folder, suffix)

    def run(self, output=None, **options):
        wavg.average_checkpoints(self.inputs, output or self.output, **options)

    def files(self):
        return [path for path in self.folder.rglob("*") if path.is_file()]


# --- permissions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", small_files.ALL)
def test_new_files_and_folders_follow_the_umask_whatever_the_inputs_have(tmp_path, suffix):
    small = Small(tmp_path, suffix)
    for path in (tmp_path / "in").rglob("*"):
        os.chmod(path, 0o700 if path.is_dir() else 0o600)
    with umask(0o027):
        small.run()
    assert small.files()
    assert {mode(path) for path in small.files()} == {0o640}
    if suffix == "/":
        assert mode(small.output) == 0o750


@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("suffix", small_files.REPLACED)
def test_what_is_replaced_hands_on_its_mode(tmp_path, suffix, dtype):
    small = Small(tmp_path, suffix)
    small.run()
    for path in small.files():
        os.chmod(path, 0o604)
    if suffix == "/":
        os.chmod(small.output, 0o2705)
    small.run(overwrite=True, dtype=dtype)
    assert {mode(path) for path in small.files()} == {0o604}
    if suffix == "/":
        assert mode(small.output) == 0o2705


def test_new_files_of_a_folder_replaced_follow_the_umask(tmp_path):
    small = Small(tmp_path, "/")
    small.run()
    os.unlink(small.output + "config.json")
    os.chmod(small.output + "model.safetensors", 0o600)
    with umask(0o027):
        small.run(overwrite=True)
    assert mode(small.output + "config.json") == 0o640
    assert mode(small.output + "model.safetensors") == 0o600


@pytest.mark.parametrize("suffix", [".safetensors", ".h5", "/"])
def test_at_no_instant_is_the_temporary_more_open_than_what_it_replaces(
    tmp_path, monkeypatch, suffix
):
    small = Small(tmp_path, suffix)
    small.run()
    for path in (small.output, *small.files()):
        os.chmod(path, 0o700 if os.path.isdir(path) else 0o600)
    seen = []

    def watching(real):
        def call(*arguments, **options):
            result = real(*arguments, **options)
            for path in small.folder.rglob("*"):
                if ".wavg-" in str(path):
                    seen.append(mode(path))
                    assert not mode(path) & 0o077, path
            return result

        return call

    for name in ("open", "mkdir", "pwrite", "ftruncate", "chmod", "fsync", "link", "unlink"):
        monkeypatch.setattr(os, name, watching(getattr(os, name)))
    with umask(0):
        small.run(overwrite=True)
    assert len(seen) > 5


def test_a_mode_that_is_changed_during_the_run_counts(tmp_path):
    path = tmp_path / "out"
    for first in (0o644, None):
        if first:
            path.touch(first)
        with AtomicFile(str(path), overwrite=True) as file:
            path.touch()
            os.chmod(path, 0o640 if first else 0o600)
            file.commit()
        assert mode(path) == (0o640 if first else 0o600)
        path.unlink()


def test_a_program_of_another_owner_does_not_become_ours(tmp_path):
    small = Small(tmp_path, ".npz")
    small.run()
    os.chmod(small.output, 0o6755)
    small.run(overwrite=True)
    assert mode(small.output) == 0o755


def test_whatever_else_is_written_follows_the_umask_or_what_it_replaces(tmp_path):
    averager = wavg.StreamingAverager("linear")
    averager.update({"w": np.float32([1])})

    def write():
        wavg.save(tmp_path / "model.npz", {"w": np.ones(1)}, overwrite=True)
        averager.save(tmp_path / "state.safetensors")
        results.written("a", tmp_path / "table.csv", overwrite=True)
        Journal(f"{tmp_path}/journal", {}).__exit__(None, None, None)

    with umask(0o027):
        write()
    assert {mode(path) for path in tmp_path.iterdir()} == {0o640}
    for path in tmp_path.iterdir():
        os.chmod(path, 0o604)
    write()
    assert {mode(path) for path in tmp_path.iterdir()} == {0o604}
    assert len(os.listdir(tmp_path)) == 4


@root
@pytest.mark.parametrize("suffix", [".h5", "/"])
def test_root_leaves_owner_and_group(tmp_path, suffix):
    small = Small(tmp_path, suffix)
    small.run()
    for path in (small.output, *small.files()):
        os.chown(path, USER, OTHER)
    small.run(overwrite=True)
    for path in (small.output, *small.files()):
        assert (os.stat(path).st_uid, os.stat(path).st_gid) == (USER, OTHER)


@root
@pytest.mark.parametrize(
    ("groups", "before", "after"),
    [
        ([OTHER], 0o640, 0o640),
        ([], 0o640, 0o600),
        ([], 0o664, 0o644),
        ([], 0o604, 0o600),  # else the old group, which was kept out, could read
        ([], 0o666, 0o666),
    ],
)
def test_where_the_group_cannot_be_kept_nobody_gains_by_it(place, groups, before, after):
    small = Small(place, ".safetensors")
    small.run()
    give_all(place)
    os.chown(small.output, USER, OTHER)
    os.chmod(small.output, before)
    with unprivileged(*groups):
        small.run(overwrite=True)
    assert os.stat(small.output).st_gid == (OTHER if groups else GROUP)
    assert mode(small.output) == after


@root
def test_a_file_of_another_user_becomes_the_writers(place):
    small = Small(place, ".safetensors")
    small.run()
    give_all(place)
    os.chown(small.output, 0, 0)
    os.chmod(small.output, 0o644)
    with unprivileged():
        small.run(overwrite=True)
    assert os.stat(small.output).st_uid == USER
    assert mode(small.output) == 0o644


def acl(*entries):
    """An access list as Linux stores it: (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
LIST = acl((1, 6, NOBODY), (2, 6, 4321), (4, 0, NOBODY), (16, 6, NOBODY), (32, 0, NOBODY))
OWN, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def list_of(path, name=OWN):
    try:
        return os.getxattr(path, name)
    except OSError:
        return None


@pytest.fixture
def lists(tmp_path):
    probe = tmp_path / "probe"
    probe.touch()
    try:
        os.setxattr(probe, OWN, LIST)
    except (OSError, AttributeError):
        pytest.skip("no access lists here")


@pytest.mark.parametrize("suffix", [".npz", "/"])
def test_access_lists_are_handed_on_and_none_comes_in(tmp_path, lists, suffix):
    small = Small(tmp_path, suffix)
    small.run()
    os.setxattr(small.folder, DEFAULT, LIST)
    first, *others = small.files()
    os.setxattr(first, OWN, LIST)
    small.run(overwrite=True)
    assert list_of(first) == LIST
    assert mode(first) == 0o660  # of which the group itself has nothing
    for path in others:
        assert list_of(path) is None
    if suffix == "/":
        assert list_of(small.output) is None
        os.setxattr(small.output, DEFAULT, LIST)
        small.run(overwrite=True)
        assert list_of(small.output, DEFAULT) == LIST


def test_where_a_list_cannot_be_kept_the_group_does_not_get_its_mask(tmp_path, lists, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "no lists")

    small = Small(tmp_path, ".npz")
    small.run()
    os.setxattr(small.output, OWN, LIST)
    monkeypatch.setattr(os, "setxattr", refuse)
    small.run(overwrite=True)
    assert mode(small.output) == 0o600


# Its user 4321 may not read it, whom the mode lets in; the group may, or the mode says so.
DENIAL = acl((1, 6, NOBODY), (2, 0, 4321), (4, 4, NOBODY), (16, 4, NOBODY), (32, 4, NOBODY))
GIFT = acl((1, 7, NOBODY), (2, 7, 4321), (4, 5, NOBODY), (16, 7, NOBODY), (32, 5, NOBODY))


@root
@pytest.mark.parametrize(("before", "after"), [(None, 0o644), (DENIAL, 0o600)])
@pytest.mark.parametrize("suffix", [".npz", "/"])
def test_where_the_group_cannot_be_kept_no_list_comes_in_either(place, before, after, suffix):
    small = Small(place, suffix)
    small.run()
    try:
        os.setxattr(small.folder, DEFAULT, GIFT)
    except OSError:
        pytest.skip("no access lists here")
    small.run(overwrite=True)  # what is imported late
    give_all(place)
    for path in small.files():
        os.chown(path, USER, OTHER)
        os.chmod(path, 0o644)
        if before:
            os.setxattr(path, OWN, before)
    with unprivileged():
        small.run(overwrite=True)
    for path in small.files():
        assert list_of(path) is None
        assert mode(path) == after


def test_where_a_list_cannot_be_kept_nobody_whom_it_kept_out_comes_in(tmp_path, lists, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "not this one")

    small = Small(tmp_path, ".npz")
    small.run()
    os.setxattr(small.output, OWN, DENIAL)
    os.setxattr(small.folder, DEFAULT, GIFT)
    monkeypatch.setattr(os, "setxattr", refuse)
    small.run(overwrite=True)
    assert mode(small.output) == 0o600


def test_a_list_that_stays_although_it_was_to_go_lets_nobody_in(tmp_path, lists, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "it stays")

    small = Small(tmp_path, ".npz")
    small.run()
    os.chmod(small.output, 0o640)
    os.setxattr(small.folder, DEFAULT, GIFT)
    monkeypatch.setattr(os, "removexattr", refuse)
    small.run(overwrite=True)
    assert mode(small.output) == 0o600  # the mask of the list, too


def test_new_files_have_what_their_folder_gives_them(tmp_path, lists):
    small = Small(tmp_path, ".npz")
    os.setxattr(small.folder, DEFAULT, LIST)
    small.run()
    assert list_of(small.output) == LIST


@root
@pytest.mark.parametrize("suffix", [".npz", "/"])
def test_a_folder_that_gives_its_group_gives_it(tmp_path, suffix):
    small = Small(tmp_path, suffix)
    os.chown(small.folder, 0, OTHER)
    os.chmod(small.folder, 0o2775)
    for overwrite in (False, True):
        small.run(overwrite=overwrite)
        assert {os.stat(path).st_gid for path in (small.output, *small.files())} == {OTHER}


def test_a_file_system_without_modes_of_its_own_is_asked_for_none(tmp_path, monkeypatch):
    with AtomicFile(f"{tmp_path}/out") as file:
        file.commit()
    found = access.access_of(f"{tmp_path}/out")
    monkeypatch.setattr(os, "chmod", None)
    access.give(f"{tmp_path}/out", -1, found)
    assert access.access_of(f"{tmp_path}/out") == found


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", small_files.REPLACED)
@pytest.mark.parametrize(
    "kind",
    ["relative", pytest.param("absolute", marks=pytest.mark.slow), "chain", "parent", "dangling"],
)
def test_a_link_is_followed_and_stays(tmp_path, suffix, kind):
    small = Small(tmp_path, suffix)
    store, name = tmp_path / "store", Path(small.output).name
    store.mkdir()
    link = tmp_path / name
    if kind != "dangling":
        small.run(f"{store / name}{'/' * (suffix == '/')}", weights=[1, 0])
    before = {path.name: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    if kind == "parent":
        (tmp_path / "way").symlink_to("store")
        link = tmp_path / "way" / name
    elif kind == "chain":
        (tmp_path / "further").symlink_to(store / name)
        link.symlink_to("further")
    else:
        link.symlink_to(store / name if kind == "absolute" else f"store/{name}")
    with pytest.raises(OutputExistsError):
        small.run(str(link))
    small.run(f"{link}{'/' * (suffix == '/')}", overwrite=True)
    assert link.is_symlink() == (kind != "parent")
    assert {path.name for path in store.iterdir()} == {name}
    found = {path.name: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert found != before
    assert wavg.load(store / name).keys() == wavg.load(small.inputs[0]).keys()


@pytest.mark.parametrize("kind", [AtomicFile, AtomicFolder])
def test_the_temporary_lies_beside_what_a_link_leads_to(tmp_path, kind):
    (tmp_path / "store").mkdir()
    with kind(f"{tmp_path}/store/out") as made:
        made.commit()
    (tmp_path / "link").symlink_to("store/out")
    with kind(f"{tmp_path}/link", overwrite=True) as made:
        assert os.path.dirname(made.temporary) == str(tmp_path / "store")
        assert len(os.listdir(tmp_path)) == 2


def test_a_link_to_another_file_system_is_followed(tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("needs /dev/shm on another file system")
    small = Small(tmp_path, ".npz")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        os.symlink(f"{folder}/real.npz", small.output)
        small.run(overwrite=True)
        assert os.listdir(folder) == ["real.npz"]
        assert os.path.islink(small.output)


@pytest.mark.parametrize("suffix", [".npz", "/"])
def test_links_in_a_circle_are_no_output(tmp_path, suffix):
    small = Small(tmp_path, suffix)
    bare = small.output.rstrip("/")
    os.symlink("second", bare)
    os.symlink(os.path.basename(bare), small.folder / "second")
    for overwrite in (False, True):
        with pytest.raises(OutputError) as caught:
            small.run(overwrite=overwrite)
        assert caught.value.errno == errno.ELOOP
    assert os.path.islink(bare)
    assert len(os.listdir(small.folder)) == 2


@pytest.mark.parametrize("suffix", small_files.REPLACED)
@pytest.mark.parametrize("kind", ["itself", "symbolic", "hard"])
def test_the_output_may_be_an_input(tmp_path, suffix, kind):
    small = Small(tmp_path, suffix)
    expected = wavg.average_checkpoints(small.inputs)
    target = f"{small.folder}/again{suffix.rstrip('/')}"
    if kind == "itself":
        target = small.inputs[-1]
    elif kind == "symbolic":
        os.symlink(small.inputs[-1], target)
    elif suffix == "/":
        pytest.skip("folders have no hard links")
    else:
        os.link(small.inputs[-1], target)
    before = wavg.load(small.inputs[-1])
    small.run(target, overwrite=True)
    assert_same(wavg.load(target), expected)
    # A hard link is a name of its own: the new file has that one, the old the others.
    assert_same(wavg.load(small.inputs[-1]), before if kind == "hard" else expected)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


# --- places that take no file, or not this one ----------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("suffix", small_files.REPLACED)
def test_a_read_only_file_is_replaced_when_told_so_for_its_folder_counts(place, suffix, dtype):
    small = Small(place, suffix)
    small.run()
    small.run(overwrite=True, dtype=dtype)  # what is imported late
    give_all(place)
    for path in small.files():
        os.chmod(path, 0o444)
    if suffix == "/":
        os.chmod(small.output, 0o555)
    old = {path: path.read_bytes() for path in small.files()}
    with unprivileged():
        small.run(overwrite=True, dtype=dtype, weights=[1, 0])
    assert {path: path.read_bytes() for path in small.files()} != old
    assert {mode(path) for path in small.files()} == {0o444}
    assert len(os.listdir(small.folder)) == 1


@pytest.mark.parametrize("suffix", small_files.ALL)
def test_a_folder_that_may_not_be_written_to_is_told(place, suffix):
    small = Small(place, suffix)
    small.run(f"{place}/first{suffix}")
    give_all(place)
    os.chmod(small.folder, 0o555)
    for work in (small.run, lambda: wavg.plan_average(small.inputs, small.output)):
        told = rf"out.*Permission denied for the folder {small.folder}; name an output in"
        with unprivileged(), pytest.raises(OutputError, match=told) as caught:
            work()
        assert caught.value.errno == errno.EACCES
    assert os.listdir(small.folder) == []


@root
def test_a_file_system_that_is_read_only_is_told(tmp_path):
    small = Small(tmp_path, ".npz")
    command = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(small.folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted")
    try:
        with pytest.raises(OutputError, match="Read-only file system") as caught:
            small.run()
    finally:
        subprocess.run(["umount", str(small.folder)], check=True)
    assert caught.value.errno == errno.EROFS


@root
@pytest.mark.parametrize("suffix", [".npz", "/"])
def test_what_cannot_be_changed_stays(tmp_path, suffix):
    small = Small(tmp_path, suffix)
    small.run()
    old = small_files.contents(small.folder)
    fixed = small.files()[0] if suffix == ".npz" else Path(small.output)
    if (
        not shutil.which("chattr")
        or subprocess.run(["chattr", "+i", fixed], capture_output=True, check=False).returncode
    ):
        pytest.skip("no file can be made immutable")
    try:
        with pytest.raises(OutputError, match="not permitted"):
            small.run(overwrite=True, weights=[1, 0])
    finally:
        subprocess.run(["chattr", "-i", fixed], check=True)
    assert small_files.contents(small.folder) == old


@root
def test_what_another_user_left_is_left(place):
    small = Small(place, ".npz")
    small.run(f"{place}/first.npz")
    give_all(place)
    stray = small.folder / ".out.npz.0123456789ab.wavg-tmp"
    stray.touch(0o600)
    with unprivileged():
        small.run()
    assert sorted(os.listdir(small.folder)) == [stray.name, "out.npz"]


def test_a_folder_to_put_files_into_needs_no_look_around(place):
    small = Small(place, ".npz")
    small.run(f"{place}/first.npz")
    give_all(place)
    os.chmod(small.folder, 0o333)
    with unprivileged():
        small.run()
    os.chmod(small.folder, 0o755)
    assert os.listdir(small.folder) == ["out.npz"]


@pytest.mark.parametrize("suffix", small_files.ALL)
def test_an_input_that_may_not_be_read_is_named(place, suffix):
    small = Small(place, suffix)
    small.run(f"{place}/first{suffix}")
    give_all(place)
    secret = next(path for path in sorted(Path(place / "in").rglob("*"), reverse=True)
                  if path.is_file() and path.name != "config.json")  # fmt: skip
    os.chmod(secret, 0)
    with unprivileged(), pytest.raises((OSError, wavg.WavgError), match=secret.stem):
        small.run()
    assert os.listdir(small.folder) == []


@pytest.mark.parametrize("mode", [0, 0o444, 0o222])
@pytest.mark.parametrize(
    "words",
    ["in", "in/*.npz", "in/m_1.npz", "in/[m]*/x.npz", "i*/*.npz", "i*/m_1.npz", "i*/m/*.npz"],
)
def test_inputs_that_may_not_be_seen_are_not_told_as_missing(place, monkeypatch, words, mode):
    (place / "in").mkdir()
    wavg.save(place / "in" / "m_1.npz", {"w": np.float32([1])})
    give_all(place)
    os.chmod(place / "in", mode)
    monkeypatch.chdir(place)
    with unprivileged(), pytest.raises(PermissionError) as caught:
        wavg.average_checkpoints(words)
    assert str(caught.value.filename).startswith("in")


@pytest.mark.parametrize("mode", [0, 0o444])
@pytest.mark.parametrize(
    "words", ["in", "in/*", "in/checkpoint-2", "in/*/model.safetensors.index.json"]
)
def test_a_checkpoint_that_may_not_be_looked_into_is_no_save_cut_short(
    place, monkeypatch, words, mode
):
    for step in (1, 2, 3):
        checkpoint = place / "in" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name in ("model.safetensors.index.json", "model-00001-of-00001.safetensors"):
            (checkpoint / name).touch()
    give_all(place)
    os.chmod(place / "in" / "checkpoint-2", mode)
    monkeypatch.chdir(place)
    with unprivileged(), pytest.raises(PermissionError) as caught:
        wavg.average_checkpoints(words)
    assert caught.value.filename.startswith("in/checkpoint-2")


@root
@pytest.mark.parametrize("kind", ["folders", "files"])
@pytest.mark.parametrize("last", [None, 1])
def test_a_link_to_where_the_user_may_not_look_is_not_passed_over(place, monkeypatch, kind, last):
    (place / "far").mkdir(mode=0o700)
    for step in (1, 2, 3):
        name = f"in/m-{step}/model.safetensors" if kind == "folders" else f"in/m-{step}.npz"
        os.makedirs(os.path.dirname(place / name), exist_ok=True)
        wavg.save(place / name, {"w": np.float32([step])})
    newest = "in/m-4" if kind == "folders" else "in/m-4.npz"
    os.symlink("../far/m-4", place / newest)
    monkeypatch.chdir(place)
    with unprivileged(), pytest.raises(PermissionError) as caught:
        wavg.average_checkpoints("in", last=last)
    assert caught.value.filename == newest


@root
def test_an_adapters_settings_that_may_not_be_read_are_not_told_as_none(place):
    (place / "far").mkdir(mode=0o700)
    for step in (1, 2):
        (place / f"a-{step}").mkdir()
        wavg.save(place / f"a-{step}" / "adapter_model.safetensors", {"w": np.float32([step])})
        os.symlink("../far/config", place / f"a-{step}" / "adapter_config.json")
    with unprivileged(), pytest.raises(PermissionError, match=r"a-1/adapter_config\.json"):
        wavg.average_checkpoints(f"{place}/a-*")


def test_missing_inputs_are_told_as_that(place, monkeypatch):
    monkeypatch.chdir(place)
    for words in ("*.npz", "in/*.npz", "in/m.npz", "m" * 300):
        with pytest.raises(FileNotFoundError, match=r"no file (matches|or folder)"):
            wavg.average_checkpoints(words)


@pytest.mark.parametrize("suffix", [".safetensors", "/"])
def test_a_name_as_long_as_the_file_system_takes_has_room_for_its_temporary(tmp_path, suffix):
    small = Small(tmp_path, suffix)
    name = "ä" * 100 + "x" * (255 - 200 - len(suffix.rstrip("/"))) + suffix.rstrip("/")
    stray = None
    for overwrite in (False, True):
        small.run(f"{small.folder}/{name}", overwrite=overwrite)
        assert [path for path in os.listdir(small.folder) if path != stray] == [name]
        kind = AtomicFolder if suffix == "/" else AtomicFile
        made = kind(f"{small.folder}/{name}", overwrite=True)
        stray = os.path.basename(made.temporary)  # as of a run that was killed: nobody locks it
        (small.folder / stray).touch()
    small.run(f"{small.folder}/{name}", overwrite=True)
    assert os.listdir(small.folder) == [name]
    with pytest.raises(OutputError, match="nothing was begun") as caught:
        small.run(f"{small.folder}/x{name}")
    assert caught.value.errno == errno.ENAMETOOLONG


@pytest.mark.parametrize("suffix", small_files.ALL)
def test_a_folder_that_vanishes_during_the_run_is_told(tmp_path, suffix, monkeypatch):
    small = Small(tmp_path, suffix)
    real = publish.NewFile.sync

    def sync(file):
        real(file)
        shutil.rmtree(small.folder, ignore_errors=True)

    monkeypatch.setattr(publish.NewFile, "sync", sync)
    with pytest.raises(OutputError):
        small.run()
    assert not small.folder.exists()


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 5000])
@pytest.mark.parametrize("suffix", [*small_files.ALL, ".csv"])
def test_a_name_that_no_system_takes_is_told_before_anything_is_begun(tmp_path, suffix, name):
    small = Small(tmp_path, suffix if suffix != ".csv" else ".npz")

    def table(path, overwrite):
        results.written("a", path, overwrite=overwrite)

    make = table if suffix == ".csv" else small.run
    for path in (f"{small.folder}/{name}{suffix}", f"{small.folder}/{name}/out{suffix}"):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="nothing was begun") as caught:
                make(path, overwrite=overwrite)
            assert caught.value.errno in (errno.EINVAL, errno.ENAMETOOLONG)
        with pytest.raises(OutputError):
            Journal(path, {})
    assert os.listdir(small.folder) == []


def test_a_file_where_a_folder_belongs_is_told(tmp_path):
    small = Small(tmp_path, ".npz")
    with pytest.raises(OutputError, match="there is no folder"):
        small.run(f"{small.inputs[0]}/out.npz")


# --- pipes, devices, sockets ----------------------------------------------------------------------


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        before = os.getcwd()
        os.chdir(os.path.dirname(path))  # its name may have some hundred bytes
        made.bind(os.path.basename(path))
        os.chdir(before)


def make_device(path):
    if os.geteuid():
        pytest.skip("needs root")
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null


KINDS = [make_fifo, make_socket, make_device]


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("suffix", [".safetensors", "/"])
def test_what_is_no_file_is_not_replaced(tmp_path, make, suffix, link):
    small = Small(tmp_path, suffix)
    bare = small.output.rstrip("/")
    make(f"{tmp_path}/odd")
    kind = stat.S_IFMT(os.stat(f"{tmp_path}/odd").st_mode)
    if link:
        os.symlink(f"{tmp_path}/odd", bare)
    else:
        os.rename(f"{tmp_path}/odd", bare)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is a device, pipe or socket"):
            small.run(bare, overwrite=overwrite)
    with pytest.raises(OutputError, match="is a device, pipe or socket"):
        AtomicFile(bare, overwrite=True)
    assert stat.S_IFMT(os.stat(bare).st_mode) == kind


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".h5", ".keras"])
def test_what_is_no_file_is_no_input_and_is_not_waited_for(tmp_path, make, suffix):
    small = Small(tmp_path, suffix)
    os.unlink(small.inputs[0])
    make(small.inputs[0])
    with pytest.raises(CheckpointFormatError, match="is a device, pipe or socket"):
        small.run()


def test_a_device_without_an_ending_is_not_asked_for_one(tmp_path):
    small = Small(tmp_path, ".npz")
    with pytest.raises(OutputError, match=r"^/dev/null is a device.*plan_average \(--dry-run\)$"):
        small.run("/dev/null")


def test_tables_may_go_to_a_pipe_or_a_device(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    results.written("a,b\n" * 50_000, pipe, overwrite=False)
    reader.join()
    assert got == [b"a,b\n" * 50_000]
    results.written("a", "/dev/null", overwrite=False)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


def score(path):
    return 1.0


def test_the_command_writes_a_table_into_a_pipe(tmp_path):
    paths = small_files.inputs(tmp_path / "in", ".npz")
    reader, writer = os.pipe()
    words = ["--evaluate", f"{__name__}:score", "--maximize", "--quiet"]
    assert cli.main(["sweep", *paths, *words, "--csv", f"/dev/fd/{writer}"]) == 0
    os.close(writer)
    with open(reader) as file:
        assert file.read().startswith("n,step,path")


def test_a_table_that_the_pipe_refuses_is_told(tmp_path):
    make_socket(f"{tmp_path}/socket")
    with pytest.raises(OutputError):
        results.written("a", tmp_path / "socket", overwrite=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_what_is_written_into_is_not_said_to_be_untouched():
    with pytest.raises(OutputError, match="a part of it may have been written") as caught:
        results.written("a", "/dev/full", overwrite=False)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("make", [make_fifo, make_device])
def test_a_journal_is_a_file(tmp_path, make):
    make(f"{tmp_path}/journal")
    with pytest.raises(wavg.WavgError, match="is no file"):
        Journal(f"{tmp_path}/journal", {})


def test_a_journal_that_the_system_refuses_is_told(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "missing/journal"):
        with pytest.raises(OutputError, match="cannot write"):
            Journal(str(path), {})

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(f"{tmp_path}/journal", {}) as journal:
        monkeypatch.setattr(os, "write", fail)
        with pytest.raises(OutputError, match=r"No space left.*its last line may be torn"):
            journal.begin("a")


def test_a_journal_follows_a_link(tmp_path):
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        with Journal(f"{tmp_path}/link", {}) as journal:
            journal.begin("a")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes().count(b"begun") == 2


# --- holes ----------------------------------------------------------------------------------------


def test_holes_of_an_input_are_zeros(tmp_path):
    paths = [f"{tmp_path}/m_{step}.safetensors" for step in (1, 2)]
    for path in paths:
        wavg.save(path, {"w": np.ones(1 << 20, np.float32)})
        with open(path, "r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            file.truncate(header)
            file.truncate(header + (4 << 20))
    wavg.average_checkpoints(paths, f"{tmp_path}/out.safetensors")
    assert not wavg.load(f"{tmp_path}/out.safetensors")["w"].any()


TERABYTE = 1 << 40


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", ".weights.json"])
def test_a_hole_of_a_terabyte_behind_a_file_takes_no_time_and_no_room(tmp_path, suffix):
    small = Small(tmp_path, suffix)
    expected = wavg.average_checkpoints(small.inputs)
    shards = sorted((tmp_path / "in").glob("*_2_*.h5"))
    with contextlib.suppress(OSError):
        os.truncate(shards[-1] if shards else small.inputs[-1], TERABYTE)
    if os.stat(shards[-1] if shards else small.inputs[-1]).st_size != TERABYTE:
        pytest.skip("no file can be so large here")
    begun = time.process_time()
    assert_same(wavg.average_checkpoints(small.inputs), expected)
    with pytest.raises(OutputError, match="nothing was begun") as caught:
        small.run()
    assert caught.value.errno == errno.ENOSPC
    assert time.process_time() - begun < 60  # to read it would take half an hour
    assert os.listdir(small.folder) == []


def test_a_model_of_a_terabyte_of_holes_needs_room_that_is_told(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (TERABYTE // 4, TERABYTE)
    paths = [tmp_path / f"m_{step}.safetensors" for step in (1, 2)]
    for path in paths:
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        try:
            os.truncate(path, 8 + len(header) + TERABYTE)
        except OSError:
            pytest.skip("no file can be so large here")
    for output in ("out.safetensors", "out.npz"):
        with pytest.raises(OutputError, match="nothing was begun"):
            wavg.average_checkpoints(paths, tmp_path / output)
    assert len(os.listdir(tmp_path)) == 2
