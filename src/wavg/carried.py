"""The files that an output's folder has of the newest input's, besides weights: which, and as what.

It reads them, and writes none.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from wavg.checkpoint import reading
from wavg.digests import BUFFER_BYTES, unexpected
from wavg.dtypes import lookup
from wavg.formats.folders import beside, retyped
from wavg.plan import Plan

__all__ = ["CarriedFile", "carried_files"]

_LARGEST_CONFIG = 10 << 20


class CarriedFile(NamedTuple):
    """A file to be copied, as it is but for the dtype of the model.

    ``before`` are the dtypes that become ``after``, none where the file stays as it is.
    """

    path: str
    before: tuple[str, ...] = ()
    after: str = ""

    @property
    def name(self) -> str:
        """What it is called, there and here."""
        return os.path.basename(self.path)

    def pieces(self, expected: str | None = None) -> Iterator[bytes]:
        """Yield what the copy consists of, and raise an error if the file is not what it is to be.

        Parameters
        ----------
        expected
            The SHA-256 that the file is to have, compared when all of it is read.

        Raises
        ------
        CheckpointFormatError
            It has another.
        InputError
            The system does not give it, or not all of it.
        """
        digest = hashlib.sha256()
        with reading(self.path), open(self.path, "rb") as file:
            left = os.fstat(file.fileno()).st_size
            whole = bool(self.before) and left <= _LARGEST_CONFIG
            while left:
                data = file.read(left if whole else min(left, BUFFER_BYTES))
                if not data:
                    raise OSError(errno.EIO, "the file became shorter while it was copied")
                left -= len(data)
                if expected is not None:
                    digest.update(data)
                yield retyped(data, self.before, self.after) if whole else data
        if expected is not None and (found := digest.hexdigest()) != expected:
            raise unexpected(self.path, found, expected)


def carried_files(plan: Plan, reference: str) -> list[CarriedFile]:
    """Return the files to be copied from the folder in which the newest input's weights lie.

    Loaders convert weights to the dtype in ``config.json``, so that it follows a change: it stays
    where a carried-over tensor would lose by the new one.
    """
    before = {d.spec.dtype for d in plan.averaged if d.output.dtype != d.spec.dtype}
    after = str(plan.options.dtype)
    if before:
        bits = lookup(after).bits
        carried = [d.spec for d in plan.carried if d.spec.dtype in before]
        before = set() if any(spec.entry.bits > bits for spec in carried) else before
    changed = tuple(sorted(before)), after
    files = map(CarriedFile, beside(reference))
    return [CarriedFile(f.path, *changed) if f.name == "config.json" else f for f in files]
