"""Flip single bits of averaged files and of their inputs, and see whether `wavg verify` tells.

    python benchmarks/bit_flips.py FOLDER [--flips 10000] [--seed 0]

In a folder, three small checkpoints of several dtypes are averaged, with their digests in the
record. One bit at a time is flipped: half of the times in the numbers of the output, half of the
times anywhere in an input. A full verification must tell a fault each time (or refuse an input
whose header was hit), and none when the bit is back. Writes results/bit_flips.json; exit code 1 if
a flip went unseen.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from common import record

import wavg


def make(folder: Path) -> tuple[list[Path], Path]:
    rng = np.random.default_rng(0)
    inputs = [folder / f"model_{step}.safetensors" for step in (1, 2, 3)]
    for path in inputs:
        tensors = {
            "w": rng.standard_normal((50, 60)).astype(np.float32),
            "h": rng.standard_normal(300).astype(np.float16),
            "b": rng.standard_normal(300).astype(ml_dtypes.bfloat16),
            "d": rng.standard_normal(100),
            "steps": np.arange(20),
        }
        wavg.save(path, tensors, overwrite=True)
    output = folder / "average.safetensors"
    wavg.average_checkpoints(
        inputs, output, weights="exponential:alpha=2", record="sha256", overwrite=True
    )
    return inputs, output


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def told(output: Path, inputs: list[Path]) -> str:
    try:
        faults = wavg.verify(output, inputs, full=True).faults
    except wavg.WavgError:
        return "refused"
    return "told" if faults else "unseen"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    inputs, output = make(options.folder)
    payload = 8 + int.from_bytes(output.read_bytes()[:8], "little")
    figures = {
        where: {"flips": 0, "told": 0, "refused": 0, "unseen": 0} for where in ("output", "inputs")
    }
    for number in range(options.flips):
        where = ("output", "inputs")[number % 2]
        path = output if where == "output" else rng.choice(inputs)
        first = payload if where == "output" else 0
        place, bit = rng.randrange(first, path.stat().st_size), rng.randrange(8)
        flip(path, place, bit)
        figures[where]["flips"] += 1
        figures[where][told(output, inputs)] += 1
        flip(path, place, bit)
    assert told(output, inputs) == "unseen", "nothing is flipped any more"
    print(figures)
    if not options.no_record:
        record("bit_flips", "warm", figures)
    return int(any(row["unseen"] for row in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
