"""The only code that makes an output file appear, or with `wavg.publish_folder` a folder.

It writes into a temporary sibling and renames it when complete, so that under the destination's
name there is the old one whole or the new one whole, at every instant. It knows bytes and
offsets, nothing of checkpoints' meaning.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from wavg.access import Access, access_of, give
from wavg.destinations import is_stream, refuse_existing
from wavg.errors import OutputError, OutputExistsError, WavgError
from wavg.positional import read_at, write_exactly
from wavg.renames import (
    FAILING,
    MOVES_OPEN_FILES,
    rename_new,
    settled,
    sync_file,
    sync_folder,
)
from wavg.temporaries import OLD, beside, claimed, held, reclaim, remove_stray, stands_at

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from typing_extensions import Self

__all__ = [
    "Atomic",
    "AtomicFile",
    "NewFile",
    "appeared",
    "confirm",
    "failures",
    "write_file",
]

_COPY_BYTES = 1 << 20
_SYNC_BYTES = 32 << 20  # written before the disk is set to work on them
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has only the latter


class Atomic(Protocol):
    """What appears under its name by a rename, and can be withdrawn."""

    path: str
    destination: str

    def sync(self) -> None:
        """Make it durable, still under its temporary name."""

    def commit(self) -> None:
        """Make it durable and let it appear."""

    def withdraw(self) -> bool:
        """Undo what `commit` did, if anything; return whether what was there before is again."""


class NewFile:
    """A file that is written at one place, and is to appear at another by someone's rename.

    Leaving the ``with`` block removes it from the first. It may replace what is at a third place:
    then it gets the access of that, and until it is complete it is for its owner alone.
    """

    def __init__(self, path: str, temporary: str, replaced: str) -> None:
        self.path, self.temporary, self._replaced = path, temporary, replaced
        self._access: Access | None = None
        self._descriptor = -1
        self._counting = threading.Lock()
        self._unsynced = 0
        self._syncer: ThreadPoolExecutor | None = None
        self._sync: Future[None] | None = None
        self._lost: OutputError | None = None

    def __enter__(self) -> Self:
        try:
            with self.failures():
                self._create()
        except BaseException:
            self._discard()
            raise
        return self

    def _create(self) -> None:
        self._access = access_of(self._replaced)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        mode = 0o666 if self._access is None else 0o600  # less the umask
        self._descriptor = os.open(self.temporary, flags, mode)
        self._status = os.fstat(self._descriptor)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        """Remove what was created, and close it; neither can change what happened before."""
        created = self._descriptor >= 0
        if not MOVES_OPEN_FILES:
            created = True  # and perhaps closed, to be renamed
            self.close()
        try:
            if created:
                remove_stray(self.temporary)  # first: what follows may have to wait for the disk
        finally:
            self.close()

    @property
    def descriptor(self) -> int:
        """The open temporary file, for reading back."""
        return self._descriptor

    def resize(self, size: int) -> None:
        """Give the file its final length."""
        with self.failures():
            os.ftruncate(self._descriptor, size)

    def write(self, data: bytes | npt.NDArray[Any], offset: int) -> None:
        """Write bytes, or a contiguous array's, at an offset; threads may share this."""
        view = memoryview(data) if isinstance(data, bytes) else data.reshape(-1).view("u1").data
        with self.failures():
            write_exactly(self._descriptor, view, offset)
            self._write_behind(len(view))

    def _write_behind(self, size: int) -> None:
        """Set the disk to work while the computation goes on, rather than wait for it at the end.

        A failure is raised here or by `sync`; the system reports it only once.
        """
        with self._counting:
            self._unsynced += size
            if self._unsynced < _SYNC_BYTES or not (self._sync is None or self._sync.done()):
                return
            self._unsynced = 0
            if self._sync is not None:
                self._sync.result()
            if self._syncer is None:
                from concurrent.futures import ThreadPoolExecutor  # a tenth of `import wavg`

                self._syncer = ThreadPoolExecutor(1, thread_name_prefix="wavg-sync")
            with contextlib.suppress(RuntimeError):  # no thread to be had: then at the end
                self._sync = self._syncer.submit(_sync_data, self._descriptor)

    def copy_from(self, source: int, start: int, length: int, offset: int) -> None:
        """Copy bytes of another open file to an offset of this one."""
        while length:
            data = read_at(source, min(length, _COPY_BYTES), start)
            if not data:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            self.write(data, offset)
            start, offset, length = start + len(data), offset + len(data), length - len(data)

    def sync(self) -> None:
        """Make the file durable, still under its temporary name, with the access it is to have.

        Once it failed it fails: the system drops what it could not write, tells it once, and would
        say of a second try that there was nothing left to do.
        """
        if self._lost is not None:
            raise self._lost
        try:
            with self.failures():
                if self._sync is not None:
                    self._sync.result()
                self._access = access_of(self._replaced) or self._access
                if self._access is not None:
                    give(self.temporary, self._descriptor, self._access)
                sync_file(self._descriptor)
                # Some file systems tell only on closing; the lock is to stay until the end.
                os.close(os.dup(self._descriptor))
        except OutputError as error:
            self._lost = error
            raise

    def close(self) -> None:
        """Close the file, complete or given up."""
        try:
            if self._syncer is not None:
                self._syncer.shutdown()  # before its file goes
        finally:
            if self._descriptor >= 0:
                descriptor, self._descriptor = self._descriptor, -1
                with contextlib.suppress(OSError):  # durable already, or given up
                    os.close(descriptor)

    def failures(self) -> contextlib.AbstractContextManager[None]:
        """Turn what the system refuses into an `OutputError` that names the destination."""
        return failures(self.path, self.temporary)


class AtomicFile(NewFile):
    """A file in the making. Leaving the ``with`` block without `commit` leaves no trace.

    Parameters
    ----------
    path
        The destination; if it is a symbolic link, what it points to.
    overwrite
        Whether an existing file may be replaced.

    Notes
    -----
    The temporary is locked while this process lives, and what it replaced from then on. A later
    run to the same destination removes what nobody holds a lock on: what a killed run left behind.
    """

    def __init__(self, path: str, *, overwrite: bool = False) -> None:
        refuse_existing(path, overwrite)
        self._overwrite = overwrite
        self.destination = os.path.realpath(path)
        self._kept = ""  # where what is replaced is, until the end
        self._held = -1  # that, open and locked
        self._gone = False  # whether what was replaced cannot come back
        self._stays = False  # for it was said so
        super().__init__(path, beside(self.destination), self.destination)

    def _create(self) -> None:
        reclaim(self.destination)
        super()._create()
        while not claimed(self._descriptor, self.temporary):
            self.close()
            self.temporary = beside(self.destination)
            super()._create()

    def commit(self) -> None:
        """Make the file durable and let it appear under its name.

        If the disk does not confirm that it did, it is withdrawn.
        """
        self.sync()
        if not MOVES_OPEN_FILES:
            self.close()
        with self.failures():
            if self._overwrite:
                self._replace()
            else:
                self._publish_new()
            confirm(self)

    def withdraw(self) -> bool:
        """Undo what `commit` did, if anything; return whether what was there before is again."""
        if self._stays:
            return False
        try:
            if stands_at(self.destination, self._status):
                if self._kept:
                    os.replace(self._kept, self.destination)
                elif self._gone:
                    return False
                else:
                    os.unlink(self.destination)
                settled(os.path.dirname(self.destination))
        except OSError:
            self._stays = True
            return False
        return True

    def _replace(self) -> None:
        """Replace what is there, and keep it under another name until that is confirmed."""
        self._held = held(self.destination)
        self._kept = beside(self.destination, OLD)
        try:
            os.link(self.destination, self._kept)
        except FileNotFoundError:
            self._kept = ""
        except OSError as error:
            if error.errno in FAILING:
                raise
            self._kept, self._gone = "", True  # a file system without hard links
        os.replace(self.temporary, self.destination)

    def _publish_new(self) -> None:
        # A hard link fails where a file has appeared meanwhile; a rename would replace it.
        try:
            os.link(self.temporary, self.destination)
        except FileExistsError:
            raise appeared(self.path) from None
        except OSError as error:
            if error.errno in FAILING:
                raise
            try:
                rename_new(self.temporary, self.destination)  # no hard links here
            except FileExistsError:
                raise appeared(self.path) from None

    def _discard(self) -> None:
        try:
            if self._kept:
                remove_stray(self._kept)
        finally:
            super()._discard()

    def close(self) -> None:
        """Close the file, and what it replaced; neither is needed any more."""
        try:
            super().close()
        finally:
            if self._held >= 0:
                descriptor, self._held = self._held, -1
                with contextlib.suppress(OSError):
                    os.close(descriptor)


def write_file(path: str, data: bytes, *, overwrite: bool) -> None:
    """Have a small file appear whole; what is a pipe or a device gets the bytes, and stays.

    Raises
    ------
    OutputExistsError
        There is one, and it was not to be replaced.
    """
    if is_stream(path):
        part = "a part of it may have been written"
        with failures(path, path, part), open(path, "wb", buffering=0) as stream:
            view = memoryview(data)
            while view:
                view = view[stream.write(view) :]
        return
    with AtomicFile(path, overwrite=overwrite) as file:
        file.write(data, 0)
        file.commit()


def confirm(made: Atomic) -> None:
    """Make durable that something appeared, or withdraw it."""
    try:
        sync_folder(os.path.dirname(made.destination))
    except OSError as error:
        if not made.withdraw():
            raise OutputError(
                f"{made.path} is written, but the disk does not confirm that it will stay "
                f"({error.strerror}): after a loss of power what was there before may be back",
                path=made.path,
                errno=error.errno,
            ) from error
        raise


def appeared(path: str) -> OutputExistsError:
    """Return the error of something that appeared where nothing was to be replaced."""
    return OutputExistsError(
        f"{path} appeared while it was being written; it was left as it is", path=path
    )


@contextlib.contextmanager
def failures(
    path: str, temporary: str, now: str = "what stood there before is untouched"
) -> Iterator[None]:
    """Turn what the system refuses into an `OutputError` that names the destination.

    It says how things stand there `now`.
    """
    try:
        yield
    except OutputError as error:
        if temporary not in error.message:
            raise
        message = error.message.replace(temporary, path)
        raise OutputError(
            message, path=path, tensor=error.tensor, errno=getattr(error, "errno", None)
        ) from error
    except OSError as error:
        if isinstance(error, WavgError):  # an input's
            raise
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; {now}",
            path=path,
            errno=error.errno,
        ) from error
