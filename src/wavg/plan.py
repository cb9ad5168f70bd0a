"""The decision: what is averaged, what is carried over, in which blocks, within how much memory.

Pure functions from indexes and options to a frozen `Plan`. It touches no file.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wavg.checkpoint import Index, TensorSpec
from wavg.dtypes import lookup
from wavg.errors import MemoryBudgetError, StructureMismatchError, WavgError
from wavg.kernel import reads_files, scratch_bytes
from wavg.weights import Figures, figures

__all__ = [
    "Decision",
    "Options",
    "Plan",
    "PlannedInput",
    "Weighting",
    "make_plans",
    "parse_size",
]

MIB = 1 << 20
_BLOCK_BYTES = 512 << 10  # read from one input at once: fewer cost more calls, more leave the cache
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
    optimizer: str = "carry"
    integers: str = "reference"
    allow_nonfinite: bool = False
    max_memory: int = 64 * MIB
    workers: int = 1

    def __post_init__(self) -> None:
        if self.optimizer not in ("carry", "drop"):
            raise ValueError(f"optimizer must be 'carry' or 'drop', not {self.optimizer!r}")
        if self.integers not in ("reference", "error"):
            raise ValueError(f"integers must be 'reference' or 'error', not {self.integers!r}")
        if self.dtype is not None and lookup(self.dtype).kind != "float":
            raise ValueError(f"dtype must be a floating-point format, not {self.dtype!r}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers}")


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
        The tensor in every input, oldest first.
    action
        ``"average"``, or ``"carry"``: taken from the reference as it is.
    reason
        Why it is carried over; empty for an averaged one.
    output
        The tensor as it is to be written.
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
    decisions: tuple[Decision, ...]
    others: tuple[TensorSpec, ...]
    keep_others: bool
    patches: bool
    options: Options
    block: int
    workers: int
    bytes_read: int
    bytes_written: int
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
        Quantised codes, patterns that match no tensor.
    MemoryBudgetError
        Not even the smallest blocks fit `options.max_memory`.
    """
    reference = indexes[-1]
    in_memory = output_format is None
    sources = _align(indexes)
    _check_patterns(reference, options)
    decisions = tuple(_decide(spec, sources[spec.name], options) for spec in reference.tensors)
    if not any(decision.action == "average" for decision in decisions):
        raise WavgError(f"{reference.path}: there is no tensor to average")
    _refuse_quantised(reference, decisions)
    created = None if patches else output_format
    block, workers, projected = _fit(indexes, decisions, options, created, len(weightings))
    keep_others = options.optimizer == "carry" and not in_memory and patches
    read = result = 0
    for decision in decisions:
        size = decision.spec.nbytes  # the same in every input
        everywhere = decision.action == "average" or decision.compare
        read += size * (len(indexes) if everywhere else 1)
        result += size if decision.output is decision.spec else decision.output.nbytes
    read += sum(checksum.extent.length for index in indexes for checksum in index.checksums)
    carried = sum(spec.nbytes for spec in reference.others) if keep_others else 0
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
                decisions=decisions,
                others=reference.others,
                keep_others=keep_others,
                patches=patches,
                options=options,
                block=block,
                workers=workers,
                bytes_read=read + carried,
                bytes_written=0 if in_memory else result + carried,
                projected_memory=projected,
                result_bytes=result if in_memory else 0,
            )
        )
    return plans


def _align(indexes: Sequence[Index]) -> dict[str, tuple[TensorSpec, ...]]:
    """Match tensors by name; list every difference of the inputs to the reference."""
    reference = indexes[-1]
    distinct = {id(index.tensors): index.tensors for index in indexes}
    by_name = {key: {spec.name: spec for spec in table} for key, table in distinct.items()}
    tables = [by_name[id(index.tensors)] for index in indexes]
    differences: list[str] = []
    for index, table in zip(indexes[:-1], tables[:-1], strict=True):
        if table is tables[-1]:
            continue
        if index.format != reference.format:
            differences.append(f"{index.path}: {index.format}, not {reference.format}")
            continue
        for name, spec in tables[-1].items():
            found = table.get(name)
            if found is None:
                differences.append(f"{index.path}: lacks {name} ({spec.describe()})")
            elif found.describe() != spec.describe():
                differences.append(
                    f"{index.path}: {name} is {found.describe()}, not {spec.describe()}"
                )
        differences += [
            f"{index.path}: also has {name} ({spec.describe()})"
            for name, spec in table.items()
            if name not in tables[-1]
        ]
    if differences:
        raise StructureMismatchError(
            f"{_count_of(differences)} between the inputs and the newest, {reference.path}:\n  "
            + "\n  ".join(differences),
            differences=differences,
        )
    if all(table is tables[-1] for table in tables):
        return {spec.name: (spec,) * len(tables) for spec in reference.tensors}
    return {spec.name: tuple(table[spec.name] for table in tables) for spec in reference.tensors}


def _count_of(differences: Sequence[str]) -> str:
    return f"{len(differences):,} difference{'s' * (len(differences) != 1)}"


def _decide(spec: TensorSpec, sources: tuple[TensorSpec, ...], options: Options) -> Decision:
    chosen = not options.include or _matches(spec.name, options.include)
    if not chosen or _matches(spec.name, options.exclude):
        reason = "excluded" if chosen else "not included"
        return Decision(spec, sources, "carry", reason, spec)
    if not spec.entry.averaged:
        return Decision(spec, sources, "carry", f"{spec.dtype} is not averaged", spec, True)
    dtype = options.dtype if options.dtype and spec.entry.kind == "float" else spec.dtype
    output = spec if dtype == spec.dtype else spec._replace(dtype=dtype)
    return Decision(spec, sources, "average", "", output)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return bool(patterns) and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(reference: Index, options: Options) -> None:
    for pattern in (*options.include, *options.exclude):
        if not any(fnmatch.fnmatchcase(spec.name, pattern) for spec in reference.tensors):
            raise WavgError(
                f"the pattern {pattern!r} matches no tensor of {reference.path}; "
                "`wavg inspect` shows their names"
            )


def _refuse_quantised(reference: Index, decisions: Sequence[Decision]) -> None:
    """Refuse codes beside scales: neither the mean of codes means anything, nor that of scales.

    Where both are taken from the reference, as by `exclude`, they stay together and are fine.
    """
    actions = {decision.spec.name: decision.action for decision in decisions}
    for spec in reference.tensors:
        entry = spec.entry
        narrow = entry.bits <= 8 and entry.kind in ("int", "float", "code")
        if not narrow and not spec.name.endswith(("qweight", "qzeros")):
            continue
        place = max(spec.name.rfind("."), spec.name.rfind("/")) + 1
        if not narrow and spec.name[place:] not in ("qweight", "qzeros"):
            continue
        scales = [f"{spec.name}{suffix}" for suffix in _SCALE_SUFFIXES]
        scales += [f"{spec.name[:place]}{name}" for name in _SCALE_NAMES]
        found = next((name for name in scales if name in actions and name != spec.name), None)
        if found is not None and "average" in (actions[spec.name], actions[found]):
            raise WavgError(
                f"{reference.path}: {spec.name} holds quantised codes ({spec.dtype}) with the "
                f"scale {found}: their average has no meaning. Average the checkpoints before "
                "they are quantised, or exclude both",
                path=reference.path,
                tensor=spec.name,
            )


_SCALE_SUFFIXES = ("_scale", "_scales", "_scale_inv", ".scale", ".absmax", ".SCB", "_absmax")
_SCALE_NAMES = ("scale", "scales", "SCB", "weight_scb", "absmax")


def _fit(
    indexes: Sequence[Index],
    decisions: Sequence[Decision],
    options: Options,
    created: str | None,
    outputs: int,
) -> tuple[int, int, int]:
    """Choose block and workers for the budget; return them with the projected memory."""
    tables = {id(index.tensors): index.tensors for index in indexes}.values()
    others = sum(len(index.others) for index in indexes)
    fixed = _BASE_BYTES + _SPEC_BYTES * (sum(map(len, tables)) + others)
    if any(name and name.startswith("keras") for name in (created, indexes[-1].format)):
        fixed += _HDF5_BYTES + sum(index.reader_bytes for index in indexes)
    if created is not None:
        fixed += _CREATED_BYTES * len(decisions) * outputs
    total = sum(decision.spec.size for decision in decisions)  # neighbours are read as one
    kinds = _kinds(decisions)
    widest = max(lookup(source).itemsize for action, source, _ in kinds if action == "average")
    wanted = max(1, min(_BLOCK_BYTES // widest, total))
    most = max(1, min(options.workers, -(-total // wanted)))
    in_place = all(spec.extent is not None for table in tables for spec in table)
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
        f"averaging {len(indexes)} checkpoints needs at least {needed / MIB:.0f} MiB, and "
        f"{options.max_memory / MIB:.0f} MiB are allowed; allow more with "
        "max_memory (--max-memory)",
        needed=needed,
        allowed=options.max_memory,
    )


def _kinds(decisions: Sequence[Decision]) -> set[tuple[str, str, str]]:
    """Return the actions that go through memory, with the dtypes of input and output."""
    return {
        (d.action, d.spec.dtype, d.output.dtype)
        for d in decisions
        if d.action == "average" or d.compare
    }


def _worker_bytes(
    inputs: int, outputs: int, kinds: set[tuple[str, str, str]], block: int, in_place: bool
) -> int:
    """Bound what one worker holds: a block of every output and, unless the kernel reads, input."""
    buffer = scratch = 0  # a worker keeps the largest buffer, whatever it has in hand
    for action, source, target in ((action, lookup(a), lookup(b)) for action, a, b in kinds):
        if action != "average":
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
