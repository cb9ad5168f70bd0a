"""The decision: what is averaged, what is carried over, in which blocks, within how much memory.

Pure functions from indexes and options to a frozen `Plan`. It touches no file.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wavg.alignment import ALIGNMENTS, align
from wavg.checkpoint import Index, TensorSpec
from wavg.dtypes import lookup
from wavg.errors import MemoryBudgetError, WavgError
from wavg.kernel import reads_files, scratch_bytes
from wavg.quantised import refuse_quantised
from wavg.record import STATE_KEY
from wavg.weights import Figures, figures

__all__ = [
    "IN_THE_NUMBERS",
    "RECORDS",
    "Decision",
    "Options",
    "Plan",
    "PlannedInput",
    "Weighting",
    "make_plans",
    "parse_size",
]

RECORDS = ("inputs", "sha256", "none")
IN_THE_NUMBERS = ("dtype", "include", "exclude", "align", "optimizer", "allow_nonfinite")
MIB = 1 << 20
_BLOCK_BYTES = 512 << 10  # read from one input at once: fewer cost more calls, more leave the cache
_UNPACKED_BYTES = 16 << 20  # of compressed tensors: chunks are unpacked whole, for every block
_SMALLEST_BLOCK = 1_024
# Measured by tests/test_memory.py, which fails if a run needs more than its plan says.
_BASE_BYTES = 10 * MIB  # ml_dtypes, tqdm, threads, code paged in
_HDF5_BYTES = 22 * MIB  # h5py and the HDF5 library
_WORKER_BYTES = 1 * MIB  # a thread, and what it holds besides the kernel's scratch
_CREATED_BYTES = 600  # a tensor's part in laying out a new file
_SPEC_BYTES = 900  # an index entry in memory


@dataclass(frozen=True, slots=True)
class Options:
    """What a person may ask of an average; see `wavg.average_checkpoints`."""

    dtype: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    align: str = "name"
    optimizer: str = "carry"
    integers: str = "reference"
    allow_nonfinite: bool = False
    record: str = "inputs"
    max_shard_size: int | None = None
    max_memory: int = 64 * MIB
    workers: int = 1

    def __post_init__(self) -> None:
        if self.align not in ALIGNMENTS:
            raise ValueError(f"align must be 'name' or 'position', not {self.align!r}")
        if self.optimizer not in ("carry", "drop"):
            raise ValueError(f"optimizer must be 'carry' or 'drop', not {self.optimizer!r}")
        if self.integers not in ("reference", "error"):
            raise ValueError(f"integers must be 'reference' or 'error', not {self.integers!r}")
        if self.record not in RECORDS:
            raise ValueError(f"record must be one of {', '.join(RECORDS)}, not {self.record!r}")
        if self.dtype is not None and lookup(self.dtype).kind != "float":
            raise ValueError(f"dtype must be a floating-point format, not {self.dtype!r}")
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise ValueError(f"max_shard_size must be positive, not {self.max_shard_size}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers}")

    def told(self) -> dict[str, Any]:
        """Return those that show in the numbers, where they are not the defaults.

        >>> Options(exclude=("*.bias",), workers=4).told()
        {'exclude': ['*.bias']}
        """
        default = Options()
        pairs = [(name, getattr(self, name), getattr(default, name)) for name in IN_THE_NUMBERS]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value, usual in pairs
            if value != usual
        }


@dataclass(frozen=True, slots=True)
class PlannedInput:
    """One checkpoint's part: its path, its step, and its proportion of the average."""

    path: str
    step: float
    proportion: float


class Decision(NamedTuple):
    """What happens to one tensor.

    Attributes
    ----------
    spec
        The tensor in the reference.
    sources
        The tensor in every layout, the reference's first: `Plan.layouts` tells which an input has.
    action
        ``"average"``, or ``"carry"``: taken from the reference as it is.
    reason
        Why it is carried over; empty for an averaged one.
    output
        The tensor as it is to be written; one of another dtype has no extent yet.
    compare
        Whether the inputs' values are compared, and a difference reported.
    """

    spec: TensorSpec
    sources: tuple[TensorSpec, ...]
    action: str
    reason: str
    output: TensorSpec
    compare: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """Everything decided before the first block is read.

    Attributes
    ----------
    inputs
        Oldest first; the last is the reference.
    schedule, coefficients, figures
        The schedule's text, the unnormalised weights, shape (inputs,), and what to say of them.
    output
        The path to be written; None if the result is arrays.
    layouts
        For each input of the pass, which of a decision's `sources` is its: inputs whose indexes
        are the same share one.
    decisions
        One a tensor, in the reference's order.
    others, keep_others
        Tensors beside the model (optimizer slots), and whether they are kept.
    patches
        Whether the output is the reference file with its numbers replaced.
    options
        What was asked for.
    block, workers
        Elements read at once from each input, and how many blocks are in flight.
    bytes_read, bytes_written
        What the run moves, the reference's carried-over bytes included. Averages made in one pass
        share what is read.
    disk_bytes
        What the output takes on the disk, but for what a new layout adds (headers); 0 for arrays.
    projected_memory
        The promised peak, in bytes beyond the interpreter with ``import wavg``.
    result_bytes
        What comes on top of that where the result is arrays in memory; else 0.
    """

    inputs: tuple[PlannedInput, ...]
    schedule: str
    coefficients: npt.NDArray[np.float64]
    figures: Figures
    output: str | None
    layouts: tuple[int, ...]
    decisions: tuple[Decision, ...]
    others: tuple[TensorSpec, ...]
    keep_others: bool
    patches: bool
    options: Options
    block: int
    workers: int
    bytes_read: int
    bytes_written: int
    disk_bytes: int
    projected_memory: int
    result_bytes: int

    def __repr__(self) -> str:
        return (
            f"<Plan: {self.schedule} weights, {len(self.inputs)} inputs, "
            f"{len(self.averaged)} tensors averaged, {len(self.carried)} carried over>"
        )

    @property
    def averaged(self) -> list[Decision]:
        """The decisions to average."""
        return [decision for decision in self.decisions if decision.action == "average"]

    @property
    def paired(self) -> dict[str, tuple[str, ...]]:
        """Tensors that have other names in other inputs, and these names."""
        names = {
            d.spec.name: tuple(dict.fromkeys(s.name for s in d.sources)) for d in self.decisions
        }
        return {name: found[1:] for name, found in names.items() if len(found) > 1}

    @property
    def carried(self) -> list[Decision]:
        """The decisions to carry over from the reference."""
        return [decision for decision in self.decisions if decision.action == "carry"]


def parse_size(text: str | int) -> int:
    """Read a size in bytes: a number, or one with a unit (``64MiB``, ``1.5GB``).

    >>> parse_size("64MiB"), parse_size("1k"), parse_size(4096)
    (67108864, 1000, 4096)
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write 64MiB, 512MB or a number of bytes")
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _mib(size: int) -> str:
    """Return a size in MiB; a small one is not rounded to nothing."""
    return f"{size / MIB:.0f}" if size >= 10 * MIB else f"{size / MIB:.2g}"


class Weighting(NamedTuple):
    """One average of a pass: a schedule, its weights of the newest inputs, and an output path."""

    schedule: str
    coefficients: npt.NDArray[np.float64]
    output: str | None


def make_plans(
    indexes: Sequence[Index],
    steps: Sequence[float],
    weightings: Sequence[Weighting],
    options: Options,
    *,
    patches: bool,
    output_format: str | None,
) -> list[Plan]:
    """Decide on one or several averages to be made in one pass over the inputs.

    The plans differ in their inputs, which are the newest of the pass's, and in their weights.

    Parameters
    ----------
    indexes
        The inputs, oldest first; the last is the reference.
    steps
        Each input's step.
    weightings
        The averages.
    options
        What was asked for.
    patches
        Whether an output is the reference file with its numbers replaced, rather than a new file.
    output_format
        The name of the outputs' format; None if the result is arrays.

    Raises
    ------
    StructureMismatchError
        Names, shapes or dtypes differ between the inputs; every difference is listed.
    WavgError
        Quantised codes, patterns that match no tensor, an averager's saved state.
    MemoryBudgetError
        Not even the smallest blocks fit `options.max_memory`.
    """
    reference = indexes[-1]
    _refuse_states(indexes)
    in_memory = output_format is None
    layouts, sources = align(indexes, options.align)
    _check_patterns(reference, options)
    decisions, elements = _decide(reference, sources, options)
    if not any(kind.action == "average" for kind in elements):
        raise WavgError(f"{reference.path}: there is no tensor to average")
    averaged = (decision.spec.name for decision in decisions if decision.action == "average")
    refuse_quantised(reference.path, reference.tensors, averaged)
    created = None if patches else output_format
    block, workers, projected = _fit(indexes, elements, options, created, len(weightings))
    keep_others = options.optimizer == "carry" and not in_memory and patches
    read = result = 0
    for kind, count in elements.items():
        readers = len(indexes) if kind.action == "average" or kind.compare else 1
        read += readers * (count * lookup(kind.source).bits // 8)  # the same in every input
        result += count * lookup(kind.target).bits // 8
    read += sum(checksum.extent.length for index in indexes for checksum in index.checksums)
    if options.record == "sha256" and not in_memory:
        read += sum(identity.size for index in indexes for identity in index.files)
    carried = sum(spec.nbytes for spec in reference.others) if keep_others else 0
    disk = result + carried
    if patches:  # the rest of the files stays
        files = sum(identity.size for identity in reference.files)
        specs = [*reference.tensors, *reference.others]
        disk += files - sum(spec.nbytes for spec in specs)
    plans = []
    for schedule, coefficients, output in weightings:
        newest = slice(len(indexes) - len(coefficients), None)
        merit = figures(coefficients, steps[newest])
        parts = zip(indexes[newest], steps[newest], merit.proportions.tolist(), strict=True)
        plans.append(
            Plan(
                inputs=tuple(PlannedInput(index.path, step, part) for index, step, part in parts),
                schedule=schedule,
                coefficients=coefficients,
                figures=merit,
                output=output,
                layouts=layouts,
                decisions=decisions,
                others=reference.others,
                keep_others=keep_others,
                patches=patches,
                options=options,
                block=block,
                workers=workers,
                bytes_read=read + carried,
                bytes_written=0 if in_memory else result + carried,
                disk_bytes=0 if in_memory else max(disk, 0),
                projected_memory=projected,
                result_bytes=result if in_memory else 0,
            )
        )
    return plans


def _refuse_states(indexes: Sequence[Index]) -> None:
    for index in indexes:
        if STATE_KEY in index.metadata:
            raise WavgError(
                f"{index.path} is the saved state of a StreamingAverager, and its sums are no "
                "model; have it write its average: StreamingAverager.load(path).save_average(…)",
                path=index.path,
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    """What is decided for all tensors that are alike."""

    action: str
    reason: str
    source: str
    target: str
    compare: bool

    def output(self, spec: TensorSpec) -> TensorSpec:
        """Return a tensor as it is to be written."""
        return spec._replace(dtype=self.target, extent=None)


def _decide(
    reference: Index, sources: Iterable[tuple[TensorSpec, ...]], options: Options
) -> tuple[tuple[Decision, ...], dict[_Kind, int]]:
    """Return what happens to each tensor, and the elements of each kind in all."""
    kinds = _kinds(reference, options)
    elements = dict.fromkeys(kinds, 0)
    for kind, count in zip(
        kinds, map(math.prod, [s.shape for s in reference.tensors]), strict=True
    ):
        elements[kind] += count
    decisions = []
    for kind, spec, found in zip(kinds, reference.tensors, sources, strict=True):
        output = spec if kind.target == kind.source else kind.output(spec)
        parts = spec, found, kind.action, kind.reason, output, kind.compare
        decisions.append(_new(Decision, parts))
    return tuple(decisions), elements


_new = tuple.__new__  # of very many named tuples: half the time of calling their class


def _kinds(reference: Index, options: Options) -> list[_Kind]:
    """Return each tensor's kind; those that are alike share one."""
    dtypes = [spec.dtype for spec in reference.tensors]
    if not options.include and not options.exclude:
        table = {dtype: _kind(dtype, "", options) for dtype in set(dtypes)}
        return [table[dtype] for dtype in dtypes]
    unchosen = [_why_unchosen(spec.name, options) for spec in reference.tensors]
    alike = list(zip(dtypes, unchosen, strict=True))
    kinds = {key: _kind(*key, options) for key in set(alike)}
    return [kinds[key] for key in alike]


def _why_unchosen(name: str, options: Options) -> str:
    if options.include and not _matches(name, options.include):
        return "not included"
    return "excluded" if _matches(name, options.exclude) else ""


def _kind(dtype: str, unchosen: str, options: Options) -> _Kind:
    entry = lookup(dtype)
    if unchosen:
        return _Kind("carry", unchosen, dtype, dtype, compare=False)
    if not entry.averaged:
        return _Kind("carry", f"{dtype} is not averaged", dtype, dtype, compare=True)
    target = options.dtype if options.dtype and entry.kind == "float" else dtype
    return _Kind("average", "", dtype, target, compare=False)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(reference: Index, options: Options) -> None:
    for pattern in (*options.include, *options.exclude):
        if not any(fnmatch.fnmatchcase(spec.name, pattern) for spec in reference.tensors):
            raise WavgError(
                f"the pattern {pattern!r} matches no tensor of {reference.path}; "
                "`wavg inspect` shows their names"
            )


def _fit(
    indexes: Sequence[Index],
    elements: Mapping[_Kind, int],
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
    if created is not None:
        fixed += _CREATED_BYTES * len(indexes[-1].tensors) * outputs
    total = sum(elements.values())  # neighbours are read as one
    kinds = [kind for kind in elements if kind.action == "average" or kind.compare]
    widest = max(lookup(kind.source).itemsize for kind in kinds if kind.action == "average")
    in_place = all(spec.extent is not None for table in tables for spec in table)
    wanted = max(1, min((_BLOCK_BYTES if in_place else _UNPACKED_BYTES) // widest, total))
    most = max(1, min(options.workers, -(-total // wanted)))
    if not in_place:
        most = 1  # compressed bytes can only be read in their order
    for workers in range(most, 0, -1):
        least = min(wanted, _SMALLEST_BLOCK if workers == 1 else 8 * _SMALLEST_BLOCK)
        halvings = range((wanted // least).bit_length() - 1)
        for block in [*(wanted >> times for times in halvings), least]:
            projected = fixed + workers * _worker_bytes(
                len(indexes), outputs, kinds, block, in_place
            )
            if projected <= options.max_memory:
                return block, workers, projected
    block = min(wanted, _SMALLEST_BLOCK)
    needed = fixed + _worker_bytes(len(indexes), outputs, kinds, block, in_place)
    raise MemoryBudgetError(
        f"averaging {len(indexes)} checkpoints needs at least {_mib(needed)} MiB, and "
        f"{_mib(options.max_memory)} MiB are allowed; allow more with "
        "max_memory (--max-memory)",
        needed=needed,
        allowed=options.max_memory,
    )


def _worker_bytes(
    inputs: int, outputs: int, kinds: Iterable[_Kind], block: int, in_place: bool
) -> int:
    """Bound what one worker holds: a block of every output and, unless the kernel reads, input."""
    buffer = scratch = 0  # a worker keeps the largest buffer, whatever it has in hand
    for kind in kinds:
        source, target = lookup(kind.source), lookup(kind.target)
        if kind.action != "average":
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
