"""Take the power away from a run after each of its calls, and look at all that may be left.

    python benchmarks/power_loss.py FOLDER [--formats NAME,...]

Small runs of every format, over an existing output and where there is none, with syncs while they
write, interrupted when the output has just appeared, and after a killed run, are followed from
system call to system call (ptrace; x86-64 Linux), and what they do to the output's folder is
recorded. A model of a disk does the same; after each call it yields what a loss of power may leave,
and under the output's name there must be the old one whole or the new one whole, byte for byte and
with its mode; once the run has returned, the new one. Files of others must be as they were. What is
left in some of these states is laid out and averaged into anew, which must set things right.

Then mistakes are planted in wavg, such as a sync left out, and each has to be found. Writes
power_loss.json to results; exit code 1 if anything was bad, or a mistake was not found.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a copy of a process has only the thread that made it

from common import record
from durable import Disk, File, Version, crashes
from planted import interrupted, planted, unsettled, written_behind
from recorded_calls import Recorder, standing
from small_runs import DONE, KINDS, Small, ended, recorded
from tracing import unavailable

OVER, BEHIND, STOPPED = "over an old one", "with syncs meanwhile", "interrupted as it appears"
WHERE_NONE, KILLED = "where there was none", "after one that was killed"
EXPECTED = ("KeyboardInterrupt", "OutputExistsError")  # that killed one had done all but the end


class Judge:
    """Says what stands in a state of the disk."""

    def __init__(self, small: Small, disk: Disk, before: Mapping[str, File]) -> None:
        self._small, self._disk = small, disk
        self._old = {path: file for path, file in before.items() if path not in small.foreign}
        os.umask(mask := os.umask(0))
        self._new = {path: File(data, 0o666 & ~mask) for path, data in small.new.items()}
        if small.kind.folder:
            self._new[f"{small.name}/"] = File(b"", 0o777 & ~mask)
        self._foreign = {path: Version(path, ()) for path in small.foreign}
        self._alike: dict[tuple[Version, str, bool], bool] = {}

    def verdict(self, seen: Mapping[str, Version]) -> str:
        """Return ``old``, ``new``, ``unnamed`` (whole shards alone), or what is bad."""
        small = self._small
        rest = dict(seen)
        for path, version in self._foreign.items():
            if rest.pop(path, None) != version:
                return "bad: the files of others"
        strays = [path for path in rest if small._is_stray(path.partition("/")[0])]
        left = {rest.pop(path).node for path in strays}
        if self._is(rest, new=False):
            return "old"
        if self._is(rest, new=True):
            return "new"
        whole = not small.replaces and all(self._same(path, new=True, seen=rest) for path in rest)
        if whole and small.name not in rest:
            named = all(version.node in left for version in rest.values())
            return "unnamed" if named else "bad: a shard that no run removes"
        return f"bad: neither, {', '.join(sorted(rest)) or 'nothing'}"

    def _is(self, seen: Mapping[str, Version], *, new: bool) -> bool:
        expected = self._new if new else self._old
        return seen.keys() == expected.keys() and all(
            self._same(path, new=new, seen=seen) for path in seen
        )

    def _same(self, path: str, *, new: bool, seen: Mapping[str, Version]) -> bool:
        key = seen[path], path, new
        if key not in self._alike:
            expected = (self._new if new else self._old).get(path)
            self._alike[key] = self._disk.file(seen[path]) == expected
        return self._alike[key]


def _is_file(path: str) -> bool:
    return not path.endswith("/")


def lost(
    small: Small,
    rng: random.Random,
    plant: Callable[[], object] = lambda: None,
    runs_after: int = 0,
    killed: int = 0,
) -> dict:
    """Record a run, and judge all that a loss of power may leave of it.

    A run before it may have been `killed` when it had given, exchanged or removed so many names.
    """

    def begin(follow: Callable[[], object]) -> int:
        def before() -> None:
            sys.dont_write_bytecode = True  # a run is to write nothing but its output
            plant()
            follow()

        return small.begin(before)

    standing_before = standing(small.out)
    earlier = None
    if killed:
        with Recorder(begin, small.out, small.told) as earlier:
            earlier.record(killed)
    with Recorder(begin, small.out, small.told, earlier) as recorder:
        done = os.waitstatus_to_exitcode(recorder.record()) == DONE
    assert done or small.message().startswith(EXPECTED), small.message()
    disk = Disk(standing_before)
    judge = Judge(small, disk, standing_before)
    states: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    bad: list[str] = []
    distinct: dict[tuple, tuple[dict[str, Version], str]] = {}
    for number, effect in enumerate((None, *recorder.effects)):
        if effect is not None:
            disk.apply(effect)
        if earlier is not None and number < len(earlier.effects):
            continue  # a kill alone loses nothing
        returned = done and recorder.returned is not None and number >= recorder.returned
        for kind, kept in crashes(disk.pending, rng):
            seen = disk.seen(kept)
            states[kind] += 1
            key = returned, *sorted(seen.items())
            if key in distinct:
                continue
            verdict = judge.verdict(seen)
            if returned and verdict != "new":
                verdict = f"bad: after the return, {verdict}"
            distinct[key] = seen, verdict
            counts[verdict.partition(":")[0]] += 1
            counts["after the return"] += returned
            if verdict.startswith("bad"):
                bad.append(f"{kind} after {effect!s:.120}: {verdict}")
    assert {path: disk.file(version) for path, version in disk.seen().items()} == standing(
        small.out
    )  # nothing was missed
    small.restore()
    found = {"calls": recorder.calls, "effects": len(recorder.effects), "names": recorder.names()}
    found |= {"states": states.total()}
    found |= {"distinct": len(distinct), **dict(sorted(counts.items()))}
    left = [seen for seen, verdict in distinct.values() if small.replaces or verdict != "new"]
    for seen in rng.sample(left, min(len(left), runs_after)):
        if after := run_after(small, {path: (v, disk.file(v)) for path, v in seen.items()}):
            bad.append(after)
        found["runs after"] = found.get("runs after", 0) + 1
    return {**found, "kinds": dict(states), "bad": len(bad), "examples": bad[:5]}


def lost_after_kills(
    small: Small,
    rng: random.Random,
    names: int,
    runs_after: int,
    plant: Callable[[], object] = lambda: None,
) -> dict:
    """Do so for a run after one that was killed, at each of so many names; return the sums."""
    sums: collections.Counter[str] = collections.Counter()
    examples: list[str] = []
    for killed in range(1, names + 1):
        found = lost(small, rng, plant, runs_after // names, killed)
        examples += found.pop("examples")
        found.pop("kinds")
        sums.update(found)
    return {"kills": names, **sums, "examples": examples[:5]}


def run_after(small: Small, seen: Mapping[str, tuple[Version, File]]) -> str:
    """Have a run begin with what a loss of power left; return what is bad about its end."""
    shutil.rmtree(small.out)
    small.out.mkdir()
    first: dict[str, Path] = {}
    for path, (version, file) in sorted(seen.items()):
        place = small.out / path
        if not _is_file(path):
            place.mkdir()
        elif version.node in first:
            os.link(first[version.node], place)
        else:
            place.write_bytes(file.data)
            first[version.node] = place
    for path, (_, file) in sorted(seen.items(), reverse=True):
        os.chmod(small.out / path, file.mode)
    overwrite, small.overwrite = small.overwrite, True
    outcome = ended(small.begin()), *small.state()
    small.overwrite = overwrite
    small.restore()
    return "" if outcome == ("done", "new", 0) else f"the run after {sorted(seen)}: {outcome}"


def measured(
    small: Small, rng: random.Random, after: int, *, quick: bool
) -> tuple[dict[str, dict], dict[str, int]]:
    """Return what may be left of all runs of a format, and in how many states mistakes show."""
    last = 1
    if not small.replaces:
        small.forget_old()
        last = len(small.new)  # files appear, of which the last one names the others
    first = lost(small, rng, runs_after=after)
    found = {OVER if small.replaces else WHERE_NONE: first}
    mistakes = {name: lost(small, rng, plant)["bad"] for name, plant in planted(small.kind).items()}
    if quick:
        return found, mistakes
    found[BEHIND] = lost(small, rng, written_behind, after)
    found[STOPPED] = lost(small, rng, interrupted(last), after)
    found[KILLED] = lost_after_kills(small, rng, first["names"], after)
    if small.kind.folder or not small.replaces:  # whose files can be lost one by one

        def both() -> None:
            unsettled()
            interrupted(last)()

        removed = lost_after_kills(small, rng, first["names"], 0, unsettled)
        mistakes["withdrawn without a sync"] = lost(small, rng, both)["bad"]
        mistakes["reclaimed without a sync"] = removed["bad"]
    if small.replaces:
        small.forget_old()
        found[WHERE_NONE] = lost(small, rng, runs_after=after)
    return found, mistakes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--formats", default="", help="names, separated by commas; all by default")
    parser.add_argument("--runs-after", type=int, default=20, metavar="N", help="of each run")
    parser.add_argument("--quick", action="store_true", help="only the plainest run, and mistakes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="only print")
    options = parser.parse_args()
    if why := unavailable():
        sys.exit(why)
    wanted = [name for name in options.formats.split(",") if name]
    figures, failed = recorded("power_loss", wanted), False
    for kind in KINDS:
        if wanted and kind.name not in wanted:
            continue
        rng = random.Random(options.seed)
        small = Small(kind, options.folder / "power_loss")
        found, mistakes = measured(small, rng, options.runs_after, quick=options.quick)
        for where, row in found.items():
            print(f"{kind.name}, {where}: {row}", flush=True)
            failed |= row["bad"] > 0
        print(f"{kind.name}, planted: {mistakes}", flush=True)
        failed |= 0 in mistakes.values()
        figures[kind.name] = {**found, "planted": mistakes}
        if not options.no_record:
            record("power_loss", "inputs in the page cache", figures)
        small.close()
    sys.exit(failed)


if __name__ == "__main__":
    main()
