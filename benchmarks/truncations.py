"""Cut files short, everywhere; and change inputs while they are averaged.

    python benchmarks/truncations.py FOLDER [--cuts 1000] [--changes 200]

A small file of each format is cut at every byte, a larger one at so many random places. Opened
and read whole, a cut file must be refused with a `WavgError`. A cut that takes nothing, such as the
line feed at the end of a text, is counted by itself: every tensor is there still, byte for byte.

``--changes``: in the middle of an average, as the kernel begins a random block, an input is
replaced by a file of another content, rewritten in place, cut, touched or removed. The average must
end with a `WavgError` and leave the old output and nothing else. Writes results/truncations.json;
exit code 1 if anything was bad.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import record
from small_runs import GOLDEN, KINDS, Small, model

import wavg
from wavg import kernel

SMALL = {
    ".h5": "keras3_mlp_1.h5",
    ".weights.h5": "keras3_kernels_1.weights.h5",
    ".keras": "keras3_tower_1.keras",
    ".weights.json": "keras3_shards_1.weights.json",
    ".weights.json, its first shard": "keras3_shards_1_00000.weights.h5",
}
LARGE = {
    ".h5": "keras3_nested_1.h5",
    ".weights.h5": "",
    ".keras": "keras3_attention_1.keras",
}


class Subject:
    """A file to be cut, and the checkpoint that it is (a part of)."""

    def __init__(self, path: Path, opened: Path) -> None:
        self.path, self.opened = path, opened
        self.content = path.read_bytes()
        self.tensors = wavg.load(opened)

    def outcome(self, length: int) -> str:
        self.path.write_bytes(self.content[:length])
        try:
            tensors = wavg.load(self.opened)
        except wavg.WavgError:
            return "refused"
        except Exception as error:
            return f"bad: {length} of {len(self.content)}: {type(error).__name__}: {error}"
        same = list(tensors) == list(self.tensors) and all(
            np.array_equal(
                np.asarray(tensors[name]).reshape(-1).view(np.uint8),
                np.asarray(self.tensors[name]).reshape(-1).view(np.uint8),
            )
            for name in tensors
        )
        return "nothing lost" if same else f"bad: {length} of {len(self.content)}: other numbers"

    def all(self, lengths: Iterator[int] | range) -> dict:
        counts: collections.Counter[str] = collections.Counter()
        bad = []
        unseen = []
        for length in lengths:
            outcome = self.outcome(length)
            counts[outcome.partition(":")[0]] += 1
            if outcome == "nothing lost":
                unseen.append(length - len(self.content))
            if outcome.startswith("bad"):
                bad.append(outcome)
        self.path.write_bytes(self.content)
        assert len(wavg.load(self.opened)) == len(self.tensors)
        counts.setdefault("refused", 0)
        return {
            "bytes": len(self.content),
            "cuts": counts.total(),
            **counts,
            "nothing lost at": unseen[:5],
            "bad": len(bad),
            "examples": bad[:5],
        }


def tiny() -> dict[str, np.ndarray]:
    return {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.float16([1, 2, 3])}


def subjects(folder: Path, *, large: bool) -> Iterator[tuple[str, Subject]]:
    """Make a file of each format; of one in several files, one of each kind."""
    folder.mkdir(parents=True)
    tensors = model(0) if large else tiny()
    for suffix in (".safetensors", ".npz"):
        path = folder / f"model{suffix}"
        wavg.save(path, tensors)
        yield suffix, Subject(path, path)
    path = folder / "packed.npz"
    np.savez_compressed(path, **tensors)
    yield ".npz, deflated", Subject(path, path)
    source = folder / "one"
    source.mkdir()
    wavg.save(source / "model.safetensors", tensors, metadata={"format": "pt"})
    (source / "config.json").write_text("{}")
    shards = folder / "shards"
    wavg.average_checkpoints(
        [str(source)], f"{shards}/", max_shard_size=48 if not large else "200KB"
    )
    index = shards / "model.safetensors.index.json"
    yield "index of safetensors", Subject(index, index)
    yield "safetensors shard", Subject(min(shards.glob("*.safetensors")), index)
    for name, file in (LARGE if large else SMALL).items():
        if not file:
            path = folder / f"large{name}"
            wavg.save(path, tensors)
            yield name, Subject(path, path)
            continue
        if name.startswith(".weights.json") and not (folder / SMALL[".weights.json"]).exists():
            for each in GOLDEN.glob("keras3_shards_1*"):
                if each.suffix != ".npz":
                    shutil.copy(each, folder)
        else:
            shutil.copy(GOLDEN / file, folder)
        whole = SMALL[".weights.json"] if name.startswith(".weights.json") else file
        yield name, Subject(folder / file, folder / whole)


class Change:
    """Changes an input at the n-th look that the kernel takes at the numbers."""

    def __init__(self, path: Path, other: Path, what: str, number: int) -> None:
        self.path, self.other, self.what, self.left = path, other, what, number
        self.lock = threading.Lock()
        self.done = False

    def __call__(self) -> None:
        with self.lock:
            self.left -= 1
            if self.left == 0:
                self.change()
                self.done = True

    def change(self) -> None:
        size = self.path.stat().st_size
        if self.what == "touched":
            os.utime(self.path)
        elif self.what == "cut":
            os.truncate(self.path, random.Random(self.left).randrange(size))
        elif self.what == "rewritten":
            with open(self.path, "r+b") as file:
                file.seek(size // 2)
                file.write(b"other numbers")
        elif self.what == "removed":
            self.path.unlink()
        else:  # replaced, as wavg or a careful framework does
            other = self.path.with_suffix(".new")
            shutil.copy(self.other, other)
            os.replace(other, self.path)


CHANGES = ("replaced", "rewritten", "cut", "touched", "removed")


def changes(small: Small, count: int, rng: random.Random) -> dict:
    counts: collections.Counter[str] = collections.Counter()
    bad = []
    files = [Path(path) for path in small.inputs]
    files = [path / "model.safetensors" if path.is_dir() else path for path in files]
    kept = {path: (path.read_bytes(), path.stat()) for path in files}
    whole = kernel.Combiner.__call__, kernel.Combiner.from_files
    looks = Change(files[0], files[1], "", 0)
    looks.change = lambda: None  # type: ignore[method-assign]

    def watched(change: Change) -> None:
        def called(self, block, outs):
            change()
            whole[0](self, block, outs)

        def from_files(self, descriptors, offsets, outs):
            change()
            whole[1](self, descriptors, offsets, outs)

        kernel.Combiner.__call__, kernel.Combiner.from_files = called, from_files  # type: ignore

    watched(looks)
    small.run()
    most = -looks.left
    small.restore()
    for turn in range(count):
        what = CHANGES[turn % len(CHANGES)]
        change = Change(*rng.sample(files, 2), what, rng.randint(1, most))
        watched(change)
        try:
            small.run()
            outcome = "done"
        except wavg.WavgError as error:
            outcome = type(error).__name__
        except Exception as error:
            outcome = f"bad: {type(error).__name__}: {error}"
        state, strays = small.state()
        if (outcome == "done") or state != "old" or strays or not change.done:
            outcome = f"bad: {outcome}, {state}, {strays} temporaries, changed: {change.done}"
        counts[f"{what}: {outcome}" if "bad" not in outcome else "bad"] += 1
        if "bad" in outcome:
            bad.append(f"{what}: {outcome}")
        for path, (data, status) in kept.items():
            path.write_bytes(data)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        small.restore()
    kernel.Combiner.__call__, kernel.Combiner.from_files = whole  # type: ignore[method-assign]
    return {"changes": count, **dict(sorted(counts.items())), "bad": len(bad), "examples": bad[:5]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cuts", type=int, default=1000, help="of a larger file")
    parser.add_argument("--step", type=int, default=1, help="only every so many bytes")
    parser.add_argument("--changes", type=int, default=200, help="of inputs, for each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="only print")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    figures: dict[str, dict] = {"small": {}, "large": {}, "changes": {}}
    for size in ("small", "large"):
        shutil.rmtree(options.folder / size, ignore_errors=True)
        for name, subject in subjects(options.folder / size, large=size == "large"):
            length = len(subject.content)
            cuts = (
                range(0, length, options.step)
                if size == "small"
                else sorted(rng.sample(range(length), min(length, options.cuts)))
            )
            figures[size][name] = subject.all(cuts)
            print(f"{size} {name}: {figures[size][name]}", flush=True)
    for kind in KINDS:
        small = Small(kind, options.folder / "changes")
        figures["changes"][kind.name] = changes(small, options.changes, rng)
        print(f"changes, {kind.name}: {figures['changes'][kind.name]}", flush=True)
    if not options.no_record:
        record("truncations", "inputs in the page cache", figures)
    sys.exit(any(row["bad"] for part in figures.values() for row in part.values()))


if __name__ == "__main__":
    main()
