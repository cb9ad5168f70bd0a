"""Peak memory beyond ``import wavg``: of models from 100 MB to 60 GB, of 2 to 1,000 checkpoints.

    python benchmarks/memory.py FOLDER

Each case runs in a process of its own. The largest models are sparse files, all zeros, whose result
goes nowhere, so that they take no room; their every byte is read and averaged. Writes
results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import record

import wavg
from wavg import stream

MODELS = (100e6, 1e9, 10e9, 60e9)
COUNTS = (2, 10, 100, 1_000)


class Nowhere:
    """A sink that forgets (see `wavg.checkpoint.Sink`)."""

    def wants(self, name: str) -> bool:
        return True

    def joined(self, names: list) -> bool:
        return True

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        pass


def make_sparse(path: Path, size: int) -> None:
    """Write a safetensors file of so many bytes of float32 zeros that takes no room."""
    if path.exists():
        return
    rows = size // (8 * 4096 * 4)
    step = rows * 4096 * 4
    header = {
        f"layer.{index}": {
            "dtype": "F32",
            "shape": [rows, 4096],
            "data_offsets": [index * step, (index + 1) * step],
        }
        for index in range(8)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 8 * step)


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def probe(pattern: str) -> None:
    """Average in this process; print what it took."""
    before = status("VmRSS")
    plan = wavg.plan_average(pattern)
    paths = [part.path for part in plan.inputs]
    started = time.perf_counter()
    if os.path.getsize(paths[0]) < 2e9:
        output = os.path.dirname(pattern) + "/average.safetensors"
        wavg.average_checkpoints(pattern, output, overwrite=True)
        os.unlink(output)
    else:
        checkpoints = [wavg.open_checkpoint(path) for path in paths]
        stream.run([plan], checkpoints, [Nowhere()])
    print(
        json.dumps(
            {
                "checkpoints": len(paths),
                "bytes_each": os.path.getsize(paths[0]),
                "seconds": time.perf_counter() - started,
                "measured": status("VmHWM") - before,
                "projected": plan.projected_memory,
                "block": plan.block,
                "workers": plan.workers,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        probe(options.probe)
        return
    cases = [(count, 8_000_000) for count in COUNTS] + [(2, int(size)) for size in MODELS]
    figures = []
    for count, size in cases:
        folder = options.folder / f"memory_{count}_{size}"
        folder.mkdir(parents=True, exist_ok=True)
        for step in range(count):
            make_sparse(folder / f"model_{step}.safetensors", size)
        command = [sys.executable, __file__, str(folder), "--probe", f"{folder}/model_*"]
        figures.append(json.loads(subprocess.check_output(command)))
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        row = figures[-1]
        print(
            f"{count} models of {size / 1e9:g} GB: {row['measured'] / 2**20:.0f} MiB measured, "
            f"{row['projected'] / 2**20:.0f} MiB projected, {row['seconds']:.1f} s"
        )
    record("memory", "sparse files, of which nothing is on the disk", figures)


if __name__ == "__main__":
    main()
