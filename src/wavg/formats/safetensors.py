"""Safetensors: eight bytes of header length, a JSON header, the data.

The rules checked here are those of the format's reference implementation.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wavg.checkpoint import FileIdentity, Index, TensorSpec, has_array, identify
from wavg.dtypes import DTYPES
from wavg.errors import CheckpointFormatError, OutputError
from wavg.extents import Extent, extent_table, in_order
from wavg.formats.stand_ins import stand_in
from wavg.formats.tables import without_twins
from wavg.templates import Part, Template

__all__ = ["create", "noted", "parsed", "read_header", "read_index"]

_HEADER_LIMIT = 100_000_000
_LONGEST_KEPT = 8 << 20
_LONGEST_REASON = 2_000  # a name or a shape may be as long as a header
_MOST_DIMENSIONS = 64  # NumPy's limit
_BY_CODE = {entry.code: entry for entry in DTYPES if entry.code}
_METADATA = "__metadata__"
_METADATA_FIRST = re.compile(r'\s*\{\s*"__metadata__"\s*:\s*')
_TOO_LARGE = (1 << 63) - 8 - _HEADER_LIMIT  # places in a file are numbers of 64 bits
_new = tuple.__new__  # what a NamedTuple is made with, in half the time that its class takes


def read_index(path: str, *, opaque_dtype: str | None = None, like: Index | None = None) -> Index:
    """Read and check a file's header; the data is not touched."""
    identity, raw = read_header(path)
    # To compare headers takes a tenth of the time of digests; very long ones are not kept for it.
    signature = raw if len(raw) <= _LONGEST_KEPT else hashlib.sha256(raw).digest()
    if like is not None and like.signature == signature and like.files[0].size == identity.size:
        return dataclasses.replace(like, files=(identity,))
    return dataclasses.replace(parsed(identity, raw), signature=signature)


def read_header(path: str) -> tuple[FileIdentity, bytes]:
    """Return what a file is, and its header as it is."""
    identity = identify(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_HEADER_LIMIT, identity.size - 8):
            if instead := stand_in(prefix + file.read(56)):
                raise _bad(path, instead)  # of a shard, say
            raise _bad(
                path,
                f"its header claims {length:,} bytes of the file's {identity.size:,} "
                f"(at most {_HEADER_LIMIT:,} are allowed); it may be truncated",
            )
        return identity, file.read(length)


def parsed(identity: FileIdentity, raw: bytes) -> Index:
    """Return the index that a header is, checked."""
    path, length = identity.path, len(raw)
    header = _parse(path, raw)
    metadata = header.pop(_METADATA, None)
    if metadata is None:  # for the reference, null is none
        metadata = {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) and _is_text(key) and _is_text(value)
        for key, value in metadata.items()
    ):
        raise _bad(path, "its metadata is not a table of texts")
    specs = _specs(path, header, 8 + length)
    _check_tiling(path, specs, 8 + length, identity.size)
    return Index("safetensors", (identity,), specs, metadata=metadata)


def _bad(path: str, why: str, tensor: str | None = None) -> CheckpointFormatError:
    why = why if len(why) <= _LONGEST_REASON else f"{why[:_LONGEST_REASON]} …"
    return CheckpointFormatError(
        f"{path}: not a sound safetensors file: {why}", path=path, tensor=tensor
    )


def _parse(path: str, raw: bytes) -> dict[str, Any]:
    def no_constant(text: str) -> Any:
        raise _bad(path, f"{text} in its header")

    def natural(text: str) -> Any:
        return no_constant(text) if text.startswith("-") else int(text)

    try:
        text = raw.decode("utf-8")
        header = json.loads(text, parse_constant=no_constant)
        # Python takes the last of two equal names, and looking at every pair takes twice as long.
        # Each pair has one colon: if there are no more colons than pairs, none was lost. -0 would
        # be 0, and the reference refuses it.
        if text.count(":") != _expected_pairs(header) or "-0" in text:
            header = json.loads(
                text,
                object_pairs_hook=without_twins(functools.partial(_bad, path)),
                parse_constant=no_constant,
                parse_int=natural,
            )
    except CheckpointFormatError:
        raise
    except UnicodeDecodeError:
        raise _bad(path, "its header is not UTF-8") from None
    except RecursionError:
        raise _bad(path, "its header is nested too deeply") from None
    except ValueError as error:
        raise _bad(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _bad(path, "its header is not a table")
    return header


def _expected_pairs(header: Any) -> int:
    """Return the pairs in a sound header: of every tensor's name, three besides."""
    if not isinstance(header, dict):
        return -1
    if _METADATA not in header:
        return 4 * len(header)
    metadata = header[_METADATA]
    return 4 * len(header) - 3 + len(metadata) if isinstance(metadata, dict) else -1


def _specs(path: str, header: Mapping[str, Any], base: int) -> tuple[TensorSpec, ...]:
    """Return what the header says of every tensor. There may be very many, of few layouts."""
    specs = []
    layouts: dict[tuple[str | int, ...], tuple[str, tuple[int, ...], int]] = {}
    for name, entry in header.items():
        try:
            code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError):
            entry = ()
        if len(entry) != 3:
            raise _bad(path, f"{name!r} lacks dtype, shape or data_offsets, or has more", name)
        if type(code) is not str or code not in _BY_CODE:
            raise _bad(path, f"{name!r} has the unknown dtype {code!r}", name)
        if (
            type(shape) is not list
            or type(offsets) is not list
            or len(offsets) != 2
            or not _are_natural(shape + offsets)
        ):
            raise _bad(path, f"{name!r} has the shape {shape!r} and data_offsets {offsets!r}", name)
        if len(shape) > _MOST_DIMENSIONS or not (name.isascii() or _is_text(name)):
            raise _bad(
                path, f"a tensor has {len(shape)} dimensions or a name that is no text", name
            )
        layout = layouts.get(alike := (code, *shape))
        if layout is None:
            kind = _BY_CODE[code]
            if 0 in shape and not has_array(shape, kind.bits):
                raise _bad(path, f"{name!r} has the shape {shape!r}, which no array can have", name)
            layout = layouts[alike] = kind.name, tuple(shape), math.prod(shape) * kind.bits
        dtype, dimensions, bits = layout
        start, end = offsets
        if 8 * (end - start) != bits:
            size = f"{bits // 8:,}{' and a half' if bits % 8 else ''} bytes"
            raise _bad(path, f"{name!r} is {code}{shape}, {size}, but has {end - start}", name)
        extent = _new(Extent, (0, base + start, end - start))
        specs.append(_new(TensorSpec, (name, dtype, dimensions, extent, False)))
    return tuple(specs)


def _is_text(name: str) -> bool:
    """Whether a text has letters only: JSON's escapes can also give halves of such."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_natural(values: list[Any]) -> bool:
    for value in values:  # noqa: SIM110 - a generator takes twice as long, and there are many
        if type(value) is not int or not 0 <= value < _TOO_LARGE:
            return False
    return True


def _check_tiling(path: str, specs: Sequence[TensorSpec], base: int, size: int) -> None:
    table = extent_table([spec.extent for spec in specs])
    order = in_order(table)
    _, offsets, lengths = table[order].T
    ends = np.append(base, offsets + lengths)
    wrong = np.flatnonzero(offsets != ends[:-1])
    if len(wrong):
        kind = "a hole" if offsets[wrong[0]] > ends[wrong[0]] else "an overlap"
        name = specs[order[wrong[0]]].name
        raise _bad(path, f"there is {kind} in the data before {name!r}", name)
    if ends[-1] != size:
        what = "is truncated" if ends[-1] > size else "has trailing bytes"
        raise _bad(path, f"it {what}: the header describes {ends[-1]:,} bytes, it has {size:,}")


def create(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], parts: Sequence[Part]
) -> list[Template]:
    """Lay out a new file: the header in the order given, the data so that all is aligned."""
    ((path, _, _),) = parts
    offsets, position = {}, 0
    for spec in sorted(specs, key=lambda spec: -spec.entry.bits):
        offsets[spec.name] = position
        position += spec.nbytes
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for spec in specs:
        if spec.name == _METADATA or not spec.entry.code or spec.fortran:
            why = "name" if spec.name == _METADATA else "dtype" if not spec.entry.code else "order"
            raise OutputError(
                f"{path}: safetensors cannot hold {spec.name!r} ({spec.describe()}): its {why}",
                path=path,
                tensor=spec.name,
            )
        header[spec.name] = {
            "dtype": spec.entry.code,
            "shape": list(spec.shape),
            "data_offsets": [offsets[spec.name], offsets[spec.name] + spec.nbytes],
        }
    text = _dumped(header).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    targets = {
        spec.name: spec._replace(extent=Extent(0, base + offsets[spec.name], spec.nbytes))
        for spec in specs
    }
    return [Template(base + position, targets, [(0, _framed(path, text))])]


def _framed(path: str, header: bytes, advice: str = "") -> bytes:
    """Return a header with its length before it."""
    if len(header) > _HEADER_LIMIT:
        raise OutputError(
            f"{path}: safetensors have no room for a header of {len(header):,} bytes, of which "
            f"{_HEADER_LIMIT:,} are allowed{advice}",
            path=path,
        )
    return len(header).to_bytes(8, "little") + header


def noted(template: Template, header: bytes, key: str, text: str | None, path: str) -> Template:
    """Return a template of a file with a text in its metadata; None takes the key out.

    `header` is what the file has without it. What comes behind moves by what the header grows.
    `path` is the file's that it is made after.
    """
    base = 8 + len(header)
    new = _with_metadata(header, key, text)
    shift = 8 + len(new) - base
    carry = []
    for extent, offset in template.carry:
        cut = min(max(base - offset, 0), extent.length)  # the header is not carried over
        if cut < extent.length:
            rest = extent._replace(offset=extent.offset + cut, length=extent.length - cut)
            carry.append((rest, offset + cut + shift))
    pieces = [(offset + shift, data) for offset, data in template.pieces if offset]
    pieces.insert(0, (0, _framed(path, new, "; record='none' (--record none) makes it shorter")))
    return template._replace(
        size=template.size + shift, pieces=pieces, carry=carry, shift=template.shift + shift
    )


def _with_metadata(header: bytes, key: str, text: str | None) -> bytes:
    """Return a header with a text in its metadata, and every tensor's entry as it was."""
    written = header.decode()
    start = _METADATA_FIRST.match(written)
    if start is not None:  # as all writers place it; the rest, which may be long, is left as it is
        metadata, end = json.JSONDecoder().raw_decode(written, start.end())
        before, after = written[: start.end()], written[end:]
    else:
        if _METADATA not in written and "\\" not in written:
            metadata, rest = {}, written[written.index("{") + 1 :]
        else:
            table = json.loads(written)
            metadata, rest = table.pop(_METADATA, {}), _dumped(table)[1:]
        before, after = f'{{"{_METADATA}":', rest if rest.strip() == "}" else f",{rest}"
    metadata = metadata or {}  # it may be null
    if text is None:
        metadata.pop(key, None)
    else:
        # Loaders take a file without metadata for PyTorch's, and refuse metadata without a format.
        metadata = {**(metadata or {"format": "pt"}), key: text}
    new = (before + _dumped(metadata) + after.rstrip()).encode()
    return new + b" " * (-len(new) % 8)


def _dumped(table: Mapping[str, Any]) -> str:
    return json.dumps(table, separators=(",", ":"), ensure_ascii=False)
