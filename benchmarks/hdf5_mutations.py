"""What damaged HDF5 files do to the HDF5 library, and what reading them in isolation makes of it.

Mutates the real Keras files of tests/golden, mostly outside of their numbers, and has each mutant

- indexed in a sacrificial process that calls the format's ``read_index`` itself,
- walked by plain h5py in another, which visits every object, attribute and dataset, and
- indexed by `wavg.formats.isolated`, which must always give an index or a `CheckpointFormatError`.

A crash counts only if it also ends a new process. Between the mutants a good file is read by the
isolated process, which an earlier file must not have spoilt. Usage::

    python benchmarks/hdf5_mutations.py FOLDER [--count 6000] [--seed 0] [--recipes PATH]

Writes results/hdf5_mutations.json, and with --recipes the base and the edits of every mutant that
crashed h5py, and of a few that kept it busy, with as few edits as do it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from common import record

import wavg
from wavg.checkpoint import Index
from wavg.errors import CheckpointFormatError
from wavg.extents import complement
from wavg.formats import FORMATS, isolated, load_module

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
ENDINGS = (".h5", ".weights.h5", ".keras")
MODULES = {row.name: row.module for row in FORMATS if row.isolable}
CPU_SECONDS = 1  # a good file takes 0.01
EXCESS = 512 << 20  # bytes more than before that count as excessive
ROOM = 2 << 30  # bytes a sacrificial process may have more
GOOD_EVERY = 20
BUSY_RECIPES = 5
LONG_SECONDS = 10  # given once more to the first so many that took over CPU_SECONDS
LONG_COUNT = 20
INTERESTING = (0, 1, 2, 3, 7, 8, 16, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 1 << 20, 0x7FFFFFFF)

FELL = "isolated, where the index in-process crashed or went over time"
LONGER = f"of the first {LONG_COUNT} indexes over time, given {LONG_SECONDS} s"


class Mutant(NamedTuple):
    """A file's damage: bytes written over it, and where it is cut off."""

    base: str
    edits: tuple[tuple[int, str], ...]
    length: int | None = None

    def content(self) -> bytes:
        data = bytearray((GOLDEN / self.base).read_bytes())
        for offset, text in self.edits:
            new = bytes.fromhex(text)
            data[offset : offset + len(new)] = new
        return bytes(data[: self.length])


class Base:
    """A good file, and the places in it that are worth damaging."""

    def __init__(self, path: Path) -> None:
        self.name, self.path, self.data = path.name, path, path.read_bytes()
        with wavg.open_checkpoint(path) as checkpoint:
            self.index = checkpoint.index
        self.format = self.index.format
        self.ending = next(end for end in ENDINGS[::-1] if self.name.endswith(end))
        specs = (*self.index.tensors, *self.index.others)
        outside = complement(len(self.data), [spec.extent for spec in specs if spec.extent])
        self.places = [
            place
            for (_, offset, length), _ in outside
            for place in range(offset, offset + length)
            if any(self.data[max(0, place - 4) : place + 5])  # most of the rest is zeros
        ]
        texts = re.finditer(rb"[ -~]{40,}", self.data)  # configurations; harmless to change
        dull = {place for text in texts for place in range(*text.span())}
        self.places = [place for place in self.places if place not in dull] or self.places
        names = re.finditer(rb"(?:_names|keras_version|backend|\0name)\0", self.data)
        types = {place for name in names for place in range(name.start() - 28, name.end() + 48)}
        self.types = sorted(types) or self.places

    def mutant(self, rng: random.Random) -> Mutant:
        edits = [self._edit(rng) for _ in range(rng.choice((1, 1, 2, 3, 5, 8, 16, 32)))]
        length = rng.randrange(len(self.data)) if rng.random() < 0.03 else None
        return Mutant(self.name, tuple(edits), length)

    def _edit(self, rng: random.Random) -> tuple[int, str]:
        within = rng.choices((self.places, self.types, range(len(self.data))), (80, 15, 5))[0]
        place = rng.choice(within)
        kind = rng.choice(("flip", "byte", "integer", "integer", "address", "copy", "zeros"))
        if kind == "flip":
            new = bytes([self.data[place] ^ 1 << rng.randrange(8)])
        elif kind == "byte":
            new = rng.randbytes(1)
        elif kind == "copy":
            source = rng.choice(self.places)
            new = self.data[source : source + rng.choice((2, 4, 8, 16, 64, 256))]
        elif kind == "zeros":
            new = bytes(rng.choice((1, 2, 4, 8, 16)))
        else:
            width = rng.choice((1, 2, 4, 8))
            value = (
                rng.choice(INTERESTING) * rng.choice((1, -1))
                if kind == "integer"
                else rng.choice(self.places) & ~7
            )
            place = place & ~(width - 1)  # HDF5's fields are mostly aligned
            new = (value % (1 << 8 * width)).to_bytes(width, "little")
        return place, new[: len(self.data) - place].hex()


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
    """Return whether reading gave an index or a typed error, and its message."""
    try:
        index = reader.read_index(MODULES[kind], str(path))
    except CheckpointFormatError as error:
        return "error", str(error)
    except Exception as error:
        return f"untyped {type(error).__name__}", str(error)
    return ("accepted" if isinstance(index, Index) else "nonsense"), ""


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", type=Path, metavar="PATH")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    bases = [Base(path) for end in ENDINGS for path in sorted(GOLDEN.glob(f"*_1{end}"))]
    rng = random.Random(options.seed)
    plain = {name: Sacrifice() for name in ("index", "walk")}
    reader = isolated.Reader(isolated.Limits(cpu=CPU_SECONDS, wall=60))
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    recipes, spoilt, disagreeing = [], 0, []
    patient = Sacrifice(LONG_SECONDS)
    for number in range(options.count):
        base = bases[number % len(bases)]
        mutant = base.mutant(rng)
        path = options.folder / f"mutant{base.ending}"
        path.write_bytes(mutant.content())
        does = {"index": base.format, "walk": "walk"}
        outcomes = {name: run(does[name], path) for name, run in plain.items()}
        outcomes["isolated"], message = isolated_outcome(reader, base.format, path)
        for name, outcome in outcomes.items():
            counts[name][outcome] += 1
        fell = {name: plain_outcome(outcomes[name]) for name in plain}
        if any(fell.values()):
            print(f"{number}: {outcomes} {message[:100]}", flush=True)
            if fell["index"]:
                counts[FELL][outcomes["isolated"]] += 1
            longer = counts[LONGER]
            if fell["index"] == "over" and longer.total() < LONG_COUNT:
                longer[patient(base.format, path)] += 1
            name = "index" if fell["index"] else "walk"
            if fell["walk"] == "crash" and fell["index"] != "crash":
                name = "walk"

            def still(smaller: Mutant) -> bool:
                path.write_bytes(smaller.content())  # noqa: B023 - it is used up in this turn
                return plain_outcome(plain[name](does[name], path)) == fell[name]  # noqa: B023

            busy = sum(recipe["does"] == "over time" for recipe in recipes)
            if options.recipes and (fell[name] == "crash" or busy < BUSY_RECIPES):
                smallest = reduced(mutant, still)
                recipes.append({"by": name, "does": outcomes[name], **smallest._asdict()})
                options.recipes.write_text(json.dumps(recipes, indent=1) + "\n")
        elif outcomes["isolated"] != outcomes["index"]:
            disagreeing.append([number, outcomes, message.removeprefix(f"{path}: ")[:200]])
        if number % GOOD_EVERY == 0:
            spoilt += reader.read_index(MODULES[base.format], str(base.path)) != base.index
    for sacrifice in (*plain.values(), patient):
        sacrifice.close()
    reader.close()
    for end in ENDINGS:
        (options.folder / f"mutant{end}").unlink(missing_ok=True)
    import h5py

    figures = {
        "mutants": options.count,
        "seed": options.seed,
        "of": [base.name for base in bases],
        "hdf5": h5py.version.hdf5_version,
        "cpu_seconds": CPU_SECONDS,
        **{name: dict(counter.most_common()) for name, counter in counts.items()},
        "otherwise different in isolation": disagreeing,
        "good files read between": -(-options.count // GOOD_EVERY),
        "good files read wrongly": spoilt,
    }
    print(json.dumps(figures, indent=2))
    record("hdf5_mutations", "inputs in the page cache", figures)


def plain_outcome(outcome: str) -> str:
    """Return ``crash`` or ``over`` of a process that did so from the start, else nothing."""
    kind = outcome.split()[0]
    return kind if kind in ("crash", "over") and "after" not in outcome else ""


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--work"] else main()
