"""From names to an ordered list of paths, and from names to steps. The files here are empty."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wavg
from wavg.errors import CheckpointFormatError, InputError, WavgError, WeightError
from wavg.inputs import expand
from wavg.names import natural_key, read_steps


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def touch(*names):
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return list(names)


# Natural order


@pytest.mark.parametrize(
    "ordered",
    [
        ["model_9.h5", "model_10.h5", "model_100.h5"],
        ["m.h5", "m_1.h5", "m_2.h5", "m_10.h5"],
        ["a2b9", "a2b10", "a10b1"],
        ["run1/step_20", "run2/step_3", "run10/step_1"],
        ["e=1-s=9.h5", "e=1-s=10.h5", "e=2-s=1.h5"],
        ["model_007.h5", "model_8.h5", "model_0009.h5"],
        ["1.h5", "2.h5", "11.h5"],
        ["a", "a1", "aa"],
        ["m²_1", "m²_2", "m²_10"],  # a digit to str.isdigit, not to int
        ["m_٣.h5", "m_١٠.h5"],  # digits of other scripts are letters here: order of code points
    ],
)
def test_numbers_in_names_sort_by_their_value(ordered):
    key = natural_key
    if "٣" in ordered[0]:
        ordered = sorted(ordered)
    for seed in range(5):
        shuffled = random.Random(seed).sample(ordered, len(ordered))
        assert sorted(shuffled, key=key) == ordered


@given(st.lists(st.text("ab01٣²_./", max_size=6)), st.integers(0, 100))
def test_natural_order_is_total_and_does_not_depend_on_the_start(names, seed):
    shuffled = random.Random(seed).sample(names, len(names))
    assert sorted(names, key=natural_key) == sorted(shuffled, key=natural_key)


@given(st.lists(st.integers(0, 10**20), min_size=2, max_size=6))
def test_natural_order_of_one_pattern_is_the_order_of_its_numbers(numbers):
    names = sorted((f"model_{number}.h5" for number in numbers), key=natural_key)
    assert names == [f"model_{number}.h5" for number in sorted(numbers)]


# Expanding


def test_a_glob_is_sorted_naturally():
    touch("run/model_10.h5", "run/model_9.h5", "run/model_100.h5", "run/other_1.h5")
    found = expand("run/model_*.h5")
    assert found == ["run/model_9.h5", "run/model_10.h5", "run/model_100.h5"]


def test_a_glob_may_descend_into_folders():
    touch("run/10/m.npz", "run/9/m.npz", "run/9/deep/m.npz")
    assert expand("run/*/m.npz") == ["run/9/m.npz", "run/10/m.npz"]
    assert expand("run/**/m.npz") == ["run/9/deep/m.npz", "run/9/m.npz", "run/10/m.npz"]


@pytest.mark.parametrize("suffix", [".h5", ".hdf5", ".safetensors", ".npz"])
def test_a_folder_is_its_checkpoints_in_natural_order(suffix):
    names = touch(*(f"run/model_{step}{suffix}" for step in (2, 10, 100)))
    touch("run/log.txt", "run/optimizer.pt", "run/config.json", f"run/.m{suffix}.abc.wavg-tmp")
    Path(f"run/folder_1{suffix}").mkdir()
    assert expand("run") == expand("run/") == expand(Path("run")) == names


def test_a_folder_with_checkpoints_of_several_kinds_is_refused():
    touch("run/m_1.h5", "run/m_1.safetensors", "run/m_2.h5")
    with pytest.raises(WavgError, match=r"several kinds.*\.h5, \.safetensors.*run/\*\.h5"):
        expand("run/")


@pytest.mark.parametrize("output", ["run/average.h5", "run/../run/average.h5", "link.h5"])
def test_an_output_in_the_folder_is_none_of_its_checkpoints(output):
    names = touch("run/model_1.h5", "run/model_2.h5")
    touch("run/average.h5")
    os.symlink("run/average.h5", "link.h5")
    assert expand("run", output=output) == names
    with pytest.raises(WavgError, match=r"average\.h5 besides a numbered series"):
        expand("run", output="run/new.h5")


@pytest.mark.parametrize("pattern", ["run", "run/*.h5"])
def test_an_output_that_may_be_a_checkpoint_has_to_be_named(pattern):
    names = touch("run/model_1.h5", "run/model_2.h5")
    with pytest.raises(WavgError, match="name the inputs one by one"):
        expand(pattern, output=names[1])
    assert expand(names, output=names[1]) == names


def test_the_output_of_an_earlier_run_is_no_input_of_a_glob_either():
    names = touch("run/model_1.h5", "run/model_2.h5")
    touch("run/average.h5")
    assert expand("run/*.h5", output="run/average.h5") == names


def test_epochs_in_the_names_give_the_order_whatever_stands_before_them():
    names = touch("v0.81-epoch01.h5", "v0.72-epoch02.h5", "v0.65-epoch10.h5")
    assert expand("*.h5") == expand(names[::-1], sort=True) == names


def test_a_list_in_another_order_than_its_names_gets_a_warning():
    names = touch("m_1.h5", "m_10.h5", "m_2.h5")
    with pytest.warns(UserWarning, match="suggest another order"):
        assert expand(names) == names
    assert expand(names, sort=False) == names


@pytest.mark.parametrize(
    "ordered",
    [
        ["m-0.91-ep5.npz", "m-0.85-ep10.npz"],
        ["m-0.91-it5.npz", "m-0.85-it10.npz"],
        ["acc91_iter5.npz", "acc85_iter10.npz"],
        ["val_loss-0.5-3.npz", "val_loss-0.4-12.npz"],
        ["w-1-2.npz", "w-0.5-3.npz"],  # a metric of 1 is one like the others
        ["weights.05-0.81.npz", "weights.06-0.72.npz", "weights.10-0.91.npz"],
        ["v1.2-3.npz", "v1.2-20.npz"],
        ["m-0.9-2-1.npz", "m-0.5-2-9.npz", "m-0.7-3-10.npz"],
    ],
)
def test_a_metric_before_the_step_does_not_decide_the_order(ordered):
    touch(*ordered)
    assert expand("*.npz") == expand(ordered[::-1], sort=True) == ordered


@pytest.mark.parametrize(
    "ordered",
    [
        ["model_1_v2.npz", "model_2_v1.npz"],  # two whole numbers: the first counts
        ["m_0.5.npz", "m_0.25.npz"],  # nothing but decimals: as natural as it gets
        ["0.4-b-2.npz", "0.5-a-1.npz"],  # names of several kinds
        ["unit5-b9.npz", "unit6-b3.npz"],
    ],
)
def test_other_names_are_in_natural_order(ordered):
    touch(*ordered)
    assert expand(ordered[::-1], sort=True) == ordered


def test_a_folder_whose_last_numbers_say_otherwise_gets_a_warning_of_its_own():
    touch("run/model_1_v2.npz", "run/model_2_v1.npz")
    message = "last numbers of the names .* from run/model_1_v2.npz to run/model_2_v1.npz, which"
    with pytest.warns(UserWarning, match=message):
        expand("run")
    expand("run", sort=True)  # without a warning, which would be an error


def test_a_link_to_a_checkpoint_in_the_folder_is_no_second_one():
    names = touch("run/model_1.h5", "run/model_2.h5")
    os.symlink("model_2.h5", "run/latest.h5")
    assert expand("run") == expand("run/*") == names


def test_a_folder_with_two_kinds_of_keras_files_is_refused():
    touch("run/model_1.h5", "run/model_2.weights.h5")
    with pytest.raises(WavgError, match=r"several kinds of files \(\.h5, \.weights\.h5\)"):
        expand("run")


def test_an_output_that_is_named_as_input_stays_one():
    names = touch("run/model_1.h5", "run/model_2.h5")
    assert expand(names, output=names[1]) == names


def test_a_list_stays_as_given():
    names = touch("m_10.h5", "m_9.h5", "a.h5")
    assert expand(names) == names
    assert expand(iter(names)) == names
    assert expand(map(Path, names)) == names


def test_a_list_is_sorted_on_request():
    touch("m_10.h5", "m_9.h5", "a.h5")
    assert expand(["m_10.h5", "m_9.h5", "a.h5"], sort=True) == ["a.h5", "m_9.h5", "m_10.h5"]


def test_a_list_may_hold_globs_folders_and_files():
    touch("b/m_10.h5", "b/m_9.h5", "a/m_2.h5", "a/m_1.h5", "z.h5")
    found = expand(["z.h5", "b", "a/*.h5"])
    assert found == ["z.h5", "b/m_9.h5", "b/m_10.h5", "a/m_1.h5", "a/m_2.h5"]


def test_a_file_is_itself_whatever_its_name():
    [name] = touch("model.bin")
    assert expand(name) == expand(Path(name)) == [name]


def test_a_file_whose_name_looks_like_a_glob_is_a_file():
    touch("loss[0.5].h5", "loss0.h5")
    assert expand("loss[0.5].h5") == ["loss[0.5].h5"]


def test_a_glob_that_matches_folders_is_the_folders_as_a_list_is():
    touch("run/checkpoint-1000/model.safetensors", "run/checkpoint-900/model.safetensors")
    listed = expand(["run/checkpoint-900", "run/checkpoint-1000"])
    assert expand("run/checkpoint-*") == listed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.h5", "there is no file or folder nothing.h5"),
        ("nothing_*.h5", r"no file matches nothing_\*\.h5"),
        ("empty", "there is no checkpoint in the folder empty: it is empty$"),
        ("text", "there is no checkpoint in the folder text$"),
        ("dangling.h5", "dangling.h5 is a link to gone.h5, where nothing is; bring that back"),
    ],
)
def test_what_is_missing_is_a_file_not_found_error(name, message):
    Path("empty").mkdir()
    touch("text/readme.txt", "there.h5")
    os.symlink("gone.h5", "dangling.h5")
    with pytest.raises(FileNotFoundError, match=message):
        expand(name)
    with pytest.raises(FileNotFoundError, match=message):
        expand(["there.h5", name])


def run_of(kind):
    """Make a run's folder with three checkpoints; return the name of a fourth."""
    if kind == "files":
        touch(*(f"run/z_{step}.npz" for step in (1, 2, 3)))
        return "run/z_4.npz"
    touch(*(f"run/checkpoint-{step}/model.safetensors" for step in (1, 2, 3)))
    if kind == "whole":
        touch("run/model.safetensors")
    return "run/checkpoint-4"


@pytest.mark.parametrize("kind", ["files", "folders"])
@pytest.mark.parametrize("inputs", ["run", "run/*"])
def test_a_link_to_nothing_under_a_checkpoints_name_is_not_passed_over(kind, inputs):
    newest = run_of(kind)
    assert len(expand(inputs)) == 3
    os.symlink("gone", newest)
    if (kind, inputs) == ("files", "run/*"):
        assert newest in expand(inputs)  # which opening it will refuse
    else:
        with pytest.raises(FileNotFoundError, match=f"^{newest} is a link to gone.*, or name the"):
            expand(inputs)


@pytest.mark.parametrize("kind", ["files", "folders"])
def test_links_in_a_circle_under_a_checkpoints_name_are_not_passed_over(kind):
    newest = run_of(kind)
    os.symlink(os.path.basename(newest), newest)
    for inputs in ("run", newest):
        with pytest.raises(InputError, match=f"cannot read {newest}: ") as caught:
            expand(inputs)
        assert caught.value.path == newest


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("kind", ["files", "folders"])
def test_a_pipe_under_a_checkpoints_name_is_not_passed_over(kind):
    newest = run_of(kind)
    os.mkfifo(newest)
    with pytest.raises(CheckpointFormatError, match=f"{newest} is a device, pipe or socket"):
        expand("run")


def test_a_link_to_nothing_in_a_run_with_a_final_model_is_told():
    os.symlink("gone", run_of("whole"))
    with pytest.raises(FileNotFoundError, match="checkpoint-4 is a link to gone"):
        expand("run")


def test_a_link_to_nothing_under_the_final_models_name_is_not_passed_over_for_another_file():
    touch("run/other.safetensors")
    os.symlink("gone", "run/model.safetensors")
    assert expand("run") == ["run/model.safetensors"]  # which opening it will refuse


@pytest.mark.parametrize("kind", ["files", "folders"])
def test_what_bears_no_checkpoints_name_is_passed_over_whatever_it_is(kind):
    run_of(kind)
    for name in ("latest", "logs", "notes.txt", "runs-4", "tmp-checkpoint-5", ".z_5.npz"):
        os.symlink("gone", f"run/{name}")
    touch("run/checkpoint-list", "run/checkpoint-9", "run/zz-4/readme.txt")
    assert len(expand("run")) == 3


@pytest.mark.parametrize("name", ["a\0b.npz", "\ud800.npz", "a\0*.npz"])
def test_a_name_that_no_file_can_have_is_told_as_that(name):
    with pytest.raises(
        InputError, match=r"^cannot read '.*': no file can have this name$"
    ) as caught:
        expand(name)
    assert caught.value.path == name


def test_no_input_at_all_is_an_error():
    with pytest.raises(WeightError, match="no checkpoint was given"):
        expand([])


@pytest.mark.parametrize("again", ["m_1.h5", "./m_1.h5", "run/../m_1.h5", "link.h5", "*_1.h5", "."])
def test_the_same_file_twice_is_refused_however_it_is_spelt(again):
    touch("m_1.h5", "run/other.h5")
    os.symlink("m_1.h5", "link.h5")
    with pytest.raises(WavgError, match=r"is given twice \(as m_1\.h5\)"):
        expand(["m_1.h5", again])


def test_equal_files_under_two_names_are_two_checkpoints():
    names = touch("a/m.h5", "b/m.h5")
    assert expand(names) == names


# Steps


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["run/model_490.h5", "run/model_500.h5"], (490, 500)),
        # Keras' ModelCheckpoint: weights.{epoch:02d}-{val_loss:.2f}.h5
        (["weights.05-0.81.h5", "weights.06-0.72.h5", "weights.10-0.90.h5"], (5, 6, 10)),
        (["weights.99-0.81.h5", "weights.100-0.80.h5"], (99, 100)),
        (["weights.05-1.81.h5", "weights.06-12.72.h5"], (5, 6)),
        # Hugging Face and PyTorch Lightning
        (["checkpoint-900/model.safetensors", "checkpoint-1000/model.safetensors"], (900, 1000)),
        (["checkpoint-900.npz", "checkpoint-1000.npz"], (900, 1000)),
        (["epoch=3-step=1000.npz", "epoch=4-step=1250.npz"], (1000, 1250)),
        (["epoch=3-step=1000-val=7.npz", "epoch=4-step=1250-val=5.npz"], (1000, 1250)),
        (["epoch=03-val_loss=0.5.npz", "epoch=10-val_loss=0.25.npz"], (3, 10)),
        (["Epoch_3_lr2.npz", "Epoch_4_lr1.npz"], (3, 4)),
        (["global_step1000/m.safetensors", "global_step2000/m.safetensors"], (1000, 2000)),
        (["checkpoint-9/unet/m.npz", "checkpoint-10/unet/m.npz"], (9, 10)),
        (["step-5_seed7.h5", "step-6_seed7.h5"], (5, 6)),
        (["lr1e-3_10.h5", "lr1e-3_20.h5"], (10, 20)),
        (["ep=5-acc7.h5", "ep=10-acc3.h5"], (5, 10)),
        (["ep1-it500.h5", "ep1-it600.h5"], (500, 600)),
        (["v1.2_3.h5", "v1.2_4.h5"], (3, 4)),
        (["m_0.h5", "m_1.h5"], (0, 1)),
        (["0100.h5", "0200.h5"], (100, 200)),
        (["only_7.h5"], (7,)),
    ],
)
def test_steps_are_read_from_names(names, steps):
    assert read_steps(names) == steps
    assert all(isinstance(step, float) for step in read_steps(names))


@pytest.mark.parametrize(
    "names",
    [
        ["model_10.h5", "model_9.h5"],
        ["model_1.h5", "model_3.h5", "model_2.h5"],
        ["step=5_a.h5", "step=5_b.h5"],
        ["best.h5", "last.h5"],
        ["model_0.5.h5", "model_0.6.h5"],
        ["checkpoint-900.npz", "checkpoint-100.npz"],
    ],
)
def test_names_without_an_increasing_series_are_counted(names):
    assert read_steps(names) == tuple(range(1, len(names) + 1))


def test_numbers_of_files_and_of_folders_are_not_one_series():
    assert read_steps(["run7/model_1.h5", "run7/last.h5"]) == (1, 2)


def test_a_number_far_above_a_single_file_is_no_step():
    assert read_steps(["run-2024/last/model.h5"]) == (1,)
    assert read_steps(["run-2024/a/model.h5", "run-2024/b/model.h5"]) == (1, 2)


def test_a_series_that_does_not_increase_gives_way_to_the_next():
    assert read_steps(["epoch=0-step=900.npz", "epoch=1-step=100.npz"]) == (0, 1)
    assert read_steps(["epoch=5_a1.npz", "epoch=5_a2.npz"]) == (1, 2)


def test_steps_of_no_paths_are_none():
    assert read_steps([]) == ()


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=8, unique=True).map(sorted))
def test_what_a_run_writes_is_what_is_read(steps):
    for pattern in ("model_{}.h5", "weights.{:02d}-0.81.h5", "epoch=3-step={}.npz", "c-{}/m.npz"):
        assert read_steps([pattern.format(step) for step in steps]) == tuple(steps)


@pytest.mark.parametrize("name", ["a\0b.json", "\ud800.csv"])
def test_a_tables_name_that_no_file_can_have_is_told_as_that(name):
    npz = [f"m_{step}.npz" for step in (1, 2)]
    for path in npz:
        wavg.save(path, {"w": 1.0})
    calls = [
        lambda: wavg.average_checkpoints(npz, weights=name),
        lambda: wavg.average_checkpoints(npz, check_sha256=name),
        lambda: wavg.best_checkpoints(npz, name, best=1, maximize=True),
    ]
    for call in calls:
        with pytest.raises(InputError, match="no file can have this name"):
            call()
