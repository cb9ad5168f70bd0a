"""Checksums and digests of the inputs' bytes, taken as the inputs are streamed.

Files are read from their beginning to their end, just ahead of what is averaged: a disk gives its
bytes once, and the blocks that follow come from the system's cache. It knows nothing of tensors.
"""

from __future__ import annotations

import abc
import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from wavg.checkpoint import Checkpoint, Checksum, reading
from wavg.errors import CheckpointFormatError
from wavg.extents import Extent
from wavg.positional import read_exactly

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["BUFFER_BYTES", "Digest", "Digests", "unexpected", "verify_checksums"]

BUFFER_BYTES = 256 << 10  # read at once, by each worker
Digest: TypeAlias = "str | dict[str, str]"  # of a file; of several, that of each by its name


class Digests:
    """Compares checkpoints with the checksums they keep, and on request makes their SHA-256.

    Use it in a ``with`` statement.

    Parameters
    ----------
    checkpoints
        They have to be open.
    workers
        How many threads read.
    sha256
        Whether a SHA-256 is made of every file.
    expected
        Returns what that of a path is to be.

    Examples
    --------
    >>> import numpy as np, tempfile, wavg
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> wavg.save(path, {"kernel": np.zeros((2, 3), np.float32)})
    >>> with wavg.open_checkpoint(path) as checkpoint:
    ...     with Digests([checkpoint], workers=1, sha256=True) as digests:
    ...         (digest,) = digests.finish()
    >>> len(digest)
    64
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        workers: int,
        *,
        sha256: bool = False,
        expected: Callable[[str], str] | None = None,
    ) -> None:
        self._checkpoints, self._workers = checkpoints, workers
        sha256 = sha256 or expected is not None
        self._stop = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._checks: dict[tuple[int, int], list[_Check]] = {}  # by file; the first is the last
        self._hashes: dict[tuple[int, int], _Hash] = {}
        for number, checkpoint in enumerate(checkpoints):
            checksums = checkpoint.index.checksums
            for checksum in sorted(checksums, key=lambda each: each.extent.offset, reverse=True):
                file = number, checksum.extent.file
                self._checks.setdefault(file, []).append(_Check(checkpoint, checksum))
            for place in range(len(checkpoint.index.files) if sha256 else 0):
                self._hashes[number, place] = _Hash(checkpoint, place, expected)

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *_: object) -> None:
        """Return when nobody reads any more: soon after Ctrl-C, and before files are closed."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __bool__(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._checks or self._hashes)

    def reach(self, ends: Iterable[tuple[int, int, int]]) -> None:
        """Read on at least to these places: number of a checkpoint, of its file, an offset.

        Raises
        ------
        CheckpointFormatError
            Bytes are not those that a checksum was made of, or a file's SHA-256 not the expected.
        CheckpointChangedError
            The same, and the file is another than it was.
        """
        furthest: dict[tuple[int, int], int] = {}
        for number, file, end in ends:
            furthest[number, file] = max(end, furthest.get((number, file), 0))
        self._advance(furthest, self._hashes)

    def _advance(
        self, ends: Mapping[tuple[int, int], int], hashes: Mapping[tuple[int, int], _Hash]
    ) -> None:
        work: list[tuple[_Passage, int]] = []
        for place, end in ends.items():
            whole = hashes.get(place)
            if whole is not None and whole.position < end:
                work.append((whole, end))
            checks = self._checks.get(place, [])
            for check in reversed(checks):
                if check.position >= end:
                    break
                work.append((check, end))
            while checks and checks[-1].end <= end:
                checks.pop()
        if len(work) == 1:
            work[0][0].advance(work[0][1], self._stop)
        elif work:
            if self._pool is None:
                from concurrent.futures import ThreadPoolExecutor

                self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="wavg-digest")
            for _ in self._pool.map(lambda part: part[0].advance(part[1], self._stop), work):
                pass  # what one raises is raised here

    def finish(self) -> list[Digest | None]:
        """Read what is left; return each checkpoint's SHA-256, or None where none was asked for.

        Raises
        ------
        CheckpointFormatError, CheckpointChangedError
            As by `reach`.
        """
        self._advance(self._sizes(), self._hashes)
        return self.values()

    def judge(self) -> None:
        """Compare all that is to be compared, and read nothing else.

        Raises
        ------
        CheckpointFormatError, CheckpointChangedError
            As by `reach`.
        """
        expected = {place: each for place, each in self._hashes.items() if each.expected}
        judged = self._checks.keys() | expected.keys()
        self._advance({p: size for p, size in self._sizes().items() if p in judged}, expected)

    def _sizes(self) -> dict[tuple[int, int], int]:
        return {
            (number, file): identity.size
            for number, checkpoint in enumerate(self._checkpoints)
            for file, identity in enumerate(checkpoint.index.files)
        }

    def values(self) -> list[Digest | None]:
        """Return what `finish` does, of the bytes read so far."""
        return [self._digest(number) for number in range(len(self._checkpoints))]

    def _digest(self, number: int) -> Digest | None:
        if not self._hashes:
            return None
        files = self._checkpoints[number].index.files
        found = {
            os.path.basename(identity.path): self._hashes[number, file].digest.hexdigest()
            for file, identity in enumerate(files)
        }
        return found if len(files) > 1 else found.popitem()[1]


def verify_checksums(checkpoints: Sequence[Checkpoint], workers: int) -> None:
    """Compare what files record of their own bytes with these, several at a time."""
    with Digests(checkpoints, workers) as digests:
        digests.finish()


def unexpected(path: str, found: str, expected: str) -> CheckpointFormatError:
    """Return the error of a file that has another SHA-256 than it is to have."""
    return CheckpointFormatError(
        f"{path} is another file than expected, or damaged: its SHA-256 is {found}, "
        f"expected {expected}; copy it again, or ask whoever made the list",
        path=path,
    )


class _Passage(abc.ABC):
    """A part of an open file, read from its beginning to its end, in one go or in several."""

    def __init__(self, checkpoint: Checkpoint, extent: Extent) -> None:
        self.position, self.end = extent.offset, extent.offset + extent.length
        self._checkpoint, self._descriptor = checkpoint, checkpoint.descriptor(extent.file)
        self._path = checkpoint.index.files[extent.file].path

    def advance(self, end: int, stop: threading.Event) -> None:
        """Read on to `end`, or as far as the file goes, or until `stop` is set."""
        end = min(end, self.end)
        buffer = np.empty(min(BUFFER_BYTES, end - self.position), np.uint8)
        with reading(self._path):
            while self.position < end and not stop.is_set():
                part = buffer[: end - self.position]
                if not read_exactly(self._descriptor, self.position, part):
                    break
                self.position += len(part)
                self.update(part.data)

    @abc.abstractmethod
    def update(self, data: memoryview) -> None:
        """Take in the bytes that come next."""


class _Hash(_Passage):
    """A file on its way to a SHA-256; one that ends early is seen to have changed."""

    def __init__(
        self, checkpoint: Checkpoint, file: int, expected: Callable[[str], str] | None
    ) -> None:
        super().__init__(checkpoint, Extent(file, 0, checkpoint.index.files[file].size))
        self.digest = hashlib.sha256()
        self.expected = expected and expected(self._path)

    def advance(self, end: int, stop: threading.Event) -> None:
        super().advance(end, stop)
        if self.expected is None or self.position < self.end:
            return
        if (found := self.digest.hexdigest()) != self.expected:
            self._checkpoint.verify_unchanged()
            raise unexpected(self._path, found, self.expected)

    def update(self, data: memoryview) -> None:
        self.digest.update(data)


class _Check(_Passage):
    """What a file's checksum is of; judged when it is read, or the file has ended."""

    def __init__(self, checkpoint: Checkpoint, checksum: Checksum) -> None:
        super().__init__(checkpoint, checksum.extent)
        self._checksum, self._value = checksum, 0

    def advance(self, end: int, stop: threading.Event) -> None:
        super().advance(end, stop)
        cut = self.position < min(end, self.end)
        wrong = self.position == self.end and self._value != self._checksum.value
        if (cut or wrong) and not stop.is_set():
            self._checkpoint.verify_unchanged()
            raise CheckpointFormatError(
                f"{self._path}: {self._checksum.name} is damaged: its bytes do not give the CRC-32 "
                "that the file records for them",
                path=self._path,
            )

    def update(self, data: memoryview) -> None:
        self._value = zlib.crc32(data, self._value)
