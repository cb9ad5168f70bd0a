"""The experiment that started it, over many seeds: a small Keras model on blobs, and its averages.

    python benchmarks/founding.py [--seeds 50] [--epochs 500] [--keep 100] [--folder FOLDER]
                                  [--output FOLDER]

Needs keras with JAX, and scikit-learn for the points. docs/founding.md tells the experiment. A seed
is another initialisation and another order of the training points. Every seed is run in three ways:
as published, with ten times the learning rate, and on points drawn anew around the same centres.
The averages are those of `wavg.sweep`, from the `.h5` files. --folder keeps these, and takes runs
that are there as they are. Writes results/founding.json, of which benchmarks/report.py makes
tables and pictures.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from common import RESULTS, record
from sklearn.datasets import make_blobs

import wavg

TRAINED, POINTS, TEN = 100, 1100, 10
WAYS = ("as published", "ten times the rate", "points drawn anew")
SCHEDULES = ("equal", "linear", "exponential:alpha=2")
ALPHAS = (0.5, 1, 2, 4, 8, 16, 32, 64)


def data(way: str, seed: int) -> tuple[np.ndarray, ...]:
    """Return training points and labels, held-out points and labels."""
    options = {"n_samples": POINTS, "n_features": 2, "cluster_std": 2}
    x, labels, centers = make_blobs(**options, centers=3, random_state=2, return_centers=True)
    if way == "points drawn anew":
        x, labels = make_blobs(**options, centers=centers, random_state=1000 + seed)
    x = x.astype("float32")
    return x[:TRAINED], labels[:TRAINED], x[TRAINED:], labels[TRAINED:]


def build(rate: float) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(25, activation="relu"),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(rate), "categorical_crossentropy")
    return model


def train(way: str, seed: int, x, labels, folder: Path, epochs: int, keep: int) -> None:
    """Train, and save the last epochs as `.h5`."""
    keras.utils.set_random_seed(seed)
    model = build(0.01 if way == "ten times the rate" else 0.001)

    def save(epoch: int, logs: object) -> None:
        if epoch >= epochs - keep:
            model.save(str(folder / f"model_{epoch + 1}.h5"))

    saving = keras.callbacks.LambdaCallback(on_epoch_end=save)
    model.fit(x, keras.utils.to_categorical(labels), epochs=epochs, verbose=0, callbacks=[saving])


def probabilities(tensors, x) -> np.ndarray:
    """Do what Keras' predict does, in NumPy."""
    hidden, hidden_bias, output, output_bias = tensors
    scores = np.maximum(x @ hidden + hidden_bias, 0) @ output + output_bias
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def check(folder: Path, x) -> None:
    """Hold the NumPy evaluation against Keras, on an average that Keras loads."""
    paths = str(folder / "model_*.h5")
    arrays = wavg.average_checkpoints(paths, weights="linear", last=TEN)
    model = build(0.001)
    model.set_weights(list(arrays.values()))
    with tempfile.TemporaryDirectory() as other:
        average = f"{other}/average.h5"
        wavg.average_checkpoints(paths, average, weights="linear", last=TEN)
        loaded = keras.models.load_model(average, compile=False)
    for each in (model, loaded):
        right = each.predict(x, verbose=0)
        np.testing.assert_allclose(probabilities(arrays.values(), x), right, atol=1e-5)


def one_run(way: str, seed: int, folder: Path, epochs: int, keep: int) -> dict:
    """Train once; return how many held-out points each model classes rightly, and the losses."""
    x, labels, test_x, test_labels = data(way, seed)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"model_{epochs}.h5").exists():
        train(way, seed, x, labels, folder, epochs, keep)
    if seed == 0:
        check(folder, test_x)

    def right(tensors) -> int:
        return int((probabilities(tensors.values(), test_x).argmax(axis=1) == test_labels).sum())

    def loss(tensors) -> float:
        each = probabilities(tensors.values(), test_x)[np.arange(len(test_labels)), test_labels]
        return float(-np.log(np.maximum(each, 1e-7)).mean())

    paths = [str(folder / f"model_{epoch}.h5") for epoch in range(epochs - keep + 1, epochs + 1)]
    swept = wavg.sweep(paths, right, maximize=True, weights=list(SCHEDULES))
    ends = {
        end: wavg.average_checkpoints(paths[:end], weights=list(SCHEDULES), last=TEN)
        for end in range(TEN, keep + 1, TEN)
    }
    whole = wavg.average_checkpoints(paths, weights=["equal", "linear", *map(exponential, ALPHAS)])
    return {
        "way": way,
        "seed": seed,
        "right": {
            "alone": _text(score.score for score in swept.singles),
            **{
                rule: _text(score.score for score in swept.averages if score.weights == rule)
                for rule in SCHEDULES
            },
        },
        "right_by_alpha": _text(map(right, whole[2:])),
        "right_by_end": {
            rule: _text(right(models[position]) for models in ends.values())
            for position, rule in enumerate(SCHEDULES)
        },
        "loss": {
            "newest": _text([loss(wavg.load(paths[-1]))], ".5f"),
            "ten": _text(map(loss, ends[keep]), ".5f"),
            "all": _text(map(loss, whole[:2]), ".5f"),
        },
    }


def exponential(alpha: float) -> str:
    return f"exponential:alpha={alpha:g}"


def _text(values: Iterable[float], form: str = ".0f") -> str:
    """One line in the JSON, not a hundred."""
    return " ".join(format(value, form) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--keep", type=int, default=100, help="of how many epochs, in tens")
    parser.add_argument("--folder", type=Path, help="where to keep the checkpoints")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of founding.json")
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        for seed, way in itertools.product(range(options.seeds), WAYS):
            folder = root / f"{way.replace(' ', '-')}-{seed}"
            runs.append(one_run(way, seed, folder, options.epochs, options.keep))
            newest = {name: line.split()[9] for name, line in runs[-1]["right"].items()}
            print(f"{way}, seed {seed}: of 10: {newest}", flush=True)
    figures = {
        "epochs": options.epochs,
        "held_out": POINTS - TRAINED,
        "alphas": ALPHAS,
        "runs": runs,
    }
    record("founding", "of no matter", figures, options.output)


if __name__ == "__main__":
    main()
