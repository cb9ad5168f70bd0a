"""Safetensors in one file or in several, which a ``model.safetensors.index.json`` names.

Each shard is a file of `wavg.formats.safetensors`; the index, JSON, maps each tensor to its shard.
Together they are one checkpoint of that format, whose first file is the index.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wavg.checkpoint import Checkpoint, FileIdentity, Index, TensorSpec, identify, reading
from wavg.errors import CheckpointFormatError, OutputError
from wavg.formats import folders, safetensors
from wavg.formats.tables import without_twins
from wavg.templates import Part, Template

__all__ = ["create", "noted", "parts", "patch", "read_index", "renamed"]

_LARGEST_MAP = 10 << 20
_MOST_SHARDS = 100_000
_MAP = "weight_map"


def read_index(path: str, *, opaque_dtype: str | None = None, like: Index | None = None) -> Index:
    """Read a file's header, or an index and the headers of the shards that it names."""
    if not _is_index(path):
        return safetensors.read_index(path, opaque_dtype=opaque_dtype, like=like)
    identity = identify(path)
    raw = _read_bytes(path, identity)
    if like is not None and (twin := _as_like(path, identity, raw, like)) is not None:
        return twin
    mapping = _shards_by_tensor(path, _table(path, raw))
    names = sorted(set(mapping.values()))
    if len(names) > _MOST_SHARDS:
        raise _bad(path, f"it names {len(names):,} shards")
    tensors: dict[str, TensorSpec] = {}
    metadata: dict[str, str] = {}
    files, digest = [identity], hashlib.sha256(raw)
    for number, name in enumerate(names, start=1):
        shard, header = _header(path, name)
        _digest(digest, shard, header)
        index = safetensors.parsed(shard, header)
        for spec in index.tensors:
            assert spec.extent is not None  # every tensor of this format has one
            _check_place(path, spec.name, name, mapping, names, tensors)
            tensors[spec.name] = spec._replace(extent=spec.extent._replace(file=number))
        metadata = {**index.metadata, **metadata}
        files.append(shard)
    for tensor, name in mapping.items():
        if tensor not in tensors:
            raise _bad(path, f"{name} lacks {tensor!r}, which the index says is there", tensor)
    return Index(
        "safetensors",
        tuple(files),
        tuple(tensors.values()),
        metadata=metadata,
        signature=digest.digest(),
    )


def _as_like(path: str, identity: FileIdentity, raw: bytes, like: Index) -> Index | None:
    """Return the index of what has the same index file and the same headers as `like`, unparsed."""
    if not _is_index(like.path) or like.files[0].size != identity.size:
        return None
    files, digest = [identity], hashlib.sha256(raw)
    for old in like.files[1:]:
        try:
            shard, header = _header(path, os.path.basename(old.path))
        except CheckpointFormatError:
            return None  # another layout, or one whose fault the full reading tells
        _digest(digest, shard, header)
        files.append(shard)
    if digest.digest() != like.signature:
        return None
    return dataclasses.replace(like, files=tuple(files))


def _digest(digest: hashlib._Hash, shard: FileIdentity, header: bytes) -> None:
    digest.update(b"%d:%d:" % (shard.size, len(header)))
    digest.update(header)


def _is_index(path: str) -> bool:
    return path.lower().endswith(folders.INDEX)


def _bad(path: str, why: str, tensor: str | None = None) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"{path}: not a sound index of shards: {why}", path=path, tensor=tensor
    )


def _read_bytes(path: str, identity: FileIdentity) -> bytes:
    if identity.size > _LARGEST_MAP:
        raise _bad(path, f"it has {identity.size:,} bytes, more than {_LARGEST_MAP:,}")
    with reading(path), open(path, "rb") as file:
        return file.read(_LARGEST_MAP)


def _table(path: str, raw: bytes) -> dict[str, Any]:
    """Return what an index says; a name that is twice in a table of it is an error."""
    unique = without_twins(functools.partial(_bad, path))
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"it is not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get(_MAP), dict):
        raise _bad(path, f"it has no table {_MAP}")
    return content


def _shards_by_tensor(path: str, content: Mapping[str, Any]) -> dict[str, str]:
    mapping: dict[str, str] = content[_MAP]
    for tensor, name in mapping.items():
        if not isinstance(name, str) or not _is_sibling(name):
            raise _bad(path, f"{name!r}, given for {tensor!r}, is no name of a shard", tensor)
    if not mapping:
        raise _bad(path, "it names no shard")
    return mapping


def _is_sibling(name: str) -> bool:
    plain = name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)
    hidden = name.startswith(".")
    return plain and name.endswith(".safetensors") and not hidden and not set(name) & set("/\\:\0")


def _header(path: str, name: str) -> tuple[FileIdentity, bytes]:
    try:
        return safetensors.read_header(os.path.join(os.path.dirname(path), name))
    except FileNotFoundError:
        raise _bad(path, f"the shard {name} is missing") from None
    except OSError as error:  # a name too long, or not to be read
        raise _bad(path, f"the shard {name} cannot be read ({error.strerror})") from None


def _check_place(
    path: str,
    tensor: str,
    shard: str,
    mapping: Mapping[str, str],
    shards: Sequence[str],
    seen: Mapping[str, TensorSpec],
) -> None:
    """Raise an error unless a tensor is in the shard that the index gives, and only there."""
    if tensor in seen:
        extent = seen[tensor].extent
        other = shards[extent.file - 1] if extent is not None else ""
        raise _bad(path, f"{tensor!r} is in two shards, {other} and {shard}", tensor)
    if tensor not in mapping:
        raise _bad(path, f"{tensor!r} is in {shard}, and the index does not name it", tensor)
    if mapping[tensor] != shard:
        raise _bad(
            path, f"{tensor!r} is in {shard}, where the index says {mapping[tensor]}", tensor
        )


def parts(
    output: str, specs: Sequence[TensorSpec], reference: Index | None, limit: int | None
) -> list[Part]:
    """Return the files of an output of these tensors: one, or an index and its shards.

    They are divided as the `reference` is, or into shards of at most `limit` bytes. A folder, which
    ends with a slash, is named within as the reference's.
    """
    folder, name = os.path.split(output)
    own = os.path.basename(reference.path) if reference is not None else ""
    everything = tuple(spec.name for spec in specs)
    if name and not _is_index(name):
        if limit is not None:
            raise OutputError(
                f"{output} is one file, and has no shards; name a folder, or end the name with "
                f"{folders.INDEX}",
                path=output,
            )
        return [Part(output, everything)]
    groups = [list(specs)]
    if limit is not None:
        groups = divided(specs, limit)
    elif reference is not None and _is_index(own):
        groups = _as_in(reference, specs)
    base = _without_ending(name or own)
    if not name and len(groups) == 1 and (limit is not None or not _is_index(own)):
        return [Part(os.path.join(folder, base + folders.WEIGHTS), everything)]
    names = [f"{base}-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    if not name and limit is None and reference is not None:
        names = [os.path.basename(file.path) for file in reference.files[1:]]
    shards = [
        Part(os.path.join(folder, shard), tuple(spec.name for spec in group))
        for shard, group in zip(names, groups, strict=True)
    ]
    return [Part(os.path.join(folder, base + folders.INDEX)), *shards]


def _without_ending(name: str) -> str:
    ending = folders.INDEX if _is_index(name) else folders.WEIGHTS
    return name[: -len(ending)]


def _as_in(reference: Index, specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    files = {spec.name: spec.extent.file for spec in reference.tensors if spec.extent is not None}
    groups: list[list[TensorSpec]] = [[] for _ in reference.files[1:]]
    for spec in specs:
        groups[files[spec.name] - 1].append(spec)
    return groups


def divided(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Deal tensors out to shards of at most `limit` bytes, by the rule of huggingface_hub.

    A shard ends before the tensor that would be too much for it; a tensor above the limit has a
    shard of its own.

    >>> sizes = {"a": 4, "b": 9, "c": 3, "d": 2}
    >>> specs = [TensorSpec(name, "uint8", (size,)) for name, size in sizes.items()]
    >>> [[spec.name for spec in group] for group in divided(specs, 8)]
    [['b'], ['a', 'c'], ['d']]
    """
    groups: list[list[TensorSpec]] = []
    group: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if spec.nbytes > limit:
            groups.append([spec])
            continue
        if size + spec.nbytes > limit:
            groups.append(group)
            group, size = [], 0
        group.append(spec)
        size += spec.nbytes
    return [*groups, group] if group else groups


def create(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], parts: Sequence[Part]
) -> list[Template]:
    """Lay out new files."""
    table = {spec.name: spec for spec in specs}
    templates = [_map(table, parts, b"", {})] if len(parts) > 1 else []
    for part in parts[len(templates) :]:
        templates += safetensors.create([table[name] for name in part.names], metadata, [part])
    return templates


def patch(
    reference: Checkpoint, specs: Sequence[TensorSpec], keep_others: bool, parts: Sequence[Part]
) -> list[Template]:
    """Lay the reference out anew, for other dtypes or other shards."""
    index = reference.index
    replaced = {spec.name: spec for spec in specs}
    everything = [replaced.get(spec.name, spec) for spec in index.tensors]
    sources = {spec.name: spec.extent for spec in index.tensors}
    templates = []
    for fresh in create(everything, index.metadata, parts):
        carry = [
            (source, target.extent.offset)
            for name, target in fresh.targets.items()
            if name not in replaced and (source := sources[name]) and target.extent
        ]
        targets = {name: spec for name, spec in fresh.targets.items() if name in replaced}
        templates.append(fresh._replace(targets=targets, carry=carry))
    return templates


def renamed(
    reference: Checkpoint, specs: Sequence[TensorSpec], keep_others: bool, parts: Sequence[Part]
) -> Template:
    """Return the index of an output: the reference's, if it has one, for the shards of `parts`."""
    index = reference.index
    raw, content = b"", dict[str, Any]()
    if _is_index(index.path):
        raw = _read_bytes(index.path, index.files[0])
        content = _table(index.path, raw)
    replaced = {spec.name: spec for spec in specs}
    table = {spec.name: replaced.get(spec.name, spec) for spec in index.tensors}
    return _map(table, parts, raw, content)


def _map(
    specs: Mapping[str, TensorSpec], parts: Sequence[Part], raw: bytes, content: Mapping[str, Any]
) -> Template:
    """Return an index for the shards of `parts` after another, if there was one."""
    shards = {name: os.path.basename(part.path) for part in parts for name in part.names}
    new = {**content} if content else {"metadata": {}}
    order = content.get(_MAP) or sorted(shards)
    new[_MAP] = {name: shards[name] for name in order}
    if isinstance(new.get("metadata"), dict):
        total = sum(specs[name].nbytes for name in shards)
        new["metadata"] = {**new["metadata"], "total_size": total}
    text = raw if new == content else (json.dumps(new, indent=2) + "\n").encode()
    if len(text) > _LARGEST_MAP:
        raise OutputError(
            f"{parts[0].path}: {len(shards):,} tensors make an index of {len(text):,} bytes, more "
            f"than {_LARGEST_MAP:,}; write one file",
            path=parts[0].path,
        )
    return Template(len(text), {}, [(0, text)], in_place=True)


def noted(
    templates: Sequence[Template], reference: Checkpoint, key: str
) -> Callable[[str | None], list[Template]]:
    """Return what gives an output's templates with a text in all metadata but the index's."""
    headers = [
        _header_of(template, reference, number) if number or len(templates) == 1 else b""
        for number, template in enumerate(templates)
    ]

    def with_text(text: str | None) -> list[Template]:
        path, pairs = reference.path, zip(templates, headers, strict=True)
        return [safetensors.noted(t, head, key, text, path) if head else t for t, head in pairs]

    return with_text


def _header_of(template: Template, reference: Checkpoint, number: int) -> bytes:
    """Return the header that a file is to have: a new one, the only piece, or the reference's."""
    if template.pieces:
        ((_, data),) = template.pieces
        return data[8:]
    path = reference.index.files[number].path
    with reading(path):
        _, header = safetensors.read_header(path)
    reference.verify_unchanged()
    return header
