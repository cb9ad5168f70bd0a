"""A zip archive taken apart into its records, and put together as they say, right or wrong.

What a record says of the others (lengths, places, counts) is written as it ought to be unless it
was changed. Used by zip_mutants.py.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
END64, LOCATOR, DESCRIPTOR = b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"
WIDE = 0xFFFFFFFF
STREAMED, UTF8 = 8, 0x800
FAR = -1  # for a place that is said in 64 bits

# Fields that a member's own header and its entry in the directory have in common.
COMMON = ("version", "flags", "method", "date", "crc", "packed", "size")
ENTRY = ("made_by", *COMMON)
REST = ("disk", "internal", "external", "offset")  # of the entry, behind lengths
LAST = ("disk", "start_disk", "here", "count", "length", "start")  # of the end


@dataclass
class Member:
    """A member: fields of its own header and of the directory's entry, and its bytes as stored.

    A field that is None, and a length that is not in `lengths`, is written as it ought to be.
    """

    own: dict[str, int | None]
    entry: dict[str, int | None]
    name: bytes
    entry_name: bytes
    extra: bytes = b""
    entry_extra: bytes = b""
    comment: bytes = b""
    data: bytes = b""
    behind: bytes = b""  # a data descriptor, or what does not belong there
    lengths: dict[str, int] = field(default_factory=dict)
    lies_at: int | None = None  # the member whose header the directory names instead, or FAR


@dataclass
class Archive:
    """An archive: members as they lie in the file, the order of the directory, and the end."""

    members: list[Member]
    order: list[int]
    before: bytes = b""
    between: bytes = b""  # in front of the directory
    end: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(LAST))
    wide: dict[str, int | None] | None = None  # the end of 64 bits, with its locator
    comment: bytes = b""
    comment_length: int | None = None
    behind: bytes = b""


def taken_apart(content: bytes) -> Archive:
    """Take a sound archive apart."""
    at = content.rindex(END)
    values = struct.unpack_from("<HHHHII", content, at + 4)
    count, start, wide = values[3], values[5], None
    if content[at - 20 : at - 16] == LOCATOR:
        found = struct.unpack_from("<QHHIIQQQQ", content, at - 76 + 4)
        wide = dict.fromkeys(("size", *LAST, "where", "disks"))
        count, start = found[6], found[8]
    members, place = [], start
    for _ in range(count):
        head = struct.unpack_from("<HHHHIIIIHHHHHII", content, place + 4)
        names, extras, comments = head[8:11]
        entry: dict[str, int | None] = dict(zip(ENTRY, head[:8], strict=True))
        entry |= dict(zip(REST, head[11:], strict=True))
        own_at, entry["offset"] = head[14], None
        own = struct.unpack_from("<HHHIIIIHH", content, own_at + 4)
        name_end = place + 46 + names
        data_at = own_at + 30 + own[7] + own[8]
        members.append(
            Member(
                dict(zip(COMMON, own[:7], strict=True)),
                entry,
                content[own_at + 30 : own_at + 30 + own[7]],
                content[place + 46 : name_end],
                content[own_at + 30 + own[7] : data_at],
                content[name_end : name_end + extras],
                content[name_end + extras : name_end + extras + comments],
                content[data_at : data_at + head[6]],
                lengths={"lies at": own_at, "ends at": data_at + head[6]},
            )
        )
        place = name_end + extras + comments
    starts = sorted([*(member.lengths["lies at"] for member in members), start])
    for member in members:
        end = member.lengths["ends at"]
        member.behind = content[end : next(place for place in starts if place >= end)]
        member.lengths = {}
    return Archive(members, list(range(count)), wide=wide, comment=content[at + 22 :])


def packed(form: str, values: Sequence[int]) -> bytes:
    """Pack integers, each cut to the width of its field."""
    widths = {"H": 16, "I": 32, "Q": 64}
    cut = [value % (1 << widths[code]) for code, value in zip(form, values, strict=True)]
    return struct.pack(f"<{form}", *cut)


def put_together(archive: Archive) -> bytes:
    """Write an archive as its records say."""
    out = bytearray(archive.before)
    places = []
    for member in archive.members:
        places.append(len(out))
        own = member.own
        out += LOCAL + packed("HHHIIII", [own[name] for name in COMMON])
        out += packed("HH", [member.lengths.get("name", len(member.name)),
                             member.lengths.get("extra", len(member.extra))])  # fmt: skip
        out += member.name + member.extra + member.data + member.behind
    out += archive.between
    start = len(out)
    for number in archive.order:
        member, lengths = archive.members[number], archive.members[number].lengths
        entry = member.entry
        lies_at = number if member.lies_at is None else member.lies_at
        where = WIDE if lies_at == FAR else places[lies_at] + (entry["offset"] or 0)
        out += CENTRAL + packed("HHHHIIII", [entry[name] for name in ENTRY])
        out += packed("HHH", [lengths.get("entry name", len(member.entry_name)),
                              lengths.get("entry extra", len(member.entry_extra)),
                              lengths.get("comment", len(member.comment))])  # fmt: skip
        out += packed("HHII", [*(entry[name] for name in REST[:3]), where])
        out += member.entry_name + member.entry_extra + member.comment
    length, at, count = len(out) - start, len(out), len(archive.order)
    right = dict(zip(LAST, (0, 0, count, count, length, start), strict=True))
    if archive.wide is not None:
        whole = {"size": 44, **right, "where": at, "disks": 1}
        values = {name: whole[name] + (archive.wide[name] or 0) for name in whole}
        out += END64 + packed("QHH", [values["size"], 45, 45])
        out += packed("IIQQQQ", [values[name] for name in LAST])
        out += LOCATOR + packed("IQI", [values["disk"], values["where"], values["disks"]])
        right |= {"here": 0xFFFF, "count": 0xFFFF, "length": WIDE, "start": WIDE}
    shown = [right[name] + (archive.end[name] or 0) for name in LAST]
    length = len(archive.comment) if archive.comment_length is None else archive.comment_length
    out += END + packed("HHHHIIH", [*shown, length]) + archive.comment + archive.behind
    return bytes(out)


def plain_bytes(member: Member) -> bytes:
    """Return a member's bytes unpacked, as far as that goes."""
    if member.entry["method"] == 8:
        try:
            return zlib.decompressobj(-15).decompress(member.data, 1 << 20)
        except zlib.error:
            return b""
    return member.data


def deflated(data: bytes, level: int = 6) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def settle(member: Member, content: bytes | None = None) -> None:
    """Make a member's sizes and CRC right for its bytes, or for new ones."""
    if content is None:
        content = plain_bytes(member)
    elif member.entry["method"] == 8:
        member.data = deflated(content)
    else:
        member.data = content
    right = {"crc": zlib.crc32(content), "packed": len(member.data), "size": len(content)}
    member.entry |= right
    if not (member.own["flags"] or 0) & STREAMED:
        member.own |= right
    elif len(member.behind) == 16:
        member.behind = DESCRIPTOR + packed("III", list(right.values()))
    if b"\x01\0\x10\0" in member.extra:  # sizes in 64 bits
        member.extra = packed("HHQQ", [1, 16, right["size"], right["packed"]])


NUMBERS = (
    *(0, 1, 2, 4, 8, 12, 20, 45, 46, 63, 64, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, 0x10000),
    *(0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, WIDE, 1 << 20, 1 << 24),
)
WIDER = (*NUMBERS, 1 << 32, 1 << 40, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def some_number(rng: random.Random, value: int | None, numbers: Sequence[int] = NUMBERS) -> int:
    if value is not None and rng.random() < 0.5:
        return value + rng.choice((-64, -8, -2, -1, 1, 1, 2, 4, 16, 100))
    return rng.choice(numbers)
