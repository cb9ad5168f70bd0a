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
from wavg.dtypes import DType, dtype_of, lookup
from wavg.errors import OutputError, WavgError
from wavg.extents import Extent
from wavg.formats import zips
from wavg.templates import Part, Template, mend

__all__ = ["block_reader", "create", "patch", "read_index"]

# The first bytes of an array's file: how wide its header's length is, and its text's encoding.
_MAGIC = {
    b"\x93NUMPY\1\0": (2, "latin1"),
    b"\x93NUMPY\2\0": (4, "latin1"),
    b"\x93NUMPY\3\0": (4, "utf-8"),
}
_LONGEST_HEADER = 10_000  # as in NumPy
_PLAIN = re.compile(r"[<>|=]?[biufc?]\d{0,2}", re.ASCII)


def read_index(path: str, *, opaque_dtype: str | None = None, like: Index | None = None) -> Index:
    """Read the members' headers."""
    identity = identify(path)
    members = zips.read_members(path)
    if (name := _ambiguous([member.name for member in members])) is not None:
        raise zips.bad_member(path, name, f"is what NumPy gives for the array in {name}.npy, too")
    specs: list[TensorSpec] = []
    with zips.sound(path), zipfile.ZipFile(path) as archive:
        for member in members:
            if not member.name.endswith(".npy"):
                raise zips.bad_member(path, member.name, "is not an .npy array")
            with archive.open(member.name) as content:
                specs.append(_spec(path, content, member, opaque_dtype))
    stored = [member.checksum for member in members if member.method == zips.STORED]
    return Index("npz", (identity,), tuple(specs), checksums=tuple(stored))


def _ambiguous(members: Sequence[str]) -> str | None:
    """Return a member whose name is that of another's array: NumPy gives the one for the other."""
    found = set(members)
    return next((name for name in members if f"{name}.npy" in found), None)


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
    if magic not in _MAGIC:
        raise zips.bad_member(path, name, "is not an .npy array")
    width, encoding = _MAGIC[magic]
    length = int.from_bytes(member.read(width), "little")
    if length > _LONGEST_HEADER:
        raise zips.bad_member(path, name, f"has a header of {length:,} bytes")
    text = member.read(length)
    try:
        fields = ast.literal_eval(text.decode(encoding))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        fields = None
    if not isinstance(fields, dict) or fields.keys() != {"shape", "fortran_order", "descr"}:
        raise zips.bad_member(path, name, "has a header that cannot be understood")
    shape, fortran, descr = fields["shape"], fields["fortran_order"], fields["descr"]
    sound = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if not sound or not isinstance(fortran, bool):
        raise zips.bad_member(path, name, f"has the shape {shape!r}")
    return shape, fortran, descr, 8 + width + length


def _dtype(path: str, name: str, descr: Any, opaque_dtype: str | None) -> str:
    pair = descr[0] if isinstance(descr, list) and len(descr) == 1 else None
    if isinstance(pair, tuple) and len(pair) == 2:  # a third would be the shape of every number
        label, unsigned = pair
        try:
            entry = lookup(str(label))
        except WavgError:
            raise zips.bad_member(path, name, f"has the dtype {descr!r}") from None
        if entry.bits % 8 == 0 and unsigned in (f"<u{entry.itemsize}", f"|u{entry.itemsize}"):
            return entry.name
    if descr in ("|V2", "<V2") and opaque_dtype == "bfloat16":
        return opaque_dtype
    if descr in ("|V2", "<V2"):
        raise zips.bad_member(
            path,
            name,
            "holds unnamed two-byte values, as NumPy stores bfloat16; "
            "if they are, say opaque_dtype='bfloat16' (--opaque-dtype bfloat16)",
        )
    entry_of = _plain(descr)
    if entry_of is None:
        raise zips.bad_member(path, name, f"has the dtype {descr!r}, which is not a plain number")
    return entry_of.name


def _plain(descr: Any) -> DType | None:
    """Return what plain numbers, in this machine's order, a text stands for."""
    if not isinstance(descr, str) or not _PLAIN.fullmatch(descr):
        return None  # of other texts NumPy's parser makes structures, warnings and any error
    try:
        dtype = np.dtype(descr)
    except TypeError:
        return None
    return None if dtype.byteorder == ">" else dtype_of(dtype)


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
    if (name := _ambiguous([f"{spec.name}.npy" for spec in specs])) is not None:
        why = f"in an .npz NumPy would give the array {name.removesuffix('.npy')!r} for {name!r}"
        raise OutputError(f"{path}: {why}; rename one of them", path=path)
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
    if spec.entry.bits % 8:
        raise OutputError(
            f"{path}: .npz files cannot hold {spec.name!r} ({spec.describe()}); choose another "
            "format",
            path=path,
            tensor=spec.name,
        )
    dtype = spec.entry.numpy
    own = dtype.isbuiltin == 1  # NumPy's; others have no text that it understands
    descr = dtype.str if own else [(spec.dtype, f"<u{dtype.itemsize}")]
    text = str({"descr": descr, "fortran_order": spec.fortran, "shape": spec.shape})
    text += " " * (-(11 + len(text)) % 64) + "\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode("latin1")
