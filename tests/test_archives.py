"""Zip archives, as .npz and .keras are: each rule of what they say of their members broken once."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib

import numpy as np
import pytest

import wavg
from contract import assert_same, read_bytes
from wavg import CheckpointFormatError, OutputError
from wavg.dtypes import DTYPES, lookup

LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"


def npy(header, data=b"", version=1):
    raw = header.encode("latin1")
    width = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + len(raw).to_bytes(width, "little") + raw + data


def header(descr="<f4", shape=(2,)):
    return str({"descr": descr, "fortran_order": False, "shape": shape})


def archive(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return str(path)


# Numbers of four bytes: where in a member's own header and where in the directory's entry.
FIELDS = {"checksum": (14, 16), "packed": (18, 20), "unpacked": (22, 24)}


def rewrite(path, member, **fields):
    """Have an archive say something else of one of its members, in both places."""
    raw = bytearray(read_bytes(path))
    entry = -1
    for _ in range(member + 1):
        entry = raw.index(CENTRAL, entry + 1)
    (start,) = struct.unpack_from("<I", raw, entry + 42)
    for name, value in fields.items():
        local, central = FIELDS[name]
        struct.pack_into("<I", raw, start + local, value)
        struct.pack_into("<I", raw, entry + central, value)
    with open(path, "wb") as file:
        file.write(raw)


def refused(path, message):
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        wavg.load(path)
    assert str(path) in str(caught.value)
    return caught.value


@pytest.fixture
def two(tmp_path):
    """Two arrays, one behind the other."""
    np.savez(tmp_path / "m.npz", a=np.float32([1, 2]), b=np.float32([3]))
    return str(tmp_path / "m.npz")


# --- members --------------------------------------------------------------------------------------


def test_a_compression_other_than_deflate_is_refused(tmp_path):
    path = archive(tmp_path / "m.npz", {"a.npy": npy(header(), bytes(8))}, zipfile.ZIP_BZIP2)
    error = refused(path, r"'a\.npy' is compressed in a way other than deflate")
    assert error.tensor == "a.npy"


def test_a_stored_member_of_two_sizes_is_refused(two):
    rewrite(two, 0, unpacked=200)
    refused(two, r"'a\.npy' is stored in a size that is not its own")


def test_a_member_beyond_the_end_is_refused(two):
    rewrite(two, 1, unpacked=9_000, packed=9_000)
    refused(two, r"'b\.npy' reaches beyond the end of the file")


def test_a_member_without_a_header_of_its_own_is_refused(two):
    raw = read_bytes(two)
    second = raw.index(LOCAL, 4)
    with open(two, "wb") as file:
        file.write(raw[:second] + b"XX" + raw[second + 2 :])
    refused(two, r"'b\.npy' has no local header where the directory says")


def sizes(path):
    with zipfile.ZipFile(path) as read:
        return {info.filename: info.file_size for info in read.infolist()}


@pytest.mark.parametrize(
    ("member", "behind"), [(0, r"member 'b\.npy'"), (1, "the directory")], ids=["next", "last"]
)
def test_a_member_that_reaches_into_what_comes_next_is_refused(two, member, behind):
    """Its new numbers would be written over that."""
    name = ("a.npy", "b.npy")[member]
    longer = sizes(two)[name] + 8
    rewrite(two, member, unpacked=longer, packed=longer)
    refused(two, rf"member '{name}' overlaps {behind}")


# --- arrays ---------------------------------------------------------------------------------------

BAD_HEADERS = {
    "very long": (
        npy(header() + " " * 70_000, version=2),
        "has a header of 70,055 bytes",
    ),
    "a type that is a program of its own": (npy(header("f4,,")), "'f4,,', which is not a plain"),
    "a type of no name": (npy(header("<f3"), bytes(8)), "'<f3', which is not a plain number"),
    "a date": (npy(header("<M8[ns]"), bytes(16)), "not a plain number"),
    "big-endian": (npy(header(">f4"), bytes(8)), "not a plain number"),
    "a name that is no type": (
        npy(header([("float7", "<u1")]), bytes(2)),
        "has the dtype .*float7",
    ),
    "a type of another width": (npy(header([("bfloat16", "<u4")]), bytes(8)), "not a plain"),
    "a type of less than bytes": (npy(header([("float4_e2m1fn", "<u0")]), b"1"), "not a plain"),
    "two fields": (npy(header([("bfloat16", "<u2"), ("n", "<u2")]), bytes(8)), "not a plain"),
    "no field": (npy(header([()]), bytes(8)), "not a plain number"),
    "no table": (npy("3"), "cannot be understood"),
    "no type": (npy("{'fortran_order': False, 'shape': ()}"), "cannot be understood"),
    "an order that is a number": (
        npy("{'descr': '<f4', 'fortran_order': 0, 'shape': (2,)}", bytes(8)),
        "has the shape",
    ),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_an_array_with_an_unsound_header_is_refused(tmp_path, case):
    content, message = BAD_HEADERS[case]
    refused(archive(tmp_path / "m.npz", {"a.npy": content}), message)


@pytest.mark.parametrize("descr", ["<f4", "|f4", "=f4", "f4"])
def test_a_type_may_be_written_as_other_programs_do(tmp_path, descr):
    content = npy(header(descr), np.float32([1, 2]).tobytes())
    path = archive(tmp_path / "m.npz", {"a.npy": content})
    assert_same(wavg.load(path), {"a": np.float32([1, 2])})


def test_every_plain_number_of_numpy_is_read(tmp_path):
    arrays = {code: np.ones(3, code) for code in "?bBhHiIlLqQefdFD"}
    arrays = {f"a{number}": array for number, array in enumerate(arrays.values())}
    np.savez(tmp_path / "m.npz", **arrays)
    assert_same(wavg.load(tmp_path / "m.npz"), arrays)


@pytest.mark.parametrize("dtype", [entry.name for entry in DTYPES if entry.bits % 8 == 0])
def test_numbers_of_every_format_come_back(tmp_path, dtype):
    tensors = {"a": np.ones(3).astype(lookup(dtype).numpy)}
    wavg.save(tmp_path / "m.npz", tensors)
    assert_same(wavg.load(tmp_path / "m.npz"), tensors)


def test_an_array_that_numpy_would_give_for_another_is_refused(tmp_path):
    path = archive(tmp_path / "m.npz", {"a.npy": npy("{}"), "a.npy.npy": npy("{}")})
    refused(path, r"'a\.npy' is what NumPy gives for the array in a\.npy\.npy, too")
    with pytest.raises(OutputError, match="rename one of them"):
        wavg.save(tmp_path / "out.npz", {"a": np.ones(2), "a.npy": np.ones(2)})
    assert os.listdir(tmp_path) == ["m.npz"]


def test_a_member_that_is_a_patch_to_something_else_is_refused(two):
    raw = bytearray(read_bytes(two))
    raw[raw.index(CENTRAL) + 8] |= 0x20
    with open(two, "wb") as file:
        file.write(raw)
    refused(two, r"'a\.npy' is a patch")


def test_a_compressed_array_that_unpacks_to_less_than_it_says_is_refused(tmp_path):
    content = npy(header(shape=(25,)), bytes(40))
    path = archive(tmp_path / "m.npz", {"a.npy": content}, zipfile.ZIP_DEFLATED)
    rewrite(path, 0, unpacked=len(content) + 60, checksum=zlib.crc32(content))
    error = refused(path, "'a' unpacks to fewer bytes than the archive says it has")
    assert error.tensor == "a"


def test_metadata_have_no_place_in_an_npz(tmp_path):
    with pytest.raises(OutputError, match="have no place for metadata"):
        wavg.save(tmp_path / "m.npz", {"a": np.ones(2)}, metadata={"step": "3"})
    assert os.listdir(tmp_path) == []


def test_numbers_of_less_than_a_byte_have_no_place_in_an_npz(tmp_path):
    text = (
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"q":{"dtype":"F4","shape":[4],"data_offsets":[4,6]}}'
    )
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(6))
    with pytest.raises(OutputError, match=r"cannot hold 'q' \(float4_e2m1fn\[4\]\)") as caught:
        wavg.average_checkpoints([tmp_path / "m.safetensors"], tmp_path / "average.npz")
    assert caught.value.tensor == "q"
    assert os.listdir(tmp_path) == ["m.safetensors"]
