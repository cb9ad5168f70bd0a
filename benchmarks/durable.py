"""A disk as a loss of power may leave it: what was not synced is there or not, in any mixture.

The model is the worst that POSIX allows, as on a file system without a journal. A file's data are
durable when that file was synced, its name when the folder was. What came later may be there
without what came before, a name without the data behind it. Of a write there may be a part, or
junk in its place. One call on a folder happens whole or not at all: a rename, an exchange.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

ROOT = ""  # the folder in which everything happens
KEPT, JUNK = "kept", "junk"  # of what is pending; an int keeps that many bytes of a write
Choice: TypeAlias = "str | int"
Choices: TypeAlias = Mapping[int, Choice]  # by the number of the effect; what is not there is lost
MOST_TOGETHER: Final = 6  # pending calls on folders of which every subset is tried
RANDOM_SUBSETS: Final = 200  # or fewer, where little is pending
_OTHERS = bytes(0xA5 ^ byte for byte in range(256))


class Made(NamedTuple):
    """A new, empty file or folder."""

    path: str
    node: str
    mode: int
    folder: bool = False


class Written(NamedTuple):
    """Bytes at an offset of a file."""

    node: str
    offset: int
    data: bytes


class Resized(NamedTuple):
    """Another length of a file; what is new of it is zeros."""

    node: str
    size: int


class Moded(NamedTuple):
    """Another mode of a file or folder."""

    node: str
    mode: int


class Linked(NamedTuple):
    """A second name of a file."""

    old: str
    new: str


class Removed(NamedTuple):
    """A name less, of a file or an empty folder."""

    path: str


class Renamed(NamedTuple):
    """Another name, whose bearer is replaced, or gets the old one in exchange."""

    old: str
    new: str
    exchange: bool = False


class Synced(NamedTuple):
    """A sync that came back, of what had been done when it began: so many effects."""

    node: str
    begun: int
    data_only: bool = False


Effect: TypeAlias = "Made | Written | Resized | Moded | Linked | Removed | Renamed | Synced"


class Edit(NamedTuple):
    """What a call does to the names of a folder, at one instant; None removes."""

    folder: str
    names: dict[str, str | None]


class File(NamedTuple):
    """What a file holds, and its mode; a folder holds nothing here."""

    data: bytes
    mode: int


class Version(NamedTuple):
    """A file with what has been kept of the effects on it."""

    node: str
    kept: tuple[tuple[int, Choice], ...]


@dataclass(eq=False)
class Operation:
    """An effect on one file or folder, which a sync makes durable."""

    number: int
    what: Written | Resized | Moded | Edit
    durable: bool = False


class Disk:
    """What is on a disk for certain, and what is pending.

    It begins with files that are durable, by their paths; those of folders end with a slash.
    """

    def __init__(self, standing: Mapping[str, File]) -> None:
        self._files = dict(standing)  # by node: what stood there is called by its path
        self._folders: dict[str, dict[str, str]] = {ROOT: {}}
        self._operations: dict[str, list[Operation]] = {ROOT: []}
        self._done = 0
        for path in sorted(standing):  # a folder before what is in it
            folder, name = self._place(path.rstrip("/"))
            self._folders[folder][name] = path
            self._operations[path] = []
            if path.endswith("/"):
                self._folders[path] = {}

    @property
    def pending(self) -> list[Operation]:
        """Every operation that is not durable, in the order in which they were done."""
        each = itertools.chain.from_iterable(self._operations.values())
        return sorted((one for one in each if not one.durable), key=lambda one: one.number)

    def apply(self, effect: Effect) -> None:
        """Let something happen."""
        match effect:
            case Synced(node, begun, data_only):
                for one in self._operations[node]:
                    if one.number < begun and not (data_only and isinstance(one.what, Moded)):
                        one.durable = True
            case Written(node) | Resized(node) | Moded(node):
                self._operations[node].append(Operation(self._done, effect))
            case Made(path, node, mode, folder):
                self._files[node], self._operations[node] = File(b"", mode), []
                if folder:
                    self._folders[node] = {}
                self._edit(self._place(path), node)
            case Linked(old, new):
                self._edit(self._place(new), self._node(old))
            case Removed(path):
                self._edit(self._place(path), None)
            case Renamed(old, new, exchange):
                self._rename(old, new, exchange)
        self._done += 1

    def _rename(self, old: str, new: str, exchange: bool) -> None:
        (folder, name), (other, new_name) = self._place(old), self._place(new)
        if folder != other:  # which of the two a sync would make durable is not known
            raise ValueError(f"{old} is renamed into another folder, {new}")
        moved = self._node(old)
        replaced = self._node(new) if exchange else None
        if exchange or moved != self._entries(folder).get(new_name):  # else POSIX does nothing
            self._operations[folder].append(
                Operation(self._done, Edit(folder, {name: replaced, new_name: moved}))
            )

    def _edit(self, place: tuple[str, str], node: str | None) -> None:
        folder, name = place
        self._operations[folder].append(Operation(self._done, Edit(folder, {name: node})))

    def _place(self, path: str) -> tuple[str, str]:
        above, _, name = path.rpartition("/")
        return (self._node(above) if above else ROOT), name

    def _node(self, path: str) -> str:
        folder, name = self._place(path)
        return self._entries(folder)[name]

    def _entries(self, folder: str, choices: Choices | None = None) -> dict[str, str]:
        """Return what a folder holds with some of what is pending; with all of it, if not said."""
        found = dict(self._folders[folder])
        for one in self._operations[folder]:
            if isinstance(one.what, Edit) and (
                one.durable or choices is None or choices.get(one.number) == KEPT
            ):
                for name, node in one.what.names.items():
                    if node is None:
                        found.pop(name, None)
                    else:
                        found[name] = node
        return found

    def seen(self, choices: Choices | None = None) -> dict[str, Version]:
        """Return what is there with some of what is pending, or with all of it, by path."""
        found: dict[str, Version] = {}

        def walk(folder: str, prefix: str) -> None:
            for name, node in self._entries(folder, choices).items():
                if node in self._folders:
                    found[f"{prefix}{name}/"] = self._version(node, choices)
                    walk(node, f"{prefix}{name}/")
                else:
                    found[f"{prefix}{name}"] = self._version(node, choices)

        walk(ROOT, "")
        return found

    def _version(self, node: str, choices: Choices | None) -> Version:
        kept: list[tuple[int, Choice]] = []
        for one in self._operations[node]:
            if not isinstance(one.what, Edit):
                if one.durable or choices is None:
                    kept.append((one.number, KEPT))
                elif one.number in choices:
                    kept.append((one.number, choices[one.number]))
        return Version(node, tuple(kept))

    def file(self, version: Version) -> File:
        """Return what a file holds in a version of it."""
        data, mode = bytearray(self._files[version.node].data), self._files[version.node].mode
        kept = dict(version.kept)
        for one in self._operations[version.node]:
            match one.what, kept.get(one.number):
                case _, None:
                    pass
                case Moded(_, new), _:
                    mode = new
                case Resized(_, size), _:
                    del data[size:]
                    data.extend(bytes(size - len(data)))
                case Written(_, offset, new), choice:
                    part = new.translate(_OTHERS) if choice == JUNK else new
                    part = part[:choice] if isinstance(choice, int) else part
                    data.extend(bytes(max(0, offset - len(data))))
                    data[offset : offset + len(part)] = part
        return File(bytes(data), mode)


def crashes(pending: Sequence[Operation], rng: random.Random) -> Iterator[tuple[str, Choices]]:
    """Yield what a loss of power may leave of what is pending, each with its kind."""
    numbers = [one.number for one in pending]
    everything: dict[int, Choice] = dict.fromkeys(numbers, KEPT)
    names = [one.number for one in pending if isinstance(one.what, Edit)]
    writes = {one.number: len(one.what.data) for one in pending if isinstance(one.what, Written)}
    data: dict[int, Choice] = {n: KEPT for n in numbers if n not in set(names)}
    junk: dict[int, Choice] = {**data, **dict.fromkeys(writes, JUNK)}
    yield "all lost", {}
    yield "all kept", everything
    for count in range(1, len(numbers)):
        yield "the first ones kept", dict.fromkeys(numbers[:count], KEPT)
    yield "names kept, data lost", dict.fromkeys(names, KEPT)
    yield "names kept, data junk", junk | dict.fromkeys(names, KEPT)
    yield "data kept, names lost", data
    for number in numbers:
        yield "one lost", {n: KEPT for n in numbers if n != number}
        yield "only one kept", {number: KEPT}
    for number, size in writes.items():
        for part in sorted({1, size // 2 // 512 * 512, size - 1} & set(range(1, size))):
            yield "a write in part", everything | {number: part}
    if len(names) <= MOST_TOGETHER:
        for some in itertools.product((False, True), repeat=len(names)):
            chosen: dict[int, Choice] = {
                n: KEPT for n, kept in zip(names, some, strict=True) if kept
            }
            for kept in ({}, data, junk):
                yield "every subset of names", kept | chosen
    for _ in range(min(RANDOM_SUBSETS, 4 ** len(numbers))):
        share = rng.random()
        drawn = {n: rng.choice((KEPT, JUNK)) if n in writes else KEPT for n in numbers}
        yield "at random", {n: c for n, c in drawn.items() if rng.random() < share}
