"""Keras' legacy HDF5 layout: what ``model.save("x.h5")`` writes in Keras 2, tf_keras and Keras 3.

A group (``model_weights``, or the root of a weights-only file) has ``layer_names``; each layer's
group has ``weight_names``; ``top_level_model_weights`` holds the model's own. A tensor's name is
its path below that group, ``dense/sequential/dense/kernel``: weight names alone repeat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import h5py

from wavg.checkpoint import Checkpoint, Index, TensorSpec, identify
from wavg.errors import CheckpointFormatError, OutputError
from wavg.formats import hdf5, hdf5_rewrite, hdf5_tensors, keras_weights
from wavg.formats.hdf5 import Source
from wavg.formats.keras_order import legacy_order
from wavg.templates import Part, Template

__all__ = ["block_reader", "create", "patch", "read_index"]

_MODEL, _TOP_LEVEL, _OPTIMIZER = "model_weights", "top_level_model_weights", "optimizer_weights"
_NAMES = hdf5.NAMES


def read_index(path: str, *, opaque_dtype: str | None = None, like: Index | None = None) -> Index:
    """Walk the layers' lists of names and find where each dataset's bytes lie.

    An HDF5 file in the layout of Keras 3's weights gets the index of that format.
    """
    identity = identify(path)
    source = Source(path)
    if (index := hdf5_tensors.same_layout(source, like, keras_weights.made_of())) is not None:
        return index
    collector = hdf5_tensors.Collector(source, opaque_dtype)
    with hdf5.opened(source) as file:
        if keras_weights.recognises(path, file):
            return keras_weights.index_of(source, identity, file, collector)
        group = hdf5.member(path, file, _MODEL) if _MODEL in file else file
        if not hdf5.has_names(group, "layer_names"):
            raise CheckpointFormatError(
                f"{path}: an HDF5 file without Keras' layer_names; is it a model saved by Keras?",
                path=path,
            )
        metadata = hdf5.texts(file)
        tensors = _tensors(path, group, collector, {**hdf5.texts(group), **metadata})
        others = []
        if _OPTIMIZER in file:
            others = _layer(path, file, _OPTIMIZER, f"{_OPTIMIZER}/", collector)
    collector.check()
    return Index(
        "keras-h5",
        (identity,),
        tuple(tensors),
        tuple(others),
        metadata,
        hdf5_tensors.signature(source, [*tensors, *others], keras_weights.made_of()),
        reader_bytes=collector.reader_bytes,
    )


def _tensors(
    path: str, group: Any, collector: hdf5_tensors.Collector, texts: Mapping[str, str]
) -> list[TensorSpec]:
    """Return the model's tensors, in the order of ``get_weights()`` as far as that is known."""
    layers = hdf5.names_in(path, group, "layer_names")
    if _TOP_LEVEL in group and _TOP_LEVEL not in layers:
        layers.append(_TOP_LEVEL)
    tensors = [
        spec for layer in layers for spec in _layer(path, group, layer, f"{layer}/", collector)
    ]
    if hdf5.has_names(group, _NAMES):
        pairs = _named(path, group)
        by_path = {spec.name: spec for spec in tensors}
        if sorted(stored for _, stored in pairs) != sorted(by_path):
            raise CheckpointFormatError(f"{path}: {_NAMES} does not list its tensors", path=path)
        tensors = [by_path[stored]._replace(name=name) for name, stored in pairs]
    else:
        config = keras_weights.parsed(texts.get("model_config", ""))
        version = texts.get("keras_version", "2")
        order = legacy_order([spec.name for spec in tensors], config, keras_version=version)
        tensors = [tensors[position] for position in order]
    if len({spec.name for spec in tensors}) != len(tensors):
        raise CheckpointFormatError(f"{path}: a tensor is listed twice", path=path)
    return tensors


def _layer(
    path: str, group: Any, layer: str, prefix: str, collector: hdf5_tensors.Collector
) -> list[TensorSpec]:
    """Return the tensors of one layer in the order of its ``weight_names``."""
    below = hdf5.member(path, group, layer)
    if not isinstance(below, h5py.Group) or not hdf5.has_names(below, "weight_names"):
        raise collector.bad(layer, "has no weight_names")
    return [
        collector.spec(f"{prefix}{name}", hdf5.member(path, below, name))
        for name in hdf5.names_in(path, below, "weight_names")
    ]


def _named(path: str, group: Any) -> list[tuple[str, str]]:
    """Return the names that wavg gave, each with its path below the group."""
    pairs = [text.partition("\n") for text in hdf5.names_in(path, group, _NAMES)]
    return [(name or stored, stored) for stored, _, name in pairs]


def _stored(path: str, index: Index, file: Any) -> dict[str, str]:
    """Say where each tensor is stored."""
    prefix = f"{_MODEL}/" if _MODEL in file else ""
    group = file[_MODEL] if prefix else file
    renamed = dict(_named(path, group)) if hdf5.has_names(group, _NAMES) else {}
    return {spec.name: prefix + renamed.get(spec.name, spec.name) for spec in index.tensors}


def block_reader(index: Index) -> hdf5_tensors.BlockReader:
    """Return the reader of chunked datasets."""
    return hdf5_tensors.BlockReader(
        Source(index.path), lambda file: _stored(index.path, index, file)
    )


def patch(
    reference: Checkpoint, specs: Sequence[TensorSpec], keep_others: bool, parts: Sequence[Part]
) -> list[Template]:
    """Write the file anew, for other dtypes, chunked datasets, or without the optimizer."""
    ((_, _, path),) = parts
    source = Source(reference.path)
    with hdf5.opened(source) as file:
        stored = _stored(reference.path, reference.index, file)
    replaced = {stored[spec.name]: spec for spec in specs}
    drop = () if keep_others else (_OPTIMIZER,)
    return [hdf5_rewrite.rewrite(source, Source(path), replaced, list(stored.values()), drop)]


def create(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], parts: Sequence[Part]
) -> list[Template]:
    """Lay out a weights-only file: the first part of a name is the layer."""
    ((_, _, path),) = parts
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
    with hdf5.opened(Source(path), "w") as file:
        hdf5.write_texts(path, file, metadata)
        hdf5.write_names(file, "layer_names", list(layers))
        for layer, names in [*layers.items(), (_TOP_LEVEL, top)]:
            hdf5.write_names(file.require_group(layer), "weight_names", names)
        for spec in specs:
            hdf5_rewrite.create_dataset(path, file, stored[spec.name], spec)
        natural = [f"{layer}/{name}" for layer, names in layers.items() for name in names]
        natural += [f"{_TOP_LEVEL}/{name}" for name in top]
        if natural != [spec.name for spec in specs]:
            hdf5.write_names(file, _NAMES, [f"{stored[spec.name]}\n{spec.name}" for spec in specs])
    return [hdf5_rewrite.places(Source(path), {stored[spec.name]: spec for spec in specs})]


def _check_name(path: str, name: str) -> None:
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name or "\n" in name:
        raise OutputError(f"{path}: HDF5 cannot hold the name {name!r}", path=path, tensor=name)
    layer, _, _ = name.partition("/")
    if layer in (_MODEL, _OPTIMIZER):
        raise OutputError(
            f"{path}: Keras' .h5 files cannot hold the name {name!r}: {layer} stands for something "
            "else in them",
            path=path,
            tensor=name,
        )
