"""HDF5 datasets as tensors: what they must be, where their bytes lie, how the rest is read.

A dataset is plain numbers stored in this file: contiguously, which is an extent, or in chunks with
HDF5's own filters, which the library reads. An HDF5 type has no bfloat16: such a dataset is opaque,
and its attribute ``dtype`` says what it is where the writer was careful.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from wavg.checkpoint import Index, TensorSpec, identify
from wavg.dtypes import dtype_of, lookup
from wavg.errors import CheckpointFormatError, WavgError
from wavg.extents import Extent, complement
from wavg.formats.hdf5 import MOST_OBJECTS, Source, member, opened, texts
from wavg.positional import in_pieces

__all__ = ["BlockReader", "Collector", "boxes", "same_layout", "signature"]

Array = npt.NDArray[Any]

_CHUNK_CACHE = 2 << 20  # of one input; where a row of chunks is larger, each is unpacked often
_OPEN_BYTES = 2 << 20  # that the library takes for a file with many chunks
_CHUNKS_AT_ONCE = 256  # read by one call: the library takes some 4 KB for each
_LARGEST_LAYOUT = 256 << 20  # bytes besides the numbers that are read to compare them
_LARGEST_RATIO = 1100  # zeros deflate to a thousandth
_DEFLATE = 1
# deflate, shuffle, Fletcher's checksum, and h5py's lzf
_FILTERS = {_DEFLATE: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}


class Collector:
    """Turns datasets into tensors, checking each; then all of them together."""

    def __init__(self, source: Source, opaque_dtype: str | None) -> None:
        self._path, self._base = source.path, source.base
        self._size, self._opaque_dtype = source.length(), opaque_dtype
        self._extents: list[tuple[Extent, str]] = []
        self._unpacked = 0  # bytes of all chunks
        self.reader_bytes = 0

    def spec(self, name: str, dataset: Any) -> TensorSpec:
        """Return the tensor that a dataset holds."""
        if not isinstance(dataset, h5py.h5d.DatasetID):
            raise self.bad(name, "is not a dataset")
        spec = TensorSpec(name, self._dtype(name, dataset), tuple(map(int, dataset.shape)))
        properties = dataset.get_create_plist()
        if properties.get_external_count():
            raise self.bad(name, "is stored in another file, which is not read")
        layout = properties.get_layout()
        if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED, h5py.h5d.COMPACT):
            raise self.bad(name, "is stored in other files or datasets, which are not read")
        if math.prod(filter(None, spec.shape)) >= 1 << 62:
            raise self.bad(name, f"has the shape {list(spec.shape)}, which no array can have")
        if not spec.size:
            return spec._replace(extent=Extent(0, 0, 0))
        if layout == h5py.h5d.CHUNKED:
            self._check_chunks(spec, dataset, properties)
            return spec
        if layout == h5py.h5d.COMPACT:
            return spec
        offset, stored = dataset.get_offset(), dataset.get_storage_size()
        if offset is None:
            raise self.bad(name, "was never written")
        if stored != spec.nbytes or offset + stored > self._size:
            raise self.bad(
                name,
                f"is {spec.describe()}, {spec.nbytes} bytes, but {stored} are stored at "
                f"{offset} of {self._size}",
            )
        extent = Extent(0, self._base + int(offset), int(stored))
        self._extents.append((extent, name))
        return spec._replace(extent=extent)

    def _check_chunks(self, spec: TensorSpec, dataset: Any, properties: Any) -> None:
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        if unknown := [code for code in filters if code not in _FILTERS]:
            raise self.bad(
                spec.name,
                f"is compressed by the HDF5 filter {unknown[0]}; "
                f"{', '.join(_FILTERS.values())} are read",
            )
        shape = tuple(map(int, properties.get_chunk()))
        chunk = math.prod(shape) * spec.entry.itemsize
        if chunk > 2 * max(spec.nbytes, _CHUNK_CACHE):
            raise self.bad(spec.name, f"is stored in chunks of {chunk:,} bytes, more than its own")
        counts = _counts(spec.shape, shape)
        expected, written = math.prod(counts), int(dataset.get_num_chunks())
        if expected != written or expected > MOST_OBJECTS:
            raise self.bad(spec.name, f"has {written:,} of its {expected:,} chunks")
        self._unpacked += expected * chunk
        if self._unpacked > _LARGEST_RATIO * self._size:
            raise self.bad(
                spec.name, f"would unpack to more than {_LARGEST_RATIO:,} times the file's size"
            )
        row = math.prod(counts[1:]) * chunk
        needed = _OPEN_BYTES + 2 * chunk + _cache_bytes(chunk, row)
        self.reader_bytes = max(self.reader_bytes, needed)

        def check(info: Any) -> None:
            if info.byte_offset is None or info.byte_offset + info.size > self._size:
                raise self.bad(spec.name, "has a chunk that reaches beyond the end of the file")
            if info.size > chunk + chunk // 64 + 4096:
                raise self.bad(spec.name, "has a chunk of more bytes than it can have")

        dataset.chunk_iter(check)

    def _dtype(self, name: str, dataset: Any) -> str:
        dtype = dataset.dtype
        if dtype.kind == "V" and dtype.fields is None and dtype.subdtype is None:
            return self._opaque(name, dataset, dtype)
        entry = dtype_of(dtype)
        if entry is None or dtype.byteorder == ">":
            raise self.bad(name, f"has the type {dtype}, which is not a plain number")
        # HDF5 has numbers with fewer bits than their storage, or with their parts elsewhere: their
        # bytes are not what they mean.
        if entry.kind in ("int", "float") and dataset.get_type() != h5py.h5t.py_create(dtype):
            raise self.bad(name, f"has a type that only resembles {dtype}")
        return entry.name

    def _opaque(self, name: str, dataset: Any, dtype: np.dtype[Any]) -> str:
        label = texts(h5py.Dataset(dataset)).get("dtype", self._opaque_dtype)
        if label is None:
            raise self.bad(
                name,
                f"holds unnamed values of {dtype.itemsize} bytes; if they are bfloat16, which "
                "Keras stores so, say opaque_dtype='bfloat16' (--opaque-dtype bfloat16)",
            )
        try:
            entry = lookup(label)
        except WavgError as error:
            raise self.bad(name, f"calls itself what it cannot be: {error}") from None
        if entry.bits != 8 * dtype.itemsize:
            raise self.bad(name, f"holds values of {dtype.itemsize} bytes, which is not {label}")
        return entry.name

    def bad(self, name: str, why: str) -> CheckpointFormatError:
        """Return the error of a tensor."""
        return CheckpointFormatError(f"{self._path}: {name} {why}", path=self._path, tensor=name)

    def check(self) -> None:
        """Refuse datasets that share bytes."""
        end, before = 0, ""
        for extent, name in sorted(self._extents):
            if extent.offset < end:
                raise self.bad(name, f"shares its bytes with {before}")
            end, before = extent.offset + extent.length, name


def _counts(shape: Sequence[int], chunk: Sequence[int]) -> list[int]:
    """Return how many chunks there are along each axis."""
    return [-(-size // width) for size, width in zip(shape, chunk, strict=True)]


def _cache_bytes(chunk: int, row: int) -> int:
    return max(chunk, min(row, _CHUNK_CACHE))


def signature(source: Source, specs: Sequence[TensorSpec], beside: bytes = b"") -> bytes:
    """Return a digest of all bytes but the tensors': what HDF5 would make of the file.

    `beside` is what else an index was made of. Empty where a tensor has no extent: its chunks'
    places are part of what differs; and where there is more than a layout, as a hole of a terabyte.
    """
    if any(spec.extent is None for spec in specs):
        return b""
    base, length = source.base, source.length()
    inside = [
        spec.extent._replace(offset=spec.extent.offset - base)
        for spec in specs
        if spec.extent is not None and spec.extent.length
    ]
    others = complement(length, inside)
    if sum(extent.length for extent, _ in others) > _LARGEST_LAYOUT:
        return b""
    total = hashlib.sha256(b"%d:%d:%d:%b" % (base, length, len(beside), beside))
    with open(source.path, "rb", buffering=0) as file:
        for extent, _ in others:
            for data in in_pieces(file.fileno(), base + extent.offset, extent.length):
                total.update(data)
    return total.digest()


def same_layout(source: Source, like: Index | None, beside: bytes = b"") -> Index | None:
    """Return the index of a file that is that of `like` but for its numbers, byte for byte."""
    if like is None or not like.signature:
        return None
    identity = identify(source.path)
    if signature(source, (*like.tensors, *like.others), beside) != like.signature:
        return None
    return dataclasses.replace(like, files=(identity,))


class BlockReader:
    """Reads tensors without extents through the library; see `wavg.checkpoint.BlockReader`.

    Parameters
    ----------
    source
        The HDF5 file.
    stored
        Given the open file, says where each tensor is stored.
    """

    def __init__(self, source: Source, stored: Callable[[Any], Mapping[str, str]]) -> None:
        self._source = source
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(opened(source))
        self._stored = stored(self._file)
        self._lock = threading.Lock()
        self._name, self._dataset, self._rows = "", None, 1

    def read(self, spec: TensorSpec, start: int, out: Array) -> None:
        """Do as `wavg.checkpoint.BlockReader.read` says."""
        path = self._source.path
        with self._lock:
            try:
                if self._name != spec.name:
                    self._name, self._dataset = spec.name, self._open(spec.name)
                dataset: Any = self._dataset
                done = 0
                for box in boxes(spec.shape, start, len(out)):
                    for piece in _pieces(box, self._rows):
                        shape = tuple(part.stop - part.start for part in piece)
                        values = out[done : done + math.prod(shape)].view(dataset.dtype)
                        dataset.read_direct(values.reshape(shape), piece)
                        done += values.size
            except WavgError:
                raise
            except (
                OSError,
                RuntimeError,
                ValueError,
                TypeError,
                KeyError,
                zlib.error,
            ) as error:
                raise CheckpointFormatError(
                    f"{path}: {spec.name} cannot be read: {error}", path=path, tensor=spec.name
                ) from error

    def _open(self, name: str) -> Any:
        dataset = member(self._source.path, self._file, self._stored[name])
        properties = dataset.get_create_plist()
        if properties.get_layout() != h5py.h5d.CHUNKED:
            self._rows = MOST_OBJECTS
            return h5py.Dataset(dataset)
        shape = properties.get_chunk()
        chunk = math.prod(shape) * dataset.dtype.itemsize
        across = math.prod(_counts(dataset.shape, shape)[1:])
        self._rows = shape[0] * max(1, _CHUNKS_AT_ONCE // across)
        self._refuse_bombs(name, dataset, properties, chunk)
        access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
        access.set_chunk_cache(521, _cache_bytes(chunk, across * chunk), 1.0)
        del dataset, properties  # while it is open, its cache is that of its first opening
        stored = self._stored[name].encode()
        return h5py.Dataset(h5py.h5d.open(self._file.id, stored, access))

    def _refuse_bombs(self, name: str, dataset: Any, properties: Any, chunk: int) -> None:
        """Unpack deflated chunks within bounds: HDF5 itself goes on until their data end."""
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        if _DEFLATE not in filters:
            return
        skipped = 1 << filters.index(_DEFLATE)
        path = self._source.path

        def check(info: Any) -> None:
            if not info.filter_mask & skipped:
                unpacked = zlib.decompressobj().decompress(
                    read(info.byte_offset, info.size), chunk + 1
                )
                if len(unpacked) > chunk:
                    raise CheckpointFormatError(
                        f"{path}: {name} has a chunk that unpacks to more than its {chunk:,} bytes",
                        path=path,
                        tensor=name,
                    )

        with self._source.reader() as read:
            dataset.chunk_iter(check)

    def close(self) -> None:
        """Do as `wavg.checkpoint.BlockReader.close` says."""
        self._stack.close()


def _pieces(box: tuple[slice, ...], rows: int) -> Iterator[tuple[slice, ...]]:
    """Cut a box so that no piece is of more rows."""
    if not box:
        yield box
        return
    first, *rest = box
    for start in range(first.start, first.stop, rows):
        yield (slice(start, min(start + rows, first.stop)), *rest)


def boxes(shape: tuple[int, ...], start: int, count: int) -> Iterator[tuple[slice, ...]]:
    """Yield the boxes that a run of elements of an array consists of, in order.

    >>> list(boxes((4, 3), 2, 5))
    [(slice(0, 1, None), slice(2, 3, None)), (slice(1, 2, None), slice(0, 3, None)), (slice(2, 3, None), slice(0, 1, None))]
    """  # noqa: E501
    if not shape:
        yield ()
    elif len(shape) == 1:
        yield (slice(start, start + count),)
    else:
        inner = math.prod(shape[1:])
        while count:
            row, offset = divmod(start, inner)
            rows = count // inner if not offset else 0
            if rows:
                taken = rows * inner
                yield (slice(row, row + rows), *(slice(0, size) for size in shape[1:]))
            else:
                taken = min(count, inner - offset)
                for box in boxes(shape[1:], offset, taken):
                    yield (slice(row, row + 1), *box)
            start, count = start + taken, count - taken
