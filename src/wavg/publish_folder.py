"""A folder of files in the making, which appears whole, or is replaced whole."""

from __future__ import annotations

import contextlib
import os
import stat
from types import TracebackType
from typing import TYPE_CHECKING

from wavg.errors import OutputError, OutputExistsError
from wavg.publish import NewFile, appeared, confirm, failures, refuse_existing
from wavg.renames import EXCHANGE, NO_REPLACE, NOT_HERE, rename
from wavg.temporaries import beside, claimed, is_open_as, reclaim, remove_stray

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AtomicFolder", "refuse_folders_within"]


class AtomicFolder:
    """A folder of files in the making. Leaving the ``with`` block without `commit` leaves no trace.

    Parameters
    ----------
    path
        The destination; if it is a symbolic link, what it points to.
    overwrite
        Whether an existing folder may be replaced, with all that is in it. It must hold nothing but
        files, and the file system must be able to exchange two folders at one instant.

    Notes
    -----
    The temporary folder is locked as an `AtomicFile` is, and reclaimed like it.
    """

    def __init__(self, path: str, *, overwrite: bool = False) -> None:
        refuse_existing(path, overwrite, folder=True)
        self.path, self._overwrite = path, overwrite
        self.destination = os.path.realpath(path)
        self.temporary = beside(self.destination)
        self._descriptor = -1
        self._files: list[NewFile] = []
        self._lost: OutputError | None = None

    def __enter__(self) -> Self:
        try:
            with failures(self.path, self.temporary):
                reclaim(self.destination)
                if os.path.isdir(self.destination):
                    self._refuse_unless_exchangeable()
                self._create()
                if os.path.isdir(self.destination):
                    mode = stat.S_IMODE(os.stat(self.destination).st_mode)
                    os.chmod(self.temporary, mode | 0o300)
        except BaseException:
            self._discard()
            raise
        return self

    def _create(self) -> None:
        os.mkdir(self.temporary)  # less the umask
        self._descriptor = os.open(self.temporary, os.O_RDONLY)
        while not claimed(self._descriptor, self.temporary):
            os.close(self._descriptor)
            self.temporary = beside(self.destination)
            os.mkdir(self.temporary)
            self._descriptor = os.open(self.temporary, os.O_RDONLY)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        try:
            for file in self._files:
                file._discard()
            if os.path.lexists(self.temporary):
                remove_stray(self.temporary)
        finally:
            if self._descriptor >= 0:
                descriptor, self._descriptor = self._descriptor, -1
                with contextlib.suppress(OSError):  # durable already, or given up
                    os.close(descriptor)

    def file(self, name: str) -> NewFile:
        """Begin a file of the folder; it is closed with it."""
        new = NewFile(os.path.join(self.path, name), os.path.join(self.temporary, name))
        self._files.append(new.__enter__())
        return new

    def sync(self) -> None:
        """Make the folder and its files durable, still under its temporary name.

        Once it failed it fails, as `NewFile.sync` does.
        """
        for file in self._files:
            file.sync()
        if self._lost is not None:
            raise self._lost
        try:
            with failures(self.path, self.temporary):
                os.fsync(self._descriptor)
        except OutputError as error:
            self._lost = error
            raise

    def commit(self) -> None:
        """Make the folder durable and let it appear, whole, under its name.

        If the disk does not confirm that it did, it is withdrawn.
        """
        self.sync()
        with failures(self.path, self.temporary):
            if self._overwrite and os.path.isdir(self.destination):
                refuse_folders_within(self.destination)
                rename(self.temporary, self.destination, EXCHANGE)
            else:
                self._publish_new()
            confirm(self)

    def withdraw(self) -> bool:
        """Undo what `commit` did, if anything; return whether what was there before is again."""
        try:
            if is_open_as(self.destination, self._descriptor):
                if os.path.lexists(self.temporary):  # what was replaced
                    rename(self.temporary, self.destination, EXCHANGE)
                else:
                    os.rename(self.destination, self.temporary)
        except OSError:
            return False
        return True

    def _publish_new(self) -> None:
        try:
            rename(self.temporary, self.destination, NO_REPLACE)
        except FileExistsError:
            raise appeared(self.path) from None
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            refuse_existing(self.destination, overwrite=False, folder=True)
            os.rename(self.temporary, self.destination)

    def _refuse_unless_exchangeable(self) -> None:
        """Try with two empty folders whether a folder can be replaced at one instant here."""
        refuse_folders_within(self.destination)
        pair = beside(self.destination), beside(self.destination)
        try:
            for folder in pair:
                os.mkdir(folder)
            rename(*pair, EXCHANGE)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            raise OutputExistsError(
                f"{self.path} exists, and this system cannot replace a folder at one instant; "
                "remove it, or choose another output",
                path=self.path,
            ) from None
        finally:
            for folder in pair:
                remove_stray(folder)


def refuse_folders_within(path: str) -> None:
    """Raise `OutputError` if a folder that is to be replaced has folders in it."""
    with os.scandir(path) as entries:
        inner = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    if inner:
        raise OutputError(
            f"{path} is not replaced: it holds the folder {inner[0]}, which would be lost; "
            "choose another output",
            path=path,
        )
