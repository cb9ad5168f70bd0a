"""NumPy's ``.npz``: a zip of ``.npy`` members. Pickle is never loaded.

Stored members are extents; deflated ones are read through the zip library. Formats NumPy has no
name for (bfloat16, float8) are written as a structure of one unsigned field that bears the name.
"""

from __future__ import annotations

import ast
import collections
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from wavg.checkpoint import Checkpoint, Extent, Index, Template, TensorSpec, identify
from wavg.dtypes import dtype_of, lookup
from wavg.errors import CheckpointFormatError, OutputError, WavgError

__all__ = ["block_reader", "create", "patch", "read_index"]

_LARGEST_RATIO = 100
_COPY_BYTES = 1 << 20
_LOCAL = b"PK\x03\x04"


def read_index(path: str, *, opaque_dtype: str | None = None, like: Index | None = None) -> Index:
    """Read the members' headers, and check the members' checksums, which costs one reading."""
    identity = identify(path)
    specs: list[TensorSpec] = []
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
            names = collections.Counter(info.filename for info in archive.infolist())
            for info in archive.infolist():
                _check_member(path, info, names)
                with archive.open(info) as member:
                    specs.append(_spec(path, raw, member, info, opaque_dtype))
                    while member.read(_COPY_BYTES):  # the zip library compares the checksum
                        pass
    except CheckpointFormatError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointFormatError(
            f"{path}: not a sound .npz file, perhaps truncated: {error}", path=path
        ) from None
    return Index("npz", (identity,), tuple(specs))


def _bad(path: str, name: str, why: str) -> CheckpointFormatError:
    return CheckpointFormatError(f"{path}: member {name!r} {why}", path=path, tensor=name)


def _check_member(path: str, info: zipfile.ZipInfo, names: Mapping[str, int]) -> None:
    name = info.filename
    if names[name] > 1:
        raise _bad(path, name, "appears twice")
    if info.flag_bits & 1:
        raise _bad(path, name, "is encrypted")
    if not name.endswith(".npy"):
        raise _bad(path, name, "is not an .npy array")
    if not _is_safe(name):
        raise _bad(path, name, "has an unsafe name")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _bad(path, name, "is compressed in a way other than deflate")
    if info.file_size > _LARGEST_RATIO * max(info.compress_size, 1):
        raise _bad(path, name, f"would unpack to more than {_LARGEST_RATIO} times its size")


def _is_safe(name: str) -> bool:
    return not (name.startswith("/") or "\\" in name or ".." in name.split("/"))


def _spec(
    path: str,
    raw: IO[bytes],
    member: IO[bytes],
    info: zipfile.ZipInfo,
    opaque_dtype: str | None,
) -> TensorSpec:
    shape, fortran, descr, header = _read_header(path, member, info.filename)
    name = info.filename.removesuffix(".npy")
    dtype = _dtype(path, name, descr, opaque_dtype)
    spec = TensorSpec(name, dtype, shape, None, fortran and len(shape) > 1)
    if header + spec.nbytes != info.file_size:
        raise _bad(
            path,
            name,
            f"is {spec.describe()}, {spec.nbytes} bytes, but has {info.file_size - header}",
        )
    if info.compress_type == zipfile.ZIP_STORED:
        offset = _payload_offset(path, raw, info) + header
        return spec._replace(extent=Extent(0, offset, spec.nbytes))
    return spec


def _payload_offset(path: str, raw: IO[bytes], info: zipfile.ZipInfo) -> int:
    raw.seek(info.header_offset)
    local = raw.read(30)
    if len(local) < 30 or local[:4] != _LOCAL:
        raise _bad(path, info.filename, "has no local header where the directory says")
    name_length, extra_length = struct.unpack_from("<HH", local, 26)
    return info.header_offset + 30 + int(name_length) + int(extra_length)


def _read_header(path: str, member: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, Any, int]:
    magic = member.read(8)
    if magic[:6] != b"\x93NUMPY" or len(magic) < 8 or magic[6] not in (1, 2, 3):
        raise _bad(path, name, "is not an .npy array")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(member.read(width), "little")
    if length > 65536:
        raise _bad(path, name, f"has a header of {length} bytes")
    text = member.read(length)
    try:
        fields = ast.literal_eval(text.decode("utf-8" if magic[6] == 3 else "latin1").strip())
        shape, fortran, descr = fields["shape"], fields["fortran_order"], fields["descr"]
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
        raise _bad(path, name, "has a header that cannot be understood") from None
    sound = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if not sound or not isinstance(fortran, bool):
        raise _bad(path, name, f"has the shape {shape!r}")
    return shape, fortran, descr, 8 + width + length


def _dtype(path: str, name: str, descr: Any, opaque_dtype: str | None) -> str:
    if isinstance(descr, list) and len(descr) == 1 and isinstance(descr[0], tuple):
        label, unsigned = (*descr[0], None)[:2]
        try:
            entry = lookup(str(label))
        except WavgError:
            raise _bad(path, name, f"has the dtype {descr!r}") from None
        if unsigned in (f"<u{entry.itemsize}", f"|u{entry.itemsize}"):
            return entry.name
    if descr in ("|V2", "<V2") and opaque_dtype == "bfloat16":
        return opaque_dtype
    if descr in ("|V2", "<V2"):
        raise _bad(
            path,
            name,
            "holds unnamed two-byte values, as NumPy stores bfloat16; "
            "if they are, say opaque_dtype='bfloat16' (--opaque-dtype bfloat16)",
        )
    try:
        dtype = np.dtype(descr) if isinstance(descr, str) else None
    except TypeError:
        dtype = None
    entry_of = dtype_of(dtype) if dtype is not None else None
    if entry_of is None or (dtype is not None and dtype.byteorder == ">"):
        raise _bad(path, name, f"has the dtype {descr!r}, which is not a plain number")
    return entry_of.name


class _Deflated:
    """Reads compressed members; one stream at a time, for whoever asks."""

    def __init__(self, path: str) -> None:
        self._archive = zipfile.ZipFile(path)
        self._lock = threading.Lock()
        self._name, self._header = "", 0
        self._stream: IO[bytes] | None = None

    def read(self, spec: TensorSpec, start: int, out: npt.NDArray[Any]) -> None:
        with self._lock:
            if self._stream is None or self._name != spec.name:
                if self._stream is not None:
                    self._stream.close()
                self._name, self._stream = spec.name, self._archive.open(f"{spec.name}.npy")
                info = self._archive.getinfo(f"{spec.name}.npy")
                self._header = info.file_size - spec.nbytes
            self._stream.seek(self._header + start * spec.entry.itemsize)
            data = self._stream.read(out.nbytes)
        if len(data) != out.nbytes:
            path = str(self._archive.filename)
            raise CheckpointFormatError(f"{path}: {spec.name} is truncated", path=path)
        out.view(np.uint8)[...] = np.frombuffer(data, np.uint8)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._archive.close()


def block_reader(index: Index) -> _Deflated:
    """Return the reader of compressed members."""
    return _Deflated(index.path)


def patch(
    reference: Checkpoint, specs: Sequence[TensorSpec], keep_others: bool, path: str
) -> Template:
    """Lay the archive out anew, stored: it holds nothing but its arrays."""
    replaced = {spec.name: spec for spec in specs}
    return create([replaced.get(spec.name, spec) for spec in reference.index.tensors], {}, path)


def create(specs: Sequence[TensorSpec], metadata: Mapping[str, str], path: str) -> Template:
    """Write an archive of zeros; when the numbers are in, mend the members' checksums."""
    if metadata:
        raise OutputError(f"{path}: .npz files have no place for metadata", path=path)
    zeros = bytes(_COPY_BYTES)
    headers: dict[str, int] = {}
    with open(path, "r+b") as file, zipfile.ZipFile(file, "w") as archive:
        for spec in specs:
            info = zipfile.ZipInfo(f"{spec.name}.npy")  # dated 1980: the same bytes every time
            sound = info.filename == f"{spec.name}.npy" and _is_safe(info.filename)
            if not sound or info.filename in archive.NameToInfo:
                raise OutputError(f"{path}: .npz cannot hold the name {spec.name!r}", path=path)
            header = _npy_header(spec)
            headers[spec.name] = len(header)
            with archive.open(info, "w", force_zip64=True) as member:
                member.write(header)
                for start in range(0, spec.nbytes, _COPY_BYTES):
                    member.write(zeros[: spec.nbytes - start])
    targets = {}
    with open(path, "rb") as raw, zipfile.ZipFile(raw) as archive:
        for spec, info in zip(specs, archive.infolist(), strict=True):
            offset = _payload_offset(path, raw, info) + headers[spec.name]
            targets[spec.name] = spec._replace(extent=Extent(0, offset, spec.nbytes))
        members = [
            (info.header_offset, _payload_offset(path, raw, info), info.file_size)
            for info in archive.infolist()
        ]
        directory = archive.start_dir
        size = raw.seek(0, os.SEEK_END)
    return Template(
        size, targets, finish=lambda descriptor: _mend_checksums(descriptor, members, directory)
    )


def _mend_checksums(descriptor: int, members: list[tuple[int, int, int]], directory: int) -> None:
    """Write each member's checksum into its local header and into the directory."""
    for header, payload, size in members:
        crc = _checksum(descriptor, payload, size).to_bytes(4, "little")
        os.pwrite(descriptor, crc, header + 14)
        os.pwrite(descriptor, crc, directory + 16)
        lengths = struct.unpack("<HHH", os.pread(descriptor, 6, directory + 28))
        directory += 46 + sum(lengths)


def _npy_header(spec: TensorSpec) -> bytes:
    try:
        descr: Any = np.lib.format.dtype_to_descr(np.dtype(spec.dtype))
        if np.dtype(spec.dtype).kind == "V":
            raise TypeError
    except TypeError:
        descr = [(spec.dtype, f"<u{spec.entry.itemsize}")]
    text = str({"descr": descr, "fortran_order": spec.fortran, "shape": spec.shape})
    width = 2 if len(text) < 60000 else 4
    prefix = b"\x93NUMPY" + bytes([1 if width == 2 else 2, 0])
    text += " " * (-(len(prefix) + width + len(text) + 1) % 64) + "\n"
    return prefix + len(text).to_bytes(width, "little") + text.encode("latin1")


def _checksum(descriptor: int, start: int, length: int) -> int:
    crc = 0
    for position in range(start, start + length, _COPY_BYTES):
        crc = zlib.crc32(
            os.pread(descriptor, min(_COPY_BYTES, start + length - position), position), crc
        )
    return crc
