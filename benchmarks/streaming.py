"""Time and memory of `wavg.StreamingAverager`, beside a bare sum in NumPy.

    python benchmarks/streaming.py

Times are the processor's, for it is one thread: other work on the machine hardly shows. Before a
figure is recorded, exact averages are compared with `wavg.average`, byte for byte.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable

import common
import numpy as np

import wavg
from wavg.dtypes import lookup

WAYS: dict[str, tuple] = {
    "equal": ("equal", {}),
    "linear": ("linear", {}),
    "ema": ("ema:decay=0.99", {}),
    "ema, float32 sums": ("ema:decay=0.99", {"precision": "float32"}),
    "two power EMAs": (["power_ema:sigma_rel=0.05", "power_ema:sigma_rel=0.1"], {}),
}
DTYPES = ("float32", "bfloat16", "float64")


def cpu_time(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def models_of(dtype: str, count: int) -> list[dict]:
    """Make models of a run: a common one, and noise a tenth its size."""
    rng = np.random.default_rng(0)
    shapes = common.llama_shapes(width=512, layers=4, vocabulary=8_000, hidden=1408)
    base = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return [
        {
            name: (array + rng.standard_normal(array.shape, np.float32) / 10).astype(
                lookup(dtype).numpy
            )
            for name, array in base.items()
        }
        for _ in range(count)
    ]


def bare_sum(models: list[dict], updates: int) -> list[float]:
    """Time ``sum += model`` in float64: what no running sum can do without."""
    sums = {name: np.zeros(array.shape) for name, array in models[0].items()}

    def update(model: dict) -> None:
        for name, total in sums.items():
            np.add(total, model[name], out=total, casting="unsafe")

    return [cpu_time(lambda m=models[i % 3]: update(m)) for i in range(updates)]


def measure(models: list[dict], weights: str | list, options: dict, updates: int) -> dict:
    """Time updates and results, and trace what each allocates."""
    averager = wavg.StreamingAverager(weights, **options)
    tracemalloc.start()
    averager.update(models[0])
    state, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    for model in models[1:]:
        averager.update(model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if weights in ("equal", "linear"):
        ours, right = averager.result(), wavg.average(models, weights)
        assert all(ours[name].tobytes() == right[name].tobytes() for name in ours)
    return {
        "update_seconds": [
            cpu_time(lambda m=models[i % 3]: averager.update(m)) for i in range(updates)
        ],
        "result_seconds": [cpu_time(averager.result) for _ in range(3)],
        "state_bytes": state,
        "later_updates_allocate_bytes": peak - state,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=9)
    updates = parser.parse_args().updates
    figures: dict[str, dict] = {}
    for dtype in DTYPES:
        models = models_of(dtype, 3)
        numbers = sum(array.size for array in models[0].values())
        figures[dtype] = {
            "numbers": numbers,
            "model_bytes": sum(array.nbytes for array in models[0].values()),
            "bare_sum_seconds": bare_sum(models, updates),
            "ways": {
                name: measure(models, *way, updates)
                for name, way in WAYS.items()
                if dtype != "float64" or name == "equal"
            },
        }
        for name, row in figures[dtype]["ways"].items():
            print(
                f"{dtype} {name}: update {common.spread(row['update_seconds'])}, "
                f"bare sum {common.spread(figures[dtype]['bare_sum_seconds'])}, later updates "
                f"allocate {row['later_updates_allocate_bytes']:,} bytes at most"
            )
    common.record("streaming", "memory only", figures)


if __name__ == "__main__":
    main()
