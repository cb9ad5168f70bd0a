"""Kill a run, and look at what stands under the output's name: the old one whole or the new one.

    python benchmarks/kills.py FOLDER [--moments 1000] [--boundaries] [--interrupts 200]

Each run, of a few milliseconds, averages two small checkpoints over an existing output in a fresh
copy of this process. ``--moments``: SIGKILL after a random time of up to a little more than a run
takes. ``--boundaries``: SIGKILL as the run enters its k-th system call, and as it leaves it, for
every k (ptrace, all threads counted together; x86-64 Linux). Beside the output lie files of others
and the temporary of a run that lives. After every kill all of that is compared, byte by byte; every
tenth time a run that nobody kills has to succeed and to leave nothing but the new output.
``--interrupts``: the command gets SIGINT and SIGTERM, which it answers, at random moments. Writes
kills_moments.json, kills_boundaries.json and kills_interrupts.json to results; exit code 1 if
anything was bad.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a copy of a process has only the thread that made it

from common import record
from small_runs import DONE, INTERRUPTED, KINDS, Small, ended, recorded
from tracing import Tracer, unavailable

from wavg import cli
from wavg.publish import AtomicFile
from wavg.publish_folder import AtomicFolder

CHECK_EVERY = 10


class Tally:
    """What came of the kills of one format."""

    def __init__(self, small: Small) -> None:
        self.small = small
        self.counts: collections.Counter[str] = collections.Counter()
        self.bad: list[str] = []

    def look(self, where: str) -> None:
        """Look at what a killed run left, every so often let one end, and begin again."""
        small, counts = self.small, self.counts
        state, strays = small.state()
        counts[state.partition(":")[0]] += 1
        counts["left temporaries"] += strays > 0
        if state.startswith("bad"):
            self.bad.append(f"{where}: {state}")
        if counts["kills"] % CHECK_EVERY == 0 or state == "unnamed":
            outcome = ended(small.begin())
            after = outcome, *small.state()
            counts["runs after"] += 1
            counts["temporaries reclaimed"] += strays - after[2]
            good = [("done", "new", 0)]
            if not small.replaces and state == "new":  # complete, and so refused
                good = [("typed error", "new", strays)]
            if after not in good:
                self.bad.append(f"{where}: the run after: {after}")
            small.restore()
        elif state == "new":
            self._only_new_goes()

    def _only_new_goes(self) -> None:
        small = self.small
        keep = {n: (small.out / n) for n in os.listdir(small.out) if small._is_stray(n)}
        aside = small.root / "aside"
        aside.mkdir(exist_ok=True)
        for name, path in keep.items():
            if name not in small.theirs:
                path.rename(aside / name)
        small.restore()
        for name in os.listdir(aside):
            (aside / name).rename(small.out / name)

    def figures(self) -> dict:
        return {**dict(sorted(self.counts.items())), "bad": len(self.bad), "examples": self.bad[:5]}


def duration(small: Small) -> float:
    times = []
    for _ in range(9):
        start = time.perf_counter()
        outcome = ended(small.begin())
        times.append(time.perf_counter() - start)
        assert outcome == "done", outcome
        small.restore()
    return statistics.median(times)


def at_random_moments(small: Small, count: int, rng: random.Random) -> dict:
    tally, length = Tally(small), duration(small)
    while tally.counts["kills"] < count:
        child = small.begin()
        time.sleep(rng.uniform(0, 1.05 * length))
        os.kill(child, signal.SIGKILL)
        fate = ended(child)
        if fate == "killed by SIGKILL":
            tally.counts["kills"] += 1
        else:
            tally.counts["were done before"] += 1
            assert fate == "done", fate
        tally.look(f"moment {tally.counts['kills']}")
    return {"run_seconds": length, **tally.figures()}


def at_every_boundary(small: Small, step: int) -> dict:
    tally, stop, calls = Tally(small), 0, 0
    while True:
        with Tracer(small.begin) as traced:
            reached = traced.kill_at(stop)
        if not reached:
            break
        tally.counts["kills"] += 1
        calls = max(calls, traced.calls)
        tally.look(f"boundary {stop}, {traced.last}")
        stop += step
    return {"system_calls": calls, **tally.figures()}


def command(small: Small) -> None:
    """Do what a run does as the command does it, which ends on a signal after clearing away."""
    words = ["average", *small.inputs, "-o", small.target, "--overwrite", "--quiet", "--no-isolate"]
    own = [f"--{name.replace('_', '-')}={value}" for name, value in small.kind.options.items()]
    code = cli.main([*words, *own, "--workers=2"])
    if code not in (0, 130, 143):
        raise RuntimeError(f"the command ended with {code}")
    os._exit(INTERRUPTED if code else DONE)


def interrupted(small: Small, count: int, rng: random.Random) -> dict:
    """Send signals that the command may answer; it must have cleared away when it ends."""
    small.run = lambda: command(small)  # type: ignore[method-assign]
    counts: collections.Counter[str] = collections.Counter()
    bad, length = [], duration(small)
    for turn in range(count):
        number = (signal.SIGINT, signal.SIGTERM)[turn % 2]
        child = small.begin(lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        time.sleep(rng.uniform(0, 1.05 * length))
        os.kill(child, number)
        fate = ended(child)
        state, strays = small.state()
        parsing = "KeyboardInterrupt", "AttributeError: '_Store"  # what argparse makes of it
        cleared = fate == "untyped error" and state == "old" and not strays
        if cleared and not small.message():
            fate = "killed by it before the command had begun"  # else there would be a message
        elif cleared and small.message().startswith(parsing):
            fate = "killed by it while reading its arguments"
        elif cleared and "Error" in small.message().partition(":")[0]:
            fate = "interrupted, another error"  # what h5py makes of it within its own code
        counts[f"{fate}, {state}"] += 1
        counts["left temporaries"] += strays > 0
        if not fate.startswith(("done", "interrupted")) and not fate.startswith("killed by"):
            bad.append(f"{number.name}: {fate}, {state}, {small.message()}")
        if state.startswith("bad"):
            bad.append(f"{number.name}: {state}")
        small.restore()
    return {"signals": count, **dict(sorted(counts.items())), "bad": len(bad), "examples": bad[:5]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=0, metavar="N")
    parser.add_argument("--boundaries", action="store_true")
    parser.add_argument("--interrupts", type=int, default=0, metavar="N")
    parser.add_argument("--step", type=int, default=1, help="only every so many boundaries")
    parser.add_argument("--formats", default="", help="names, separated by commas; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="only print")
    options = parser.parse_args()
    if options.boundaries and (why := unavailable()):
        sys.exit(f"--boundaries: {why}")
    wanted = [name for name in options.formats.split(",") if name]
    rng = random.Random(options.seed)
    modes = ("moments", "boundaries", "interrupts")
    figures = {name: recorded(f"kills_{name}", wanted) for name in modes}
    bad = 0
    for kind in KINDS:
        if wanted and kind.name not in wanted:
            continue
        small = Small(kind, options.folder / "kills")
        atomic = AtomicFolder if kind.folder else AtomicFile
        with atomic(str(small.output), overwrite=small.replaces) as living:
            small.theirs = {os.path.basename(living.temporary)}
            if kind.folder:
                living.file("begun").write(b"theirs", 0)
            if options.moments:
                figures["moments"][kind.name] = at_random_moments(small, options.moments, rng)
            if options.boundaries:
                figures["boundaries"][kind.name] = at_every_boundary(small, options.step)
            if options.interrupts:
                figures["interrupts"][kind.name] = interrupted(small, options.interrupts, rng)
        for name, found in figures.items():
            if getattr(options, name):
                print(f"{kind.name}, {name}: {found[kind.name]}", flush=True)
                bad += found[kind.name]["bad"]
                if not options.no_record:
                    record(f"kills_{name}", "inputs in the page cache", found)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
