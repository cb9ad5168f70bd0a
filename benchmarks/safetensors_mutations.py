"""What damaged safetensors headers and shard indexes are taken for, beside the reference parser.

Makes headers, sound ones and mutants of them at the level of the structure, of the JSON text and of
bytes, and asks wavg and the reference parser (``safetensors.deserialize``) what each holds.

- wavg must give an index or a `CheckpointFormatError`: in `SECONDS`, within `ROOM` of memory.
- Where both accept a header, names, dtypes, shapes, bytes and metadata must be the same.
- Where only the reference accepts one, it has to be one of the `LENIENT` ways to write a header,
  that is: written in the ordinary way wavg has to accept it too.
- wavg accepts nothing that the reference refuses.

Indexes of shards are mutated in a folder of tiny shards, sound and unsound; there the oracle is
`sound_map`. Usage::

    python benchmarks/safetensors_mutations.py [--count 1000000] [--maps 100000] [--seed 0]
        [--workers 2] [--largest FOLDER] [--no-record]

With --largest, what headers of the largest size allowed cost is measured too, in 10 GB of memory.
Writes results/safetensors_mutations.json. What is against the rules above is printed and counted,
and ends the run with an error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
from common import figures_of, record, run_process
from mutants import BITS, METADATA, SHARDS, Mutant, damaged, make_shards, map_mutant, mutant
from mutation_runs import Tally, run, verdict, watched

from wavg.checkpoint import FileIdentity, Index
from wavg.dtypes import lookup
from wavg.errors import CheckpointFormatError
from wavg.formats import open_file
from wavg.formats.safetensors import parsed
from wavg.formats.safetensors_shards import read_index

SECONDS = 2  # of processor time, one header; an ordinary one takes some 0.00003
MOST_DIMENSIONS = 64
TOO_LARGE = (1 << 63) - 100_000_008  # places in a file are numbers of 64 bits


# --- what the two make of them --------------------------------------------------------------------


def own_verdict(ask: Callable[[], Index]) -> tuple[Index | None, str, float]:
    """Return wavg's index, or none; why; and the time taken."""
    return verdict(ask, SECONDS, (CheckpointFormatError,))


def index_of(file: Path) -> Index:
    with open_file(str(file)) as checkpoint:
        return checkpoint.index


def reference_verdict(content: bytes) -> tuple[dict[str, dict] | None, str]:
    try:
        return dict(safetensors.deserialize(content)), ""
    except Exception as error:
        return None, str(error)


def same(index: Index, theirs: dict[str, dict], content: bytes, file: Path) -> str:
    """Say what wavg and the reference take a file to be differently, if anything."""
    if {spec.name for spec in index.tensors} != theirs.keys():
        return "other names"
    for spec in index.tensors:
        other = theirs[spec.name]
        if (lookup(spec.dtype).code, list(spec.shape)) != (other["dtype"], other["shape"]):
            return f"another dtype or shape of {spec.name!r}"
        _, offset, length = spec.extent
        if content[offset : offset + length] != bytes(other["data"]):
            return f"other bytes of {spec.name!r}"
    if index.metadata or METADATA.encode() in content:
        file.write_bytes(content)
        with safetensors.safe_open(file, "np") as opened:
            if (opened.metadata() or {}) != index.metadata:
                return "other metadata"
    return ""


LENIENT = {
    "a name twice": "the reference takes the last",
    "another field besides dtype, shape and data_offsets": "the reference passes over it",
    "a tensor as a list of its fields": "the reference takes their order for their names",
    "a dtype as a table": "the reference takes its key",
    "more than 64 dimensions": "NumPy has no such array",
    "an empty tensor of a shape too large": "NumPy has no such array",
    "whitespace before the first brace": "the format begins with a brace",
}


def ordinary(raw: bytes) -> tuple[bytes, list[str]]:
    """Write a header that the reference accepts in the ordinary way; say what was not so in it."""
    found: list[str] = []

    def last(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            found.append("a name twice")
        return table

    header = json.loads(raw, object_pairs_hook=last)
    if header.get(METADATA, 0) is None:
        del header[METADATA]
    for name, entry in header.items():
        if name == METADATA:
            continue
        if isinstance(entry, list):
            found.append("a tensor as a list of its fields")
            entry = dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True))
        if entry.keys() > {"dtype", "shape", "data_offsets"}:
            found.append("another field besides dtype, shape and data_offsets")
            entry = {key: entry[key] for key in ("dtype", "shape", "data_offsets")}
        if isinstance(entry["dtype"], dict):
            found.append("a dtype as a table")
            (entry["dtype"],) = entry["dtype"]
        shape = entry["shape"]
        if len(shape) > MOST_DIMENSIONS:
            found.append("more than 64 dimensions")
            entry["shape"] = [math.prod(shape)]
        nbytes = math.prod(filter(None, shape)) * BITS[entry["dtype"]] // 8
        if 0 in shape and max(nbytes, *shape) >= TOO_LARGE:
            found.append("an empty tensor of a shape too large")
            entry["shape"] = [0]
        header[name] = entry
    return json.dumps(header).encode(), sorted(set(found))


def identity(raw: bytes, data: bytes) -> FileIdentity:
    return FileIdentity("mutant", 8 + len(raw) + len(data), 0, 0, 0)


def judge(tally: Tally, made: Mutant, file: Path, whole: bytes | None = None) -> None:
    """Ask both parsers for one header, or for one file as it is on a disk."""
    raw, data, kind = made
    tally.kinds[kind] += 1
    content = whole
    if content is None:
        content = len(raw).to_bytes(8, "little") + raw + data
        index, why, taken = own_verdict(lambda: parsed(identity(raw, data), raw))
    else:
        file.write_bytes(content)
        index, why, taken = own_verdict(lambda: index_of(file))
        raw = content[8 : 8 + int.from_bytes(content[:8], "little")]
        data = content[8 + len(raw) :]
    tally.slowest = max(tally.slowest, taken)
    theirs, reason = reference_verdict(content)
    if why.startswith("FAILED"):
        tally.fail(why, content)
    elif index is not None and theirs is not None:
        tally.counts["accepted by both"] += 1
        if difference := same(index, theirs, content, file):
            tally.fail(difference, content)
    elif index is not None:
        tally.fail(f"only the reference refuses ({reason})", content)
    elif theirs is None:
        tally.counts["refused by both"] += 1
    else:
        tally.counts["accepted by the reference alone"] += 1
        plain, found = ordinary(raw)
        if whole is not None and raw[:1] != b"{":
            found.append("whitespace before the first brace")
        accepted, again, _ = own_verdict(lambda: parsed(identity(plain, data), plain))
        if not found or accepted is None:
            tally.fail(f"only wavg refuses ({why}; {again})", content)
        for name in found:
            tally.differ(name, raw)


# --- indexes of shards ----------------------------------------------------------------------------


def sound_map(raw: bytes) -> dict[str, str] | None:
    """Say which shard each tensor is in, if an index is sound. What wavg has to agree with."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    try:
        content = json.loads(raw.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        return None
    if not all(isinstance(name, str) and name in SHARDS for name in mapping.values()):
        return None
    held = [(tensor, name) for name in set(mapping.values()) for tensor in SHARDS[name]]
    return mapping if sorted(held) == sorted(mapping.items()) else None


def judge_map(tally: Tally, raw: bytes, path: Path) -> None:
    path.write_bytes(raw)
    index, why, taken = own_verdict(lambda: read_index(str(path)))
    tally.slowest = max(tally.slowest, taken)
    expected = sound_map(raw)
    if why.startswith("FAILED"):
        tally.fail(why, raw)
    elif index is None and expected is None:
        tally.counts["refused by both"] += 1
    elif index is None or expected is None:
        tally.fail(f"only {'wavg' if index is None else 'the oracle'} refuses ({why})", raw)
    else:
        tally.counts["accepted by both"] += 1
        places = {
            spec.name: os.path.basename(index.files[spec.extent.file].path)
            for spec in index.tensors
        }
        if places != expected:
            tally.fail("other places", raw)


# --- headers of the largest size allowed ----------------------------------------------------------

LARGEST = 100_000_000
SOUND_LARGEST = "sound: empty tensors"


def largest(kind: str) -> bytes:
    """Return a header as long as allowed, made to take much memory or time."""

    def entries(count: int) -> list[str]:
        rest = '":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        return [f'"{number:07}{rest}' for number in range(count)]

    if kind == SOUND_LARGEST or kind == "the last name twice":
        names = entries(LARGEST // 58 - 1)
        text = ",".join(names if kind == SOUND_LARGEST else [*names, names[-1]])
        return f"{{{text}}}".encode()
    if kind == "empty lists":
        return b'{"a":[' + b"[]," * (LARGEST // 3 - 4) + b"[]]}"
    if kind == "numbers":
        return b'{"a":[' + b"1e1," * (LARGEST // 4 - 4) + b"1]}"
    if kind == "one name":
        return b'{"' + b"a" * (LARGEST - 10) + b'":{}}'
    return b"[" * LARGEST


LARGEST_KINDS = (
    *(SOUND_LARGEST, "the last name twice", "empty lists", "numbers", "one name"),
    "nested lists",
)


def largest_costs(folder: Path) -> dict[str, dict]:
    """Measure what opening each costs a process; what a process costs is in it."""
    costs = {}
    for kind in LARGEST_KINDS:
        path = folder / "largest.safetensors"
        raw = largest(kind)
        if len(raw) > LARGEST:
            raise ValueError(f"{kind}: {len(raw):,} bytes")
        if raw[:1] != b"{":
            raw = b'{"a":' + raw[5:]
        path.write_bytes(len(raw).to_bytes(8, "little") + raw)
        size = len(raw)
        del raw
        seconds, peak = run_process([sys.executable, "-c", OPEN, str(path)])
        costs[kind] = {"bytes": size, "seconds": seconds, "peak_bytes": peak}
        path.unlink()
        print(f"{kind}: {size:,} bytes, {seconds:.1f} s, {peak / 1e6:,.0f} MB", flush=True)
    return costs


OPEN = """
import sys, wavg
try:
    wavg.open_checkpoint(sys.argv[1]).close()
except wavg.CheckpointFormatError as error:
    assert len(str(error)) < 10_000
"""


# --- the run --------------------------------------------------------------------------------------


def headers(seed: int, chunk: int, count: int) -> Tally:
    rng = random.Random(f"headers {seed} {chunk}")
    tally = Tally()
    with watched(tally) as folder:
        file = folder / "mutant.safetensors"
        for _ in range(count):
            made = mutant(rng)
            whole = damaged(rng, made) if rng.random() < 0.05 else None
            judge(tally, made, file, whole)
    return tally


def maps(seed: int, chunk: int, count: int) -> Tally:
    rng = random.Random(f"maps {seed} {chunk}")
    tally = Tally()
    with watched(tally) as folder:
        path = make_shards(folder)
        for _ in range(count):
            judge_map(tally, map_mutant(rng), path)
    return tally


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="headers")
    parser.add_argument("--maps", type=int, default=100_000, help="indexes of shards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--largest", type=Path, metavar="FOLDER")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args(arguments)
    figures = {
        "headers": run(headers, options.seed, options.count, options.workers, LENIENT),
        "shard indexes": run(maps, options.seed, options.maps, options.workers),
    }
    if options.largest:
        figures["largest"] = largest_costs(options.largest)
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    if not options.no_record:
        figures = {**({} if options.largest else _kept()), **figures}
        record("safetensors_mutations", "nothing read from a disk", figures)
    return int(any(figures[part]["against the rules"] for part in ("headers", "shard indexes")))


def _kept() -> dict[str, Any]:
    try:
        return {"largest": figures_of("safetensors_mutations")["largest"]}
    except (FileNotFoundError, KeyError):
        return {}


if __name__ == "__main__":
    sys.exit(main())
