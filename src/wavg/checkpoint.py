"""What a checkpoint is: an index of named tensors that says where their bytes lie.

It owns the index (plain, picklable data), positional reading, and what a reader or a writer of a
format has to provide. It knows no format.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from wavg.dtypes import DType, lookup
from wavg.errors import CheckpointChangedError, CheckpointFormatError, InputError, WavgError
from wavg.extents import Extent
from wavg.positional import read_exactly
from wavg.printable import printable

__all__ = [
    "BlockReader",
    "Checkpoint",
    "Checksum",
    "FileIdentity",
    "Index",
    "LazyTensor",
    "Sink",
    "TensorSpec",
    "has_array",
    "identify",
    "reading",
]

Array = npt.NDArray[Any]
_MOST_DIMENSIONS = 64  # NumPy's limit


class Checksum(NamedTuple):
    """A CRC-32 that a file keeps of some of its bytes.

    ``places`` are the offsets at which it is kept, four bytes each, lowest first; none where it
    cannot be rewritten. ``name`` is what a message calls those bytes.
    """

    extent: Extent
    value: int
    name: str
    places: tuple[int, ...] = ()


class TensorSpec(NamedTuple):
    """A tensor's name, dtype, shape, and where its bytes lie.

    ``extent`` is None where the bytes are not stored as they are (a compressed dataset); then the
    format reads them. ``fortran`` says that they are stored last index slowest.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    extent: Extent | None = None
    fortran: bool = False

    @property
    def entry(self) -> DType:
        """The dtype's row of the table."""
        return lookup(self.dtype)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return (self.size * self.entry.bits + 7) // 8

    def empty(self) -> Array:
        """Return a new flat array for the tensor's elements."""
        if self.entry.bits % 8:
            raise WavgError(
                f"{self.name} is {self.dtype}, which no array can hold", tensor=self.name
            )
        return np.empty(self.size, self.entry.numpy)

    def array(self, flat: Array) -> Array:
        """Give a flat array, in storage order, the tensor's shape."""
        return flat.reshape(self.shape, order="F" if self.fortran else "C")

    def describe(self) -> str:
        """Return dtype and shape in short, ``float32[2, 25]``."""
        return f"{self.dtype}{list(self.shape)}" + (" in Fortran order" if self.fortran else "")


def has_array(shape: Sequence[int], bits: int) -> bool:
    """Whether an array can have this shape, of numbers of so many bits, even if it is empty.

    >>> has_array((0, 2**30), 32), has_array((0, 2**62), 32)
    (True, False)
    """
    return len(shape) <= _MOST_DIMENSIONS and math.prod(filter(None, shape)) * bits < 1 << 66


class FileIdentity(NamedTuple):
    """What a file was when it was indexed; if any of it changes, the index is worthless."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    device: int


@dataclass(frozen=True, slots=True)
class Index:
    """Everything there is to know of a checkpoint without reading its tensors.

    Attributes
    ----------
    format
        The format's name in the table of `wavg.formats`.
    files
        Its files, as they were; extents count into this.
    tensors
        The model's tensors in the model's order.
    others
        Tensors stored beside the model: optimizer slots. Never averaged.
    metadata
        Texts the file carries about itself.
    signature
        Where those of two files of one size are equal and not empty, so are their `tensors`.
    checksums
        What the files say of their own bytes; verified by `wavg.digests`.
    reader_bytes
        Memory that the format's reader of tensors without extents holds.
    """

    format: str
    files: tuple[FileIdentity, ...]
    tensors: tuple[TensorSpec, ...]
    others: tuple[TensorSpec, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    signature: bytes = b""
    checksums: tuple[Checksum, ...] = ()
    reader_bytes: int = 0

    @property
    def path(self) -> str:
        """The path the checkpoint was opened by."""
        return self.files[0].path


class BlockReader(Protocol):
    """Reads tensors that have no extent; made by the format, one an open checkpoint."""

    def read(self, spec: TensorSpec, start: int, out: Array) -> None:
        """Fill a flat array with the tensor's elements from position `start`, in storage order."""

    def close(self) -> None:
        """Release what it holds."""


class LazyTensor:
    """A tensor of an open checkpoint; its bytes are read when an array is asked for."""

    def __init__(self, checkpoint: Checkpoint, spec: TensorSpec) -> None:
        self._checkpoint, self.spec = checkpoint, spec
        self.shape, self.dtype = spec.shape, spec.entry.numpy

    def read(self) -> Array:
        """Return the tensor as a new array."""
        flat = self.spec.empty()
        self._checkpoint.read(self.spec, 0, flat)
        return self.spec.array(flat)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a lazy tensor is always read into a new array")
        array = self.read()
        return array if dtype is None else array.astype(dtype)

    def __repr__(self) -> str:
        return f"<{self.spec.name}: {self.spec.describe()}>"


class Checkpoint(Mapping[str, LazyTensor]):
    """An open checkpoint: an ordered mapping from names to lazy tensors.

    Use it in a ``with`` statement. Reading is positional, so threads can share it; pickling sends
    the index, and the files are opened anew, and compared, where it arrives.

    Examples
    --------
    >>> import numpy as np, tempfile, wavg
    >>> path = tempfile.mkdtemp() + "/model.npz"
    >>> wavg.save(path, {"kernel": np.float32([[1, 2]])})
    >>> with wavg.open_checkpoint(path) as checkpoint:
    ...     list(checkpoint), np.asarray(checkpoint["kernel"])
    (['kernel'], array([[1., 2.]], dtype=float32))
    """

    def __init__(
        self,
        index: Index,
        block_reader: Callable[[Index], BlockReader] | None = None,
        look: Callable[[str, str], Index] | None = None,
    ) -> None:
        self._descriptors: list[int] = []
        self.index = index
        self.look = look  # how it was looked into: takes the name of a format and a path
        self._make_block_reader = block_reader
        self._block_reader: BlockReader | None = None
        self._by_name: dict[str, TensorSpec] | None = None
        try:
            for identity in index.files:
                self._descriptors.append(os.open(identity.path, os.O_RDONLY | _O_BINARY))
            self.verify_unchanged()
            if block_reader is not None and any(spec.extent is None for spec in index.tensors):
                self._block_reader = block_reader(index)
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        index = replace(self.index, signature=b"")  # may be long, and is of no use there
        return Checkpoint, (index, self._make_block_reader)  # opened anew where it arrives

    @property
    def path(self) -> str:
        """The path the checkpoint was opened by."""
        return self.index.path

    @property
    def metadata(self) -> Mapping[str, str]:
        """Texts the file carries about itself."""
        return self.index.metadata

    def __getitem__(self, name: str) -> LazyTensor:
        return LazyTensor(self, self.spec(name))

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec in self.index.tensors)

    def __len__(self) -> int:
        return len(self.index.tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {printable(self.path)}: {self.index.format}, {len(self)} tensors>"

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            with contextlib.suppress(OSError):  # they were only read
                os.close(self._descriptors.pop())
        if self._block_reader is not None:
            self._block_reader.close()

    def __del__(self) -> None:
        if self._descriptors:
            self.close()
            message = f"{printable(self.path)} was not closed"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    def spec(self, name: str) -> TensorSpec:
        """Return the specification of a tensor."""
        if self._by_name is None:
            self._by_name = {spec.name: spec for spec in self.index.tensors}
        return self._by_name[name]

    def read(self, spec: TensorSpec, start: int, out: Array) -> None:
        """Fill `out`, flat and contiguous, with elements from position `start`, in storage order.

        Numbers of less than a byte are read as bytes: `out` is uint8 and `start` counts those.

        Raises
        ------
        CheckpointFormatError
            The file ends before the tensor does.
        """
        if spec.extent is None:
            if not self._descriptors:
                raise ValueError(f"{self.path} is closed")
            if self._block_reader is None:
                raise CheckpointFormatError(
                    f"{self.path}: {spec.name} has no bytes to read",
                    path=self.path,
                    tensor=spec.name,
                )
            self._block_reader.read(spec, start, out)
            return
        with reading(self.path_of(spec)):
            if not read_exactly(*self.place(spec, start), out):
                raise self.ends_within(spec)

    def place(self, spec: TensorSpec, start: int) -> tuple[int, int]:
        """Return descriptor and offset of a tensor's element `start`, for positional reading."""
        if not self._descriptors:
            raise ValueError(f"{self.path} is closed")
        assert spec.extent is not None  # whoever asks has looked
        file, offset, _ = spec.extent
        return self._descriptors[file], offset + start * max(1, spec.entry.itemsize)

    def path_of(self, spec: TensorSpec) -> str:
        """Return the path of the file that a tensor's bytes are in."""
        return self.index.files[spec.extent.file].path if spec.extent else self.path

    def ends_within(self, spec: TensorSpec) -> CheckpointFormatError:
        """Return the error of a file that ends before a tensor does."""
        path = self.path_of(spec)
        return CheckpointFormatError(
            f"{path}: the file ends within {spec.name}: it was cut short; copy or save it "
            "again, or wait for whoever is writing it",
            path=path,
            tensor=spec.name,
        )

    def descriptor(self, file: int) -> int:
        """Return the open descriptor of one of the files, for copying from."""
        return self._descriptors[file]

    def verify_unchanged(self) -> None:
        """Raise `CheckpointChangedError` unless the files are what they were when indexed."""
        for identity, descriptor in zip(self.index.files, self._descriptors, strict=True):
            try:
                now = identify(identity.path)
            except FileNotFoundError:
                now = None
            opened = _identity(identity.path, os.fstat(descriptor))
            if now != identity or opened != identity:
                raise CheckpointChangedError(
                    f"{identity.path} changed while it was being read; nothing was written. "
                    "Try again when the file is complete",
                    path=identity.path,
                )


_O_BINARY = getattr(os, "O_BINARY", 0)


def _identity(path: str, status: os.stat_result) -> FileIdentity:
    return FileIdentity(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


def identify(path: str) -> FileIdentity:
    """Return what a file is now; refuses what is not a regular file, without opening it."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else ("a device, pipe or socket")
        raise CheckpointFormatError(f"{path} is {kind}; expected a checkpoint file", path=path)
    return _identity(path, status)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Have what the system refuses of a file be an `InputError` that names it.

    A file that is missing, or that the user may not read, stays Python's own error.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, (WavgError, FileNotFoundError, PermissionError)):
            raise
        why = error.strerror or error
        raise InputError(f"cannot read {path}: {why}", path=path, errno=error.errno) from error


class Sink(Protocol):
    """Takes the results of one average."""

    def wants(self, name: str) -> bool:
        """Whether this tensor's numbers have to be written, rather than carried over."""

    def joined(self, names: Sequence[str]) -> bool:
        """Whether tensors that lie side by side in the reference do so here.

        Then the first one's name stands for all.
        """

    def write(self, name: str, start: int, values: Array) -> None:
        """Store elements from position `start`, in storage order; called from many threads."""
