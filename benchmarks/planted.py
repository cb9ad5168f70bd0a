"""What power_loss.py plants in wavg: circumstances of a run, and mistakes that it has to find."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable

from small_runs import Kind

from wavg import outputs, publish, publish_folder, temporaries


def written_behind() -> None:
    """Set the disk to work during the run, as large outputs do: a sync, while writing goes on."""
    publish._SYNC_BYTES = 1


def interrupted(number: int) -> Callable[[], None]:
    """Return what interrupts a run when its output's n-th file has just appeared."""

    def plant() -> None:
        real, calls = publish.sync_folder, itertools.count(1)

        def sync_folder(folder: str) -> None:
            real(folder)
            if next(calls) == number:
                raise KeyboardInterrupt

        publish.sync_folder = sync_folder

    return plant


def unsynced(skipped: Callable[[str], bool]) -> Callable[[], None]:
    """Return what leaves out every sync of some files or folders."""

    def plant() -> None:
        real = os.fsync

        def fsync(descriptor: int) -> None:
            if not skipped(os.readlink(f"/proc/self/fd/{descriptor}")):
                real(descriptor)

        os.fsync = fsync

    return plant


def copied() -> None:
    """Replace by copying rather than by a rename."""

    def replace(old: str, new: str) -> None:
        shutil.copyfile(old, new)
        with open(new) as file:
            os.fsync(file.fileno())
        os.unlink(old)

    os.replace = replace


def named_first() -> None:
    """Let the file that names the others appear before them."""
    outputs.reversed = lambda published: published  # type: ignore[attr-defined]


def unsettled() -> None:
    """Remove what came out of use without a sync of the folder before."""
    publish.settled = publish_folder.settled = lambda folder: True
    temporaries.sync_folder = lambda folder: None


def planted(kind: Kind) -> dict[str, Callable[[], object]]:
    """Return mistakes that are to be found in runs of a format."""
    found: dict[str, Callable[[], object]] = {
        "files are not synced": unsynced(os.path.isfile),
        "folders are not synced": unsynced(os.path.isdir),
    }
    if kind.folder:
        inner = unsynced(lambda path: path.endswith(".wavg-tmp") and os.path.isdir(path))
        found["only the folder around is synced"] = inner
    elif kind.name == ".weights.json":
        found["the index appears first"] = named_first
    else:
        found["a copy for the rename"] = copied
    return found
