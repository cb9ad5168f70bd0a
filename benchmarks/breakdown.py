"""Where the time of an average goes, with the kernel's first step compiled and in NumPy.

    python benchmarks/breakdown.py FOLDER [--dtype float32] [--repeats 5]

Sums what every thread spends in each call, waiting included; the rest is the interpreter and what
happens before and after. Writes results/breakdown.json.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import llama_shapes, make_run, median, read_all, record, time_once

import wavg
from wavg import compiled, kernel, publish

TOTALS: dict[str, float] = defaultdict(float)
LOCK = threading.Lock()


def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            with LOCK:
                TOTALS[name] += time.perf_counter() - start

    return call


def watch() -> None:
    os.preadv = watched("read", os.preadv)
    os.pwrite = watched("write", os.pwrite)
    os.fsync = watched("wait for the disk at the end", os.fsync)
    publish._sync_data = watched("disk at work meanwhile", publish._sync_data)
    kernel.Combiner.__call__ = watched("combine", kernel.Combiner.__call__)
    kernel.Combiner.from_files = watched("read and combine", kernel.Combiner.from_files)


def profile(folder: Path, dtype: str, repeats: int) -> dict:
    paths = make_run(folder / dtype, dtype, llama_shapes())
    read_all(paths)
    runs = []
    for _ in range(repeats + 1):
        TOTALS.clear()
        (folder / "a.safetensors").unlink(missing_ok=True)
        seconds = time_once(lambda: wavg.average_checkpoints(paths, folder / "a.safetensors"))
        runs.append({"wall": seconds, **TOTALS})
    (folder / "a.safetensors").unlink()
    names = sorted({name for run in runs for name in run})
    return {name: median([run.get(name, 0.0) for run in runs[1:]]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    watch()
    figures: dict[str, dict] = {}
    for dtype in options.dtype or ["float32", "bfloat16", "float16"]:
        figures[dtype] = {}
        for step in ("NumPy", "compiled"):
            compiled.COMPILED = step == "compiled" and kernel.COMPILED
            figures[dtype][step] = profile(options.folder, dtype, options.repeats)
            told = ", ".join(f"{k} {v:.2f}" for k, v in figures[dtype][step].items())
            print(f"{dtype}, first step {step}: {told}")
    record("breakdown", "warm", figures)


if __name__ == "__main__":
    main()
