"""Every family of the zoo in every form of Keras 3: averaged, compared byte by byte, loaded."""

from __future__ import annotations

import os

import numpy as np
import pytest

import keras_zoo
import wavg
import zoo_contract
from keras_zoo import FAMILIES_OF_KERAS3 as FAMILIES
from keras_zoo import thousands

os.environ["KERAS_BACKEND"] = "jax"
keras = pytest.importorskip("keras")

pytestmark = pytest.mark.filterwarnings(
    # Keras 3.15's variables, turned into arrays by NumPy 2.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

FORMS = ["h5", "legacy_weights", "weights", "keras", "shards"]
IN_MODELS = ["weights", "keras", "shards"]
LEGACY = ["h5", "legacy_weights"]

# Keras 3.15 cannot tell a model's own weights of different shapes apart when it saves .h5.
REFUSED = {("own_weights", form) for form in LEGACY}
# Nobody reloads bfloat16 from .h5, whose type does not say what it is.
NOT_RELOADED = {("bfloat16", form) for form in LEGACY}
# Classes that load_model does not know, weights and sharing that it does not make again.
NO_MODEL = {"subclassed", "own_weights", "own_weights_functional", "shared_across"}
OUT_OF_ORDER = {
    # Sorted by the names of their attributes, which say nothing about when they were made.
    *(("subclassed", form) for form in IN_MODELS),
    # The wrapped kernel is stored twice.
    *(("spectral", form) for form in IN_MODELS),
    # A layer of two models is stored twice.
    *(("shared_across", form) for form in LEGACY),
    # Without a configuration nothing says which inner layers were frozen.
    ("nested_frozen", "legacy_weights"),
    ("with_adam", "legacy_weights"),
}
CASES = [(name, form) for name in FAMILIES for form in FORMS if (name, form) not in REFUSED]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    return zoo_contract.runs_of(keras, tmp_path_factory, FORMS)


def options(case):
    return {"opaque_dtype": "bfloat16"} if case in NOT_RELOADED else {}


@pytest.mark.slow
def test_only_the_forms_that_keras_refuses_are_missing(run_of):
    refused = {(name, form) for name, build in FAMILIES.items() for form in run_of(build).refused}
    assert refused == REFUSED


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), sorted({*CASES} - NOT_RELOADED))
def test_the_averaged_file_loads_as_if_averaged_in_keras(run_of, name, form, tmp_path):
    run = run_of(FAMILIES[name])
    if form in ("h5", "keras") and name not in NO_MODEL:
        zoo_contract.check_model(run, form, tmp_path)
    else:
        zoo_contract.check_weights(run, form, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")
@pytest.mark.parametrize("form", ["h5", "weights", "keras", "shards"])
@pytest.mark.parametrize("name", zoo_contract.REWRITTEN)
def test_a_file_written_anew_keeps_its_order_and_loads(run_of, name, form, tmp_path):
    zoo_contract.check_rewritten(run_of(FAMILIES[name]), form, tmp_path)


@pytest.mark.parametrize(("name", "form"), sorted(NOT_RELOADED))
def test_what_keras_does_not_reload_is_averaged_as_arrays(run_of, name, form):
    run = run_of(FAMILIES[name])
    arrays = wavg.average_checkpoints(run.paths[form], weights="linear", opaque_dtype="bfloat16")
    zoo_contract.assert_is_the_average(arrays.values(), run)
    with pytest.raises(wavg.CheckpointFormatError, match="bfloat16"):
        wavg.load(run.paths[form][0])


@pytest.mark.slow
def test_load_is_get_weights_in_order_with_these_exceptions(run_of):
    out_of_order = {
        (name, form)
        for name, form in CASES
        if not zoo_contract.is_in_order(run_of(FAMILIES[name]), form, **options((name, form)))
    }
    assert out_of_order == OUT_OF_ORDER


def test_integers_are_the_newest_and_reported(run_of, tmp_path):
    run = run_of(FAMILIES["normalization"])
    for form in FORMS:
        _, report = zoo_contract.average(run, form, tmp_path, overwrite=True)
        assert [array.shape for array in run.weights[0] if keras_zoo.is_integer(array)] == [()]
        assert len(report.differing) == 1


@pytest.mark.frameworks
def test_thousands_of_layers(tmp_path_factory, tmp_path):
    run = zoo_contract.runs_of(keras, tmp_path_factory, ["h5", "weights"])(thousands)
    for form in ("h5", "weights"):
        zoo_contract.check_weights(run, form, tmp_path)
        assert zoo_contract.is_in_order(run, form)


@pytest.mark.parametrize("form", ["weights", "keras", "shards"])
def test_the_checks_see_planted_errors(run_of, form, tmp_path):
    run = run_of(FAMILIES["with_momentum"])
    assert all(np.isfinite(array).all() for array in run.weights[-1])
    zoo_contract.assert_the_checks_see_planted_errors(run, form, tmp_path)
