"""The order of get_weights(), told from names and configuration; and by Keras itself."""

from __future__ import annotations

import json
import os
import zipfile

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_zoo
from keras_run import assert_bitwise_equal
from wavg.formats.hdf5_links import linked_order
from wavg.formats.keras_order import legacy_order, weights_order


def ordered(function, names, config=None, **options):
    positions = function(names, config, **options)
    assert sorted(positions) == list(range(len(names)))
    return [names[position] for position in positions]


def model(name, *layers, kind="Functional", **config):
    return {"class_name": kind, "config": {"name": name, "layers": list(layers), **config}}


def layer(name, kind="Dense", **config):
    return {"class_name": kind, "config": {"name": name, **config}}


# Keras 3's layout


def test_groups_stay_as_they_were_written():
    names = ["layers/b/vars/0", "layers/a/vars/0", "layers/a_1/vars/0"]
    assert ordered(weights_order, names) == names


def test_variables_sort_by_number():
    names = [f"layers/a/vars/{i}" for i in ("10", "9", "1", "0")]
    assert ordered(weights_order, names) == names[::-1]


@pytest.mark.parametrize(("keras_version", "right"), [("3.15.1", [1, 0]), ("2.21.0", [0, 1])])
def test_a_model_comes_before_its_layers_in_keras_3_and_after_in_keras_2(keras_version, right):
    names = ["layers/inner/layers/a/vars/0", "layers/inner/vars/0"]
    assert weights_order(names, keras_version=keras_version) == right


@pytest.mark.parametrize("private", ["", "_"])
@pytest.mark.parametrize("keras_version", ["2", "3"])
def test_attention_and_bidirectional_layers_are_recognised(private, keras_version):
    made = [f"{private}{name}_dense" for name in ("query", "key", "gate", "value", "output")]
    right = [f"layers/attention/{name}/vars/0" for name in made]
    right += [f"layers/both/{name}/cell/vars/0" for name in ("forward_layer", "backward_layer")]
    assert ordered(weights_order, sorted(right), keras_version=keras_version) == right


def test_one_such_name_alone_says_nothing():
    names = ["layers/a/kernel/vars/0", "layers/a/output_dense/vars/0", "layers/a/b/vars/0"]
    assert ordered(weights_order, names) == names


def test_a_configuration_decides_over_the_order_given():
    config = model(
        "m",
        layer("in", "InputLayer"),
        layer("x", "Conv2D"),
        layer("y"),
        model("inner", layer("z", "BatchNormalization"), layer("w"), kind="Sequential"),
        layer("v"),
    )
    right = [
        "layers/conv2d/vars/0",
        "layers/dense/vars/0",
        "layers/sequential/layers/batch_normalization/vars/0",
        "layers/sequential/layers/dense/vars/0",
        "layers/dense_1/vars/0",
    ]
    for names in (right, right[::-1], sorted(right)):
        assert ordered(weights_order, names, config) == right


def test_a_configuration_that_does_not_explain_the_groups_is_left_aside():
    names = ["layers/dense/vars/0", "layers/custom/vars/0"]
    assert ordered(weights_order, names, model("m", layer("a", "Custom"))) == names


def test_keras_2_lists_a_wrapped_models_trainable_variables_first():
    inside = "layers/time_distributed/layer/layers"
    norm, dense = f"{inside}/batch_normalization/vars", f"{inside}/dense/vars"
    names = [f"{norm}/{i}" for i in range(4)] + [f"{dense}/0"]
    assert ordered(weights_order, names, keras_version="3") == names
    split = [*names[:2], names[4], *names[2:4]]
    assert ordered(weights_order, names, keras_version="2") == split
    inner = model("i", layer("n", "BatchNormalization"), layer("d", trainable=False))
    config = model("m", layer("t", "TimeDistributed", layer=inner))
    assert ordered(weights_order, names, config, keras_version="2") == names
    norm = ["layers/time_distributed/layer/vars/1", "layers/time_distributed/layer/vars/0"]
    config = model("m", layer("t", "TimeDistributed", layer=layer("n", "BatchNormalization")))
    assert ordered(weights_order, norm, config, keras_version="2") == norm[::-1]


def test_the_layout_of_the_first_tf_keras_versions_is_recognised():
    folder = "_layer_checkpoint_dependencies"
    names = [f"{folder}/inner/vars/0", f"{folder}/inner/{folder}/dense/vars/0"]
    assert ordered(weights_order, names, keras_version="2.12.0") == names[::-1]


@pytest.mark.parametrize("name", ["", "vars", "a/b", "layers/a/vars/x", "a/" * 70 + "vars/0"])
def test_names_of_no_such_layout_leave_all_as_given(name):
    assert weights_order(["layers/a/vars/1", name, "layers/a/vars/0"]) == [0, 1, 2]


# The legacy layout

INNER = ["dense/kernel", "norm/gamma", "out/kernel", "norm/moving_mean"]
MADE = ["dense/kernel", "norm/gamma", "norm/moving_mean", "out/kernel"]
CONFIG = model(
    "m",
    model("inner", layer("dense"), layer("norm", "BatchNormalization"), layer("out")),
    layer("last"),
)


@pytest.mark.parametrize("config", [None, CONFIG])
@pytest.mark.parametrize(
    ("keras_version", "prefix"), [("2", "inner/"), ("3", "inner/inner/"), ("3", "inner/m/inner/")]
)
def test_an_inner_models_tensors_come_layer_by_layer(config, keras_version, prefix):
    names = [*(prefix + name for name in INNER), "last/last/kernel"]
    right = [*(prefix + name for name in MADE), "last/last/kernel"]
    assert ordered(legacy_order, names, config, keras_version=keras_version) == right


@pytest.mark.parametrize(("keras_version", "prefix"), [("2", "inner/"), ("3", "inner/inner/")])
def test_the_configuration_gives_frozen_layers_their_place(keras_version, prefix):
    frozen_last = [prefix + name for name in [*INNER[1:3], INNER[0], INNER[3]]]
    right = [prefix + name for name in MADE]
    assert ordered(legacy_order, frozen_last, CONFIG, keras_version=keras_version) == right
    assert ordered(legacy_order, frozen_last, keras_version=keras_version) != right


def test_equal_names_in_two_inner_models_are_told_apart():
    config = model("m", model("mid", model("b", layer("x"), layer("y")), layer("x"), layer("z")))
    right = ["mid/b/x/w", "mid/b/y/w", "mid/x/w", "mid/z/w"]
    assert ordered(legacy_order, right[::-1], config) == right


def test_names_that_could_mean_two_layers_are_clustered_only():
    config = model("m", model("mid", model("b", layer("x")), model("c", layer("x"))))
    names = ["mid/x/w", "mid/y/w", "mid/x/v"]
    assert ordered(legacy_order, names, config) == ["mid/x/w", "mid/x/v", "mid/y/w"]


@pytest.mark.parametrize("count", [16, 17])
def test_a_name_of_very_many_layers_says_nothing(count):
    inner = [model(f"b{number}", layer("x")) for number in range(count)]
    right = [f"mid/b{number}/x/w" for number in range(count)]
    found = ordered(legacy_order, right[::-1], model("m", model("mid", *inner)))
    assert found == (right if count == 16 else right[::-1])


def test_paths_of_very_many_parts_stay_as_they_are():
    names = [f"mid/{'a/' * count}{end}" for end in "wv" for count in (70, 2)]
    assert ordered(legacy_order, names) == names


def test_weights_of_the_model_come_first_in_keras_3_and_last_in_keras_2():
    names = ["a/a/kernel", "top_level_model_weights/m/extra"]
    assert ordered(legacy_order, names, keras_version="3.15.1") == names[::-1]
    assert ordered(legacy_order, names, keras_version="2.21.0") == names
    inner = ["inner/d/kernel", "inner/extra"]
    config = model("m", model("inner", layer("d")))
    assert ordered(legacy_order, inner, config, keras_version="2") == inner
    assert ordered(legacy_order, inner, config, keras_version="3") == inner[::-1]


def test_spectral_normalization_keeps_its_vector_after_the_kernel():
    names = [f"s/s/{name}" for name in ("dense/kernel", "dense/bias", "vector_u")]
    assert legacy_order(names) == [0, 2, 1]
    assert legacy_order(names, keras_version="2") == [0, 1, 2]


def test_keras_2_leaves_layers_around_layers_as_they_are():
    for prefix in ("block/block", "time_distributed"):
        names = [f"{prefix}/{name}" for name in ("c/k", "n/g", "c/m")]
        assert ordered(legacy_order, names, keras_version="2") == names
        assert ordered(legacy_order, names, keras_version="3") != names


# Hostile configurations

JSON = st.recursive(
    st.none() | st.booleans() | st.sampled_from(["Dense", "a", "dense", "", "layers"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["class_name", "config", "layers", "name", "layer", "trainable"]), inner
        )
        | st.builds(lambda layers, name: model(name, *layers), st.lists(inner, max_size=4), inner)
    ),
    max_leaves=40,
)
PATH = st.lists(
    st.sampled_from(["layers", "dense", "a", "dense_1", "layer", "", "vars", "0", "²"]), max_size=6
)


@given(st.lists(PATH.map("/".join), max_size=12), JSON, st.sampled_from(["", "2", "3", "x"]))
def test_any_names_and_any_configuration_give_a_permutation(names, config, keras_version):
    ordered(legacy_order, names, config, keras_version=keras_version)
    ordered(weights_order, names, config, keras_version=keras_version)
    ordered(weights_order, [f"{name}/vars/0" for name in names], config)


def test_a_configuration_nested_without_end_gives_a_permutation():
    config: dict = layer("x")
    for _ in range(5000):
        config = model("", config)
    wrapped: dict = layer("x")
    for _ in range(5000):
        wrapped = layer("x", layer=wrapped)
    for outer in (model("m", config), model("m", wrapped), wrapped):
        ordered(legacy_order, ["x/a/b/c", "x/a/d/c"], outer)
        ordered(weights_order, ["layers/x/vars/0"], outer)


# Keras itself

os.environ["KERAS_BACKEND"] = "jax"


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("family", ["nested_twice", "transformer"])
def test_keras_files_come_in_the_order_of_get_weights(family, tmp_path):
    keras = pytest.importorskip("keras")
    run = keras_zoo.make_run(
        keras, keras_zoo.FAMILIES[family], tmp_path, ["keras", "h5"], checkpoints=1
    )
    with zipfile.ZipFile(run.paths["keras"][0]) as archive:
        data, config = archive.read("model.weights.h5"), json.loads(archive.read("config.json"))
        ranks = linked_order(lambda offset, size: data[offset : offset + size])
        with archive.open("model.weights.h5") as member, h5py.File(member) as file:
            arrays = {
                path: file[path][()] for path in ranks if isinstance(file[path], h5py.Dataset)
            }
    for names, known in ((list(arrays), None), (sorted(arrays), config)):
        ours = [arrays[name] for name in ordered(weights_order, names, known)]
        assert_bitwise_equal(ours, run.weights[0])

    with h5py.File(run.paths["h5"][0]) as file:
        config, group = json.loads(file.attrs["model_config"]), file["model_weights"]
        names = [
            f"{layer}/{weight}"
            for layer in group.attrs["layer_names"]
            for weight in group[layer].attrs["weight_names"]
        ]
        ours = [np.asarray(group[name]) for name in ordered(legacy_order, names, config)]
    assert_bitwise_equal(ours, run.weights[0])
