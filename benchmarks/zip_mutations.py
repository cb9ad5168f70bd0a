"""What damaged archives, ``.npz`` and the outer zips of ``.keras``, are taken for, beside NumPy.

Makes archives as NumPy, wavg and Python's zip library write them, and mutants of them at the level
of the zip's records, of the arrays' headers and of bytes, has wavg open each and read it whole with
its checksums, and compares with `numpy.load`.

- wavg must give arrays or a `CheckpointFormatError`: in `SECONDS`, within 256 MiB of memory.
- Where both accept a file, names, their order, dtypes, shapes and bytes must be the same.
- Where only NumPy accepts one, it has to be in one of the ways of `REFUSED`, each found in the file
  without asking wavg; and its arrays, saved anew, have to be accepted if they are of plain numbers.
- wavg accepts nothing that NumPy refuses.

The zips of ``.keras`` are compared with Python's zip library, and the file of weights in them is
looked into only where it is whole: hdf5_mutations.py damages those. Usage::

    python benchmarks/zip_mutations.py [--count 1000000] [--archives 200000] [--seed 0]
        [--workers 2] [--no-record]

With a count of 0 a part's figures stay as they were recorded. Writes results/zip_mutations.json.
What is against the rules above is printed and counted, and ends the run with an error.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import io
import itertools
import json
import random
import re
import struct
import sys
import types
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import figures_of, record
from mutation_runs import Tally, run, verdict, watched
from npy_mutants import Npy
from zip_mutants import WEIGHTS, Mutant, mutant
from zip_records import STREAMED, UTF8

import wavg
from wavg.checkpoint import Checkpoint, Index, TensorSpec
from wavg.digests import Digests
from wavg.errors import CheckpointFormatError
from wavg.extents import Extent
from wavg.formats import keras_archive, open_file, zips

SECONDS = 5  # of processor time, one file; an ordinary one takes some 0.0005
GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
INNER = GOLDEN / "keras3_shards_1_00002.weights.h5"  # small
WHOLE_EVERY = 50  # by `wavg.load`, whose threads take longer; else by what it is made of

Arrays = dict[str, np.ndarray]


# --- what wavg makes of them ----------------------------------------------------------------------


def everything(checkpoint: Checkpoint) -> Arrays:
    """Read an open checkpoint as `wavg.load` does, but for the threads."""
    extents = sorted(checksum.extent for checksum in checkpoint.index.checksums)
    with Digests([checkpoint], 1) as digests:
        for file, offset, _ in extents:
            digests.reach([(0, file, offset + 1)])
        digests.finish()
    arrays = {name: tensor.read() for name, tensor in checkpoint.items()}
    checkpoint.verify_unchanged()
    return arrays


def read_whole(path: Path) -> Arrays:
    with open_file(str(path)) as checkpoint:
        return everything(checkpoint)


# --- what NumPy does ------------------------------------------------------------------------------


def numpys(path: Path) -> dict[str, Any]:
    """Read all members; one that is no array is bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}


def asks_numpy(path: Path) -> tuple[dict[str, Any] | None, str]:
    arrays, why, _ = verdict(lambda: numpys(path), SECONDS, (Exception,))
    return arrays, why


def same(mine: Arrays, theirs: dict[str, Any]) -> str:
    """Say what the two read differently, if anything."""
    if list(mine) != list(theirs):
        return f"other names: {list(mine)}, {list(theirs)}"
    for name, array in mine.items():
        other = theirs[name]
        if not isinstance(other, np.ndarray) or array.shape != other.shape:
            return f"another shape of {name!r}"
        fields = other.dtype.fields
        if fields:  # numbers that NumPy has no name for
            ((label, (dtype, *_)),) = fields.items()
            equal = label == array.dtype.name and dtype.str[1:] == f"u{array.dtype.itemsize}"
        else:
            equal = array.dtype == other.dtype
        if not equal:
            return f"another dtype of {name!r}: {array.dtype}, {other.dtype}"
        if array.tobytes() != other.tobytes():
            return f"other bytes of {name!r}"
        if array.flags.f_contiguous != other.flags.f_contiguous:
            return f"another order of {name!r}"
    return ""


# --- what wavg refuses, and others accept ---------------------------------------------------------

KERAS_FIRST = "a first member of a .keras archive"
NO_NUMBERS = "text, dates, structures, numbers of another byte order or width"
DAMAGED = "a member that is not read is damaged"
REFUSED = (
    "a member that is no array",
    NO_NUMBERS,
    "a member longer than the file",
    DAMAGED,
    "a name twice",
    "names that NumPy takes for each other",
    "an unsafe name",
    "another compression than deflate",
    "more than 100 times its size",
    "a stored member of two sizes",
    "a CRC-32 in its own header that is not that of the directory",
    "another name in its own header",
    "members that overlap, or the directory",
    "bytes behind the numbers",
    "a dtype by another name",
    "a header that NumPy mends",
    "bytes in front of the archive",
    KERAS_FIRST,
)
PLAIN = "fiub"


def is_plain(value: Any) -> bool:
    """Whether an array, or a dtype, is of plain numbers."""
    dtype = value if isinstance(value, np.dtype) else getattr(value, "dtype", None)
    if dtype is None or dtype.kind not in PLAIN + "c" or dtype.byteorder == ">":
        return False
    return dtype.itemsize <= (16 if dtype.kind == "c" else 8)


def oddities(path: Path, values: dict[str, Any]) -> list[str]:
    """Return in which ways of `REFUSED` a file is, by Python's zip library and the bytes."""
    content, found = path.read_bytes(), set()
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        if len(set(names)) < len(names):
            found.add("a name twice")
        if {f"{name}.npy" for name in names} & set(names):
            found.add("names that NumPy takes for each other")
        spans = [(archive.start_dir, len(content))]
        for info in infos:
            if info.header_offset + 30 > len(content):
                found.add(DAMAGED)
                continue
            header = struct.unpack_from("<HHIIIIHH", content, info.header_offset + 6)
            start = info.header_offset + 30 + header[6] + header[7]
            spans.append((info.header_offset, start + info.compress_size))
            found |= set(_odd_member(info, header, content[start:]))
    spans.sort()
    if any(first[1] > second[0] for first, second in itertools.pairwise(spans)):
        found.add("members that overlap, or the directory")
    if not content.startswith(b"PK"):
        found.add("bytes in front of the archive")
    if content[30:].startswith((b"metadata.json", b"config.json", b"model.weights.h5")):
        found.add(KERAS_FIRST)
    for name, value in values.items():
        if not isinstance(value, np.ndarray) or name in names:
            found.add("a member that is no array")
        elif not is_plain(value):
            found.add(NO_NUMBERS)
    return [name for name in REFUSED if name in found]


def _odd_member(info: zipfile.ZipInfo, header: tuple[int, ...], data: bytes) -> Iterator[str]:
    """Look at one member; `data` are the bytes from its first to the end of the file."""
    flags, crc = header[0], header[3]
    if not (zips.is_safe(info.filename) and zips.is_safe(info.orig_filename)):
        yield "an unsafe name"
    if info.compress_type not in (0, 8):
        yield "another compression than deflate"
    if info.file_size > 100 * max(1, info.compress_size):
        yield "more than 100 times its size"
    if info.compress_type == 0 and info.file_size != info.compress_size:
        yield "a stored member of two sizes"
    if crc != info.CRC and not (flags | info.flag_bits) & STREAMED:
        yield "a CRC-32 in its own header that is not that of the directory"
    if (flags ^ info.flag_bits) & UTF8:
        yield "another name in its own header"
    if info.compress_size > len(data):
        yield "a member longer than the file"
    if info.compress_type == 8:
        data = unpacked(data[: info.compress_size])
    content = data[: info.file_size]
    npy = Npy.of(content)
    if npy is None:
        return
    try:
        ast.literal_eval(npy.text)
    except SyntaxError:
        yield "a header that NumPy mends"
    except ValueError:  # of a member that is not read
        return
    with contextlib.suppress(Exception):
        array = np.lib.format.read_array(io.BytesIO(data))
        if info.file_size > len(content) - len(npy.data) + array.nbytes:
            yield "bytes behind the numbers"
        fields = ast.literal_eval(npy.text)
        descr = fields["descr"]
        if not isinstance(descr, str) or np.dtype(descr).subdtype:
            yield NO_NUMBERS
        elif is_plain(np.dtype(descr)) and not re.fullmatch(
            r"[<|=]?([iu][1248]|f[248]|c8|c16|b1)", descr
        ):
            yield "a dtype by another name"


def unpacked(data: bytes) -> bytes:
    """Unpack what is sound of a deflated member, or a megabyte."""
    packer, out = zlib.decompressobj(-15), b""
    with contextlib.suppress(zlib.error):
        for place in range(0, len(data), 8):
            out += packer.decompress(data[place : place + 8], 1 << 20)
            if len(out) > 1 << 20:
                break
    return out


# --- the judgement --------------------------------------------------------------------------------


def judge(tally: Tally, made: Mutant, path: Path, load: Callable[[Path], Arrays]) -> None:
    """Have wavg and NumPy read one file."""
    tally.kinds[made.kind] += 1
    path.write_bytes(made.content)
    mine, why, taken = verdict(lambda: load(path), SECONDS, (CheckpointFormatError,))
    tally.slowest = max(tally.slowest, taken)
    theirs, reason = asks_numpy(path)
    if why.startswith("FAILED"):
        tally.fail(why, made.content)
    elif mine is not None and theirs is not None:
        tally.counts["accepted by both"] += 1
        if difference := same(mine, theirs):
            tally.fail(difference, made.content)
    elif mine is not None:
        tally.fail(f"only NumPy refuses ({reason})", made.content)
    elif theirs is None:
        tally.counts["refused by both"] += 1
    else:
        tally.counts["accepted by the reference alone"] += 1
        found, trouble, _ = verdict(lambda: oddities(path, theirs), SECONDS, ())
        if not found:
            why += trouble
            tally.fail(f"only wavg refuses ({why})", made.content)
        explain(tally, found or [], why, path)
        if theirs and all(map(is_plain, theirs.values())):
            anew = {f"array {number}": array for number, array in enumerate(theirs.values())}
            np.savez(path, **anew)
            again, why, _ = verdict(lambda: load(path), SECONDS, (CheckpointFormatError,))
            if why or same(again or {}, anew):
                tally.fail(f"saved anew, it is refused or another ({why})", made.content)


def explain(tally: Tally, found: list[str], why: str, path: Path) -> None:
    """Count the ways in which a file is odd; where there is one, wavg's word is an example."""
    for name in found:
        tally.differ(name, why.removeprefix(f"{path}: ").encode() if len(found) == 1 else None)


def judge_archive(tally: Tally, made: Mutant, path: Path, rng: random.Random) -> None:
    """Have wavg and Python's zip library read one ``.keras``."""
    tally.kinds[made.kind] += 1
    path.write_bytes(made.content)

    def ask() -> tuple[bytes, dict[str, str]]:
        with outer_only(), open_file(str(path)) as checkpoint:
            arrays = everything(checkpoint)
            return arrays[WEIGHTS].tobytes(), dict(checkpoint.metadata)

    mine, why, taken = verdict(ask, SECONDS, (CheckpointFormatError,))
    tally.slowest = max(tally.slowest, taken)
    theirs, reason, _ = verdict(lambda: by_zipfile(path), SECONDS, (Exception,))
    if why.startswith("FAILED"):
        tally.fail(why, made.content)
    elif mine is not None and theirs is not None:
        tally.counts["accepted by both"] += 1
        if mine != theirs:
            tally.fail("other bytes or metadata", made.content)
        elif rng.random() < 1 / WHOLE_EVERY and mine[0] == inner():
            _, why, taken = verdict(lambda: wavg.load(path), SECONDS, ())
            tally.slowest = max(tally.slowest, taken)
            if why:
                tally.fail(f"with its weights: {why}", made.content)
    elif mine is not None:
        tally.fail(f"only the zip library refuses ({reason})", made.content)
    elif theirs is None:
        tally.counts["refused by both"] += 1
    else:
        tally.counts["accepted by the reference alone"] += 1
        found, trouble, _ = verdict(lambda: odd_archive(path), SECONDS, ())
        if not found:
            why += trouble
            tally.fail(f"only wavg refuses ({why})", made.content)
        explain(tally, found or [], why, path)


def by_zipfile(path: Path) -> tuple[bytes, dict[str, str]]:
    """Read an archive as Keras does."""
    with zipfile.ZipFile(path) as archive:
        weights, metadata = archive.read(WEIGHTS), {}
        if "metadata.json" in archive.namelist():
            metadata = json.loads(archive.read("metadata.json") or b"{}")
        if "config.json" in archive.namelist():
            archive.read("config.json")
    table = metadata if isinstance(metadata, dict) else {}
    return weights, {key: value for key, value in table.items() if isinstance(value, str)}


COMPRESSED = "compressed weights"
KERAS = "zips of .keras"


def odd_archive(path: Path) -> list[str]:
    found = {*oddities(path, {})} - {KERAS_FIRST}
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(WEIGHTS).compress_type:
            found.add(COMPRESSED)
        try:
            if archive.testzip() is not None:
                found.add(DAMAGED)
        except Exception:
            found.add(DAMAGED)
    return sorted(found)


@functools.cache
def inner() -> bytes:
    return INNER.read_bytes()


@contextlib.contextmanager
def outer_only() -> Iterator[None]:
    """Take the file of weights in an archive for one array of bytes."""

    def index_of(source: Any, identity: Any, *_: object) -> Index:
        extent = Extent(0, source.base, source.size)
        return Index("", (identity,), (TensorSpec(WEIGHTS, "uint8", (source.size,), extent),))

    true = keras_archive.hdf5, keras_archive.keras_weights
    opened = types.SimpleNamespace(opened=lambda source: contextlib.nullcontext())
    keras_archive.hdf5 = opened  # type: ignore[assignment]
    keras_archive.keras_weights = types.SimpleNamespace(  # type: ignore[assignment]
        index_of=index_of, made_of=true[1].made_of
    )
    try:
        yield
    finally:
        keras_archive.hdf5, keras_archive.keras_weights = true


# --- the run --------------------------------------------------------------------------------------


def arrays(seed: int, chunk: int, count: int) -> Tally:
    rng = random.Random(f"arrays {seed} {chunk}")
    warnings.simplefilter("ignore")
    tally = Tally()
    with watched(tally) as folder:
        path = folder / "mutant.npz"
        for number in range(count):
            load = wavg.load if number % WHOLE_EVERY == 0 else read_whole
            judge(tally, mutant(rng), path, load)
    return tally


def archives(seed: int, chunk: int, count: int) -> Tally:
    rng = random.Random(f"archives {seed} {chunk}")
    warnings.simplefilter("ignore")
    weights, tally = inner(), Tally()
    with watched(tally) as folder:
        path = folder / "mutant.keras"
        for _ in range(count):
            judge_archive(tally, mutant(rng, "keras", weights), path, rng)
    return tally


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="archives of arrays, .npz")
    parser.add_argument("--archives", type=int, default=200_000, help="archives of .keras")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args(arguments)
    reasons = (*REFUSED, COMPRESSED)
    figures, parts = {}, {".npz": (arrays, options.count), KERAS: (archives, options.archives)}
    for name, (function, count) in parts.items():
        figures[name] = (
            run(function, options.seed, count, options.workers, reasons)
            if count
            else figures_of("zip_mutations")[name]
        )
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    if not options.no_record:
        record("zip_mutations", "files in memory", figures)
    return int(any(part["against the rules"] for part in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
