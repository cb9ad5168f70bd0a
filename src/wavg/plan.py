"""The decision: what is averaged, what is carried over, in which blocks, within how much memory.

Pure functions from indexes and options to a frozen `Plan`. It touches no file.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wavg.checkpoint import Index, TensorSpec
from wavg.dtypes import lookup
from wavg.errors import MemoryBudgetError, StructureMismatchError, WavgError
from wavg.weights import Figures, figures

__all__ = ["Decision", "Options", "Plan", "PlannedInput", "make_plan", "parse_size"]

MIB = 1 << 20
_LARGEST_BLOCK = 262_144  # elements; reads of 1 MiB of float32 were the cheapest
_SMALLEST_BLOCK = 1_024
# Measured by tests/test_memory.py, which fails if a run needs more than its plan says.
_BASE_BYTES = 10 * MIB  # ml_dtypes, tqdm, threads, code paged in
_HDF5_BYTES = 22 * MIB  # h5py and the HDF5 library
_WORKER_BYTES = 6 * MIB  # the kernel's scratch: one widened tile and what settling needs
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


@dataclass(frozen=True, slots=True)
class Decision:
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


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything decided before the first block is read.

    Attributes
    ----------
    inputs
        Oldest first; the last is the reference.
    coefficients
        The unnormalised weights, shape (inputs,).
    decisions
        One a tensor, in the reference's order.
    others
        Tensors beside the model (optimizer slots), and whether they are kept.
    block, workers
        Elements read at once from each input, and how many blocks are in flight.
    bytes_read, bytes_written
        What the run moves, the reference's carried-over bytes included.
    projected_memory
        The promised peak, in bytes beyond the interpreter with ``import wavg``. For a result in
        memory, `result_bytes` come on top.
    """

    inputs: tuple[PlannedInput, ...]
    schedule: str
    coefficients: npt.NDArray[np.float64]
    figures: Figures
    decisions: tuple[Decision, ...]
    others: tuple[TensorSpec, ...]
    keep_others: bool
    options: Options
    block: int
    workers: int
    bytes_read: int
    bytes_written: int
    projected_memory: int
    result_bytes: int

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


def make_plan(
    indexes: Sequence[Index],
    steps: Sequence[float],
    coefficients: npt.NDArray[np.float64],
    schedule: str,
    options: Options,
    *,
    patches: bool,
    in_memory: bool,
) -> Plan:
    """Decide.

    Parameters
    ----------
    indexes
        The inputs, oldest first; the last is the reference.
    steps, coefficients
        Each input's step and unnormalised weight.
    schedule
        The text of the schedule, for the report.
    options
        What was asked for.
    patches
        Whether the output is the reference file with its numbers replaced, rather than a new file.
    in_memory
        Whether the result is arrays.

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
    sources = _align(indexes)
    _refuse_quantised(reference, options)
    _check_patterns(reference, options)
    decisions = tuple(_decide(spec, sources[spec.name], options) for spec in reference.tensors)
    if not any(decision.action == "average" for decision in decisions):
        raise WavgError(f"{reference.path}: there is no tensor to average")
    block, workers, projected = _fit(indexes, decisions, options)
    keep_others = options.optimizer == "carry" and not in_memory and patches
    read = sum(
        spec.nbytes
        for decision in decisions
        for spec in (
            decision.sources
            if decision.action == "average" or decision.compare
            else decision.sources[-1:]
        )
    )
    result = sum(decision.output.nbytes for decision in decisions)
    carried = sum(spec.nbytes for spec in reference.others) if keep_others else 0
    merit = figures(coefficients, steps)
    return Plan(
        inputs=tuple(
            PlannedInput(index.path, step, proportion)
            for index, step, proportion in zip(
                indexes, steps, merit.proportions.tolist(), strict=True
            )
        ),
        schedule=schedule,
        coefficients=coefficients,
        figures=merit,
        decisions=decisions,
        others=reference.others,
        keep_others=keep_others,
        options=options,
        block=block,
        workers=workers,
        bytes_read=read + carried,
        bytes_written=0 if in_memory else result + carried,
        projected_memory=projected,
        result_bytes=result if in_memory else 0,
    )


def _align(indexes: Sequence[Index]) -> dict[str, tuple[TensorSpec, ...]]:
    """Match tensors by name; list every difference of the inputs to the reference."""
    reference = indexes[-1]
    by_name = {id(i.tensors): {spec.name: spec for spec in i.tensors} for i in indexes}
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
            f"{index.path}: has {name} ({spec.describe()}) besides"
            for name, spec in table.items()
            if name not in tables[-1]
        ]
    if differences:
        raise StructureMismatchError(
            f"the inputs do not hold the same tensors as the newest, {reference.path}:\n  "
            + "\n  ".join(differences),
            differences=differences,
        )
    return {spec.name: tuple(table[spec.name] for table in tables) for spec in reference.tensors}


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
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(reference: Index, options: Options) -> None:
    for pattern in (*options.include, *options.exclude):
        if not any(fnmatch.fnmatchcase(spec.name, pattern) for spec in reference.tensors):
            raise WavgError(
                f"the pattern {pattern!r} matches no tensor of {reference.path}; "
                "`wavg inspect` shows their names"
            )


def _refuse_quantised(reference: Index, options: Options) -> None:
    """Codes beside scales: the mean of codes means nothing, nor do codes beside mean scales."""
    names = {spec.name for spec in reference.tensors}
    for spec in reference.tensors:
        narrow = spec.entry.bits <= 8 and spec.entry.kind in ("int", "float", "code")
        head, separator, leaf = re.fullmatch(r"(.*?)([./]?)([^./]*)", spec.name, re.S).groups()  # type: ignore[union-attr]
        packed = leaf in ("qweight", "qzeros")
        if not (narrow or packed) or _matches(spec.name, options.exclude):
            continue
        scales = [f"{spec.name}{suffix}" for suffix in _SCALE_SUFFIXES]
        scales += [f"{head}{separator}{name}" for name in _SCALE_NAMES]
        found = next((name for name in scales if name in names), None)
        if found is not None:
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
    indexes: Sequence[Index], decisions: Sequence[Decision], options: Options
) -> tuple[int, int, int]:
    """Choose block and workers for the budget; return them with the projected memory."""
    itemsize = max(decision.spec.entry.bits for decision in decisions) // 8 or 1
    out = max(decision.output.entry.bits for decision in decisions) // 8 or 1
    row_bytes = len(indexes) * itemsize + out
    distinct = {id(index.tensors): len(index.tensors) for index in indexes}
    others = sum(len(index.others) for index in indexes)
    fixed = _BASE_BYTES + _SPEC_BYTES * (sum(distinct.values()) + others)
    if any(index.format == "keras-h5" for index in indexes):
        fixed += _HDF5_BYTES
    largest = max(decision.spec.size for decision in decisions)
    wanted = max(1, min(_LARGEST_BLOCK, largest))
    for workers in range(options.workers, 0, -1):
        room = (options.max_memory - fixed) // workers - _WORKER_BYTES
        block = min(wanted, room // row_bytes)
        if block >= min(wanted, _SMALLEST_BLOCK * 8 if workers > 1 else _SMALLEST_BLOCK):
            return block, workers, fixed + workers * (_WORKER_BYTES + block * row_bytes)
    needed = fixed + _WORKER_BYTES + min(wanted, _SMALLEST_BLOCK) * row_bytes
    raise MemoryBudgetError(
        f"averaging {len(indexes)} checkpoints needs at least {needed / MIB:.0f} MiB, and "
        f"{options.max_memory / MIB:.0f} MiB are allowed; allow more with "
        "max_memory (--max-memory)",
        needed=needed,
        allowed=options.max_memory,
    )
