"""Post-hoc EMA against averages that were really tracked, along a long synthetic run.

    python benchmarks/posthoc.py FOLDER [--steps 20000] [--snapshots 64] [--numbers 1000]

The model is a random walk with a drift. Power EMAs of the widths 0.05 and 0.10 are tracked at every
step in float64 and saved every so many, once in float32 and once in bfloat16; those of the widths
asked for are tracked beside them. `wavg.average_checkpoints` makes all widths in one pass over the
files. Writes results/posthoc.json.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
from common import record

import wavg

TRACKED = (0.05, 0.10)
WANTED = (0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def track(options: argparse.Namespace, moments: list[int]) -> dict[int, dict[float, np.ndarray]]:
    """Run, save snapshots, and return the averages of all widths at some moments."""
    rng = np.random.default_rng(0)
    every = options.steps // options.snapshots
    model = rng.standard_normal(options.numbers)
    drift = rng.standard_normal(options.numbers) * (3 / options.steps)
    walk = options.steps**-0.5
    updates = {width: wavg.power_ema(sigma_rel=width).update for width in WANTED}
    averages = {width: np.zeros(options.numbers) for width in WANTED}
    found = {}
    for step in range(1, options.steps + 1):
        model = model + drift + walk * rng.standard_normal(options.numbers)
        for width, update in updates.items():
            keep, add = update(step, step, step - 1)
            averages[width] = keep * averages[width] + add * model
        if step % every == 0:
            for width in TRACKED:
                for name, dtype in DTYPES.items():
                    path = options.folder / name / f"ema-sigma_rel={width}-step={step}.safetensors"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    wavg.save(path, {"w": averages[width].astype(dtype)}, overwrite=True)
        if step in moments:
            found[step] = {**averages, 0.0: model}
    return found


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--snapshots", type=int, default=64)
    parser.add_argument("--numbers", type=int, default=1000)
    options = parser.parse_args()
    every = options.steps // options.snapshots
    last = every * options.snapshots
    moments = [last, every * (options.snapshots // 2), last - every // 2]  # the third between two
    really = track(options, moments)
    warnings.simplefilter("ignore")  # of large amplifications, which are recorded here
    rows = []
    for step in moments:
        rules = [wavg.post_hoc_ema(sigma_rel=width, step=step) for width in WANTED]
        made = {
            name: wavg.average_checkpoints(
                str(options.folder / name), weights=rules, dtype="float64"
            )
            for name in DTYPES
        }
        plans = wavg.plan_average(str(options.folder / "float32"), weights=rules)
        for place, width in enumerate(WANTED):
            right = really[step][width]
            moved = rms(really[step][0.0] - right)
            error = {name: rms(each[place]["w"] - right) for name, each in made.items()}
            rows.append(
                {
                    "step": step,
                    "snapshot": step % every == 0,
                    "sigma_rel": width,
                    "amplification": plans[place].figures.amplification,
                    "error": {name: value / rms(right) for name, value in error.items()},
                    "error_of_the_change": {name: value / moved for name, value in error.items()},
                }
            )
            print(rows[-1], flush=True)
    figures = {
        "steps": options.steps,
        "snapshots": options.snapshots,
        "numbers": options.numbers,
        "tracked": TRACKED,
        "rows": rows,
    }
    record("posthoc", "of no matter", figures)


if __name__ == "__main__":
    main()
