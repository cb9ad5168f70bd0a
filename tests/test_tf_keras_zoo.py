"""Every family of the zoo in every form of tf_keras: averaged, compared byte by byte, loaded."""

from __future__ import annotations

import pytest

import wavg
import zoo_contract
from keras_zoo import FAMILIES, thousands

keras = pytest.importorskip("tf_keras")

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning"),
]

FORMS = ["h5", "legacy_weights", "weights", "keras"]
NEW, LEGACY = ["weights", "keras"], ["h5", "legacy_weights"]

REFUSED = {("subclassed", "h5"), ("own_weights", "h5")}
# In no form does tf_keras reload bfloat16, nor do its files say that they hold it.
NOT_RELOADED = {("bfloat16", form) for form in FORMS}
NO_MODEL = {"subclassed", "own_weights", "own_weights_functional", "shared_across"}
OUT_OF_ORDER = {
    # Sorted by the names of their attributes, which say nothing about when they were made.
    *(("own_weights", form) for form in NEW),
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


def test_only_the_forms_that_keras_refuses_are_missing(run_of):
    refused = {(name, form) for name, build in FAMILIES.items() for form in run_of(build).refused}
    assert refused == REFUSED


@pytest.mark.parametrize(("name", "form"), sorted({*CASES} - NOT_RELOADED))
def test_the_averaged_file_loads_as_if_averaged_in_keras(run_of, name, form, tmp_path):
    run = run_of(FAMILIES[name])
    if form in ("h5", "keras") and name not in NO_MODEL:
        zoo_contract.check_model(run, form, tmp_path)
    else:
        zoo_contract.check_weights(run, form, tmp_path)


@pytest.mark.parametrize("form", ["h5", "weights", "keras"])
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


def test_load_is_get_weights_in_order_with_these_exceptions(run_of):
    opaque = {"opaque_dtype": "bfloat16"}
    out_of_order = {
        case
        for case in CASES
        if not zoo_contract.is_in_order(
            run_of(FAMILIES[case[0]]), case[1], **(opaque if case in NOT_RELOADED else {})
        )
    }
    assert out_of_order == OUT_OF_ORDER


def test_thousands_of_layers(tmp_path_factory, tmp_path):
    run = zoo_contract.runs_of(keras, tmp_path_factory, ["h5"])(thousands)
    zoo_contract.check_weights(run, "h5", tmp_path)
    assert zoo_contract.is_in_order(run, "h5")


@pytest.mark.parametrize("form", ["weights", "keras"])
def test_the_checks_see_planted_errors(run_of, form, tmp_path):
    run = run_of(FAMILIES["with_momentum"])
    zoo_contract.assert_the_checks_see_planted_errors(run, form, tmp_path)
