"""How an output file comes to be: what is carried over, what is new, and where the numbers go.

Most outputs are the reference with its numbers replaced *in place*: a plan of byte ranges that
needs to know no format. A format comes in only where its layout changes.
"""

from __future__ import annotations

import bisect
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from wavg.checkpoint import Checksum, Index, TensorSpec
from wavg.extents import Extent, complement
from wavg.positional import in_pieces, write_exactly

__all__ = ["Part", "Template", "can_patch_in_place", "in_place", "mend"]


class Part(NamedTuple):
    """One of an output's files: its path, its tensors where that matters, and where it is made."""

    path: str
    names: tuple[str, ...] = ()
    temporary: str = ""


class Template(NamedTuple):
    """One output file in the making.

    Attributes
    ----------
    size
        Bytes of the file.
    targets
        For each tensor to be written, its dtype and place in the output.
    pieces
        New bytes, each with its offset.
    carry
        Extents of the reference checkpoint to copy, each with its place in the output.
    finish
        Called with the output's descriptor when all is written (checksums).
    in_place
        Whether the targets lie to each other as the reference has them.
    shift
        How far behind where `targets` says they are: a header has grown.
    """

    size: int
    targets: Mapping[str, TensorSpec]
    pieces: Sequence[tuple[int, bytes]] = ()
    carry: Sequence[tuple[Extent, int]] = ()
    finish: Callable[[int], None] | None = None
    in_place: bool = False
    shift: int = 0


def can_patch_in_place(index: Index, specs: Sequence[TensorSpec], keep_others: bool) -> bool:
    """Whether the numbers of `specs` go where those of the reference lie.

    A spec has an extent, the reference's, where they do; not where its dtype is another.
    """
    return (
        (keep_others or not index.others)
        and None not in [spec.extent for spec in specs]
        and all(checksum.places for checksum in index.checksums)
    )


def in_place(index: Index, specs: Sequence[TensorSpec]) -> list[Template]:
    """Return templates, one a file, of the reference with the numbers of `specs` replaced.

    Every other byte is carried over; checksums of what was replaced are mended.
    """
    templates = []
    for number, identity in enumerate(index.files):
        here = specs
        if len(index.files) > 1:
            here = [spec for spec in specs if spec.extent and spec.extent.file == number]
        targets = {spec.name: spec for spec in here}
        extents = [spec.extent for spec in here if spec.extent]
        touched = _touched([c for c in index.checksums if c.extent.file == number], extents)
        templates.append(
            Template(
                identity.size,
                targets,
                carry=[
                    (extent._replace(file=number), offset)
                    for extent, offset in complement(identity.size, extents)
                ],
                finish=functools.partial(mend, checksums=touched) if touched else None,
                in_place=True,
            )
        )
    return templates


def _touched(checksums: Sequence[Checksum], extents: Iterable[Extent]) -> list[Checksum]:
    """Return the checksums of bytes in which one of the extents begins."""
    if not checksums:
        return []
    starts = sorted(extent.offset for extent in extents)
    return [
        checksum
        for checksum in checksums
        if bisect.bisect_left(starts, checksum.extent.offset)
        < bisect.bisect_left(starts, checksum.extent.offset + checksum.extent.length)
    ]


def mend(descriptor: int, checksums: Iterable[Checksum]) -> None:
    """Compute checksums anew, and write each wherever the file keeps it."""
    for checksum in checksums:
        value = 0
        for data in in_pieces(descriptor, checksum.extent.offset, checksum.extent.length):
            value = zlib.crc32(data, value)
        for place in checksum.places:
            write_exactly(descriptor, value.to_bytes(4, "little"), place)
