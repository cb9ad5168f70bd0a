"""Averaging against letting the learning rate fall: a small CNN on 1,797 handwritten digits.

    python benchmarks/digits.py [--seeds 20] [--steps 3000] [--workers 2] [--output FOLDER]

Needs JAX, and scikit-learn for the digits. For each seed and each learning rate of a grid a CNN is
trained at that rate throughout and saved a hundred times on its way; from the same checkpoints the
rate also falls to zero, in three shapes, over the last 10, 20 or 50 % of the steps and over all of
them. Steps, order of the images and augmentation are the same for all of a seed. wavg averages the
files of the constant rate. Of the images 797 train, 400 choose rates and settings, by the first
quarter of the seeds, and 600 test what was chosen, by the other seeds. Writes results/digits.json,
from which report.py makes the tables of docs/experiments.md and draws docs/digits.svg.
"""

from __future__ import annotations

import os

# The convolutions are too small to share between threads; each process has a core.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import argparse
import functools
import itertools
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import RESULTS, record
from scipy.ndimage import affine_transform
from sklearn.datasets import load_digits

import wavg

TRAIN, CHOOSE, TEST = slice(0, 797), slice(797, 1197), slice(1197, 1797)
VARIANTS = 32  # of each image to train on, turned and shifted a little
CHANNELS = (8, 16, 32)
BATCH = 16
RATES = (0.001, 0.002, 0.004, 0.008, 0.016)
KEPT = 100  # checkpoints of a run: one for each percent of its steps
WINDOWS = (10, 20, 50, 100)  # percent of the steps, and so many checkpoints
SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - np.sqrt(x),
}
WINDOWED = ("equal", "linear", "wsm:shape=cosine", "wsm:shape=1-sqrt")  # wsm:shape=linear is equal
HALF_LIVES = (3, 6, 12, 24)  # percent of the steps
WIDTHS = (0.05, 0.1, 0.2)
DECAYS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


@functools.cache
def data() -> dict:
    """Return the images and labels of each part, in an order that never changes."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order].astype(np.float32) / 16, digits.target[order]
    rng = np.random.default_rng(1)
    variants = np.stack([[moved(image, rng) for image in images[TRAIN]] for _ in range(VARIANTS)])
    return {
        "variants": jnp.array(variants),
        "labels": jnp.array(labels[TRAIN]),
        "train": (jnp.array(variants[:2].reshape(-1, 8, 8)), jnp.tile(labels[TRAIN], 2)),
        "choose": (jnp.array(images[CHOOSE]), jnp.array(labels[CHOOSE])),
        "test": (jnp.array(images[TEST]), jnp.array(labels[TEST])),
    }


def moved(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn an image by up to 15 degrees and shift it by up to a pixel, about its centre."""
    angle, *shift = rng.uniform((-np.pi / 12, -1, -1), (np.pi / 12, 1, 1))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.full(2, 3.5)
    return affine_transform(image, turn, centre - turn @ (centre + shift), order=1)


def new_model(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    model, inputs = {}, 1
    for layer, outputs in enumerate(CHANNELS):
        scale = np.sqrt(2 / (9 * inputs))
        model[f"conv{layer}/kernel"] = rng.normal(0, scale, (9 * inputs, outputs))
        model[f"conv{layer}/bias"] = np.zeros(outputs)
        inputs = outputs
    model["output/kernel"] = rng.normal(0, 0.05, (4 * inputs, 10))
    model["output/bias"] = np.zeros(10)
    return {name: jnp.array(array, jnp.float32) for name, array in model.items()}


def logits(model: dict, images: jax.Array) -> jax.Array:
    """Apply three 3×3 convolutions, the latter two of stride 2, each as a matrix product."""
    x = images[..., None]
    for layer in range(len(CHANNELS)):
        size, stride = x.shape[1], 1 + (layer > 0)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        neighbours = [
            x[:, row : row + size : stride, column : column + size : stride]
            for row in range(3)
            for column in range(3)
        ]
        x = jnp.concatenate(neighbours, axis=-1)
        x = jax.nn.relu(x @ model[f"conv{layer}/kernel"] + model[f"conv{layer}/bias"])
    return x.reshape(len(x), -1) @ model["output/kernel"] + model["output/bias"]


def cross_entropy(model: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
    scores = jax.nn.log_softmax(logits(model, images))
    return -jnp.take_along_axis(scores, labels[:, None], axis=1).mean()


@jax.jit
def advance(state: tuple, seed: int, percent: int, rates, variants, labels) -> tuple:
    """Take a step of Adam at each of the rates; seed and percent draw images and variants."""

    def step(state: tuple, drawn: tuple) -> tuple:
        (model, first, second, count), (key, rate) = state, drawn
        key_of_image, key_of_variant = jax.random.split(key)
        image = jax.random.randint(key_of_image, (BATCH,), 0, len(labels))
        variant = jax.random.randint(key_of_variant, (BATCH,), 0, VARIANTS)
        gradient = jax.grad(cross_entropy)(model, variants[variant, image], labels[image])
        count += 1
        first = jax.tree.map(lambda m, g: DECAYS[0] * m + (1 - DECAYS[0]) * g, first, gradient)
        second = jax.tree.map(
            lambda v, g: DECAYS[1] * v + (1 - DECAYS[1]) * g * g, second, gradient
        )
        corrections = [1 - decay**count for decay in DECAYS]
        model = jax.tree.map(
            lambda p, m, v: (
                p - rate * (m / corrections[0]) / (jnp.sqrt(v / corrections[1]) + EPSILON)
            ),
            model,
            first,
            second,
        )
        return (model, first, second, count), None

    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), percent), len(rates))
    return jax.lax.scan(step, state, (keys, rates))[0]


def train(state: tuple, seed: int, rates: np.ndarray, start: int = 0) -> Iterator[tuple]:
    """Yield the state behind each percent of the steps, from the one behind `start` percent on."""
    known = data()
    for percent, part in list(enumerate(np.split(rates, KEPT)))[start:]:
        part = part.astype(np.float32)
        state = advance(state, seed, percent, part, known["variants"], known["labels"])
        yield state


def falling(rate: float, steps: int, window: int, shape: str) -> np.ndarray:
    """Return a rate for each step: constant, then falling to zero over the last percents."""
    begin = steps * (1 - window / 100)
    return rate * SHAPES[shape](np.clip((np.arange(steps) - begin) / (steps - begin), 0, 1))


@jax.jit
def right(model: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
    return (logits(model, images).argmax(axis=1) == labels).mean()


loss = jax.jit(cross_entropy)


def score(model: dict) -> dict[str, float]:
    known = data()
    scores = {part: float(loss(model, *known[part])) for part in ("train", "choose", "test")}
    return scores | {"accuracy": float(right(model, *known["test"]))}


def save(folder: str, states: list[tuple], steps: int, start: int = 0) -> list[str]:
    """Save the models of states as checkpoints of a run; return the paths."""
    os.makedirs(folder)
    paths = []
    for percent, (model, *_) in enumerate(states, start=start + 1):
        paths.append(f"{folder}/model_{percent * steps // KEPT}.safetensors")
        wavg.save(paths[-1], {name: np.asarray(array) for name, array in model.items()})
    return paths


def averages(paths: list[str], steps: int) -> Iterator[tuple[str, dict]]:
    """Yield all averages of a run's checkpoints, with their names, from two passes."""
    found = wavg.average_checkpoints(paths, weights=WINDOWED, last=WINDOWS)
    names = [f"{weights}, {last} %" for weights in WINDOWED for last in WINDOWS]
    yield from zip(names, found, strict=True)
    moving = {f"ema, half-life {h} %": wavg.ema(half_life=h * steps / 100) for h in HALF_LIVES}
    moving |= {f"power_ema:sigma_rel={w:g}": wavg.power_ema(sigma_rel=w) for w in WIDTHS}
    yield from zip(
        moving, wavg.average_checkpoints(paths, weights=list(moving.values())), strict=True
    )


def one_seed(seed: int, rate: float, steps: int) -> tuple[dict, dict]:
    """Train, average and score at one rate.

    Returns
    -------
    The scores of each arm; and test losses along the way, one a checkpoint.
    """
    model = new_model(seed)
    zeros = {name: jnp.zeros_like(array) for name, array in model.items()}
    new = (model, zeros, zeros, jnp.int32(0))
    trunk = list(train(new, seed, np.full(steps, rate)))
    scores = {"constant": score(trunk[-1][0])}
    runs = {"constant": trunk}
    for shape, window in itertools.product(SHAPES, WINDOWS):
        start = KEPT - window
        rates = falling(rate, steps, window, shape)
        tail = list(train(trunk[start - 1] if start else new, seed, rates, start))
        scores[f"decay {shape}, {window} %"] = score(tail[-1][0])
        runs[f"decay {shape}, {window} %"] = tail
    test = data()["test"]
    along = {
        name: [float(loss(state[0], *test)) for state in runs[name]]
        for name in ("constant", "decay linear, 20 %", "decay linear, 50 %", "decay linear, 100 %")
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = save(f"{folder}/constant", trunk, steps)
        scores |= {f"average {name}": score(model) for name, model in averages(paths, steps)}
        along["average of the last fifth so far"] = [
            float(loss(wavg.average_checkpoints(paths[:n], last=max(1, n // 5)), *test))
            for n in range(1, KEPT + 1)
        ]
        for window in WINDOWS:
            name = f"decay linear, {window} %"
            paths = save(f"{folder}/{window}", runs[name][-10:], steps, KEPT - 10)
            scores[f"{name}, then average equal, 10 %"] = score(wavg.average_checkpoints(paths))
    return scores, along


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000, help="of each run; a multiple of 100")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of digits.json")
    options = parser.parse_args()
    if options.steps % KEPT or options.seeds < 2:
        parser.error("steps must be a multiple of 100, and seeds at least two")
    begin, load = time.perf_counter(), os.getloadavg()[0]
    tasks = list(itertools.product(options.rates, range(options.seeds)))
    spawn = multiprocessing.get_context("spawn")
    found = []
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        rates, seeds = zip(*tasks, strict=True)
        for done in pool.map(one_seed, seeds, rates, itertools.repeat(options.steps)):
            found.append(done)
            print(f"{len(found)} of {len(tasks)}: {time.perf_counter() - begin:.0f} s", flush=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    by_rate = [found[i : i + options.seeds] for i in range(0, len(found), options.seeds)]
    choosing = max(1, options.seeds // 4)
    figures = {
        "steps": options.steps,
        "choosing_seeds": choosing,  # the first so many
        "rates": list(options.rates),
        "scores": {
            arm: {
                part: [[round(run[0][arm][part], 5) for run in runs] for runs in by_rate]
                for part in ("train", "choose", "test", "accuracy")
            }
            for arm in found[0][0]
        },
        "along": {
            name: [
                np.mean([run[1][name] for run in runs[choosing:]], 0).round(5).tolist()
                for runs in by_rate
            ]
            for name in found[0][1]
        },
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "workers": options.workers,
        "load_before": load,
    }
    record("digits", "of no matter", figures, options.output)


if __name__ == "__main__":
    main()
