"""HDF5 files written: new datasets, and whole files anew with other numbers in them."""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from wavg.checkpoint import TensorSpec
from wavg.errors import OutputError
from wavg.extents import Extent
from wavg.formats.hdf5 import Source, is_group, members, opened
from wavg.formats.hdf5_links import linked_order
from wavg.positional import read_exactly
from wavg.templates import Template

_MARGIN = 16 << 20  # for what HDF5 notes of its chunks
__all__ = ["create_dataset", "places", "rewrite", "runs"]


def create_dataset(path: str, group: Any, name: str, spec: TensorSpec, like: Any = None) -> Any:
    """Create a dataset to be filled: in place if contiguous, else in chunks as `like`'s are."""
    if spec.fortran or spec.entry.bits % 8:
        raise OutputError(
            f"{path}: HDF5 cannot hold {spec.name!r} ({spec.describe()}); choose another format",
            path=path,
            tensor=spec.name,
        )
    if like is None:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.CONTIGUOUS)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    else:
        properties = like.get_create_plist()
    properties.set_obj_track_times(False)  # the same bytes whenever it is written
    space = h5py.h5s.create_simple(spec.shape) if spec.shape else h5py.h5s.create(h5py.h5s.SCALAR)
    if like is not None:
        space = like.get_space()
    try:
        parent = group.require_group(name.rpartition("/")[0]) if "/" in name else group
        identifier = h5py.h5d.create(
            parent.id,
            name.rpartition("/")[2].encode(),
            h5py.h5t.py_create(_storage(spec), logical=True),
            space,
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
        Groups that are left out.
    """
    chunked: dict[str, TensorSpec] = {}
    with opened(source) as old, opened(target, "w") as new:
        copy_attributes(old, new)
        datasets = []
        for name, group in _as_linked(source, old):
            if any(name == part or name.startswith(f"{part}/") for part in drop):
                continue
            if group:
                copy_attributes(old[name], new.create_group(name))
            else:
                datasets.append(name)
        known = set(order)
        for name in (*order, *(name for name in datasets if name not in known)):
            if name not in replaced:
                h5py.h5o.copy(old.id, name.encode(), new.id, name.encode())
            elif _replace(old, new, name, replaced[name], target):
                chunked[name] = replaced[name]
    contiguous = {name: spec for name, spec in replaced.items() if name not in chunked}
    template = places(target, contiguous)
    return _with_chunks(target, template, chunked) if chunked else template


def _replace(old: Any, new: Any, name: str, spec: TensorSpec, target: Source) -> bool:
    """Create a dataset for other numbers than the old one's; return whether it is in chunks."""
    dataset = old[name]
    split = dataset.id.get_create_plist().get_layout() == h5py.h5d.CHUNKED
    if split and target.base:
        raise OutputError(
            f"{target.path}: {spec.name!r} is stored in chunks, which wavg does not write within "
            "an archive; choose another format",
            path=target.path,
            tensor=spec.name,
        )
    made = create_dataset(target.path, new, name, spec, dataset.id if split else None)
    copy_attributes(dataset, made, leave=("dtype",))
    return bool(split)


def _as_linked(source: Source, file: Any) -> Iterable[tuple[str, bool]]:
    """Return a file's members in the order of their creation, which tells that of the layers.

    Each is a path and whether it is a group: open objects of the library take much memory.
    """
    found = [(name, is_group(thing)) for name, thing in members(source.path, file)]
    with source.reader() as read:
        ranks = linked_order(read)
    if ranks.keys() >= {name for name, _ in found}:
        found.sort(key=lambda member: ranks[member[0]])
    return found


def _with_chunks(target: Source, template: Template, chunked: Mapping[str, TensorSpec]) -> Template:
    """Collect the numbers of chunked datasets behind the file, and at the end write the chunks.

    What lies behind is a hole until it is written, and is cut off when the library is done.
    """
    first = template.size + _MARGIN
    with opened(target) as file:
        for name, spec in chunked.items():
            chunks = file[name].chunks  # whole ones, however little of the last is the tensor's
            count = math.prod(-(-a // b) for a, b in zip(spec.shape, chunks, strict=True))
            size = math.prod(chunks) * spec.entry.itemsize
            first += count * (size + size // 256 + 4096)  # what does not compress grows a little
    start, targets = first, dict(template.targets)
    waiting = {}
    for name, spec in chunked.items():
        waiting[name] = spec._replace(extent=Extent(0, start, spec.nbytes))
        targets[spec.name] = waiting[name]
        start += spec.nbytes

    def finish(descriptor: int) -> None:
        with opened(target, "r+") as file:
            for name, spec in waiting.items():
                _write_chunks(descriptor, file[name], spec)
            file.flush()  # only now: it cuts off what lies behind
            end = file.id.get_filesize()
        if end > first:
            raise OutputError(
                f"cannot write {target.path}: its chunks take more room than they can",
                path=target.path,
            )
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
        values = np.empty([part.stop - part.start for part in box], dataset.dtype)
        flat, done = values.reshape(-1), 0
        for first, length in runs(spec.shape, box):
            place = spec.extent.offset + first * spec.entry.itemsize
            if not read_exactly(descriptor, place, flat[done : done + length]):
                raise OSError(errno.EIO, "what was written is not there")
            done += length
        dataset[box] = values


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
