"""Averaging pytrees in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg import tree as pytree
from wavg import weights as schedules
from wavg.arrays import leaf_to_numpy
from wavg.dtypes import DType, dtype_of
from wavg.errors import NonFiniteError, StructureMismatchError, WavgError, WeightError
from wavg.combination import Combination
from wavg.kernel import Combiner
from wavg.quantised import refuse_quantised_leaves

__all__ = ["average"]

Array = npt.NDArray[Any]
_BLOCK_BYTES = 1 << 22


def average(
    trees: Iterable[Any],
    weights: schedules.WeightsLike = "equal",
    *,
    steps: Sequence[float] | None = None,
    integers: str = "reference",
    allow_nonfinite: bool = False,
) -> Any:
    """Average models held in memory, leaf by leaf.

    Parameters
    ----------
    trees
        Models of one structure, oldest first: nested dicts, lists, tuples and named tuples. A list
        of arrays, such as Keras' ``get_weights()`` returns, is one. Leaves are arrays of NumPy,
        PyTorch, JAX, TensorFlow or Keras, or anything that `numpy.asarray` takes; those in this
        machine's memory are not copied.
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
    WavgError
        Quantised codes beside their scale, whose average has no meaning.

    Notes
    -----
    Every element is ``Σ c_i x_i / Σ c_i`` computed exactly and rounded once. Beyond the result, a
    block of 4 MiB and the kernel's scratch memory are needed, some 20 MiB in all.

    Examples
    --------
    >>> import wavg
    >>> wavg.average([{"w": np.float32([1, 2])}, {"w": np.float32([3, 6])}])
    {'w': array([2., 4.], dtype=float32)}
    >>> wavg.average([[1.0, 0.0], [4.0, 3.0]], weights="linear")
    [array(3.), array(2.)]
    """
    if isinstance(trees, (Mapping, str)):
        raise TypeError("average takes a list of models, not one model")
    models = list(trees)
    if not models:
        raise WeightError("there is nothing to average: no tree was given")
    if integers not in ("reference", "error"):
        raise ValueError(f"integers must be 'reference' or 'error', not {integers!r}")
    schedule = schedules.resolve(weights)
    positions = schedules.check_steps(
        range(1, len(models) + 1) if steps is None else steps, repeats=schedule.repeats
    )
    if len(positions) != len(models):
        raise WeightError(f"{len(positions)} steps were given for {len(models)} trees")
    combination = Combination.of(schedule(positions))
    paths, rows = pytree.align(models)
    arrays = [
        [leaf_to_numpy(path, leaf) for leaf in row] for path, row in zip(paths, rows, strict=True)
    ]
    _check_leaves(paths, arrays)
    formats = ((path, dtype_of(row[0].dtype)) for path, row in zip(paths, arrays, strict=True))
    refuse_quantised_leaves((path, entry) for path, entry in formats if entry is not None)
    combiners: dict[DType, Combiner] = {}
    for entry in {dtype_of(row[0].dtype) for row in arrays}:
        if entry is not None and entry.averaged:
            component = entry.component
            combiners[entry] = Combiner(
                combination, component, component, allow_nonfinite=allow_nonfinite
            )
    results = (
        _average_leaf(path, row, combiners, integers)
        for path, row in zip(paths, arrays, strict=True)
    )
    return pytree.rebuild(models[0], results)


def _check_leaves(paths: list[str], arrays: list[list[Array]]) -> None:
    differences = []
    for path, row in zip(paths, arrays, strict=True):
        if dtype_of(row[0].dtype) is None:
            raise WavgError(
                f"leaf {path or 'at the top'} is {row[0].dtype}, not an array of numbers",
                tensor=path,
            )
        for number, array in enumerate(row[1:], start=1):
            if (array.shape, array.dtype) != (row[0].shape, row[0].dtype):
                differences.append(
                    f"{path}: {row[0].dtype}{list(row[0].shape)} in tree 0, "
                    f"{array.dtype}{list(array.shape)} in tree {number}"
                )
    if differences:
        raise StructureMismatchError("the trees' leaves differ:", differences=differences)


def _average_leaf(
    path: str, row: list[Array], combiners: Mapping[DType, Combiner], integers: str
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
    # Arrays that are not contiguous are copied.
    flat = [np.asarray(array, order="C").reshape(-1).view(component.numpy) for array in row]
    width = max(1024, _BLOCK_BYTES // (len(row) * component.itemsize))
    block = np.empty(len(row) * min(width, flat_out.size), component.numpy)
    for start in range(0, flat_out.size, width):
        target = flat_out[None, start : start + width]
        piece = block[: len(row) * target.size].reshape(len(row), target.size)
        for buffer, source in zip(piece, flat, strict=True):
            buffer[...] = source[start : start + width]
        try:
            combiners[entry](piece, target)
        except NonFiniteError as error:
            flat_index = (start + error.index) * component.bits // entry.bits
            index = tuple(map(int, np.unravel_index(flat_index, out.shape)))
            where = f"{path or 'the leaf'}{list(index) if index else ''}"
            message = (
                f"the average at {where} does not fit {entry.name}"
                if error.input is None
                else f"tree {error.input} holds {error.value} at {where}; "
                "allow_nonfinite=True lets it through"
            )
            raise NonFiniteError(message, tensor=path, index=index) from None
    return out
