"""Ten checkpoints of a Llama-shaped model into one, against the copy limit and against peers.

    python benchmarks/speed.py FOLDER [--dtype float32] [--repeats 5] [--peers]

FOLDER takes about 6 GB a dtype. The copy limit is the same reads and the same write without
arithmetic, two threads, fsync included; it and wavg run in turns in one process. With --peers each
method runs as a process of its own, start-up included: `wavg average`; the tutorial's way (load
all, `np.average` over the stack); timm's script's method (a float64 sum, one checkpoint at a time,
in torch); mergekit's linear merge. A peer that is not installed is skipped, and a line says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
from common import (
    copy_limit,
    llama_shapes,
    make_run,
    median,
    read_all,
    record,
    run_process,
    side_by_side,
    spread,
)

import wavg
from wavg.kernel import Combination, combine

TUTORIAL = """
    import sys, numpy as np, ml_dtypes
    from safetensors.numpy import load_file, save_file
    models = [load_file(path) for path in sys.argv[2:]]
    average = {}
    for name, first in models[0].items():
        stack = np.stack([model[name] for model in models])
        average[name] = np.average(stack, axis=0).astype(first.dtype)
    save_file(average, sys.argv[1])
"""

TIMM = """
    import sys, torch
    from safetensors.torch import load_file, save_file
    total = {}
    for path in sys.argv[2:]:
        for name, tensor in load_file(path).items():
            wide = tensor.to(torch.float64)
            total[name] = total[name] + wide if name in total else wide
    dtypes = {name: tensor.dtype for name, tensor in load_file(sys.argv[2]).items()}
    count = len(sys.argv) - 2
    save_file({n: (t / count).to(dtypes[n]) for n, t in total.items()}, sys.argv[1])
"""


def check(paths: list[Path], output: Path) -> None:
    """Compare a sample of the output with the kernel's exact arithmetic; figures come after."""
    result = wavg.load(output)
    name = "model.norm.weight"
    rows = []
    for path in paths:
        with wavg.open_checkpoint(path) as checkpoint:
            rows.append(np.asarray(checkpoint[name]))
    expected = np.empty((1, rows[0].size), rows[0].dtype)
    combine(Combination.of([1.0] * len(rows)), np.stack(rows), expected)
    if result[name].tobytes() != expected[0].tobytes():
        raise SystemExit("the output is wrong; no figure is reported")


def against_the_copy_limit(folder: Path, dtype: str, repeats: int) -> dict:
    paths = make_run(folder / dtype, dtype, llama_shapes())
    read_all(paths)
    output = folder / "average.safetensors"
    times = side_by_side(
        {
            "copy limit": lambda: copy_limit(paths, [folder / "copy.bin"]),
            "wavg": lambda: wavg.average_checkpoints(paths, output, overwrite=True),
        },
        repeats,
    )
    check(paths, output)
    ratio = median(times["wavg"]) / median(times["copy limit"])
    print(f"{dtype}: " + ", ".join(f"{k} {spread(v)}" for k, v in times.items()), end="")
    print(f"; {ratio:.2f} times the copy limit")
    return {"seconds": times, "ratio": ratio}


def peers(folder: Path, dtype: str, repeats: int) -> dict:
    paths = make_run(folder / dtype, dtype, llama_shapes())
    read_all(paths)
    output = folder / "peer.safetensors"
    names = [str(path) for path in paths]
    python = sys.executable
    commands = {
        "wavg": [python, "-m", "wavg", "average", *names, "-o", str(output), "--overwrite"],
        "tutorial": [python, "-c", textwrap.dedent(TUTORIAL), str(output), *names],
    }
    if importlib.util.find_spec("torch"):
        commands["timm's method"] = [python, "-c", textwrap.dedent(TIMM), str(output), *names]
    else:
        print("timm's method: skipped, torch is not installed")
    if shutil.which("mergekit-yaml") is None:
        print("mergekit: skipped, not installed")
    figures = {}
    for name, command in commands.items():
        try:
            runs = [run_process(command) for _ in range(repeats)]
        except (RuntimeError, subprocess.SubprocessError) as error:
            print(f"{name}: failed: {str(error)[-300:]}")
            continue
        seconds, peak = [run[0] for run in runs], max(run[1] for run in runs)
        figures[name] = {"seconds": seconds, "peak_bytes": peak}
        print(f"{dtype}: {name} {spread(seconds)}, {peak / 1e6:.0f} MB")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    dtypes = options.dtype or ["float32", "bfloat16", "float16"]
    figures = {d: against_the_copy_limit(options.folder, d, options.repeats) for d in dtypes}
    record("copy_limit", "warm", figures)
    if options.peers:
        record(
            "peers", "warm", {d: peers(options.folder, d, min(3, options.repeats)) for d in dtypes}
        )


if __name__ == "__main__":
    main()
