"""The tables of what happens when a run is killed, refused or short of something."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tabular import table

RESULTS = Path(__file__).parent / "results"


def figures(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())["figures"]


def kills() -> str:
    moments, boundaries = figures("kills_moments"), figures("kills_boundaries")

    def rows() -> Iterator[str]:
        for name, row in moments.items():
            other = boundaries[name]
            counts = [row.get(s, 0) + other.get(s, 0) for s in ("old", "new", "unnamed")]
            counts[1] -= row.get("were done before", 0)  # by themselves: no kill
            stood = [f"{count:,}" for count in counts]
            yield (
                f"{name} | {row['kills']:,} | {other['system_calls']:,} | {other['kills']:,} | "
                f"{' | '.join(stood)} | {row['bad'] + other['bad']} | "
                f"{row['runs after'] + other['runs after']:,} | "
                f"{row['temporaries reclaimed'] + other['temporaries reclaimed']:,}"
            )

    return table(
        "| killed at random | calls of a run | killed at each, before and after | then the old one "
        "| the new one | shards without name | anything else | runs after | temporaries they "
        "reclaimed",
        rows(),
    )


def interrupts() -> str:
    def rows() -> Iterator[str]:
        for name, found in figures("kills_interrupts").items():
            ends = {"done": 0, "interrupted": 0, "killed by": 0}
            for key, number in found.items():
                for end in ends:
                    ends[end] += number if key.startswith(end) else 0
            yield (
                f"{name} | {found['signals']} | {ends['interrupted']} | {ends['done']} | "
                f"{ends['killed by']} | {found['left temporaries']} | {found['bad']}"
            )

    return table(
        "| signals | ended by them | done before | came before the command had begun | temporaries "
        "left | anything else",
        rows(),
    )


def power_loss() -> str:
    def rows() -> Iterator[str]:
        for name, found in figures("power_loss").items():
            ways = [row for way, row in found.items() if way != "planted"]
            columns = ("effects", "states", "distinct", "old", "new", "after the return", "unnamed")
            sums = [sum(row.get(column, 0) for row in ways) for column in (*columns, "bad")]
            sums.append(sum(row.get("runs after", 0) for row in ways))
            yield f"{name} | {ways[0]['calls']:,} | " + " | ".join(f"{number:,}" for number in sums)

    return table(
        "| calls of a run | changes, in all runs | states of the disk | that differ | then the old "
        "one | the new one | of these, after the return | shards without name | anything else | "
        "runs after",
        rows(),
    )


def planted() -> str:
    mistakes: dict[str, list[int]] = {}
    for found in figures("power_loss").values():
        for mistake, states in found["planted"].items():
            mistakes.setdefault(mistake, []).append(states)

    def rows() -> Iterator[str]:
        for mistake, states in mistakes.items():
            found = sum(number > 0 for number in states)
            yield f"{mistake} | {len(states)} | {found} | {min(states):,} to {max(states):,}"

    return table("| formats | found in | states in which it shows", rows())


def concurrent() -> str:
    def rows() -> Iterator[str]:
        for name, modes in figures("concurrent").items():
            new, over = modes["new"], modes["overwrite"]
            refused = [mode.get("refused: it exists", 0) for mode in (new, over)]
            yield (
                f"{name} | {new['runs']:,} | {new['won or replaced']:,} | {refused[0]:,} | "
                f"{over['runs']:,} | {over['won or replaced']:,} | {refused[1]:,} | "
                f"{new['killed'] + over['killed']:,} | "
                f"{new['anything else'] + over['anything else']}"
            )

    return table(
        "| runs to one new output | won | refused: it exists | runs over an old one | done "
        "| refused | killed, of both | anything else",
        rows(),
    )


WENT_ON, LEFT = "went on", "went on, a temporary left to the next run"
GROUPS = {
    "pwrite64": "write",
    "ftruncate": "truncate",
    "fsync": "fsync, fdatasync",
    "fdatasync": "fsync, fdatasync",
    "fsync of the folder": "fsync of the folder",
    "rename": "rename, exchange, link",
    "renameat2": "rename, exchange, link",
    "link": "rename, exchange, link",
    "mkdir": "mkdir, chmod, dup, flock",
    "chmod": "mkdir, chmod, dup, flock",
    "dup": "mkdir, chmod, dup, flock",
    "flock": "mkdir, chmod, dup, flock",
    "unlink": "unlink, rmdir",
    "rmdir": "unlink, rmdir",
    "close": "close",
    "openat": "open",
    "getdents64": "read, list",
    "pread64": "read, list",
    "preadv": "read, list",
    "read": "read, list",
}


def calls() -> str:
    counts: dict[tuple[str, str], collections.Counter] = {}
    for found in figures("injected_calls").values():
        for what, outcomes in found["faults"].items():
            call, _, error = what.rpartition(" ")
            error = error if error in ("EINTR", "short") else "an error"
            key = GROUPS[call], {"short": "cut short"}.get(error, error)
            counts.setdefault(key, collections.Counter()).update(outcomes)
    order = [*dict.fromkeys(GROUPS.values())]

    def rows() -> Iterator[str]:
        for (group, error), found in sorted(counts.items(), key=lambda i: order.index(i[0][0])):
            known = ("typed error", WENT_ON, LEFT)
            other = found.total() - sum(found[name] for name in known)
            shown = " | ".join(f"{found[name]:,}" for name in known)
            yield f"{group} | {error} | {found.total():,} | {shown} | {other}"

    return table(
        "| what happens | times | typed error, the old output | no matter: the new output | "
        "the same, and a temporary is left | anything else",
        rows(),
    )


def allocations() -> str:
    def rows() -> Iterator[str]:
        for name, found in figures("injected_allocations").items():
            counts: collections.Counter = collections.Counter()
            for what, outcomes in found["faults"].items():
                for outcome, number in outcomes.items():
                    died = what.startswith(("killed", "hung", "exit"))
                    counts["died" if died else outcome] += number
            complete = counts["typed error, the new output complete"]
            yield (
                f"{name} | {found['allocations']:,} | {counts.total():,} | "
                f"{counts['typed error'] + complete:,} | {counts['went on']:,} | "
                f"{counts['untyped error']:,} | {counts['died']:,} | {found['bad']}"
            )

    return table(
        "| allocations | failed, each in a run | typed error | no matter | another error | "
        "the process crashed or hung | an output or a temporary not as it should be",
        rows(),
    )


def full() -> str:
    def rows() -> Iterator[str]:
        for kind in ("tmpfs", "ext4"):
            for name, found in figures(f"injected_full_{kind}").items():
                counts = found["faults"]["no room"]
                yield (
                    f"{kind} | {name} | {found['enough_pages']:,} of {found['page']:,} bytes | "
                    f"{counts.get('typed error', 0):,} | {found['bad']}"
                )

    return table(
        "| | enough pages | typed error with fewer, the old output | anything else", rows()
    )


def truncations() -> str:
    found = figures("truncations")

    def rows() -> Iterator[str]:
        for name in dict.fromkeys([*found["small"], *found["large"]]):
            small, large = found["small"].get(name), found["large"].get(name)
            parts = []
            for row in (small, large):
                parts += [f"{row['bytes']:,}", f"{row['cuts']:,}"] if row else ["", ""]
            both = [row for row in (small, large) if row]
            counts = [
                sum(row.get(key, 0) for row in both) for key in ("refused", "nothing lost", "bad")
            ]
            yield f"{name} | {parts[0]} | {' | '.join(parts[2:])} | " + " | ".join(
                f"{count:,}" for count in counts
            )

    return table(
        "| bytes, cut at each | bytes of a larger one | random cuts | refused | nothing was lost | "
        "anything else",
        rows(),
    )


def changes() -> str:
    counts: dict[str, collections.Counter] = {}
    bad = 0
    for found in figures("truncations")["changes"].values():
        bad += found["bad"]
        for key, number in found.items():
            what, separator, error = key.partition(": ")
            if separator:
                counts.setdefault(what, collections.Counter())[error] += number

    def rows() -> Iterator[str]:
        for what, errors in counts.items():
            shown = ", ".join(f"`{name}` {number:,}" for name, number in errors.most_common())
            yield f"{what} | {errors.total():,} | {shown}"
        yield f"anything else | {bad} | "

    return table("an input is | times | the run ended with", rows())


def bombs() -> str:
    found = figures("bombs")
    forms: dict[str, list] = {}
    for row in found["files"]:
        forms.setdefault(row["format"], []).append(row)

    def rows() -> Iterator[str]:
        for form, files in forms.items():
            ways = [way for row in files for way in row["ways"].values()]
            yield (
                f"{form} | {len(files)} | {max(row['bytes'] for row in files):,} | {len(ways)} | "
                f"{max(way['seconds'] for way in ways):.2f} s | "
                f"{max(way['bytes'] for way in ways) / 1e6:.1f} MB | "
                f"{sum(text.startswith(form + ',') for text in found['bad'])}"
            )

    return table(
        "| files | largest, bytes | refusals | slowest | most memory | anything else", rows()
    )


def bit_flips() -> str:
    def rows() -> Iterator[str]:
        for where, row in figures("bit_flips").items():
            counts = " | ".join(f"{row[what]:,}" for what in ("flips", "told", "refused", "unseen"))
            yield f"{'numbers of the output' if where == 'output' else 'an input'} | {counts}"

    return table("in | bits flipped | told | input refused | unseen", rows())


def mutation() -> str:
    kinds = ("speed", "wider", "same", "elsewhere", "unexplained")

    def rows() -> Iterator[str]:
        for group in figures("mutation").values():
            for module, found in group.items():
                survived = " | ".join(f"{found.get(kind, 0):,}" for kind in kinds)
                yield (
                    f"`{module}` | {found['mutants']:,} | "
                    f"{found['killed'] + found['timed out']:,} | {survived}"
                )

    return table(
        "| mutants | told by a test | only speed or memory | a bound too wide | the same value | "
        "told elsewhere | without a reason",
        rows(),
    )


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (
        kills,
        power_loss,
        planted,
        concurrent,
        interrupts,
        calls,
        allocations,
        full,
        truncations,
        changes,
        bombs,
        bit_flips,
        mutation,
    )
}
