"""tf_keras, which is Keras 2, in the loop: train, save, average the files, load, train on."""

from __future__ import annotations

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
    average_in_keras,
    nested,
    normalized,
    plain,
    runs_of,
    slots,
)

keras = pytest.importorskip("tf_keras")

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning"),
]


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


@pytest.mark.parametrize("build", [plain, normalized, nested])
def test_training_goes_on_from_the_average_with_the_newest_optimizer_slots(run_of, build, tmp_path):
    run, output = run_of(build), tmp_path / "average.h5"
    wavg.average_checkpoints(run.paths, output, weights="linear", last=5)
    averaged, newest, older = map(keras.models.load_model, (output, *run.paths[:-3:-1]))
    assert averaged.loss.__name__ == "categorical_crossentropy"
    assert averaged.optimizer.get_config() == newest.optimizer.get_config()
    assert_bitwise_equal(slots(averaged), slots(newest))
    assert_bitwise_equal(slots(averaged), slots(run.model))
    assert slots(averaged)[0] == EPOCHS * BATCHES
    with pytest.raises(AssertionError):  # the slots are those of no other checkpoint
        assert_bitwise_equal(slots(averaged), slots(older))
    newest.set_weights(averaged.get_weights())
    for model in (averaged, newest):
        run.fit(model)
    assert slots(averaged)[0] == (EPOCHS + 1) * BATCHES
    assert_bitwise_equal(slots(averaged), slots(newest))
    assert_bitwise_equal(averaged.get_weights(), newest.get_weights())


def test_a_file_without_the_optimizer_loads_compiled_and_trains(run_of, tmp_path):
    run, output = run_of(normalized), tmp_path / "average.h5"
    wavg.average_checkpoints(run.paths, output, weights="linear", optimizer="drop")
    with h5py.File(output) as file:
        assert "optimizer_weights" not in file
    loaded = keras.models.load_model(output)
    assert_within_one_ulp(loaded.get_weights(), run.mean(EPOCHS, "linear"))
    assert slots(loaded)[0] == 0
    run.fit(loaded)


def test_a_file_in_half_precision_loads_into_the_float32_model(run_of, tmp_path):
    run, output = run_of(normalized), tmp_path / "average.h5"
    wavg.average_checkpoints(run.paths, output, dtype="float16", optimizer="drop")
    loaded = keras.models.load_model(output, compile=False).get_weights()
    assert_bitwise_equal(loaded, [a.astype(np.float32) for a in wavg.load(output).values()])
    for ours, right in zip(loaded, run.mean(EPOCHS, "equal"), strict=True):
        np.testing.assert_allclose(ours, right, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("build", [plain, normalized, nested])
def test_averaged_weights_files_load_with_load_weights(run_of, build, tmp_path):
    run, chosen = run_of(build), (0, 4, 9)
    for position in chosen:
        run.model.set_weights(run.weights[position])
        run.model.save_weights(str(tmp_path / f"weights_{position}.h5"))
    output = tmp_path / "average.h5"
    wavg.average_checkpoints(f"{tmp_path}/weights_*.h5", output, weights=[1, 2, 5])
    run.model.load_weights(str(output))
    right = average_in_keras([run.weights[position] for position in chosen], [1, 2, 5])
    assert_within_one_ulp(run.model.get_weights(), right)


@pytest.mark.parametrize("build", [plain, normalized])
def test_load_weights_reads_a_weights_file_made_by_save(run_of, build, tmp_path):
    run, output = run_of(build), tmp_path / "weights.h5"
    wavg.save(output, wavg.load(run.paths[0]))
    run.model.set_weights(run.weights[-1])
    run.model.load_weights(str(output))
    assert_bitwise_equal(run.model.get_weights(), run.weights[0])


def test_comparisons_see_planted_errors(run_of):
    assert_the_comparisons_see_planted_errors(run_of(plain))
