"""What a loss of power may leave: the model of a disk, what is recorded of a run, and the verdict.

benchmarks/power_loss.py takes the power away from runs of every format; docs/reliability.md has its
figures.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
OLD, NEW = b"the old one", b"something new"


@pytest.fixture
def durable(monkeypatch):
    """benchmarks/durable.py: the model."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import durable

    return durable


def left(disk, durable):
    """Return all that may be there after a loss of power, as bytes by name."""
    states = set()
    for _, kept in durable.crashes(disk.pending, random.Random(0)):
        seen = disk.seen(kept).items()
        states.add(tuple(sorted((path, disk.file(version).data) for path, version in seen)))
    return [dict(state) for state in states]


def replaced(durable, *, file=True, folder=True):
    """A disk on which a file has been replaced, with or without the syncs that it needs."""
    disk = durable.Disk({"out": durable.File(OLD, 0o644)})
    disk.apply(durable.Made("tmp", "node", 0o600))
    disk.apply(durable.Written("node", 0, NEW))
    if file:
        disk.apply(durable.Synced("node", 2))
    disk.apply(durable.Renamed("tmp", "out"))
    if folder:
        disk.apply(durable.Synced("", 4))
    return disk


def test_a_file_that_was_synced_and_renamed_is_the_old_one_or_the_new_one(durable):
    states = left(replaced(durable, folder=False), durable)
    assert {state["out"] for state in states} == {OLD, NEW}
    assert {state.get("tmp") for state in states} == {None, NEW}


def test_once_the_folder_is_synced_it_is_the_new_one(durable):
    assert left(replaced(durable), durable) == [{"out": NEW}]


def test_a_name_may_be_there_before_the_data(durable):
    states = left(replaced(durable, file=False, folder=False), durable)
    torn = {state["out"] for state in states} - {OLD, NEW}
    assert b"" in torn
    assert NEW[:1] in torn
    assert any(len(data) == len(NEW) for data in torn)  # junk


def test_a_sync_of_the_folder_makes_no_data_durable(durable):
    disk = replaced(durable, file=False, folder=False)
    disk.apply(durable.Synced("", 3))
    states = left(disk, durable)
    assert all("tmp" not in state for state in states)
    assert {b"", NEW} < {state["out"] for state in states}


def test_a_sync_covers_what_had_been_done_when_it_began(durable):
    disk = durable.Disk({"out": durable.File(OLD, 0o644)})
    disk.apply(durable.Written("out", 0, b"T"))
    disk.apply(durable.Written("out", 1, b"H"))
    disk.apply(durable.Synced("out", 1))
    assert [one.number for one in disk.pending] == [1]
    assert {state["out"][:1] for state in left(disk, durable)} == {b"T"}


def test_a_sync_of_data_covers_the_length_but_not_the_mode(durable):
    disk = durable.Disk({"out": durable.File(OLD, 0o644)})
    disk.apply(durable.Moded("out", 0o600))
    disk.apply(durable.Resized("out", 20))
    disk.apply(durable.Synced("out", 2, data_only=True))
    (lost,) = [disk.file(disk.seen({})["out"])]
    assert lost == durable.File(OLD.ljust(20, b"\0"), 0o644)
    disk.apply(durable.Synced("out", 3))
    assert disk.file(disk.seen({})["out"]).mode == 0o600


def test_folders_are_exchanged_whole_and_files_in_them_have_names_of_their_own(durable):
    file = durable.File(OLD, 0o644)
    disk = durable.Disk({"out/": durable.File(b"", 0o755), "out/a": file})
    disk.apply(durable.Made("tmp", "folder", 0o700, folder=True))
    disk.apply(durable.Made("tmp/a", "node", 0o644))
    disk.apply(durable.Written("node", 0, NEW))
    disk.apply(durable.Synced("node", 3))
    disk.apply(durable.Renamed("tmp", "out", exchange=True))
    assert {state.get("out/a") for state in left(disk, durable)} == {OLD, NEW, None}
    disk.apply(durable.Synced("folder", 5))  # then no file of it can be missing
    assert {state.get("out/a") for state in left(disk, durable)} == {OLD, NEW}


def test_a_second_name_of_a_file_is_no_other_file(durable):
    disk = durable.Disk({"out": durable.File(OLD, 0o644)})
    disk.apply(durable.Linked("out", "other"))
    disk.apply(durable.Renamed("other", "out"))  # does nothing, says POSIX
    disk.apply(durable.Written("out", 0, b"T"))
    disk.apply(durable.Removed("out"))
    assert {path: disk.file(version).data for path, version in disk.seen().items()} == {
        "other": b"The old one"
    }


def test_a_rename_into_another_folder_is_not_modelled(durable):
    disk = durable.Disk({"in/": durable.File(b"", 0o755), "out": durable.File(OLD, 0o644)})
    with pytest.raises(ValueError, match="another folder"):
        disk.apply(durable.Renamed("out", "in/out"))


# --- what is recorded -----------------------------------------------------------------------------


UNKNOWN = {
    "unnamed": "without a name", "appended": "appended to", "mapped": "is mapped",
    "process": "another process", "elsewhere": "elsewhere",
    "elsewhere_by_descriptor": "elsewhere", "symlinked": "is not known", "punched": "fallocate",
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """What came of recording some functions, by their names."""
    script, folder = Path(__file__).parent / "recorded_acts.py", tmp_path_factory.mktemp("acts")
    done = subprocess.run(
        [sys.executable, script, folder],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "ptrace" in done.stderr or "x86-64" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_recorded_makes_what_stands_there(recorded):
    counts = [recorded["many_calls"].count(n) for n in ("Made", "Written", "Synced", "Removed")]
    assert counts == [4, 6, 2, 2]


@pytest.mark.parametrize("act", UNKNOWN)
def test_a_change_that_the_model_does_not_know_is_an_error(recorded, act):
    assert UNKNOWN[act] in recorded[act]


# --- runs -----------------------------------------------------------------------------------------


def script(*arguments):
    command = [sys.executable, str(BENCHMARKS / "power_loss.py"), *arguments, "--no-record"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if "ptrace" in done.stderr or "x86-64" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_power_lost_at_any_call_leaves_the_old_output_or_the_new_one(tmp_path):
    told = script(str(tmp_path), "--formats", "safetensors", "--quick", "--runs-after", "1")
    planted = told.rpartition("planted: ")[2]
    assert planted.count(":") == 3  # mistakes, of which none was found 0 times
    assert ": 0" not in planted


@pytest.mark.slow
def test_power_lost_as_an_output_of_several_files_appears_or_is_withdrawn(tmp_path):
    script(str(tmp_path), "--formats", "folder of safetensors,.weights.json", "--runs-after", "5")
