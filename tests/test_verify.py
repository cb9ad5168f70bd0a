"""An averaged file is what its record says, or every difference is told."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import hf_folders
import wavg
from wavg import comparison
from wavg.checkpoint import TensorSpec
from wavg.cli import main


@pytest.fixture
def run(tmp_path):
    """A folder of three checkpoints, of a matrix of several blocks, small tensors and integers."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (9, 10, 11):
        model = {
            "w": rng.standard_normal((100, 130)).astype(np.float32),
            "b": rng.standard_normal(7).astype(np.float16),
            "n": np.array([step]),
            "flag": np.array(True),
        }
        wavg.save(folder / f"m_{step}.safetensors", model)
    return folder


@pytest.fixture
def output(run, tmp_path):
    path = tmp_path / "average.safetensors"
    wavg.average_checkpoints(run, path, weights="exponential:alpha=2", record="sha256")
    return path


def flip(path, place, bit=0):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1 << bit
    path.write_bytes(raw)


def data_start(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("options", [{}, {"full": True}, {"blocks": 3, "seed": 1}])
def test_a_true_average_is_found_true(run, output, options):
    result = wavg.verify(output, run, **options)
    assert result.faults == ()
    assert result.numbers == 13_000 + 7 + 1 + 1
    if options.get("full"):
        assert result.compared == result.numbers
    assert [os.path.basename(path) for path in result.inputs] == [
        f"m_{step}.safetensors" for step in (9, 10, 11)
    ]


def test_a_sample_is_of_so_many_blocks(run, output):
    sizes = {wavg.verify(output, run, blocks=1, seed=seed).compared for seed in range(12)}
    assert sizes <= {4096, 13_000 - 3 * 4096, 7, 1}
    assert len(sizes) > 1
    assert wavg.verify(output, run).compared == 13_009  # there are only seven


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "linear", "last": 2},
        {"weights": [3, -1, 0.5]},
        {"weights": "lawa:last=2,every=2"},
        {"dtype": "bfloat16", "exclude": "b"},
        {"include": ["w"]},
    ],
)
def test_whatever_was_asked_for_is_computed_again(run, tmp_path, options):
    path = tmp_path / "other.safetensors"
    wavg.average_checkpoints(run, path, **options)
    assert wavg.verify(path, run, full=True).faults == ()
    start = data_start(path)
    for place in range(start, path.stat().st_size, 1777):
        flip(path, place)
        assert len(wavg.verify(path, run, full=True).faults) == 1
        flip(path, place)


def test_any_flipped_bit_of_the_output_is_found(run, output):
    rng = np.random.default_rng(1)
    start, end = data_start(output), output.stat().st_size
    for place in [start, end - 1, *rng.integers(start, end, 40)]:
        bit = rng.integers(8)
        flip(output, place, bit)
        (fault,) = wavg.verify(output, run, full=True).faults
        assert "1 of the numbers compared differs from the average" in fault
        flip(output, place, bit)
    assert wavg.verify(output, run, full=True).faults == ()


def test_any_flipped_bit_of_an_input_is_found_by_its_digest(run, output):
    rng = np.random.default_rng(2)
    for _ in range(40):
        path = run / f"m_{rng.choice([9, 10, 11])}.safetensors"
        before = path.read_bytes()
        flip(path, rng.integers(data_start(path), len(before)), rng.integers(8))
        faults = wavg.verify(output, run, blocks=1).faults
        assert f"{path} does not have the SHA-256 recorded for it" in faults
        path.write_bytes(before)


def test_the_place_of_a_difference_is_told(run, output):
    with wavg.open_checkpoint(output) as checkpoint:
        extent = checkpoint.spec("w").extent
    flip(output, extent.offset + 4 * 5000)
    (fault,) = wavg.verify(output, run, full=True).faults
    assert fault.startswith("w: 1 of the numbers")
    assert fault.endswith("the first at position 5,000")


def test_other_tensors_are_told(run, output, tmp_path):
    with wavg.open_checkpoint(output) as checkpoint:
        metadata = dict(checkpoint.metadata)
        tensors = {name: np.asarray(tensor) for name, tensor in checkpoint.items()}
    tensors["w"], tensors["new"] = tensors["w"].T, np.float32([1])
    del tensors["b"]
    wavg.save(tmp_path / "other.safetensors", tensors, metadata=metadata)
    assert wavg.verify(tmp_path / "other.safetensors", run).faults == (
        "w: it is float32[130, 100], not float32[100, 130]",
        "b: it is not there",
        "new: it is in none of the inputs",
    )


def test_an_input_of_another_size_is_told(run, tmp_path):
    path = tmp_path / "plain.safetensors"
    wavg.average_checkpoints(run, path)
    model = wavg.load(run / "m_9.safetensors")
    wavg.save(run / "m_9.safetensors", model, metadata={"a": "b" * 100}, overwrite=True)
    (fault,) = wavg.verify(path, run).faults
    assert "m_9.safetensors has" in fault


def test_inputs_are_found_beside_the_output_and_among_others(run, output, tmp_path, monkeypatch):
    assert wavg.verify(output).faults == ()  # in a folder beside it
    shutil.copy(run / "m_9.safetensors", run / "m_8.safetensors")
    assert wavg.verify(output, str(run / "m_*")).inputs == tuple(
        str(run / f"m_{step}.safetensors") for step in (9, 10, 11)
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "deeper").mkdir()
    moved = shutil.move(output, tmp_path / "elsewhere" / "deeper" / "average.safetensors")
    with pytest.raises(FileNotFoundError, match=r"m_9\.safetensors, of which .* 2 more inputs"):
        wavg.verify(moved)
    monkeypatch.chdir(run)
    assert wavg.verify(moved).faults == ()


def test_of_several_runs_with_the_same_names_that_of_the_recorded_sizes_is_taken(run, tmp_path):
    (tmp_path / "another").mkdir()
    for path in run.iterdir():  # found before the folder "run"
        tensors = wavg.load(path)
        wavg.save(tmp_path / "another" / path.name, {**tensors, "more": np.float32([1])})
    path = tmp_path / "average.safetensors"
    wavg.average_checkpoints(run, path)
    assert wavg.verify(path).inputs[0] == str(run / "m_9.safetensors")
    (run / "m_10.safetensors").rename(tmp_path / "m_10.moved")
    (tmp_path / "another" / "m_9.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"^m_9\.safetensors|^m_10\.safetensors"):
        wavg.verify(path)


def test_of_two_runs_that_both_fit_one_has_to_be_named(run, output, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(wavg.WavgError, match="are in several folders"):
        wavg.verify(output)
    assert wavg.verify(output, tmp_path / "copy").faults == ()


def test_an_output_is_not_taken_for_its_own_input(tmp_path):
    folder = tmp_path / "run" / "checkpoint-100"
    hf_folders.single(folder, hf_folders.model(1))
    output = tmp_path / "run" / "one"
    wavg.average_checkpoints([folder], f"{output}/")
    assert wavg.verify(output).faults == ()
    hf_folders.single(tmp_path / "run" / "checkpoint-9", {"other": np.float32([1])})
    assert wavg.verify(output, [tmp_path / "run/checkpoint-9", folder]).faults == ()


def test_a_folder_of_several_kinds_may_be_named(run, output, tmp_path):
    wavg.save(run / "beside.npz", {"x": np.float32([1])})
    assert wavg.verify(output, run).faults == ()


def test_a_record_that_names_an_input_twice_is_computed_again(run, tmp_path):
    path = tmp_path / "average.safetensors"
    wavg.average_checkpoints(str(run / "m_9.safetensors"), path, record="sha256")
    with wavg.open_checkpoint(path) as made:
        record = wavg.Record.read(made.metadata)
    twice = dataclasses.replace(record, sources=record.sources * 2, count=2)
    tensors = wavg.load(path)
    metadata = {"format": "pt", "wavg": twice.text()}
    wavg.save(path, tensors, metadata=metadata, overwrite=True)
    assert wavg.verify(path, run).faults == ()


def test_a_sample_has_a_block(run, output):
    with pytest.raises(ValueError, match="blocks must be a positive number, not 0"):
        wavg.verify(output, run, blocks=0)


def test_a_sharded_folder_is_verified(tmp_path):
    run = hf_folders.trainer_run(str(tmp_path / "run"), shards=(2, 1))
    output = tmp_path / "averaged"
    wavg.average_checkpoints(run, output, max_shard_size=600, record="sha256")
    assert wavg.verify(output, run).faults == ()
    assert wavg.verify(output, tmp_path / "run", full=True).faults == ()
    shard = tmp_path / "run" / "checkpoint-900" / "model-00002-of-00002.safetensors"
    flip(shard, shard.stat().st_size - 1)
    (fault, *_) = wavg.verify(output, run).faults
    assert "model-00002-of-00002.safetensors does not have the SHA-256" in fault


def test_inputs_of_other_formats_are_verified(tmp_path):
    for step in (1, 2):
        wavg.save(tmp_path / f"k_{step}.h5", {"dense/kernel": np.float32([[step, 2]])})
    output = tmp_path / "average.safetensors"
    wavg.average_checkpoints(str(tmp_path / "k_*.h5"), output)
    assert wavg.verify(output).faults == ()


def test_a_file_without_a_record_is_refused(run, tmp_path):
    with pytest.raises(wavg.WavgError, match="has no record"):
        wavg.verify(run / "m_9.safetensors")
    text = wavg.Record("ema:decay=0.9", 7.0, (), 5).text()
    wavg.save(tmp_path / "ema.safetensors", {"w": np.float32([1])}, metadata={"wavg": text})
    with pytest.raises(wavg.WavgError, match="from models in memory"):
        wavg.verify(tmp_path / "ema.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        *('{"nothing":"1"}', '{"nothing":1}', '{"dtype":"int8"}', '{"dtype":3}', '{"dtype":true}'),
        *('{"exclude":true}', '{"include":[["w"]]}', '{"include":"w"}', '{"workers":"2"}'),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(run, output, tmp_path, options):
    with wavg.open_checkpoint(output) as checkpoint:
        text = checkpoint.metadata["wavg"].replace('"inputs"', f'"options":{options},"inputs"', 1)
    path = tmp_path / "odd.safetensors"
    wavg.save(path, wavg.load(output), metadata={"wavg": text})
    with pytest.raises(wavg.WavgError, match="its record cannot be understood"):
        wavg.verify(path, run)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b"])
def test_a_record_cannot_name_files_outside(run, tmp_path, name):
    source = wavg.Source(name, 1, 1.0, 1.0)
    record = wavg.Record("equal", 1.0, (source,), 1)
    path = tmp_path / "odd.safetensors"
    wavg.save(path, {"w": np.float32([1])}, metadata={"wavg": record.text()})
    wavg.save(tmp_path.parent / "secret.safetensors", {"w": np.float32([1])}, overwrite=True)
    with pytest.raises(FileNotFoundError):
        wavg.verify(path)


def test_the_command_line_tells_and_fails(run, output, capsys):
    assert main(["verify", str(output), str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{output} is the average that its record says",
        "compared:",
        "  13,009 of 13,009 numbers, computed again from 3 inputs",
        "  the inputs' sizes and SHA-256 with those recorded",
        "  the names, dtypes and shapes of all tensors",
        "  the metadata with the newest input's",
        "  the recorded weights with those of exponential:alpha=2 at the recorded steps",
        "  the recorded steps with those that the inputs tell",
    ]
    flip(output, output.stat().st_size - 1)
    assert main(["verify", str(output), "--full", "--json"]) == 1
    told = capsys.readouterr()
    assert len(json.loads(told.out)["faults"]) == 1
    assert "is not what its record says" in told.err
    assert main(["verify", str(output)]) == 1
    told = capsys.readouterr()
    assert told.out.splitlines() == out[1:]
    assert told.err.count("\n") == 2


def test_an_input_that_has_no_numbers_any_more_is_a_fault_among_the_others(run, output):
    path = run / "m_10.safetensors"
    raw = bytearray(path.read_bytes())
    place = data_start(path) + 8  # behind the eight bytes of n
    raw[place : place + 4] = np.float32("nan").tobytes()
    path.write_bytes(raw)
    changed, impossible, *_ = wavg.verify(output, run, full=True).faults
    assert changed == f"{path} does not have the SHA-256 recorded for it"
    assert impossible.startswith(f"it cannot be computed again: {path}: w[0, 0] is nan")


@pytest.mark.parametrize("where", [None, ".", ["m_1.h5", "m_2.h5"]])
def test_inputs_are_looked_for_as_they_are_opened(tmp_path, monkeypatch, where):
    """In a process of their own, as asked for, and with what the dtype is said to be."""
    h5py = pytest.importorskip("h5py")
    from wavg.formats import keras_h5

    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        with h5py.File(f"m_{step}.h5", "w") as file:
            file.attrs["layer_names"] = [b"d"]
            file.create_group("d").attrs["weight_names"] = [b"k"]
            file["d"].create_dataset("k", data=np.full(3, 0x3F80 + step, "<u2").view("V2"))
    told = {"opaque_dtype": "bfloat16", "isolate": True}
    wavg.average_checkpoints("m_*.h5", "average.safetensors", **told)

    def here(path, **options):
        raise AssertionError(f"{path} is read in this process")

    monkeypatch.setattr(keras_h5, "read_index", here)
    assert wavg.verify("average.safetensors", where, full=True, **told).faults == ()
    with pytest.raises(wavg.WavgError, match="no record"):  # whatever is taken for an average
        wavg.verify("m_1.h5", **told)


def test_differences_that_threads_find_at_once_are_all_counted():
    meeting = threading.Barrier(2)

    class Wrong(dict):
        def get(self, *arguments):
            found = super().get(*arguments)
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(0.2)  # for the other thread, if that may count now
            return found

    class Made:
        def spec(self, name):
            return TensorSpec(name, "float32", (2,))

        def read(self, spec, start, out):
            out[...] = 0

    decision = SimpleNamespace(spec=Made().spec("w"))
    sink = comparison.Comparison(Made(), [comparison.Part(decision, "w", 0)])
    sink._wrong = Wrong()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda n: sink.write("w", n, np.ones(1, np.float32)), (1, 0)))
    (fault,) = sink.faults()
    assert fault.startswith("w: 2 of the numbers compared differ ")
    assert fault.endswith("the first at position 0")


def test_folders_beside_the_output_that_may_not_be_read_are_passed_over(
    run, output, tmp_path, monkeypatch
):
    (tmp_path / "another user's").mkdir()
    original = os.listdir

    def listdir(path="."):
        if str(path).endswith("another user's"):
            raise PermissionError(path)
        return original(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert wavg.verify(output).faults == ()
