"""Open files of at most 1 MB that declare at least 1 TB, and see what refusing them costs.

    python benchmarks/bombs.py FOLDER [--names WORD]

Each is opened, loaded and averaged by wavg in a fresh copy of this process, and must be refused by
a `WavgError` in less than a second of clock, with less than 64 MB of memory more than the process
had (the peak that Linux tells, reset before). HDF5 files are looked into in this process, and again
isolated, where the other process counts too; it has been started for a good file. Writes
results/bombs.json; exit code 1 if anything was bad.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import resource
import shutil
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
from common import record
from small_runs import GOLDEN

import wavg

SECONDS, BYTES, LARGEST = 1.0, 64_000_000, 1_000_000
HUGE = 1 << 40


def safetensors_file(header: object, size: int | None = None, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def of_safetensors() -> Iterator[tuple[str, bytes]]:
    yield "header of 1 TB", safetensors_file(b"{}", HUGE)
    yield "header of 2^64 - 1", safetensors_file(b"{}", (1 << 64) - 1)
    yield "tensor of 4 TB", safetensors_file({"w": entry([HUGE], 0, 4 * HUGE)}, data=b"\0" * 64)
    yield (
        "tensor of 4 TB in 64 bytes",
        safetensors_file({"w": entry([HUGE], 0, 64)}, data=b"\0" * 64),
    )
    yield (
        "overlapping tensors, 5 TB together",
        safetensors_file(
            {f"w{n}": entry([128 << 20], 0, 512 << 20) for n in range(10_000)}, data=b"\0" * 64
        ),
    )
    yield (
        "shape whose product wraps to 16",
        safetensors_file({"w": entry([1 << 32, (1 << 32), 4], 0, 16)}, data=b"\0" * 16),
    )
    yield "empty tensor of 2^62 columns", safetensors_file({"w": entry([0, 1 << 62], 0, 0)})
    yield (
        "nesting a hundred thousand deep",
        safetensors_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    )
    yield (
        "number of a million digits",
        safetensors_file(
            b'{"w":{"dtype":"F32","shape":[' + b"9" * 900_000 + b'],"data_offsets":[0,4]}}',
            data=b"\0" * 4,
        ),
    )


def npy(shape: object, data: bytes = b"", descr: str = "<f4") -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + data


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def resized(archive: bytes, length: int) -> bytes:
    """Have every header of an archive of one member say that it unpacks to so many bytes."""
    result = bytearray(archive)
    wide = min(length, 0xFFFFFFFF).to_bytes(4, "little")
    local, central = archive.index(b"PK\3\4"), archive.index(b"PK\1\2")
    result[local + 22 : local + 26] = wide
    result[central + 24 : central + 28] = wide
    return bytes(result)


def zip64(length: int) -> bytes:
    """Return an archive whose one deflated member says, in the wide fields, it is so long."""
    data = zlib.compress(bytes(1 << 20), 9)[2:-4]
    extra = struct.pack("<HHQQ", 1, 16, length, len(data))
    common = struct.pack("<HHIIIIHH", 0, 8, 0x210000, 0, 0xFFFFFFFF, 0xFFFFFFFF, 5, len(extra))
    local = b"PK\3\4" + struct.pack("<H", 45) + common + b"w.npy" + extra + data
    central = b"PK\1\2" + struct.pack("<HH", 45, 45) + common
    central += struct.pack("<HHHII", 0, 0, 0, 0, 0) + b"w.npy" + extra
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + end


def of_npz() -> Iterator[tuple[str, bytes]]:
    yield "array of 4 TB, stored", zipped({"w.npy": npy((HUGE,), bytes(64))})
    yield (
        "array of 4 TB, deflated",
        zipped({"w.npy": npy((HUGE,), bytes(64))}, zipfile.ZIP_DEFLATED),
    )
    yield "shape of 2^80", zipped({"w.npy": npy((1 << 40, 1 << 40), bytes(64))})
    yield (
        "ratio of a thousand",
        zipped({"w.npy": npy((25 << 20,), bytes(100 << 20))}, zipfile.ZIP_DEFLATED),
    )
    yield (
        "member that says 4 GB",
        resized(zipped({"w.npy": npy((9,), bytes(36))}, zipfile.ZIP_DEFLATED), 1 << 32),
    )
    yield "member that says 1 TB in the wide fields", zip64(HUGE)
    yield (
        "directory of 2^32 - 1 bytes",
        zipped({"w.npy": npy((1,), bytes(4))})[:-10] + b"\xff" * 4 + bytes(6),
    )
    yield "header of 4 GB", zipped({"w.npy": b"\x93NUMPY\x02\0" + b"\xff" * 4 + b"{}"})
    yield "header of a tuple a thousand deep", zipped({"w.npy": npy("x")[:10] + b"(" * 60_000})


def hdf5(make: Callable[[h5py.Group], None], *, weights: bool = False) -> bytes:
    """Return a file in one of Keras' layouts whose one layer has what `make` makes in it."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="earliest") as file:
        if weights:
            make(file.create_group("layers/dense/vars"))
        else:
            file.attrs["layer_names"] = np.array([b"dense"])
            file.attrs["backend"], file.attrs["keras_version"] = "jax", "3.0"
            group = file.create_group("dense")
            group.attrs["weight_names"] = np.array([b"0"])
            make(group)
    return buffer.getvalue()


def dataset(group: h5py.Group, **options: object) -> h5py.Dataset:
    return group.create_dataset("0", dtype="f4", **options)


def patched(content: bytes, old: int, new: int) -> bytes:
    """Replace a number of eight bytes wherever it is."""
    before, after = old.to_bytes(8, "little"), new.to_bytes(8, "little")
    assert before in content
    return content.replace(before, after)


@functools.cache
def deflated_twice(size: int) -> bytes:
    """Return so many zeros, compressed, and compressed again."""
    once, piece = zlib.compressobj(9), bytes(1 << 20)
    pieces = [once.compress(piece[: size - start]) for start in range(0, size, len(piece))]
    return zlib.compress(b"".join(pieces) + once.flush(), 9)


def overlapping(group: h5py.Group) -> None:
    """Make 256 chunks of 4 GB each, deflated twice to almost nothing."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    chunk = (1 << 30) - 1
    properties.set_chunk((chunk,))
    properties.set_deflate(9)
    properties.set_filter(1, h5py.h5z.FLAG_MANDATORY, (9,))
    space = h5py.h5s.create_simple((256 * chunk,))
    made = h5py.h5d.create(group.id, b"0", h5py.h5t.IEEE_F32LE, space, dcpl=properties)
    twice = deflated_twice(4 * chunk)
    for number in range(256):
        made.write_direct_chunk((number * chunk,), twice if number < 60 else b"x" * 60)


def deflated(group: h5py.Group) -> None:
    """Make a TB of chunks that are all there, each of a byte that does not unpack."""
    chunk = 1 << 28
    made = dataset(group, shape=(1024 * chunk,), chunks=(chunk,), compression="gzip")
    for number in range(1024):
        made.id.write_direct_chunk((number * chunk,), b"x")


def of_hdf5(*, weights: bool) -> Iterator[tuple[str, bytes]]:
    def made(make: Callable[[h5py.Group], object]) -> bytes:
        return hdf5(make, weights=weights)  # type: ignore[arg-type]

    yield "contiguous, 4 TB, never written", made(lambda g: dataset(g, shape=(HUGE,)))
    yield (
        "in chunks, 4 TB, none written",
        made(lambda g: dataset(g, shape=(HUGE,), chunks=(1 << 20,))),
    )
    yield "in chunks, 4 TB, of 1 MB of empty ones", made(deflated)
    yield "deflated twice, 1 TB", made(overlapping)
    yield (
        "one chunk of 4 GB for 1 TB",
        made(lambda g: dataset(g, shape=(HUGE,), chunks=((1 << 30) - 1,), compression="gzip")),
    )
    small = made(lambda g: dataset(g, data=np.arange(777, dtype=np.float32)))
    yield "extent changed to 4 TB", patched(small, 777, HUGE)
    yield "extent and size changed to 4 TB", patched(patched(small, 777, HUGE), 3108, 4 * HUGE)
    chunked = made(
        lambda g: dataset(g, data=np.zeros(777, np.float32), chunks=(777,), compression="gzip")
    )
    yield "extent of one chunk changed to 4 TB", patched(chunked, 777, HUGE)
    yield "empty, of 2^62 columns", made(lambda g: dataset(g, shape=(0, 1 << 62)))
    texts = made(lambda g: g.attrs.create("note", np.zeros(333, "S64")))
    yield "attribute of 70 TB", patched(texts, 333, HUGE)


def archive(weights: bytes, config: bytes | None = None) -> bytes:
    with zipfile.ZipFile(GOLDEN / "keras3_tower_1.keras") as real:
        members = {name: real.read(name) for name in real.namelist()}
    members["model.weights.h5"] = weights
    if config is not None:
        members["config.json"] = config
    return zipped(members)


def bombs() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Yield a format, what is wrong, and the files, the first of which is to be opened."""
    for name, content in of_safetensors():
        yield "safetensors", name, {"model.safetensors": content}
    index = "model.safetensors.index.json"
    sound = safetensors_file({"w": entry([4], 0, 16)}, data=bytes(16))
    shard = {"model-00001-of-00002.safetensors": sound}
    mapping = {"w": "model-00001-of-00002.safetensors"}
    yield (
        "index of safetensors",
        "shards without number",
        {
            index: json.dumps(
                {"weight_map": {f"w{n}": f"m{n}.safetensors" for n in range(20_000)}}
            ).encode()
        },
    )
    huge = safetensors_file({"w": entry([HUGE], 0, 4 * HUGE)}, data=bytes(64))
    yield (
        "index of safetensors",
        "shard of 4 TB",
        {
            index: json.dumps(
                {"metadata": {"total_size": 4 * HUGE}, "weight_map": mapping}
            ).encode(),
            next(iter(shard)): huge,
        },
    )
    for name, content in of_npz():
        yield ".npz", name, {"model.npz": content}
    for name, content in of_hdf5(weights=False):
        yield ".h5", name, {"model.h5": content}
    for name, content in of_hdf5(weights=True):
        yield ".weights.h5", name, {"model.weights.h5": content}
        yield ".keras", f"weights {name}", {"model.keras": archive(content)}
    golden = (GOLDEN / "keras3_tower_1.keras").read_bytes()
    yield ".keras", "member that says 4 GB", {"model.keras": resized(golden, 1 << 32)}
    with zipfile.ZipFile(GOLDEN / "keras3_tower_1.keras") as real:
        weights = real.read("model.weights.h5")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("config.json", bytes(500 << 20))
        made.writestr("model.weights.h5", weights, zipfile.ZIP_STORED)
    yield ".keras", "configuration of 500 MB", {"model.keras": packed.getvalue()}
    broken = {"w": [f"model_{n:05}.weights.h5" for n in range(20_000)]}
    yield (
        ".weights.json",
        "shards without number",
        {"model.weights.json": json.dumps({"metadata": {}, "weight_map": broken}).encode()},
    )
    for name, content in of_hdf5(weights=True):
        table = {
            "metadata": {"total_size": 4 * HUGE},
            "weight_map": {"/layers/dense/vars": ["model_00000.weights.h5"]},
        }
        yield (
            ".weights.json",
            f"shard {name}",
            {
                "model.weights.json": json.dumps(table).encode(),
                "model_00000.weights.h5": content,
            },
        )


def peak(process: str = "self") -> int:
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def attempt(work: Callable[[], object], prepare: Callable[[], object]) -> dict:
    """Do it in a copy of this process; return what it raised, the seconds and the memory."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        prepare()
        Path("/proc/self/clear_refs").write_text("5")
        before, start = peak(), time.perf_counter()
        try:
            work()
            outcome = "accepted"
        except wavg.WavgError as error:
            outcome = f"{type(error).__name__}: {error}"
        except BaseException as error:
            outcome = f"untyped {type(error).__name__}: {error}"
        seconds, extra = time.perf_counter() - start, peak() - before
        from wavg.formats import isolated

        if isolated._READER.process is not None:
            reader = isolated._READER.process.pid
            if Path(f"/proc/{reader}").exists():
                extra = max(extra, peak(str(reader)) - IDLE)
            isolated._READER.close()
        os.write(write, json.dumps([outcome, seconds, extra]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status or not answer:
        return {"outcome": f"crashed ({status})", "seconds": 0.0, "bytes": 0}
    outcome, seconds, extra = json.loads(answer)
    return {"outcome": outcome, "seconds": seconds, "bytes": extra}


IDLE = 0  # the peak of an isolated process that has read a good file


def idle() -> int:
    """Return the peak memory of an isolated process that has read a good file."""
    from wavg.formats import isolated

    with wavg.open_checkpoint(GOLDEN / "keras3_mlp_1.h5", isolate=True):
        assert isolated._READER.process is not None
        found = peak(str(isolated._READER.process.pid))
    isolated._READER.close()
    return found


def nothing() -> None:
    """Make no preparations."""


def ways(path: str) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    def opened() -> None:
        with wavg.open_checkpoint(path):
            pass

    def isolated() -> None:
        with wavg.open_checkpoint(path, isolate=True):
            pass

    def start() -> None:
        with wavg.open_checkpoint(GOLDEN / "keras3_mlp_1.h5", isolate=True):
            pass  # the process that looks into HDF5 files stays for the next one

    output = os.path.dirname(path) + "/out.npz"
    yield "open", opened, nothing
    yield "load", lambda: wavg.load(path), nothing
    yield "average", lambda: wavg.average_checkpoints([path], output), nothing
    if not path.endswith((".safetensors", ".npz", "index.json")):
        yield "isolated", isolated, start


def main() -> None:
    global IDLE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--names", default="", help="only those with this word in their name")
    parser.add_argument("--no-record", action="store_true", help="only print")
    options = parser.parse_args()
    IDLE = idle()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    wavg.load(GOLDEN / "keras3_tower_1.keras")  # what is imported once is no part of a refusal
    wavg.load(GOLDEN / "keras3_shards_1.weights.json")
    wavg.load(GOLDEN / "keras3_mlp_1.npz")
    wavg.average_checkpoints([GOLDEN / "keras3_mlp_1.h5", GOLDEN / "keras3_mlp_2.h5"])
    rows, bad = [], []
    for form, name, files in bombs():
        if options.names not in f"{form} {name}":
            continue
        folder = options.folder / "bombs"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        size = sum(map(len, files.values()))
        path = str(folder / next(iter(files)))
        found = {way: attempt(work, before) for way, work, before in ways(path)}
        for result in found.values():
            result["outcome"] = result["outcome"].replace(f"{folder}/", "")
        rows.append({"format": form, "name": name, "bytes": size, "ways": found})
        for way, result in found.items():
            refused = "Error: " in result["outcome"] and not result["outcome"].startswith("untyped")
            small = result["seconds"] < SECONDS and result["bytes"] < BYTES and size <= LARGEST
            if not (refused and small):
                bad.append(f"{form}, {name}, {size} bytes, {way}: {result}")
                print("BAD", bad[-1][:400], flush=True)
        assert set(os.listdir(folder)) - {"out.npz"} == set(files)
    worst = [
        max(each[key] for row in rows for each in row["ways"].values())
        for key in ("seconds", "bytes")
    ]
    print(f"{len(rows)} files, {len(bad)} bad; at most {worst[0]:.3f} s, {worst[1]:,} bytes")
    if not options.no_record:
        figures = {"files": rows, "bad": bad}
        record("bombs", "inputs in the page cache", figures)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
