"""Averages of the newest n models for many n, from few running sums: the arithmetic alone.

Models come newest first. Every average wanted is a row of weights, one a model, and its partial
sums grow by a model at a time. Of the partial sums under way only few are linearly independent
(one for equal weights of every n, two for linear ones, one for an exponential), and the others
follow from these: so only these are kept. It knows numbers only, no tensors and no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Step", "most_sums", "passes", "programme"]

F64 = npt.NDArray[np.float64]

_INDEPENDENT = 64 * np.finfo(np.float64).eps  # of a row's largest weight: less is rounding
_LOYALTY = 100.0  # a sum that is kept anyway is preferred to one so much more independent


class Step(NamedTuple):
    """What one model does: matrices to apply to the column of the sums kept, then the model.

    Attributes
    ----------
    sums
        Gives the sums kept afterwards, shape (kept after, kept before + 1).
    outputs
        Gives the sums of the rows that end with this model, shape (rows, kept before + 1).
    ended
        Which rows these are, by their positions among the rows of the programme.
    """

    sums: F64
    outputs: F64
    ended: tuple[int, ...]

    @property
    def takes(self) -> bool:
        """Whether the model has a weight in anything."""
        return bool(self.sums[:, -1].any() or self.outputs[:, -1].any())

    def divided(self, most: int) -> Iterator[Step]:
        """Yield steps that together do the same, each with few rows that end.

        >>> step = Step(np.ones((1, 2)), np.ones((3, 2)), (4, 7, 8))
        >>> [(part.sums.tolist(), part.ended) for part in step.divided(2)]
        [([[1.0, 0.0]], (4, 7)), ([[1.0, 1.0]], (8,))]
        """
        width = self.sums.shape[1]
        last = max(0, len(self.ended) - 1) // most * most
        for start in range(0, last, most):
            part = slice(start, start + most)
            yield Step(np.eye(width - 1, width), self.outputs[part], self.ended[part])
        yield Step(self.sums, self.outputs[last:], self.ended[last:])


def programme(rows: Sequence[F64]) -> list[Step]:
    """Return what to do with one model after the other, newest first.

    Parameters
    ----------
    rows
        For each average its weights, newest first, as many as it takes models.

    Returns
    -------
    steps
        As many as the longest row has weights. After m models the number of sums is the rank of
        the weights that the rows not yet complete give these, which is the least that can do.

    Notes
    -----
    Weights that are polynomials of the position up to its square have sums of their own; else
    sums are partial sums of rows, so that most steps only add a multiple of the model. A row is
    dependent where what it adds to the others is below 64 rounding errors of its largest weight.
    Time is O(rows · models² · sums).

    Examples
    --------
    >>> for step in programme([np.ones(1), np.ones(2), np.ones(3)]):  # a running sum
    ...     print(step.sums.tolist(), step.outputs.tolist())
    [[1.0]] [[1.0]]
    [[1.0, 1.0]] [[1.0, 1.0]]
    [] [[1.0, 1.0]]
    """
    fits = [_polynomial(row) for row in rows]
    degrees = [len(fit) - 1 for fit in fits]
    # A row of d + 1 weights is a polynomial of degree d without being meant as one.
    highest = max((d for d, row in zip(degrees, rows, strict=True) if d < len(row) - 1), default=-1)
    simple = [place for place, degree in enumerate(degrees) if 0 <= degree <= highest]
    if len(simple) <= highest:  # a sum for each takes less
        simple = []
    others = [place for place in range(len(rows)) if place not in simple]
    return _side_by_side(
        [
            (simple, _of_powers([(len(rows[place]), fits[place]) for place in simple])),
            (others, _of_rows([rows[place] for place in others])),
        ]
    )


def _side_by_side(parts: Sequence[tuple[list[int], list[Step]]]) -> list[Step]:
    """Return one programme of several, each for some of the rows."""
    merged = []
    before = [0] * len(parts)
    for position in range(max(len(steps) for _, steps in parts)):
        taken = [(rows, steps[position : position + 1]) for rows, steps in parts]
        width = sum(before) + 1
        sums, outputs, ended = [np.empty((0, width))], [np.empty((0, width))], list[int]()
        for number, (rows, step) in enumerate(taken):
            columns = [*range(sum(before[:number]), sum(before[: number + 1])), width - 1]
            for one in step:
                for matrix, blocks in ((one.sums, sums), (one.outputs, outputs)):
                    wide = np.zeros((len(matrix), width))
                    wide[:, columns] = matrix
                    blocks.append(wide)
                ended += [rows[row] for row in one.ended]
        before = [len(step[0].sums) if step else 0 for _, step in taken]
        merged.append(Step(np.vstack(sums), np.vstack(outputs), tuple(ended)))
    return merged


def _polynomial(row: F64) -> F64:
    """Return coefficients that give the weights by their positions, exactly; none if there are no.

    >>> _polynomial(np.array([3.0, 2.0, 1.0])), _polynomial(np.array([1.0, 0.5, 0.25, 0.125]))
    (array([ 4., -1.]), array([], dtype=float64))
    """
    first, second, third = (*row[:3], *[0.0] * 3)[:3]
    bend = (first + third - 2 * second) / 2
    slope = second - first - 3 * bend
    for fit in ([first], [2 * first - second, second - first], [first - slope - bend, slope, bend]):
        if len(fit) <= len(row) and np.array_equal(_powers(len(row))[: len(fit)].T @ fit, row):
            return np.array(fit)
    return np.empty(0)


def _powers(count: int) -> F64:
    return np.arange(1.0, count + 1) ** np.arange(3.0)[:, None]


def _of_powers(rows: Sequence[tuple[int, F64]]) -> list[Step]:
    """Return a programme for rows that are polynomials of the position, by length and coefficients.

    Sums are of models times powers of their positions: where weights are whole numbers, so is all
    in here. Averages of such weights fall on ties between two numbers of a short format, and cancel
    to zero; there a rounding error would show.
    """
    count = max((length for length, _ in rows), default=0)
    powers = _powers(count)
    kept: list[int] = []
    steps = []
    for position in range(count):
        going = [len(fit) for length, fit in rows if length > position + 1]
        after = list(range(max(going, default=0)))
        ended = [row for row, (length, _) in enumerate(rows) if length == position + 1]
        sums = np.zeros((len(after), len(kept) + 1))
        outputs = np.zeros((len(ended), len(kept) + 1))
        for matrix, fits in (
            (sums, np.eye(3)[after]),
            (outputs, [np.pad(rows[row][1], (0, 3 - len(rows[row][1]))) for row in ended]),
        ):
            for line, fit in zip(matrix, fits, strict=True):
                line[:-1] = fit[kept]
                line[-1] = fit @ powers[:, position]
        steps.append(Step(sums, outputs, tuple(ended)))
        kept = after
    return steps


def _of_rows(rows: Sequence[F64]) -> list[Step]:
    """Return a programme for any rows; its sums are partial sums of some of them."""
    lengths = [len(row) for row in rows]
    table = np.zeros((len(rows), max(lengths, default=0)))
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    scale = np.abs(table).max(axis=1, initial=0.0)
    scale[scale == 0.0] = 1.0
    kept: list[int] = []
    steps = []
    for position in range(table.shape[1]):
        ended = [row for row, length in enumerate(lengths) if length == position + 1]
        going = [row for row, length in enumerate(lengths) if length > position + 1]
        past = table[going, : position + 1] / scale[going, None]
        after = [going[row] for row in _independent(past, np.isin(going, kept))]
        before = table[:, :position]
        steps.append(
            Step(
                _expressed(before, kept, after, table[:, position]),
                _expressed(before, kept, ended, table[:, position]),
                tuple(ended),
            )
        )
        kept = after
    return steps


def _independent(rows: F64, kept: npt.NDArray[np.bool_]) -> list[int]:
    """Return positions of few rows that the others are combinations of."""
    left = rows.copy()
    chosen: list[int] = []
    while len(left):
        size = np.abs(left).max(axis=1)
        size[chosen] = 0.0
        rank = np.where(size > _INDEPENDENT, size * np.where(kept, _LOYALTY, 1.0), 0.0)
        best = len(rank) - 1 - int(rank[::-1].argmax())  # of equals the one that lasts longest
        if rank[best] == 0.0:
            break
        chosen.append(best)
        direction = left[best] / np.linalg.norm(left[best])
        for _ in range(2):  # once leaves rounding errors
            left -= np.outer(left @ direction, direction)
    return chosen


def _expressed(before: F64, kept: Sequence[int], wanted: Sequence[int], model: F64) -> F64:
    """Return rows' partial sums by those kept before and the next model."""
    matrix = np.zeros((len(wanted), len(kept) + 1))
    basis = before[kept]
    for line, row in zip(matrix, wanted, strict=True):
        line[-1] = model[row]
        same = [place for place, other in enumerate(basis) if np.array_equal(other, before[row])]
        if same:
            line[same[0]] = 1.0  # exactly, so that a plain sum stays one
        elif kept:
            line[:-1] = np.linalg.lstsq(basis.T, before[row], rcond=None)[0]
    return matrix


def most_sums(steps: Sequence[Step]) -> int:
    """Return how many sums a programme keeps at once, at most.

    >>> rows = [np.arange(n, 0.0, -1) for n in range(1, 30)]  # linear weights, newest first
    >>> most_sums(programme(rows))
    2
    """
    return max((len(step.sums) for step in steps), default=0)


def passes(rows: Sequence[F64], limit: int) -> list[list[int]]:
    """Divide rows into as many groups as it takes for each to need no more sums than allowed.

    >>> shapes = [np.cos(np.linspace(0, 1.5, n)) for n in range(1, 20)]
    >>> [len(group) for group in passes(shapes, 100)], len(passes(shapes, 3)) > 1
    ([19], True)
    """

    def divided(group: list[int]) -> list[list[int]]:
        if len(group) <= 1 or most_sums(programme([rows[row] for row in group])) <= limit:
            return [group]
        half = len(group) // 2
        return divided(group[:half]) + divided(group[half:])

    return divided(list(range(len(rows)))) if len(rows) else []
