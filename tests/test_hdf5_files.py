"""HDF5 files as other programs may write them, and what is refused in them; made without Keras."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import struct

import h5py
import numpy as np
import pytest

import wavg
from contract import assert_same, read_bytes
from small_files import GOLDEN
from wavg import CheckpointFormatError, OutputError
from wavg.formats import hdf5, hdf5_rewrite, hdf5_tensors, keras_shards, keras_weights
from wavg.temporaries import NEW

NAME = "layers/a/vars/0"


def weights(path, array, name=NAME, mode="w", libver=None, **options):
    """A file of Keras 3's layout with one tensor."""
    with h5py.File(path, mode, libver=libver) as file:
        file.create_dataset(name, data=array, **options)
    return str(path)


def edited(path, old, new):
    """Replace bytes that are in a file once."""
    raw = read_bytes(path)
    assert raw.count(old) == 1
    with open(path, "wb") as file:
        file.write(raw.replace(old, new))


def refused(path, message, **options):
    """Have a file refused with a message that names it, in another process too."""
    for isolate in (False, True):
        with pytest.raises(CheckpointFormatError, match=message) as caught:
            wavg.load(path, isolate=isolate, **options)
        assert str(path) in str(caught.value)
    return caught.value


# --- where the numbers lie ------------------------------------------------------------------------


def compact(file, name, array):
    """Numbers within the object's header, as HDF5 stores very small datasets on request."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(array.shape) if array.shape else h5py.h5s.create(h5py.h5s.SCALAR)
    kind = h5py.h5t.py_create(array.dtype)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    dataset = h5py.h5d.create(file.id, name.encode(), kind, space, layout, links)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, array)


@pytest.mark.parametrize("isolate", [False, True])
def test_numbers_in_an_objects_header_are_averaged(tmp_path, isolate):
    models = []
    for step in (1, 2):
        scale, kernel = np.array(step, "f4"), np.arange(6, dtype="f4").reshape(2, 3) * step
        models.append({"layers/a/vars/0": scale, "layers/a/vars/1": kernel})
        with h5py.File(tmp_path / f"m_{step}.weights.h5", "w") as file:
            for name, array in models[-1].items():
                compact(file, name, array)
    pattern, output = str(tmp_path / "m_*.weights.h5"), tmp_path / "average.weights.h5"
    wavg.average_checkpoints(pattern, output, isolate=isolate)
    assert_same(wavg.load(output), wavg.average(models))


@pytest.mark.parametrize("size", [396, 404])
def test_a_dataset_of_another_size_than_its_shape_has_is_refused(tmp_path, size):
    path = weights(tmp_path / "m.weights.h5", np.arange(100, dtype="f4"))
    with h5py.File(path) as file:
        offset = file[NAME].id.get_offset()
    edited(path, struct.pack("<QQ", offset, 400), struct.pack("<QQ", offset, size))
    error = refused(path, rf"vars/0 is float32\[100\], 400 bytes, but {size} are stored")
    assert error.tensor == NAME


@pytest.mark.parametrize("place", [-10, 1 << 62, (1 << 64) - 1])
def test_a_chunk_that_reaches_beyond_the_end_is_refused(tmp_path, place):
    path = weights(tmp_path / "m.weights.h5", np.arange(100, dtype="f4"), chunks=(50,))
    with h5py.File(path) as file:
        offset = file[NAME].id.get_chunk_info(1).byte_offset
    place = place if place > 0 else os.path.getsize(path) + place
    edited(path, struct.pack("<Q", offset), struct.pack("<Q", place))
    refused(path, "vars/0 has a chunk that reaches beyond the end of the file")


def test_a_chunk_that_its_writer_left_uncompressed_is_read(tmp_path):
    path = weights(tmp_path / "m.weights.h5", np.zeros(8, "f4"), chunks=(4,), compression="gzip")
    values = np.arange(8, dtype="f4")
    with h5py.File(path, "r+") as file:
        file[NAME].id.write_direct_chunk((4,), values[4:].tobytes(), filter_mask=1)
    assert_same(wavg.load(path), {NAME: np.float32([0, 0, 0, 0, 4, 5, 6, 7])})


def test_a_file_cut_while_it_is_compared_with_another_is_not_taken_for_it(tmp_path, monkeypatch):
    paths = [weights(tmp_path / f"m_{step}.weights.h5", np.full(9, step, "f4")) for step in (1, 2)]
    real = hdf5_tensors.complement

    def cut(size, extents):
        if asked:
            os.truncate(paths[1], size - 40)
        asked.append(size)
        return real(size, extents)

    asked = []
    monkeypatch.setattr(hdf5_tensors, "complement", cut)
    with pytest.raises(wavg.WavgError, match=r"m_2\.weights\.h5"):
        wavg.average_checkpoints(paths)
    assert len(asked) > 1


# --- what the numbers are -------------------------------------------------------------------------


def opaque(path, label=None, width=2):
    weights(path, np.zeros(3, f"V{width}"))
    if label is not None:
        with h5py.File(path, "r+") as file:
            file[NAME].attrs["dtype"] = label
    return str(path)


@pytest.mark.parametrize("label", ["float32", "int8", "float4_e2m1fn"])
def test_values_that_call_themselves_of_another_width_are_refused(tmp_path, label):
    path = opaque(tmp_path / "m.weights.h5", label)
    refused(path, f"vars/0 holds values of 2 bytes, which is not {label}")


def test_values_of_four_bytes_are_not_declared_bfloat16(tmp_path):
    path = opaque(tmp_path / "m.weights.h5", width=4)
    refused(path, "vars/0 holds unnamed values of 4 bytes")
    refused(path, "4 bytes, which is not bfloat16", opaque_dtype="bfloat16")


# --- names, texts and groups ----------------------------------------------------------------------


def test_a_files_texts_are_its_metadata_whatever_else_it_notes(tmp_path):
    path = weights(tmp_path / "m.weights.h5", np.zeros(3, "f4"))
    with h5py.File(path, "r+") as file:
        file.attrs["text"] = "of letters"
        file.attrs["bytes"] = np.bytes_(b"of \xff bytes")
        file.attrs["number"] = 7
        file.attrs["list"] = ["a", "b"]
        file.attrs["place"] = file["layers"].ref
    with wavg.open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {
            "text": "of letters",
            "bytes": "of \N{REPLACEMENT CHARACTER} bytes",
        }


def test_too_many_objects_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.weights.h5"
    for number in range(4):
        weights(path, np.zeros(1, "f4"), f"layers/l{number}/vars/0", "a")
    monkeypatch.setattr(hdf5, "MOST_OBJECTS", 14)  # with the root, layers, and 3 of each
    assert len(wavg.load(path)) == 4
    monkeypatch.setattr(hdf5, "MOST_OBJECTS", 13)
    with pytest.raises(CheckpointFormatError, match="too many objects"):
        wavg.load(path)


def test_a_file_without_any_tensor_is_refused(tmp_path):
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        file.create_group("layers/dropout/vars")
    refused(tmp_path / "m.weights.h5", "holds no weights")


TENSORS = {"dense/kernel": np.ones((2, 3), "f4"), "dense/bias": np.zeros(3, "f4")}


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5"])
def test_a_list_of_tensors_that_is_not_that_of_the_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    wavg.save(path, {"z": np.ones(1, "f4"), **TENSORS})
    with h5py.File(path, "r+") as file:
        names = file.attrs["wavg_names"]
        del file.attrs["wavg_names"]
        file.attrs["wavg_names"] = names[1:]
    refused(path, "wavg_names does not list its tensors")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    path = tmp_path / "m.h5"
    wavg.save(path, TENSORS)
    with h5py.File(path, "r+") as file:
        file["dense/a/b"] = np.ones(2, "f4")
        file["dense"].attrs["weight_names"] = np.array([b"a/b"])
        file["dense/a"].attrs["weight_names"] = np.array([b"b"])
        file.attrs["layer_names"] = np.array([b"dense", b"dense/a"])
    refused(path, "a tensor is listed twice")


def test_a_file_of_the_first_kerases_has_no_weights_of_the_models_own(tmp_path):
    path = tmp_path / "m.h5"
    wavg.save(path, TENSORS)
    with h5py.File(path, "r+") as file:
        del file["top_level_model_weights"]
    assert_same(wavg.load(path), TENSORS)


def test_a_list_of_names_is_read_in_one_piece_where_it_is(tmp_path):
    path = tmp_path / "m.h5"
    wavg.save(path, TENSORS)
    with h5py.File(path, "r+") as file:
        file.attrs["layer_names1"] = np.array([b"none"])  # nobody's
    assert_same(wavg.load(path), TENSORS)


# --- written anew ---------------------------------------------------------------------------------


def test_a_file_of_hdf5s_newer_layout_is_averaged_into_another_dtype(tmp_path):
    for step in (1, 2):
        array = np.full(3, step, "f4")
        weights(tmp_path / f"m_{step}.weights.h5", array, libver=("v110", "v110"))
    output = tmp_path / "average.weights.h5"
    wavg.average_checkpoints(str(tmp_path / "m_*.weights.h5"), output, dtype="float64")
    assert_same(wavg.load(output), {NAME: np.full(3, 1.5)})


def test_what_hdf5_cannot_hold_is_told(tmp_path):
    array = np.asfortranarray(np.ones((2, 3), "f4"))
    np.savez(tmp_path / "m.npz", f=array)
    with pytest.raises(
        OutputError, match=r"cannot hold 'f' \(float32\[2, 3\] in Fortran"
    ) as caught:
        wavg.average_checkpoints([tmp_path / "m.npz"], tmp_path / "average.h5")
    assert caught.value.tensor == "f"
    assert os.listdir(tmp_path) == ["m.npz"]


def test_chunks_that_take_more_room_than_they_can_end_the_run(tmp_path, monkeypatch):
    paths = []
    for step in (1, 2):
        array = np.random.default_rng(step).random((40, 40), "f4")
        paths.append(weights(tmp_path / f"m_{step}.weights.h5", array, chunks=(7, 7)))
    monkeypatch.setattr(hdf5_rewrite, "_MARGIN", -150_000)
    with pytest.raises(OutputError, match="its chunks take more room") as caught:
        wavg.average_checkpoints(paths, tmp_path / "average.weights.h5")
    assert caught.value.path == str(tmp_path / "average.weights.h5")
    assert len(os.listdir(tmp_path)) == 2


class Full(io.FileIO):
    def truncate(self, size=None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_gives_no_room_while_an_archive_is_written_is_told(tmp_path):
    """HDF5 goes on without a word."""
    (tmp_path / "m.keras").write_bytes(bytes(64))
    with Full(tmp_path / "m.keras", "r+b") as file:
        window = hdf5._Window(file, 64, 0)
        with h5py.File(window, "w") as made:
            made["w"] = np.arange(50)
        with pytest.raises(OSError, match="No space left"):
            window.check()


# --- shards ---------------------------------------------------------------------------------------


def test_a_shard_with_chunks_is_refused(tmp_path):
    weights(tmp_path / "m_00000.weights.h5", np.zeros(9, "f4"), chunks=(3,))
    path = tmp_path / "m.weights.json"
    path.write_text('{"weight_map": {"/layers/a/vars": "m_00000.weights.h5"}}')
    refused(path, "vars/0 is stored in chunks; in shards none are read")


def test_a_map_of_very_many_shards_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(keras_shards, "_MOST_SHARDS", 2)
    path = tmp_path / "m.weights.json"
    path.write_text('{"weight_map": {"/a": ["0.h5", "1.h5", "2.h5"]}}')
    with pytest.raises(CheckpointFormatError, match="it names 3 shards"):
        wavg.load(path)


def test_a_group_twice_in_a_map_is_refused(tmp_path):
    path = tmp_path / "m.weights.json"
    path.write_text('{"weight_map": {"/a": "0.h5", "/a": "1.h5"}}')
    refused(path, "'/a' appears twice")


# --- numbers that lie over the structure ----------------------------------------------------------


def overlaid(path, place):
    """A file whose second tensor lies over where its header says that the first lies."""
    wavg.save(path, {"l/a": np.arange(64, dtype=np.float32), "l/o": np.float32([1, 2])})
    with h5py.File(path) as file:
        first, second = (file[name].id.get_offset() for name in ("l/a", "l/o"))
    raw = bytearray(read_bytes(path))
    layout = raw.index(struct.pack("<QQ", first, 256))
    over = raw.index(struct.pack("<QQ", second, 8))
    raw[over : over + 8] = struct.pack("<Q", layout)
    if place:
        raw[layout : layout + 8] = struct.pack("<Q", second)
    with open(path, "wb") as file:
        file.write(raw)
    return str(path)


@pytest.mark.parametrize("isolate", [False, True])
def test_an_average_that_would_be_read_from_elsewhere_is_not_published(tmp_path, isolate):
    paths = [overlaid(tmp_path / f"m_{n}.weights.h5", n) for n in range(2)]
    output = tmp_path / "average.weights.h5"
    with pytest.raises(CheckpointFormatError, match="l/a would not be found where") as caught:
        wavg.average_checkpoints(paths, output, isolate=isolate)
    assert str(caught.value).startswith(f"{paths[1]}: its numbers lie over its own structure")
    assert len(os.listdir(tmp_path)) == 2


def lacking(index):
    return dataclasses.replace(index, tensors=index.tensors[1:])


def reshaped(index):
    return dataclasses.replace(index, tensors=(index.tensors[0]._replace(shape=(3,)),))


def unreadable(index):
    raise CheckpointFormatError(f"{index.path}: not a sound HDF5 file")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lacking, f"{NAME} would not be found where it was written"),
        (reshaped, f"{NAME} would not be found where it was written"),
        (unreadable, r"average\.weights\.h5: not a sound HDF5 file"),
    ],
)
def test_an_average_that_is_found_unsound_is_not_published(tmp_path, monkeypatch, spoil, message):
    paths = [weights(tmp_path / f"m_{n}.weights.h5", np.float32([n, 1])) for n in range(2)]
    read_index = keras_weights.read_index

    def read(path, **options):
        index = read_index(path, **options)
        return spoil(index) if path.endswith(NEW) else index

    monkeypatch.setattr(keras_weights, "read_index", read)
    with pytest.raises(CheckpointFormatError, match=message):
        wavg.average_checkpoints(paths, tmp_path / "average.weights.h5")
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("optimizer", ["carry", "drop"])
def test_shards_of_which_one_is_left_empty_are_averaged(tmp_path, optimizer):
    paths = [GOLDEN / f"keras3_shards_{n}.weights.json" for n in (1, 2)]
    wavg.average_checkpoints(paths, tmp_path / "a.weights.json", optimizer=optimizer)
    assert_same(wavg.load(tmp_path / "a.weights.json"), wavg.average_checkpoints(paths))
