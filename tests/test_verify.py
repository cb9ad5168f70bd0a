"""An averaged file is what its record says, or every difference is told."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

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


def test_a_record_that_names_an_input_twice_is_no_record(run, tmp_path):
    """It could have one file opened a hundred thousand times."""
    path = tmp_path / "average.safetensors"
    wavg.average_checkpoints(str(run / "m_9.safetensors"), path, record="sha256")
    with wavg.open_checkpoint(path) as made:
        record = wavg.Record.read(made.metadata)
    twice = dataclasses.replace(record, sources=record.sources * 2, count=2)
    tensors = wavg.load(path)
    metadata = {"format": "pt", "wavg": twice.text()}
    wavg.save(path, tensors, metadata=metadata, overwrite=True)
    with pytest.raises(wavg.RecordError, match="names an input twice"):
        wavg.verify(path, run)


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
    with pytest.raises(wavg.WavgError, match=r"its record .*cannot be"):
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


def test_what_lies_about_and_cannot_be_seen_does_not_end_the_search(tmp_path, monkeypatch):
    """The inputs are beside the average's folder; a circle of links, and a folder of others."""
    for folder in ("run", "out"):
        (tmp_path / folder).mkdir()
    for step in (1, 2):
        wavg.save(tmp_path / f"run/m_{step}.safetensors", {"w": np.float32([step])})
    output = tmp_path / "out" / "average.safetensors"
    wavg.average_checkpoints(tmp_path / "run", output)
    (tmp_path / "out" / "circle").symlink_to("circle")
    scandir = os.scandir

    def refusing(path):
        if str(path) == str(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert wavg.verify(output).faults == ()


def test_the_command_line_tells_and_fails(run, output, capsys):
    assert main(["verify", str(output), str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{output} is the average that its record says",
        "compared:",
        f"  13,009 of 13,009 numbers, computed again from 3 inputs in {run}",
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
    result = wavg.verify(output, run, full=True)
    changed, impossible, *_ = result.faults
    assert (result.compared, result.numbers) == (0, 13_009)
    assert result.unchecked == ("13,009 numbers that cannot be computed",)
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


# --- what an output is besides numbers ------------------------------------------------------------


def rewritten(path, output, **changes):
    """An average whose record says something else."""
    with wavg.open_checkpoint(output) as checkpoint:
        metadata = dict(checkpoint.metadata)
    record = wavg.Record.parse(metadata["wavg"])
    metadata["wavg"] = dataclasses.replace(record, **changes).text()
    wavg.save(path, wavg.load(output), metadata=metadata, overwrite=True)
    return path


def test_what_comes_of_it_is_true_or_false(run, output):
    assert wavg.verify(output, run)
    flip(output, output.stat().st_size - 1)
    assert not wavg.verify(output, run)


def test_what_is_not_in_the_sample_is_said(run, output):
    result = wavg.verify(output, run, blocks=3)
    left = result.numbers - result.compared
    where = f"computed again from 3 inputs in {run}"
    assert result.checked[0] == f"{result.compared:,} of 13,009 numbers, {where}"
    assert result.unchecked == (f"{left:,} numbers outside the sample: full=True (--full)",)


def test_what_is_not_compared_is_said(tmp_path):
    for name in ("best", "last"):
        wavg.save(tmp_path / f"{name}.safetensors", {"w": np.float32([1])})
    inputs = [tmp_path / "best.safetensors", tmp_path / "last.safetensors"]
    wavg.average_checkpoints(inputs, tmp_path / "a.safetensors")
    result = wavg.verify(tmp_path / "a.safetensors")
    assert result.unchecked == (
        "the inputs' SHA-256: record='sha256' (--sha256) would have recorded them",
        "the recorded steps: neither names nor metadata of the inputs tell any",
    )


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ({"format": "pt", "note": "x"}, {"format": "pt", "note": "y"}, "note is 'y', not 'x'"),
        ({"format": "pt", "note": "x"}, {"format": "pt"}, "note is missing, not 'x'"),
        (
            {"format": "pt"},
            {"format": "pt", "more": "z" * 99},
            f"more is '{'z' * 57}...', not missing",
        ),
        ({"note": "x"}, {"note": "x", "format": "pt"}, "format is 'pt', not missing"),
        ({}, {}, "format is missing, not 'pt'"),
    ],
)
def test_other_metadata_than_the_newest_input_has_is_told(tmp_path, before, after, fault):
    for step in (1, 2):
        wavg.save(tmp_path / f"m_{step}.safetensors", {"w": np.float32([1])}, metadata=before)
    path = tmp_path / "average.safetensors"
    wavg.average_checkpoints(str(tmp_path / "m_*"), path)
    assert wavg.verify(path).faults == ()
    with wavg.open_checkpoint(path) as checkpoint:
        record = checkpoint.metadata["wavg"]
    wavg.save(path, wavg.load(path), metadata={**after, "wavg": record}, overwrite=True)
    assert wavg.verify(path).faults == (f"metadata: {fault}",)


def test_an_average_of_another_format_has_the_metadata_of_a_new_file(tmp_path):
    for step in (1, 2):
        wavg.save(tmp_path / f"m_{step}.npz", {"w": np.float32([1])})
    wavg.average_checkpoints(str(tmp_path / "m_*"), tmp_path / "average.safetensors")
    result = wavg.verify(tmp_path / "average.safetensors")
    assert result
    assert "the metadata with a new file's" in result.checked


def test_an_average_of_an_average_has_a_record_of_its_own(run, output, tmp_path):
    wavg.average_checkpoints([output], tmp_path / "twice.safetensors")
    assert wavg.verify(tmp_path / "twice.safetensors").faults == ()


@pytest.fixture
def folders(tmp_path):
    inputs = hf_folders.trainer_run(str(tmp_path / "series"), shards=(1, 2))
    wavg.average_checkpoints(inputs, tmp_path / "out", record="sha256")
    return tmp_path


@pytest.mark.parametrize("shards", [(2, 1), (1, 2)])
@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"max_shard_size": 600}])
def test_a_folder_as_it_was_made_has_no_faults(tmp_path, shards, options):
    inputs = hf_folders.trainer_run(str(tmp_path / "run"), shards=shards)
    wavg.average_checkpoints(inputs, tmp_path / "out", **options)
    result = wavg.verify(tmp_path / "out")
    assert result.faults == result.notes == ()
    assert f"the files beside the weights with those of {inputs[-1]}" in result.checked


def test_shards_of_which_some_had_no_metadata_are_as_they_should_be(tmp_path):
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        hf_folders.sharded(folder, hf_folders.model(step))
        for number, metadata in ((1, None), (2, {"note": "x"})):
            shard = folder / f"model-0000{number}-of-00002.safetensors"
            save_file(load_file(shard), shard, metadata)
    wavg.average_checkpoints(str(tmp_path / "checkpoint-*"), tmp_path / "out")
    assert wavg.verify(tmp_path / "out").faults == ()


def test_other_files_in_a_folder_are_told(folders):
    out, home = folders / "out", folders / "series" / "checkpoint-1000"
    (out / "modeling_tiny.py").write_text("class Evil: ...")
    (out / "config.json").write_bytes((out / "config.json").read_bytes() + b" ")
    (out / "tokenizer.json").unlink()
    (out / "extra.py").touch()
    (out / "README.md").touch()
    (out / "notes").touch()
    result = wavg.verify(out)
    assert result.faults == (
        f"config.json: it is another than in {home}",
        f"extra.py: it is not in {home}",
        f"modeling_tiny.py: it is another than in {home}",
        f"tokenizer.json: it is missing, and in {home}",
    )
    assert result.unchecked == ("what no average's folder has: README.md and 1 more",)
    result = wavg.verify(out / "model.safetensors.index.json")
    assert result.faults == ()
    assert result.unchecked == ("the files beside the weights: name the folder for that",)


def test_files_beside_are_those_of_a_folder_alone(folders, run, output):
    """A series of files has none, and so has an average of them that stands in a folder."""
    (folders / "home").mkdir()
    moved = shutil.move(output, folders / "home" / "average.safetensors")
    (folders / "home" / "config.json").write_text("{}")
    assert wavg.verify(moved, run).unchecked == ()
    why = f"the folder's other files: {run}/m_11.safetensors has no folder of its own"
    assert wavg.verify(folders / "home", run).unchecked == (why,)


def test_what_an_index_of_shards_says_besides_is_compared(folders):
    path = folders / "out" / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    assert (
        f"{path.name} with its shards and the newest input" in wavg.verify(folders / "out").checked
    )
    content["metadata"]["total_size"] += 1
    path.write_text(json.dumps({**content, "more": None}))
    shard = folders / "out" / "model-00002-of-00002.safetensors"
    before = shard.read_bytes()
    save_file(load_file(shard), shard, {"format": "pt", "wavg": "of another average"})
    assert wavg.verify(folders / "out").faults == (
        f"{path.name}: its metadata is not what its shards and the newest input make it",
        f"{shard.name}: its record is another than the first shard's",
    )
    shard.write_bytes(before)
    del content["weight_map"]["positions"]
    tensors = load_file(shard)
    del tensors["positions"]
    with wavg.open_checkpoint(folders / "out") as made:
        metadata = dict(made.metadata)
    save_file(tensors, shard, metadata)
    path.write_text(json.dumps(content))
    assert wavg.verify(folders / "out").faults == ("positions: it is not there",)


# --- what a record says that no number shows ------------------------------------------------------

SCHEDULES = [*wavg.weights.KNOWN, "lawa:last=2,every=2", "exponential:alpha=1e-3"]
SCHEDULES += ["polynomial:power=0", "5,0,-1,2,0.1", "wsm:shape=linear", "polynomial:power=400"]


@pytest.mark.parametrize("weights", SCHEDULES)
def test_the_schedule_of_any_average_agrees_with_its_weights(tmp_path, weights):
    ema = weights.startswith("post_hoc")
    for step in (100, 110, 130, 190, 200):
        metadata = (
            {"wavg": wavg.Record("power_ema:sigma_rel=0.1", float(step), (), 3).text()}
            if ema
            else {}
        )
        tensors = {"w": np.float32([step])}
        wavg.save(tmp_path / f"m_{step}.safetensors", tensors, metadata=metadata)
    path = tmp_path / "average.safetensors"
    wavg.average_checkpoints(str(tmp_path / "m_*"), path, weights=weights)
    result = wavg.verify(path)
    assert result.faults == result.notes == ()
    said = f"the recorded weights with those of {result.record.weights}"
    if weights == "lawa:last=2,every=2":
        why = "checkpoints that it leaves out are not recorded"
        assert result.unchecked[1:] == (f"{said}: {why}",)
    else:
        assert f"{said} at the recorded steps" in result.checked


def test_averages_of_one_pass_agree_with_their_schedules(run, tmp_path):
    reports = wavg.average_checkpoints(
        run,
        tmp_path / "{weights}-{last}.safetensors",
        weights=["lawa:last=1", "lawa:last=2,every=2", "cumulative_window", "linear"],
        last=[2, 3],
    )
    assert [wavg.verify(report.output, run).faults for report in reports] == [()] * 8


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"weights": "equal"},
            "its record contradicts itself: equal gives other weights: 0.333333 to ",
        ),
        ({"weights": "1,2,3"}, "its record contradicts itself: 1,2,3 gives other weights"),
        ({"weights": "exponential:alpha=2.0001"}, "its record contradicts itself: exponential:"),
        ({"count": 4}, "its record says 4 models, and lists 3 inputs"),
        (
            {"step": 12.0},
            "its record says step 12, and the newest input that has a weight in it is",
        ),
    ],
)
def test_a_record_that_contradicts_itself_is_told(run, output, tmp_path, changes, fault):
    path = rewritten(tmp_path / "odd.safetensors", output, **changes)
    (found,) = [f for f in wavg.verify(path, run).faults if not f.startswith("metadata: format")]
    assert found.startswith(fault)


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ("mine", "those of mine, which is no schedule known by its text"),
        ("{tmp}/weights.json", "which is no schedule known by its text"),
        ("{tmp}/weights.CSV", "which is no schedule known by its text"),
        ("schedule_free:r=-1", "which is no schedule known by its text"),
        ("post_hoc_ema:sigma_rel=0.1", "recorded weights with those of post_hoc_ema"),
    ],
)
def test_a_schedule_that_is_not_known_is_not_compared(run, output, tmp_path, weights, why):
    """And no file is opened that a record names."""
    for name in ("weights.json", "weights.CSV"):
        os.mkfifo(tmp_path / name)  # to open one waits for ever
    text = weights.format(tmp=tmp_path)
    path = rewritten(tmp_path / "odd.safetensors", output, weights=text)
    result = wavg.verify(path, run)
    assert any(why in each for each in result.unchecked)
    assert not any("recorded weights" in each for each in result.checked)


def test_a_flipped_bit_of_the_header_is_told_or_said(run, output):
    """All but those in the text of wavg's version, with which nothing can be compared."""
    wavg.average_checkpoints(run, output, weights="linear", record="sha256", overwrite=True)
    clean, rng = wavg.verify(output, run), np.random.default_rng(3)
    version = f'"wavg\\":\\"{wavg.__version__}\\"'.encode()
    raw = output.read_bytes()
    start = raw.index(version)
    assert len(clean.checked) == 6
    for _ in range(40):
        place = rng.integers(data_start(output))
        if start <= place < start + len(version):
            continue
        flip(output, place, rng.integers(8))
        with contextlib.suppress(wavg.WavgError):
            found = wavg.verify(output, sorted(run.iterdir()))
            assert (found.faults, found.notes, found.checked) != ((), (), clean.checked), place
        output.write_bytes(raw)


@pytest.mark.parametrize(
    ("weights", "odd"),
    [
        ("ema:half_life=1000", [0, 1, -1e308]),
        ("wsm:shape=1-sqrt", [0, 1, -1]),
        ("power_ema:sigma_rel=0.1", [0, 1e308, 1]),
    ],
)
def test_steps_that_cannot_be_are_no_crash(run, output, tmp_path, weights, odd):
    """A record may say anything, also what no formula takes."""
    with wavg.open_checkpoint(output) as checkpoint:
        sources = wavg.Record.parse(checkpoint.metadata["wavg"]).sources
    steps = tuple(dataclasses.replace(s, step=float(t)) for s, t in zip(sources, odd, strict=True))
    path = rewritten(tmp_path / "odd.safetensors", output, weights=weights, sources=steps)
    (said,) = wavg.verify(path, run).unchecked
    assert said.startswith(f"the recorded weights with those of {weights}: math ")


def test_steps_that_names_tell_otherwise_are_a_note(run, tmp_path):
    path = tmp_path / "average.safetensors"
    wavg.average_checkpoints(run, path, steps=[1, 2, 3])
    result = wavg.verify(path)
    assert result.faults == ()
    assert result.notes == (
        "the steps recorded are 1, 2, 3, and the inputs tell 9, 10, 11: they were given, or these "
        "are other files",
    )


# --- inputs that are not where or what they were --------------------------------------------------


def test_inputs_that_have_other_names_now_are_taken_in_order(run, output, tmp_path, capsys):
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for step in (9, 10, 11):
        shutil.copy(run / f"m_{step}.safetensors", renamed / f"step-{step}00.safetensors")
    shutil.copy(run / "m_11.safetensors", tmp_path / "m_11.safetensors")
    result = wavg.verify(output, renamed)
    assert result.faults == ()
    assert result.notes == (
        "the inputs have other names than recorded: "
        + ", ".join(f"m_{n}.safetensors is {renamed}/step-{n}00.safetensors" for n in (9, 10, 11)),
        "the steps recorded are 9, 10, 11, and the inputs tell 900, 1000, 1100: they were given, "
        "or these are other files",
    )
    assert main(["verify", str(output), str(renamed)]) == 0
    assert capsys.readouterr().out.count("\nnote: ") == 2
    two = [renamed / "step-900.safetensors", renamed / "step-1000.safetensors"]
    message = r"2 more inputs are not among what was given, which is 2 checkpoints, where 3 are"
    with pytest.raises(FileNotFoundError, match=message):
        wavg.verify(output, two)
    assert wavg.verify(output, [*two, tmp_path / "m_11.safetensors"]).faults == ()
    wavg.save(renamed / "other.npz", {"x": np.float32([1])})
    with pytest.raises(FileNotFoundError, match="which is 0 checkpoints"):
        wavg.verify(output, renamed)


def test_an_average_among_its_renamed_inputs_is_none_of_them(run, output):
    moved = shutil.move(output, run / "average.safetensors")
    for step in (9, 10, 11):
        (run / f"m_{step}.safetensors").rename(run / f"k_{step}.safetensors")
    result = wavg.verify(moved, run)
    assert result.faults == ()
    assert [os.path.basename(path) for path in result.inputs] == [
        f"k_{step}.safetensors" for step in (9, 10, 11)
    ]


def test_the_names_of_many_inputs_are_not_all_listed(tmp_path):
    for step in range(1, 7):
        wavg.save(tmp_path / f"m_{step}.safetensors", {"w": np.float32([step])})
    wavg.average_checkpoints(str(tmp_path / "m_*"), tmp_path / "a.safetensors", steps=range(6))
    for step in range(1, 7):
        (tmp_path / f"m_{step}.safetensors").rename(tmp_path / f"k_{step}.safetensors")
    first, second = wavg.verify(tmp_path / "a.safetensors", str(tmp_path / "k_*")).notes
    assert first.endswith("k_3.safetensors and 3 more")
    assert "0, 1, 2 ... 5, and the inputs tell 1, 2, 3 ... 6" in second


def test_checkpoints_that_were_given_and_are_no_inputs_are_a_note(run, output):
    for step in (7, 8):
        shutil.copy(run / "m_9.safetensors", run / f"m_{step}.safetensors")
    given = sorted(run.iterdir())
    (note,) = wavg.verify(output, [*given, output]).notes
    assert note == f"not among the recorded inputs: {run}/m_7.safetensors and 1 more"
    assert wavg.verify(
        output, [path for path in given if path.name != "m_8.safetensors"]
    ).notes == (f"not among the recorded inputs: {run}/m_7.safetensors",)
    assert wavg.verify(output, run).notes == ()  # a folder may hold others


def test_a_file_of_an_inputs_name_that_is_not_that_input_is_told(run, output):
    path = run / "m_10.safetensors"
    wavg.save(path, {"w": np.float32([1])}, overwrite=True)
    size = path.stat().st_size
    with pytest.raises(FileNotFoundError, match=rf"m_10\.safetensors has {size} bytes, not 5"):
        wavg.verify(output)
    path.write_bytes(b"cut")
    with pytest.raises(FileNotFoundError, match=r"recorded \(.*m_10\.safetensors: this is no safe"):
        wavg.verify(output)
    path.unlink()
    message = (
        r"^m_10\.safetensors, of which .* was made, is not to be found, of the size recorded; say"
    )
    with pytest.raises(FileNotFoundError, match=message):
        wavg.verify(output)


def test_help_tells_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    assert "exit code is 0 if it is what its record says" in " ".join(
        capsys.readouterr().out.split()
    )
