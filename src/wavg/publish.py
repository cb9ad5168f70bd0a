"""The only code that makes an output file appear.

It writes into a temporary sibling and renames it when complete, so that under the destination's
name there is the old file whole or the new file whole, at every instant. It knows bytes and
offsets, nothing of checkpoints' meaning.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from wavg.errors import OutputError, OutputExistsError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: strays are then left for a person to remove
    fcntl = None  # type: ignore[assignment]

__all__ = ["AtomicFile", "refuse_existing"]

_COPY_BYTES = 1 << 20
_SYNC_BYTES = 32 << 20  # written before the disk is set to work on them
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has only the latter
_SUFFIX = ".wavg-tmp"


def refuse_existing(path: str, overwrite: bool) -> None:
    """Raise `OutputExistsError` if there is something at `path` that was not to be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise OutputExistsError(
            f"{path} exists; choose another output, or pass overwrite=True (--overwrite)", path=path
        )
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder; the output is a file", path=path)
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise OutputError(f"cannot write {path}: there is no folder {folder}", path=path)


class AtomicFile:
    """A file in the making. Leaving the ``with`` block without `commit` leaves no trace.

    Parameters
    ----------
    path
        The destination; if it is a symbolic link, what it points to.
    overwrite
        Whether an existing file may be replaced.

    Notes
    -----
    The temporary file is locked while this process lives. A later run to the same destination
    removes temporaries that nobody holds a lock on: what a killed run left behind.
    """

    def __init__(self, path: str, *, overwrite: bool = False) -> None:
        refuse_existing(path, overwrite)
        self.path, self._overwrite = path, overwrite
        self._destination = os.path.realpath(path)
        self._folder, name = os.path.split(self._destination)
        self._prefix = f".{name}."
        self.temporary = os.path.join(self._folder, f"{self._prefix}{os.urandom(6).hex()}{_SUFFIX}")
        self._descriptor = -1
        self._counting = threading.Lock()
        self._unsynced = 0
        self._syncer: ThreadPoolExecutor | None = None
        self._sync: Future[None] | None = None

    def __enter__(self) -> AtomicFile:
        with self.failures():
            self._reclaim()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(self.temporary, flags, 0o666)  # less the umask
            self._lock(self._descriptor)
            with contextlib.suppress(FileNotFoundError):
                os.chmod(self.temporary, stat.S_IMODE(os.stat(self._destination).st_mode))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.temporary)  # first: what follows may have to wait for the disk
        finally:
            self._close()

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
        done = 0
        with self.failures():
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)
            self._write_behind(done)

    def _write_behind(self, size: int) -> None:
        """Set the disk to work while the computation goes on, rather than wait for it at the end.

        A failure is raised here or by `commit`; the system reports it only once.
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
        with self.failures():
            while length:
                data = os.pread(source, min(length, _COPY_BYTES), start)
                if not data:
                    raise OSError(errno.EIO, "the file copied from became shorter")
                self.write(data, offset)
                start, offset, length = start + len(data), offset + len(data), length - len(data)

    def sync(self) -> None:
        """Make the file durable, still under its temporary name."""
        with self.failures():
            if self._sync is not None:
                self._sync.result()
            os.fsync(self._descriptor)

    def commit(self) -> None:
        """Make the file durable and let it appear under its name."""
        self.sync()
        with self.failures():
            if self._overwrite:
                os.replace(self.temporary, self._destination)
            else:
                self._publish_new()
            self._sync_folder()

    def withdraw(self) -> None:
        """Remove what `commit` let appear, if it replaced nothing."""
        if not self._overwrite:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._destination)

    def _publish_new(self) -> None:
        # A hard link fails where a file has appeared meanwhile; a rename would replace it.
        try:
            os.link(self.temporary, self._destination)
        except FileExistsError:
            raise OutputExistsError(
                f"{self.path} appeared while it was being written; it was left as it is",
                path=self.path,
            ) from None
        except OSError:  # a file system without hard links
            refuse_existing(self._destination, overwrite=False)
            os.rename(self.temporary, self._destination)

    def _sync_folder(self) -> None:
        if os.name != "posix":  # pragma: no cover
            return
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> bool:
        if fcntl is None:  # pragma: no cover
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _reclaim(self) -> None:
        for name in os.listdir(self._folder):
            if name.startswith(self._prefix) and name.endswith(_SUFFIX):
                stray = os.path.join(self._folder, name)
                with contextlib.suppress(OSError):
                    descriptor = os.open(stray, os.O_RDWR)
                    try:
                        if self._lock(descriptor):
                            os.unlink(stray)
                    finally:
                        os.close(descriptor)

    def _close(self) -> None:
        try:
            if self._syncer is not None:
                self._syncer.shutdown()  # before its file goes
        finally:
            if self._descriptor >= 0:
                descriptor, self._descriptor = self._descriptor, -1
                os.close(descriptor)

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Turn what the system refuses into an `OutputError` that names the destination."""
        try:
            yield
        except OutputError as error:
            if self.temporary not in str(error):
                raise
            message = str(error).replace(self.temporary, self.path)
            raise OutputError(message, path=self.path, tensor=error.tensor) from error
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror or error}; "
                "what stood there before is untouched",
                path=self.path,
                errno=error.errno,
            ) from error
