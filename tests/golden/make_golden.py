"""Make the golden files: small real models as Keras saves them, and their ``get_weights()``.

    python tests/golden/make_golden.py --framework tf_keras    # where tf_keras is installed
    python tests/golden/make_golden.py --framework keras3      # where Keras 3 and JAX are

``<framework>_<family>_<epoch>.h5`` (or ``.weights.h5``, ``.keras``, ``.weights.json``) is the model
after that epoch, ``….npz`` beside it the list of its arrays in ``get_weights()`` order. Frameworks
are imported inside: pytest imports this module.
"""

from __future__ import annotations

import argparse
import importlib
import os
import warnings
from pathlib import Path

import numpy as np

EPOCHS = {"mlp": 3, "cnn": 2, "nested": 2, "lstm": 2, "normalization": 2, "weights": 2,
          "kernels": 2, "tower": 2, "attention": 2, "shards": 2}
SUFFIX = {"kernels": ".weights.h5", "tower": ".keras", "attention": ".keras",
          "shards": ".weights.json"}


def mlp(keras):
    layers = keras.layers
    return keras.Sequential([
        keras.Input((2,)),
        layers.Dense(8, activation="relu", name="hidden"),
        layers.Dense(3, activation="softmax", name="classes"),
    ])


def cnn(keras):
    layers = keras.layers
    return keras.Sequential([
        keras.Input((6, 6, 1)),
        layers.Conv2D(3, 3, use_bias=False, name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.Activation("relu", name="relu"),  # a layer without weights
        layers.GlobalAveragePooling2D(name="pool"),
        layers.Dense(3, activation="softmax", name="classes"),
    ])


def nested(keras):
    """Two inner models with equal names inside, so that weight names repeat."""
    layers = keras.layers

    def inner(name):
        stack = [layers.Dense(4, name="dense"), layers.BatchNormalization(name="norm"),
                 layers.Dense(4, name="dense_out"), layers.BatchNormalization(name="norm_out")]
        return keras.Sequential([keras.Input((2,)), *stack], name=name)

    inputs = keras.Input((2,))
    both = layers.Add(name="add")([inner("left")(inputs), inner("right")(inputs)])
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="classes")(both))


def tower(keras):
    """One inner model, its name not the first in the alphabet."""
    layers = keras.layers
    stack = [layers.Dense(4), layers.BatchNormalization(), layers.Dense(4, use_bias=False)]
    inner = keras.Sequential([keras.Input((2,)), *stack], name="inner")
    last = layers.Dense(3, activation="softmax", name="classes")
    return keras.Sequential([keras.Input((2,)), inner, last])


def lstm(keras):
    layers = keras.layers
    return keras.Sequential([
        keras.Input((5,), dtype="int32"),
        layers.Embedding(7, 3, name="embedding"),
        layers.LSTM(4, name="lstm"),
        layers.Dense(3, activation="softmax", name="classes"),
    ])


def normalization(keras):
    """Its Normalization layer keeps an integer count, which no average touches."""
    layers = keras.layers
    return keras.Sequential([
        keras.Input((2,)),
        layers.Normalization(name="scale"),
        layers.Dense(3, activation="softmax", name="classes"),
    ])


def attention(keras):
    """Layers around layers, which Keras saves in another order than it makes them."""
    layers = keras.layers
    inputs = keras.Input((5, 3))
    x = layers.Bidirectional(layers.GRU(2, return_sequences=True), name="both_ways")(inputs)
    x = layers.MultiHeadAttention(2, 2, name="attention")(x, x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="classes")(x))


BUILD = {"mlp": mlp, "cnn": cnn, "nested": nested, "lstm": lstm,
         "normalization": normalization, "weights": mlp,
         "kernels": cnn, "tower": tower, "attention": attention, "shards": mlp}


def data(family, seed):
    rng = np.random.default_rng(seed)
    if family in ("cnn", "kernels"):
        x = rng.standard_normal((48, 6, 6, 1)).astype(np.float32)
    elif family == "attention":
        x = rng.standard_normal((48, 5, 3)).astype(np.float32)
    elif family == "lstm":
        x = rng.integers(0, 7, (48, 5)).astype(np.int32)
    else:
        x = rng.standard_normal((48, 2)).astype(np.float32)
    return x, np.eye(3, dtype=np.float32)[rng.integers(0, 3, len(x))]


def make(keras, prefix, family, folder):
    keras.utils.set_random_seed(2024)
    keras.backend.clear_session()
    model = BUILD[family](keras)
    adam = family not in ("tower", "attention")  # plain SGD has no slots: smaller files
    optimizer = keras.optimizers.Adam(0.05) if adam else keras.optimizers.SGD(0.5)
    model.compile(optimizer, "categorical_crossentropy", metrics=["accuracy"])
    for epoch in range(1, EPOCHS[family] + 1):
        x, y = data(family, epoch)
        if family == "normalization":
            # Called on more rows each epoch, as a job that adapts while it reads does.
            model.get_layer("scale").adapt(x[: 16 * epoch])
            model.compile(keras.optimizers.Adam(0.05), "categorical_crossentropy")
        model.fit(x, y, batch_size=16, epochs=1, verbose=0)
        path = folder / f"{prefix}_{family}_{epoch}{SUFFIX.get(family, '.h5')}"
        if family in ("weights", "kernels"):
            model.save_weights(str(path))
        elif family == "shards":
            largest = max(array.nbytes for array in model.get_weights())
            model.save_weights(str(path), max_shard_size=2 * largest / 1024**3)
        elif path.suffix == ".keras":
            model.save(str(path))
        else:
            # The slots of inner models with equal names collide in tf_keras: saved without.
            model.save(str(path), include_optimizer=family != "nested")
        arrays = model.get_weights()
        np.savez(path.with_suffix(".npz"), *arrays)
        print(f"{path.name}: {path.stat().st_size / 1000:.1f} kB, {len(arrays)} arrays")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", choices=["tf_keras", "keras3"], required=True)
    parser.add_argument("families", nargs="*", help="all of them by default")
    arguments = parser.parse_args()
    framework = arguments.framework
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = importlib.import_module("keras" if framework == "keras3" else framework)
    warnings.filterwarnings("ignore", message="You are saving your model as an HDF5 file")
    families = dict(EPOCHS)
    if framework == "keras3":
        del families["weights"]  # it writes bare weights as .weights.h5 only
    else:
        del families["shards"]  # which only Keras 3 writes
    for family in arguments.families or families:
        make(keras, framework, family, Path(__file__).parent)


if __name__ == "__main__":
    main()
