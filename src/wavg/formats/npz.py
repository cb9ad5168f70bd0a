"""NumPy's ``.npz``: a zip of ``.npy`` members. Pickle is never loaded.

Stored members are extents; deflated ones are read through the zip library. Formats NumPy has no
name for (bfloat16, float8) are written as a structure of one unsigned field that bears the name.
"""

from __future__ import annotations

import ast
import re
import threading
import zipfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from wavg.checkpoint import Checkpoint, Index, TensorSpec, has_array, identify
from wavg.dtypes import DTYPES
from wavg.errors import OutputError
from wavg.extents import Extent
from wavg.formats import zips
from wavg.templates import Part, Template, mend

__all__ = ["block_reader", "create", "patch", "read_index"]

_LONGEST_HEADER = 1 << 16
# NumPy's own numbers, by the codes that headers have for them: "f4", "u1". The others are named
# beside a code of as many bits.
_BY_CODE = {
    f"{entry.name[0]}{entry.itemsize}": entry.name
    for entry in DTYPES
    if re.fullmatch(r"(float|complex|int|uint|bool)\d*", entry.name)
}
_NAMED = {entry.name: f"u{entry.itemsize}" for entry in DTYPES if entry.bits % 8 == 0}


def read_index(path: str, *, opaque_dtype: str | None = None, like: Index | None = None) -> Index:
    """Read the members' headers."""
    identity = identify(path)
    members = zips.read_members(path)
    specs: list[TensorSpec] = []
    with zips.sound(path), zipfile.ZipFile(path) as archive:
        for member in members:
            if not member.name.endswith(".npy"):
                raise zips.bad_member(path, member.name, "is not an .npy array")
            with archive.open(member.name) as content:
                specs.append(_spec(path, content, member, opaque_dtype))
    stored = [member.checksum for member in members if member.method == zips.STORED]
    return Index("npz", (identity,), tuple(specs), checksums=tuple(stored))


def _spec(
    path: str, content: IO[bytes], member: zips.Member, opaque_dtype: str | None
) -> TensorSpec:
    shape, fortran, descr, header = _read_header(path, content, member.name)
    name = member.name.removesuffix(".npy")
    dtype = _dtype(path, name, descr, opaque_dtype)
    spec = TensorSpec(name, dtype, shape, None, fortran and len(shape) > 1)
    if not has_array(shape, spec.entry.bits):
        raise zips.bad_member(path, name, f"has the shape {shape!r}, which no array can have")
    if header + spec.nbytes != member.length:
        raise zips.bad_member(
            path,
            name,
            f"is {spec.describe()}, {spec.nbytes} bytes, but has {member.length - header}",
        )
    if member.method == zips.STORED:
        return spec._replace(extent=Extent(0, member.payload.offset + header, spec.nbytes))
    return spec


def _read_header(path: str, member: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, Any, int]:
    magic = member.read(8)
    if magic[:6] != b"\x93NUMPY" or len(magic) < 8 or magic[6] not in (1, 2, 3):
        raise zips.bad_member(path, name, "is not an .npy array")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(member.read(width), "little")
    if length > _LONGEST_HEADER:
        raise zips.bad_member(
            path, name, f"has a header of {length:,} bytes, more than {_LONGEST_HEADER:,}"
        )
    text = member.read(length)
    try:
        fields = ast.literal_eval(text.decode("utf-8" if magic[6] == 3 else "latin1").strip())
        shape, fortran, descr = fields["shape"], fields["fortran_order"], fields["descr"]
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
        raise zips.bad_member(path, name, "has a header that cannot be understood") from None
    sound = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if not sound or not isinstance(fortran, bool):
        raise zips.bad_member(path, name, f"has the shape {shape!r}")
    return shape, fortran, descr, 8 + width + length


def _dtype(path: str, name: str, descr: Any, opaque_dtype: str | None) -> str:
    opaque = descr in ("|V2", "<V2")
    if opaque and opaque_dtype is None:
        raise zips.bad_member(
            path,
            name,
            "holds unnamed two-byte values, as NumPy stores bfloat16; "
            "if they are, say opaque_dtype='bfloat16' (--opaque-dtype bfloat16)",
        )
    dtype = opaque_dtype if opaque else _named(descr)
    if dtype is None:
        raise zips.bad_member(path, name, f"has the dtype {descr!r}, which is not a plain number")
    return dtype


def _named(descr: Any) -> str | None:
    """Return the number format that a header names; NumPy itself reads a small language there."""
    match descr:
        case str(code):
            return _BY_CODE.get(code.lstrip("<|="))
        case [(str(label), str(code))]:
            return label if _NAMED.get(label) == code.lstrip("<|") else None
    return None


class _Deflated:
    """Reads compressed members; one stream at a time, for whoever asks."""

    def __init__(self, path: str) -> None:
        self._path = path
        with zips.sound(path):
            self._archive = zipfile.ZipFile(path)
        self._lock = threading.Lock()
        self._name, self._header = "", 0
        self._stream: IO[bytes] | None = None

    def read(self, spec: TensorSpec, start: int, out: npt.NDArray[Any]) -> None:
        with self._lock, zips.sound(self._path):
            if self._stream is None or self._name != spec.name:
                if self._stream is not None:
                    self._stream.close()
                self._name, self._stream = spec.name, self._archive.open(f"{spec.name}.npy")
                info = self._archive.getinfo(f"{spec.name}.npy")
                self._header = info.file_size - spec.nbytes
            self._stream.seek(self._header + start * spec.entry.itemsize)
            data = self._stream.read(out.nbytes)
        if len(data) != out.nbytes:
            raise zips.bad_member(
                self._path, spec.name, "unpacks to fewer bytes than the archive says it has"
            )
        out.view(np.uint8)[...] = np.frombuffer(data, np.uint8)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._archive.close()


def block_reader(index: Index) -> _Deflated:
    """Return the reader of compressed members."""
    return _Deflated(index.path)


def patch(
    reference: Checkpoint, specs: Sequence[TensorSpec], keep_others: bool, parts: Sequence[Part]
) -> list[Template]:
    """Lay the archive out anew, stored: it holds nothing but its arrays."""
    replaced = {spec.name: spec for spec in specs}
    return create([replaced.get(spec.name, spec) for spec in reference.index.tensors], {}, parts)


def create(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], parts: Sequence[Part]
) -> list[Template]:
    """Lay out a new archive; when the numbers are in, mend the members' checksums."""
    ((_, _, path),) = parts
    if metadata:
        raise OutputError(f"{path}: .npz files have no place for metadata", path=path)
    headers = [_npy_header(path, spec) for spec in specs]
    layout = zips.lay_out(
        path,
        [
            zips.NewMember(f"{spec.name}.npy", len(header) + spec.nbytes)
            for spec, header in zip(specs, headers, strict=True)
        ],
    )
    pieces, targets = layout.pieces, {}
    for spec, header, member in zip(specs, headers, layout.members, strict=True):
        pieces.append((member.payload.offset, header))
        extent = Extent(0, member.payload.offset + len(header), spec.nbytes)
        targets[spec.name] = spec._replace(extent=extent)
    checksums = [member.checksum for member in layout.members]
    return [Template(layout.size, targets, pieces, finish=lambda output: mend(output, checksums))]


def _npy_header(path: str, spec: TensorSpec) -> bytes:
    size, dtype = spec.entry.itemsize, spec.dtype
    if dtype not in _NAMED:
        raise OutputError(
            f"{path}: .npz files cannot hold {spec.name!r} ({spec.describe()}); choose another "
            "format",
            path=path,
            tensor=spec.name,
        )
    codes = [code for code, name in _BY_CODE.items() if name == dtype]
    descr = f"{'<' if size > 1 else '|'}{codes[0]}" if codes else [(dtype, f"<u{size}")]
    text = str({"descr": descr, "fortran_order": spec.fortran, "shape": spec.shape})
    text += " " * (-(11 + len(text)) % 64) + "\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode("latin1")
