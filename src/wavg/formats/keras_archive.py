"""Keras 3's archives, ``.keras``: a zip of a model's configuration and its ``model.weights.h5``.

The weights are stored, not compressed, so that their bytes lie in the archive as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zipfile
from collections.abc import Mapping, Sequence

from wavg.checkpoint import Checkpoint, Index, TensorSpec, identify
from wavg.errors import CheckpointFormatError
from wavg.formats import hdf5, hdf5_rewrite, hdf5_tensors, keras_weights, zips
from wavg.formats.hdf5 import Source
from wavg.templates import Part, Template, mend

__all__ = ["block_reader", "patch", "read_index"]

_WEIGHTS, _CONFIG, _METADATA = "model.weights.h5", "config.json", "metadata.json"
_LARGEST_TEXT = 4 << 20  # of 2,000 layers: some 3 MB


def read_index(path: str, *, opaque_dtype: str | None = None, like: Index | None = None) -> Index:
    """Find the weights in the archive, and index them there."""
    identity = identify(path)
    members = {member.name: member for member in zips.read_members(path)}
    source = _weights(path, members)
    checksums = tuple(m.checksum for m in members.values() if m.method == zips.STORED)
    config, metadata = _texts(path, [members.get(name) for name in (_CONFIG, _METADATA)])
    entries = _entries(path, metadata)
    version = entries.get("keras_version", "3")
    beside = keras_weights.made_of(config, version)
    index = hdf5_tensors.same_layout(source, like, beside)
    if index is None:
        with hdf5.opened(source) as file:
            collector = hdf5_tensors.Collector(source, opaque_dtype)
            index = keras_weights.index_of(source, identity, file, collector, config, version)
    return dataclasses.replace(index, format="keras", checksums=checksums, metadata=entries)


def _weights(path: str, members: Mapping[str, zips.Member]) -> Source:
    """Return where the weights lie."""
    weights = members.get(_WEIGHTS)
    if weights is None:
        names = ", ".join(sorted(members)[:5]) or "nothing"
        raise CheckpointFormatError(
            f"{path}: no {_WEIGHTS} in this archive, which holds {names}", path=path
        )
    if weights.method != zips.STORED:
        raise zips.bad_member(path, _WEIGHTS, "is compressed; Keras stores it. Save it with Keras")
    return Source(path, weights.payload.offset, weights.payload.length)


def _texts(path: str, wanted: Sequence[zips.Member | None]) -> list[bytes]:
    with zips.sound(path), zipfile.ZipFile(path) as archive:
        return [
            b""  # nothing is made of it, and the order is that of writing
            if member is None or member.length > _LARGEST_TEXT
            else archive.read(member.name)
            for member in wanted
        ]


def _entries(path: str, text: bytes) -> dict[str, str]:
    """Return the archive's metadata, as far as it is a table of texts."""
    try:
        table = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        raise zips.bad_member(path, _METADATA, "is not JSON") from None
    if not isinstance(table, dict):
        return {}
    texts = {key: value for key, value in table.items() if isinstance(value, str)}
    if any("\ud800" <= letter <= "\udfff" for text in (*texts, *texts.values()) for letter in text):
        raise zips.bad_member(path, _METADATA, "has half of a surrogate pair, which is no text")
    return texts


def block_reader(index: Index) -> hdf5_tensors.BlockReader:
    """Return the reader of chunked datasets."""
    names = {spec.name: spec.name for spec in index.tensors}
    source = _weights(index.path, {m.name: m for m in zips.read_members(index.path)})
    return hdf5_tensors.BlockReader(source, lambda file: names)


def patch(
    reference: Checkpoint, specs: Sequence[TensorSpec], keep_others: bool, parts: Sequence[Part]
) -> list[Template]:
    """Lay the archive out anew around weights written anew."""
    ((_, _, path),) = parts
    index = reference.index
    members = zips.read_members(index.path)
    source = _weights(index.path, {member.name: member for member in members})
    replaced = {spec.name: spec for spec in specs}
    order = [spec.name for spec in index.tensors]
    drop = () if keep_others else keras_weights.optimizers_of(index)
    place = [member.name for member in members].index(_WEIGHTS)
    size, base = source.length(), -1
    while True:
        layout = zips.lay_out(path, [_renewed(member, size) for member in members])
        weights = layout.members[place]
        if weights.payload.offset == base:
            break
        base = weights.payload.offset  # anew if the weights' size makes their header longer
        skeleton = hdf5_rewrite.rewrite(source, Source(path, base), replaced, order, drop)
        size = skeleton.size
    carry = [
        (old.payload, new.payload.offset)
        for old, new in zip(members, layout.members, strict=True)
        if old.name != _WEIGHTS
    ]
    finish = functools.partial(mend, checksums=[weights.checksum])
    return [Template(layout.size, skeleton.targets, layout.pieces, carry, finish)]


def _renewed(member: zips.Member, size: int) -> zips.NewMember:
    if member.name == _WEIGHTS:
        return zips.NewMember(member.name, size)
    crc = member.checksum.value
    return zips.NewMember(member.name, member.payload.length, member.method, member.length, crc)
