"""Ten checkpoints of a Keras model into one: against the copy limit, `load_model` and h5py.

    python benchmarks/keras_files.py FOLDER [--repeats 9] [--peers] [--small]

FOLDER takes 20 GB, and --peers 12 GB of memory; --small tries it all on a model of 2 MB and records
nothing. Needs keras with JAX. The model has the Llama-shaped tensors of the other benchmarks in
Dense layers, so that Keras itself writes, loads and predicts with it. Files are in the page cache,
outputs are new files, and everything is timed in turns:

- in one process, for `.h5`, `.weights.h5`, `.keras` and the same tensors in `.safetensors`: the
  copy limit of these files (the same reads and the same write without arithmetic) and wavg;
- whole processes, start-up included: `wavg average` of each form;
- with --peers, whole processes on `.h5`: `wavg average`; `load_model` of all ten, `np.average`,
  `set_weights` and `save`, in Keras on JAX; and h5py, tensor by tensor, with a float64 sum, into a
  copy of the newest file.

Every output is loaded by Keras, and its numbers compared, before a figure is reported. Writes
results/keras.json and results/keras_peers.json.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from common import copy_limit, median, read_all, record, run_process, side_by_side, spread

import wavg
from wavg.dtypes import lookup
from wavg.exact import integer_mean

COUNT = 10
PAIRS = ((".h5", ".safetensors"), (".weights.h5", ".keras"))  # 10 GB each, for the page cache
FULL = {"width": 1024, "blocks": 8, "vocabulary": 16_000, "hidden": 2816}
SMALL = {"width": 64, "blocks": 8, "vocabulary": 1000, "hidden": 176}

LOAD_ALL = """
    import os, sys
    os.environ["KERAS_BACKEND"] = "jax"
    import keras, numpy as np
    models = [keras.models.load_model(path, compile=False) for path in sys.argv[2:]]
    weights = [model.get_weights() for model in models]
    models[-1].set_weights([np.average(np.stack(arrays), axis=0) for arrays in zip(*weights)])
    models[-1].save(sys.argv[1])
"""

H5PY = """
    import shutil, sys, h5py, numpy as np
    shutil.copyfile(sys.argv[-1], sys.argv[1])
    inputs = [h5py.File(path, "r") for path in sys.argv[2:]]
    output = h5py.File(sys.argv[1], "r+")["model_weights"]
    names = []
    output.visititems(lambda name, item: names.append(name) if hasattr(item, "dtype") else None)
    for name in names:
        total = np.zeros(output[name].shape)
        for file in inputs:
            total += file["model_weights"][name][()]
        output[name][...] = total / len(inputs)
"""


def build(width: int, blocks: int, vocabulary: int, hidden: int):
    """Return a Keras model of the tensors of `common.llama_shapes`, without attention between."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    def dense(units, name):
        return keras.layers.Dense(units, use_bias=False, name=name)

    def add(*parts):  # layers, as Keras reloads no operators from legacy files
        return keras.layers.Add()(parts)

    def multiply(*parts):
        return keras.layers.Multiply()(parts)

    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(vocabulary, width, name="embed_tokens")(tokens)
    for block in range(blocks):
        y = keras.layers.LayerNormalization(center=False, name=f"input_norm_{block}")(x)
        q, k, v = (dense(width, f"{name}_proj_{block}")(y) for name in "qkv")
        x = add(x, dense(width, f"o_proj_{block}")(add(multiply(q, k), v)))
        y = keras.layers.LayerNormalization(center=False, name=f"post_norm_{block}")(x)
        gate, up = (dense(hidden, f"{name}_proj_{block}")(y) for name in ("gate", "up"))
        x = add(x, dense(width, f"down_proj_{block}")(multiply(gate, up)))
    x = keras.layers.LayerNormalization(center=False, name="norm")(x)
    return keras.Model(tokens, x)


def make(folder: Path, sizes: dict[str, int]) -> list[str]:
    """Have Keras save a run in all its forms, and the tensors as safetensors; return log lines."""
    folder.mkdir(parents=True, exist_ok=True)
    suffixes = [suffix for pair in PAIRS for suffix in pair]
    if all((folder / f"model_{COUNT}{suffix}").exists() for suffix in suffixes):
        return []
    model = build(**sizes)
    logging.getLogger("absl").setLevel("ERROR")  # that .h5 is an old format
    rng = np.random.default_rng(0)
    scales = [(w.shape, np.float32(0.02)) for w in model.weights]
    base = [rng.standard_normal(shape, np.float32) * scale for shape, scale in scales]
    for step in range(1, COUNT + 1):
        noisy = [
            array + rng.standard_normal(array.shape, np.float32) * np.float32(0.002)
            for array in base
        ]
        model.set_weights(noisy)
        path = f"{folder}/model_{step}"
        model.save(path + ".keras")
        model.save(path + ".h5")
        model.save_weights(path + ".weights.h5")
        wavg.save(path + ".safetensors", wavg.load(path + ".h5"), overwrite=True)
    return [f"{model.count_params():,} numbers in {len(model.weights)} tensors"]


def loaded(output: Path, sizes: dict[str, int]) -> list[np.ndarray]:
    """Return a sample of each array of a file, as Keras loads it."""
    if output.name.endswith(".weights.h5"):
        model = build(**sizes)
        model.load_weights(output)
    else:
        model = build(**sizes)  # chooses the backend
        import keras

        model = keras.models.load_model(output, compile=False)
    return [array.ravel()[:SAMPLE].copy() for array in model.get_weights()]


SAMPLE = 500


def elsewhere(function, *arguments):
    """Call it in another process, so that none of Keras' threads and memory are in this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def wrong_share(paths: list[Path], output: Path, sizes: dict[str, int]) -> float:
    """Return the share of a sample, loaded by Keras, that is not the correctly rounded mean."""
    samples = []
    for path in paths:
        with wavg.open_checkpoint(path) as checkpoint:
            samples.append([np.asarray(tensor).ravel()[:SAMPLE] for tensor in checkpoint.values()])
    if output.suffix == ".safetensors":
        result = [array.ravel()[:SAMPLE] for array in wavg.load(output).values()]
    else:
        result = elsewhere(loaded, output, sizes)
    wrong = []
    for *rows, found in zip(*samples, result, strict=True):
        columns = np.stack(rows).astype(np.float64).T.tolist()
        right = [integer_mean((1,) * len(paths), column, lookup("float32")) for column in columns]
        wrong.append(found != np.array(right, np.float32))
    return float(np.mean(np.concatenate(wrong)))


def average_command(paths: list[Path], output: Path) -> list[str]:
    return [sys.executable, "-m", "wavg", "average", *map(str, paths), "-o", str(output)]


def in_turns(
    commands: dict[str, list[str]],
    paths: list[Path],
    output: Path,
    repeats: int,
    check: Callable[[str], None] = lambda name: None,
) -> dict[str, dict]:
    runs: dict[str, list] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            output.unlink(missing_ok=True)
            read_all(paths)  # other processes may have driven them out of the page cache
            runs[name].append(run_process(command))
            check(name)
    return {
        name: {"seconds": [run[0] for run in done], "peak_bytes": max(run[1] for run in done)}
        for name, done in runs.items()
    }


def forms(folder: Path, sizes: dict[str, int], repeats: int) -> dict:
    figures: dict = {}
    copy = folder / "copy.bin"

    def warm(name: tuple[str, str]) -> None:
        read_all(run_of(folder, name[1]))

    for pair in PAIRS:
        runs = {suffix: run_of(folder, suffix) for suffix in pair}
        outputs = {suffix: folder / f"average{suffix}" for suffix in pair}
        functions = {}
        for suffix, paths in runs.items():
            functions["copy limit", suffix] = partial(copy_limit, paths, [copy])
            functions["wavg", suffix] = partial(wavg.average_checkpoints, paths, outputs[suffix])
        written = [copy, *outputs.values()]
        times = side_by_side(functions, repeats, written, warm)
        for suffix, paths in runs.items():
            output = outputs[suffix]
            process = in_turns({"wavg": average_command(paths, output)}, paths, output, repeats)[
                "wavg"
            ]
            if wrong_share(paths, output, sizes):
                raise SystemExit(f"{output} is wrong; no figure is reported")
            output.unlink()
            seconds = {name: times[name, suffix] for name in ("copy limit", "wavg")}
            ratio = median(seconds["wavg"]) / median(seconds["copy limit"])
            figures[suffix] = {"seconds": seconds, "ratio": ratio, "process": process}
            print(f"{suffix}: " + ", ".join(f"{k} {spread(v)}" for k, v in seconds.items()), end="")
            print(f", ratio {ratio:.2f}; as a process {spread(process['seconds'])}", end="")
            print(f", {process['peak_bytes'] / 1e6:.0f} MB", flush=True)
    return figures


def peers(folder: Path, sizes: dict[str, int], repeats: int) -> dict:
    paths, output = run_of(folder, ".h5"), folder / "peer.h5"
    names = [str(output), *map(str, paths)]
    commands = {
        "wavg": average_command(paths, output),
        "load_model, np.average": [sys.executable, "-c", textwrap.dedent(LOAD_ALL), *names],
        "h5py": [sys.executable, "-c", textwrap.dedent(H5PY), *names],
    }
    wrong = {}

    def check(name: str) -> None:
        if name not in wrong:
            wrong[name] = wrong_share(paths, output, sizes)

    figures = in_turns(commands, paths, output, repeats, check)
    output.unlink()
    if wrong["wavg"]:
        raise SystemExit(f"{output} is wrong; no figure is reported")
    for name, row in figures.items():
        row["wrong_share"] = wrong[name]
        faster = median(row["seconds"]) / median(figures["wavg"]["seconds"])
        print(
            f"{name} {spread(row['seconds'])}, {row['peak_bytes'] / 1e6:.0f} MB, "
            f"{wrong[name]:.2%} of numbers not correctly rounded; {faster:.1f} times wavg's time"
        )
    return figures


def run_of(folder: Path, suffix: str) -> list[Path]:
    return [folder / f"model_{step}{suffix}" for step in range(1, COUNT + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    sizes = SMALL if options.small else FULL
    print(*elsewhere(make, options.folder, sizes))
    if options.peers:
        name, figures = "keras_peers", peers(options.folder, sizes, min(3, options.repeats))
    else:
        name, figures = "keras", forms(options.folder, sizes, options.repeats)
    if not options.small:
        record(name, "warm", figures)


if __name__ == "__main__":
    main()
