"""Which tensor of an input is which of the newest: by name, or by position if that was asked for.

Pure functions of indexes. Every difference is listed, not the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from wavg.checkpoint import Index, TensorSpec
from wavg.errors import StructureMismatchError

__all__ = ["ALIGNMENTS", "align"]

ALIGNMENTS = ("name", "position")
# Keras 3 names what these hold by class and place, so that other names are another model's.
_NAMED_BY_PLACE = ("keras", "keras-weights", "keras-shards")
_Compare: TypeAlias = Callable[[Index, Index], Iterable[str]]


def align(
    indexes: Sequence[Index], how: str
) -> tuple[tuple[int, ...], Iterable[tuple[TensorSpec, ...]]]:
    """Match the tensors of all inputs to those of the reference, which is the last.

    Parameters
    ----------
    indexes
        Of the inputs, oldest first.
    how
        One of `ALIGNMENTS`.

    Returns
    -------
    layouts
        The layout of every input, the reference's being 0: inputs that share one list of tensors
        have one.
    sources
        For every tensor of the reference, the tensor in every layout.

    Raises
    ------
    StructureMismatchError
        Names (or the numbers of tensors), shapes, dtypes or formats differ.
    """
    reference = indexes[-1]
    distinct = {id(index.tensors): index for index in reversed(indexes)}
    numbers = {key: number for number, key in enumerate(distinct)}
    layouts = tuple(numbers[id(index.tensors)] for index in indexes)
    if len(distinct) == 1:
        return layouts, zip(reference.tensors)
    compare = _by_position if how == "position" else _by_name
    differences = _differences(indexes, compare)
    if differences:
        count = f"{len(differences):,} difference{'s' * (len(differences) != 1)}"
        advice = ""
        if odd := _odd_one(indexes):
            advice = f"; only {odd.path} differs, the others agree"
        automatic = reference.format not in _NAMED_BY_PLACE
        if how == "name" and automatic and not _differences(indexes, _by_position):
            advice += (
                "; by position the tensors agree, and align='position' (--align position) "
                "averages them so"
            )
        raise StructureMismatchError(
            f"{count} between the inputs and the newest, {reference.path}{advice}:",
            differences=differences,
        )
    if how == "position":
        return layouts, zip(*(index.tensors for index in distinct.values()), strict=True)
    names = [spec.name for spec in reference.tensors]
    tables = [{spec.name: spec for spec in index.tensors} for index in distinct.values()]
    return layouts, zip(*(map(table.__getitem__, names) for table in tables), strict=True)


def _odd_one(indexes: Sequence[Index]) -> Index | None:
    """Return the one that differs from all others, of which there are several that agree."""
    tables: dict[int, object] = {}  # what is said of tensors; kept once where it is the same
    alike: dict[object, list[Index]] = {}
    for index in indexes:
        if (table := id(index.tensors)) not in tables:
            said = frozenset((spec.name, spec.describe()) for spec in index.tensors)
            tables[table] = next((other for other in set(tables.values()) if other == said), said)
        alike.setdefault((index.format, tables[table]), []).append(index)
        if len(alike) > 2:  # and no more tables
            return None
    alone = [group[0] for group in alike.values() if len(group) == 1]
    return alone[0] if len(alone) == 1 and len(alike) == 2 else None


def _differences(indexes: Sequence[Index], compare: _Compare) -> list[str]:
    reference = indexes[-1]
    found: list[str] = []
    for index in indexes[:-1]:
        if index.format != reference.format:
            found.append(f"{index.path}: {index.format}, not {reference.format}")
        elif index.tensors is not reference.tensors:
            found += [f"{index.path}: {text}" for text in compare(index, reference)]
    return found


def _by_name(index: Index, reference: Index) -> Iterable[str]:
    table = {spec.name: spec for spec in index.tensors}
    expected = {spec.name: spec for spec in reference.tensors}
    for name, spec in expected.items():
        found = table.get(name)
        if found is None:
            yield f"lacks {name} ({spec.describe()})"
        elif found.describe() != spec.describe():
            yield f"{name} is {found.describe()}, not {spec.describe()}"
    for name, spec in table.items():
        if name not in expected:
            yield f"also has {name} ({spec.describe()})"


def _by_position(index: Index, reference: Index) -> Iterable[str]:
    if len(index.tensors) != len(reference.tensors):
        yield f"{len(index.tensors):,} tensors, not {len(reference.tensors):,}"
        return
    for found, spec in zip(index.tensors, reference.tensors, strict=True):
        if found.describe() != spec.describe():
            yield (
                f"{found.name} is {found.describe()}, not {spec.describe()} as {spec.name} "
                "in its place"
            )
