"""Blocks and workers that fit the memory allowed, and the projected memory: the peak they promise.

It knows what each part of a run holds, as tests/test_memory.py measures it, and reads no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from wavg.checkpoint import Index
from wavg.decisions import Kind
from wavg.dtypes import lookup
from wavg.errors import MemoryBudgetError
from wavg.kernel import reads_files, scratch_bytes
from wavg.options import MIB, Options

__all__ = ["fit"]

_BLOCK_BYTES = 512 << 10  # read from one input at once: fewer cost more calls, more leave the cache
_UNPACKED_BYTES = 16 << 20  # of compressed tensors: chunks are unpacked whole, for every block
_SMALLEST_BLOCK = 1_024
# Measured by tests/test_memory.py, which fails if a run needs more than its plan says.
_BASE_BYTES = 10 * MIB  # ml_dtypes, tqdm, threads, code paged in
_HDF5_BYTES = 22 * MIB  # h5py and the HDF5 library
_WORKER_BYTES = 1 * MIB  # a thread, and what it holds besides the kernel's scratch
_DIGEST_BYTES = 1 * MIB // 2  # a thread that reads ahead, and its buffer
_CREATED_BYTES = 600  # a tensor's part in laying out a new file
_SPEC_BYTES = 900  # an index entry in memory


def fit(
    indexes: Sequence[Index],
    elements: Mapping[Kind, int],
    options: Options,
    created: str | None,
    outputs: int,
) -> tuple[int, int, int]:
    """Choose block and workers for the budget; return them with the projected memory."""
    tables = {id(index.tensors): index.tensors for index in indexes}.values()
    others = {id(index.others): index.others for index in indexes}.values()
    fixed = _BASE_BYTES + _SPEC_BYTES * sum(map(len, (*tables, *others)))
    if any(name and name.startswith("keras") for name in (created, indexes[-1].format)):
        fixed += _HDF5_BYTES + sum(index.reader_bytes for index in indexes)
        if created is None:  # an output in place is looked into before it appears
            fixed += _SPEC_BYTES * (len(indexes[-1].tensors) + len(indexes[-1].others))
    if created is not None:
        fixed += _CREATED_BYTES * len(indexes[-1].tensors) * outputs
    passed = options.digests or any(index.checksums for index in indexes)
    beside = _DIGEST_BYTES if passed else 0
    total = sum(elements.values())  # neighbours are read as one
    kinds = [kind for kind in elements if kind.averaged or kind.compare]
    widest = max(lookup(kind.source).itemsize for kind in kinds if kind.averaged)
    in_place = all(spec.extent is not None for table in tables for spec in table)
    wanted = max(1, min((_BLOCK_BYTES if in_place else _UNPACKED_BYTES) // widest, total))
    most = max(1, min(options.workers, -(-total // wanted)))
    if not in_place:
        most = 1  # compressed bytes can only be read in their order
    for workers in range(most, 0, -1):
        least = min(wanted, _SMALLEST_BLOCK if workers == 1 else 8 * _SMALLEST_BLOCK)
        halvings = range((wanted // least).bit_length() - 1)
        for block in [*(wanted >> times for times in halvings), least]:
            projected = fixed + workers * (
                beside + _worker_bytes(len(indexes), outputs, kinds, block, in_place)
            )
            if projected <= options.max_memory:
                return block, workers, projected
    raise MemoryBudgetError(
        f"averaging {len(indexes)} checkpoints needs at least {_mib(projected)} MiB, and "
        f"{_mib(options.max_memory)} MiB are allowed; allow more with "
        "max_memory (--max-memory)",
        needed=projected,
        allowed=options.max_memory,
    )


def _worker_bytes(
    inputs: int, outputs: int, kinds: Iterable[Kind], block: int, in_place: bool
) -> int:
    """Bound what one worker holds: a block of every output and, unless the kernel reads, input."""
    buffer = scratch = 0  # a worker keeps the largest buffer, whatever it has in hand
    for kind in kinds:
        source, target = lookup(kind.source), lookup(kind.target)
        if not kind.averaged:
            buffer = max(buffer, 2 * block * max(1, source.itemsize))
            continue
        formats = source.component, target.component
        for reads in {reads_files(*formats), in_place and reads_files(*formats)}:
            taken = outputs * target.itemsize + (0 if reads else inputs * source.itemsize)
            buffer = max(buffer, block * taken)
            scratch = max(
                scratch, scratch_bytes(inputs, outputs, *formats, block, from_files=reads)
            )
    return _WORKER_BYTES + buffer + scratch


def _mib(size: int) -> str:
    """Return a size in MiB; a small one is not rounded to nothing."""
    return f"{size / MIB:.0f}" if size >= 10 * MIB else f"{size / MIB:.2g}"
