"""The only code that makes an output file or folder appear.

It writes into a temporary sibling and renames it when complete, so that under the destination's
name there is the old one whole or the new one whole, at every instant. It knows bytes and
offsets, nothing of checkpoints' meaning.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from wavg.errors import OutputError, OutputExistsError, WavgError
from wavg.positional import write_exactly

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from typing_extensions import Self

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: strays are then left for a person to remove
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "AtomicFile",
    "AtomicFolder",
    "NewFile",
    "reclaim_unnamed",
    "refuse_existing",
    "refuse_full",
]

_COPY_BYTES = 1 << 20
_SYNC_BYTES = 32 << 20  # written before the disk is set to work on them
_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has only the latter
_SUFFIX = ".wavg-tmp"
_NO_REPLACE, _EXCHANGE = 1, 2  # flags of Linux's renameat2
_FAILING = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM)  # the disk, and not
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP)  # no such call, or flag


def refuse_existing(path: str, overwrite: bool, *, folder: bool = False) -> None:
    """Raise `OutputExistsError` if there is something at `path` that was not to be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise OutputExistsError(
            f"{path} exists; choose another output, or pass overwrite=True (--overwrite)", path=path
        )
    if not folder and os.path.isdir(path):
        raise OutputError(f"{path} is a folder; the output is a file", path=path)
    if folder and os.path.lexists(path.rstrip("/")) and not os.path.isdir(path):
        raise OutputError(f"{path} is a file; the output is a folder", path=path)
    parent = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(parent):
        raise OutputError(f"cannot write {path}: there is no folder {parent}", path=path)


def refuse_full(path: str, size: int) -> None:
    """Raise `OutputError` if the disk has no room for `size` more bytes where `path` is to be.

    Nothing is told where the system does not know.
    """
    try:
        disk = os.statvfs(os.path.dirname(os.path.realpath(path)))
    except (AttributeError, OSError):  # pragma: no cover - Windows
        return
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and size > free:
        raise OutputError(
            f"cannot write {path}: it takes {size:,} bytes, and {free:,} are free on the disk; "
            "nothing was begun",
            path=path,
            errno=errno.ENOSPC,
        )


class NewFile:
    """A file that is written at one place, and is to appear at another by someone's rename.

    Leaving the ``with`` block removes it from the first.
    """

    def __init__(self, path: str, temporary: str) -> None:
        self.path, self.temporary = path, temporary
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
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self.temporary, flags, 0o666)  # less the umask

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        """Remove what was created, and close it; neither can change what happened before."""
        try:
            if self._descriptor >= 0:
                _remove_stray(self.temporary)  # first: what follows may have to wait for the disk
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
            data = os.pread(source, min(length, _COPY_BYTES), start)
            if not data:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            self.write(data, offset)
            start, offset, length = start + len(data), offset + len(data), length - len(data)

    def sync(self) -> None:
        """Make the file durable, still under its temporary name.

        Once it failed it fails: the system drops what it could not write, tells it once, and would
        say of a second try that there was nothing left to do.
        """
        if self._lost is not None:
            raise self._lost
        try:
            with self.failures():
                if self._sync is not None:
                    self._sync.result()
                os.fsync(self._descriptor)
                # Some file systems tell only on closing; the lock is to stay until the end.
                os.close(os.dup(self._descriptor))
        except OutputError as error:
            self._lost = error
            raise

    def _close(self) -> None:
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
        return _failures(self.path, self.temporary)


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
    The temporary file is locked while this process lives. A later run to the same destination
    removes temporaries that nobody holds a lock on: what a killed run left behind.
    """

    def __init__(self, path: str, *, overwrite: bool = False) -> None:
        refuse_existing(path, overwrite)
        self._overwrite = overwrite
        self._destination = os.path.realpath(path)
        self._kept = ""  # where what is replaced is, until the end
        self._gone = False  # whether what was replaced cannot come back
        super().__init__(path, _beside(self._destination))

    def _create(self) -> None:
        _reclaim(self._destination)
        super()._create()
        while not _claimed(self._descriptor, self.temporary):
            self._close()
            self.temporary = _beside(self._destination)
            super()._create()
        with contextlib.suppress(FileNotFoundError):
            os.chmod(self.temporary, stat.S_IMODE(os.stat(self._destination).st_mode))

    def commit(self) -> None:
        """Make the file durable and let it appear under its name.

        If the disk does not confirm that it did, it is withdrawn.
        """
        self.sync()
        with self.failures():
            if self._overwrite:
                self._replace()
            else:
                self._publish_new()
            _confirm(self)

    def withdraw(self) -> bool:
        """Undo what `commit` did, if anything; return whether what was there before is again."""
        try:
            if _is_open_as(self._destination, self._descriptor):
                if self._kept:
                    os.replace(self._kept, self._destination)
                elif self._gone:
                    return False
                else:
                    os.unlink(self._destination)
        except OSError:
            return False
        return True

    def _replace(self) -> None:
        """Replace what is there, and keep it under another name until that is confirmed."""
        kept = _beside(self._destination)
        try:
            os.link(self._destination, kept)
            self._kept = kept
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _FAILING:
                raise
            self._gone = True  # a file system without hard links
        os.replace(self.temporary, self._destination)

    def _publish_new(self) -> None:
        # A hard link fails where a file has appeared meanwhile; a rename would replace it.
        try:
            os.link(self.temporary, self._destination)
        except FileExistsError:
            raise _appeared(self.path) from None
        except OSError as error:
            if error.errno in _FAILING:
                raise
            refuse_existing(self._destination, overwrite=False)  # no hard links here
            os.rename(self.temporary, self._destination)

    def _discard(self) -> None:
        try:
            if self._kept:
                _remove_stray(self._kept)
        finally:
            super()._discard()


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
        self._destination = os.path.realpath(path)
        self.temporary = _beside(self._destination)
        self._descriptor = -1
        self._files: list[NewFile] = []

    def __enter__(self) -> Self:
        try:
            with _failures(self.path, self.temporary):
                _reclaim(self._destination)
                if os.path.isdir(self._destination):
                    self._refuse_unless_exchangeable()
                self._create()
                if os.path.isdir(self._destination):
                    mode = stat.S_IMODE(os.stat(self._destination).st_mode)
                    os.chmod(self.temporary, mode | 0o300)
        except BaseException:
            self._discard()
            raise
        return self

    def _create(self) -> None:
        os.mkdir(self.temporary)  # less the umask
        self._descriptor = os.open(self.temporary, os.O_RDONLY)
        while not _claimed(self._descriptor, self.temporary):
            os.close(self._descriptor)
            self.temporary = _beside(self._destination)
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
                _remove_stray(self.temporary)
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
        """Make the folder and its files durable, still under its temporary name."""
        for file in self._files:
            file.sync()
        with _failures(self.path, self.temporary):
            os.fsync(self._descriptor)

    def commit(self) -> None:
        """Make the folder durable and let it appear, whole, under its name.

        If the disk does not confirm that it did, it is withdrawn.
        """
        self.sync()
        with _failures(self.path, self.temporary):
            if self._overwrite and os.path.isdir(self._destination):
                refuse_folders_within(self._destination)
                _rename(self.temporary, self._destination, _EXCHANGE)
            else:
                self._publish_new()
            _confirm(self)

    def withdraw(self) -> bool:
        """Undo what `commit` did, if anything; return whether what was there before is again."""
        try:
            if _is_open_as(self._destination, self._descriptor):
                if os.path.lexists(self.temporary):  # what was replaced
                    _rename(self.temporary, self._destination, _EXCHANGE)
                else:
                    os.rename(self._destination, self.temporary)
        except OSError:
            return False
        return True

    def _publish_new(self) -> None:
        try:
            _rename(self.temporary, self._destination, _NO_REPLACE)
        except FileExistsError:
            raise _appeared(self.path) from None
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            refuse_existing(self._destination, overwrite=False, folder=True)
            os.rename(self.temporary, self._destination)

    def _refuse_unless_exchangeable(self) -> None:
        """Try with two empty folders whether a folder can be replaced at one instant here."""
        refuse_folders_within(self._destination)
        pair = _beside(self._destination), _beside(self._destination)
        try:
            for folder in pair:
                os.mkdir(folder)
            _rename(*pair, _EXCHANGE)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            raise OutputExistsError(
                f"{self.path} exists, and this system cannot replace a folder at one instant; "
                "remove it, or choose another output",
                path=self.path,
            ) from None
        finally:
            for folder in pair:
                _remove_stray(folder)


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


def _beside(destination: str) -> str:
    folder, name = os.path.split(destination)
    return os.path.join(folder, f".{name}.{os.urandom(6).hex()}{_SUFFIX}")


def _lock(descriptor: int) -> bool:
    if fcntl is None:  # pragma: no cover
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _claimed(descriptor: int, path: str) -> bool:
    """Lock a new temporary; False if another run has just taken it for a stray and removes it."""
    if fcntl is None:  # pragma: no cover
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # there are no locks here, so nobody reclaims anything
        return True
    return _is_open_as(path, descriptor)


def _is_open_as(path: str, descriptor: int) -> bool:
    """Whether what stands at a path is what a descriptor has open."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _reclaim(destination: str) -> None:
    """Remove what killed runs to this destination left beside it."""
    for stray, _ in _strays(destination):
        with contextlib.suppress(OSError):
            _remove(stray)


def reclaim_unnamed(naming: str, paths: Sequence[str]) -> None:
    """Remove what a killed run let appear of an output of several files, if not all of it.

    Without the file that names them they are nothing. They are known by their second names: those
    under which they were made.
    """
    if os.path.lexists(naming):
        return
    for path in paths:
        destination = os.path.realpath(path)
        if os.path.isfile(destination):
            for _, descriptor in _strays(destination):
                if _is_open_as(destination, descriptor):
                    os.unlink(destination)


def _strays(destination: str) -> Iterator[tuple[str, int]]:
    """Yield temporaries of runs that live no more, each locked, with an open descriptor."""
    folder, name = os.path.split(destination)
    own = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{12}}{re.escape(_SUFFIX)}")
    for entry in os.listdir(folder):
        if own.fullmatch(entry):
            stray = os.path.join(folder, entry)
            try:
                descriptor = _open_to_lock(stray)
            except OSError:
                continue  # gone, or not to be opened by this user
            try:
                if _lock(descriptor):
                    yield stray, descriptor
            finally:
                os.close(descriptor)


def _open_to_lock(path: str) -> int:
    if not os.path.isdir(path):
        with contextlib.suppress(PermissionError):  # it has the mode of what it was to replace
            return os.open(path, os.O_RDWR)  # NFS locks nothing else
    return os.open(path, os.O_RDONLY)


def _remove(path: str) -> None:
    """Remove a file, or a folder of files; what holds folders was not made here."""
    if not os.path.isdir(path) or os.path.islink(path):
        os.unlink(path)
        return
    for name in os.listdir(path):
        os.unlink(os.path.join(path, name))
    os.rmdir(path)


def _remove_stray(path: str) -> None:
    """Remove what is not needed any more; that it fails changes nothing of what was done."""
    try:
        with contextlib.suppress(FileNotFoundError):  # or another run has done so
            _remove(path)
    except OSError as error:
        warnings.warn(
            f"{path} cannot be removed ({error.strerror}); the next run to the same output tries "
            "again",
            RuntimeWarning,
            stacklevel=2,
        )


def _rename(old: str, new: str, flag: int) -> None:
    """Rename as Linux's renameat2 does; where there is none, raise `OSError` with ENOSYS."""
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None or not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = ctypes.c_int(-100)  # AT_FDCWD
    if rename(here, os.fsencode(old), here, os.fsencode(new), ctypes.c_uint(flag)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), old)


def _sync_folder(folder: str) -> None:
    if os.name != "posix":  # pragma: no cover
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _confirm(made: AtomicFile | AtomicFolder) -> None:
    """Make durable that something appeared, or withdraw it."""
    try:
        _sync_folder(os.path.dirname(made._destination))
    except OSError as error:
        if not made.withdraw():
            raise OutputError(
                f"{made.path} is written, but the disk does not confirm that it will stay "
                f"({error.strerror}): after a loss of power what was there before may be back",
                path=made.path,
                errno=error.errno,
            ) from error
        raise


def _appeared(path: str) -> OutputExistsError:
    return OutputExistsError(
        f"{path} appeared while it was being written; it was left as it is", path=path
    )


@contextlib.contextmanager
def _failures(path: str, temporary: str) -> Iterator[None]:
    """Turn what the system refuses into an `OutputError` that names the destination."""
    try:
        yield
    except OutputError as error:
        if temporary not in str(error):
            raise
        message = str(error).replace(temporary, path)
        raise OutputError(
            message, path=path, tensor=error.tensor, errno=getattr(error, "errno", None)
        ) from error
    except OSError as error:
        if isinstance(error, WavgError):  # an input's
            raise
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; what stood there before is untouched",
            path=path,
            errno=error.errno,
        ) from error
