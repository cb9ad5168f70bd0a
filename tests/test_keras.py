"""Keras 3 itself in the loop: train, save, average the files, load, predict, train on."""

from __future__ import annotations

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

import wavg
from keras_run import (
    BATCHES,
    EPOCHS,
    EVERY_N_AND_SCHEDULE,
    assert_bitwise_equal,
    assert_equal_predictions,
    assert_the_comparisons_see_planted_errors,
    assert_within_one_ulp,
    nested,
    normalized,
    plain,
    runs_of,
    slots,
)

os.environ["KERAS_BACKEND"] = "jax"
keras = pytest.importorskip("keras")

pytestmark = pytest.mark.filterwarnings(
    # Keras 3.15's variables, turned into arrays by NumPy 2.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    return runs_of(keras, tmp_path_factory)


@pytest.mark.parametrize("build", [plain, normalized])
@pytest.mark.parametrize(("n", "schedule"), EVERY_N_AND_SCHEDULE)
def test_the_averaged_file_loads_as_if_averaged_in_keras(run_of, build, n, schedule, tmp_path):
    run, output = run_of(build), tmp_path / "average.h5"
    wavg.average_checkpoints(run.paths, output, weights=schedule, last=n)
    loaded = keras.models.load_model(output, compile=False)
    assert_within_one_ulp(loaded.get_weights(), run.mean(n, schedule))
    predictions = run.predictions(loaded)
    assert_equal_predictions(predictions, run.predictions(weights=run.mean(n, schedule)))
    arrays = wavg.average_checkpoints(run.paths, weights=schedule, last=n)
    assert_bitwise_equal(run.predictions(weights=list(arrays.values())), predictions)
    newest = run.predictions(weights=run.weights[-1])
    assert np.array_equal(predictions, newest) == (n == 1)


def test_compiled_prediction_agrees_too(run_of, tmp_path):
    run, output = run_of(normalized), tmp_path / "average.h5"
    wavg.average_checkpoints(run.paths, output, weights="linear")
    predictions = keras.models.load_model(output, compile=False).predict(run.x, verbose=0)
    run.model.set_weights(list(wavg.load(output).values()))
    assert_bitwise_equal([run.model.predict(run.x, verbose=0)], [predictions])


def test_a_file_of_nested_models_loads_with_each_array_in_its_place(run_of, tmp_path):
    run, output = run_of(nested), tmp_path / "average.h5"
    wavg.average_checkpoints(run.paths, output, weights="linear", last=6)
    loaded = keras.models.load_model(output, compile=False)
    assert_within_one_ulp(loaded.get_weights(), run.mean(6, "linear"))


def test_a_glob_averages_all_epochs_in_training_order(run_of):
    run = run_of(plain)
    ours = wavg.average_checkpoints(f"{run.folder}/model_*.h5", weights="exponential:alpha=2")
    assert_within_one_ulp(ours.values(), run.mean(EPOCHS, "exponential:alpha=2"))


def test_files_and_lists_of_arrays_have_the_same_average(run_of):
    run = run_of(normalized)
    from_files = wavg.average_checkpoints(run.paths, weights="linear")
    assert_bitwise_equal(wavg.average(run.weights, weights="linear"), from_files.values())


def load_with_optimizer(path):
    """What load_model(path) should do; Keras 3.15 builds the optimizer on no variables at all.

    It then restores iterations and learning rate but no slot, and fit() fails, whoever wrote the
    file. Hence the saved state is put into an optimizer built on the model's variables.
    """
    model = keras.models.load_model(path, compile=False)
    model.compile(keras.optimizers.Adam(), "categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    with h5py.File(path) as file:
        state = file["optimizer_weights"]
        saved = [state[name][()] for name in state.attrs["weight_names"]]
    assert len(saved) == len(model.optimizer.variables)
    model.optimizer.load_own_variables({str(i): array for i, array in enumerate(saved)})
    return model


def test_compiled_files_load_compiled_with_the_newest_optimizer(run_of, tmp_path):
    run, output = run_of(normalized), tmp_path / "average.h5"
    wavg.average_checkpoints(run.paths, output, weights="linear", last=5)
    averaged, newest = keras.models.load_model(output), keras.models.load_model(run.paths[-1])
    assert averaged.loss.__name__ == newest.loss.__name__ == "categorical_crossentropy"
    assert averaged.optimizer.get_config() == newest.optimizer.get_config()
    assert_bitwise_equal(slots(averaged), slots(newest))
    assert slots(averaged)[0] == EPOCHS * BATCHES
    assert_within_one_ulp(averaged.get_weights(), run.mean(5, "linear"))


@pytest.mark.parametrize("build", [plain, normalized])
def test_training_goes_on_from_the_average_with_the_newest_optimizer_slots(run_of, build, tmp_path):
    run, output = run_of(build), tmp_path / "average.h5"
    wavg.average_checkpoints(run.paths, output, weights="linear", last=5)
    averaged, newest = load_with_optimizer(output), load_with_optimizer(run.paths[-1])
    assert_bitwise_equal(slots(averaged), slots(run.model))
    with pytest.raises(AssertionError):  # the slots are those of no other checkpoint
        assert_bitwise_equal(slots(averaged), slots(load_with_optimizer(run.paths[-2])))
    newest.set_weights(averaged.get_weights())
    for model in (averaged, newest):
        run.fit(model)
    assert slots(averaged)[0] == (EPOCHS + 1) * BATCHES
    assert_bitwise_equal(slots(averaged), slots(newest))
    assert_bitwise_equal(averaged.get_weights(), newest.get_weights())


@pytest.mark.parametrize("compiled", [True, False])
def test_a_file_without_the_optimizer_loads_and_trains(run_of, compiled, tmp_path):
    run, output = run_of(normalized), tmp_path / "average.h5"
    wavg.average_checkpoints(run.paths, output, weights="linear", optimizer="drop")
    with h5py.File(output) as file:
        assert "optimizer_weights" not in file
    loaded = keras.models.load_model(output, compile=compiled)
    assert_within_one_ulp(loaded.get_weights(), run.mean(EPOCHS, "linear"))
    if compiled:
        assert slots(loaded)[0] == 0
        run.fit(loaded)


def test_a_file_in_half_precision_loads_into_the_float32_model(run_of, tmp_path):
    run, output = run_of(normalized), tmp_path / "average.h5"
    wavg.average_checkpoints(run.paths, output, dtype="float16", optimizer="drop")
    loaded = keras.models.load_model(output, compile=False).get_weights()
    assert_bitwise_equal(loaded, [a.astype(np.float32) for a in wavg.load(output).values()])
    for ours, right in zip(loaded, run.mean(EPOCHS, "equal"), strict=True):
        np.testing.assert_allclose(ours, right, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("build", [plain, normalized])
def test_load_weights_reads_a_weights_file_made_by_save(run_of, build, tmp_path):
    run, output = run_of(build), tmp_path / "weights.h5"
    wavg.save(output, wavg.load(run.paths[0]))
    run.model.set_weights(run.weights[-1])
    run.model.load_weights(output)
    assert_bitwise_equal(run.model.get_weights(), run.weights[0])


def test_a_model_compiled_with_mse_loads_uncompiled(tmp_path):
    # Keras 3.15 does not find the function "mse" when it compiles what it has saved as .h5 itself.
    model = plain(keras)
    model.compile("sgd", "mse")
    for epoch in (1, 2):
        model.fit(np.ones((4, 2)), np.eye(4, 3), epochs=1, verbose=0)
        model.save(tmp_path / f"model_{epoch}.h5")
    inputs, output = f"{tmp_path}/model_*.h5", tmp_path / "average.h5"
    wavg.average_checkpoints(inputs, output)
    loaded = keras.models.load_model(output, compile=False)
    assert_bitwise_equal(loaded.get_weights(), wavg.average_checkpoints(inputs).values())


def test_averaging_keras_files_imports_no_framework(run_of, tmp_path):
    script = """
import sys, wavg
wavg.average_checkpoints(sys.argv[1] + "/model_*.h5", sys.argv[2], weights="linear")
assert wavg.load(sys.argv[2])
print(sorted({"keras", "tensorflow", "tf_keras", "jax", "torch", "h5py"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(run_of(plain).folder), str(tmp_path / "average.h5")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "['h5py']\n"  # h5py shows that the look into sys.modules sees


def test_comparisons_see_planted_errors(run_of):
    assert_the_comparisons_see_planted_errors(run_of(plain))
