"""Zip archives as byte ranges: where members lie, and how an archive of stored members is laid out.

Archives are trusted in nothing. What they hold is never extracted, only read in place.
"""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from wavg.checkpoint import Checksum
from wavg.errors import CheckpointFormatError, OutputError, WavgError
from wavg.extents import Extent
from wavg.positional import read_at

__all__ = ["Layout", "Member", "NewMember", "bad_member", "is_safe", "lay_out", "read_members"]

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_LARGEST_RATIO = 100
_COPY_BYTES = 1 << 20
_MOST_MEMBERS, _LARGEST_DIRECTORY = 1_000_000, 64 << 20
_STREAMED, _UTF8 = 8, 0x800
_ENCRYPTED, _PATCHED = 0x41, 0x20  # of old and of strong encryption; a patch to another file
_WIDE = 0xFFFFFFFF
_CHECKSUM_IN_LOCAL, _CHECKSUM_IN_CENTRAL = 14, 16
_DOS_EPOCH = 0x00210000  # 1980-01-01: the same bytes every time


class Member(NamedTuple):
    """A member of an archive: its bytes as stored, and where its checksum is kept."""

    name: str
    payload: Extent
    method: int
    length: int
    checksum: Checksum


class NewMember(NamedTuple):
    """A member of an archive to be laid out; `size` is that of its bytes as stored."""

    name: str
    size: int
    method: int = STORED
    length: int | None = None
    crc: int = 0


class Layout(NamedTuple):
    """An archive without its members' bytes: headers with their offsets, where payloads go."""

    size: int
    pieces: list[tuple[int, bytes]]
    members: list[Member]


def bad_member(path: str, name: str, why: str) -> CheckpointFormatError:
    """Return the error of a member."""
    return CheckpointFormatError(f"{path}: member {name!r} {why}", path=path, tensor=name)


def is_safe(name: str) -> bool:
    """Whether a member's name stays within the archive wherever that is unpacked."""
    unsafe = name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/")
    return not unsafe and re.match("[A-Za-z]:", name) is None


def read_members(path: str) -> list[Member]:
    """Read an archive's directory and check what it says of its members.

    Checksums of stored members are left to `wavg.digests`; compressed ones are
    unpacked once, block by block, to compare theirs.

    Raises
    ------
    CheckpointFormatError
        No sound archive; duplicate, encrypted or unsafe names, overlapping members, other
        compressions than deflate, contents that would unpack to more than 100 times their size.
    """
    with sound(path), _Bounded(path) as raw, zipfile.ZipFile(raw) as archive:
        infos = archive.infolist()
        names = collections.Counter(info.filename for info in infos)
        members = []
        entry = archive.start_dir
        descriptor = raw.fileno()
        spans = [(entry, os.fstat(descriptor).st_size, "the directory")]
        for info in infos:
            _check(path, info, names)
            member = _member(path, descriptor, info, entry)
            members.append(member)
            end = member.payload.offset + member.payload.length
            spans.append((info.header_offset, end, f"member {member.name!r}"))
            if info.compress_type != STORED:
                with archive.open(info) as content:
                    while content.read(_COPY_BYTES):
                        pass  # the zip library compares the checksum
            entry += 46 + sum(struct.unpack("<HHH", read_at(descriptor, 6, entry + 28)))
        _refuse_overlap(path, spans)
    return members


class _Bounded(io.FileIO):
    """An archive's file for the zip library, which reads a directory at once, however large."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return so many bytes, unless that is more than a directory may have."""
        if size is not None and size > _LARGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory claims {size:,} bytes")
        data = super().read(size) or b""
        if data.count(b"PK\x01\x02") > _MOST_MEMBERS:
            raise zipfile.BadZipFile(f"its directory has more than {_MOST_MEMBERS:,} members")
        return data


@contextlib.contextmanager
def sound(path: str) -> Iterator[None]:
    """Turn what the zip library says of an archive it cannot read into an error that names it."""
    try:
        yield
    except WavgError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        OverflowError,
        ValueError,
        RuntimeError,
        struct.error,
        NotImplementedError,
    ) as error:
        kind = os.path.splitext(path)[1] or "zip"
        raise CheckpointFormatError(
            f"{path}: not a sound {kind} file, perhaps truncated: {error}", path=path
        ) from None


def _check(path: str, info: zipfile.ZipInfo, names: Mapping[str, int]) -> None:
    name = info.filename
    if names[name] > 1:
        raise bad_member(path, name, "appears twice")
    if info.flag_bits & _ENCRYPTED:
        raise bad_member(path, name, "is encrypted")
    if info.flag_bits & _PATCHED:
        raise bad_member(path, name, "is a patch to data that are not there")
    if not is_safe(name) or not is_safe(info.orig_filename):
        raise bad_member(path, name, "has an unsafe name")
    if info.compress_type not in (STORED, DEFLATED):
        raise bad_member(path, name, "is compressed in a way other than deflate")
    if info.file_size > _LARGEST_RATIO * max(info.compress_size, 1):
        raise bad_member(
            path,
            name,
            f"would unpack to more than {_LARGEST_RATIO} times its size, as what is made to fill a "
            "memory does; if it is sound (all of it one number), save it without compression",
        )
    if info.compress_type == STORED and info.file_size != info.compress_size:
        raise bad_member(path, name, "is stored in a size that is not its own")


def _member(path: str, descriptor: int, info: zipfile.ZipInfo, entry: int) -> Member:
    local = read_at(descriptor, 30, info.header_offset)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise bad_member(path, info.filename, "has no local header where the directory says")
    name_length, extra_length = struct.unpack_from("<HH", local, 26)
    stored_name = read_at(descriptor, name_length, info.header_offset + 30)
    encoding = "utf-8" if info.flag_bits & _UTF8 else "cp437"
    if stored_name.decode(encoding, "replace") != info.orig_filename:
        raise bad_member(
            path, info.filename, f"has another name in its own header: {stored_name!r}"
        )
    payload = info.header_offset + 30 + int(name_length) + int(extra_length)
    if payload + info.compress_size > os.fstat(descriptor).st_size:
        raise bad_member(path, info.filename, "reaches beyond the end of the file")
    streamed = (info.flag_bits | struct.unpack_from("<H", local, 6)[0]) & _STREAMED
    places = (info.header_offset + _CHECKSUM_IN_LOCAL, entry + _CHECKSUM_IN_CENTRAL)
    if not streamed and local[14:18] != info.CRC.to_bytes(4, "little"):
        raise bad_member(path, info.filename, "has two CRC-32 that differ")
    extent = Extent(0, payload, info.compress_size)
    checksum = Checksum(extent, info.CRC, f"member {info.filename!r}", () if streamed else places)
    return Member(info.filename, extent, info.compress_type, info.file_size, checksum)


def _refuse_overlap(path: str, spans: Iterable[tuple[int, int, str]]) -> None:
    """Raise an error if headers with their bytes overlap: new numbers would overwrite the next."""
    for (_, end, name), (start, _, behind) in itertools.pairwise(sorted(spans)):
        if end > start:
            raise CheckpointFormatError(f"{path}: {name} overlaps {behind}", path=path)


def lay_out(path: str, members: Iterable[NewMember]) -> Layout:
    """Lay out an archive; members' checksums are those given, or to be mended when it is written.

    Raises
    ------
    OutputError
        A name that an archive cannot hold, or one given twice.
    """
    pieces: list[tuple[int, bytes]] = []
    placed: list[Member] = []
    central: list[bytes] = []
    headers: list[int] = []
    seen: set[str] = set()
    position = 0
    for member in members:
        name = member.name.encode()
        if not is_safe(member.name) or member.name in seen or len(name) > 0xFFFF:
            raise OutputError(f"{path}: a zip cannot hold the name {member.name!r}", path=path)
        seen.add(member.name)
        length = member.size if member.length is None else member.length
        flags = 0 if member.name.isascii() else _UTF8
        wide = max(length, member.size) >= _WIDE
        extra = struct.pack("<HHQQ", 1, 16, length, member.size) if wide else b""
        sizes = (_WIDE, _WIDE) if wide else (member.size, length)
        common = (flags, member.method, _DOS_EPOCH, member.crc, *sizes, len(name))
        local = struct.pack("<4sHHHIIIIHH", b"PK\x03\x04", 45, *common, len(extra)) + name + extra
        header, far = position, position >= _WIDE
        if far:
            values = (length, member.size, header) if wide else (header,)
            extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)
        entry = struct.pack("<4sHHHHIIIIHH", b"PK\x01\x02", 45, 45, *common, len(extra))
        entry += struct.pack("<HHHII", 0, 0, 0, 0o600 << 16, _WIDE if far else header)
        central.append(entry + name + extra)
        headers.append(header)
        pieces.append((header, local))
        extent = Extent(0, header + len(local), member.size)
        checksum = Checksum(extent, member.crc, f"member {member.name!r}")
        placed.append(Member(member.name, extent, member.method, length, checksum))
        position = extent.offset + extent.length
    directory = b"".join(central)
    pieces.append((position, directory + _end(len(central), len(directory), position)))
    entry_at = position
    for index, entry in enumerate(central):
        places = headers[index] + _CHECKSUM_IN_LOCAL, entry_at + _CHECKSUM_IN_CENTRAL
        member_ = placed[index]
        placed[index] = member_._replace(checksum=member_.checksum._replace(places=places))
        entry_at += len(entry)
    return Layout(position + len(pieces[-1][1]), pieces, placed)


def _end(count: int, size: int, start: int) -> bytes:
    """Return what stands behind the directory."""
    wide = b""
    if count > 0xFFFE or size >= _WIDE or start >= _WIDE:
        wide = struct.pack(
            "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start
        )
        wide += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
    shown = min(count, 0xFFFF), min(count, 0xFFFF), min(size, _WIDE), min(start, _WIDE)
    if wide:
        shown = 0xFFFF, 0xFFFF, _WIDE, _WIDE
    return wide + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, *shown, 0)
