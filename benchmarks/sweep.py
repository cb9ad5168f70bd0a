"""What a sweep reads, how long it takes and what memory, beside an average for each n.

    python benchmarks/sweep.py FOLDER [--repeats 3]

FOLDER takes about 1.2 GB. Forty checkpoints of 29 MB, three schedules, and evaluators that do
nothing, so that the figures are of making the averages alone. The other way makes the same
averages: `load` for each checkpoint, and for each n one pass of `average_checkpoints` that makes
all three. Each case runs in a process of its own. Writes results/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common import llama_shapes, make_run, median, read_all, record

import wavg

COUNT = 40
SCHEDULES = ["equal", "linear", "exponential:alpha=2"]


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def in_process(paths: list[str]) -> wavg.Sweep:
    return wavg.sweep(paths, lambda model: 0.0, maximize=True, weights=SCHEDULES)


def by_command(paths: list[str]) -> wavg.Sweep:
    return wavg.sweep(paths, evaluate_command="echo 0 {}", maximize=True, weights=SCHEDULES)


def one_by_one(paths: list[str]) -> int:
    """Make every average by a pass of its own; return the bytes read."""
    read = 0
    for n in range(1, len(paths) + 1):
        wavg.load(paths[-n])
        read += os.path.getsize(paths[-n])
        wavg.average_checkpoints(paths[-n:], weights=SCHEDULES)
        read += wavg.plan_average(paths[-n:]).bytes_read
    return read


CASES = {
    "a pass for each n": one_by_one,
    "sweep, in process": in_process,
    "sweep, by a command": by_command,
}


def probe(name: str, folder: Path) -> None:
    """Run a case in this process; print what it took."""
    paths = [str(folder / f"model_{step}.safetensors") for step in range(1, COUNT + 1)]
    before = status("VmRSS")
    begun, busy = time.perf_counter(), time.process_time()
    found = CASES[name](paths)
    figures = {
        "seconds": time.perf_counter() - begun,
        "processor": time.process_time() - busy,
        "memory": status("VmHWM") - before,
    }
    if isinstance(found, wavg.Sweep):
        figures |= {"bytes_read": found.bytes_read, "passes": found.passes, "sums": found.sums}
    else:
        figures["bytes_read"] = found
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        probe(options.probe, options.folder)
        return
    shapes = llama_shapes(256, 4, hidden=704)
    paths = make_run(options.folder, "float32", shapes, COUNT)
    read_all(paths)
    runs: dict[str, list] = {name: [] for name in CASES}
    for turn in range(options.repeats + 1):
        for name in CASES:
            command = [sys.executable, __file__, str(options.folder), "--probe", name]
            found = json.loads(subprocess.check_output(command))
            if turn:
                runs[name].append(found)
    size = os.path.getsize(paths[0])
    figures = {
        "model_bytes": size,
        "checkpoints": COUNT,
        "schedules": SCHEDULES,
        "cases": {
            name: {
                **found[0],
                "seconds": [run["seconds"] for run in found],
                "processor": [run["processor"] for run in found],
                "memory": max(run["memory"] for run in found),
            }
            for name, found in runs.items()
        },
    }
    for name, row in figures["cases"].items():
        print(
            f"{name}: {median(row['seconds']):.1f} s, "
            f"{median(row['processor']):.1f} s of processor time, "
            f"{row['bytes_read'] / size:.1f} models read, "
            f"{row['memory'] / size:.1f} models of memory"
        )
    record("sweep", "warm", figures)


if __name__ == "__main__":
    main()
