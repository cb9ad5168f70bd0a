"""What re-measuring batch-norm statistics changes: a small CNN on 1,797 handwritten digits.

    python benchmarks/batchnorm.py [--seeds 5]

Needs keras with JAX, and scikit-learn for the digits. For each way of training and each seed a
CNN is trained on 1,200 of the images (24 steps an epoch), saved after every epoch, and tested on
the other 597: the newest checkpoint and the averages of the newest five and ten, each with the
statistics as saved or averaged, and measured again by the function of docs/keras.md. Writes
results/batchnorm.json.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import statistics
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from common import record
from sklearn.datasets import load_digits

import wavg

PAGE = Path(__file__).parent.parent / "docs" / "keras.md"
BATCH, TRAINED = 50, 1200
LASTS = (5, 10)
EPOCHS = (12, 60)
WAYS = {
    "Adam, rate 0.001": lambda: keras.optimizers.Adam(0.001),
    "Adam, rate 0.01": lambda: keras.optimizers.Adam(0.01),
    "SGD, rate 1": lambda: keras.optimizers.SGD(1.0),
}


def remeasure_of_the_page():
    """Return the page's function, so that the figures are those of what it shows."""
    code = re.search(r"^```python\n(def remeasure.*?)^```$", PAGE.read_text(), re.M | re.S)[1]
    names = {"keras": keras, "wavg": wavg}
    exec(compile(code, str(PAGE), "exec"), names)
    return names["remeasure"]


def build(optimizer):
    layers = keras.layers
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for filters in (16, 32, 32):
        model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False))
        model.add(layers.BatchNormalization())
        model.add(layers.ReLU())
        if filters == 16:
            model.add(layers.MaxPooling2D())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def one_run(way, seed: int, epochs: int, images, labels) -> dict[str, list[float]]:
    keras.utils.set_random_seed(seed)
    model = build(WAYS[way]())
    remeasure = remeasure_of_the_page()
    order = np.random.default_rng(seed).permutation(len(images))
    train, test = order[:TRAINED], order[TRAINED:]

    def score() -> list[float]:
        return [float(x) for x in model.evaluate(images[test], labels[test], 597, verbose=0)]

    with tempfile.TemporaryDirectory() as folder:
        save = keras.callbacks.ModelCheckpoint(
            folder + "/m_{epoch}.weights.h5", save_weights_only=True
        )
        model.fit(images[train], labels[train], BATCH, epochs, verbose=0, callbacks=[save])
        data = images[train].reshape(-1, BATCH, 8, 8, 1)
        found = {"newest checkpoint": score()}
        remeasure(model, data)
        found["newest checkpoint, measured again"] = score()
        for last in LASTS:
            arrays = wavg.average_checkpoints(folder + "/m_*.weights.h5", last=last)
            model.set_weights(list(arrays.values()))
            found[f"average of {last}"] = score()
            remeasure(model, data)
            found[f"average of {last}, measured again"] = score()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    digits = load_digits()
    images, labels = digits.images[..., None].astype("float32") / 16, digits.target
    figures = []
    for way, epochs in itertools.product(WAYS, EPOCHS):
        runs = [one_run(way, seed, epochs, images, labels) for seed in range(options.seeds)]
        scores = {
            name: {
                "loss": [run[name][0] for run in runs],
                "accuracy": [run[name][1] for run in runs],
            }
            for name in runs[0]
        }
        figures.append({"way": way, "epochs": epochs, "scores": scores})
        for name, row in scores.items():
            loss, accuracy = (statistics.mean(row[key]) for key in ("loss", "accuracy"))
            print(
                f"{way}, {epochs} epochs: {name}: loss {loss:.4f}, accuracy {accuracy:.2%}",
                flush=True,
            )
    record("batchnorm", "of no matter", figures)


if __name__ == "__main__":
    main()
