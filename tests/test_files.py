"""From files to a file: what is averaged, what is refused, what is left untouched."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import h5py
import numpy as np
import pytest

import wavg
from contract import read_bytes
from wavg import compiled, kernel, stream, workers
from wavg.checkpoint import Checkpoint


@pytest.fixture
def run(tmp_path):
    """Save a run of models as safetensors; returns their glob."""

    def make(*models, suffix=".safetensors"):
        for step, model in enumerate(models, start=1):
            wavg.save(tmp_path / f"model_{step}{suffix}", model, overwrite=True)
        return str(tmp_path / f"model_*{suffix}")

    return make


def kernels(*values, dtype=np.float32, **others):
    return [{"w": np.asarray(value, dtype), **others} for value in values]


def test_a_glob_is_averaged_in_natural_order(tmp_path):
    for step in (8, 9, 10):
        wavg.save(tmp_path / f"model_{step}.npz", {"w": np.float32([step])})
    result = wavg.average_checkpoints(str(tmp_path / "model_*.npz"), weights=[1, 2, 5])
    np.testing.assert_array_equal(result["w"], [np.float32((8 + 18 + 50) / 8)])


def test_last_takes_the_newest(run):
    result = wavg.average_checkpoints(run(*kernels([1], [5], [7])), last=2)
    np.testing.assert_array_equal(result["w"], [6])


@pytest.mark.parametrize("last", [0, 4, -1])
def test_last_has_to_be_within_the_number_of_checkpoints(run, last):
    with pytest.raises(wavg.WeightError, match="between 1 and 3"):
        wavg.average_checkpoints(run(*kernels([1], [5], [7])), last=last)


def test_explicit_weights_must_be_as_many_as_the_checkpoints(run):
    with pytest.raises(wavg.WeightError, match="2 weights were given for 3 checkpoints"):
        wavg.average_checkpoints(run(*kernels([1], [5], [7])), weights=[1, 2])


def test_steps_must_increase_and_be_as_many(run):
    inputs = run(*kernels([1], [5]))
    with pytest.raises(wavg.WeightError, match="must increase"):
        wavg.average_checkpoints(inputs, steps=[5, 5])
    with pytest.raises(wavg.WeightError, match="3 steps were given for 2"):
        wavg.average_checkpoints(inputs, steps=[1, 2, 3])


def test_every_difference_of_structure_is_listed(run, tmp_path):
    glob = run(
        {"a": np.float32([1]), "b": np.float32([1]), "c": np.float16([1])},
        {"a": np.float32([1, 2]), "c": np.float32([1]), "d": np.float32([1])},
    )
    with pytest.raises(wavg.StructureMismatchError) as caught:
        wavg.average_checkpoints(glob, tmp_path / "avg.safetensors")
    assert len(caught.value.differences) == 4
    for text in (
        "a is float32[1], not float32[2]",
        "also has b (float32[1])",
        "c is float16[1], not float32[1]",
        "lacks d (float32[1])",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / "avg.safetensors").exists()


def test_inputs_of_two_formats_do_not_mix(tmp_path):
    wavg.save(tmp_path / "a.npz", {"w": np.float32([1])})
    wavg.save(tmp_path / "b.h5", {"w": np.float32([1])})
    with pytest.raises(wavg.StructureMismatchError, match="npz, not keras-h5"):
        wavg.average_checkpoints([tmp_path / "a.npz", tmp_path / "b.h5"])


def test_integers_equal_everywhere_are_carried_over(run, tmp_path):
    report = wavg.average_checkpoints(
        run(*kernels([1], [3], count=np.array(9))), tmp_path / "avg.safetensors"
    )
    assert report.differing == ()
    assert wavg.load(tmp_path / "avg.safetensors")["count"] == 9


def test_integers_that_differ_are_the_newest_and_reported_or_refused(run, tmp_path):
    models = kernels([1], [3])
    models[0]["bn.num_batches_tracked"], models[1]["bn.num_batches_tracked"] = (
        np.array(5),
        np.array(9),
    )
    models[0]["mask"] = models[1]["mask"] = np.array([True])
    glob = run(*models)
    report = wavg.average_checkpoints(glob, tmp_path / "avg.safetensors")
    assert report.differing == ("bn.num_batches_tracked",)
    assert wavg.load(tmp_path / "avg.safetensors")["bn.num_batches_tracked"] == 9
    with pytest.raises(wavg.StructureMismatchError, match="num_batches_tracked is int64"):
        wavg.average_checkpoints(glob, tmp_path / "second.safetensors", integers="error")
    assert sorted(os.listdir(tmp_path)) == [
        "avg.safetensors",
        "model_1.safetensors",
        "model_2.safetensors",
    ]


def test_quantised_codes_are_refused_with_their_scale_named(run):
    model = {"w": np.int8([1]), "w_scale": np.float32([2])}
    with pytest.raises(
        wavg.WavgError, match=r"w holds quantised codes \(int8\) with the scale w_scale"
    ):
        wavg.average_checkpoints(run(model, model))


def test_plain_int8_tensors_without_a_scale_are_carried_over(run):
    result = wavg.average_checkpoints(run(*kernels([1], [3], table=np.int8([4]))))
    np.testing.assert_array_equal(result["table"], [4])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_named_by_file_tensor_and_index(run, tmp_path, bad):
    models = [{"layer/kernel": np.ones((300, 400), np.float32)} for _ in range(3)]
    models[1]["layer/kernel"][299, 7] = bad
    glob = run(*models)
    with pytest.raises(wavg.NonFiniteError) as caught:
        wavg.average_checkpoints(glob, tmp_path / "avg.safetensors")
    assert caught.value.path == str(tmp_path / "model_2.safetensors")
    assert (caught.value.tensor, caught.value.index) == ("layer/kernel", (299, 7))
    assert "layer/kernel[299, 7]" in str(caught.value)
    assert not (tmp_path / "avg.safetensors").exists()
    result = wavg.average_checkpoints(glob, allow_nonfinite=True)
    np.testing.assert_array_equal(result["layer/kernel"][299, 7], np.float32(bad))


def test_a_result_too_large_for_its_dtype_is_named(run):
    with pytest.raises(wavg.NonFiniteError, match=r"average at w\[1\] does not fit float16"):
        wavg.average_checkpoints(run(*kernels([1, 1e6], [1, 1e6])), dtype="float16")


def test_an_existing_output_is_refused_and_untouched(run, tmp_path):
    (tmp_path / "avg.safetensors").write_bytes(b"precious")
    with pytest.raises(wavg.OutputExistsError):
        wavg.average_checkpoints(run(*kernels([1], [3])), tmp_path / "avg.safetensors")
    assert read_bytes(tmp_path / "avg.safetensors") == b"precious"


@pytest.mark.parametrize("suffix", [".safetensors", ".h5", ".npz"])
def test_an_output_that_is_an_input_is_safe_with_overwrite(run, tmp_path, suffix):
    run(*kernels([1], [3]), suffix=suffix)
    paths = [tmp_path / f"model_{step}{suffix}" for step in (1, 2)]
    with pytest.raises(wavg.OutputExistsError):
        wavg.average_checkpoints(paths, tmp_path / f"model_2{suffix}")
    wavg.average_checkpoints(paths, tmp_path / f"model_2{suffix}", overwrite=True)
    np.testing.assert_array_equal(wavg.load(tmp_path / f"model_2{suffix}")["w"], [2])


def test_the_output_of_an_earlier_run_in_the_same_folder_is_not_an_input(run, tmp_path):
    run(*kernels([1], [3]))
    for _ in range(2):
        report = wavg.average_checkpoints(tmp_path, tmp_path / "avg.safetensors", overwrite=True)
        assert len(report.plan.inputs) == 2


def test_an_output_of_unknown_kind_is_refused_before_anything_is_read(run, tmp_path):
    with pytest.raises(wavg.OutputError, match="name with one of"):
        wavg.average_checkpoints(run(*kernels([1], [3])), tmp_path / "avg.bin")


def test_include_and_exclude_choose_tensors_by_glob(run):
    models = [
        {"a.w": np.float32([v]), "a.b": np.float32([v]), "c": np.float32([v])} for v in (1, 3)
    ]
    glob = run(*models)
    assert {k: v[0] for k, v in wavg.average_checkpoints(glob, exclude=["a.*"]).items()} == {
        "a.w": 3,
        "a.b": 3,
        "c": 2,
    }
    assert {
        k: v[0] for k, v in wavg.average_checkpoints(glob, include=["a.*"], exclude=["*.b"]).items()
    } == {"a.w": 2, "a.b": 3, "c": 3}
    with pytest.raises(wavg.WavgError, match="'zzz' matches no tensor"):
        wavg.average_checkpoints(glob, exclude=["zzz"])
    with pytest.raises(wavg.WavgError, match="no tensor to average"):
        wavg.average_checkpoints(glob, exclude=["*"])


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "x"},
        {"integers": "x"},
        {"dtype": "int8"},
        {"workers": 0},
        {"max_memory": "much"},
    ],
)
def test_options_that_make_no_sense_are_refused(run, options):
    with pytest.raises(ValueError, match=r"must be|is not a size"):
        wavg.average_checkpoints(run(*kernels([1])), **options)


def test_the_plan_is_made_without_reading_a_tensor(run, tmp_path, monkeypatch):
    glob = run(*kernels([1, 2], [3, 4], count=np.array(1)))
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    plan = wavg.plan_average(glob, tmp_path / "avg.safetensors", weights="linear")
    assert [part.proportion for part in plan.inputs] == pytest.approx([1 / 3, 2 / 3])
    assert [d.spec.name for d in plan.averaged] == ["w"]
    assert [(d.spec.name, d.reason) for d in plan.carried] == [("count", "int64 is not averaged")]
    assert (plan.bytes_read, plan.bytes_written) == (2 * 16, 16)
    assert not (tmp_path / "avg.safetensors").exists()


@pytest.fixture(params=["compiled", "numpy"])
def reads(request, monkeypatch):
    """Bytes of each read of tensors, with both forms of the kernel's first step."""
    if request.param == "numpy":
        monkeypatch.setattr(compiled, "COMPILED", False)
    elif not compiled.COMPILED:
        pytest.skip("there is no compiled step")
    sizes = []
    read, from_files = Checkpoint.read, kernel.Combiner.from_files

    def counting(self, spec, start, out):
        sizes.append(out.nbytes)
        read(self, spec, start, out)

    def counting_rows(self, descriptors, offsets, outs):
        sizes.extend(self._compiled._source.itemsize * outs.shape[1] for _ in descriptors)
        from_files(self, descriptors, offsets, outs)

    monkeypatch.setattr(Checkpoint, "read", counting)
    monkeypatch.setattr(kernel.Combiner, "from_files", counting_rows)
    return sizes


def test_the_bytes_a_run_reads_are_those_of_its_plan(run, reads, tmp_path):
    report = wavg.average_checkpoints(
        run(*kernels(np.ones(5000), np.ones(5000), count=np.array(1))), tmp_path / "avg.npz"
    )
    assert sum(reads) == report.plan.bytes_read


def test_a_file_that_ends_early_is_named(run, reads, tmp_path, monkeypatch):
    glob = run(*kernels(np.ones(5000), np.ones(5000), np.ones(5000)))
    victim = tmp_path / "model_2.safetensors"
    original = stream.run

    def truncating(*arguments, **options):
        os.truncate(victim, os.path.getsize(victim) - 4)
        return original(*arguments, **options)

    monkeypatch.setattr(stream, "run", truncating)
    with pytest.raises(
        wavg.CheckpointFormatError, match=r"model_2.* ends within w: it was cut short; copy"
    ):
        wavg.average_checkpoints(glob, tmp_path / "avg.safetensors")
    assert not [name for name in os.listdir(tmp_path) if "avg" in name]


@pytest.mark.parametrize("change", ["touch", "truncate", "replace", "remove"])
def test_an_input_that_changes_during_the_run_publishes_nothing(run, tmp_path, monkeypatch, change):
    glob = run(*kernels(np.ones(5000), np.ones(5000)))
    victim = tmp_path / "model_1.safetensors"
    original = stream.run

    def meddling(*arguments, **options):
        if change == "truncate":
            os.truncate(victim, os.path.getsize(victim) - 4)
        result = original(*arguments, **options)
        if change == "touch":
            os.utime(victim, ns=(1, 1))
        if change in ("replace", "remove"):
            os.remove(victim)
        if change == "replace":
            wavg.save(victim, {"w": np.zeros(5000, np.float32)})
        return result

    monkeypatch.setattr(stream, "run", meddling)
    with pytest.raises((wavg.CheckpointChangedError, wavg.CheckpointFormatError)):
        wavg.average_checkpoints(glob, tmp_path / "avg.safetensors")
    assert not [name for name in os.listdir(tmp_path) if "avg" in name]


def test_ctrl_c_leaves_nothing_behind(run, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    glob = run(*kernels(np.ones(5000), np.ones(5000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.Combiner, "__call__", lambda *_: interrupt(0))
        patch.setattr(workers.Combiner, "from_files", lambda *_: interrupt(0))
        with pytest.raises(KeyboardInterrupt):
            wavg.average_checkpoints(glob, tmp_path / "avg.safetensors")
    assert not [name for name in os.listdir(tmp_path) if "avg" in name]


def test_an_executor_of_the_callers_does_the_work(run):
    with ThreadPoolExecutor(1) as executor:
        result = wavg.average_checkpoints(run(*kernels([1], [3])), executor=executor)
    np.testing.assert_array_equal(result["w"], [2])


def test_patching_keeps_every_byte_that_is_not_an_averaged_number(tmp_path):
    for step in (1, 2):
        wavg.save(tmp_path / f"m_{step}.h5", {"dense/kernel": np.float32([[step, 2]])})
        with h5py.File(tmp_path / f"m_{step}.h5", "r+") as file:
            file.attrs["note"] = f"step {step}"
            file["optimizer_weights/adam/m"] = np.float32([step])
            file["optimizer_weights"].attrs["weight_names"] = np.array([b"adam/m"])
    report = wavg.average_checkpoints(str(tmp_path / "m_*.h5"), tmp_path / "avg.h5")
    before, after = read_bytes(tmp_path / "m_2.h5"), read_bytes(tmp_path / "avg.h5")
    with wavg.open_checkpoint(tmp_path / "m_2.h5") as checkpoint:
        extent = checkpoint.index.tensors[0].extent
    stop = extent.offset + extent.length
    assert before[: extent.offset] == after[: extent.offset]
    assert before[stop:] == after[stop:]
    assert after[extent.offset : stop] == np.float32([[1.5, 2]]).tobytes()
    assert report.plan.keep_others


def test_the_optimizer_can_be_left_out(tmp_path):
    test_patching_keeps_every_byte_that_is_not_an_averaged_number(tmp_path)
    wavg.average_checkpoints(str(tmp_path / "m_*.h5"), tmp_path / "small.h5", optimizer="drop")
    with h5py.File(tmp_path / "small.h5") as file:
        assert "optimizer_weights" not in file
        assert file.attrs["note"] == "step 2"
        np.testing.assert_array_equal(file["dense/kernel"][()], [[1.5, 2]])


def test_a_closed_checkpoint_has_closed_its_files(run, tmp_path):
    run(*kernels([1]))
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    with wavg.open_checkpoint(tmp_path / "model_1.safetensors"):
        pass
    after = set(os.listdir("/proc/self/fd")) if before else set()
    assert len(after) == len(before)


def test_tensors_side_by_side_are_read_as_one_and_named_alone(run, reads, tmp_path):
    models = [
        {f"t{i:03}": np.full(10, i * step, np.float32) for i in range(300)} for step in (1, 3)
    ]
    glob = run(*models)
    wavg.average_checkpoints(glob, tmp_path / "avg.safetensors")
    assert len(reads) == 2  # one an input
    result = wavg.load(tmp_path / "avg.safetensors")
    assert all((array == 2 * i).all() for i, array in enumerate(result.values()))
    in_memory = wavg.average_checkpoints(glob)
    assert all(in_memory[name].tobytes() == result[name].tobytes() for name in result)
    models[1]["t123"][7] = np.nan
    with pytest.raises(wavg.NonFiniteError, match=r"model_2.*: t123\[7\] is nan"):
        wavg.average_checkpoints(run(*models))


def test_neighbours_stored_apart_or_in_another_order_are_not_joined(tmp_path):
    names = ["a", "b", "c"]
    for step, order in ((1, names), (2, names[::-1])):
        model = {name: np.full(4, step * (ord(name) - 96), np.float32) for name in order}
        wavg.save(tmp_path / f"m_{step}.safetensors", model)
    result = wavg.average_checkpoints(str(tmp_path / "m_*.safetensors"))
    assert {name: array[0] for name, array in result.items()} == {"c": 4.5, "b": 3, "a": 1.5}


def test_empty_tensors_between_others_are_kept(run, tmp_path):
    def model(step):
        pairs = [("a", 3), ("none", 0), ("b", 2)]
        return {name: np.full(size, step, np.float32) for name, size in pairs}

    wavg.average_checkpoints(run(model(1), model(2)), tmp_path / "avg.safetensors")
    result = wavg.load(tmp_path / "avg.safetensors")
    assert {name: array.tolist() for name, array in result.items()} == {
        "a": [1.5] * 3,
        "none": [],
        "b": [1.5] * 2,
    }


def test_more_inputs_than_the_limit_on_open_files(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for step in range(150):
        wavg.save(tmp_path / f"m_{step}.safetensors", {"w": np.float32([step])})
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        result = wavg.average_checkpoints(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    np.testing.assert_array_equal(result["w"], [74.5])


@pytest.mark.parametrize("suffix", [".safetensors", ".h5", ".weights.h5", ".npz"])
def test_an_executor_of_processes_makes_the_same_bytes(run, tmp_path, suffix):
    rng = np.random.default_rng(0)
    models = [
        {"w": rng.standard_normal((300, 70)), "b/h": np.float16(rng.random(9)), "n": np.int64(step)}
        for step in range(3)
    ]
    glob = run(*models, suffix=suffix)
    right = wavg.average_checkpoints(glob, tmp_path / f"a{suffix}", integers="reference")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        report = wavg.average_checkpoints(glob, tmp_path / f"b{suffix}", executor=executor)
        arrays = wavg.average_checkpoints(glob, executor=executor)
        wavg.save(
            tmp_path / f"model_1{suffix}",
            models[0] | {"b/h": np.float16([np.nan] * 9)},
            overwrite=True,
        )
        with pytest.raises(wavg.NonFiniteError, match=r"b/h\[0\] is nan"):
            wavg.average_checkpoints(glob, tmp_path / f"c{suffix}", executor=executor)
    assert read_bytes(tmp_path / f"a{suffix}") == read_bytes(tmp_path / f"b{suffix}")
    assert report.differing == right.differing == ("n",)
    expected = wavg.load(tmp_path / f"a{suffix}")
    assert all(arrays[name].tobytes() == expected[name].tobytes() for name in expected)
    assert sorted(os.listdir(tmp_path))[:2] == [f"a{suffix}", f"b{suffix}"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".", "c"))]


def test_a_model_of_empty_tensors_averages(run):
    result = wavg.average_checkpoints(run(*kernels(np.zeros((0, 3)))))
    assert result["w"].shape == (0, 3)


def test_scales_are_not_averaged_beside_codes_that_are_carried(run):
    model = {"w": np.int8([1]), "w_scale": np.float32([2]), "other": np.float32([1])}
    glob = run(model, model)
    with pytest.raises(wavg.WavgError, match="exclude both"):
        wavg.average_checkpoints(glob, exclude="w")
    assert wavg.average_checkpoints(glob, include="other")["w"] == 1
    assert wavg.average_checkpoints(glob, exclude=["w", "w_scale"])["w_scale"] == 2


@pytest.mark.parametrize("name", ["/a", "a/../b", "a\\b"])
def test_npz_refuses_names_it_would_not_read(tmp_path, name):
    with pytest.raises(wavg.OutputError, match="cannot hold the name"):
        wavg.save(tmp_path / "m.npz", {name: np.ones(1)})


def test_errors_name_the_output_not_the_temporary(tmp_path):
    with pytest.raises(wavg.OutputError) as caught:
        wavg.save(tmp_path / "m.safetensors", {"w": np.zeros(1, np.complex128)})
    assert "m.safetensors: " in str(caught.value)
    assert "wavg-tmp" not in str(caught.value)


def test_an_output_without_a_name_is_told(tmp_path):
    wavg.save(tmp_path / "m_1.safetensors", {"w": np.float32([1])})
    with pytest.raises(wavg.OutputError, match="the output's name is empty"):
        wavg.average_checkpoints(tmp_path, "")
