"""Several runs to one output at the same time: one wins whole, and the others are told or replaced.

    python benchmarks/concurrent_runs.py FOLDER [--rounds 100] [--runs 6] [--kill 3]

Each run is a process that averages the same two small checkpoints with weights of its own, so that
what stands there in the end tells whose it is. In half of the rounds all begin at once, else each
at a random moment of the time that one takes. Over an existing output, with ``overwrite``, all have
to succeed; where there is none, one has to, and the others get `OutputExistsError`. In every third
round (``--kill``) one of them gets SIGKILL at a random moment: what it leaves the runs of the next
round find, all at once. What stands under the output's name after a round is compared byte by byte
with what each run makes alone; so are files of others beside it. Writes concurrent.json to results;
exit code 1 if anything else happened.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a copy of a process has only the thread that made it

from common import record
from small_runs import KINDS, Small, ended, is_typed, recorded

import wavg

DONE, EXISTS, TYPED, UNTYPED, WARNED = range(5)
ENDS = {"done": DONE, **{f"exit code {code}": code for code in range(1, 5)}}


class Contest:
    """Rounds of runs to one output, with or without the word to replace it."""

    def __init__(self, small: Small, runs: int, overwrite: bool) -> None:
        self.small, self.overwrite = small, overwrite
        self.counts: collections.Counter[str] = collections.Counter()
        self.bad: list[str] = []
        self.alone = [self._alone(number) for number in range(runs)]  # what each makes
        self._clear()

    def _average(self, number: int, overwrite: bool) -> None:
        small = self.small
        options = {**small.options, "weights": [number + 1, 1], "workers": 1}
        wavg.average_checkpoints(small.inputs, small.target, overwrite=overwrite, **options)

    def _alone(self, number: int) -> dict[str, bytes]:
        self._clear()
        self._average(number, overwrite=True)
        return self._standing()[0]

    def _clear(self) -> None:
        """Put back what stood there before a round; leave temporaries to the next one's runs."""
        small = self.small
        names = {name.partition("/")[0] for name in (*small.old, *small.new)}
        for name in os.listdir(small.out):
            path = small.out / name
            if name in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.overwrite:
            for name, data in small.old.items():
                (small.out / name).parent.mkdir(exist_ok=True)
                (small.out / name).write_bytes(data)

    def _standing(self) -> tuple[dict[str, bytes], int]:
        """Return what stands there but for files of others and temporaries, and how many of these.

        What of others is missing, or another, counts as standing there.
        """
        small, rest, strays = self.small, self.small.content(), set()
        for name, data in small.foreign.items():
            if rest.pop(name, None) != data:
                rest[f"{name} of others"] = b""
        for name in list(rest):
            if small._is_stray(name.partition("/")[0]):
                strays.add(name.partition("/")[0])
                del rest[name]
        return rest, len(strays)

    def _begin(self, number: int, delay: float) -> int:
        child = os.fork()
        if child:
            return child
        code = UNTYPED
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            time.sleep(delay)
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                try:
                    self._average(number, self.overwrite)
                    code = WARNED if warned else DONE
                except wavg.OutputExistsError:
                    code = EXISTS
                except BaseException as error:
                    code = TYPED if is_typed(error) else UNTYPED
                    print(error, file=sys.__stdout__, flush=True)
        finally:
            os._exit(code)

    def round(self, rng: random.Random, duration: float, kill: bool) -> None:
        """Have all runs go at once, and look at how they ended and at what stands there."""
        length = duration * rng.choice((0, 1))  # all at once, or one after the other
        delays = [rng.uniform(0, length) for _ in self.alone]
        children = [self._begin(number, delay) for number, delay in enumerate(delays)]
        if kill:
            time.sleep(rng.uniform(0, 2 * duration))
            os.kill(children[0], signal.SIGKILL)
        fates = [ended(child) for child in children]
        codes = [ENDS.get(fate, fate) for fate in fates]
        self.counts["rounds"] += 1
        self.counts["runs"] += len(codes)
        self.counts["won or replaced"] += codes.count(DONE)
        self.counts["refused: it exists"] += codes.count(EXISTS)
        self.counts["killed"] += codes.count("killed by SIGKILL")
        rest, strays = self._standing()
        if wrong := self._wrong(codes, rest, strays, kill):
            self.bad.append(f"round {self.counts['rounds']}: {wrong}; the runs ended {fates}")
        self._clear()

    def _wrong(self, codes: list, rest: dict, strays: int, kill: bool) -> str:
        dead = codes[0] == "killed by SIGKILL"
        may = [content for code, content in zip(codes, self.alone, strict=True)
               if code in (DONE, "killed by SIGKILL")]  # fmt: skip
        if dead and codes.count(DONE) == 0:
            may.append(self.small.old if self.overwrite else {})
        if rest not in may and not (dead and self._unnamed(rest)):
            return f"{sorted(rest)} is not whole one of theirs"
        allowed = {DONE} if self.overwrite and self.small.replaces else {DONE, EXISTS}
        if set(codes[dead:]) - allowed:
            return "an end that should not be"
        if EXISTS in allowed and codes.count(DONE) + dead < 1:
            return "no winner"
        if EXISTS in allowed and codes.count(DONE) > 1:
            return "several winners"
        return f"{strays} temporaries left" if strays and not dead else ""

    def _unnamed(self, rest: dict) -> bool:
        return not self.small.replaces and rest.items() <= self.alone[0].items()

    def finish(self) -> dict:
        """Let one more run go alone, which has to leave nothing but its output."""
        self._average(0, overwrite=True)
        if self._standing() != (self.alone[0], 0):
            self.bad.append("the run after all: something else is left")
        return {**self.counts, "anything else": len(self.bad), "examples": self.bad[:5]}


def measured(contest: Contest) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert ended(contest._begin(0, 0)) == "done"
        times.append(time.perf_counter() - start)
        contest._clear()
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the runs may work; emptied")
    parser.add_argument("--rounds", type=int, default=100, help="of each format and mode")
    parser.add_argument("--runs", type=int, default=6, help="at a time")
    parser.add_argument("--kill", type=int, default=3, help="in every n-th round; 0: never")
    parser.add_argument("--formats", type=lambda text: text.split(","), default=[])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="print, do not keep")
    options = parser.parse_args()
    figures = recorded("concurrent", options.formats)
    for kind in KINDS:
        if options.formats and kind.name not in options.formats:
            continue
        figures[kind.name] = {}
        for overwrite in (False, True):
            rng = random.Random(options.seed)
            contest = Contest(Small(kind, options.folder / "runs"), options.runs, overwrite)
            length = measured(contest)
            for number in range(1, options.rounds + 1):
                contest.round(rng, length, bool(options.kill) and number % options.kill == 0)
            found = figures[kind.name]["overwrite" if overwrite else "new"] = contest.finish()
            print(kind.name, "overwrite" if overwrite else "new", found, flush=True)
    shutil.rmtree(options.folder / "runs", ignore_errors=True)
    if not options.no_record:
        record("concurrent", "small files in memory", figures)
    return any(f["anything else"] for modes in figures.values() for f in modes.values())


if __name__ == "__main__":
    sys.exit(main())
