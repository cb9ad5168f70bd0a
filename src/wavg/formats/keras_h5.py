"""Keras' legacy HDF5 layout: what ``model.save("x.h5")`` writes in Keras 2, tf_keras and Keras 3.

A group (``model_weights``, or the root of a weights-only file) has ``layer_names``; each layer's
group has ``weight_names``; ``top_level_model_weights`` holds the model's own. A tensor's name is
its path below that group, ``dense/sequential/dense/kernel``: weight names alone repeat.

HDF5 is not safe on hostile files. Every path component must be a hard link, every dataset plain
numbers stored contiguously in this file. An HDF5 type has no bfloat16: such a dataset is opaque,
and its attribute ``dtype`` says what it is where the writer was careful.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from wavg.checkpoint import Checkpoint, Extent, Index, Template, TensorSpec, complement, identify
from wavg.dtypes import dtype_of, lookup
from wavg.errors import CheckpointFormatError, OutputError, WavgError

__all__ = ["create", "patch", "read_index"]

_MODEL, _TOP_LEVEL, _OPTIMIZER = "model_weights", "top_level_model_weights", "optimizer_weights"
_NAMES = "wavg_names"  # the tensors' names and order, where the layout itself cannot say them
_ATTRIBUTE_LIMIT = 64512  # an object header's; longer lists are split into name0, name1, …
_DEEPEST = 32
_METADATA_CACHE = 1 << 20


def read_index(path: str, *, opaque_dtype: str | None = None, like: Index | None = None) -> Index:
    """Walk the layers' lists of names and find where each dataset's bytes lie."""
    identity = identify(path)
    with _open(path) as file:
        group = _member(path, file, _MODEL) if _MODEL in file else file
        if not _has_names(group, "layer_names"):
            raise CheckpointFormatError(f"{path}: {_what_else(file)}", path=path)
        walk = _Walk(path, identity.size, opaque_dtype)
        layers = _names(path, group, "layer_names")
        if _TOP_LEVEL in group and _TOP_LEVEL not in layers:
            layers.append(_TOP_LEVEL)
        tensors = [spec for layer in layers for spec in walk.layer(group, layer, f"{layer}/")]
        if _has_names(group, _NAMES):
            names = _names(path, group, _NAMES)
            by_path = {spec.name: spec for spec in tensors}
            pairs = [text.partition("\n") for text in names]
            if sorted(stored for stored, _, _ in pairs) != sorted(by_path):
                raise CheckpointFormatError(
                    f"{path}: {_NAMES} does not list its tensors", path=path
                )
            tensors = [by_path[stored]._replace(name=name or stored) for stored, _, name in pairs]
        if len({spec.name for spec in tensors}) != len(tensors):
            raise CheckpointFormatError(f"{path}: a tensor is listed twice", path=path)
        others = walk.layer(file, _OPTIMIZER, f"{_OPTIMIZER}/") if _OPTIMIZER in file else []
        metadata = {key: value for key in file.attrs if isinstance(value := file.attrs[key], str)}
    return Index("keras-h5", (identity,), tuple(tensors), tuple(others), metadata)


@contextlib.contextmanager
def _open(path: str, mode: str = "r") -> Iterator[Any]:
    # No HDF5 locks: a child process started meanwhile would inherit them.
    try:
        with h5py.File(path, mode, locking=False) as file:
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


def _what_else(file: Any) -> str:
    if "layers" in file or "_layer_checkpoint_dependencies" in file:
        return "this is a Keras 3 .weights.h5 file, which this version of wavg does not read"
    return "an HDF5 file without Keras' layer_names; is it a model saved by Keras?"


def _has_names(group: Any, attribute: str) -> bool:
    return attribute in group.attrs or f"{attribute}0" in group.attrs


def _names(path: str, group: Any, attribute: str) -> list[str]:
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


def _member(path: str, group: Any, name: str) -> Any:
    """Open a member by its path, refusing every link that is not a hard one."""
    parts = name.split("/")
    if len(parts) > _DEEPEST or any(part in ("", ".", "..") for part in parts):
        raise CheckpointFormatError(f"{path}: {name!r} is no path wavg follows", path=path)
    here = group.id
    for part in parts:
        raw = part.encode()
        if not isinstance(here, h5py.h5g.GroupID) or raw not in here:
            raise CheckpointFormatError(f"{path}: {name!r} is listed but missing", path=path)
        if here.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
            raise CheckpointFormatError(
                f"{path}: {name!r} is a soft or external link, which is not followed", path=path
            )
        here = h5py.h5o.open(here, raw)
    return h5py.Group(here) if isinstance(here, h5py.h5g.GroupID) else here


class _Walk:
    """Collects the tensors of layers, checking each."""

    def __init__(self, path: str, size: int, opaque_dtype: str | None) -> None:
        self._path, self._size, self._opaque_dtype = path, size, opaque_dtype

    def layer(self, group: Any, layer: str, prefix: str) -> list[TensorSpec]:
        """Return the tensors of one layer in the order of its ``weight_names``."""
        member = _member(self._path, group, layer)
        if not isinstance(member, h5py.Group) or not _has_names(member, "weight_names"):
            raise self._bad(layer, "has no weight_names")
        return [
            self._spec(f"{prefix}{name}", _member(self._path, member, name))
            for name in _names(self._path, member, "weight_names")
        ]

    def _spec(self, name: str, dataset: Any) -> TensorSpec:
        if not isinstance(dataset, h5py.h5d.DatasetID):
            raise self._bad(name, "is not a dataset")
        spec = TensorSpec(name, self._dtype(name, dataset), tuple(map(int, dataset.shape)))
        properties = dataset.get_create_plist()
        if properties.get_layout() != h5py.h5d.CONTIGUOUS:
            raise self._bad(
                name,
                "is stored in chunks or otherwise; this version reads contiguous datasets only",
            )
        if properties.get_external_count():
            raise self._bad(name, "is stored in another file, which is not read")
        if not spec.size:
            return spec._replace(extent=Extent(0, 0, 0))
        offset, stored = dataset.get_offset(), dataset.get_storage_size()
        if offset is None:
            raise self._bad(name, "was never written")
        if stored != spec.nbytes or offset + stored > self._size:
            raise self._bad(
                name,
                f"is {spec.describe()}, {spec.nbytes} bytes, but {stored} are stored at "
                f"{offset} of {self._size}",
            )
        return spec._replace(extent=Extent(0, int(offset), int(stored)))

    def _dtype(self, name: str, dataset: Any) -> str:
        dtype = dataset.dtype
        if dtype.kind == "V" and dtype.fields is None:
            return self._opaque(name, dataset, dtype)
        entry = dtype_of(dtype)
        if entry is None or dtype.byteorder == ">":
            raise self._bad(name, f"has the type {dtype}, which is not a plain number")
        # HDF5 has integers with fewer bits than their storage; their bytes are not what they mean.
        if entry.kind == "int" and dataset.get_type() != h5py.h5t.py_create(dtype):
            raise self._bad(name, f"has a type that only resembles {dtype}")
        return entry.name

    def _opaque(self, name: str, dataset: Any, dtype: np.dtype[Any]) -> str:
        attributes = h5py.Dataset(dataset).attrs
        label = attributes.get("dtype", self._opaque_dtype)
        if isinstance(label, str):
            entry = lookup(label)
            if entry.itemsize == dtype.itemsize and entry.bits % 8 == 0:
                return entry.name
        raise self._bad(
            name,
            f"holds unnamed values of {dtype.itemsize} bytes, as Keras stores bfloat16; if they "
            "are, say opaque_dtype='bfloat16' (--opaque-dtype bfloat16)",
        )

    def _bad(self, name: str, why: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{self._path}: {name} {why}", path=self._path, tensor=name)


def patch(
    reference: Checkpoint, specs: Sequence[TensorSpec], keep_others: bool, path: str
) -> Template:
    """Replace the numbers of `specs`; other dtypes, or no optimizer, need a new file."""
    index = reference.index
    originals = {spec.name: reference.spec(spec.name) for spec in specs}
    if keep_others and all(spec.dtype == originals[spec.name].dtype for spec in specs):
        extents = [spec.extent for spec in originals.values() if spec.extent is not None]
        size = index.files[0].size
        return Template(size, originals, carry=complement(size, extents))
    replaced = {spec.name: spec for spec in specs}
    with _open(index.path) as source, _open(path, "w") as file:
        _copy_attributes(source, file)
        weights_only = _MODEL not in source
        for name in source:
            if name != _OPTIMIZER or keep_others:
                _member(index.path, source, name)  # hard links only
                source.copy(source[name], file, name)
        group = file if weights_only else file[_MODEL]
        stored = _stored_paths(index.path, source if weights_only else source[_MODEL], index)
        for spec in specs:
            if spec.dtype != originals[spec.name].dtype:
                attributes = dict(group[stored[spec.name]].attrs)
                del group[stored[spec.name]]
                dataset = _empty_dataset(path, group, stored[spec.name], replaced[spec.name])
                dataset.attrs.update({k: v for k, v in attributes.items() if k != "dtype"})
                _mark(dataset, spec)
    return _template(path, specs, stored, None if weights_only else _MODEL)


def create(specs: Sequence[TensorSpec], metadata: Mapping[str, str], path: str) -> Template:
    """Lay out a weights-only file: the first part of a name is the layer."""
    stored: dict[str, str] = {}
    layers: dict[str, list[str]] = {}
    for spec in specs:
        layer, _, weight = spec.name.partition("/")
        if not weight:
            layer, weight = _TOP_LEVEL, spec.name
        stored[spec.name] = f"{layer}/{weight}"
        _check_name(path, stored[spec.name])
        layers.setdefault(layer, []).append(weight)
    top = layers.pop(_TOP_LEVEL, [])
    with _open(path, "w") as file:
        for key, value in metadata.items():
            file.attrs[key] = value
        _write_names(file, "layer_names", list(layers))
        for layer, names in [*layers.items(), (_TOP_LEVEL, top)]:
            _write_names(file.require_group(layer), "weight_names", names)
        for spec in specs:
            _mark(_empty_dataset(path, file, stored[spec.name], spec), spec)
        natural = [f"{layer}/{name}" for layer, names in layers.items() for name in names]
        natural += [f"{_TOP_LEVEL}/{name}" for name in top]
        if natural != [spec.name for spec in specs]:
            _write_names(file, _NAMES, [f"{stored[spec.name]}\n{spec.name}" for spec in specs])
    return _template(path, specs, stored, None)


def _check_name(path: str, name: str) -> None:
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name or "\n" in name:
        raise OutputError(f"{path}: HDF5 cannot hold the name {name!r}", path=path, tensor=name)


def _copy_attributes(source: Any, target: Any) -> None:
    for key in source.attrs:
        h5py_type = source.attrs.get_id(key).dtype
        target.attrs.create(key, source.attrs[key], dtype=h5py_type)


def _write_names(group: Any, attribute: str, names: Sequence[str]) -> None:
    """Write a list of names as Keras does: split where it exceeds an object header."""
    encoded = [name.encode() for name in names]
    width = max(map(len, encoded), default=1)
    per_piece = max(1, _ATTRIBUTE_LIMIT // width)
    if len(encoded) <= per_piece:
        group.attrs[attribute] = np.array(encoded) if encoded else np.empty(0)
        return
    for piece, start in enumerate(range(0, len(encoded), per_piece)):
        group.attrs[f"{attribute}{piece}"] = np.array(encoded[start : start + per_piece])


def _empty_dataset(path: str, group: Any, name: str, spec: TensorSpec) -> Any:
    """Create a dataset whose bytes are allocated and not filled: they are written in place."""
    if spec.fortran or spec.entry.bits % 8:
        raise OutputError(f"{path}: HDF5 cannot hold {spec.name!r} ({spec.describe()})", path=path)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    try:
        parent = group.require_group(name.rpartition("/")[0])
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
    return h5py.Dataset(identifier)


def _storage(spec: TensorSpec) -> np.dtype[Any]:
    dtype = spec.entry.numpy
    if dtype.kind == "V" or spec.entry.name.startswith(("bfloat", "float8")):
        return np.dtype(f"V{spec.entry.itemsize}")
    return dtype


def _mark(dataset: Any, spec: TensorSpec) -> None:
    if _storage(spec).kind == "V":
        dataset.attrs["dtype"] = spec.dtype


def _stored_paths(path: str, group: Any, index: Index) -> dict[str, str]:
    if not _has_names(group, _NAMES):
        return {spec.name: spec.name for spec in index.tensors}
    pairs = [text.partition("\n") for text in _names(path, group, _NAMES)]
    return {name: stored for stored, _, name in pairs}


def _template(
    path: str, specs: Sequence[TensorSpec], stored: Mapping[str, str], below: str | None
) -> Template:
    """Read back where the skeleton's payloads lie."""
    size = identify(path).size
    targets = {}
    with _open(path) as file:
        group = file[below] if below else file
        for spec in specs:
            offset = group[stored[spec.name]].id.get_offset() if spec.size else 0
            targets[spec.name] = spec._replace(extent=Extent(0, int(offset), spec.nbytes))
    end = max((t.extent.offset + t.extent.length for t in targets.values() if t.extent), default=0)
    return Template(max(size, end), targets)
