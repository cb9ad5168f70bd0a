"""What the benchmarks share: a Llama-shaped model, the copy limit, processes timed and measured."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np

import wavg
from wavg.dtypes import lookup
from wavg.kernel import COMPILED

RESULTS = Path(__file__).parent / "results"
READ = 1 << 20


def llama_shapes(width=1024, layers=8, vocabulary=16_000, hidden=2816) -> dict[str, tuple]:
    """Tensors of a Llama-shaped model, its head tied; the defaults have 74, of 119 M numbers."""
    shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (width, width)
        for name in ("gate", "up"):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = (hidden, width)
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, hidden)
        shapes[f"{prefix}input_layernorm.weight"] = (width,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (width,)
    return shapes | {"model.norm.weight": (width,)}


def make_run(
    folder: Path, dtype: str, shapes: dict, count: int = 10, suffix=".safetensors"
) -> list:
    """Save checkpoints as of one run: a common model, and noise a tenth its size; kept if there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"model_{step}{suffix}" for step in range(1, count + 1)]
    if all(path.exists() for path in paths):
        return paths
    rng = np.random.default_rng(0)
    base = {n: rng.standard_normal(s, np.float32) * np.float32(0.02) for n, s in shapes.items()}
    for path in paths:
        model = {
            name: (array + rng.standard_normal(array.shape, np.float32) * np.float32(0.002)).astype(
                lookup(dtype).numpy
            )
            for name, array in base.items()
        }
        wavg.save(path, model, overwrite=True)
    return paths


def copy_limit(paths: Sequence[Path], outputs: Sequence[Path], threads: int = 2) -> None:
    """Read every input and write outputs of the last one's size, with no arithmetic; fsync."""
    size = os.path.getsize(paths[-1])
    sources = [os.open(path, os.O_RDONLY) for path in paths]
    targets = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644) for path in outputs]
    for target in targets:
        os.ftruncate(target, size)

    def work(start: int) -> None:
        buffer = bytearray(READ)
        for offset in range(start, size, READ * threads):
            for source in sources:
                os.preadv(source, [buffer], offset)
            data = memoryview(buffer)[: min(READ, size - offset)]
            for target in targets:
                os.pwrite(target, data, offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(0, READ * threads, READ)))
    for target in targets:
        os.fsync(target)
    for descriptor in sources + targets:
        os.close(descriptor)


def time_once(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def side_by_side(
    functions: dict[str, Callable[[], object]],
    repeats: int,
    outputs: Sequence[Path],
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, list]:
    """Time functions in turns after one warm-up each, so that a slow minute hits all of them.

    The outputs are removed before each, so that all write new files: to free an old one's pages, or
    to write into them, is no part of the figure. Nor is what `before` does.
    """
    times: dict[str, list] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            for output in outputs:
                output.unlink(missing_ok=True)
            before(name)
            seconds = time_once(function)
            if turn:
                times[name].append(seconds)
    return times


_LAUNCHER = """
import os, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def run_process(arguments: Sequence[str]) -> tuple[float, int]:
    """Run a command; return seconds and the peak of its memory in bytes.

    A small launcher starts it: the peak that Linux reports of a process begins with its parent's.
    """
    command = [sys.executable, "-S", "-c", _LAUNCHER, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments} failed: {done.stderr}")
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak)


def read_all(paths: Sequence[Path]) -> None:
    """Read files one after the other: it brings them into the page cache."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(READ):
                pass


def drop_from_cache(paths: Sequence[Path]) -> None:
    """Have the page cache forget files, so that the next reading comes from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def spread(times: Sequence[float]) -> str:
    return f"{median(times):.2f} s ({min(times):.2f}–{max(times):.2f})"


def machine(cache: str) -> dict:
    """Return what a figure depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    packages = (
        "wavg",
        "numpy",
        "safetensors",
        "h5py",
        "ml_dtypes",
        "torch",
        "mergekit",
        "keras",
        "jax",
        "scikit-learn",
    )
    installed = {
        found.metadata["Name"].lower(): found.version for found in metadata.distributions()
    }
    versions = {package: installed.get(package) for package in packages}
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "versions": versions,
        "compiled_kernel": COMPILED,
        "page_cache": cache,
    }


def record(name: str, cache: str, figures: object, folder: Path = RESULTS) -> None:
    """Keep figures as JSON beside what they depend on, a list of numbers on one line."""
    folder.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(cache), "figures": figures}, indent=2)
    text = re.sub(r"\[[-\d.e,\s]+\]", lambda found: " ".join(found[0].split()), text)
    (folder / f"{name}.json").write_text(text + "\n")


def figures_of(name: str) -> dict:
    """Return the figures kept before."""
    figures: dict = json.loads((RESULTS / f"{name}.json").read_text())["figures"]
    return figures


def own_peak() -> int:
    """Return this process's peak memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
