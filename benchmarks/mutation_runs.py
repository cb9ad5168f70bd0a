"""How mutants are tried: with limits of time and memory, in workers, and what came of them counted.

Shared by safetensors_mutations.py and zip_mutations.py.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

ROOM = 256 << 20  # bytes a worker may have more than at its start
CHUNK = 2_000


class TimeUpError(BaseException):
    """A mutant took too long."""


def _time_up(*_: object) -> None:
    raise TimeUpError


def verdict(
    ask: Callable[[], T], seconds: float, refusals: type[Exception]
) -> tuple[T | None, str, float]:
    """Return wavg's answer, or none; why; and the time taken.

    `seconds` are of processor time. What is neither an answer nor one of its errors is a failure.
    """
    start = time.perf_counter()
    answer, why = None, ""
    signal.signal(signal.SIGPROF, _time_up)
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = ask()
    except refusals as error:
        why = str(error)
    except TimeUpError:
        why = "FAILED: over time"
    except BaseException as error:
        why = f"FAILED: {type(error).__name__} {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return answer, why, time.perf_counter() - start


class Tally:
    """Counts of outcomes, an example of each that matters, and the slowest."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.differences: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}
        self.wrong: list[str] = []
        self.slowest = 0.0
        self.grown = 0

    def differ(self, reason: str, content: bytes | None) -> None:
        self.differences[reason] += 1
        if content is None:  # no example
            return
        shown = content.decode("utf-8", "backslashreplace")
        if len(shown) < len(self.examples.get(reason, shown + "x")):
            self.examples[reason] = shown

    def fail(self, what: str, content: bytes) -> None:
        self.counts["against the rules"] += 1
        self.wrong.append(f"{what}: {content[:2000]!r}")

    def add(self, other: Tally) -> None:
        self.counts += other.counts
        self.kinds += other.kinds
        self.differences += other.differences
        for reason, shown in other.examples.items():
            if len(shown) < len(self.examples.get(reason, shown + "x")):
                self.examples[reason] = shown
        self.slowest = max(self.slowest, other.slowest)
        self.grown = max(self.grown, other.grown)


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


@contextlib.contextmanager
def watched(tally: Tally) -> Iterator[Path]:
    """Give a folder in memory; bound the time and the memory of what is done, and keep its peak."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limits[1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak()
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    try:
        with tempfile.TemporaryDirectory(dir=shared) as folder:
            yield Path(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    tally.grown = _peak() - before


def run(
    function: Callable[[int, int, int], Tally],
    seed: int,
    count: int,
    workers: int,
    reasons: Iterable[str] = (),
) -> dict:
    """Do so many in worker processes, in chunks; a worker that dies ends the run with an error.

    `reasons` are the known differences, in the order in which they are shown.
    """
    total, start = Tally(), time.perf_counter()
    sizes = [min(CHUNK, count - done) for done in range(0, count, CHUNK)]
    with ProcessPoolExecutor(workers) as pool:
        for tally in pool.map(function, [seed] * len(sizes), range(len(sizes)), sizes):
            total.add(tally)
            print(f"{sum(total.kinds.values()):,}", end="\r", file=sys.stderr, flush=True)
            for line in tally.wrong:
                print(f"AGAINST THE RULES: {line}", flush=True)
    return {
        "count": count,
        "seed": seed,
        **{name: total.counts[name] for name in sorted(total.counts)},
        "against the rules": total.counts["against the rules"],
        **({"kinds": dict(sorted(total.kinds.items()))} if total.kinds else {}),
        "differences": {
            name: {"count": total.differences[name], "example": total.examples.get(name, "")}
            for name in reasons
            if name in total.differences
        },
        "slowest_seconds": total.slowest,
        "memory_growth_bytes": total.grown,
        "seconds": time.perf_counter() - start,
        "workers": workers,
    }
