"""Keras 3's weights, archives and shards, and HDF5 datasets in chunks; made without Keras."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import struct
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest

import wavg
from contract import FormatContract, assert_same, read_bytes, smallest_budget
from wavg import CheckpointFormatError, stream
from wavg.formats import hdf5, zips
from wavg.opening import opened

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = "model.weights.h5"
STATE = {
    "layers/dense/vars/0": (3, 4),
    "layers/dense/vars/1": (4,),
    "layers/dense_1/vars/0": (4, 2),
}


class TestKerasWeights(FormatContract):
    suffix = ".weights.h5"
    refused = ".h5"


def model(seed, **more):
    rng = np.random.default_rng(seed)
    tensors = {n: rng.standard_normal(shape).astype("f4") for n, shape in STATE.items()}
    return {**tensors, **more}


def write_weights(file, tensors, optimizer=3.0, **options):
    """A file as Keras 3 makes it: groups of variables, names as attributes, empty groups."""
    with h5py.File(file, "w") as h5:
        for name, array in tensors.items():
            h5.create_dataset(name, data=array, **options)
            h5[name.rpartition("/")[0]].attrs["name"] = name.split("/")[1]
        h5.create_group("layers/dropout/vars")
        if optimizer is not None:
            h5.create_dataset("optimizer/vars/0", data=np.int64(optimizer))
            h5.create_dataset("optimizer/vars/1", data=np.full((3, 4), optimizer, "f4"))
    return file


def weights_file(folder, step, **options):
    return write_weights(f"{folder}/m_{step}.weights.h5", model(step), step, **options)


def archive(path, step, compression=zipfile.ZIP_STORED, config="{}", tensors=None):
    content = write_weights(io.BytesIO(), tensors or model(step), step).getvalue()
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("metadata.json", '{"keras_version": "3.15.1"}')
        zipped.writestr("config.json", config, compress_type=compression)
        zipped.writestr(WEIGHTS, content)
        zipped.writestr("assets/words.txt", f"of step {step}")
    return path


def sharded(folder, step, tensors=None, edit=lambda content: None):
    """Two shards: the first layer, then the second with the optimizer."""
    tensors = tensors or model(step)
    base, mapping = f"m_{step}", {}
    for number, prefix in enumerate(("layers/dense/", "layers/dense_1/")):
        part = {name: array for name, array in tensors.items() if name.startswith(prefix)}
        name = f"{base}_{number:05}.weights.h5"
        write_weights(f"{folder}/{name}", part, step if number else None)
        mapping[f"/{prefix}vars"] = name if number else [name]
    mapping["/optimizer/vars"] = [name]
    content = {"metadata": {"total_size": 0.0}, "weight_map": mapping}
    edit(content)
    path = f"{folder}/{base}.weights.json"
    with open(path, "w") as file:
        json.dump(content, file)
    return path


MAKE = {
    "weights": lambda folder, step: weights_file(folder, step),
    "archive": lambda folder, step: archive(f"{folder}/m_{step}.keras", step),
    "shards": sharded,
}
ENDING = {"weights": ".weights.h5", "archive": ".keras", "shards": ".weights.json"}


@pytest.fixture(params=MAKE)
def kind(request):
    return request.param


@pytest.fixture
def run(tmp_path, kind):
    return [MAKE[kind](str(tmp_path), step) for step in (1, 2, 3)]


def output_of(tmp_path, kind, name="average"):
    return f"{tmp_path}/{name}{ENDING[kind]}"


def datasets(path):
    """Every dataset of the weights in a file, and every attribute and group."""
    if path.endswith(".keras"):
        with zipfile.ZipFile(path) as zipped:
            path = io.BytesIO(zipped.read(WEIGHTS))
    elif path.endswith(".json"):
        with open(path) as file:
            names = json.load(file)["weight_map"].values()
        shards = {n for name in names for n in ([name] if isinstance(name, str) else name)}
        folder = os.path.dirname(path)
        return {k: v for s in sorted(shards) for k, v in datasets(f"{folder}/{s}").items()}
    found = {}
    with h5py.File(path) as file:

        def note(name, item):
            found[name] = item[()] if isinstance(item, h5py.Dataset) else dict(item.attrs)

        file.visititems(note)
    return found


def test_tensors_are_the_models_and_not_the_optimizers(run):
    tensors = wavg.load(run[1])
    assert_same(tensors, model(2))
    with wavg.open_checkpoint(run[1]) as checkpoint:
        others = [spec.name for spec in checkpoint.index.others]
    assert others == ["optimizer/vars/0", "optimizer/vars/1"]


def test_an_average_replaces_the_models_numbers_and_nothing_else(run, kind, tmp_path):
    output = output_of(tmp_path, kind)
    report = wavg.average_checkpoints(run, output, weights="linear")
    assert report.plan.patches
    expected = wavg.average_checkpoints(run, weights="linear")
    assert_same(wavg.load(output), expected)
    newest, ours = datasets(run[-1]), datasets(output)
    assert ours.keys() == newest.keys()
    for name, item in newest.items():
        np.testing.assert_equal(ours[name], expected.get(name, item))


def test_an_average_of_copies_is_the_copy(kind, tmp_path):
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()
    paths = [MAKE[kind](str(folder), 7) for folder in folders]
    output = f"{folders[0]}/average{ENDING[kind]}"
    wavg.average_checkpoints(paths, output)
    if kind == "shards":
        content = json.loads(read_bytes(output))
        assert content == {
            "metadata": {"total_size": 4 * (12 + 4 + 8 + 12) + 8},
            "weight_map": {
                "/layers/dense/vars": ["average_00000.weights.h5"],
                "/layers/dense_1/vars": ["average_00001.weights.h5"],
                "/optimizer/vars": ["average_00001.weights.h5"],
            },
        }
        for number in range(2):
            shard = f"_{number:05}.weights.h5"
            assert read_bytes(f"{folders[0]}/average{shard}") == read_bytes(
                f"{folders[0]}/m_7{shard}"
            )
    else:
        assert read_bytes(output) == read_bytes(paths[0])


@pytest.mark.parametrize("optimizer", ["carry", "drop"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float64"])
def test_another_dtype_and_no_optimizer(run, kind, tmp_path, optimizer, dtype):
    output = output_of(tmp_path, kind)
    wavg.average_checkpoints(run, output, dtype=dtype, optimizer=optimizer)
    assert_same(wavg.load(output), wavg.average_checkpoints(run, dtype=dtype))
    newest, ours = datasets(run[-1]), datasets(output)
    kept = [n for n in newest if optimizer == "carry" or n.split("/")[0] != "optimizer"]
    assert sorted(ours) == sorted(kept)
    assert "layers/dropout/vars" in ours
    if kind == "archive":
        with zipfile.ZipFile(run[-1]) as before, zipfile.ZipFile(output) as after:
            assert after.testzip() is None
            assert after.namelist() == before.namelist()
            for name in before.namelist():
                assert name == WEIGHTS or after.read(name) == before.read(name)
    if kind == "shards":
        with open(output) as file:
            content = json.load(file)
        sizes = [np.asarray(v).nbytes for v in ours.values() if not isinstance(v, dict)]
        assert content["metadata"]["total_size"] == sum(sizes)


def test_an_executor_of_processes_makes_the_same_bytes(run, kind, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    for name in ("threads", "processes"):
        (tmp_path / name).mkdir()
    outputs = [output_of(tmp_path / name, kind, "a") for name in ("threads", "processes")]
    with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(2, mp_context=spawn) as processes:
        for output, executor in zip(outputs, (threads, processes), strict=True):
            wavg.average_checkpoints(run, output, executor=executor)
        arrays = wavg.average_checkpoints(run, executor=processes)
    right, found = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("threads", "processes")
    )
    assert right == found
    assert len(right) == (3 if kind == "shards" else 1)
    assert_same(arrays, wavg.load(outputs[0]))


def test_every_truncation_of_a_file_is_noticed(run, kind):
    whole = read_bytes(run[0])
    for length in range(0, len(whole), max(1, len(whole) // 100)):
        with open(run[0], "wb") as file:
            file.write(whole[:length])
        with pytest.raises(CheckpointFormatError):
            wavg.load(run[0])


def test_the_command_line_averages_them(run, kind, tmp_path, capsys):
    from wavg.cli import main

    output = output_of(tmp_path, kind)
    assert main(["average", *run, "-o", output, "--weights", "linear"]) == 0
    assert "averaged: 3 tensors" in capsys.readouterr().out
    assert main(["inspect", output]) == 0
    assert "layers/dense/vars/0" in capsys.readouterr().out


# --- order ----------------------------------------------------------------------------------------


def test_variables_are_sorted_as_numbers_where_the_file_does_not_tell(tmp_path):
    names = [f"layers/block/vars/{number}" for number in (0, 1, 2, 9, 10, 11)]
    tensors = {name: np.float32([i, i]) for i, name in enumerate(names)}
    path = f"{tmp_path}/m.weights.h5"
    write_weights(path, tensors, chunks=(1,))
    assert list(wavg.load(path)) == names


def test_the_order_is_that_of_writing(tmp_path):
    names = ["layers/zeta/vars/0", "layers/alpha/vars/0", "layers/alpha/vars/1"]
    path = f"{tmp_path}/m.weights.h5"
    write_weights(path, {name: np.float32([1]) for name in names})
    assert list(wavg.load(path)) == names


OPTIMIZERS = {
    "optimizer/vars/1": np.float32([1]),  # whatever it holds
    "layers/sequential/optimizer/vars/0": np.array(7),  # an inner model's
    "d_optimizer/vars/0": np.array(7),  # its rate is scheduled
    "d_optimizer/vars/1": np.float32([1]),
    "g_opt/vars/0": np.array(7),
    "g_opt/vars/1": np.float32(0.1),
    "g_opt/vars/2": np.float32([1]),
    "optims/sgd/vars/0": np.array(7),
    "optims/sgd/vars/1": np.float32(0.1),
}
NO_OPTIMIZERS = {
    "layers/optimizer/vars/0": np.float32([1]),  # a layer of that class
    "x_optimizer/vars/0": np.float32([1]),  # a layer in an attribute of that name
    "layers/normalization/vars/0": np.float32([1, 2]),
    "layers/normalization/vars/1": np.array(3),
}


def test_optimizers_are_known_wherever_they_are_and_metrics_too(tmp_path):
    path = f"{tmp_path}/m.weights.h5"
    others = OPTIMIZERS | {"metrics/mean/vars/0": np.float32([1])}
    write_weights(path, model(1, **NO_OPTIMIZERS, **others), None)
    with wavg.open_checkpoint(path) as checkpoint:
        assert set(checkpoint) == {*STATE, *NO_OPTIMIZERS}
        assert {spec.name for spec in checkpoint.index.others} == set(others)
    wavg.average_checkpoints([path], tmp_path / "out.weights.h5", optimizer="drop")
    with wavg.open_checkpoint(tmp_path / "out.weights.h5") as checkpoint:
        assert set(checkpoint) == {*STATE, *NO_OPTIMIZERS}
        assert [spec.name for spec in checkpoint.index.others] == ["metrics/mean/vars/0"]


def test_quantised_kernels_beside_their_scales_are_refused(tmp_path):
    codes = {"layers/dense/vars/0": np.int8([[1, 2]]), "layers/dense/vars/1": np.float32([1, 2])}
    for step in (1, 2):
        write_weights(f"{tmp_path}/m_{step}.weights.h5", model(step) | codes)
    with pytest.raises(wavg.WavgError, match=r"vars/0 holds quantised codes \(int8\)"):
        wavg.average_checkpoints(f"{tmp_path}/m_*.weights.h5")
    averaged = wavg.average_checkpoints(f"{tmp_path}/m_*.weights.h5", exclude="layers/dense/*")
    assert_same({name: averaged[name] for name in codes}, codes)


# --- layouts and names ----------------------------------------------------------------------------


def test_files_of_one_layout_are_parsed_once(tmp_path, monkeypatch):
    paths = [weights_file(str(tmp_path), step) for step in (1, 2, 3)]
    archives = [archive(f"{tmp_path}/m_{step}.keras", step) for step in (1, 2, 3)]
    from wavg.formats import keras_weights

    parsed = []
    real = keras_weights.index_of
    monkeypatch.setattr(
        keras_weights,
        "index_of",
        lambda source, *rest: parsed.append(source) or real(source, *rest),
    )
    for files in (paths, archives):
        parsed.clear()
        wavg.average_checkpoints(files)
        assert [source.path for source in parsed] == [files[0]]


@pytest.mark.slow
@pytest.mark.parametrize("isolate", [False, True])
def test_files_of_one_layout_share_what_lies_beside_the_model(tmp_path, isolate):
    slots = {f"optimizer/vars/{n}": np.full(2, n, "f4") for n in range(2, 500)}
    for step in range(1, 41):
        write_weights(f"{tmp_path}/m_{step}.weights.h5", model(step) | slots, step)
        with h5py.File(f"{tmp_path}/m_{step}.weights.h5", "a") as h5:
            h5.attrs["text"] = "of all"
    if isolate:  # of another layout, in bytes: parsed, and equal
        with open(f"{tmp_path}/m_20.weights.h5", "ab") as file:
            file.write(b"\0")
    paths = [f"{tmp_path}/m_{step}.weights.h5" for step in (19, 20)]
    with opened(paths, None, isolate) as (first, second):
        assert len(first.index.others) == 500
        assert second.index.others is first.index.others
        assert second.index.tensors is first.index.tensors
        assert second.index.metadata is first.index.metadata
    one = wavg.plan_average(paths[:1], isolate=isolate).projected_memory
    many = wavg.plan_average(tmp_path, isolate=isolate).projected_memory
    assert many - one < 5 << 20


def test_a_layout_that_differs_in_one_byte_is_parsed_again(tmp_path):
    paths = [weights_file(str(tmp_path), step) for step in (1, 2)]
    with h5py.File(paths[1], "r+") as file:
        del file["layers/dense_1/vars/0"]
        file["layers/dense_1/vars/0"] = np.ones((2, 4), "f4")
    with pytest.raises(wavg.StructureMismatchError, match=r"float32\[4, 2\], not float32\[2, 4\]"):
        wavg.average_checkpoints(paths)


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("weights", r"end it with \.weights\.h5"),
        ("archive", r"end it with \.keras or \.weights\.h5"),
        ("shards", r"end it with \.weights\.json or \.weights\.h5"),
    ],
)
def test_an_output_named_as_keras_would_not_load_it_is_refused(tmp_path, kind, advice):
    paths = [MAKE[kind](str(tmp_path), step) for step in (1, 2)]
    with pytest.raises(wavg.OutputError, match=advice):
        wavg.average_checkpoints(paths, tmp_path / "average.h5")
    assert not os.path.exists(tmp_path / "average.h5")


def test_a_legacy_file_is_refused_the_name_of_keras_3s_weights(tmp_path):
    wavg.save(tmp_path / "m.h5", {"dense/kernel": np.float32([1])})
    with pytest.raises(wavg.OutputError, match=r"end it with \.h5"):
        wavg.average_checkpoints([tmp_path / "m.h5"], tmp_path / "average.weights.h5")


def test_legacy_weights_named_weights_h5_stay_what_they_are(tmp_path):
    for step in (1, 2):
        wavg.save(tmp_path / "legacy.h5", {"dense/kernel": np.float32([step])}, overwrite=True)
        os.rename(tmp_path / "legacy.h5", tmp_path / f"m_{step}.weights.h5")
    output = tmp_path / "average.weights.h5"
    wavg.average_checkpoints(str(tmp_path / "m_*.weights.h5"), output)
    with h5py.File(output) as file:
        assert list(file.attrs["layer_names"]) == [b"dense"]
    np.testing.assert_array_equal(wavg.load(output)["dense/kernel"], [1.5])


def test_an_archive_averages_into_a_weights_file(tmp_path):
    paths = [archive(f"{tmp_path}/m_{step}.keras", step) for step in (1, 2)]
    wavg.average_checkpoints(paths, tmp_path / "average.weights.h5")
    assert_same(wavg.load(tmp_path / "average.weights.h5"), wavg.average_checkpoints(paths))


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.keras", "need a model's configuration"), ("a.weights.json", "need shards to follow")],
)
def test_what_needs_its_kind_of_input_says_so(tmp_path, name, message):
    paths = [weights_file(str(tmp_path), step) for step in (1, 2)]
    with pytest.raises(wavg.OutputError, match=message):
        wavg.average_checkpoints(paths, tmp_path / name)
    with pytest.raises(wavg.OutputError, match=message):
        wavg.plan_average(paths, tmp_path / name)
    with pytest.raises(wavg.OutputError, match=message):
        wavg.save(tmp_path / name, model(1))
    assert not list(tmp_path.glob("a.*"))
    assert not list(tmp_path.glob(".*"))


def test_names_of_optimizers_cannot_be_saved_as_a_models(tmp_path):
    with pytest.raises(wavg.OutputError, match="cannot hold the name 'optimizer/x'"):
        wavg.save(tmp_path / "m.weights.h5", {"optimizer/x": np.ones(2)})


def test_the_attribute_of_bfloat16_is_understood(tmp_path):
    values = np.array([1.5, -2, 0.25], ml_dtypes.bfloat16)
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        file.create_dataset("layers/dense/vars/0", data=values.view("V2")).attrs["dtype"] = (
            "bfloat16"
        )
    assert_same(wavg.load(tmp_path / "m.weights.h5"), {"layers/dense/vars/0": values})


def test_an_attribute_of_no_known_dtype_is_a_format_error(tmp_path):
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        dataset = file.create_dataset("layers/dense/vars/0", data=np.zeros(2, "V2"))
        dataset.attrs["dtype"] = "float1"
    with pytest.raises(CheckpointFormatError, match=r"vars/0 calls itself.*'float1'"):
        wavg.load(tmp_path / "m.weights.h5")


def test_a_version_that_means_another_order_is_not_taken_for_the_same_layout(tmp_path):
    for step, version in enumerate(("3.15.1", "2.21.0"), start=1):
        names = ["vars/0", "layers/dense/vars/0"]  # Keras 2 lists a model's own weights last
        tensors = {name: np.float32([step]) for name in names}
        path = archive(f"{tmp_path}/m_{step}.keras", 1, tensors=tensors)
        raw = read_bytes(path).replace(b"3.15.1", version.encode())
        crc = zlib.crc32(f'{{"keras_version": "{version}"}}'.encode()).to_bytes(4, "little")
        old = zlib.crc32(b'{"keras_version": "3.15.1"}').to_bytes(4, "little")
        with open(path, "wb") as file:
            file.write(raw.replace(old, crc))
    orders = [list(wavg.load(f"{tmp_path}/m_{step}.keras")) for step in (1, 2)]
    assert orders[0] == orders[1][::-1]
    result = wavg.average_checkpoints(f"{tmp_path}/m_*.keras")
    assert list(result) == orders[1]


# --- chunks ---------------------------------------------------------------------------------------

CHUNKED = {
    "gzip": {"compression": "gzip", "chunks": (7, 5)},
    "gzip and shuffle": {"compression": "gzip", "shuffle": True, "chunks": (50, 5)},
    "lzf": {"compression": "lzf", "chunks": (3, 40)},
    "checksums": {"fletcher32": True, "chunks": (50, 40)},
    "plain chunks": {"chunks": (8, 8)},
    "growing": {"chunks": (8, 8), "maxshape": (None, 40)},
}


@pytest.mark.parametrize("layout", CHUNKED)
@pytest.mark.parametrize("legacy", [True, False])
def test_chunked_datasets_average_and_keep_their_layout(tmp_path, layout, legacy):
    options = CHUNKED[layout]
    rng = np.random.default_rng(0)
    paths, arrays = [], []
    name = "dense/kernel" if legacy else "layers/dense/vars/0"
    for step in (1, 2, 3):
        arrays.append(rng.standard_normal((50, 40)).astype("f4"))
        paths.append(tmp_path / f"m_{step}{'.h5' if legacy else '.weights.h5'}")
        beside = name.replace("kernel", "bias").replace("vars/0", "vars/1")
        wavg.save(paths[-1], {name: arrays[-1], beside: np.float32([step])})
        with h5py.File(paths[-1], "r+") as file:
            del file[name]
            file.create_dataset(name, data=arrays[-1], **options).attrs["note"] = "kept"
    output = tmp_path / f"average{'.h5' if legacy else '.weights.h5'}"
    wavg.average_checkpoints(paths, output, weights="linear")
    expected = wavg.average([*arrays], weights="linear")
    np.testing.assert_array_equal(wavg.load(output)[name], expected)
    with h5py.File(paths[-1]) as before, h5py.File(output) as after:
        for trait in (
            "chunks",
            "compression",
            "compression_opts",
            "shuffle",
            "fletcher32",
            "maxshape",
        ):
            assert getattr(after[name], trait) == getattr(before[name], trait), trait
        assert after[name].attrs["note"] == "kept"
    assert os.path.getsize(output) < 2 * os.path.getsize(paths[-1]) + 4096  # nothing left behind


def test_chunks_much_larger_than_what_is_in_them_leave_all_numbers_right(tmp_path):
    rng = np.random.default_rng(0)
    models = []
    for step in (1, 2):
        models.append({f"layers/l{i}/vars/0": rng.random((33, 33, 33), "f4") for i in range(40)})
        write_weights(f"{tmp_path}/m_{step}.weights.h5", models[-1], None, chunks=(32, 32, 32))
    wavg.average_checkpoints(f"{tmp_path}/m_?.weights.h5", tmp_path / "out.weights.h5")
    assert_same(wavg.load(tmp_path / "out.weights.h5"), wavg.average(models))


def test_chunks_give_the_same_bytes_for_every_budget(tmp_path):
    rng = np.random.default_rng(0)
    for step in (1, 2):
        write_weights(
            f"{tmp_path}/m_{step}.weights.h5",
            {"layers/dense/vars/0": rng.standard_normal((300, 211)).astype("f4")},
            chunks=(64, 64),
            compression="gzip",
        )
    results = set()
    for budget in (smallest_budget(f"{tmp_path}/m_?.weights.h5", None), "64MiB", "1GB"):
        output = tmp_path / f"average_{budget}.weights.h5"
        wavg.average_checkpoints(f"{tmp_path}/m_?.weights.h5", output, max_memory=budget)
        results.add(read_bytes(output))
    assert len(results) == 1


def test_chunks_in_an_archive_are_read_and_not_rewritten(tmp_path):
    paths = [f"{tmp_path}/m_{step}.keras" for step in (1, 2)]
    for step, path in enumerate(paths, start=1):
        content = write_weights(io.BytesIO(), model(step), chunks=True, optimizer=None)
        with zipfile.ZipFile(path, "w") as zipped:
            zipped.writestr(WEIGHTS, content.getvalue())
    result = wavg.average_checkpoints(paths)
    assert_same(result, wavg.average([model(1), model(2)]))
    with pytest.raises(wavg.OutputError, match="does not write within an archive"):
        wavg.average_checkpoints(paths, tmp_path / "average.keras")
    wavg.average_checkpoints(paths, tmp_path / "average.weights.h5")
    assert_same(wavg.load(tmp_path / "average.weights.h5"), result)


def test_damaged_chunks_are_told(tmp_path):
    path = f"{tmp_path}/m.weights.h5"
    rng = np.random.default_rng(0)
    write_weights(
        path, {"layers/a/vars/0": rng.integers(0, 9, (64, 64)).astype("f4")}, compression="gzip"
    )
    with h5py.File(path) as file:
        info = file["layers/a/vars/0"].id.get_chunk_info(0)
    with open(path, "r+b") as file:
        file.seek(info.byte_offset + info.size // 2)
        file.write(bytes(64))
    with pytest.raises(CheckpointFormatError, match="layers/a/vars/0 cannot be read"):
        wavg.load(path)


def test_a_chunk_that_unpacks_without_end_is_refused(tmp_path):
    path = f"{tmp_path}/m.weights.h5"
    bomb = zlib.compress(bytes(3_000_000), 9)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(
            "layers/a/vars/0", (1024,), "f4", chunks=(1024,), compression="gzip"
        )
        dataset.id.write_direct_chunk((0,), bomb)
    assert len(bomb) < 4096
    with pytest.raises(CheckpointFormatError, match="unpacks to more than its 4,096 bytes"):
        wavg.load(path)


def test_a_chunk_larger_than_it_can_be_is_refused(tmp_path):
    path = f"{tmp_path}/m.weights.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(
            "layers/a/vars/0", (1024,), "f4", chunks=(1024,), compression="gzip"
        )
        dataset.id.write_direct_chunk((0,), np.random.default_rng(0).bytes(50_000))
    with pytest.raises(CheckpointFormatError, match="more bytes than it can have"):
        wavg.load(path)


def test_a_float_type_that_only_resembles_one_is_refused(tmp_path):
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(31, 22, 9, 0, 22)
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        group = file.create_group("layers/a/vars")
        space = h5py.h5s.create_simple((3,))
        h5py.h5d.create(group.id, b"0", kind, space).write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.float32([1, 2, 3])
        )
    with pytest.raises(CheckpointFormatError, match=r"not a plain number|only resembles"):
        wavg.load(tmp_path / "m.weights.h5")


def test_an_impossible_shape_of_nothing_is_refused(tmp_path):
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        file.create_dataset("layers/a/vars/0", (0, 1 << 62), "f4")
    with pytest.raises(CheckpointFormatError, match="no array can have"):
        wavg.load(tmp_path / "m.weights.h5")


def test_chunks_far_larger_than_their_tensor_are_refused(tmp_path):
    path = f"{tmp_path}/m.weights.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "layers/a/vars/0",
            data=np.zeros(3, "f4"),
            chunks=(1 << 24,),
            maxshape=(None,),
            compression="gzip",
        )
    with pytest.raises(CheckpointFormatError, match="more than its own"):
        wavg.load(path)


# --- unsound files --------------------------------------------------------------------------------


def test_an_object_of_two_names_is_refused(tmp_path):
    path = weights_file(str(tmp_path), 1)
    with h5py.File(path, "r+") as file:
        file["layers/again"] = file["layers/dense"]
    with pytest.raises(CheckpointFormatError, match="also there under another name"):
        wavg.load(path)


def test_a_circle_of_groups_ends(tmp_path):
    path = weights_file(str(tmp_path), 1)
    with h5py.File(path, "r+") as file:
        file["layers/dense/up"] = file["layers"]
    with pytest.raises(CheckpointFormatError, match="also there under another name"):
        wavg.load(path)


def test_groups_nested_too_deeply_are_refused(tmp_path):
    path = weights_file(str(tmp_path), 1)
    with h5py.File(path, "r+") as file:
        file.create_group("/".join("x" * 40))
    with pytest.raises(CheckpointFormatError, match="nested too deeply"):
        wavg.load(path)


@pytest.mark.parametrize("link", [h5py.SoftLink("/layers/dense"), h5py.ExternalLink("o.h5", "/")])
def test_links_are_not_followed(tmp_path, link):
    path = weights_file(str(tmp_path), 1)
    with h5py.File(path, "r+") as file:
        file["layers/link"] = link
    with pytest.raises(CheckpointFormatError, match="soft or external link"):
        wavg.load(path)


def edited_archive(path, edit):
    archive(path, 1)
    raw = bytearray(read_bytes(path))
    edit(raw)
    with open(path, "wb") as file:
        file.write(raw)
    return path


def flip_weights(raw):
    raw[raw.index(b"\x89HDF") + 3000] ^= 1


def encrypt(raw):
    raw[raw.index(b"PK\x01\x02") + 8] |= 1


def rename_inside(raw):
    at = raw.index(b"metadata.json")
    raw[at : at + 4] = b"META"


def other_checksum(raw):
    raw[14] ^= 1


BAD_BYTES = {
    "a flipped bit of the weights": (flip_weights, "model.weights.h5' is damaged"),
    "an encrypted member": (encrypt, "is encrypted"),
    "another name in the local header": (rename_inside, "in its own header"),
    "two checksums": (other_checksum, "two CRC-32 that differ"),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_unsound_archives_are_refused(tmp_path, case):
    edit, message = BAD_BYTES[case]
    path = edited_archive(f"{tmp_path}/m.keras", edit)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        wavg.load(path)
    assert path in str(caught.value)


def test_a_damaged_archive_is_noticed_when_averaging(tmp_path):
    good = archive(f"{tmp_path}/m_1.keras", 1)
    edited_archive(f"{tmp_path}/m_2.keras", flip_weights)
    with pytest.raises(CheckpointFormatError, match="is damaged"):
        wavg.average_checkpoints([good, f"{tmp_path}/m_2.keras"], tmp_path / "average.keras")
    assert not os.path.exists(tmp_path / "average.keras")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../up.txt", b"x")], "unsafe name"),
        ([("/abs.txt", b"x")], "unsafe name"),
        ([("c:x.txt", b"x")], "unsafe name"),
        ([("config.json", b"{}")], "no model.weights.h5"),
        ([(WEIGHTS, b"not HDF5 at all")], "not a sound HDF5 file"),
        ([(WEIGHTS, b"")], "not a sound HDF5 file"),
        ([("metadata.json", b"{nonsense")], "is not JSON"),
        ([("metadata.json", b'{"keras_version": "\\ud800"}')], "half of a surrogate pair"),
        ([("metadata.json", b'{"\\udfff": "3"}')], "half of a surrogate pair"),
    ],
)
def test_archives_without_sound_members_are_refused(tmp_path, members, message):
    path = f"{tmp_path}/m.keras"
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in members:
            zipped.writestr(name, content)
        if members[0][0] == "metadata.json":
            zipped.writestr(WEIGHTS, write_weights(io.BytesIO(), model(1)).getvalue())
    with pytest.raises(CheckpointFormatError, match=message):
        wavg.load(path)


def test_an_archives_metadata_may_be_no_table(tmp_path):
    path = f"{tmp_path}/m.keras"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("metadata.json", '["keras_version", 3]')
        zipped.writestr(WEIGHTS, write_weights(io.BytesIO(), model(1)).getvalue())
    with wavg.open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {}
        assert list(checkpoint) == list(STATE)


def test_duplicate_members_and_bombs_are_refused(tmp_path):
    path = archive(f"{tmp_path}/m.keras", 1)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as zipped:
        zipped.writestr("config.json", "{}")
    with pytest.raises(CheckpointFormatError, match="appears twice"):
        wavg.load(path)
    bomb = archive(f"{tmp_path}/b.keras", 1, zipfile.ZIP_DEFLATED, config=" " * 10_000_000)
    with pytest.raises(CheckpointFormatError, match="100 times"):
        wavg.load(bomb)


def test_compressed_weights_are_refused_with_the_reason(tmp_path):
    path = f"{tmp_path}/m.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(WEIGHTS, write_weights(io.BytesIO(), model(1)).getvalue())
    with pytest.raises(CheckpointFormatError, match="is compressed; Keras stores it"):
        wavg.load(path)


def test_a_compressed_configuration_is_carried_over(tmp_path):
    paths = [
        archive(f"{tmp_path}/m_{step}.keras", step, zipfile.ZIP_DEFLATED, '{"a": "bbbbbb"}')
        for step in (1, 2)
    ]
    for name, dtype in (("in_place", None), ("anew", "float64")):
        output = f"{tmp_path}/{name}.keras"
        wavg.average_checkpoints(paths, output, dtype=dtype)
        with zipfile.ZipFile(output) as zipped:
            assert zipped.testzip() is None
            assert zipped.read("config.json") == b'{"a": "bbbbbb"}'


def test_members_that_overlap_are_refused(tmp_path):
    path = archive(f"{tmp_path}/m.keras", 1)
    raw = bytearray(read_bytes(path))
    entry = raw.index(b"PK\x01\x02", raw.index(b"PK\x01\x02") + 4)  # of config.json
    struct.pack_into("<II", raw, entry + 20, 100, 100)
    with open(path, "wb") as file:
        file.write(raw)
    with pytest.raises(CheckpointFormatError, match="overlaps member 'model"):
        wavg.load(path)


@pytest.mark.parametrize("wide", [False, True])
def test_a_directory_too_large_is_refused_unread(tmp_path, wide):
    path, size = f"{tmp_path}/m.npz", 1 << 30
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, 0xFFFFFFFF if wide else size, 4, 0)
    if wide:
        more = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, 4)
        end = more + struct.pack("<4sIQI", b"PK\6\7", 0, 4 + size, 1) + end
    with open(path, "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(4 + size)  # a sparse file
        file.seek(4 + size)
        file.write(end)
    with pytest.raises(CheckpointFormatError, match="directory claims 1,073,741,824 bytes"):
        wavg.load(path)


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    path = f"{tmp_path}/m.npz"
    np.savez(path, a=np.ones(1), b=np.ones(1), c=np.ones(1))
    monkeypatch.setattr(zips, "_MOST_MEMBERS", 3)
    assert len(wavg.load(path)) == 3
    monkeypatch.setattr(zips, "_MOST_MEMBERS", 2)
    monkeypatch.setattr(zipfile, "ZipInfo", None)  # not one is made
    with pytest.raises(CheckpointFormatError, match="more than 2 members"):
        wavg.load(path)


def renaming(name):
    def edit(content):
        content["weight_map"]["/layers/dense/vars"] = name

    return edit


BAD_MAPS = {
    "a missing shard": (renaming("m_9.weights.h5"), "m_9.weights.h5 is missing"),
    "a path upwards": (renaming("../m.h5"), "no name of a shard"),
    "an absolute path": (renaming("/m.h5"), "no name of a shard"),
    "a backslash": (renaming("a\\m.h5"), "no name of a shard"),
    "a drive": (renaming("c:m.h5"), "no name of a shard"),
    "no text": (renaming("\ud800.h5"), "no name of a shard"),
    "a name too long": (renaming("ä" * 127 + ".h5"), "no name of a shard"),
    "a very long name that may be": (renaming("ä" * 126 + ".h5"), "is missing"),
    "a number": (renaming(7), "no name of a shard"),
    "the wrong shard": (renaming("m_1_00001.weights.h5"), "lacks /layers/dense/vars"),
    "no map": (lambda content: content.pop("weight_map"), "no weight_map"),
    "an empty map": (lambda content: content["weight_map"].clear(), "names no shard"),
    "a tensor it does not name": (
        lambda content: content["weight_map"].pop("/optimizer/vars"),
        "which its map does not say",
    ),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_unsound_maps_of_shards_are_refused(tmp_path, case):
    edit, message = BAD_MAPS[case]
    path = sharded(str(tmp_path), 1, edit=edit)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        wavg.load(path)
    assert path in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    shard = "m_1_00001.weights.h5"

    def both(content):
        content["weight_map"]["/layers/dense/vars"] = ["m_1_00000.weights.h5", shard]

    path = sharded(str(tmp_path), 1, edit=both)
    with h5py.File(tmp_path / shard, "r+") as file:
        file["layers/dense/vars/0"] = np.ones((3, 4), "f4")
    with pytest.raises(CheckpointFormatError, match="in two shards"):
        wavg.load(path)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"weight_map": 3}', b"{" * 100_000])
def test_a_map_that_is_no_map_is_refused(tmp_path, content):
    (tmp_path / "m.weights.json").write_bytes(content)
    with pytest.raises(CheckpointFormatError):
        wavg.load(tmp_path / "m.weights.json")


def test_a_map_too_large_is_refused_unread(tmp_path):
    with open(tmp_path / "m.weights.json", "wb") as file:
        file.write(b"{")
        file.truncate(11 << 20)
    with pytest.raises(CheckpointFormatError, match="more than"):
        wavg.load(tmp_path / "m.weights.json")


# --- shards as outputs ----------------------------------------------------------------------------


def test_a_folder_of_sharded_weights_is_a_run_of_whole_checkpoints(tmp_path):
    for step in (9, 10):
        sharded(str(tmp_path), step)
    plan = wavg.plan_average(str(tmp_path))
    assert [part.step for part in plan.inputs] == [9, 10]
    assert [os.path.basename(part.path) for part in plan.inputs] == [
        "m_9.weights.json",
        "m_10.weights.json",
    ]
    assert wavg.plan_average(f"{tmp_path}/m_*").inputs == plan.inputs


def test_shards_are_not_divided_anew(tmp_path):
    paths = [sharded(str(tmp_path), step) for step in (1, 2)]
    with pytest.raises(wavg.OutputError, match="Keras' shards are not divided anew") as caught:
        wavg.average_checkpoints(paths, tmp_path / "average.weights.json", max_shard_size="1MB")
    assert caught.value.path == str(tmp_path / "average.weights.json")


def test_a_map_keeps_what_else_it_says_and_needs_say_nothing(tmp_path):
    def edit(content):
        content["metadata"], content["more"] = "no table", [1]

    paths = [sharded(str(tmp_path), step, edit=edit) for step in (1, 2)]
    output = tmp_path / "average.weights.json"
    wavg.average_checkpoints(paths, output)
    assert_same(wavg.load(output), wavg.average([model(1), model(2)]))
    content = json.loads(output.read_bytes())
    assert (content["metadata"], content["more"]) == ("no table", [1])


def test_shards_that_exist_are_never_replaced(tmp_path):
    paths = [sharded(str(tmp_path), step) for step in (1, 2)]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(wavg.OutputExistsError, match="cannot be replaced at one instant"):
        wavg.average_checkpoints(paths, paths[1], overwrite=True)
    (tmp_path / "average_00001.weights.h5").write_bytes(b"mine")
    with pytest.raises(wavg.OutputExistsError, match=r"average_00001\.weights\.h5 exists"):
        wavg.average_checkpoints(paths, tmp_path / "average.weights.json")
    (tmp_path / "average_00001.weights.h5").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_shard_that_appears_meanwhile_is_left_as_it_is(tmp_path, monkeypatch, overwrite):
    paths = [sharded(str(tmp_path), step) for step in (1, 2)]
    before = sorted(path.name for path in tmp_path.iterdir())
    mine, original = tmp_path / "average_00001.weights.h5", stream.run

    def appear(*arguments, **options):
        mine.write_bytes(b"mine")
        return original(*arguments, **options)

    monkeypatch.setattr(stream, "run", appear)
    with pytest.raises(wavg.OutputExistsError, match=mine.name):
        wavg.average_checkpoints(paths, tmp_path / "average.weights.json", overwrite=overwrite)
    assert mine.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, mine.name])


@pytest.mark.parametrize("overwrite", [False, True])
def test_shards_already_published_are_withdrawn_when_another_fails(
    tmp_path, monkeypatch, overwrite
):
    from wavg.publish import AtomicFile

    paths = [sharded(str(tmp_path), step) for step in (1, 2)]
    before = sorted(path.name for path in tmp_path.iterdir())
    real = AtomicFile.commit

    def commit(self):
        if self.path.endswith(".json"):
            raise wavg.OutputError("no room")
        real(self)

    monkeypatch.setattr(AtomicFile, "commit", commit)
    with pytest.raises(wavg.OutputError, match="no room"):
        wavg.average_checkpoints(paths, tmp_path / "average.weights.json", overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_shards_that_cannot_be_withdrawn_are_named(tmp_path, monkeypatch):
    from wavg.publish import AtomicFile

    paths = [sharded(str(tmp_path), step) for step in (1, 2)]
    commit, unlink = AtomicFile.commit, os.unlink

    def no_map(self):
        if self.path.endswith(".json"):
            raise wavg.OutputError("no room")
        commit(self)

    def no_removal(path):
        if os.path.basename(path).startswith("average"):
            raise PermissionError(1, "not permitted")
        unlink(path)

    monkeypatch.setattr(AtomicFile, "commit", no_map)
    monkeypatch.setattr(os, "unlink", no_removal)
    told = (
        r"no room; \S*average_00000\.weights\.h5, \S*average_00001\.weights\.h5 cannot be removed"
    )
    with pytest.raises(wavg.OutputError, match=told) as caught:
        wavg.average_checkpoints(paths, tmp_path / "average.weights.json")
    assert caught.value.path == str(tmp_path / "average_00000.weights.h5")
    assert sorted(path.name for path in tmp_path.glob("*average*")) == [
        "average_00000.weights.h5",
        "average_00001.weights.h5",
    ]


# --- archives laid out ----------------------------------------------------------------------------


def test_an_archive_of_more_than_four_gigabytes_is_laid_out_as_zips_are(tmp_path):
    path, size = tmp_path / "large.zip", (1 << 32) + 1000
    members = [zips.NewMember("a.npy", size), zips.NewMember("ü.npy", 3)]
    layout = zips.lay_out(str(path), members)
    with open(path, "wb") as file:  # a sparse file: nothing of the first member is written
        file.truncate(layout.size)
        for offset, data in layout.pieces:
            file.seek(offset)
            file.write(data)
        file.seek(layout.members[1].payload.offset)
        file.write(b"xyz")
    with zipfile.ZipFile(path) as zipped:
        assert [(i.filename, i.file_size) for i in zipped.infolist()] == [
            ("a.npy", size),
            ("ü.npy", 3),
        ]
        with pytest.raises(zipfile.BadZipFile, match="CRC"):
            zipped.read("ü.npy")
    read = zips.read_members(str(path))
    assert read == layout.members


@pytest.mark.slow
def test_an_archive_of_very_many_members_is_laid_out_as_zips_are(tmp_path):
    path = tmp_path / "many.npz"
    tensors = {f"w{i}": np.float32([i]) for i in range(66_000)}
    wavg.save(path, tensors)
    with zipfile.ZipFile(path) as zipped:
        assert len(zipped.namelist()) == len(tensors)


@pytest.mark.parametrize(("offset", "byte"), [(5442, 0xBF), (35369, 0x4E)])
def test_an_address_where_no_file_can_have_bytes_is_a_format_error(tmp_path, offset, byte):
    data = bytearray((GOLDEN / "tf_keras_attention_1.keras").read_bytes())
    data[offset] = byte  # the highest byte but one of an address
    path = tmp_path / "m.keras"
    path.write_bytes(data)
    with pytest.raises(CheckpointFormatError, match=r"not a sound HDF5 file|CRC-32"):
        wavg.load(path)


def test_what_lies_beyond_the_end_of_an_archives_weights_is_zeros(tmp_path):
    (tmp_path / "m").write_bytes(b"..weights..")
    with open(tmp_path / "m", "rb", buffering=0) as file:
        window = hdf5._Window(file, 2, 7)
        for position, expected in (
            (0, b"weig"),
            (5, b"ts\0\0"),
            (7, bytes(4)),
            (1 << 63, bytes(4)),
        ):
            buffer = bytearray(b"####")
            window.seek(position)
            assert window.readinto(buffer) == len(expected.rstrip(b"\0"))
            assert buffer == expected
