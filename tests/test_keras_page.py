"""The Keras page, from top to bottom: its code and its commands, as a reader would run them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

import pages
import wavg

os.environ["KERAS_BACKEND"] = "jax"
keras = pytest.importorskip("keras")

PAGE = Path(__file__).parent.parent / "docs" / "keras.md"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        # Keras 3.15's variables, turned into arrays by NumPy 2.
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
        # It tells that a file without the optimizer's state leaves that out; so does the page.
        "ignore:Skipping variable loading for optimizer:UserWarning",
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    keras.utils.clear_session()  # names are counted, and the page prints some
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield pages.run(PAGE, tmp_path_factory.mktemp("page"), monkeypatch)


def test_the_page_runs_and_says_what_happens(page):
    assert {"Averaging", "remeasure", "report"} <= page.keys()


@pytest.mark.parametrize(
    "wrong", [("python", ">>> 1 + 1\n3\n"), ("python", "assert 0"), ("sh", "wavg inspect none.h5")]
)
def test_a_wrong_example_is_seen(wrong, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```{}\n{}\n```".format(*wrong), "utf-8")
    with pytest.raises(AssertionError):
        pages.run(page, tmp_path, monkeypatch)


def normalized(norm, values):
    """What batch normalisation makes of a batch in training."""
    mean, variance = values.mean(axis=0), values.var(axis=0)
    gamma, beta = (np.asarray(v.numpy(), "float64") for v in (norm.gamma, norm.beta))
    return gamma * (values - mean) / np.sqrt(variance + norm.epsilon) + beta


def test_remeasured_statistics_are_those_of_the_activations(page):
    rng = np.random.default_rng(1)
    layers = keras.layers
    first, second, frozen = (layers.BatchNormalization(momentum=0.9) for _ in range(3))
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(4), first])
    model = keras.Sequential([keras.Input((3,)), inner, second, frozen])
    model.set_weights([rng.uniform(0.5, 2, w.shape).astype("float32") for w in model.get_weights()])
    frozen.trainable = False
    before = {v.path: v.numpy() for v in model.variables}
    batches = rng.normal(1, 3, (5, 16, 3)).astype("float32")
    page["remeasure"](model, iter(batches))

    kernel, bias = inner.layers[0].get_weights()
    inputs = [batch.astype("float64") @ kernel + bias for batch in batches]
    for norm in (first, second):
        mean = np.mean([values.mean(axis=0) for values in inputs], axis=0)
        variance = np.mean([values.var(axis=0) for values in inputs], axis=0)
        np.testing.assert_allclose(norm.moving_mean.numpy(), mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.moving_variance.numpy(), variance, rtol=1e-4)
        assert norm.momentum == 0.9
        inputs = [normalized(norm, values) for values in inputs]
    changed = {id(v) for n in (first, second) for v in (n.moving_mean, n.moving_variance)}
    for variable in model.variables:
        assert np.array_equal(variable.numpy(), before[variable.path]) != (id(variable) in changed)


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_callback_and_remeasuring_work_in_tf_keras():
    tf_keras = pytest.importorskip("tf_keras")
    names = {"keras": tf_keras, "wavg": wavg, "np": np}
    for code in re.findall(r"^```python\n((?:class|def) .*?)^```$", PAGE.read_text(), re.M | re.S):
        exec(code, names)
    layers = tf_keras.layers
    norm = layers.BatchNormalization()
    inner = tf_keras.Sequential([tf_keras.Input((3,)), layers.Dense(4), norm])
    model = tf_keras.Sequential([tf_keras.Input((3,)), inner, layers.Dense(1)])
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(1, 3, (4, 16, 3)).astype("float32")
    averaging = names["Averaging"](start=1)
    model.fit(x.reshape(-1, 3), np.ones((64, 1)), epochs=3, verbose=0, callbacks=[averaging])
    assert averaging.averager.count == 2
    assert all(map(np.array_equal, model.get_weights(), averaging.averager.result()))
    names["remeasure"](model, x)
    seen = np.asarray(inner.layers[0](x), "float64")
    mean, variance = seen.mean(axis=1).mean(axis=0), seen.var(axis=1).mean(axis=0)
    np.testing.assert_allclose(norm.moving_mean.numpy(), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.moving_variance.numpy(), variance, rtol=1e-4)
