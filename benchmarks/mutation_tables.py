"""The tables of what mutants of files are taken for."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterator

from fault_tables import figures
from tabular import table

EXPECTED = ("accepted", "error")  # of an isolated process
PARTS = {"whole": "Keras' files of HDF5", "parts": "what is in a .keras, and sharded weights"}


def mutations() -> str:
    def compared() -> Iterator[tuple[str, dict]]:
        for name, row in figures("safetensors_mutations").items():
            if name != "largest":
                yield f"safetensors: {name}", row
        yield from figures("zip_mutations").items()

    def rows() -> Iterator[str]:
        for name, row in compared():
            accepted = row["accepted by both"]
            refused = row["refused by both"] + row.get("accepted by the reference alone", 0)
            slowest = f"{row['slowest_seconds']:.2f} s"
            memory = f"{row['memory_growth_bytes'] / 2**20:.0f} MiB"
            yield (
                f"{name} | {row['count']:,} | {accepted:,} | {refused:,} | "
                f"{row['against the rules']} | {slowest} | {memory}"
            )
        for part, name in PARTS.items():
            found = figures("hdf5_mutations")[part]
            accepted, refused = (found["isolated"][outcome] for outcome in EXPECTED)
            over = found.get("isolated processes that", {}).get("over time", 0)
            wrong = found["mutants"] - accepted - refused + found["good files read wrongly"] + over
            yield (
                f"{name}, isolated | {found['mutants']:,} | {accepted:,} | {refused:,} | {wrong} | "
                f"{found['slowest_seconds']:.2f} s | limit of 512 MiB"
            )

    return table(
        "| mutants | accepted | refused as they should be | anything else | slowest | memory taken",
        rows(),
    )


def unprotected() -> str:
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for part in PARTS:
        for name, outcomes in figures("hdf5_mutations")[part].items():
            if name in ("index", "walk", "isolated", "isolated processes that"):
                counts[name].update(outcomes)
    isolated = counts.pop("isolated").total()
    ended = counts.pop("isolated processes that", collections.Counter())
    names = {"index": "wavg's index, unprotected", "walk": "a walk by h5py, unprotected"}

    def rows() -> Iterator[str]:
        for way, found in counts.items():
            crashed = sum(number for name, number in found.items() if name.startswith("crash"))
            yield (
                f"{names[way]} | {found.total():,} | {crashed} | {found['over time']} | "
                f"{found['excessive memory']}"
            )
        crashed, stuck = ended["crashed"], ended["did not come back"]
        yield f"isolated | {isolated:,} | {crashed} | {stuck} | refused"

    return table("| mutants | crashed | did not end | more than 512 MiB", rows())


WHY_REFUSED = {
    "a name twice": "one of the two would be lost without a word",
    "another field besides dtype, shape and data_offsets": "it may say what the numbers mean, a "
    "scale for example, and would be averaged past",
    "a tensor as a list of its fields": "an accident of the reference's JSON library",
    "a dtype as a table": "the same",
    "more than 64 dimensions": "NumPy has no such array",
    "an empty tensor of a shape too large": "NumPy has no such array",
    "whitespace before the first brace": "the format begins with a brace, by which it is known",
}


def differences() -> str:
    found = figures("safetensors_mutations")["headers"]["differences"]

    def shown(text: str) -> str:
        text = re.sub(r"\s", " ", text).rstrip().replace("|", "\\|")
        return f"`{text if len(text) <= 72 else text[:71] + '…'}`"

    return table(
        "| headers | why wavg refuses it | the shortest",
        (
            f"{name} | {row['count']:,} | {WHY_REFUSED[name]} | {shown(row['example'])}"
            for name, row in found.items()
        ),
    )


def largest() -> str:
    return table(
        "100 MB of | time | memory",
        (
            f"{name} | {row['seconds']:.0f} s | {row['peak_bytes'] / 1e9:.1f} GB"
            for name, row in figures("safetensors_mutations")["largest"].items()
        ),
    )


WHY_NOT_READ = {
    "a member that is no array": "NumPy gives its bytes",
    "text, dates, structures, numbers of another byte order or width": "no model's numbers",
    "a member longer than the file": "it is cut off, even if its numbers are not",
    "a member that is not read is damaged": "damage is told wherever it is",
    "a name twice": "one of the two would be lost without a word",
    "names that NumPy takes for each other": "`x.npy` is the file of the array `x`, and an array's "
    "name: NumPy gives the one for the other",
    "an unsafe name": "unpacked, it would lie outside of the folder",
    "another compression than deflate": "neither NumPy nor Keras writes any",
    "more than 100 times its size": "a bomb",
    "a stored member of two sizes": "one of them is wrong",
    "a CRC-32 in its own header that is not that of the directory": "one of them is wrong",
    "another name in its own header": "the same bytes mean another name there",
    "members that overlap, or the directory": "a bomb, or new numbers would go over other bytes",
    "bytes behind the numbers": "NumPy passes over them, and over the member's CRC-32",
    "a dtype by another name": "`float32` for `<f4`; NumPy writes none",
    "a header that NumPy mends": "`3L`, as Python 2 wrote 3; NumPy deletes what it cannot read",
    "bytes in front of the archive": "its first bytes do not tell what it is",
    "a first member of a .keras archive": "it is taken for one",
    "compressed weights": "Keras stores them",
}


def archive_differences() -> str:
    parts = list(figures("zip_mutations").values())

    def rows() -> Iterator[str]:
        for name, why in WHY_NOT_READ.items():
            counts = [part["differences"].get(name, {"count": 0})["count"] for part in parts]
            if any(counts):
                yield f"{name} | {' | '.join(f'{count:,}' for count in counts)} | {why}"

    return table("| .npz | zips of .keras | why wavg refuses it", rows())


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (mutations, unprotected, differences, archive_differences, largest)
}
