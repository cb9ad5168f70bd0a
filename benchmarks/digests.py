"""What digests cost that are made in the pass that averages, beside a reading of their own.

Averages ten safetensors files to a new one: without digests, with ``record="sha256"``, and after
hashing the files first, as a person would with sha256sum. In turns, with the inputs in the page
cache, with the cache dropped, and once with a cache that is smaller than the inputs, by a memory
cgroup (needs root): there, what the disk gives is counted. Usage::

    python benchmarks/digests.py FOLDER [--repeats 5] [--cgroup /sys/fs/cgroup/memory]

Writes results/digests.json.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import (
    drop_from_cache,
    llama_shapes,
    make_run,
    read_all,
    record,
    side_by_side,
    spread,
)

import wavg

LITTLE = 512 << 20


def disk_bytes() -> int:
    """Return what this process has had read from disks so far."""
    return int(re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[1])


def digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cgroup", type=Path, metavar="FOLDER", help="of the memory controller")
    options = parser.parse_args()
    inputs = make_run(options.folder / "run", "float32", llama_shapes(vocabulary=4_000))
    size = sum(path.stat().st_size for path in inputs)
    output = options.folder / "average.safetensors"
    found: dict[str, list] = {}

    def average(kept: str) -> None:
        wavg.average_checkpoints(inputs, output, record=kept)

    def hashed_first() -> None:
        with ThreadPoolExecutor(2) as pool:
            found["before"] = list(pool.map(digest_of, inputs))
        average("inputs")

    ways = {
        "no digests": lambda: average("inputs"),
        "in the same pass": lambda: average("sha256"),
        "hashed first": hashed_first,
    }
    output.unlink(missing_ok=True)
    average("sha256")
    hashed_first_digests = [digest_of(path) for path in inputs]
    with wavg.open_checkpoint(output) as checkpoint:
        sources = wavg.Record.read(checkpoint.metadata).sources
    output.unlink()
    if [source.sha256 for source in sources] != hashed_first_digests:
        raise SystemExit("the digests are not those of the files")
    figures: dict[str, dict] = {"input_bytes": size}
    for state, prepare in (("warm", read_all), ("cold", drop_from_cache)):
        times = side_by_side(
            ways, options.repeats, [output], lambda name, prepare=prepare: prepare(inputs)
        )
        figures[state] = times
        for name, seconds in times.items():
            print(f"{state}: {name}: {spread(seconds)}", flush=True)
    if options.cgroup:
        figures["cache_bytes"] = LITTLE
        figures["disk_bytes"] = {}
        with little_memory(options.cgroup):
            for name, way in ways.items():
                output.unlink(missing_ok=True)
                drop_from_cache(inputs)
                before = disk_bytes()
                way()
                read = figures["disk_bytes"][name] = disk_bytes() - before
                print(f"{name}: the disk gave {read / size:.2f} times the inputs", flush=True)
    record("digests", "see the figures", figures)


@contextlib.contextmanager
def little_memory(controller: Path) -> Iterator[None]:
    """Have this process and its part of the page cache take little memory."""
    group = controller / "wavg-digests"
    group.mkdir(exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(str(LITTLE))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (controller / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


if __name__ == "__main__":
    main()
