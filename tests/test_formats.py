"""Every format through the same battery, and each rule of each format broken once."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile

import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import wavg
from contract import FormatContract, assert_same
from wavg import CheckpointFormatError


class TestSafetensors(FormatContract):
    suffix = ".safetensors"


class TestNpz(FormatContract):
    suffix = ".npz"
    metadata = False


class TestKerasH5(FormatContract):
    suffix = ".h5"


# --- detection ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "diagnosis"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git-LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"  <html>", "web page"),
        (b"hello, world: nothing of the kind", "no safetensors file"),
    ],
)
def test_what_is_no_checkpoint_is_diagnosed(tmp_path, content, diagnosis):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=diagnosis) as caught:
        wavg.load(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.ckpt"])
def test_formats_known_by_name_are_not_called_unknown(tmp_path, name):
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(CheckpointFormatError, match="not read by this version"):
        wavg.load(path)


def test_pipes_devices_and_folders_are_refused_before_opening(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5")
    for path in (tmp_path / "pipe.h5", "/dev/zero", tmp_path):
        with pytest.raises(CheckpointFormatError, match="expected a checkpoint file"):
            wavg.load(path)


def test_a_missing_file_stays_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        wavg.load(tmp_path / "none.h5")


def test_the_content_tells_the_format_not_the_name(tmp_path):
    wavg.save(tmp_path / "a.safetensors", {"w": np.float32([1])})
    os.rename(tmp_path / "a.safetensors", tmp_path / "a.bin")
    np.testing.assert_array_equal(wavg.load(tmp_path / "a.bin")["w"], [1])


# --- safetensors ----------------------------------------------------------------------------------


def header(**tensors) -> dict:
    return tensors


def safetensors_file(path, head, data=b"", length=None):
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_SAFETENSORS = {
    "header larger than the file": ({"length": 1000}, {"w": entry()}, "truncated"),
    "header larger than the limit": ({"length": 2**40}, {"w": entry()}, "at most 100,000,000"),
    "header of the largest number": ({"length": 2**64 - 1}, {"w": entry()}, "header claims"),
    "empty header": ({}, b"", "no header where one belongs"),
    "bad UTF-8": ({}, b'{"\xff": 1}', "not UTF-8"),
    "bad JSON": ({}, b'{"w": ', "not JSON"),
    "deeply nested": ({}, b'{"a":' + b"[" * 100_000 + b"}", "nested too deeply|not JSON"),
    "no table": ({}, b"{}[]", "not JSON"),
    "a constant that is no JSON": ({}, b'{"w": NaN}', "NaN"),
    "half a letter as a name": (
        {"data": bytes(8)},
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "name that is no text",
    ),
    "half a letter in the metadata": ({}, b'{"__metadata__":{"a":"\\ud800"}}', "metadata"),
    "duplicate names": (
        {"data": bytes(8)},
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "'w' appears twice",
    ),
    "hole": ({"data": bytes(16)}, {"w": entry(offsets=(8, 16))}, "a hole"),
    "overlap": ({"data": bytes(12)}, {"a": entry(), "b": entry(offsets=(4, 12))}, "an overlap"),
    "trailing bytes": ({"data": bytes(9)}, {"w": entry()}, "trailing bytes"),
    "truncated data": ({"data": bytes(7)}, {"w": entry()}, "truncated"),
    "unknown dtype": ({"data": bytes(8)}, {"w": entry("F33")}, "unknown dtype 'F33'"),
    "size that is not shape × dtype": ({"data": bytes(8)}, {"w": entry(shape=(3,))}, "12 bytes"),
    "overflowing shape": ({"data": bytes(8)}, {"w": entry(shape=(2**62, 2**62))}, "but has 8"),
    "negative shape": ({"data": bytes(8)}, {"w": entry(shape=(-2,))}, "has the shape"),
    "an empty shape too large": ({}, {"w": entry(shape=(0, 2**61), offsets=(0, 0))}, "no array"),
    "fractional shape": ({"data": bytes(8)}, {"w": entry(shape=(2.0,))}, "has the shape"),
    "boolean shape": ({"data": bytes(4)}, {"w": entry(shape=(True,), offsets=(0, 4))}, "shape"),
    "boolean shape, equal to one before": (
        {"data": bytes(8)},
        {"v": entry(shape=(1,), offsets=(0, 4)), "w": entry(shape=(True,), offsets=(4, 8))},
        "'w' has the shape",
    ),
    "fractional offsets": ({"data": bytes(8)}, {"w": entry(offsets=(0.0, 8))}, "has the shape"),
    "offsets beyond all files": (
        {"data": bytes(8)},
        {"w": entry(offsets=(2**63 - 16, 2**63 - 8))},
        "has the shape",
    ),
    "an entry that is a list": ({"data": bytes(8)}, {"w": [1, 2, 3]}, "lacks dtype"),
    "a field too many": ({"data": bytes(8)}, {"w": {**entry(), "more": 1}}, "or has more"),
    "a dtype that is a list": ({"data": bytes(8)}, {"w": entry(["F32"])}, "unknown dtype"),
    "offsets the wrong way": ({"data": bytes(8)}, {"w": entry(offsets=(8, 0))}, "but has -8"),
    "missing field": ({"data": bytes(8)}, {"w": {"dtype": "F32", "shape": [2]}}, "lacks dtype"),
    "metadata of numbers": ({}, {"__metadata__": {"step": 3}}, "metadata"),
    "more dimensions than an array has": (
        {"data": bytes(4)},
        {"w": entry(shape=[1] * 65, offsets=(0, 4))},
        "65 dimensions",
    ),
    "a shape beyond all numbers": (
        {"data": bytes(8)},
        {"w": entry(shape=[2**62] * 20)},
        "but has 8",
    ),
    "half a byte": ({"data": bytes(1)}, {"w": entry("F4", (1,), (0, 1))}, "and a half bytes"),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_unsound_safetensors_are_refused(tmp_path, case):
    options, head, message = BAD_SAFETENSORS[case]
    path = safetensors_file(tmp_path / "m.safetensors", head, **options)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        wavg.load(path)
    assert str(path) in str(caught.value)
    # Of duplicate names the reference reader takes the last; it has no limit on dimensions nor
    # on those of an empty tensor, and passes over fields it does not know.
    lenient = ("duplicate names", "more dimensions than an array has", "a field too many")
    if case not in (*lenient, "an empty shape too large"):
        with pytest.raises(safetensors.SafetensorError):
            safetensors.safe_open(path, "np")


def test_the_reference_loader_opens_what_is_written(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5, dtype=np.uint8),
        "c": np.ones((2, 2), ml_dtypes.bfloat16),
        "d": np.zeros((0, 3), np.float16),
        "e": np.array(7, np.int64),
    }
    wavg.save(tmp_path / "m.safetensors", tensors, metadata={"format": "pt"})
    theirs = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    assert theirs.keys() == tensors.keys()
    assert_same({name: theirs[name] for name in tensors}, tensors)
    with safetensors.safe_open(tmp_path / "m.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_of_the_reference_writer_average_and_keep_their_header(tmp_path):
    for step in (1, 2):
        safetensors.numpy.save_file(
            {"w": np.full((3,), step, np.float32), "n": np.array([step])},
            tmp_path / f"m_{step}.safetensors",
            metadata={"format": "pt", "step": str(step)},
        )
    wavg.average_checkpoints(
        str(tmp_path / "m_*.safetensors"), tmp_path / "avg.safetensors", record="none"
    )
    result = safetensors.numpy.load_file(tmp_path / "avg.safetensors")
    np.testing.assert_array_equal(result["w"], [1.5, 1.5, 1.5])
    np.testing.assert_array_equal(result["n"], [2])
    before = (tmp_path / "m_2.safetensors").read_bytes()
    after = (tmp_path / "avg.safetensors").read_bytes()
    assert after.replace(np.full(3, 1.5, np.float32).tobytes(), b"") == before.replace(
        np.full(3, 2, np.float32).tobytes(), b""
    )


def test_an_odd_header_length_is_read(tmp_path):
    raw = json.dumps({"w": entry()}).encode()
    raw += b" " * (1 - len(raw) % 2)  # to an odd length
    path = safetensors_file(tmp_path / "m.safetensors", raw, np.float32([1, 2]).tobytes())
    assert len(raw) % 2 == 1
    np.testing.assert_array_equal(wavg.load(path)["w"], [1, 2])


def test_a_header_that_no_reader_would_take_is_not_written(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"m_{step}.safetensors") for step in (1, 2)]
    for path in paths:
        wavg.save(path, {"w": np.ones(2, "f4")})
    monkeypatch.setattr("wavg.formats.safetensors._HEADER_LIMIT", 100)
    with pytest.raises(wavg.OutputError, match="no room for a header") as caught:
        wavg.save(tmp_path / "out.safetensors", {"w" * 60: np.ones(2, "f4")})
    assert caught.value.path == str(tmp_path / "out.safetensors")
    with pytest.raises(wavg.OutputError, match=r"no room for a header.*--record none") as caught:
        wavg.average_checkpoints(paths, tmp_path / "out.safetensors")
    assert caught.value.path == paths[1]
    assert not os.path.exists(tmp_path / "out.safetensors")
    wavg.average_checkpoints(paths, tmp_path / "out.safetensors", record="none")
    assert list(wavg.load(tmp_path / "out.safetensors")) == ["w"]


@pytest.mark.parametrize(
    ("dtype", "size", "name"),
    [
        ("F4", 12, "float4_e2m1fn"),
        ("F6_E2M3", 8, "float6_e2m3fn"),
        ("F6_E3M2", 8, "float6_e3m2fn"),
    ],
)
def test_sub_byte_tensors_are_carried_over_if_identical_and_refused_if_not(
    tmp_path, dtype, size, name
):
    def save(step, code):
        head = {"w": entry(), "q": entry(dtype, (size,), (8, 14))}
        data = np.float32([step, 2]).tobytes() + code
        return safetensors_file(tmp_path / f"m_{step}.safetensors", head, data)

    paths = [save(1, b"abcdef"), save(2, b"abcdef")]
    wavg.average_checkpoints(paths, tmp_path / "avg.safetensors")
    expected = np.float32([1.5, 2]).tobytes() + b"abcdef"
    assert (tmp_path / "avg.safetensors").read_bytes()[-14:] == expected
    paths[0] = save(1, b"abcdeX")
    with pytest.raises(wavg.StructureMismatchError, match=f"q is {name}.*exclude"):
        wavg.average_checkpoints(paths, tmp_path / "avg2.safetensors")


def test_sub_byte_tensors_have_no_array(tmp_path):
    path = safetensors_file(
        tmp_path / "m.safetensors", {"w": entry(), "q": entry("F4", (4,), (8, 10))}, bytes(10)
    )
    with pytest.raises(wavg.WavgError, match="no array can hold"):
        wavg.average_checkpoints([path])
    with pytest.raises(wavg.WavgError, match="no array can hold"):
        wavg.load(path)


# --- npz ------------------------------------------------------------------------------------------


def test_files_of_numpy_are_read_stored_and_compressed(tmp_path):
    tensors = {
        "w": np.random.default_rng(0).standard_normal((50, 40)),
        "f": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "s": np.array(3, np.int16),
    }
    np.savez(tmp_path / "a.npz", **tensors)
    np.savez_compressed(tmp_path / "b.npz", **tensors)
    for name in ("a", "b"):
        result = wavg.load(tmp_path / f"{name}.npz")
        assert list(result) == list(tensors)
        for key, array in tensors.items():
            np.testing.assert_array_equal(result[key], array)
    averaged = wavg.average_checkpoints(
        [tmp_path / "a.npz", tmp_path / "b.npz"], tmp_path / "c.npz"
    )
    assert averaged.output == str(tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz", allow_pickle=False) as theirs:
        for key, array in tensors.items():
            np.testing.assert_array_equal(theirs[key], array)
    assert zipfile.ZipFile(tmp_path / "c.npz").testzip() is None


def test_a_compressed_member_is_averaged_in_blocks_of_any_size(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(100_000).astype(np.float32) for _ in range(2)]
    for step, array in enumerate(arrays):
        np.savez_compressed(tmp_path / f"m_{step}.npz", w=array)
    result = wavg.average_checkpoints(str(tmp_path / "m_*.npz"), max_memory="17MiB", workers=2)
    np.testing.assert_array_equal(result["w"], wavg.average(arrays and [arrays[0], arrays[1]]))


def npz_file(path, members, **options):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content, **options)
    return path


def npy(array=None, header=None) -> bytes:
    if header is None:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        return buffer.getvalue()
    raw = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw


HEADER = "{{'descr': '<f4', 'fortran_order': False, 'shape': {}}}"
BAD_NPZ = {
    "object dtype": ([("a.npy", npy(np.array([{}], object)))], "not a plain number"),
    "not an array": ([("a.npy", b"hello, this is text")], "is not an .npy array"),
    "another member": ([("a.txt", b"x")], "is not an .npy array"),
    "unsafe name": ([("../a.npy", npy(np.ones(2)))], "unsafe name"),
    "size mismatch": ([("a.npy", npy(np.ones(2)) + b"more")], "16 bytes, but has 20"),
    "code in the header": (
        [
            (
                "a.npy",
                npy(header="{'descr': __import__('os'), 'fortran_order': False, 'shape': (2,)}"),
            )
        ],
        "cannot be understood",
    ),
    "negative shape": (
        [("a.npy", npy(header="{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"))],
        "has the shape",
    ),
    "an empty shape too large": (
        [("a.npy", npy(header=HEADER.format((0, 1 << 61))))],
        "no array can have",
    ),
    "more dimensions than an array has": (
        [("a.npy", npy(header=HEADER.format((0,) * 65)))],
        "no array can have",
    ),
    "unmarked bfloat16": (
        [("a.npy", npy(np.ones(2, ml_dtypes.bfloat16)))],
        "opaque_dtype='bfloat16'",
    ),
    "big-endian": ([("a.npy", npy(np.ones(2, ">f4")))], "not a plain number"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_unsound_npz_files_are_refused(tmp_path, case):
    members, message = BAD_NPZ[case]
    with pytest.raises(CheckpointFormatError, match=message):
        wavg.load(npz_file(tmp_path / "m.npz", members))


def test_opaque_bfloat16_in_npz_can_be_declared(tmp_path):
    values = np.array([1.5, -2], ml_dtypes.bfloat16)
    path = npz_file(tmp_path / "m.npz", [("a.npy", npy(values))])
    assert_same(wavg.load(path, opaque_dtype="bfloat16"), {"a": values})


def test_a_zip_with_a_wrong_checksum_is_refused(tmp_path):
    np.savez(tmp_path / "m.npz", w=np.zeros(100))
    raw = bytearray((tmp_path / "m.npz").read_bytes())
    raw[400] ^= 1
    (tmp_path / "m.npz").write_bytes(raw)
    with pytest.raises(CheckpointFormatError, match="CRC"):
        wavg.load(tmp_path / "m.npz")


def test_duplicate_and_bomb_members_are_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        npz_file(tmp_path / "twice.npz", [("a.npy", npy(np.ones(2)))] * 2)
    with pytest.raises(CheckpointFormatError, match="appears twice"):
        wavg.load(tmp_path / "twice.npz")
    bomb = npy(np.zeros(1_000_000))
    npz_file(tmp_path / "bomb.npz", [("a.npy", bomb)], compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointFormatError, match="100 times"):
        wavg.load(tmp_path / "bomb.npz")


# --- Keras .h5 ------------------------------------------------------------------------------------


def keras_file(path, edit=lambda file: None):
    wavg.save(
        path, {"dense/kernel": np.ones((2, 3), np.float32), "dense/bias": np.zeros(3, np.float32)}
    )
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def replace(name, **options):
    def edit(file):
        del file[name]
        file.create_dataset(name, **options)

    return edit


def soft_link(file):
    del file["dense/bias"]
    file["dense/bias"] = h5py.SoftLink("/dense/kernel")


def external_link(file):
    del file["dense"]
    file["dense"] = h5py.ExternalLink("other.h5", "/dense")


def external_storage(file):
    del file["dense/bias"]
    file.create_dataset("dense/bias", (3,), "f4", external=[("secret.bin", 0, 12)])


def virtual(file):
    del file["dense/bias"]
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource("missing.h5", "x", shape=(3,))
    file.create_virtual_dataset("dense/bias", layout)


def narrow_integers(file):
    del file["dense/bias"]
    kind = h5py.h5t.NATIVE_INT32.copy()
    kind.set_precision(16)
    kind.set_offset(8)
    space = h5py.h5s.create_simple((3,))
    dataset = h5py.h5d.create(file["dense"].id, b"bias", kind, space)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.int32([1, 2, 3]))


BAD_H5 = {
    "integers of fewer bits than bytes": (narrow_integers, "only resembles int32"),
    "no names": (lambda f: f.attrs.__delitem__("layer_names"), "without Keras' layer_names"),
    "layer missing": (lambda f: f.__delitem__("dense"), "'dense' is listed but missing"),
    "weight missing": (lambda f: f.__delitem__("dense/bias"), "'bias' is listed but missing"),
    "no weight_names": (lambda f: f["dense"].attrs.__delitem__("weight_names"), "no weight_names"),
    "a path upwards": (
        lambda f: f["dense"].attrs.__setitem__("weight_names", np.array([b"../x"])),
        "no path wavg follows",
    ),
    "listed twice": (
        lambda f: f["dense"].attrs.__setitem__("weight_names", np.array([b"bias", b"bias"])),
        "listed twice",
    ),
    "names that are numbers": (
        lambda f: f["dense"].attrs.__setitem__("weight_names", np.array([1, 2])),
        "not a name",
    ),
    "soft link": (soft_link, "soft or external link"),
    "external link": (external_link, "soft or external link"),
    "external storage": (external_storage, "in another file"),
    "virtual dataset": (virtual, "in other files or datasets"),
    "chunks never written": (
        replace("dense/bias", shape=(3,), dtype="f4", chunks=(1,)),
        "has 0 of its 3 chunks",
    ),
    "a lossy compression": (
        replace("dense/bias", data=np.arange(3), chunks=(3,), scaleoffset=0),
        "HDF5 filter 6",
    ),
    "two names for the same bytes": (
        lambda f: (f.__delitem__("dense/bias"), f.__setitem__("dense/bias", f["dense/kernel"])),
        "shares its bytes with",
    ),
    "never written": (replace("dense/bias", shape=(3,), dtype="f4"), "never written"),
    "text": (replace("dense/bias", data=["a", "b"]), "not a plain number"),
    "vlen": (
        replace("dense/bias", shape=(1,), dtype=h5py.vlen_dtype(np.float32)),
        "not a plain number",
    ),
    "references": (replace("dense/bias", shape=(1,), dtype=h5py.ref_dtype), "not a plain number"),
    "compound": (replace("dense/bias", data=np.zeros(2, "f4,i4")), "not a plain number"),
    "big-endian": (replace("dense/bias", data=np.ones(3, ">f4")), "not a plain number"),
    "opaque": (replace("dense/bias", data=np.zeros(3, "V2")), "opaque_dtype='bfloat16'"),
    "a group for a dataset": (
        lambda f: (f.__delitem__("dense/bias"), f.create_group("dense/bias")),
        "is not a dataset",
    ),
}


@pytest.mark.parametrize("case", BAD_H5)
def test_unsound_keras_files_are_refused(tmp_path, case):
    edit, message = BAD_H5[case]
    path = keras_file(tmp_path / "m.h5", edit)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        wavg.load(path)
    assert str(path) in str(caught.value)


def test_opaque_values_can_be_declared_bfloat16(tmp_path):
    values = np.array([1.5, -2.0, 0.1], ml_dtypes.bfloat16)
    path = keras_file(tmp_path / "m.h5", replace("dense/bias", data=values.view("V2")))
    assert wavg.load(path, opaque_dtype="bfloat16")["dense/bias"].tobytes() == values.tobytes()
    result = wavg.average_checkpoints([path], opaque_dtype="bfloat16")
    assert result["dense/bias"].dtype == ml_dtypes.bfloat16


def test_lists_of_names_longer_than_an_object_header_are_split(tmp_path):
    tensors = {f"layer_{i:05}_{'x' * 50}/kernel": np.float32([i]) for i in range(2500)}
    wavg.save(tmp_path / "m.h5", tensors)
    with h5py.File(tmp_path / "m.h5") as file:
        assert "layer_names" not in file.attrs
        assert "layer_names1" in file.attrs
    assert list(wavg.load(tmp_path / "m.h5")) == list(tensors)


@pytest.mark.parametrize("name", ["/a", "a//b", "a/../b", "a/.", "a\nb/c"])
def test_names_hdf5_cannot_hold_are_refused(tmp_path, name):
    with pytest.raises(wavg.OutputError, match="cannot hold"):
        wavg.save(tmp_path / "m.h5", {name: np.ones(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model_weights/k", "optimizer_weights/k/v"])
def test_names_of_keras_own_groups_are_refused(tmp_path, name):
    with pytest.raises(wavg.OutputError, match="cannot hold the name") as caught:
        wavg.save(tmp_path / "m.h5", {name: np.ones(2)})
    assert caught.value.tensor == name
    assert not list(tmp_path.iterdir())


def test_names_like_those_of_keras_own_groups_are_kept(tmp_path):
    tensors = {"model_weights": np.ones(2), "a/model_weights": np.ones(1), "b": np.ones(3)}
    wavg.save(tmp_path / "m.h5", tensors, metadata={"names": "x"})
    assert_same(wavg.load(tmp_path / "m.h5"), tensors)


@pytest.mark.parametrize("key", ["wavg_names", "wavg_names0", "layer_names", "layer_names12"])
def test_metadata_where_names_are_kept_is_refused(tmp_path, key):
    with pytest.raises(wavg.OutputError, match="cannot hold metadata named") as caught:
        wavg.save(tmp_path / "m.h5", {"a/b": np.ones(2)}, metadata={key: "x"})
    assert str(tmp_path / "m.h5") in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_also_a_group_is_refused(tmp_path):
    with pytest.raises(wavg.OutputError, match="cannot hold 'a/b/c' beside"):
        wavg.save(tmp_path / "m.h5", {"a/b": np.ones(2), "a/b/c": np.ones(2)})
    assert not list(tmp_path.iterdir())


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "header",
    [
        f'{{"a":{ENTRY},"a":{ENTRY}}}',
        f'{{"a":{{}},"a":{ENTRY}}}',
        f'{{"a":5,"a":{ENTRY}}}',
        f'{{"a":{ENTRY.replace("dtype", "d" + chr(92) + "u0074ype")},"a":{ENTRY}}}',
        f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{ENTRY}}}',
        f'{{"a":{ENTRY.replace("[1]", "[1]" + chr(44) + chr(34) + "shape" + chr(34) + ":[1]")}}}',
    ],
)
def test_no_two_equal_names_of_a_safetensors_header_pass(tmp_path, header):
    text = header.encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointFormatError, match="appears twice"):
        wavg.load(tmp_path / "m.safetensors")
