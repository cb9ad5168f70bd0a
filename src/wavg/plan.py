"""The plan of a pass: what is averaged with which weights, what is moved, in how much memory.

Pure functions from indexes and options to a frozen `Plan`. It touches no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wavg.alignment import align
from wavg.budget import fit
from wavg.checkpoint import Index, TensorSpec
from wavg.decisions import Decision, Kind, check_patterns, decide
from wavg.dtypes import lookup
from wavg.errors import WavgError
from wavg.options import Options
from wavg.quantised import refuse_quantised
from wavg.record import KEY, STATE_KEY
from wavg.weights import Figures, figures

__all__ = ["Plan", "PlannedInput", "Weighting", "make_plans"]


@dataclass(frozen=True, slots=True)
class PlannedInput:
    """One checkpoint's part: its path, its step, and its proportion of the average.

    It may be an `average` itself, by the record that it has.
    """

    path: str
    step: float
    proportion: float
    average: bool = False


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
        share what is read; checksums and digests are made of what is read anyway.
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
    output_format
        The name of the outputs' format; None if the result is arrays. An output of the reference's
        is that file with its numbers replaced, any other a new file.

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
    layouts, sources = align(indexes, options.align)
    check_patterns(reference, options)
    decisions, elements = decide(reference, sources, options)
    if not any(kind.averaged for kind in elements):
        raise WavgError(f"{reference.path}: there is no tensor to average")
    averaged = (decision.spec.name for decision in decisions if decision.action == "average")
    refuse_quantised(reference.path, reference.tensors, averaged)
    in_memory, patches = output_format is None, output_format == reference.format
    created = None if patches else output_format
    block, workers, projected = fit(indexes, elements, options, created, len(weightings))
    keep_others = patches and options.optimizer == "carry"
    carried = _nbytes(reference.others) if keep_others else 0
    read = carried + _bytes_read(indexes, elements)
    result = sum(count * lookup(kind.target).bits // 8 for kind, count in elements.items())
    written = 0 if in_memory else result + carried
    disk = written
    if patches:  # the rest of the files stays; where tensors are compressed, that is a guess
        rest = _file_bytes(reference) - _nbytes((*reference.tensors, *reference.others))
        disk = max(0, written + rest)
    plans = []
    for schedule, coefficients, output in weightings:
        newest = slice(len(indexes) - len(coefficients), None)
        merit = figures(coefficients, steps[newest])
        parts = zip(indexes[newest], steps[newest], merit.proportions.tolist(), strict=True)
        plans.append(
            Plan(
                inputs=tuple(
                    PlannedInput(index.path, step, part, KEY in index.metadata)
                    for index, step, part in parts
                ),
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
                bytes_read=read,
                bytes_written=written,
                disk_bytes=disk,
                projected_memory=projected,
                result_bytes=result if in_memory else 0,
            )
        )
    return plans


def _bytes_read(indexes: Sequence[Index], elements: Mapping[Kind, int]) -> int:
    """Return what the inputs' tensors make a run read, in bytes."""
    read = 0
    for kind, count in elements.items():
        readers = len(indexes) if kind.averaged or kind.compare else 1
        read += readers * (count * lookup(kind.source).bits // 8)  # the same in every input
    return read


def _nbytes(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs)


def _file_bytes(index: Index) -> int:
    return sum(identity.size for identity in index.files)


def _refuse_states(indexes: Sequence[Index]) -> None:
    for index in indexes:
        if STATE_KEY in index.metadata:
            raise WavgError(
                f"{index.path} is the saved state of a StreamingAverager, and its sums are no "
                "model; have it write its average: StreamingAverager.load(path).save_average(…)",
                path=index.path,
            )
