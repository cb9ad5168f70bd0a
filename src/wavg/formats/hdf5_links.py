"""The order in which the members of an HDF5 file were linked, which HDF5's own interface hides.

Keras writes groups of HDF5's old style, which are indexed by name and keep no time of creation.
Their names, though, lie in a local heap that only ever grows at its end: a name's place in the
heap tells when it was linked. Offsets of the data do not: HDF5 fills gaps with small datasets, and
in a file of more than some kilobytes the order of the offsets is another one.

Nothing here touches the HDF5 library. Whatever is not as expected gives no order, and no error:
what is right to read is for others to say. That bytes cannot be read is an error: the same file has
the same order every time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator

__all__ = ["Read", "linked_order"]

Read = Callable[[int, int], bytes]
"""Returns so many bytes from an offset in the file, fewer at its end."""

_SUPERBLOCK = b"\x89HDF\r\n\x1a\n"
_ENTRY = struct.Struct("<QQI4xQQ")  # name's place in the heap, object, kind, B-tree, heap
_IS_GROUP = 1  # of an entry's kinds: it knows its group's B-tree and heap
_DEEPEST, _MOST = 32, 1 << 20  # groups within groups; nodes, and members, of the whole file
_MOST_NAME_BYTES, _LONGEST_NAME = 1 << 26, 1 << 16


class _Unexpected(Exception):
    """The file is not laid out as Keras' are."""


def linked_order(read: Read) -> dict[str, int]:
    """Return the rank of every path in the order of creation, each group before its members.

    Parameters
    ----------
    read
        Gives bytes of the file at an offset.

    Returns
    -------
    dict
        Path, without a leading slash, to rank. Empty where the file does not tell.

    Notes
    -----
    Reads the metadata of groups only: for a file of n members some 100 n bytes.
    """
    try:
        return {path: rank for rank, path in enumerate(_walk(read))}
    except (_Unexpected, struct.error, UnicodeDecodeError, OverflowError):
        return {}


def _walk(read: Read) -> Iterator[str]:
    head = read(0, 96)
    if len(head) < 96 or head[:8] != _SUPERBLOCK or head[8] > 1 or head[13:15] != b"\x08\x08":
        raise _Unexpected
    start = 24 if head[8] == 0 else 28
    base, *_ = struct.unpack_from("<Q", head, start)
    _, _, kind, tree, heap = _ENTRY.unpack_from(head, start + 32)
    if base or kind != _IS_GROUP:
        raise _Unexpected
    nodes = _Nodes(read)  # of no two groups the same, which would make circles
    pending = [iter(nodes.members(tree, heap))]
    prefixes, path_bytes = [""], 0
    while pending:
        member = next(pending[-1], None)
        if member is None:
            pending.pop()
            prefixes.pop()
            continue
        name, kind, tree, heap = member
        path = prefixes[-1] + name
        path_bytes += len(path)
        if path_bytes > _MOST_NAME_BYTES:
            raise _Unexpected
        yield path
        if kind == _IS_GROUP:
            if len(pending) > _DEEPEST:
                raise _Unexpected
            prefixes.append(f"{path}/")
            pending.append(iter(nodes.members(tree, heap)))


class _Nodes:
    """The nodes of a file's groups, each visited once, within one budget for all of them."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._seen: set[int] = set()
        self._entries = _MOST
        self._heap_bytes = self._name_bytes = _MOST_NAME_BYTES

    def members(self, tree: int, heap: int) -> list[tuple[str, int, int, int]]:
        """Return the members of a group as they were linked: name, kind, B-tree and heap."""
        signature, size, data = struct.unpack("<4s4xQ8xQ", self._read(heap, 32))
        self._heap_bytes -= size
        if signature != b"HEAP" or self._heap_bytes < 0:
            raise _Unexpected
        names, members = self._read(data, size), []
        for place, _, kind, its_tree, its_heap in sorted(self._below(tree)):
            end = names.find(b"\0", place, place + _LONGEST_NAME + 1)
            self._name_bytes -= end - place
            if end < 0 or self._name_bytes < 0:
                raise _Unexpected
            members.append((names[place:end].decode(), kind, its_tree, its_heap))
        return members

    def _below(self, tree: int) -> Iterable[tuple[int, int, int, int, int]]:
        """Return the entries below a B-tree's node, whatever their order; no two have one name."""
        found: dict[int, tuple[int, int, int, int, int]] = {}
        pending = [tree]
        while pending:
            node = pending.pop()
            head = self._read(node, 24)
            if node in self._seen or len(self._seen) >= _MOST:
                raise _Unexpected
            self._seen.add(node)
            used = int.from_bytes(head[6:8], "little")
            if head[:4] == b"TREE" and head[4] == 0:
                children = struct.unpack(f"<{2 * used}Q", self._read(node + 24, 16 * used))[1::2]
                pending.extend(children)
            elif head[:4] == b"SNOD":
                self._entries -= used
                if self._entries < 0:
                    raise _Unexpected
                for entry in _ENTRY.iter_unpack(self._read(node + 8, used * _ENTRY.size)):
                    if entry[0] in found:  # as where nodes overlap
                        raise _Unexpected
                    found[entry[0]] = entry
            else:
                raise _Unexpected
        return found.values()
