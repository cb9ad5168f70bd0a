"""What a schedule is, and what those of every kind share: text forms, checks, unrolled recursions.

It knows no particular schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import numpy.typing as npt

from wavg.errors import WeightError

__all__ = [
    "F64",
    "Input",
    "Schedule",
    "Update",
    "checked",
    "checked_steps",
    "spell",
    "spell_number",
    "unrolled",
]

F64 = npt.NDArray[np.float64]
Update = Callable[[int, float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Input:
    """What a schedule may ask of a checkpoint besides its step.

    Attributes
    ----------
    path
        Where it lies.
    weights
        Returns the text of the schedule by which it is itself an average, as its metadata tell, or
        None. Opens the file when called.
    """

    path: str
    weights: Callable[[], str | None]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A weighting scheme.

    Attributes
    ----------
    text
        The text form, which `wavg.weights.parse` reads back.
    coefficients
        From the steps, oldest first, shape (N,), to unnormalised weights, shape (N,), float64.
    update
        For a stream whose length is unknown: from a model's 1-based position, its step and the
        step of the one before (0 for the first) to the pair (keep, add) of
        ``sum = keep * sum + add * model``; the average is the sum divided by the like sum of ones.
        None where there is no such form.
    of_inputs
        In place of `coefficients` where the checkpoints themselves are known and count: from the
        steps and what `Input` says of each.
    count
        How many checkpoints it is for, where it is for so many only.
    repeats
        Whether several checkpoints may have one step, as two averages tracked side by side do.

    Examples
    --------
    >>> import wavg
    >>> schedule = wavg.linear()
    >>> schedule([100, 200, 300])
    array([1., 2., 3.])
    >>> str(wavg.exponential(alpha=3))
    'exponential:alpha=3'
    """

    text: str
    coefficients: Callable[[F64], F64]
    update: Update | None = None
    of_inputs: Callable[[F64, Sequence[Input]], F64] | None = None
    repeats: bool = False
    count: int | None = None

    def __call__(self, steps: npt.ArrayLike, inputs: Sequence[Input] | None = None) -> F64:
        """Return the weights of checkpoints saved at these steps, oldest first."""
        numbers = np.asarray(steps, dtype=np.float64)
        if inputs is not None and self.of_inputs is not None:
            return self.of_inputs(numbers, inputs)
        return self.coefficients(numbers)

    def __str__(self) -> str:
        return self.text


def unrolled(update: Update) -> Callable[[F64], F64]:
    """Return the weights that a recursion comes to: ``c_i = add_i · Π keep_j`` over the j > i.

    >>> unrolled(lambda position, *_: (0.5, 1.0))(np.array([1.0, 2.0, 3.0]))
    array([0.25, 0.5 , 1.  ])
    """

    def coefficients(steps: F64) -> F64:
        times = steps.tolist()
        pairs = [
            update(position, step, before)
            for position, (step, before) in enumerate(
                zip(times, [0.0, *times[:-1]], strict=True), start=1
            )
        ]
        keep, add = np.array(pairs, np.float64).reshape(-1, 2).T
        kept = np.cumprod(np.append(keep[1:], 1.0)[::-1])[::-1]
        return np.asarray(add * kept, np.float64)

    return coefficients


def checked(
    value: object,
    what: str,
    allowed: str = "a positive number",
    test: Callable[[float], bool] = lambda number: number > 0,
) -> float:
    """Return a finite number that passes a test, or say what is allowed.

    >>> checked(2, "exponential: alpha")
    2.0
    >>> checked(-1, "exponential: alpha")
    Traceback (most recent call last):
    ...
    wavg.errors.WeightError: exponential: alpha must be a positive number, not -1
    """
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and test(number)):
        raise WeightError(f"{what} must be {allowed}, not {value!r}")
    return number


def checked_steps(name: str, steps: F64, *, positive: bool = False) -> F64:
    """Return steps that can be counted from the beginning of the training, or refuse them.

    >>> checked_steps("ema", np.array([-5.0, 5.0]))
    Traceback (most recent call last):
    ...
    wavg.errors.WeightError: ema counts steps from the start of the training at 0, ... not -5
    """
    if len(steps) and not (steps[0] > 0 or (steps[0] == 0 and not positive)):
        least = "above 0" if positive else "of at least 0"
        raise WeightError(
            f"{name} counts steps from the start of the training at 0, and needs steps {least}, "
            f"not {spell_number(steps[0])}"
        )
    return steps


def spell_number(value: float) -> str:
    """Write a number so that it is read back to the same one.

    >>> spell_number(2.0), spell_number(0.1)
    ('2', '0.1')
    """
    return repr(float(value)).removesuffix(".0")


def spell(name: str, **values: float | bool | str | tuple[float, ...] | None) -> str:
    """Write a schedule as text; parameters that are None are left out.

    >>> spell("ema", decay=0.99, half_life=None, debias=False)
    'ema:decay=0.99,debias=false'
    """

    def one(value: float | bool | str | tuple[float, ...]) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return "/".join(map(spell_number, value))
        return spell_number(value)

    parts = [f"{key}={one(value)}" for key, value in values.items() if value is not None]
    return f"{name}:{','.join(parts)}" if parts else name
