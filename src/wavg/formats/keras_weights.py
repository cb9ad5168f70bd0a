"""Keras 3's weights, ``.weights.h5``: a tree of layers, each with its variables in ``vars``.

A tensor's name is its path in the file, ``layers/dense/vars/0``. What belongs to an optimizer or
to metrics lies beside the model's layers and is none of its tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import h5py

from wavg.checkpoint import Checkpoint, FileIdentity, Index, TensorSpec, identify
from wavg.errors import CheckpointFormatError, OutputError
from wavg.formats import hdf5, hdf5_rewrite, hdf5_tensors
from wavg.formats.hdf5 import Source
from wavg.formats.hdf5_links import linked_order
from wavg.formats.keras_order import weights_order
from wavg.templates import Template

__all__ = [
    "block_reader",
    "create",
    "index_of",
    "is_other",
    "optimizers_of",
    "parsed",
    "patch",
    "read_index",
    "recognises",
]

_OPTIMIZER = re.compile(r"(.*_)?optimizer(_?\d+)?")
_SUFFIX = ".weights.h5"


def recognises(path: str, file: Any) -> bool:
    """Whether an open HDF5 file is one of these, rather than of the legacy layout."""
    if hdf5.has_names(file, "layer_names") or "model_weights" in file:
        return False
    if hdf5.has_names(file, hdf5.NAMES) or path.lower().endswith(_SUFFIX):
        return True
    return any(name in file for name in ("layers", "_layer_checkpoint_dependencies", "vars"))


def read_index(path: str, *, opaque_dtype: str | None = None, like: Index | None = None) -> Index:
    """Walk the tree and find where each dataset's bytes lie."""
    identity = identify(path)
    source = Source(path)
    if (index := hdf5_tensors.same_layout(source, like)) is not None:
        return index
    with hdf5.opened(source) as file:
        return index_of(source, identity, file, hdf5_tensors.Collector(source, opaque_dtype))


def index_of(
    source: Source,
    identity: FileIdentity,
    file: Any,
    collector: hdf5_tensors.Collector,
    config: bytes = b"",
    keras_version: str = "",
) -> Index:
    """Return the index of an open file, its tensors in the order of ``get_weights()``.

    See `wavg.formats.keras_order`; `config` is the model's configuration as JSON, where there is
    one. Without a version Keras 3 is known by the layers' names, which Keras 2 does not note.
    """
    with source.reader() as read:
        written = linked_order(read)
    found = []
    for name, thing in hdf5.members(source.path, file):
        if hdf5.is_group(thing):
            if not keras_version and h5py.h5a.exists(thing, b"name"):
                keras_version = "3"
        else:
            rank = written.get(name, hdf5.address(thing)) if written else hdf5.address(thing)
            found.append((rank, natural(name), collector.spec(name, thing)))
    collector.check()
    if not found and not hdf5.has_names(file, hdf5.NAMES):
        raise CheckpointFormatError(f"{source.path}: holds no weights", path=source.path)
    specs = [spec for *_, spec in sorted(found)]
    tensors = [spec for spec in specs if not is_other(spec.name)]
    names = [spec.name for spec in tensors]
    if hdf5.has_names(file, hdf5.NAMES):
        names = hdf5.names_in(source.path, file, hdf5.NAMES)
        by_name = {spec.name: spec for spec in tensors}
        if sorted(names) != sorted(by_name):
            raise CheckpointFormatError(
                f"{source.path}: {hdf5.NAMES} does not list its tensors", path=source.path
            )
        tensors = [by_name[name] for name in names]
    else:
        order = weights_order(names, parsed(config), keras_version=keras_version or "2")
        tensors = [tensors[position] for position in order]
    others = [spec for spec in specs if is_other(spec.name)]
    return Index(
        "keras-weights",
        (identity,),
        tuple(tensors),
        tuple(others),
        hdf5.texts(file),
        hdf5_tensors.signature(source, specs, config),
        reader_bytes=collector.reader_bytes,
    )


def parsed(config: bytes | str) -> object:
    """Return a configuration that is JSON, or None."""
    try:
        return json.loads(config)
    except (ValueError, RecursionError):
        return None


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts variables by number."""
    return [
        (1, int(part), "") if part.isascii() and part.isdigit() else (0, 0, part)
        for part in name.split("/")
    ]


def is_other(name: str) -> bool:
    """Whether a tensor belongs to an optimizer or a metric, and not to the model."""
    first, _, rest = name.partition("/")
    return bool(rest) and (first == "metrics" or _OPTIMIZER.fullmatch(first) is not None)


def optimizers_of(index: Index) -> set[str]:
    """Return the members of the root that hold optimizers; tf_keras cannot load without metrics."""
    return {spec.name.partition("/")[0] for spec in index.others} - {"metrics"}


def block_reader(index: Index) -> hdf5_tensors.BlockReader:
    """Return the reader of chunked datasets."""
    names = {spec.name: spec.name for spec in index.tensors}
    return hdf5_tensors.BlockReader(Source(index.path), lambda file: names)


def patch(
    reference: Checkpoint, specs: Sequence[TensorSpec], keep_others: bool, paths: Sequence[str]
) -> list[Template]:
    """Write the file anew, for other dtypes, chunked datasets, or without the optimizer."""
    (path,) = paths
    index = reference.index
    replaced = {spec.name: spec for spec in specs}
    order = [spec.name for spec in index.tensors]
    drop = () if keep_others else optimizers_of(index)
    return [hdf5_rewrite.rewrite(Source(index.path), Source(path), replaced, order, drop)]


def create(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], paths: Sequence[str]
) -> list[Template]:
    """Lay out a new file: a name is a path, and the order that of the data."""
    (path,) = paths
    with hdf5.opened(Source(path), "w") as file:
        hdf5.write_names(file, hdf5.NAMES, [spec.name for spec in specs])
        for key, value in metadata.items():
            file.attrs[key] = value
        for spec in specs:
            parts = spec.name.split("/")
            bad = any(part in ("", ".", "..") for part in parts) or "\0" in spec.name
            if bad or is_other(spec.name):
                raise OutputError(
                    f"{path}: a {_SUFFIX} file cannot hold the name {spec.name!r}",
                    path=path,
                    tensor=spec.name,
                )
            hdf5_rewrite.create_dataset(path, file, spec.name, spec)
    return [hdf5_rewrite.places(Source(path), {spec.name: spec for spec in specs})]
