"""Keras' files of HDF5, damaged: whole ones, what is in a ``.keras``, and sharded weights.

The files are those of tests/golden. Used by hdf5_mutations.py.
"""

from __future__ import annotations

import functools
import io
import random
import re
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from mutants import TEXT

import wavg
from wavg.extents import Extent, complement

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
ENDINGS = (".h5", ".weights.h5", ".keras")
SHARDED = "keras3_shards_1.weights.json"
INTERESTING = (0, 1, 2, 3, 7, 8, 16, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 1 << 20, 0x7FFFFFFF)
WEIGHTS, CONFIG, METADATA = "model.weights.h5", "config.json", "metadata.json"


class Mutant(NamedTuple):
    """A file's damage: bytes written over it, and where it is cut off.

    With a `part` it is a member of an archive, or a shard beside the file, that is damaged.
    """

    base: str
    edits: tuple[tuple[int, str], ...]
    length: int | None = None
    part: str = ""

    def content(self) -> bytes:
        """Return the damaged bytes: of the part, if there is one."""
        data = bytearray(part_of(self.base, self.part))
        for offset, text in self.edits:
            new = bytes.fromhex(text)
            data[offset : offset + len(new)] = new
        return bytes(data[: self.length])

    def write(self, folder: Path) -> Path:
        """Write the file, and those beside it that it needs; return its path."""
        path, content = folder / mutant_name(self.base), self.content()
        if self.base.endswith(".keras") and self.part:
            content = with_member(self.base, self.part, content)
        elif self.base == SHARDED:
            for name in shards_of(self.base):
                whole = content if name == self.part else (GOLDEN / name).read_bytes()
                (folder / name).write_bytes(whole)
            if self.part:
                content = (GOLDEN / self.base).read_bytes()
        path.write_bytes(content)
        return path


def mutant_name(base: str) -> str:
    return f"mutant{next(end for end in (*ENDINGS[::-1], '.weights.json') if base.endswith(end))}"


def shards_of(base: str) -> list[str]:
    prefix = base.removesuffix(".weights.json")
    return sorted(path.name for path in GOLDEN.glob(f"{prefix}_0*.weights.h5"))


def part_of(base: str, part: str) -> bytes:
    if base.endswith(".keras") and part:
        with zipfile.ZipFile(GOLDEN / base) as archive:
            return archive.read(part)
    return (GOLDEN / (part or base)).read_bytes()


def with_member(base: str, part: str, content: bytes) -> bytes:
    """Return a sound archive, one member of which is another."""
    out = io.BytesIO()
    with zipfile.ZipFile(GOLDEN / base) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name == part else old.read(name))
    return out.getvalue()


class Base:
    """A good file, or a part of one, and the places in it that are worth damaging."""

    def __init__(self, name: str, part: str = "") -> None:
        self.name, self.part, self.path = name, part, GOLDEN / name
        self.data = part_of(name, part)
        with wavg.open_checkpoint(self.path) as checkpoint:
            self.index = checkpoint.index
        self.format = self.index.format
        specs = (*self.index.tensors, *self.index.others)
        extents = [spec.extent for spec in specs if spec.extent and not part]
        if part.endswith(".h5"):
            extents = extents_of(self.data)
        outside = complement(len(self.data), extents)
        self.places = [
            place
            for (_, offset, length), _ in outside
            for place in range(offset, offset + length)
            if any(self.data[max(0, place - 4) : place + 5])  # most of the rest is zeros
        ]
        texts = re.finditer(rb"[ -~]{40,}", self.data)  # configurations; harmless to change
        dull = {place for text in texts for place in range(*text.span())}
        self.places = [place for place in self.places if place not in dull] or self.places
        names = re.finditer(rb"(?:_names|keras_version|backend|\0name)\0", self.data)
        types = {place for name in names for place in range(name.start() - 28, name.end() + 48)}
        self.types = sorted(types) or self.places

    def mutant(self, rng: random.Random) -> Mutant:
        """Return a file with some of its bytes, or of its text, changed."""
        if (self.part or self.name).endswith(".json"):
            text = self.data.decode()
            for _ in range(rng.choice((1, 1, 2, 3))):
                text = rng.choice(TEXT)(rng, text)
            new = text.encode("utf-8", "surrogatepass")
            return Mutant(self.name, ((0, new.hex()),), len(new), self.part)
        edits = [self._edit(rng) for _ in range(rng.choice((1, 1, 2, 3, 5, 8, 16, 32)))]
        length = rng.randrange(len(self.data)) if rng.random() < 0.03 else None
        return Mutant(self.name, tuple(edits), length, self.part)

    def _edit(self, rng: random.Random) -> tuple[int, str]:
        within = rng.choices((self.places, self.types, range(len(self.data))), (80, 15, 5))[0]
        place = rng.choice(within)
        kind = rng.choice(("flip", "byte", "integer", "integer", "address", "copy", "zeros"))
        if kind == "flip":
            new = bytes([self.data[place] ^ 1 << rng.randrange(8)])
        elif kind == "byte":
            new = rng.randbytes(1)
        elif kind == "copy":
            source = rng.choice(self.places)
            new = self.data[source : source + rng.choice((2, 4, 8, 16, 64, 256))]
        elif kind == "zeros":
            new = bytes(rng.choice((1, 2, 4, 8, 16)))
        else:
            width = rng.choice((1, 2, 4, 8))
            value = (
                rng.choice(INTERESTING) * rng.choice((1, -1))
                if kind == "integer"
                else rng.choice(self.places) & ~7
            )
            place = place & ~(width - 1)  # HDF5's fields are mostly aligned
            new = (value % (1 << 8 * width)).to_bytes(width, "little")
        return place, new[: len(self.data) - place].hex()


def extents_of(weights: bytes) -> list[Extent]:
    """Return where the numbers lie in the bytes of a file of weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.weights.h5"
        path.write_bytes(weights)
        with wavg.open_checkpoint(path) as checkpoint:
            specs = (*checkpoint.index.tensors, *checkpoint.index.others)
            return [spec.extent for spec in specs if spec.extent]


@functools.cache
def whole_files() -> list[Base]:
    """Return the files in which anything is damaged."""
    return [Base(path.name) for end in ENDINGS for path in sorted(GOLDEN.glob(f"*_1{end}"))]


@functools.cache
def parts() -> list[Base]:
    """Return the parts of archives and of sharded weights that are damaged for themselves."""
    archives = [path.name for path in sorted(GOLDEN.glob("*_1.keras"))]
    inner = [Base(name, part) for name in archives for part in (WEIGHTS, WEIGHTS, CONFIG, METADATA)]
    return [*inner, Base(SHARDED), *(Base(SHARDED, name) for name in shards_of(SHARDED))]
