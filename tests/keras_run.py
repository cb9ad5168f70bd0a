"""A small training run in whichever Keras it is handed, and what to compare with it."""

from __future__ import annotations

import numpy as np
import pytest

EPOCHS, BATCHES = 10, 3
# Weights of checkpoints oldest first, written independently of wavg.weights.
SCHEDULES = {
    "equal": lambda n: [1.0] * n,
    "linear": lambda n: [(n - j + 1) / n for j in range(n, 0, -1)],
    "exponential:alpha=2": lambda n: [np.exp(-j / 2) for j in range(n, 0, -1)],
}
EVERY_N_AND_SCHEDULE = [(n, text) for n in range(1, EPOCHS + 1) for text in SCHEDULES]


def plain(keras):
    return keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(25, activation="relu"),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


def normalized(keras):
    return keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(25, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


def nested(keras):
    """An inner model whose arrays the file lists in another order than get_weights()."""
    inner = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.BatchNormalization(),
        ]
    )
    return keras.Sequential([keras.Input((2,)), inner, keras.layers.Dense(3, activation="softmax")])


class Run:
    """A model trained for ten epochs, saved after each; later tests set its weights at will."""

    def __init__(self, keras, build, folder):
        keras.utils.set_random_seed(7)
        rng = np.random.default_rng(7)
        self.x = rng.standard_normal((32 * BATCHES, 2)).astype(np.float32)
        self.labels = np.eye(3, dtype=np.float32)[np.digitize(self.x @ [1, 2], [-1, 1])]
        self.folder, self.model = folder, build(keras)
        self.model.compile(keras.optimizers.Adam(0.02), "categorical_crossentropy")
        self.paths, self.weights = [], []
        for epoch in range(1, EPOCHS + 1):
            self.fit(self.model)
            self.paths.append(folder / f"model_{epoch}.h5")
            self.model.save(str(self.paths[-1]))
            self.weights.append(self.model.get_weights())

    def fit(self, model):
        model.fit(self.x, self.labels, epochs=1, shuffle=False, verbose=0)

    def mean(self, n, schedule):
        """The average as one would make it in Keras, from get_weights()."""
        return average_in_keras(self.weights[-n:], SCHEDULES[schedule](n))

    def predictions(self, model=None, weights=None):
        model = model or self.model
        if weights is not None:
            model.set_weights(weights)
        return np.asarray(model(self.x, training=False))  # far cheaper than compiling predict()


def average_in_keras(models, weights):
    return [
        np.average(np.stack(arrays).astype(np.float64), axis=0, weights=weights).astype(np.float32)
        for arrays in zip(*models, strict=True)
    ]


def runs_of(keras, tmp_path_factory):
    """A function from a model's builder to its run, trained when first asked for."""
    runs = {}

    def run(build):
        if build not in runs:
            runs[build] = Run(keras, build, tmp_path_factory.mktemp(build.__name__))
        return runs[build]

    return run


def slots(model):
    """The optimizer's state, iterations first."""
    return [np.asarray(variable) for variable in model.optimizer.variables]


def assert_within_one_ulp(ours, right):
    for a, b in zip(ours, right, strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_max_ulp(a, b, maxulp=1)


def assert_equal_predictions(ours, right):
    np.testing.assert_array_max_ulp(ours, right, maxulp=1)


def assert_bitwise_equal(ours, right):
    for a, b in zip(map(np.asarray, ours), map(np.asarray, right), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def assert_the_comparisons_see_planted_errors(run):
    right = run.weights[0]
    two_ulp = [array.copy() for array in right]
    two_ulp[2][3, 1] = np.nextafter(np.nextafter(two_ulp[2][3, 1], np.float32(9)), np.float32(9))
    for compare in (assert_within_one_ulp, assert_bitwise_equal):
        compare(right, [array.copy() for array in right])
        with pytest.raises(AssertionError):
            compare(two_ulp, right)
        with pytest.raises(ValueError, match="zip"):
            compare(right[:-1], right)
    predictions = run.predictions(weights=right)
    with pytest.raises(AssertionError):
        assert_equal_predictions(predictions * (1 + 2**-17), predictions)
