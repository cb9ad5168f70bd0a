"""HDF5 as Keras uses it: datasets become tensors, and files are rewritten with other numbers.

What the formats on HDF5 have in common; which dataset is which tensor is theirs to say.

HDF5 is not safe on hostile files. Every path component must be a hard link, every dataset plain
numbers stored in this file: contiguously, which is an extent, or in chunks with HDF5's own filters,
which the library reads. An HDF5 type has no bfloat16: such a dataset is opaque, and its attribute
``dtype`` says what it is where the writer was careful.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from wavg.checkpoint import Extent, Index, TensorSpec, identify
from wavg.dtypes import dtype_of, lookup
from wavg.errors import CheckpointFormatError, OutputError, WavgError
from wavg.templates import Template, complement

__all__ = [
    "NAMES",
    "BlockReader",
    "Collector",
    "Source",
    "address",
    "create_dataset",
    "has_names",
    "is_group",
    "member",
    "members",
    "names_in",
    "opened",
    "places",
    "rewrite",
    "same_layout",
    "signature",
    "texts",
    "write_names",
]

Array = npt.NDArray[Any]

NAMES = "wavg_names"  # tensors' names and order, where a layout itself cannot say them
_DEEPEST = 32
_ATTRIBUTE_LIMIT = 64512  # an object header's; longer lists are split into name0, name1, …
_MOST_OBJECTS = 1_000_000
_METADATA_CACHE = 1 << 20
_CHUNK_CACHE = (
    2 << 20
)  # of one input: where a row of chunks is larger, they are unpacked repeatedly
_COPY_BYTES = 1 << 20
# deflate, shuffle, Fletcher's checksum, and h5py's lzf
_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}


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


class _Window(io.RawIOBase):
    """A part of a file, seen as a file of its own."""

    def __init__(self, file: IO[bytes], base: int, size: int) -> None:
        self._file, self._base, self._size, self._position = file, base, size, 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._position))
        self._file.seek(self._base + self._position)
        count = self._file.readinto(view[:wanted])  # type: ignore[attr-defined]
        self._position += count
        return int(count)

    def write(self, data: Any) -> int:
        self._file.seek(self._base + self._position)
        count = self._file.write(data)
        self._position += count
        self._size = max(self._size, self._position)
        return count

    def truncate(self, size: int | None = None) -> int:
        self._size = self._position if size is None else size
        self._file.truncate(self._base + self._size)
        return self._size


@contextlib.contextmanager
def opened(source: Source, mode: str = "r") -> Iterator[Any]:
    """Open an HDF5 file, and turn what the library refuses into errors that name it."""
    path = source.path
    try:
        with contextlib.ExitStack() as stack:
            # No HDF5 locks: a child process started meanwhile would inherit them.
            if source.base == 0 and source.size is None:
                file = stack.enter_context(h5py.File(path, mode, locking=False))
            else:
                how = "rb" if mode == "r" else "r+b"
                raw = stack.enter_context(open(path, how, buffering=0))
                window = _Window(raw, source.base, source.length())
                if mode == "w":
                    window.truncate(0)
                file = stack.enter_context(h5py.File(window, mode))
            config = file.id.get_mdc_config()  # by default the cache of metadata may take 32 MiB
            config.initial_size = config.min_size = config.max_size = _METADATA_CACHE
            config.set_initial_size = True
            file.id.set_mdc_config(config)
            yield file
    except WavgError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if mode != "r":
            raise OutputError(f"cannot write {path}: {error}", path=path) from error
        raise CheckpointFormatError(f"{path}: not a sound HDF5 file: {error}", path=path) from error


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
    stack = [("", file.id)]
    while stack:
        prefix, group = stack.pop()
        found = []
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
            if len(seen) > _MOST_OBJECTS:
                raise CheckpointFormatError(f"{path}: too many objects", path=path)
            yield name, here
            if is_group(here):
                found.append((f"{name}/", here))
        stack += reversed(found)


def address(thing: Any) -> int:
    """Return where in the file an object's header lies: in the order of creation, mostly."""
    return int(h5py.h5o.get_info(thing).addr)


def texts(group: Any) -> dict[str, str]:
    """Return the attributes that are texts."""
    found = {}
    for key in group.attrs:
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
    pieces = [group.attrs[attribute]] if attribute in group.attrs else []
    while not pieces or f"{attribute}{len(pieces)}" in group.attrs:
        if attribute in group.attrs:
            break
        pieces.append(group.attrs[f"{attribute}{len(pieces)}"])
    names = []
    for value in (value for piece in pieces for value in np.atleast_1d(piece)):
        text = value.decode("utf-8", "strict") if isinstance(value, bytes) else value
        if not isinstance(text, str):
            raise CheckpointFormatError(
                f"{path}: {attribute} holds {value!r}, not a name", path=path
            )
        names.append(text)
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


class Collector:
    """Turns datasets into tensors, checking each; then all of them together."""

    def __init__(self, source: Source, opaque_dtype: str | None) -> None:
        self._path, self._base = source.path, source.base
        self._size, self._opaque_dtype = source.length(), opaque_dtype
        self._extents: list[tuple[Extent, str]] = []
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
        counts = [-(-size // width) for size, width in zip(spec.shape, shape, strict=True)]
        expected, written = math.prod(counts), int(dataset.get_num_chunks())
        if expected != written or expected > _MOST_OBJECTS:
            raise self.bad(spec.name, f"has {written:,} of its {expected:,} chunks")
        row = math.prod(counts[1:]) * chunk
        self.reader_bytes = max(self.reader_bytes, 2 * chunk + _cache_bytes(chunk, row))

        def check(info: Any) -> None:
            if info.byte_offset is None or info.byte_offset + info.size > self._size:
                raise self.bad(spec.name, "has a chunk that reaches beyond the end of the file")

        dataset.chunk_iter(check)

    def _dtype(self, name: str, dataset: Any) -> str:
        dtype = dataset.dtype
        if dtype.kind == "V" and dtype.fields is None and dtype.subdtype is None:
            return self._opaque(name, dataset, dtype)
        entry = dtype_of(dtype)
        if entry is None or dtype.byteorder == ">":
            raise self.bad(name, f"has the type {dtype}, which is not a plain number")
        # HDF5 has integers with fewer bits than their storage; their bytes are not what they mean.
        if entry.kind == "int" and dataset.get_type() != h5py.h5t.py_create(dtype):
            raise self.bad(name, f"has a type that only resembles {dtype}")
        return entry.name

    def _opaque(self, name: str, dataset: Any, dtype: np.dtype[Any]) -> str:
        label = texts(h5py.Dataset(dataset)).get("dtype", self._opaque_dtype)
        if label is not None:
            entry = lookup(label)
            if entry.itemsize == dtype.itemsize and entry.bits % 8 == 0:
                return entry.name
        raise self.bad(
            name,
            f"holds unnamed values of {dtype.itemsize} bytes, as Keras stores bfloat16; if they "
            "are, say opaque_dtype='bfloat16' (--opaque-dtype bfloat16)",
        )

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


def _cache_bytes(chunk: int, row: int) -> int:
    return max(chunk, min(row, _CHUNK_CACHE))


def signature(source: Source, specs: Sequence[TensorSpec], beside: bytes = b"") -> bytes:
    """Return a digest of all bytes but the tensors': what HDF5 would make of the file.

    `beside` is what else an index was made of. Empty where a tensor has no extent: its chunks'
    places are part of what differs.
    """
    if any(spec.extent is None for spec in specs):
        return b""
    base, length = source.base, source.length()
    inside = [
        spec.extent._replace(offset=spec.extent.offset - base)
        for spec in specs
        if spec.extent is not None and spec.extent.length
    ]
    total = hashlib.sha256(b"%d:%d:%d:%b" % (base, length, len(beside), beside))
    with open(source.path, "rb", buffering=0) as file:
        for extent, _ in complement(length, inside):
            file.seek(base + extent.offset)
            left = extent.length
            while left:
                data = file.read(min(left, _COPY_BYTES))
                if not data:
                    return b""
                total.update(data)
                left -= len(data)
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
        self._name, self._dataset = "", None

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
                    values = np.asarray(dataset[box])
                    out[done : done + values.size].view(values.dtype)[...] = values.reshape(-1)
                    done += values.size
            except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
                raise CheckpointFormatError(
                    f"{path}: {spec.name} cannot be read: {error}", path=path, tensor=spec.name
                ) from error

    def _open(self, name: str) -> Any:
        dataset = member(self._source.path, self._file, self._stored[name])
        properties = dataset.get_create_plist()
        if properties.get_layout() != h5py.h5d.CHUNKED:
            return h5py.Dataset(dataset)
        shape = properties.get_chunk()
        chunk = math.prod(shape) * dataset.dtype.itemsize
        row = chunk * math.prod(
            -(-a // b) for a, b in zip(dataset.shape[1:], shape[1:], strict=True)
        )
        access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
        access.set_chunk_cache(521, _cache_bytes(chunk, row), 1.0)
        name = self._stored[name]
        return h5py.Dataset(h5py.h5d.open(self._file.id, name.encode(), access))

    def close(self) -> None:
        """Do as `wavg.checkpoint.BlockReader.close` says."""
        self._stack.close()


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


def runs(shape: tuple[int, ...], box: tuple[slice, ...]) -> Iterator[tuple[int, int]]:
    """Yield the runs (first element, length) that a box of an array consists of, in order.

    >>> list(runs((4, 3), (slice(1, 3), slice(0, 2))))
    [(3, 2), (6, 2)]
    >>> list(runs((4, 3), (slice(1, 3), slice(0, 3))))
    [(3, 6)]
    """
    axis = len(shape) - 1
    while axis > 0 and box[axis] == slice(0, shape[axis]):
        axis -= 1
    inner = math.prod(shape[axis + 1 :])
    strides = [math.prod(shape[position + 1 :]) for position in range(axis)]
    for place in itertools.product(*(range(part.start, part.stop) for part in box[:axis])):
        first = sum(a * b for a, b in zip(place, strides, strict=True))
        yield first + box[axis].start * inner, (box[axis].stop - box[axis].start) * inner


def create_dataset(path: str, group: Any, name: str, spec: TensorSpec, like: Any = None) -> Any:
    """Create a dataset to be filled: in place if contiguous, else in chunks as `like`'s are."""
    if spec.fortran or spec.entry.bits % 8:
        raise OutputError(f"{path}: HDF5 cannot hold {spec.name!r} ({spec.describe()})", path=path)
    if like is None:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.CONTIGUOUS)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    else:
        properties = like.get_create_plist()
    try:
        parent = group.require_group(name.rpartition("/")[0]) if "/" in name else group
        identifier = h5py.h5d.create(
            parent.id,
            name.rpartition("/")[2].encode(),
            h5py.h5t.py_create(_storage(spec), logical=True),
            h5py.h5s.create_simple(spec.shape) if spec.shape else h5py.h5s.create(h5py.h5s.SCALAR),
            dcpl=properties,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise OutputError(
            f"{path}: HDF5 cannot hold {spec.name!r} beside the others: {error}",
            path=path,
            tensor=spec.name,
        ) from None
    dataset = h5py.Dataset(identifier)
    if _storage(spec).kind == "V":
        dataset.attrs["dtype"] = spec.dtype
    return dataset


def _storage(spec: TensorSpec) -> np.dtype[Any]:
    dtype = spec.entry.numpy
    if dtype.kind == "V" or spec.entry.name.startswith(("bfloat", "float8")):
        return np.dtype(f"V{spec.entry.itemsize}")
    return dtype


def copy_attributes(source: Any, target: Any, leave: Collection[str] = ()) -> None:
    """Copy attributes with their types."""
    for key in source.attrs:
        if key not in leave:
            dtype = source.attrs.get_id(key).dtype
            target.attrs.create(key, source.attrs[key], dtype=dtype)


def places(target: Source, specs: Mapping[str, TensorSpec]) -> Template:
    """Read back where the payloads of a file in the making lie; `specs` by stored path."""
    size, targets = target.length(), {}
    with opened(target) as file:
        for stored, spec in specs.items():
            offset = file[stored].id.get_offset() if spec.size else 0
            extent = Extent(0, target.base + int(offset), spec.nbytes)
            targets[spec.name] = spec._replace(extent=extent)
            size = max(size, extent.offset - target.base + extent.length)
    return Template(size, targets)


def rewrite(
    source: Source,
    target: Source,
    replaced: Mapping[str, TensorSpec],
    order: Sequence[str],
    drop: Collection[str],
) -> Template:
    """Write a file anew with other dtypes, or without some of its parts.

    Parameters
    ----------
    source, target
        The reference, and where the skeleton goes.
    replaced
        Tensors whose numbers will be written, by stored path; all else is copied.
    order
        Stored paths in the order in which datasets are to be laid out; others follow.
    drop
        Members of the root that are left out.
    """
    chunked: dict[str, TensorSpec] = {}
    with opened(source) as old, opened(target, "w") as new:
        copy_attributes(old, new)
        datasets: dict[str, Any] = {}
        for name, thing in members(source.path, old):
            if name.split("/")[0] in drop:
                continue
            if is_group(thing):
                copy_attributes(h5py.Group(thing), new.create_group(name))
            else:
                datasets[name] = thing
        known = set(order)
        for name in (*order, *(name for name in datasets if name not in known)):
            if name not in replaced:
                h5py.h5o.copy(old.id, name.encode(), new.id, name.encode())
                continue
            dataset, spec = datasets[name], replaced[name]
            split = dataset.get_create_plist().get_layout() == h5py.h5d.CHUNKED
            made = create_dataset(target.path, new, name, spec, dataset if split else None)
            copy_attributes(h5py.Dataset(dataset), made, leave=("dtype",))
            if split and target.base:
                raise OutputError(
                    f"{target.path}: {spec.name!r} is stored in chunks, which wavg does not write "
                    "within an archive; choose another format",
                    path=target.path,
                    tensor=spec.name,
                )
            if split:
                chunked[name] = spec
    contiguous = {name: spec for name, spec in replaced.items() if name not in chunked}
    template = places(target, contiguous)
    return _with_chunks(target, template, chunked) if chunked else template


def _with_chunks(target: Source, template: Template, chunked: Mapping[str, TensorSpec]) -> Template:
    """Collect the numbers of chunked datasets behind the file, and at the end write the chunks.

    What lies behind is a hole until it is written, and is cut off when the library is done.
    """
    # Compressed chunks must not grow into it: numbers that do not compress grow a little.
    start = template.size + sum(2 * spec.nbytes for spec in chunked.values()) + (16 << 20)
    targets = dict(template.targets)
    waiting = {}
    for name, spec in chunked.items():
        waiting[name] = spec._replace(extent=Extent(0, start, spec.nbytes))
        targets[spec.name] = waiting[name]
        start += spec.nbytes

    def finish(descriptor: int) -> None:
        with opened(target, "r+") as file:
            for name, spec in waiting.items():
                _write_chunks(descriptor, file[name], spec)
            file.flush()
            end = file.id.get_filesize()
        os.ftruncate(descriptor, min(end, os.fstat(descriptor).st_size))

    return Template(start, targets, finish=finish)


def _write_chunks(descriptor: int, dataset: Any, spec: TensorSpec) -> None:
    assert spec.extent is not None  # a target is a place
    corners = itertools.product(
        *(range(0, a, b) for a, b in zip(spec.shape, dataset.chunks, strict=True))
    )
    for corner in corners:
        box = tuple(
            slice(start, min(start + width, size))
            for start, width, size in zip(corner, dataset.chunks, spec.shape, strict=True)
        )
        parts = [
            os.pread(
                descriptor,
                length * spec.entry.itemsize,
                spec.extent.offset + first * spec.entry.itemsize,
            )
            for first, length in runs(spec.shape, box)
        ]
        values = np.frombuffer(b"".join(parts), dataset.dtype)
        dataset[box] = values.reshape([part.stop - part.start for part in box])
