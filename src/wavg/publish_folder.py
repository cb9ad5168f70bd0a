"""A folder of files in the making, which appears whole, or is replaced whole."""

from __future__ import annotations

import contextlib
import os
import warnings
from types import TracebackType
from typing import TYPE_CHECKING

from wavg import renames
from wavg.access import Access, access_of, give
from wavg.destinations import refuse_existing
from wavg.errors import OutputError, OutputExistsError
from wavg.printable import printable
from wavg.publish import NewFile, appeared, confirm, failures
from wavg.renames import EXCHANGE, MOVES_OPEN_FILES, NOT_HERE, open_folder, settled, sync_file
from wavg.temporaries import beside, claimed, held, reclaim, remove_stray, stands_at

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
    The temporary folder is locked as an `AtomicFile` is, and reclaimed like it, and so is a folder
    that is replaced. It hands its access on, and its files theirs to those of the same names.
    """

    def __init__(self, path: str, *, overwrite: bool = False) -> None:
        refuse_existing(path, overwrite, folder=True)
        self.path, self._overwrite = path, overwrite
        self.destination = os.path.realpath(path)
        self.temporary = beside(self.destination)
        self._access: Access | None = None
        self._held = -1
        self._replaced: os.stat_result | None = None  # what is held, and is to come back
        self._descriptor = -1
        self._files: list[NewFile] = []
        self._lost: OutputError | None = None
        self._spared = False  # a loss of power may give what is there its name back
        self._stays = False  # for it was said so

    def __enter__(self) -> Self:
        try:
            with failures(self.path, self.temporary):
                reclaim(self.destination)
                self._access = access_of(self.destination)
                if self._access is not None:
                    refuse_folders_within(self.destination)
                self._create()
                if self._access is not None:
                    give(self.temporary, self._descriptor, self._access.private())
                    self._refuse_unless_exchangeable()
        except BaseException:
            self._discard()
            raise
        return self

    def _create(self) -> None:
        while True:
            os.mkdir(self.temporary, 0o777 if self._access is None else 0o700)  # less the umask
            with contextlib.suppress(FileNotFoundError):  # another run took it for a stray
                self._status = os.stat(self.temporary)
                self._descriptor = open_folder(self.temporary)
                if claimed(self._descriptor, self.temporary):
                    return
                self._close()
            self.temporary = beside(self.destination)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        try:
            if not MOVES_OPEN_FILES:
                self._close_files()
            if not os.path.lexists(self.temporary):
                pass  # it has another name now
            elif self._spared:
                warnings.warn(
                    f"{printable(self.temporary)} is left: the disk does not confirm that it "
                    "has lost its name; the next run to the same output removes it",
                    RuntimeWarning,
                    stacklevel=2,
                )
            else:
                remove_stray(self.temporary)  # first: closing may have to wait for the disk
        finally:
            self._close_files()
            self._close()

    def _close_files(self) -> None:
        for file in self._files:
            file.close()

    def _close(self) -> None:
        descriptors = self._descriptor, self._held
        self._descriptor = self._held = -1
        for descriptor in descriptors:
            if descriptor >= 0:
                with contextlib.suppress(OSError):  # durable already, or given up
                    os.close(descriptor)

    def file(self, name: str) -> NewFile:
        """Begin a file of the folder; it is closed with it."""
        temporary, replaced = (os.path.join(p, name) for p in (self.temporary, self.destination))
        new = NewFile(os.path.join(self.path, name), temporary, replaced)
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
                self._access = access_of(self.destination) or self._access
                if self._access is not None:
                    give(self.temporary, self._descriptor, self._access)
                if self._descriptor >= 0:
                    sync_file(self._descriptor)
        except OutputError as error:
            self._lost = error
            raise

    def commit(self) -> None:
        """Make the folder durable and let it appear, whole, under its name.

        If the disk does not confirm that it did, it is withdrawn.
        """
        self.sync()
        if not MOVES_OPEN_FILES:
            self._close_files()
        with failures(self.path, self.temporary):
            if self._overwrite and os.path.isdir(self.destination):
                refuse_folders_within(self.destination)
                self._exchange()
            else:
                self._publish_new()
            confirm(self)

    def withdraw(self) -> bool:
        """Undo what `commit` did, if anything; return whether what was there before is again."""
        if self._stays:
            return False
        try:
            if stands_at(self.destination, self._status):
                if self._replaced is None:
                    os.rename(self.destination, self.temporary)
                elif stands_at(self.temporary, self._replaced):
                    renames.rename(self.temporary, self.destination, EXCHANGE)
                else:  # it is there no more, or was another's that may have lost files since
                    return False
                self._spared = not settled(os.path.dirname(self.destination))
        except OSError:
            self._stays = self._spared = True
            return False
        return True

    def _exchange(self) -> None:
        """Replace a folder, and hold it: under the temporary name it would be taken for a stray."""
        self._held = held(self.destination)
        self._replaced = os.stat(self.destination if self._held < 0 else self._held)
        renames.rename(self.temporary, self.destination, EXCHANGE)

    def _publish_new(self) -> None:
        try:
            renames.rename_new(self.temporary, self.destination)
        except FileExistsError:
            raise appeared(self.path) from None

    def _refuse_unless_exchangeable(self) -> None:
        """Try with two files of the new folder whether two can be exchanged at one instant here."""
        one, other = (os.path.join(self.temporary, name) for name in ("1", "2"))
        for path in (one, other):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            os.close(os.open(path, flags, 0o600))
        try:
            renames.rename(one, other, EXCHANGE)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            raise OutputExistsError(
                f"{self.path} exists, and this system cannot replace a folder at one instant; "
                "remove it, or choose another output",
                path=self.path,
            ) from None
        os.unlink(one)
        os.unlink(other)


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
