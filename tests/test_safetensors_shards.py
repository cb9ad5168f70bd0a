"""Safetensors as Hugging Face's libraries leave them: folders, shards, and their index."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors

import hf_folders
import reference
import wavg
from contract import assert_same, read_bytes
from wavg import CheckpointFormatError
from wavg.cli import main
from wavg.formats import folders
from wavg.formats import safetensors as formats_safetensors

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


# --- reading --------------------------------------------------------------------------------------


def in_a_file(folder, tensors):
    hf_folders.single(folder, tensors)
    return folder


def in_a_file_of_another_name(folder, tensors):
    hf_folders.single(folder, tensors, "weights.safetensors")
    return folder


def in_shards(folder, tensors):
    hf_folders.sharded(folder, tensors, 3)
    return folder


def in_shards_of_another_name(folder, tensors):
    hf_folders.sharded(folder, tensors, 3, base="diffusion_pytorch_model")
    return folder


def by_its_index(folder, tensors):
    return hf_folders.sharded(folder, tensors, base="any.name")


LAYOUTS = [
    in_a_file,
    in_a_file_of_another_name,
    in_shards,
    in_shards_of_another_name,
    by_its_index,
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_read_in_every_layout(tmp_path, layout):
    tensors = hf_folders.model(1)
    path = layout(str(tmp_path / "m"), tensors)
    assert_same(wavg.load(path), tensors)
    with wavg.open_checkpoint(path) as checkpoint:
        assert checkpoint.index.format == "safetensors"
        assert checkpoint.metadata == {"format": "pt"}


def test_the_files_of_a_sharded_checkpoint_are_its_index_and_then_its_shards(tmp_path):
    hf_folders.sharded(tmp_path, hf_folders.model(1))
    with wavg.open_checkpoint(tmp_path) as checkpoint:
        names = [os.path.basename(file.path) for file in checkpoint.index.files]
        assert names == [INDEX, FIRST, SECOND]
        assert {spec.extent.file for spec in checkpoint.index.tensors} == {1, 2}


def test_inputs_may_be_laid_out_differently_from_each_other(tmp_path):
    models = [hf_folders.model(seed) for seed in range(len(LAYOUTS))]
    paths = [
        layout(str(tmp_path / f"run_{seed}"), models[seed]) for seed, layout in enumerate(LAYOUTS)
    ]
    result = wavg.average_checkpoints(paths, weights="linear")
    for name, array in result.items():
        rows = np.stack([model[name] for model in models])
        if name != "positions":
            assert reference.same_bytes(array, reference.average([1, 2, 3, 4, 5], rows)), name


def test_a_run_of_folders_is_in_order_with_the_steps_of_their_names(tmp_path):
    hf_folders.trainer_run(tmp_path, (900, 1000, 1100), (2, 1, 3))
    plan = wavg.plan_average(tmp_path)
    assert [part.step for part in plan.inputs] == [900, 1000, 1100]
    assert wavg.plan_average(f"{tmp_path}/checkpoint-*").inputs == plan.inputs
    folders = [os.path.join(tmp_path, f"checkpoint-{step}") for step in (1000, 900)]
    assert wavg.plan_average(folders, sort=True).inputs[-1].step == 1000
    with pytest.warns(UserWarning, match="suggest another order"):
        wavg.plan_average(folders)


def test_a_run_that_is_a_checkpoint_too_has_to_be_told_apart(tmp_path):
    hf_folders.trainer_run(tmp_path)
    hf_folders.single(tmp_path, hf_folders.model(1))
    with pytest.raises(wavg.WavgError, match=r"is a checkpoint, model\.safetensors, and holds"):
        wavg.plan_average(tmp_path)
    assert len(wavg.plan_average(f"{tmp_path}/checkpoint-*").inputs) == 2
    assert len(wavg.plan_average(tmp_path / "model.safetensors").inputs) == 1


def test_the_average_of_an_earlier_call_in_the_run_is_none_of_its_checkpoints(tmp_path):
    hf_folders.trainer_run(tmp_path)
    hf_folders.single(tmp_path, hf_folders.model(1), "average.safetensors")
    plan = wavg.plan_average(tmp_path, tmp_path / "average.safetensors")
    assert [part.step for part in plan.inputs] == [900, 1000]


def test_folders_of_other_parts_leave_a_checkpoint_one(tmp_path):
    hf_folders.single(tmp_path, hf_folders.model(1))
    hf_folders.single(tmp_path / "2_Dense", hf_folders.model(2))
    assert_same(wavg.load(tmp_path), hf_folders.model(1))
    assert len(wavg.plan_average(tmp_path).inputs) == 1


def test_a_link_to_the_newest_folder_is_no_second_one(tmp_path):
    hf_folders.trainer_run(tmp_path)
    os.symlink("checkpoint-1000", tmp_path / "latest")
    assert [part.step for part in wavg.plan_average(tmp_path).inputs] == [900, 1000]


def test_files_of_a_series_are_a_run_whatever_the_name_of_the_last(tmp_path):
    for name in ("model_1", "model_2"):
        hf_folders.single(tmp_path, hf_folders.model(1), f"{name}.safetensors")
    assert len(wavg.plan_average(tmp_path).inputs) == 2
    hf_folders.single(tmp_path, hf_folders.model(1))
    with pytest.raises(wavg.WavgError, match="besides a numbered series"):
        wavg.plan_average(tmp_path)


def test_one_checkpoint_in_two_forms_is_refused(tmp_path):
    hf_folders.sharded(tmp_path, hf_folders.model(1))
    hf_folders.single(tmp_path, hf_folders.model(1))
    with pytest.raises(CheckpointFormatError, match=rf"both model\.safetensors and {INDEX}"):
        wavg.load(tmp_path)
    assert_same(wavg.load(tmp_path / INDEX), hf_folders.model(1))


def test_a_glob_over_all_of_a_sharded_checkpoints_files_is_the_checkpoint(tmp_path):
    hf_folders.sharded(tmp_path, hf_folders.model(1))
    assert len(wavg.plan_average(f"{tmp_path}/model*").inputs) == 1


def test_one_shard_is_no_checkpoint(tmp_path):
    hf_folders.sharded(tmp_path, hf_folders.model(1))
    with pytest.raises(CheckpointFormatError, match="name their folder, or their index"):
        wavg.load(tmp_path / FIRST)


@pytest.mark.parametrize(
    "names",
    [
        ["notes.txt"],
        ["config.json", "model.weights.h5"],
        ["config.json", "consolidated.00.pth"],
        ["config.json", "flax_model.msgpack"],
        ["config.json", "model-100.safetensors", "model-200.safetensors"],
    ],
)
def test_a_folder_that_is_not_one_checkpoint_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointFormatError, match="is a folder; expected a checkpoint"):
        wavg.load(tmp_path)


NO_CHECKPOINTS = {  # what the Trainer leaves in the folder of a step, and what is said of it
    "killed at once": ([], "it is empty"),
    "killed before the weights": (["config.json"], "it holds no weights, as a save cut short"),
    "weights removed": (["optimizer.pt", "rng_state.pth"], "no weights.* remove it, or name"),
    "killed between shards": (
        ["config.json", "model-00001-of-00002.safetensors"],
        "it holds shards and no index of them, as a save cut short",
    ),
    "pickled": (["config.json", "pytorch_model.bin"], "pytorch_model.bin, a PyTorch pickle"),
    "pickled shards": (["pytorch_model-00001-of-00002.bin"], "a PyTorch pickle, .*save_pretrained"),
    "pickled adapter": (["adapter_config.json", "adapter_model.bin"], "adapter_model.bin, a Py"),
    "DeepSpeed": (
        ["config.json", "latest", "zero_to_fp32.py", "global_step1000/mp_rank_00_model_states.pt"],
        r"DeepSpeed.*`python (.*)/zero_to_fp32\.py \1 OUTPUT --safe_serialization`",
    ),
    "FSDP": (
        ["optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/__0_0.distcp"],
        "FSDP.*`accelerate merge-weights .*checkpoint-1000/pytorch_model_fsdp_0 OUTPUT`",
    ),
}


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_a_step_without_weights_is_named_and_explained_not_passed_over(tmp_path, case):
    names, message = NO_CHECKPOINTS[case]
    _, newest = hf_folders.trainer_run(tmp_path)
    shutil.rmtree(newest)
    os.mkdir(newest)
    for name in names:
        os.makedirs(os.path.dirname(os.path.join(newest, name)), exist_ok=True)
        Path(newest, name).write_bytes(b"")
    for inputs in (tmp_path, f"{tmp_path}/checkpoint-*", [newest]):
        with pytest.raises(FileNotFoundError, match=f"checkpoint-1000: .*{message}"):
            wavg.plan_average(inputs, tmp_path / "averaged")
    with pytest.raises(CheckpointFormatError, match=f"1000 is no checkpoint: .*{message}"):
        wavg.load(newest)


def test_no_folder_of_a_series_is_passed_over_whatever_its_name(tmp_path):
    for step in (9, 10):
        hf_folders.single(tmp_path / f"epoch_{step}", hf_folders.model(step))
    (tmp_path / "epoch_11").mkdir()
    with pytest.raises(FileNotFoundError, match="epoch_11: it is empty"):
        wavg.plan_average(tmp_path)


def test_a_final_model_among_steps_without_weights_is_the_model(tmp_path):
    hf_folders.single(tmp_path, hf_folders.model(1))
    (tmp_path / "checkpoint-10").mkdir()
    assert_same(wavg.load(tmp_path), hf_folders.model(1))
    assert len(wavg.plan_average(tmp_path).inputs) == 1


def test_folders_that_are_none_of_the_series_may_hold_anything(tmp_path):
    hf_folders.trainer_run(tmp_path)
    for name in ("runs", "logs-1", "checkpoint", "tmp-checkpoint-1100"):
        (tmp_path / name).mkdir()
    hf_folders.single(tmp_path / "tmp-checkpoint-1100", hf_folders.model(1))  # complete or not
    assert [part.step for part in wavg.plan_average(tmp_path).inputs] == [900, 1000]


@pytest.mark.parametrize("inputs", ["checkpoint-*/unet", "*/unet/*.safetensors"])
def test_the_parts_of_a_pipeline_have_the_steps_of_their_checkpoints(tmp_path, inputs):
    name = "diffusion_pytorch_model.safetensors"
    for step in (900, 1000):
        for part in ("unet", "vae"):
            hf_folders.single(tmp_path / f"checkpoint-{step}" / part, hf_folders.model(step), name)
            (tmp_path / f"checkpoint-{step}" / part / "config.json").write_bytes(b"{}")
    (tmp_path / "averaged").mkdir()
    report = wavg.average_checkpoints(tmp_path / inputs, tmp_path / "averaged" / "unet")
    assert [part.step for part in report.plan.inputs] == [900, 1000]
    assert sorted(os.listdir(report.output)) == ["config.json", name]


def test_shards_may_be_links_as_in_a_cache(tmp_path):
    hf_folders.sharded(tmp_path / "blobs", hf_folders.model(1))
    (tmp_path / "snapshot").mkdir()
    for name in os.listdir(tmp_path / "blobs"):
        os.symlink(f"../blobs/{name}", tmp_path / "snapshot" / name)
    assert_same(wavg.load(tmp_path / "snapshot"), hf_folders.model(1))


# --- indexes that are not sound -------------------------------------------------------------------

TENSOR = "layers.0.attention.weight"  # in the first shard


def naming(shard):
    def edit(content):
        content["weight_map"][TENSOR] = shard

    return edit


def also(content):
    content["weight_map"]["lm_head.weight"] = FIRST


BAD_INDEXES = {
    "a missing shard": (naming("gone.safetensors"), "the shard gone.safetensors is missing"),
    "a path upwards": (naming("../m.safetensors"), f"{TENSOR}', is no name of a shard"),
    "a folder": (naming("sub/m.safetensors"), f"{TENSOR}', is no name of a shard"),
    "an absolute path": (naming("/m.safetensors"), f"{TENSOR}', is no name of a shard"),
    "a backslash": (naming("a\\m.safetensors"), f"{TENSOR}', is no name of a shard"),
    "a drive": (naming("c:m.safetensors"), f"{TENSOR}', is no name of a shard"),
    "a NUL": (naming("m\0.safetensors"), f"{TENSOR}', is no name of a shard"),
    "a surrogate": (naming("m\ud800.safetensors"), f"{TENSOR}', is no name of a shard"),
    "a hidden file": (naming(".m.safetensors"), f"{TENSOR}', is no name of a shard"),
    "another file": (naming("config.json"), f"{TENSOR}', is no name of a shard"),
    "a number": (naming(7), f"{TENSOR}', is no name of a shard"),
    "a list": (naming([FIRST]), f"{TENSOR}', is no name of a shard"),
    "too long a name": (naming("m" * 999 + ".safetensors"), "cannot be read"),
    "the wrong shard": (naming(SECOND), f"{TENSOR}' is in {FIRST}, where the index says {SECOND}"),
    "no map": (lambda content: content.pop("weight_map"), "no table weight_map"),
    "a map that is a list": (lambda content: content.update(weight_map=[]), "no table weight_map"),
    "an empty map": (lambda content: content["weight_map"].clear(), "names no shard"),
    "a tensor it does not name": (
        lambda content: content["weight_map"].pop(TENSOR),
        f"{TENSOR}' is in {FIRST}, and the index does not name it",
    ),
    "a tensor that is not there": (also, f"{FIRST} lacks 'lm_head.weight'"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_unsound_indexes_are_refused(tmp_path, case):
    edit, message = BAD_INDEXES[case]
    path = hf_folders.sharded(tmp_path, hf_folders.model(1), edit=edit)
    with pytest.raises(CheckpointFormatError, match=re.escape(message)) as caught:
        wavg.load(tmp_path)
    assert path in str(caught.value)
    assert caught.value.path == path


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    tensors = hf_folders.model(1)
    hf_folders.sharded(tmp_path, tensors)
    second = {**dict(list(tensors.items())[4:]), TENSOR: tensors[TENSOR]}
    hf_folders.single(tmp_path, second, SECOND)
    with pytest.raises(CheckpointFormatError, match=f"in two shards, {FIRST} and {SECOND}") as e:
        wavg.load(tmp_path)
    assert e.value.tensor == TENSOR


@pytest.mark.parametrize("content", [b"{", b"[]", b"{" * 100_000, b"", b'{"weight_map": "\xff"}'])
def test_an_index_that_is_no_json_table_is_refused(tmp_path, content):
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=re.escape(INDEX)):
        wavg.load(tmp_path)


@pytest.mark.parametrize("where", ["top", "map"])
def test_a_name_twice_in_an_index_is_refused(tmp_path, where):
    path = hf_folders.sharded(tmp_path, hf_folders.model(1))
    with open(path) as file:
        text = file.read()
    if where == "top":
        text, name = text.replace("{", '{"weight_map": {},', 1), "weight_map"
    else:
        entry, name = json.dumps(TENSOR) + f': "{FIRST}",', TENSOR
        text = text.replace('"weight_map": {', '"weight_map": {' + entry)
    with open(path, "w") as file:
        file.write(text)
    with pytest.raises(CheckpointFormatError, match=f"'{name}' appears twice"):
        wavg.load(path)


def test_an_index_too_large_is_refused_unread(tmp_path):
    with open(tmp_path / INDEX, "wb") as file:
        file.write(b"{")
        file.truncate(11 << 20)
    with pytest.raises(CheckpointFormatError, match="more than 10,485,760"):
        wavg.load(tmp_path)


def test_an_index_of_very_many_shards_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("wavg.formats.safetensors_shards._MOST_SHARDS", 1)
    hf_folders.sharded(tmp_path, hf_folders.model(1))
    with pytest.raises(CheckpointFormatError, match="names 2 shards"):
        wavg.load(tmp_path)


def test_a_shard_that_is_not_sound_is_named(tmp_path):
    hf_folders.sharded(tmp_path, hf_folders.model(1))
    with open(tmp_path / SECOND, "r+b") as file:
        file.truncate(200)
    with pytest.raises(CheckpointFormatError, match=f"{SECOND}: not a sound safetensors file"):
        wavg.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "diagnosis"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git-LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"", "empty"),
        (b"short", "header claims"),
    ],
)
def test_what_stands_in_the_place_of_a_shard_is_diagnosed(tmp_path, content, diagnosis):
    hf_folders.sharded(tmp_path, hf_folders.model(1))
    (tmp_path / SECOND).write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=f"{SECOND}: .*{diagnosis}"):
        wavg.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "diagnosis"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git-LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"", "empty"),
    ],
)
def test_what_stands_in_the_place_of_an_index_is_diagnosed(tmp_path, content, diagnosis):
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=f"{INDEX}: .*{diagnosis}"):
        wavg.load(tmp_path)


def test_a_shard_whose_header_is_no_table_is_refused(tmp_path):
    hf_folders.sharded(tmp_path, hf_folders.model(1))
    (tmp_path / SECOND).write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(CheckpointFormatError, match=f"{SECOND}.*header is not a table"):
        wavg.load(tmp_path)


def test_a_shard_that_is_a_pipe_is_refused_unopened(tmp_path):
    hf_folders.sharded(tmp_path, hf_folders.model(1))
    os.unlink(tmp_path / SECOND)
    os.mkfifo(tmp_path / SECOND)
    with pytest.raises(CheckpointFormatError, match="device, pipe or socket"):
        wavg.load(tmp_path)


def test_a_shard_that_changes_during_the_run_is_noticed(tmp_path):
    hf_folders.sharded(tmp_path, hf_folders.model(1))
    with wavg.open_checkpoint(tmp_path) as checkpoint:
        os.utime(tmp_path / SECOND, (1, 1))
        with pytest.raises(wavg.CheckpointChangedError, match=SECOND):
            checkpoint.verify_unchanged()


# --- writing --------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    return hf_folders.trainer_run(str(tmp_path / "run"))


def averaged(run, **options):
    return wavg.average_checkpoints(run, **options)


@pytest.mark.parametrize("name", ["averaged", "averaged/", "v1.5"])
def test_an_output_folder_is_the_newest_with_its_numbers_replaced(run, tmp_path, name):
    output = f"{tmp_path}/{name}"
    report = wavg.average_checkpoints(run, output, weights="linear")
    assert report.output == output
    assert_same(wavg.load(output), averaged(run, weights="linear"))
    before, after = hf_folders.contents(run[-1]), hf_folders.contents(output)
    assert after.keys() == {INDEX, FIRST, SECOND, *hf_folders.BESIDE}
    for same in (INDEX, *hf_folders.BESIDE):
        assert after[same] == before[same]
    assert set(os.listdir(tmp_path)) == {"run", name.rstrip("/")}


def test_an_average_of_copies_is_the_copy(tmp_path):
    first = hf_folders.trainer_run(str(tmp_path), (7,), (3,))[0]
    shutil.copytree(first, tmp_path / "checkpoint-8")
    wavg.average_checkpoints([first, tmp_path / "checkpoint-8"], tmp_path / "out", record="none")
    expected = hf_folders.contents(first)
    assert hf_folders.contents(tmp_path / "out") == {
        name: data for name, data in expected.items() if name not in hf_folders.STATE
    }


def test_the_command_line_averages_a_run_into_a_folder(run, tmp_path, capsys):
    output = str(tmp_path / "averaged/")
    assert main(["average", *run[::-1], "-o", output, "--max-shard-size", "600"]) == 0
    assert f"wrote {output}" in capsys.readouterr().out
    assert_same(wavg.load(output), averaged(run))


@pytest.mark.parametrize("ending", [".safetensors", ".npz", ".h5"])
def test_shards_average_into_one_file(run, tmp_path, ending):
    output = tmp_path / f"averaged{ending}"
    wavg.average_checkpoints(run, output)
    assert_same(wavg.load(output), averaged(run))
    if ending == ".safetensors":
        with wavg.open_checkpoint(output) as checkpoint:
            assert checkpoint.metadata.keys() == {"format", "wavg"}
            assert checkpoint.metadata["format"] == "pt"


def test_one_file_averages_into_a_folder_with_its_name(tmp_path):
    run = hf_folders.trainer_run(str(tmp_path / "run"), shards=(2, 1))
    wavg.average_checkpoints(run, tmp_path / "out")
    assert hf_folders.contents(tmp_path / "out").keys() == {
        "model.safetensors",
        *hf_folders.BESIDE,
    }
    assert_same(wavg.load(tmp_path / "out"), averaged(run))


def test_a_file_that_was_named_stands_for_its_folder_whatever_stands_beside_it(tmp_path):
    for step in (1, 2):
        hf_folders.sharded(tmp_path / f"c-{step}", hf_folders.model(step))
        hf_folders.single(tmp_path / f"c-{step}", hf_folders.model(step + 10))
        np.savez(tmp_path / f"c-{step}/model.npz", w=np.ones(step))
    run = [tmp_path / f"c-{step}/model.safetensors" for step in (1, 2)]
    wavg.average_checkpoints(run, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    assert_same(wavg.load(tmp_path / "out"), averaged(run))
    with pytest.raises(wavg.OutputError, match="is no folder of safetensors for it to follow"):
        wavg.average_checkpoints([tmp_path / "c-2/model.npz"], f"{tmp_path}/other/")


@pytest.mark.parametrize("shards", [(2, 1), (1, 3)])
@pytest.mark.parametrize("limit", [100, 300, 600, "1kB", "5GB"])
def test_an_output_is_divided_anew_on_request(tmp_path, shards, limit):
    run = hf_folders.trainer_run(str(tmp_path / "run"), shards=shards)
    wavg.average_checkpoints(run, tmp_path / "out", max_shard_size=limit)
    expected, result = averaged(run), wavg.load(tmp_path / "out")
    assert_same({name: result[name] for name in expected}, expected)  # large ones come before
    names = hf_folders.contents(tmp_path / "out").keys() - hf_folders.BESIDE.keys()
    if limit == "5GB":
        assert names == {"model.safetensors"}
        return
    count = len(names) - 1
    assert names == {INDEX} | {
        f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)
    }
    bytes_allowed = 1000 if limit == "1kB" else limit
    for name in names - {INDEX}:
        with safetensors.safe_open(tmp_path / "out" / name, "np") as shard:
            assert shard.metadata()["format"] == "pt"
            sizes = [np.prod(shard.get_slice(key).get_shape()) * 4 for key in shard.keys()]  # noqa: SIM118
        assert sum(sizes) <= max(bytes_allowed, 512) or len(sizes) == 1


def test_an_index_may_be_named_as_output(run, tmp_path):
    output = tmp_path / f"averaged{folders.INDEX}"
    wavg.average_checkpoints(run, output)
    assert sorted(os.listdir(tmp_path)) == [
        "averaged-00001-of-00002.safetensors",
        "averaged-00002-of-00002.safetensors",
        output.name,
        "run",
    ]
    assert_same(wavg.load(output), averaged(run))
    with pytest.raises(wavg.OutputExistsError, match="cannot be replaced at one instant"):
        wavg.average_checkpoints(run, output, overwrite=True)


def test_tensors_are_saved_with_an_index(tmp_path):
    wavg.save(tmp_path / f"m{folders.INDEX}", hf_folders.model(1))
    assert_same(wavg.load(tmp_path), hf_folders.model(1))


def test_another_format_averages_into_shards(tmp_path):
    for step in (1, 2):
        wavg.save(tmp_path / f"m_{step}.npz", hf_folders.model(step))
    output = tmp_path / f"out{folders.INDEX}"
    wavg.average_checkpoints(f"{tmp_path}/*.npz", output, max_shard_size=800)
    expected, result = averaged(f"{tmp_path}/*.npz"), wavg.load(output)
    assert len(json.loads(output.read_bytes())["weight_map"]) == len(expected)
    assert_same({name: result[name] for name in expected}, expected)


def test_an_index_that_would_be_too_large_to_read_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr("wavg.formats.safetensors_shards._LARGEST_MAP", 300)
    path = tmp_path / "out.safetensors.index.json"
    with pytest.raises(wavg.OutputError, match="write one file"):
        wavg.save(path, hf_folders.model(1))
    assert not path.exists()


def test_the_index_tells_the_size_of_another_dtype(run, tmp_path):
    wavg.average_checkpoints(run, tmp_path / "out", dtype="float16")
    result = wavg.load(tmp_path / "out")
    assert_same(result, averaged(run, dtype="float16"))
    content = json.loads((tmp_path / "out" / INDEX).read_bytes())
    assert content["metadata"]["total_size"] == sum(array.nbytes for array in result.values())
    assert content["metadata"]["total_parameters"] == sum(a.size for a in result.values())
    assert content["weight_map"] == json.loads(read_bytes(f"{run[-1]}/{INDEX}"))["weight_map"]


def test_the_configuration_tells_another_dtype_and_is_else_the_same(run, tmp_path):
    config = b'{\n "torch_dtype" : "float32", "text_config": {"dtype":"float32"},"x": "float32" }'
    for folder in run:
        with open(f"{folder}/config.json", "wb") as file:
            file.write(config)
    wavg.average_checkpoints(run, tmp_path / "same")
    assert (tmp_path / "same/config.json").read_bytes() == config
    wavg.average_checkpoints(run, tmp_path / "out", dtype="float16")
    expected = config.replace(b'dtype" : "float32', b'dtype" : "float16')
    expected = expected.replace(b'dtype":"float32', b'dtype":"float16')
    assert (tmp_path / "out/config.json").read_bytes() == expected
    wavg.average_checkpoints(run, tmp_path / "mixed", dtype="float16", exclude="*mlp*")
    assert (tmp_path / "mixed/config.json").read_bytes() == config  # loaders would narrow those
    wavg.average_checkpoints(run, tmp_path / "wider", dtype="float64", exclude="*mlp*")
    assert b'"float64"' in (tmp_path / "wider/config.json").read_bytes()


def test_an_index_keeps_what_else_it_says(tmp_path):
    def edit(content):
        content["more"] = [1, {"deep": None}]
        del content["metadata"]

    for step in (1, 2):
        hf_folders.sharded(tmp_path / f"c-{step}", hf_folders.model(step), edit=edit)
    wavg.average_checkpoints(tmp_path, tmp_path / "out", max_shard_size=900)
    content = json.loads((tmp_path / "out" / INDEX).read_bytes())
    assert content["more"] == [1, {"deep": None}]
    assert "metadata" not in content
    assert_same(wavg.load(tmp_path / "out"), averaged(f"{tmp_path}/c-*"))


def test_many_averages_are_as_many_folders(run, tmp_path):
    reports = wavg.average_checkpoints(run, f"{tmp_path}/{{weights}}", weights=["equal", "linear"])
    assert [os.path.basename(report.output) for report in reports] == ["equal", "linear"]
    for report in reports:
        assert_same(wavg.load(report.output), averaged(run, weights=report.plan.schedule))


def test_the_output_of_an_earlier_call_is_not_averaged_in(run, tmp_path):
    output = tmp_path / "run/averaged"
    wavg.average_checkpoints(tmp_path / "run", output)
    expected = hf_folders.contents(output)
    wavg.average_checkpoints(tmp_path / "run", output, overwrite=True)
    assert hf_folders.contents(output) == expected


@pytest.mark.parametrize("target", ["averaged.safetensors", "averaged.h5", "averaged.npz"])
def test_one_file_has_no_shards(run, tmp_path, target):
    with pytest.raises(wavg.OutputError, match="is one file, and has no shards"):
        wavg.plan_average(run, tmp_path / target, max_shard_size="5GB")


def test_a_folder_needs_a_folder_to_follow(tmp_path):
    for step in (1, 2):
        wavg.save(tmp_path / f"m_{step}.safetensors", {"w": np.ones(3, "f4")})
        wavg.save(tmp_path / f"m_{step}.npz", {"w": np.ones(3, "f4")})
    for kind in ("safetensors", "npz"):
        with pytest.raises(wavg.OutputError, match="no format is named so"):
            wavg.average_checkpoints(f"{tmp_path}/*.{kind}", tmp_path / "out")
        with pytest.raises(wavg.OutputError, match="is no folder of safetensors for it to follow"):
            wavg.average_checkpoints(f"{tmp_path}/*.{kind}", f"{tmp_path}/out/")


# --- what is carried over -------------------------------------------------------------------------


def test_links_out_of_the_folder_are_not_followed(run, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    os.symlink(tmp_path / "secret", f"{run[-1]}/vocab.txt")
    os.symlink("config.json", f"{run[-1]}/merges.txt")
    wavg.average_checkpoints(run, tmp_path / "out")
    found = hf_folders.contents(tmp_path / "out")
    assert "vocab.txt" not in found
    assert found["merges.txt"] == found["config.json"]


def test_links_of_a_cache_are_followed(tmp_path):
    [made] = hf_folders.trainer_run(str(tmp_path / "files"), (1,), (2,))
    snapshot = tmp_path / "hub/snapshots/0123"
    snapshot.mkdir(parents=True)
    os.rename(made, tmp_path / "hub/blobs")
    for name in os.listdir(tmp_path / "hub/blobs"):
        os.symlink(f"../../blobs/{name}", snapshot / name)
    wavg.average_checkpoints(snapshot, tmp_path / "out")
    assert (tmp_path / "out").exists()
    assert hf_folders.BESIDE.keys() < hf_folders.contents(tmp_path / "out").keys()
    assert not os.path.islink(tmp_path / "out/config.json")


def test_folders_and_pipes_are_not_copied(run, tmp_path):
    os.mkdir(f"{run[-1]}/LICENSES")
    os.mkfifo(f"{run[-1]}/NOTICE")
    wavg.average_checkpoints(run, tmp_path / "out")
    assert not {"LICENSES", "NOTICE"} & hf_folders.contents(tmp_path / "out").keys()


# --- replacing ------------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_and_replaced_on_request(run, tmp_path):
    output = tmp_path / "out"
    wavg.average_checkpoints(run[:1], output)
    with pytest.raises(wavg.OutputExistsError, match="--overwrite"):
        wavg.average_checkpoints(run, output)
    wavg.average_checkpoints(run, output, overwrite=True)
    assert_same(wavg.load(output), averaged(run))
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


def test_an_empty_folder_is_replaced_on_request(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(wavg.OutputExistsError, match="--overwrite"):
        wavg.average_checkpoints(run, tmp_path / "out")
    wavg.average_checkpoints(run, tmp_path / "out", overwrite=True)
    assert_same(wavg.load(tmp_path / "out"), averaged(run))


@pytest.mark.parametrize("kind", ["the newest input", "a folder within", "not a checkpoint"])
def test_a_folder_that_holds_more_than_an_output_is_not_replaced(run, tmp_path, kind):
    output = run[-1]
    if kind != "the newest input":
        output = str(tmp_path / "out")
        wavg.average_checkpoints(run, output)
        if kind == "a folder within":
            os.mkdir(f"{output}/runs")
        else:
            os.unlink(f"{output}/{INDEX}")
    before = sorted(os.listdir(output))
    with pytest.raises(wavg.OutputError, match="is not replaced: it holds"):
        wavg.average_checkpoints(run, output, overwrite=True)
    assert sorted(os.listdir(output)) == before


def test_an_output_may_replace_an_input(tmp_path):
    run = hf_folders.trainer_run(str(tmp_path / "run"))
    for name in hf_folders.STATE:
        os.unlink(f"{run[-1]}/{name}")
    expected = averaged(run)
    wavg.average_checkpoints(run, run[-1], overwrite=True)
    assert_same(wavg.load(run[-1]), expected)


def test_nothing_is_left_of_a_folder_that_failed(run, tmp_path):
    with open(f"{run[0]}/{SECOND}", "r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.write(b"\xff" * 4)
    with pytest.raises(wavg.NonFiniteError):
        wavg.average_checkpoints(run, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


# --- room on the disk -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("out", {}),
        ("out", {"dtype": "float16"}),
        ("out", {"record": "none"}),
        ("out", {"max_shard_size": 600}),
        ("out.safetensors", {}),
        ("out.npz", {}),
    ],
)
def test_a_plan_tells_the_disk_that_an_output_takes(run, tmp_path, name, options):
    output = tmp_path / name
    plan = wavg.plan_average(run, output, **options)
    wavg.average_checkpoints(run, output, **options)
    files = output.iterdir() if output.is_dir() else [output]
    size = sum(file.stat().st_size for file in files if file.name not in hf_folders.BESIDE)
    assert abs(plan.disk_bytes - size) < 2500  # headers, of tiny tensors
    if options == {"record": "none"}:
        assert plan.disk_bytes == size


def test_a_disk_without_room_is_told_before_the_work_begins(run, tmp_path, monkeypatch, capsys):
    free = os.statvfs_result((512, 512, 9, 9, 3, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    monkeypatch.setattr("wavg.files.stream.run", None)
    with pytest.raises(wavg.OutputError, match="1,536 are free") as caught:
        wavg.average_checkpoints(run, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert main(["average", *run, "-o", f"{tmp_path}/out", "--dry-run"]) == 1
    assert re.search(r"takes \d,\d+ bytes, and 1,536 are free", capsys.readouterr().err)


def test_several_outputs_share_the_disk(run, tmp_path, monkeypatch):
    size = wavg.plan_average(run, tmp_path / "out").disk_bytes
    free = os.statvfs_result((1, 1, 9, size * 3 // 2, size * 3 // 2, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    with pytest.raises(wavg.OutputError, match="nothing was begun"):
        wavg.average_checkpoints(run, f"{tmp_path}/{{last}}", last=[1, 2])
    wavg.average_checkpoints(run, f"{tmp_path}/one")


# --- limits ---------------------------------------------------------------------------------------


def test_more_shards_than_files_may_be_open_raise_that_limit(tmp_path):
    tensors = {f"t{n:03}": np.full(2, n, "f4") for n in range(90)}
    paths = [tmp_path / f"c-{step}" for step in (1, 2)]
    for path in paths:
        hf_folders.sharded(path, tensors, 90)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        wavg.average_checkpoints(paths, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_same(wavg.load(tmp_path / "out"), tensors)


def test_the_page_names_what_is_carried_over():
    page = (Path(__file__).parent.parent / "docs/formats.md").read_text("utf-8")
    assert not [pattern for pattern in folders._CARRIED if f"`{pattern}`" not in page]


def test_nothing_of_a_training_is_carried_over():
    kept = {name for name in (*hf_folders.BESIDE, *hf_folders.STATE) if folders.is_carried(name)}
    assert kept == hf_folders.BESIDE.keys()
    for name in ("optimizer.model", "scheduler.py", "rng_state.jinja", ".hidden.py", "x.bin"):
        assert not folders.is_carried(name)


def test_shards_of_one_layout_are_parsed_once(tmp_path, monkeypatch):
    run = hf_folders.trainer_run(str(tmp_path), (1, 2, 3, 4), (2, 2, 3, 2))
    parsed, real = [], formats_safetensors.parsed

    def parse(identity, raw):
        parsed.append(identity.path)
        return real(identity, raw)

    monkeypatch.setattr(formats_safetensors, "parsed", parse)
    expected = wavg.average_checkpoints(run)
    counts = [sum(path.startswith(f"{folder}/") for path in parsed) for folder in run]
    assert counts == [2, 0, 3, 2]
    assert_same({k: expected[k] for k in expected}, averaged([str(path) for path in run]))


@pytest.mark.parametrize("where", ["a header", "the index", "a shard's length"])
def test_shards_of_a_layout_that_differs_in_a_byte_are_parsed_again(tmp_path, where):
    run = hf_folders.trainer_run(str(tmp_path), (1, 2))
    name = INDEX if where == "the index" else SECOND
    raw = bytearray(read_bytes(f"{run[1]}/{name}"))
    if where == "a shard's length":
        raw += b"\0"
    else:
        raw = raw.replace(b"norm.weight", b"norm.height")
    with open(f"{run[1]}/{name}", "wb") as file:
        file.write(raw)
    with pytest.raises(CheckpointFormatError):
        wavg.average_checkpoints(run)


def test_a_missing_shard_of_a_known_layout_is_told(tmp_path):
    run = hf_folders.trainer_run(str(tmp_path), (1, 2))
    os.unlink(f"{run[1]}/{SECOND}")
    with pytest.raises(CheckpointFormatError, match=f"the shard {SECOND} is missing"):
        wavg.average_checkpoints(run)
