"""What it costs to look into HDF5 files in a process of their own: whole commands, in turns.

python benchmarks/isolation.py FOLDER [--repeats 15]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import make_run, median, read_all, record, run_process, side_by_side, spread

SHAPES = {f"layer_{i}/{name}": (16, 16) for i in range(10) for name in ("kernel", "recurrent")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    paths = make_run(options.folder / "small", "float32", SHAPES, suffix=".h5")
    read_all(paths)
    output = options.folder / "small.average.h5"
    wavg = [sys.executable, "-m", "wavg"]
    commands = {
        "inspect": [*wavg, "inspect", str(paths[0])],
        "average of ten": [*wavg, "average", *map(str, paths), "-o", str(output)],
    }
    figures = {}
    for name, command in commands.items():
        functions = {
            flag: lambda words=(*command, flag): run_process(words)
            for flag in ("--isolate", "--no-isolate")
        }
        times = side_by_side(functions, options.repeats, [output])
        costs = median(times["--isolate"]) - median(times["--no-isolate"])
        print(f"{name}: {', '.join(f'{f} {spread(t)}' for f, t in times.items())}")
        print(f"  isolation costs {costs:.3f} s")
        figures[name] = {"seconds": times, "costs_seconds": costs}
    record("isolation", "inputs in the page cache", figures)


if __name__ == "__main__":
    main()
