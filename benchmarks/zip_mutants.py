"""Archives of arrays, ``.npz``, and the outer zips of ``.keras``: sound ones and mutants.

A sound archive is one that NumPy, wavg or Python's zip library wrote; it is taken apart into its
records, of which mutations change fields. Other mutations are those of the text of an array's
header, after which sizes and checksums are made right again, and of bytes.
Used by zip_mutations.py, and by the tests.
"""

from __future__ import annotations

import bz2
import copy
import functools
import io
import json
import random
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from mutants import change_bytes
from npy_mutants import Npy, change_header
from zip_records import (
    CENTRAL,
    COMMON,
    DESCRIPTOR,
    END,
    FAR,
    LAST,
    LOCAL,
    LOCATOR,
    NUMBERS,
    REST,
    STREAMED,
    UTF8,
    WIDE,
    WIDER,
    Archive,
    Member,
    deflated,
    packed,
    plain_bytes,
    put_together,
    settle,
    some_number,
    taken_apart,
)

import wavg

WEIGHTS = "model.weights.h5"


# --- sound archives -------------------------------------------------------------------------------

DTYPES = (
    *("f4", "f4", "f4", "f2", "f8", "i8", "i4", "i2", "i1", "u1", "u2", "u4", "u8", "?", "c8"),
    *("c16", ">f4", ">i8", "S3", "U2", "V2", "V4", "V3", "M8[s]", "m8[ns]", "O", "g"),
)
SPECIAL = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
SHAPES = ((), (1,), (2,), (3, 4), (2, 3, 2), (8,), (0,), (0, 7), (1, 1, 1, 1), (5,), (40,))
NAMES = ("weight", "bias", "ключ", "重み", "layers.0/kernel", "😀", "a b", "é", "x" * 60, "-", "0")


def an_array(rng: random.Random) -> np.ndarray:
    shape = rng.choice(SHAPES)
    if rng.random() < 0.15:
        dtype = np.dtype(rng.choice(SPECIAL))
    elif rng.random() < 0.05:
        dtype = np.dtype([("a", "f4"), ("b", "i2")])
    else:
        dtype = np.dtype(rng.choice(DTYPES if rng.random() < 0.3 else DTYPES[:16]))
    size = int(np.prod(shape))
    if dtype.hasobject:
        return np.full(shape, None, object)
    values = rng.randbytes(size * dtype.itemsize)
    if dtype.kind == "U":
        values = bytes(size * dtype.itemsize)
    array = np.frombuffer(values, dtype).reshape(shape)
    return np.asfortranarray(array) if rng.random() < 0.25 and array.ndim else array


class _Pipe(io.RawIOBase):
    """A file that cannot be rewound, so that members get data descriptors."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.content += data
        return len(bytes(data))


def streamed(members: dict[str, bytes], method: int) -> bytes:
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", method) as archive:
        for name, data in members.items():
            with archive.open(name, "w") as file:
                file.write(data)
    return bytes(pipe.content)


def zipped(members: dict[str, bytes], method: int, *, wide: bool) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            with archive.open(name, "w", force_zip64=wide) as out:
                out.write(data)
    return file.getvalue()


def as_npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)


def a_base(rng: random.Random) -> bytes:
    """Return an archive of arrays that one of several writers made."""
    names = dict.fromkeys(rng.choice(NAMES) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 5))))
    arrays = {name: an_array(rng) for name in names}
    writer = rng.choice(("numpy", "numpy deflated", "wavg", "streamed", "zipped", "wide"))
    file = io.BytesIO()
    if writer == "wavg":
        plain = {n: a for n, a in arrays.items() if a.dtype.kind in "fiub" or a.dtype in SPECIAL}
        plain = {n: a for n, a in plain.items() if a.dtype.byteorder != ">" and a.dtype != "g"}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "base.npz"
            wavg.save(path, plain)
            return path.read_bytes()
    if writer.startswith("numpy"):
        (np.savez if writer == "numpy" else np.savez_compressed)(file, **arrays)
        return file.getvalue()
    versions = ((1, 0), (2, 0), (3, 0), None)
    members = {f"{n}.npy": as_npy(a, rng.choice(versions)) for n, a in arrays.items()}
    method = rng.choice(METHODS if rng.random() < 0.2 else METHODS[:3])
    if writer == "streamed":
        return streamed(members, method)
    return zipped(members, method, wide=writer == "wide")


def a_keras_base(rng: random.Random, weights: bytes) -> bytes:
    """Return an archive as Keras makes them, around the bytes of a file of weights."""
    members = {
        "metadata.json": json.dumps({"keras_version": "3.15.1", "date_saved": "x"}).encode(),
        "config.json": json.dumps({"class_name": "Sequential", "config": {"layers": []}}).encode(),
        WEIGHTS: weights,
    }
    if rng.random() < 0.3:
        members["assets/vocabulary.txt"] = b"a\nb\n"
    if rng.random() < 0.2:
        items = list(members.items())
        rng.shuffle(items)
        members = dict(items)
    if rng.random() < 0.1:
        members.pop(rng.choice(("metadata.json", "config.json")))
    method = rng.choice((0, 0, 0, 8))
    if rng.random() < 0.2:
        return streamed(members, method)
    return zipped(members, method, wide=rng.random() < 0.3)


@functools.cache
def bases(kind: str, weights: bytes = b"") -> list[Archive]:
    """Return sound archives taken apart, the same every time."""
    rng = random.Random(f"bases {kind}")
    made = (a_base(rng) if kind == "npz" else a_keras_base(rng, weights) for _ in range(300))
    return [taken_apart(content) for content in made]


def sound(rng: random.Random, kind: str, weights: bytes) -> Archive:
    archive = rng.choice(bases(kind, weights))
    members = [
        Member(
            dict(m.own), dict(m.entry), m.name, m.entry_name, m.extra, m.entry_extra, m.comment,
            m.data, m.behind,
        )
        for m in archive.members
    ]  # fmt: skip
    wide = None if archive.wide is None else dict(archive.wide)
    return Archive(members, list(archive.order), wide=wide, comment=archive.comment)


# --- mutations of the archive's records -----------------------------------------------------------

FLAGS = (0, 1, 2, 4, STREAMED, 0x20, 0x40, UTF8, 0x2000, STREAMED | UTF8, 1 | STREAMED)
KINDS_OF_PACKING = (0, 8, 8, 0, 1, 6, 9, 12, 14, 93, 95, 99, 0xFFFF)
ODD_NAMES = (
    *(b"", b".npy", b"a", b"a.npy.npy", b"../a.npy", b"/a.npy", b"a/../b.npy", b"a\\b.npy"),
    *(b"C:a.npy", b"a\0b.npy", b"a.npy\0.txt", b"a/", b"./a.npy", b"a//b.npy", b"\xff\xfe.npy"),
    *("é.npy".encode(), "é.npy".encode("cp437"), "e\u0301.npy".encode(), b"a.NPY", b" a.npy"),
    *(b"model.weights.h5", b"config.json", b"metadata.json", b"x" * 300 + b".npy", b"a.npy "),
    *(b"..", b".", b"\n.npy", b"\xed\xa0\x80.npy", b"a.npy"),
)


def change_field(rng: random.Random, archive: Archive, member: Member) -> None:
    name = rng.choice((*COMMON, "packed", "size", "crc", "flags", "method"))
    new = some_number(rng, member.entry[name])
    if name == "flags":
        new = (member.entry["flags"] or 0) ^ rng.choice(FLAGS)
    elif name == "method":
        new = rng.choice(KINDS_OF_PACKING)
    elif name == "crc" and rng.random() < 0.7:
        new = zlib.crc32(member.data[: rng.choice((0, None, -1))])
    where = rng.choice(("own", "entry", "both", "both"))
    if where != "own":
        member.entry[name] = new
    if where != "entry":
        member.own[name] = new


def change_rest(rng: random.Random, archive: Archive, member: Member) -> None:
    name = rng.choice((*REST, "offset", "offset", "made_by"))
    if name == "offset" and rng.random() < 0.4:
        member.lies_at = rng.randrange(len(archive.members))
    else:
        member.entry[name] = some_number(rng, member.entry[name])


def change_name(rng: random.Random, archive: Archive, member: Member) -> None:
    other = rng.choice(archive.members).name
    new = rng.choice((*ODD_NAMES, other, other + b".npy"))
    if rng.random() < 0.2 and new:
        new = change_bytes(rng, new)
    where = rng.choice(("own", "entry", "both", "both", "both"))
    if where != "own":
        member.entry_name = new
    if where != "entry":
        member.name = new
    if rng.random() < 0.3:
        member.own["flags"] ^= UTF8
        member.entry["flags"] ^= UTF8


def change_length(rng: random.Random, archive: Archive, member: Member) -> None:
    name = rng.choice(("name", "extra", "entry name", "entry extra", "comment"))
    true = {"name": member.name, "extra": member.extra, "entry name": member.entry_name,
            "entry extra": member.entry_extra, "comment": member.comment}[name]  # fmt: skip
    member.lengths[name] = some_number(rng, len(true))


def an_extra(rng: random.Random, member: Member) -> bytes:
    entry = member.entry
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.choice((1, 2, 3, 4, 5, 8, 40)))
    if kind == 1:  # a name in Unicode, as some writers add
        name = rng.choice(ODD_NAMES)
        crc = zlib.crc32(member.entry_name) ^ rng.choice((0, 0, 1))
        return packed("HHH", [0x7075, 5 + len(name), 1])[:5] + packed("I", [crc]) + name
    if kind == 2:
        return packed("HH", [rng.choice((1, 0x9901, 0xCAFE)), rng.choice((0, 4, 8, 1000))])
    values = [value if value is not None and rng.random() < 0.5 else rng.choice(WIDER)
              for value in (entry["size"], entry["packed"], 0, 0)]  # fmt: skip
    values = values[: rng.randrange(1, 5)]
    claimed = 8 * len(values) + rng.choice((0, 0, 0, 0, -8, 4, 8))
    return packed("HH", [1, claimed]) + packed("Q" * len(values), values)


def change_extra(rng: random.Random, archive: Archive, member: Member) -> None:
    new = an_extra(rng, member)
    if rng.random() < 0.4:
        new = member.entry_extra + new
    if rng.random() < 0.6:
        member.entry_extra = new
    if rng.random() < 0.6:
        member.extra = new


def change_wide(rng: random.Random, archive: Archive, member: Member) -> None:
    """Say sizes and place in 64 bits, mostly as they are."""
    entry, values = member.entry, []
    for name in ("size", "packed", "offset"):
        if rng.random() < 0.7:
            value = rng.choice(WIDER) if rng.random() < 0.2 else entry[name] or 0
            if name == "offset":
                member.lies_at, value = FAR, value if value in WIDER else 0  # the first member's
            else:
                entry[name] = WIDE
            values.append(value)
    member.entry_extra = packed("HH", [1, 8 * len(values)]) + packed("Q" * len(values), values)


def change_directory(rng: random.Random, archive: Archive, member: Member) -> None:
    kind, order = rng.randrange(6), archive.order
    if not order:  # an earlier change
        kind = 5
    if kind == 0:
        order.insert(rng.randrange(len(order) + 1), rng.choice(order))
    elif kind == 1:
        order.pop(rng.randrange(len(order)))
    elif kind == 2:
        rng.shuffle(order)
    elif kind == 3:  # the same name, other bytes
        archive.members.append(copy.deepcopy(member))
        archive.members[-1].data = rng.choice(archive.members).data
        order.append(len(archive.members) - 1)
    elif kind == 4:  # one whose bytes are within another's
        inner = rng.randrange(len(archive.members))
        member.data += put_together(Archive([copy.deepcopy(archive.members[inner])], []))[:-22]
        settle(member)
    else:
        archive.members.append(copy.deepcopy(member))
        archive.members[-1].entry_name = archive.members[-1].name = b"again.npy"
        order.append(len(archive.members) - 1)


def change_end(rng: random.Random, archive: Archive, member: Member) -> None:
    kind = rng.randrange(8)
    if kind == 0:
        archive.end[rng.choice(LAST)] = rng.choice((-46, -2, -1, 1, 2, 46, 100, *NUMBERS))
    elif kind == 1:
        archive.comment = rng.choice((b"a comment", b"x" * 300, END, END + bytes(18), LOCATOR))
    elif kind == 2:
        archive.comment_length = some_number(rng, len(archive.comment))
    elif kind == 3:
        archive.behind = rng.choice((b"\0", b"junk", bytes(100), b"\n", END + bytes(18)))
    elif kind in (4, 5):
        archive.wide = archive.wide or dict.fromkeys(("size", *LAST, "where", "disks"))
        name = rng.choice(list(archive.wide))
        archive.wide[name] = rng.choice((-46, -1, 0, 0, 0, 1, 46, 1 << 16, *WIDER))
    elif kind == 6:  # a second end, of an archive of no members or of the same
        again = rng.choice((END + bytes(18), put_together(archive)))
        if rng.random() < 0.5:
            archive.behind = again
        else:
            archive.before += again
    else:
        count = rng.choice((-1, 1, 0x10000, -len(archive.order)))
        archive.end["count"] = archive.end["here"] = count


def change_gaps(rng: random.Random, archive: Archive, member: Member) -> None:
    junk = rng.choice((b"\0", b"#!/bin/sh\n", bytes(50), LOCAL + bytes(26), END + bytes(18)))
    kind = rng.randrange(4)
    if kind == 0:
        archive.before = junk
        if rng.random() < 0.5:  # as if it were not there
            archive.end["start"] = -len(junk)
            for each in archive.members:
                each.entry["offset"] = -len(junk)
    elif kind == 1:
        member.behind += junk
    elif kind == 2:
        archive.between = junk
    else:
        member.behind = member.behind[: rng.randrange(len(member.behind) + 1)]


def change_descriptor(rng: random.Random, archive: Archive, member: Member) -> None:
    """Stream a member: its sizes and CRC come behind it, in one of many ways, some wrong."""
    entry = member.entry
    form = rng.choice(("III", "IQQ"))
    values = [entry[name] or 0 for name in ("crc", "packed", "size")]
    if rng.random() < 0.3:
        values[rng.randrange(3)] += rng.choice((1, -1, 100))
    member.behind = DESCRIPTOR * (rng.random() < 0.7) + packed(form, values)
    member.own["flags"] = (member.own["flags"] or 0) | STREAMED
    if rng.random() < 0.8:
        entry["flags"] = (entry["flags"] or 0) | STREAMED
    if rng.random() < 0.7:
        member.own |= {"crc": 0, "packed": 0, "size": 0}


def change_packing(rng: random.Random, archive: Archive, member: Member) -> None:
    content = plain_bytes(member)
    kind = rng.randrange(7)
    method = 8
    if kind == 0:
        data = deflated(content, rng.choice((0, 1, 9)))
    elif kind == 1:
        data = deflated(content) + rng.choice((b"\0", b"junk", deflated(b"more")))
    elif kind == 2:
        data = deflated(content)[: -rng.choice((1, 2, 5))]
    elif kind == 3:
        data = deflated(content + bytes(rng.choice((1, 100, 20_000, 300_000))))
    elif kind == 4:
        data = change_bytes(rng, deflated(content))
    elif kind == 5:
        method, data = 0, content
    else:
        method, data = 12, bz2.compress(content)
    member.data = data
    sizes = {"method": method, "packed": len(data)}
    if kind == 3 and rng.random() < 0.7:
        content = content + bytes(rng.choice((1, 100, 20_000, 300_000)))
        sizes |= {"size": len(content), "crc": zlib.crc32(content)}
    member.entry |= sizes
    member.own |= sizes


RECORDS: tuple[Callable[[random.Random, Archive, Member], None], ...] = (
    *(change_field, change_field, change_field, change_rest, change_name, change_name),
    *(change_length, change_extra, change_wide, change_directory, change_directory),
    *(change_end, change_end, change_gaps, change_descriptor, change_packing),
)


def change_arrays(rng: random.Random, archive: Archive, member: Member) -> None:
    """Change an array's header; the archive around it is as sound as before."""
    npy = Npy.of(plain_bytes(member))
    if npy is None:
        return
    for _ in range(rng.choice((1, 1, 1, 2))):
        npy = change_header(rng, npy)
    settle(member, npy.content(rng))


# --- the whole ------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """A file, and what was done to it."""

    content: bytes
    kind: str


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Damage bytes anywhere, or most likely those of the records at the end."""
    kind = rng.randrange(5)
    if kind == 0:
        return content[: rng.randrange(len(content) + 1)]
    if kind == 1:
        return content + rng.choice((b"\0", rng.randbytes(rng.choice((1, 22, 300))), END))
    if kind == 2:
        return change_bytes(rng, content)
    start = max(content.find(CENTRAL), 0)
    return content[:start] + change_bytes(rng, content[start:])


def mutant(rng: random.Random, kind: str = "npz", weights: bytes = b"") -> Mutant:
    """Return a mutant of a ``.npz``, or of the outer zip of a ``.keras`` around these weights."""
    archive = sound(rng, kind, weights)
    what = rng.choices(
        ("sound", "records", "header", "bytes", "mixed"),
        (10, 45, 25, 10, 10) if kind == "npz" else (10, 70, 0, 20, 0),
    )[0]
    if not archive.members and what in ("records", "header", "mixed"):
        what = "bytes"
    if what in ("header", "mixed"):
        change_arrays(rng, archive, rng.choice(archive.members))
    if what in ("records", "mixed"):
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            rng.choice(RECORDS)(rng, archive, rng.choice(archive.members))
    content = put_together(archive)
    if what == "bytes":
        for _ in range(rng.choice((1, 1, 2, 3))):
            content = damaged(rng, content)
    return Mutant(content, f"{kind}: {what}")
