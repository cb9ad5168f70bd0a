"""HDF5 files opened with care: members by hard links only, within bounds; lists of names.

HDF5 is not safe on hostile files: what can be checked before the library is asked for more is
checked here, and in `wavg.formats.hdf5_tensors`; `wavg.formats.isolated` is for the rest. Which
dataset is which tensor is for the formats to say.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import h5py
import numpy as np

from wavg.checkpoint import reading
from wavg.errors import CheckpointFormatError, OutputError, WavgError
from wavg.positional import in_pieces, write_exactly

__all__ = [
    "MOST_OBJECTS",
    "NAMES",
    "Source",
    "address",
    "has_names",
    "is_group",
    "member",
    "members",
    "names_in",
    "opened",
    "texts",
    "write_names",
    "write_texts",
]

NAMES = "wavg_names"  # tensors' names and order, where a layout itself cannot say them
MOST_OBJECTS = 1_000_000
_DEEPEST = 32
_ATTRIBUTE_LIMIT = 64512  # an object header's; longer lists are split into name0, name1, …
_CACHE = 1 << 20  # of metadata, and of chunks by default: HDF5 itself would take many MiB


class Source(NamedTuple):
    """Where an HDF5 file lies: a whole file, or a part of one, as in an archive."""

    path: str
    base: int = 0
    size: int | None = None

    def length(self) -> int:
        """Return the bytes of it: all that follow, unless its size was given."""
        if self.size is not None:
            return self.size
        return max(0, os.path.getsize(self.path) - self.base)

    @contextlib.contextmanager
    def reader(self) -> Iterator[Callable[[int, int], bytes]]:
        """Open it for a function that gives bytes at an offset, fewer only at the end."""
        end = self.length()
        with reading(self.path), open(self.path, "rb", buffering=0) as file:

            def read(offset: int, size: int) -> bytes:
                size = min(size, end - offset)
                return b"".join(in_pieces(file.fileno(), self.base + offset, size))

            yield read


class _Window(io.RawIOBase):
    """A part of a file, seen as a file of its own."""

    def __init__(self, file: IO[bytes], base: int, size: int) -> None:
        self._file, self._base, self._size, self._position = file, base, size, 0
        self._failure: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._position))
        count = 0
        if wanted:  # else it may lie where no file can
            self._file.seek(self._base + self._position)
        while count < wanted and (more := self._file.readinto(view[count:wanted])):  # type: ignore[attr-defined]
            count += more
        view[count:] = bytes(len(view) - count)  # as HDF5's own driver: h5py does not look at count
        self._position += count
        return int(count)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")  # whole: h5py does not look at what is returned
        try:
            write_exactly(self._file.fileno(), view, self._base + self._position)
        except OSError as error:  # the library would go on with it pending, and lose it
            self._failure = self._failure or error
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        self._size = self._position if size is None else size
        try:
            self._file.truncate(self._base + self._size)
        except OSError as error:
            self._failure = self._failure or error
        return self._size

    def check(self) -> None:
        """Raise what went wrong while the library wrote."""
        if self._failure is not None:
            raise self._failure


@contextlib.contextmanager
def opened(source: Source, mode: str = "r") -> Iterator[Any]:
    """Open an HDF5 file, and turn what the library refuses into errors that name it."""
    path = source.path
    try:
        with contextlib.ExitStack() as stack:
            # No HDF5 locks: a child process started meanwhile would inherit them.
            if mode == "r" and source.base == 0 and source.size is None:
                file = stack.enter_context(h5py.File(path, mode, locking=False, rdcc_nbytes=_CACHE))
            else:  # what the system refuses to write is told by that, the library tells something
                how = "rb" if mode == "r" else "r+b"
                raw = stack.enter_context(open(path, how, buffering=0))
                window = _Window(raw, source.base, source.length())
                stack.callback(window.check)  # when the library is done with it
                if mode == "w":
                    window.truncate(0)
                file = stack.enter_context(h5py.File(window, mode, rdcc_nbytes=_CACHE))
            config = file.id.get_mdc_config()  # by default the cache of metadata may take 32 MiB
            config.initial_size = config.min_size = config.max_size = _CACHE
            config.set_initial_size = True
            file.id.set_mdc_config(config)
            yield file
            if mode != "r":
                file.flush()  # what fails on closing h5py does not always tell
        if mode != "r":
            _check_closed(source)
    except WavgError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if mode != "r":
            raise OutputError(
                f"cannot write {path}: {_reason(error)}",
                path=path,
                errno=getattr(error, "errno", None),
            ) from error
        raise CheckpointFormatError(
            f"{path}: not a sound HDF5 file: {_reason(error)}", path=path
        ) from error


def _check_closed(source: Source) -> None:
    """Raise an error if the library still holds a file open that it wrote: closing it failed."""
    with source.reader() as read:
        head = read(0, 24)
    version = head[8]
    if head[20 if version < 2 else 11] & 1:  # the mark of a file that is being written
        raise OSError("the HDF5 library did not close it, as for lack of memory")


def _reason(error: Exception) -> str:
    """Say on one line what went wrong; HDF5 tells addresses and times of day besides."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split())


def is_group(thing: Any) -> bool:
    """Whether a low-level object is a group."""
    return isinstance(thing, h5py.h5g.GroupID)


def member(path: str, group: Any, name: str) -> Any:
    """Open a member by its path below a group, refusing every link that is not a hard one."""
    parts = name.split("/")
    if len(parts) > _DEEPEST or any(part in ("", ".", "..") for part in parts):
        raise CheckpointFormatError(f"{path}: {name!r} is no path wavg follows", path=path)
    here = group.id
    for part in parts:
        raw = part.encode()
        if not is_group(here) or raw not in here:
            raise CheckpointFormatError(f"{path}: {name!r} is listed but missing", path=path)
        here = _follow(path, here, raw, name)
    return h5py.Group(here) if is_group(here) else here


def _follow(path: str, group: Any, raw: bytes, name: str) -> Any:
    if group.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
        raise CheckpointFormatError(
            f"{path}: {name!r} is a soft or external link, which is not followed", path=path
        )
    return h5py.h5o.open(group, raw)


def members(path: str, file: Any) -> Iterator[tuple[str, Any]]:
    """Yield every group and dataset by its path, parents first; each object has only one path."""
    seen = {address(file.id)}
    pending = [""]
    while pending:
        prefix = pending.pop()
        group = h5py.h5o.open(file.id, prefix.encode()) if prefix else file.id
        below = []
        for raw in list(group):
            name = prefix + raw.decode("utf-8", "strict")
            if name.count("/") >= _DEEPEST:
                raise CheckpointFormatError(f"{path}: {name!r} is nested too deeply", path=path)
            here = _follow(path, group, raw, name)
            place = address(here)
            if place in seen:
                raise CheckpointFormatError(
                    f"{path}: {name!r} is also there under another name", path=path
                )
            seen.add(place)
            if len(seen) > MOST_OBJECTS:
                raise CheckpointFormatError(f"{path}: too many objects", path=path)
            if is_group(here):
                below.append(f"{name}/")
            yield name, here
        pending += reversed(below)


def address(thing: Any) -> int:
    """Return where in the file an object's header lies: in the order of creation, mostly."""
    return int(h5py.h5o.get_info(thing).addr)


def texts(group: Any) -> dict[str, str]:
    """Return the attributes that are texts."""
    found = {}
    for key in group.attrs:
        if not isinstance(key, str):
            continue  # a name of bytes that are no UTF-8
        kind = group.attrs.get_id(key)
        if kind.shape == () and kind.dtype.kind in "OS":
            value = group.attrs[key]
            if isinstance(value, bytes):
                value = value.decode("utf-8", "replace")
            if isinstance(value, str):
                found[key] = value
    return found


def has_names(group: Any, attribute: str) -> bool:
    """Whether a group has a list of names, in one piece or several."""
    return attribute in group.attrs or f"{attribute}0" in group.attrs


def names_in(path: str, group: Any, attribute: str) -> list[str]:
    """Read a list of names, joined from its pieces where it was split."""
    keys = [attribute]
    if attribute not in group.attrs:
        numbered = (f"{attribute}{number}" for number in itertools.count())
        keys = list(itertools.takewhile(lambda key: key in group.attrs, numbered))
    pieces = [group.attrs[key] for key in keys]
    names = []
    for value in (value for piece in pieces for value in np.atleast_1d(piece)):
        text = value.decode("utf-8", "strict") if isinstance(value, bytes) else value
        if not isinstance(text, str):
            raise CheckpointFormatError(
                f"{path}: {attribute} holds {value!r}, not a name", path=path
            )
        names.append(text)
    if len(set(names)) != len(names):
        raise CheckpointFormatError(f"{path}: a name is listed twice in {attribute}", path=path)
    return names


def write_names(group: Any, attribute: str, names: Sequence[str]) -> None:
    """Write a list of names as Keras does: split where it exceeds an object header."""
    encoded = [name.encode() for name in names]
    width = max(map(len, encoded), default=1)
    per_piece = max(1, _ATTRIBUTE_LIMIT // width)
    if len(encoded) <= per_piece:
        group.attrs[attribute] = np.array(encoded) if encoded else np.empty(0)
        return
    for piece, start in enumerate(range(0, len(encoded), per_piece)):
        group.attrs[f"{attribute}{piece}"] = np.array(encoded[start : start + per_piece])


def write_texts(path: str, group: Any, metadata: Mapping[str, str]) -> None:
    """Write texts as attributes, unless lists of names have these for their own."""
    for key, value in metadata.items():
        if re.fullmatch(rf"({NAMES}|layer_names)[0-9]*", key):
            raise OutputError(
                f"{path}: Keras' files cannot hold metadata named {key!r}: that is where the "
                "names of tensors or layers are",
                path=path,
            )
        group.attrs[key] = value
