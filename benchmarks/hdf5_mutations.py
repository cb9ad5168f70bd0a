"""What damaged HDF5 files do to the HDF5 library, and what reading them in isolation makes of it.

Mutates the real Keras files of tests/golden, mostly outside of their numbers, the file of weights
and the texts in archives that are sound otherwise, and sharded weights. Each mutant is

- indexed by `wavg.formats.isolated`, and its numbers are read where that gave an index: always an
  index or a `CheckpointFormatError`, and numbers or that error.

Every nineteenth (`--plain-every`) is also

- indexed in a sacrificial process that calls the format's ``read_index`` itself, and
- walked by plain h5py in another, which visits every object, attribute and dataset.

A crash counts only if it also ends a new process. Between the mutants a good file is read by the
isolated process, which an earlier file must not have spoilt. Usage::

    python benchmarks/hdf5_mutations.py FOLDER [--count 80000] [--parts 30000] [--plain-every 19]
        [--seed 0] [--workers 2] [--recipes PATH] [--no-record]

Writes results/hdf5_mutations.json, and with --recipes the base and the edits of every mutant that
crashed h5py, and of a few that kept it busy, with as few edits as do it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common import record
from hdf5_mutants import Base, Mutant, parts, whole_files

from wavg.checkpoint import Checkpoint, Index
from wavg.errors import CheckpointFormatError
from wavg.formats import FORMATS, isolated, load_module

MODULES = {row.name: row.module for row in FORMATS if row.isolable}
CPU_SECONDS = 1  # for unprotected processes; a good file takes 0.01
HANG_SECONDS = 5  # isolated: users give six times that, and as much for one call of the library
CHUNK = 500
EXCESS = 512 << 20  # bytes more than before that count as excessive
ROOM = 2 << 30  # bytes a sacrificial process may have more
GOOD_EVERY = 20
BUSY_RECIPES = 1  # of a chunk
LONG_SECONDS = 5  # given once more to the first of a chunk that took over CPU_SECONDS
HDF5 = b"\x89HDF"

FELL = "isolated, where the index in-process crashed or went over time"
LONGER = f"of some indexes over time, given {LONG_SECONDS} s"


def walk(path: str) -> None:
    """Visit everything in a file, as a tool would that shows what it holds."""
    import h5py

    def visit(_: str, found: h5py.Group | h5py.Dataset) -> None:
        for key in found.attrs:
            with contextlib.suppress(Exception):
                found.attrs[key]
        if isinstance(found, h5py.Dataset):
            with contextlib.suppress(Exception):
                found.id.get_offset(), found.id.get_storage_size(), found.chunks, found.dtype
            with contextlib.suppress(Exception):
                if found.size < 1 << 20:
                    found[()]

    with h5py.File(path, "r", locking=False) as file:
        visit("", file)
        file.visititems(visit)


def work() -> None:
    """Be a sacrificial process: ``FORMAT SECONDS PATH`` or ``walk …`` in, an outcome out."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in MODULES:
        load_module(name)
    for line in sys.stdin:
        name, seconds, path = line.split()
        function = walk if name == "walk" else load_module(name).read_index
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak()
        signal.setitimer(signal.ITIMER_PROF, float(seconds))
        try:
            function(path)
            outcome = "accepted"
        except MemoryError:
            outcome = "excessive memory"
        except Exception as error:
            typed = isinstance(error, CheckpointFormatError) or name == "walk"
            outcome = "error" if typed else f"untyped {type(error).__name__}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("excessive memory" if peak() - before > EXCESS else outcome, flush=True)


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


class Sacrifice:
    """A process for `work`, replaced when it dies."""

    def __init__(self, seconds: float = CPU_SECONDS) -> None:
        self.seconds, self.process = seconds, None

    def __call__(self, what: str, path: Path) -> str:
        outcome, fresh = self._once(what, path)
        if fresh or not outcome.startswith("crash"):
            return outcome
        again, _ = self._once(what, path)
        return again if again.startswith("crash") else f"{outcome} after other files"

    def _once(self, what: str, path: Path) -> tuple[str, bool]:
        fresh = self.process is None
        if fresh:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--work"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        self.process.stdin.write(f"{what} {self.seconds} {path}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if answer:
            return answer, fresh
        with self.process as ended:
            self.process = None
        if ended.returncode >= 0:
            raise RuntimeError(f"a sacrificial process ended with {ended.returncode} on {path}")
        number = signal.Signals(-ended.returncode)
        return ("over time" if number == signal.SIGPROF else f"crash {number.name}"), fresh

    def close(self) -> None:
        if self.process is not None:
            with self.process:
                self.process.stdin.close()


def isolated_outcome(reader: isolated.Reader, kind: str, path: Path) -> tuple[str, str]:
    """Return whether reading gave an index and numbers, or a typed error, and its message."""
    try:
        index = reader.read_index(MODULES[kind], str(path))
        if not isinstance(index, Index):
            return "nonsense", ""
        if all(spec.extent is not None for spec in index.tensors):
            with Checkpoint(index) as checkpoint:
                for tensor in checkpoint.values():
                    tensor.read()
    except CheckpointFormatError as error:
        return "error", str(error)
    except Exception as error:
        return f"untyped {type(error).__name__}", str(error)
    return "accepted", ""


EXPECTED = ("accepted", "error")
ENDS = {
    "crashed": "the HDF5 library crashed",
    "did not come back": "the HDF5 library did not come back",
    "over time": "reading it took more than",
}


def end_of(message: str) -> str:
    """Return how the isolated process ended, if it did."""
    return next((name for name, text in ENDS.items() if text in message), "")


@dataclass
class Found:
    """What came of some mutants: plain data, which another process can be sent."""

    counts: dict[str, collections.Counter] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    disagreeing: list = field(default_factory=list)
    recipes: list[dict] = field(default_factory=list)
    good: int = 0
    spoilt: int = 0
    slowest: float = 0.0

    def add(self, other: Found) -> None:
        for name, counter in other.counts.items():
            self.counts[name] += counter
        self.disagreeing += other.disagreeing
        self.recipes += other.recipes
        self.good += other.good
        self.spoilt += other.spoilt
        self.slowest = max(self.slowest, other.slowest)


class Trial:
    """Mutants of some files, one after the other, and what came of them.

    Every `plain_every`-th is also given to unprotected processes.
    """

    def __init__(self, folder: Path, plain_every: int, recipes: bool) -> None:
        self.folder, self.plain_every, self.recipes = folder, plain_every, recipes
        self.plain = {name: Sacrifice() for name in ("index", "walk")}
        self.patient = Sacrifice(LONG_SECONDS)
        self.reader = isolated.Reader(isolated.Limits(cpu=HANG_SECONDS))
        self.found = Found()

    def close(self) -> None:
        for sacrifice in (*self.plain.values(), self.patient):
            sacrifice.close()
        self.reader.close()

    def one(self, number: int, base: Base, mutant: Mutant) -> None:
        """Try one mutant; now and then a good file after it."""
        path = mutant.write(self.folder)
        start = time.perf_counter()
        outcome, message = isolated_outcome(self.reader, base.format, path)
        found, counts = self.found, self.found.counts
        found.slowest = max(found.slowest, time.perf_counter() - start)
        counts["isolated"][outcome] += 1
        counts["of"][f"{base.name}: {base.part}" if base.part else base.name] += 1
        if end := end_of(message):
            counts["isolated processes that"][end] += 1
        if outcome not in EXPECTED or end == "over time":
            print(f"AGAINST THE RULES: {mutant} {outcome} {message}", flush=True)
        if number % self.plain_every == 0:
            self._unprotected(number, base, mutant, outcome, message)
        if number % GOOD_EVERY == 0:
            found.good += 1
            again = self.reader.read_index(MODULES[base.format], str(base.path))
            found.spoilt += again != base.index

    def _plainly(self, name: str, base: Base, mutant: Mutant) -> str:
        """Have a mutant indexed or walked by an unprotected process."""
        path = mutant.write(self.folder)
        if name == "walk":
            path = self.folder / "walked.h5"
            path.write_bytes(mutant.content())
        return self.plain[name]("walk" if name == "walk" else base.format, path)

    def _unprotected(
        self, number: int, base: Base, mutant: Mutant, outcome: str, message: str
    ) -> None:
        counts = self.found.counts
        names = ("index", "walk") if mutant.content().startswith(HDF5) else ("index",)
        outcomes = {name: self._plainly(name, base, mutant) for name in names}
        for name, each in outcomes.items():
            counts[name][each] += 1
        fell = {name: plain_outcome(outcomes[name]) for name in names}
        outcomes["isolated"] = outcome
        if not any(fell.values()):
            if outcome != outcomes["index"]:
                self.found.disagreeing.append([number, outcomes, message[-200:]])
            return
        print(f"{number}: {outcomes} {message[:100]}", flush=True)
        if fell["index"]:
            counts[FELL][outcome] += 1
        if fell["index"] == "over" and not counts[LONGER]:
            counts[LONGER][self.patient(base.format, mutant.write(self.folder))] += 1
        name = "index" if fell["index"] else "walk"
        if fell.get("walk") == "crash" and fell["index"] != "crash":
            name = "walk"

        def still(smaller: Mutant) -> bool:
            return plain_outcome(self._plainly(name, base, smaller)) == fell[name]

        recipes = self.found.recipes
        if self.recipes and (fell[name] == "crash" or len(recipes) < BUSY_RECIPES):
            smallest = reduced(mutant, still)
            recipes.append({"by": name, "does": outcomes[name], **smallest._asdict()})


def reduced(mutant: Mutant, still: Callable[[Mutant], bool]) -> Mutant:
    """Leave out edits as long as the mutant does what it did."""
    candidates: Iterator[Mutant] = iter([mutant._replace(length=None)])
    if mutant.length is not None and still(smaller := next(candidates)):
        mutant = smaller
    step = len(mutant.edits) // 2
    while step:
        start = 0
        while start < len(mutant.edits):
            edits = mutant.edits[:start] + mutant.edits[start + step :]
            if still(smaller := mutant._replace(edits=edits)):
                mutant = smaller
            else:
                start += step
        step //= 2
    return mutant


def chunk(folder: Path, part: str, seed: int, number: int, count: int, options: dict) -> Found:
    """Try so many mutants, of whole files or of parts, in a process of their own."""
    bases = whole_files() if part == "whole" else parts()
    rng = random.Random(f"{part} {seed} {number}")
    own = folder / f"{part}_{number}"
    own.mkdir(parents=True, exist_ok=True)
    trial = Trial(own, **options)
    for place in range(count):
        base = bases[(number * CHUNK + place) % len(bases)]
        trial.one(number * CHUNK + place, base, base.mutant(rng))
    trial.close()
    shutil.rmtree(own)
    return trial.found


def figures_of(part: str, options: argparse.Namespace) -> dict:
    """Try all mutants of one part, and return what came of them."""
    count = options.count if part == "whole" else options.parts
    sizes = [min(CHUNK, count - done) for done in range(0, count, CHUNK)]
    how = {"plain_every": options.plain_every, "recipes": options.recipes is not None}
    ask = functools.partial(chunk, options.folder, part, options.seed, options=how)
    total, start = Found(), time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        for found in pool.map(ask, range(len(sizes)), sizes):
            total.add(found)
            print(f"{part}: {total.counts['isolated'].total():,}", flush=True)
    if options.recipes:
        with open(options.recipes, "a") as file:
            file.write(json.dumps(total.recipes, indent=1) + "\n")
    return {
        "mutants": count,
        "seed": options.seed,
        **{name: dict(counter.most_common()) for name, counter in sorted(total.counts.items())},
        "otherwise different in isolation": total.disagreeing,
        "good files read between": total.good,
        "good files read wrongly": total.spoilt,
        "slowest_seconds": total.slowest,
        "seconds": time.perf_counter() - start,
        "workers": options.workers,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=80_000, help="mutants of whole files")
    parser.add_argument("--parts", type=int, default=20_000, help="mutants of parts")
    parser.add_argument("--plain-every", type=int, default=19, help="of them also unprotected")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--recipes", type=Path, metavar="PATH", help="of mutants that crash h5py")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    import h5py

    figures = {
        "hdf5": h5py.version.hdf5_version,
        "cpu_seconds": CPU_SECONDS,
        **{part: figures_of(part, options) for part in ("whole", "parts")},
    }
    print(json.dumps(figures, indent=2))
    if not options.no_record:
        record("hdf5_mutations", "inputs in the page cache", figures)
    wrong = 0
    for part in ("whole", "parts"):
        found = figures[part]
        wrong += found["good files read wrongly"]
        wrong += found.get("isolated processes that", {}).get("over time", 0)
        outcomes = found.get("isolated", {})
        wrong += sum(number for name, number in outcomes.items() if name not in EXPECTED)
    return int(wrong > 0)


def plain_outcome(outcome: str) -> str:
    """Return ``crash`` or ``over`` of a process that did so from the start, else nothing."""
    kind = outcome.split()[0]
    return kind if kind in ("crash", "over") and "after" not in outcome else ""


if __name__ == "__main__":
    sys.exit(work() if sys.argv[1:] == ["--work"] else main())
