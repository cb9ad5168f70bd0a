"""Averaging during training: one model at a time, their number unknown in advance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg import tree as pytree
from wavg import weights as schedules
from wavg.dtypes import DType, dtype_of, native
from wavg.errors import NonFiniteError, StructureMismatchError, WavgError, WeightError
from wavg.kernel import accumulate
from wavg.rounding import round_to

__all__ = ["StreamingAverager"]


class StreamingAverager:
    """A running average of the models of a training run.

    Parameters
    ----------
    weights
        ``"equal"``, ``"linear"``, ``"exponential:alpha=2"`` or a schedule that has a streaming
        form. ``exponential`` is a debiased exponential moving average, of decay ``exp(-1/alpha)``.
    allow_nonfinite
        Let NaN and infinities into the sum in place of an error.

    Raises
    ------
    WeightError
        A schedule whose weights depend on how many models will come.

    Notes
    -----
    The state is one float64 sum for each floating-point element, of the unnormalised weights times
    the models, divided once by `result`. Where the sums fit 53 bits, as they nearly always do for
    half precision, `equal` and `linear` are as exact as `wavg.average`; else the relative error of
    a sum of n models is below n · 2⁻⁵³ times its condition. `update` reads the model once and
    leaves it alone.

    Examples
    --------
    >>> import numpy as np, wavg
    >>> averager = wavg.StreamingAverager("linear")
    >>> for value in (1, 2, 3):
    ...     averager.update([np.float32([value, 10]), np.int64(value)])
    >>> averager.result()
    [array([ 2.3333333, 10.       ], dtype=float32), array(3)]
    """

    def __init__(
        self, weights: schedules.WeightsLike = "equal", *, allow_nonfinite: bool = False
    ) -> None:
        schedule = schedules.resolve(weights)
        if schedule.update is None:
            raise WeightError(
                f"weights {schedule} need to know how many models will come; "
                "equal, linear and exponential do not"
            )
        self._update, self._text = schedule.update, str(schedule)
        self._allow_nonfinite = allow_nonfinite
        self._count, self._total = 0, 0.0
        self._tree: Any = None
        self._paths: list[str] = []
        self._specs: list[tuple[tuple[int, ...], np.dtype[Any]]] = []
        self._sums: list[npt.NDArray[Any]] = []

    @property
    def count(self) -> int:
        """How many models have come."""
        return self._count

    def update(self, model: Any) -> None:
        """Take in the next model: a pytree of arrays of one structure throughout.

        Raises
        ------
        StructureMismatchError
            It differs from the first in structure, shapes or dtypes; the state is as before.
        NonFiniteError
            It holds NaN or infinity; the state is as before.
        """
        arrays = self._arrays(model)
        step, before = float(self._count + 1), float(self._count)
        keep, add = self._update(self._count + 1, step, before)
        if not self._allow_nonfinite:
            self._check_finite(arrays, keep, add)
        if not self._count:
            self._begin(model, arrays)
        for array, total in zip(arrays, self._sums, strict=True):
            entry = dtype_of(array.dtype)
            if entry is not None and entry.averaged:
                accumulate(_real(total), _real(array), keep=keep, add=add)
            else:
                total[...] = array  # integers: the newest
        self._total = keep * self._total + add
        self._count += 1

    def result(self) -> Any:
        """Return the average so far: the first model's structure with new arrays.

        Raises
        ------
        WeightError
            No model has come yet.
        """
        if not self._count:
            raise WeightError("there is no average yet: update() has not been called")
        results = (
            self._finish(total, dtype)
            for total, (_, dtype) in zip(self._sums, self._specs, strict=True)
        )
        return pytree.rebuild(self._tree, results)

    def __repr__(self) -> str:
        return f"StreamingAverager({self._text!r}, count={self._count})"

    def _arrays(self, model: Any) -> list[npt.NDArray[Any]]:
        if not self._count:
            pairs = list(pytree.leaves(model))
            self._paths = [path for path, _ in pairs]
            return [native(np.asarray(leaf)) for _, leaf in pairs]
        _, rows = pytree.align([self._tree, model])
        arrays = [native(np.asarray(row[1])) for row in rows]
        differences = [
            f"{path}: {array.dtype}{list(array.shape)}, not {dtype}{list(shape)}"
            for path, array, (shape, dtype) in zip(self._paths, arrays, self._specs, strict=True)
            if (array.shape, array.dtype) != (shape, dtype)
        ]
        if differences:
            raise StructureMismatchError(
                "the model differs from the first:\n  " + "\n  ".join(differences),
                differences=differences,
            )
        return arrays

    def _check_finite(self, arrays: list[npt.NDArray[Any]], keep: float, add: float) -> None:
        for position, (path, array) in enumerate(zip(self._paths, arrays, strict=True)):
            entry = dtype_of(array.dtype)
            if entry is None or not entry.averaged:
                continue
            if not np.isfinite(array).all():
                raise NonFiniteError(
                    f"{path} holds NaN or infinity; allow_nonfinite=True lets it through",
                    tensor=path,
                )
            if entry.component.bits == 64 and self._count and array.size:
                sums = float(np.abs(_real(self._sums[position])).max())
                if not math.isfinite(keep * sums + add * float(np.abs(_real(array)).max())):
                    raise NonFiniteError(f"the sum for {path} exceeds float64", tensor=path)

    def _begin(self, model: Any, arrays: list[npt.NDArray[Any]]) -> None:
        for path, array in zip(self._paths, arrays, strict=True):
            if dtype_of(array.dtype) is None:
                raise WavgError(f"leaf {path} is {array.dtype}, not an array of numbers")
        self._tree = pytree.rebuild(model, iter(self._paths))  # the shape, without the arrays
        self._specs = [(array.shape, array.dtype) for array in arrays]
        # -0.0 is the neutral element of addition: a sum of negative zeros stays one.
        self._sums = [np.full(array.shape, _neutral(array.dtype)) for array in arrays]

    def _finish(self, total: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        entry = dtype_of(dtype)
        if entry is None or not entry.averaged:
            return total.copy()
        flat = _real(total).reshape(-1) / self._total
        component: DType = entry.component
        return round_to(flat, component).view(dtype).reshape(total.shape)


def _neutral(dtype: np.dtype[Any]) -> Any:
    entry = dtype_of(dtype)
    if entry is None or not entry.averaged:
        return np.zeros((), dtype)
    return np.complex128(complex(-0.0, -0.0)) if entry.kind == "complex" else np.float64(-0.0)


def _real(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """View complex numbers as pairs of reals."""
    if array.dtype.kind != "c":
        return array
    half = np.dtype(f"f{array.dtype.itemsize // 2}")
    return array.reshape(*array.shape, 1).view(half)
