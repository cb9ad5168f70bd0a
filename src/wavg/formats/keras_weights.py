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
from wavg.templates import Part, Template

__all__ = [
    "block_reader",
    "create",
    "divided",
    "index_of",
    "made_of",
    "optimizers_of",
    "parsed",
    "patch",
    "read_index",
    "recognises",
]

_OPTIMIZER = re.compile(r"(.*_)?optimizer(_?\d+)?")
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # of layers, named by their classes
_SUFFIX = ".weights.h5"


def recognises(path: str, file: Any) -> bool:
    """Whether an open HDF5 file is one of these, rather than of the legacy layout."""
    if hdf5.has_names(file, "layer_names") or "model_weights" in file:
        return False
    if hdf5.has_names(file, hdf5.NAMES) or path.lower().endswith(_SUFFIX):
        return True
    return any(name in file for name in ("layers", "_layer_checkpoint_dependencies", "vars"))


def read_index(path: str, *, opaque_dtype: str | None = None, like: Index | None = None) -> Index:
    """Walk the tree and find where each dataset's bytes lie.

    For shards: a file that is named itself is told by its content, in `wavg.formats.keras_h5`.
    """
    identity = identify(path)
    source = Source(path)
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
    beside = made_of(config, keras_version)
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
    tensors, others = divided(specs)
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
    return Index(
        "keras-weights",
        (identity,),
        tuple(tensors),
        tuple(others),
        hdf5.texts(file),
        hdf5_tensors.signature(source, specs, beside),
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


def made_of(config: bytes = b"", keras_version: str = "") -> bytes:
    """Return what beside the HDF5 file an index is made of."""
    return b"%b\0%b" % (keras_version.encode(), config)


def divided(specs: Sequence[TensorSpec]) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Divide tensors into the model's, and those of optimizers and metrics."""
    places = _optimizers(specs)
    other = [_group(spec.name) in places or _is_metric(spec.name) for spec in specs]
    pairs = list(zip(specs, other, strict=True))
    return [s for s, no in pairs if not no], [s for s, no in pairs if no]


def optimizers_of(index: Index) -> set[str]:
    """Return the groups that hold optimizers; tf_keras cannot load without metrics."""
    return {
        _group(spec.name).removesuffix("/vars")
        for spec in index.others
        if not _is_metric(spec.name)
    }


def _is_metric(name: str) -> bool:
    return name.startswith("metrics/")


def _group(name: str) -> str:
    return name.rpartition("/")[0]


def _optimizers(specs: Sequence[TensorSpec]) -> set[str]:
    """Return the groups of variables that are an optimizer's, wherever a model keeps it.

    An optimizer counts its steps, a whole number, and then has its learning rate. One whose rate
    is scheduled has none, and is known by its name; one called just so needs no other sign.
    """
    firsts: dict[str, dict[str, TensorSpec]] = {}
    for spec in specs:
        group, _, number = spec.name.rpartition("/")
        if group:
            found = firsts.setdefault(group, {})
            if number in ("0", "1"):
                found[number] = spec
    places = set()
    for group, found in firsts.items():
        parts = group.split("/")
        counts = "0" in found and found["0"].entry.kind == "int" and found["0"].shape == ()
        rate = "1" in found and found["1"].entry.kind == "float" and found["1"].shape == ()
        named = any(
            _OPTIMIZER.fullmatch(part) and (before not in _CONTAINERS)
            for before, part in zip(["", *parts], parts, strict=False)
        )
        exactly = any(
            part == "optimizer" and before not in _CONTAINERS
            for before, part in zip(["", *parts], parts, strict=False)
        )
        if exactly or (counts and (rate or named)):
            places.add(group)
    return places


def block_reader(index: Index) -> hdf5_tensors.BlockReader:
    """Return the reader of chunked datasets."""
    names = {spec.name: spec.name for spec in index.tensors}
    return hdf5_tensors.BlockReader(Source(index.path), lambda file: names)


def patch(
    reference: Checkpoint, specs: Sequence[TensorSpec], keep_others: bool, parts: Sequence[Part]
) -> list[Template]:
    """Write the file anew, for other dtypes, chunked datasets, or without the optimizer."""
    ((_, _, path),) = parts
    index = reference.index
    replaced = {spec.name: spec for spec in specs}
    order = [spec.name for spec in index.tensors]
    drop = () if keep_others else optimizers_of(index)
    return [hdf5_rewrite.rewrite(Source(index.path), Source(path), replaced, order, drop)]


def create(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], parts: Sequence[Part]
) -> list[Template]:
    """Lay out a new file: a name is a path, and the order that of the data."""
    ((_, _, path),) = parts
    others = {spec.name for spec in divided(specs)[1]}
    with hdf5.opened(Source(path), "w") as file:
        hdf5.write_texts(path, file, metadata)
        hdf5.write_names(file, hdf5.NAMES, [spec.name for spec in specs])
        for spec in specs:
            steps = spec.name.split("/")
            bad = any(step in ("", ".", "..") for step in steps) or "\0" in spec.name
            if bad or steps[0] == "model_weights" or spec.name in others:
                raise OutputError(
                    f"{path}: a {_SUFFIX} file cannot hold the name {spec.name!r}",
                    path=path,
                    tensor=spec.name,
                )
            hdf5_rewrite.create_dataset(path, file, spec.name, spec)
    return [hdf5_rewrite.places(Source(path), {spec.name: spec for spec in specs})]
