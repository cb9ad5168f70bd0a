"""The story of the technique on a real training run, with NumPy alone.

Everything shown is computed in the run, through the functions any user has.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import wavg

__all__ = ["Result", "plot", "run", "story", "table"]

Array = npt.NDArray[Any]
Model = dict[str, Array]

SEED = 11
EPOCHS, KEPT = 500, 10
_LAST = range(EPOCHS - KEPT + 1, EPOCHS + 1)
_CHECKPOINTS = (".safetensors", ".h5", ".keras", ".npz", ".json")
_MARK = {"format": "pt", "run": "wavg demo"}  # by which its files are known
SCHEDULES = ("equal", "linear", "exponential:alpha=2")


@dataclass(frozen=True, slots=True)
class Result:
    """Held-out accuracies, for n = 1 … N.

    Attributes
    ----------
    folder
        Where the checkpoints are.
    single
        Of the n-th newest checkpoint alone.
    averages
        For each schedule, of the average of the newest n.
    picture
        The path of the plot, or None without matplotlib.
    """

    folder: str
    single: list[float]
    averages: dict[str, list[float]]
    picture: str | None


def run(folder: str) -> Result:
    """Train, save the last ten epochs, score single checkpoints and averages, draw.

    Parameters
    ----------
    folder
        Made if missing; the demo's own files in it are replaced.

    Raises
    ------
    OutputExistsError
        The folder has checkpoints that are not a run of the demo's.
    """
    _refuse_other(folder)
    os.makedirs(folder, exist_ok=True)
    train_x, train_y, test_x, test_y = blobs()
    paths = []
    for epoch, model in training(train_x, train_y):
        if epoch in _LAST:
            paths.append(os.path.join(folder, f"model_{epoch}.safetensors"))
            wavg.save(paths[-1], model, metadata=_MARK, overwrite=True)
    single = [accuracy(wavg.load(path), test_x, test_y) for path in reversed(paths)]
    averages = {
        schedule: [
            accuracy(wavg.average_checkpoints(paths, weights=schedule, last=n), test_x, test_y)
            for n in range(1, KEPT + 1)
        ]
        for schedule in SCHEDULES
    }
    picture = (
        os.path.join(folder, "averages.png") if importlib.util.find_spec("matplotlib") else None
    )
    result = Result(folder, single, averages, picture)
    if picture:
        plot(result, picture)
    return result


def _refuse_other(folder: str) -> None:
    """Raise an error if a folder has checkpoints of another run."""
    if not os.path.isdir(folder):
        return
    own = [os.path.join(folder, f"model_{epoch}.safetensors") for epoch in _LAST]
    there = [path for path in own if os.path.exists(path)]
    if there and all(_metadata(path) == _MARK for path in there):
        return
    if there or any(name.endswith(_CHECKPOINTS) for name in os.listdir(folder)):
        raise wavg.OutputExistsError(
            f"{folder} holds checkpoints that are not the demo's; choose another folder, as in "
            "`wavg demo another-folder`",
            path=folder,
        )


def _metadata(path: str) -> dict[str, str]:
    with wavg.open_checkpoint(path) as checkpoint:
        return dict(checkpoint.metadata)


def blobs() -> tuple[Array, Array, Array, Array]:
    """Draw 1,100 points in three overlapping classes: 100 to train on, 1,000 held out."""
    rng = np.random.default_rng(SEED)
    centres = rng.uniform(-5, 5, (3, 2))
    labels = rng.integers(0, 3, 1100)
    points = (centres[labels] + rng.normal(0, 2.0, (1100, 2))).astype(np.float32)
    return points[:100], labels[:100], points[100:], labels[100:]


def training(x: Array, y: Array) -> Iterator[tuple[int, Model]]:
    """Train a 2-25-3 network by hot SGD with momentum; yield every epoch's model."""
    rng = np.random.default_rng(SEED)
    model = {
        "hidden/kernel": rng.normal(0, 1.0, (2, 25)).astype(np.float32),
        "hidden/bias": np.zeros(25, np.float32),
        "output/kernel": rng.normal(0, 0.3, (25, 3)).astype(np.float32),
        "output/bias": np.zeros(3, np.float32),
    }
    momentum = {name: np.zeros_like(array) for name, array in model.items()}
    for epoch in range(1, EPOCHS + 1):
        order = rng.permutation(len(x))
        for batch in np.split(order, range(10, len(x), 10)):
            for name, gradient in gradients(model, x[batch], y[batch]).items():
                momentum[name] = np.float32(0.9) * momentum[name] - np.float32(0.05) * gradient
                model[name] = model[name] + momentum[name]
        yield epoch, model


def gradients(model: Model, x: Array, y: Array) -> Model:
    """Gradients of the mean cross-entropy."""
    hidden, probabilities = forward(model, x)
    error = probabilities
    error[np.arange(len(y)), y] -= 1
    error /= np.float32(len(y))
    behind = (error @ model["output/kernel"].T) * (hidden > 0)
    return {
        "hidden/kernel": x.T @ behind,
        "hidden/bias": behind.sum(axis=0),
        "output/kernel": hidden.T @ error,
        "output/bias": error.sum(axis=0),
    }


def forward(model: Model, x: Array) -> tuple[Array, Array]:
    """Hidden activations (ReLU) and class probabilities (softmax)."""
    hidden = np.maximum(x @ model["hidden/kernel"] + model["hidden/bias"], 0)
    logits = hidden @ model["output/kernel"] + model["output/bias"]
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return hidden, exponentials / exponentials.sum(axis=1, keepdims=True)


def accuracy(model: Model, x: Array, y: Array) -> float:
    """Share of the points whose class is predicted."""
    return float((forward(model, x)[1].argmax(axis=1) == y).mean())


def table(result: Result) -> str:
    """Return the scores as text."""
    names = [name.partition(":")[0] for name in result.averages]
    lines = [f"{'n':>3}  {'n-th newest':>11}  " + "  ".join(f"{name:>11}" for name in names)]
    for n, single in enumerate(result.single, start=1):
        row = "  ".join(f"{scores[n - 1]:11.3f}" for scores in result.averages.values())
        lines.append(f"{n:>3}  {single:11.3f}  {row}")
    return "\n".join(lines)


def story(result: Result) -> str:
    """Tell the run: what was done, the table, what it shows, and what to do next."""
    low, high = min(result.single), max(result.single)
    name, scores = next(iter(result.averages.items()))
    pattern = os.path.join(glob.escape(result.folder), "model_*.safetensors")
    best = max(result.averages, key=lambda schedule: result.averages[schedule][-1])
    picture = result.picture or "none: `pip install matplotlib` and run again"
    return f"""\
A 2-25-3 network learned {EPOCHS} epochs on 100 points in three overlapping blobs, at a learning
rate too high to settle. Its last {KEPT} epochs are {pattern}.
Accuracy on 1,000 points it has not seen, of the n-th newest checkpoint alone and of the average
of the newest n:

{table(result)}

Alone, a checkpoint scores between {low:.3f} and {high:.3f}, {np.mean(result.single):.3f} on
average: which one you get is luck. The {name} average of all {KEPT} scores {scores[-1]:.3f}.
(One run with one seed: your own held-out data decides.)

picture: {picture}
next:    wavg average {shlex.quote(pattern)} -o average.safetensors --weights {best}"""


def plot(result: Result, path: str) -> None:
    """Draw single scores as dots, averages as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    counts = range(1, len(result.single) + 1)
    axes.plot(counts, result.single, "o", color="0.55", label="n-th newest checkpoint alone")
    for (name, scores), style in zip(result.averages.items(), ("-", "--", ":"), strict=True):
        axes.plot(counts, scores, style, linewidth=2, label=f"average of the newest n, {name}")
    axes.set_xlabel("n, newest checkpoint first")
    axes.set_ylabel("held-out accuracy")
    axes.set_xticks(list(counts))
    axes.set_title(f"The last {len(result.single)} of {EPOCHS} epochs, alone and averaged")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
