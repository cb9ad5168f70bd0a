"""The models people have, tiny: built in whichever Keras is handed over, saved in all its forms.

A family is a function of the framework's module. A run of a family is one model whose weights are
set to new random values for each checkpoint, which costs nothing next to training; the optimizer's
slots too are set.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import h5py
import numpy as np


def is_keras3(keras):
    return keras.__version__.startswith("3")


# Everyday models


def sequential(keras):
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, activation="relu"), layers.Dense(3)]
    )


def functional(keras):
    """Two inputs, two outputs, layers that are neither in order of creation nor of name."""
    layers = keras.layers
    head = layers.Dense(2, name="a_head")
    left, right = keras.Input((4,), name="left"), keras.Input((3,), name="right")
    hidden = layers.Concatenate()([layers.Dense(3, name="z_left")(left), right])
    hidden = layers.PReLU(name="m_prelu")(layers.Dense(3, name="b_hidden")(hidden))
    return keras.Model([left, right], [head(hidden), layers.Dense(1, name="k_other")(hidden)])


def cnn(keras):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(3, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3, depth_multiplier=2),
            layers.BatchNormalization(),
            layers.SeparableConv2D(4, 2),
            layers.Conv2DTranspose(2, 2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )


def _inner(keras, name=None, width=4):
    layers = keras.layers
    stack = [
        layers.Dense(width, name="dense"),
        layers.BatchNormalization(name="norm"),
        layers.Dense(4, name="out"),
        layers.BatchNormalization(name="norm_out"),
    ]
    return keras.Sequential([keras.Input((4,)), *stack], name=name)


def nested(keras):
    """An inner model with statistics of its own between its layers."""
    return keras.Sequential([keras.Input((4,)), _inner(keras, "inner"), keras.layers.Dense(3)])


def nested_frozen(keras):
    """One layer of the inner model is frozen: the legacy form lists it last."""
    inner = _inner(keras, "inner")
    inner.get_layer("dense").trainable = False
    return keras.Sequential([keras.Input((4,)), inner, keras.layers.Dense(3)])


def nested_frozen_whole(keras):
    """A frozen backbone, as in transfer learning."""
    inner = _inner(keras, "backbone")
    inner.trainable = False
    return keras.Sequential([keras.Input((4,)), inner, keras.layers.Dense(3)])


def nested_siblings(keras):
    """Two inner models whose inner names are equal."""
    inputs = keras.Input((4,))
    both = [_inner(keras, "zeta", 3)(inputs), _inner(keras, "alpha", 5)(inputs)]
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Add()(both)))


def nested_twice(keras):
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4, name="before")(inputs)
    middle = _inner(keras, "innermost")(x)
    middle = keras.layers.BatchNormalization(name="middle_norm")(middle)
    middle = keras.Model(inputs, keras.layers.Dense(4, name="after")(middle), name="middle")
    outer = keras.Input((4,))
    x = keras.layers.BatchNormalization(name="first")(outer)
    return keras.Model(outer, keras.layers.Dense(2, name="last")(middle(x)))


def shared(keras):
    """A layer used twice, and an inner model used twice."""
    layers = keras.layers
    left, right = keras.Input((4,)), keras.Input((4,))
    dense, inner = layers.Dense(4, name="twice"), _inner(keras, "tower")
    x = layers.Add()([inner(dense(left)), inner(dense(right))])
    return keras.Model([left, right], layers.Dense(2, name="head")(x))


def shared_across(keras):
    """A layer both of the model and of a model in it: one tensor, which the legacy form repeats."""
    layers = keras.layers
    dense = layers.Dense(4, name="both")
    inputs, inner_inputs = keras.Input((4,)), keras.Input((4,))
    inner = keras.Model(inner_inputs, layers.Dense(4, name="deep")(dense(inner_inputs)), name="in")
    return keras.Model(inputs, layers.Dense(2, name="head")(dense(inner(inputs))))


def tied(keras):
    """An embedding whose matrix serves as the output projection: one tensor, used twice."""
    layers = keras.layers
    embedding = layers.Embedding(7, 4, name="tokens")
    if is_keras3(keras):
        reused = keras.layers.ReversibleEmbedding(7, 4, name="tokens")
        inputs = keras.Input((5,), dtype="int32")
        x = layers.LayerNormalization(name="norm")(reused(inputs))
        return keras.Model(inputs, reused(x, reverse=True))
    left, right = keras.Input((5,), dtype="int32"), keras.Input((5,), dtype="int32")
    x = layers.Add()([embedding(left), embedding(right)])
    return keras.Model([left, right], layers.LayerNormalization(name="norm")(x))


def subclassed(keras):
    """Attributes neither in the order of their names nor of their use; a list of layers."""

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.second = keras.layers.Dense(4)
            self.first = keras.layers.Dense(4)
            self._norm = keras.layers.BatchNormalization()
            self.blocks = [keras.layers.Dense(4), keras.layers.BatchNormalization()]
            self.head = keras.layers.Dense(2)

        def call(self, inputs, training=False):
            x = self._norm(self.second(self.first(inputs)), training=training)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model = Subclassed()
    model(np.zeros((1, 4), np.float32))
    return model


def own_weights(keras):
    """A model with weights of its own, trainable or not, besides those of its layers."""

    class OwnWeights(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(4)
            self.norm = keras.layers.BatchNormalization()

        def build(self, shape):
            self.steps = self.add_weight(
                shape=(3,), initializer="zeros", trainable=False, name="steps"
            )
            self.scale = self.add_weight(shape=(4,), initializer="ones", name="scale")
            super().build(shape)

        def call(self, inputs):
            return self.norm(self.dense(inputs)) * self.scale

    model = OwnWeights()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*build\(\)")
        model(np.zeros((1, 4), np.float32))
    return model


def own_weights_functional(keras):
    """The same of a functional model, which the legacy form keeps as top_level_model_weights."""
    model = sequential(keras)
    model.extra = model.add_weight(shape=(3,), initializer="ones", name="extra")
    return model


def recurrent(keras):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(7, 4),
            layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
            layers.GRU(3, return_sequences=True),
            layers.Bidirectional(layers.GRU(2, return_sequences=True), merge_mode="sum"),
            layers.SimpleRNN(3, return_sequences=True),
            layers.RNN([layers.LSTMCell(3), layers.GRUCell(2), layers.LSTMCell(2)]),
            layers.Dense(2),
        ]
    )


def transformer(keras):
    layers = keras.layers
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 8, name="tokens")(inputs)
    for block in range(2):
        attended = layers.MultiHeadAttention(2, 4, name=f"attention_{block}")(x, x)
        x = layers.LayerNormalization(name=f"norm_a{block}")(layers.Add()([x, attended]))
        wide = layers.Dense(12, activation="gelu", name=f"wide_{block}")(x)
        wide = layers.Dropout(0.1)(layers.Dense(8, name=f"narrow_{block}")(wide))
        x = layers.LayerNormalization(name=f"norm_b{block}")(layers.Add()([x, wide]))
    return keras.Model(inputs, layers.Dense(3, name="classes")(x))


def grouped_attention(keras):
    inputs = keras.Input((5, 8))
    x = keras.layers.GroupQueryAttention(4, 4, 2)(inputs, inputs)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def normalization(keras):
    layers = keras.layers
    scale = layers.Normalization(axis=-1)
    scale.adapt(np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32))
    return keras.Sequential([keras.Input((4,)), scale, layers.Dense(3)])


def dropout(keras):
    """Seeded: what generates the seeds is state, but none that any form stores as a weight."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4),
            layers.Dropout(0.5, seed=3),
            layers.GaussianNoise(0.1, seed=4),
            layers.Dense(2),
        ]
    )


def wrapped(keras):
    """Layers around layers."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((5, 4)),
            layers.TimeDistributed(layers.Dense(4)),
            layers.TimeDistributed(layers.BatchNormalization()),
            layers.GroupNormalization(1),
            layers.UnitNormalization(),
        ]
    )


def spectral(keras):
    """The wrapper takes the inner layer's kernel as its own: Keras 3's layout stores it twice."""
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((4,)), layers.SpectralNormalization(layers.Dense(3)), layers.Dense(2)]
    )


def wrapped_model(keras):
    """A whole model applied at every step of time."""
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((5, 4)), layers.TimeDistributed(_inner(keras, "inner")), layers.Dense(2)]
    )


def _of_policy(policy):
    def build(keras):
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(5, dtype=policy),
                layers.BatchNormalization(dtype=policy),
                layers.Dense(3, dtype=policy),
            ]
        )

    build.__name__ = policy
    return build


def thousands(keras, count=2000):
    """So many layers, and names so long, that the legacy form has to split its lists of names."""
    inputs = keras.Input((1,))
    ends = []
    for branch in range(0, count, 50):  # one long chain exceeds Python's depth of recursion
        x = inputs
        for i in range(branch, branch + 50):
            name = f"a_layer_with_quite_a_long_name_{i * 7919 % count}"
            x = keras.layers.Dense(1, use_bias=False, name=name)(x)
        ends.append(x)
    return keras.Model(inputs, keras.layers.Add()(ends))


# With an optimizer


def _compiled(build, make_optimizer, name):
    def compiled(keras):
        model = build(keras)
        model.compile(make_optimizer(keras), "categorical_crossentropy", metrics=["accuracy"])
        model.optimizer.build(model.trainable_variables)
        if not is_keras3(keras):  # makes the metrics, which tf_keras saves beside the model
            model.test_on_batch(np.zeros((1, *model.input_shape[1:])), np.eye(3)[:1])
        return model

    compiled.__name__ = name
    return compiled


OPTIMIZED = [
    _compiled(nested_frozen, lambda keras: keras.optimizers.Adam(0.01), "with_adam"),
    _compiled(cnn, lambda keras: keras.optimizers.SGD(0.01, momentum=0.9), "with_momentum"),
    _compiled(
        sequential,
        lambda keras: keras.optimizers.Adam(0.01, amsgrad=True, use_ema=True),
        "with_ema",
    ),
]
POLICIES = [_of_policy(p) for p in ("float16", "bfloat16", "mixed_float16", "mixed_bfloat16")]
EVERYDAY = [
    sequential,
    functional,
    cnn,
    nested,
    nested_frozen,
    nested_frozen_whole,
    nested_siblings,
    nested_twice,
    shared,
    shared_across,
    tied,
    subclassed,
    own_weights,
    own_weights_functional,
    recurrent,
    transformer,
    normalization,
    dropout,
    wrapped,
    wrapped_model,
]
KERAS3_ONLY = [grouped_attention, spectral]
FAMILIES = {build.__name__: build for build in [*EVERYDAY, *POLICIES, *OPTIMIZED]}
FAMILIES_OF_KERAS3 = FAMILIES | {build.__name__: build for build in KERAS3_ONLY}

SUFFIX = {
    "h5": ".h5",
    "legacy_weights": ".h5",
    "weights": ".weights.h5",
    "keras": ".keras",
    "shards": ".weights.json",
}


def is_integer(array):
    return array.dtype.kind in "iub"


def random_like(array, rng, *, positive):
    """New values of an array's dtype: integers count up, variances are positive."""
    if is_integer(array):
        return (np.asarray(array) + rng.integers(1, 9)).astype(array.dtype)
    values = rng.uniform(0.5, 2, array.shape) if positive else rng.standard_normal(array.shape)
    return np.asarray(values).astype(array.dtype)


def weights_for(model, rng):
    return [
        random_like(array, rng, positive="variance" in variable.name)
        for variable, array in zip(model.weights, model.get_weights(), strict=True)
    ]


def slots(model):
    """The variables of the optimizer that training changes."""
    optimizer = getattr(model, "optimizer", None)
    variables = getattr(optimizer, "variables", [])
    variables = variables() if callable(variables) else variables
    return [variable for variable in variables if "learning_rate" not in variable.name]


def save(keras, model, path, form):
    if form == "legacy_weights" and is_keras3(keras):
        legacy = importlib.import_module("keras.src.legacy.saving.legacy_h5_format")
        with h5py.File(path, "w") as file:
            legacy.save_weights_to_hdf5_group(file, model)
    elif form in ("weights", "legacy_weights"):
        model.save_weights(path)
    elif form == "shards":
        largest = max(array.nbytes for array in model.get_weights())
        total = sum(array.nbytes for array in model.get_weights())
        model.save_weights(path, max_shard_size=max(largest, total / 3) / 1024**3)
    else:
        model.save(path)


@contextlib.contextmanager
def quickly_built(keras):
    """Build layers without drawing their first values, which JAX compiles for each shape anew."""

    def zeros(self, shape, dtype=None, **options):
        return np.zeros(shape, dtype or "float32")

    names = ["VarianceScaling", "Orthogonal", "RandomUniform", "RandomNormal"]
    kinds = [getattr(keras.initializers, name) for name in names if is_keras3(keras)]
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(mock.patch.object(kind, "__call__", zeros))
        yield


@dataclass
class ZooRun:
    """Checkpoints of one model in several forms, and what it held at each."""

    keras: object
    model: object
    paths: dict[str, list[Path]] = field(default_factory=dict)
    weights: list = field(default_factory=list)
    slots: list = field(default_factory=list)
    refused: dict[str, Exception] = field(default_factory=dict)


def make_run(keras, build, folder, forms, checkpoints=2):
    """Save a family's model with new weights, `checkpoints` times, in each form that takes it."""
    keras.utils.set_random_seed(11)
    keras.backend.clear_session(**({"free_memory": False} if is_keras3(keras) else {}))
    with quickly_built(keras):
        run, rng = ZooRun(keras, build(keras)), np.random.default_rng(11)
    for _ in range(checkpoints):
        run.weights.append(weights_for(run.model, rng))
        state = [np.asarray(variable) for variable in slots(run.model)]
        run.slots.append([random_like(array, rng, positive=True) for array in state])
    # The legacy form last: having saved it, Keras 3.15 has forgotten the optimizer's class.
    for form in sorted(forms, key=lambda form: form == "h5"):
        for step, (weights, state) in enumerate(zip(run.weights, run.slots, strict=True), 1):
            run.model.set_weights(weights)
            for variable, array in zip(slots(run.model), state, strict=True):
                variable.assign(array)
            path = Path(folder, form, f"model_{step}{SUFFIX[form]}")
            path.parent.mkdir(exist_ok=True)
            try:
                save(keras, run.model, str(path), form)
            except (NotImplementedError, TypeError, ValueError) as error:
                run.refused[form] = error
                break
            run.paths.setdefault(form, []).append(path)
    return run
