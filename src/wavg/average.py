"""Averaging pytrees in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg import tree as pytree
from wavg import weights as schedules
from wavg.dtypes import dtype_of
from wavg.errors import NonFiniteError, StructureMismatchError, WavgError, WeightError
from wavg.kernel import Combination, combine

__all__ = ["average"]

Array = npt.NDArray[Any]
_BLOCK_BYTES = 1 << 22


def average(
    trees: Iterable[Any],
    weights: schedules.WeightsLike = "equal",
    *,
    steps: npt.ArrayLike | None = None,
    integers: str = "reference",
    allow_nonfinite: bool = False,
) -> Any:
    """Average models held in memory, leaf by leaf.

    Parameters
    ----------
    trees
        Models of one structure, oldest first: nested dicts, lists, tuples and named tuples. A list
        of arrays, such as Keras' ``get_weights()`` returns, is one. Leaves are anything that
        `numpy.asarray` takes; arrays are not copied.
    weights
        A schedule, its text, or one number a tree, oldest first.
    steps
        Where in training each tree stood; 1 … N by default.
    integers
        Integer and boolean leaves are not averaged: ``"reference"`` takes the newest tree's,
        ``"error"`` refuses those that differ.
    allow_nonfinite
        Let NaN and infinities through in place of an error.

    Returns
    -------
    tree
        The first tree's structure, with new NumPy arrays of the leaves' own dtypes and shapes.

    Raises
    ------
    StructureMismatchError
        Trees, shapes or dtypes differ; every difference is listed.
    NonFiniteError
        A leaf holds NaN or infinity.
    WeightError
        Weights that cannot be used.

    Notes
    -----
    Every element is ``Σ c_i x_i / Σ c_i`` computed exactly and rounded once. Beyond the result, a
    block of 4 MiB is needed.

    Examples
    --------
    >>> import wavg
    >>> wavg.average([{"w": np.float32([1, 2])}, {"w": np.float32([3, 6])}])
    {'w': array([2., 4.], dtype=float32)}
    >>> wavg.average([[1.0, 0.0], [4.0, 3.0]], weights="linear")
    [array(3.), array(2.)]
    """
    models = list(trees)
    if not models:
        raise WeightError("there is nothing to average: no tree was given")
    if integers not in ("reference", "error"):
        raise ValueError(f"integers must be 'reference' or 'error', not {integers!r}")
    positions = np.arange(1, len(models) + 1) if steps is None else steps
    combination = Combination.of(schedules.resolve(weights)(positions))
    paths, rows = pytree.align(models)
    arrays = [[np.asarray(leaf) for leaf in row] for row in rows]
    _check_leaves(paths, arrays)
    results = (
        _average_leaf(path, row, combination, integers, allow_nonfinite)
        for path, row in zip(paths, arrays, strict=True)
    )
    return pytree.rebuild(models[0], results)


def _check_leaves(paths: list[str], arrays: list[list[Array]]) -> None:
    differences = []
    for path, row in zip(paths, arrays, strict=True):
        if dtype_of(row[0].dtype) is None:
            raise WavgError(f"leaf {path} is {row[0].dtype}, not an array of numbers", tensor=path)
        for number, array in enumerate(row[1:], start=1):
            if (array.shape, array.dtype) != (row[0].shape, row[0].dtype):
                differences.append(
                    f"{path}: {row[0].dtype}{list(row[0].shape)} in tree 0, "
                    f"{array.dtype}{list(array.shape)} in tree {number}"
                )
    if differences:
        raise StructureMismatchError(
            "the trees' leaves differ:\n  " + "\n  ".join(differences), differences=differences
        )


def _average_leaf(
    path: str, row: list[Array], combination: Combination, integers: str, allow_nonfinite: bool
) -> Array:
    entry = dtype_of(row[0].dtype)
    assert entry is not None  # _check_leaves saw to it
    if not entry.averaged:
        if integers == "error" and any(not np.array_equal(array, row[-1]) for array in row):
            raise StructureMismatchError(
                f"{path} is {entry.name} and differs between the trees; integers are not averaged. "
                "Leave integers='reference' to take the newest tree's",
                tensor=path,
            )
        return row[-1].copy()
    out = np.empty(row[0].shape, row[0].dtype)
    component = entry.component
    flat_out = out.reshape(-1).view(component.numpy)
    flat = [array.reshape(-1).view(component.numpy) for array in row]  # copies if not contiguous
    width = max(1024, _BLOCK_BYTES // (len(row) * component.itemsize))
    block = np.empty((len(row), min(width, flat_out.size)), component.numpy)
    for start in range(0, flat_out.size, width):
        target = flat_out[None, start : start + width]
        piece = block[:, : target.shape[1]]
        for buffer, source in zip(piece, flat, strict=True):
            buffer[...] = source[start : start + width]
        try:
            combine(combination, piece, target, allow_nonfinite=allow_nonfinite)
        except NonFiniteError as error:
            where = "the result" if error.input is None else f"tree {error.input}"
            index = np.unravel_index(
                (start + error.index) * component.bits // entry.bits, out.shape
            )
            raise NonFiniteError(
                f"{where} is not finite at {path}[{', '.join(map(str, index))}] "
                "(allow_nonfinite=True lets it through)",
                tensor=path,
                index=tuple(map(int, index)),
            ) from None
    return out
