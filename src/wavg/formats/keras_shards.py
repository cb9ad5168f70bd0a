"""Keras 3's sharded weights: ``model.weights.json`` names files ``model_00000.weights.h5`` ….

Each shard is a file of `wavg.formats.keras_weights`; the first file, JSON, maps each layer's
variables to the shards that hold them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from wavg.checkpoint import Checkpoint, FileIdentity, Index, TensorSpec, identify, reading
from wavg.errors import CheckpointFormatError, OutputError
from wavg.formats import hdf5_rewrite, keras_weights
from wavg.formats.hdf5 import Source
from wavg.formats.keras_order import weights_order
from wavg.formats.tables import without_twins
from wavg.templates import Part, Template

__all__ = ["parts", "patch", "read_index", "renamed"]

_LARGEST_MAP = 10 << 20
_MOST_SHARDS = 100_000
_LONGEST_NAME = 255  # bytes that a file system gives to a name
_SUFFIX = ".weights.json"


def read_index(path: str, *, opaque_dtype: str | None = None, like: Index | None = None) -> Index:
    """Read the map, and index every shard that it names."""
    identity = identify(path)
    content = _read_map(path, identity)
    mapping = _shards_by_group(path, content)
    names = list(dict.fromkeys(name for shards in mapping.values() for name in shards))
    if len(names) > _MOST_SHARDS:
        raise _bad(path, f"it names {len(names):,} shards")
    indexes = [
        _shard(path, os.path.join(os.path.dirname(path), name), opaque_dtype) for name in names
    ]
    unseen = {(group, name) for group, shards in mapping.items() for name in shards}
    specs: list[TensorSpec] = []
    for number, (name, index) in enumerate(zip(names, indexes, strict=True), start=1):
        for spec in (*index.tensors, *index.others):
            group = "/" + spec.name.rpartition("/")[0]
            if name not in mapping.get(group, ()):
                raise _bad(path, f"{spec.name} is in {name}, which its map does not say")
            if spec.extent is None:
                raise _bad(path, f"{spec.name} is stored in chunks; in shards none are read")
            unseen.discard((group, name))
            specs.append(spec._replace(extent=spec.extent._replace(file=number)))
    if unseen:
        group, name = min(unseen)
        raise _bad(path, f"{name} lacks {group}, which its map says is there")
    if len({spec.name for spec in specs}) != len(specs):
        raise _bad(path, "a tensor is in two shards")
    # Layers and optimizers may continue in the next shard: they are known only together.
    tensors, others = keras_weights.divided(specs)
    tensors = [tensors[position] for position in weights_order([spec.name for spec in tensors])]
    return Index(
        "keras-shards",
        (identity, *(index.files[0] for index in indexes)),
        tuple(tensors),
        tuple(others),
    )


def _bad(path: str, why: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{path}: not a sound map of shards: {why}", path=path)


def _read_map(path: str, identity: FileIdentity) -> dict[str, Any]:
    if identity.size > _LARGEST_MAP:
        raise _bad(path, f"it has {identity.size:,} bytes, more than {_LARGEST_MAP:,}")
    try:
        with reading(path), open(path, "rb") as file:
            content = json.loads(
                file.read(_LARGEST_MAP).decode("utf-8"),
                object_pairs_hook=without_twins(lambda why, name: _bad(path, why)),
            )
    except CheckpointFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"it is not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        raise _bad(path, "it has no weight_map")
    return content


def _shards_by_group(path: str, content: Mapping[str, Any]) -> dict[str, list[str]]:
    mapping = {}
    for group, given in content["weight_map"].items():
        names = given if isinstance(given, list) else [given]
        for name in names:
            if not isinstance(name, str) or not _is_sibling(name):
                raise _bad(path, f"{name!r} is no name of a shard beside it")
        mapping[group] = names
    if not any(mapping.values()):
        raise _bad(path, "it names no shard")
    return mapping


def _is_sibling(name: str) -> bool:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return False
    plain = length <= _LONGEST_NAME and not set(name) & set("/\\:\0")
    return plain and name.endswith(".h5") and not name.startswith(".")


def _shard(path: str, shard: str, opaque_dtype: str | None) -> Index:
    try:
        return keras_weights.read_index(shard, opaque_dtype=opaque_dtype)
    except FileNotFoundError:
        raise _bad(path, f"the shard {os.path.basename(shard)} is missing") from None


def parts(
    output: str, specs: Sequence[TensorSpec], reference: Index | None, limit: int | None
) -> list[Part]:
    """Return the files of an output: the map, and as many shards as the reference has."""
    if limit is not None:
        raise OutputError(f"{output}: Keras' shards are not divided anew", path=output)
    assert reference is not None  # the table says that one is needed
    base, count = output[: -len(_SUFFIX)], len(reference.files) - 1
    return [Part(output), *(Part(f"{base}_{number:05}.weights.h5") for number in range(count))]


def renamed(
    reference: Checkpoint, specs: Sequence[TensorSpec], keep_others: bool, parts: Sequence[Part]
) -> Template:
    """Return the map of an output in which the reference's shards have the names of `parts`."""
    index = reference.index
    content = _read_map(reference.path, index.files[0])
    names = {
        os.path.basename(old.path): os.path.basename(new.path)
        for old, new in zip(index.files[1:], parts[1:], strict=True)
    }
    drop = set() if keep_others else keras_weights.optimizers_of(index)
    content["weight_map"] = {
        group: [names[name] for name in shards]
        for group, shards in _shards_by_group(reference.path, content).items()
        if not any(f"{group.strip('/')}/".startswith(f"{place}/") for place in drop)
    }
    replaced = {spec.name: spec for spec in specs}
    kept = [*index.tensors, *(index.others if keep_others else ())]
    total = sum(replaced.get(spec.name, spec).nbytes for spec in kept)
    if isinstance(content.get("metadata"), dict):
        content["metadata"]["total_size"] = total
    text = json.dumps(content, indent=4).encode()
    return Template(len(text), {}, [(0, text)])


def patch(
    reference: Checkpoint, specs: Sequence[TensorSpec], keep_others: bool, parts: Sequence[Part]
) -> list[Template]:
    """Write the shards anew, for other dtypes, or without the optimizer."""
    index = reference.index
    replaced = {spec.name: spec for spec in specs}
    drop = set() if keep_others else keras_weights.optimizers_of(index)
    templates = [Template(0, {})]  # the map is `renamed`'s
    for number, (old, new) in enumerate(zip(index.files[1:], parts[1:], strict=True), start=1):
        here = [s.name for s in index.tensors if s.extent is not None and s.extent.file == number]
        chosen = {name: replaced[name] for name in here if name in replaced}
        templates.append(
            hdf5_rewrite.rewrite(Source(old.path), Source(new.temporary), chosen, here, drop)
        )
    return templates
