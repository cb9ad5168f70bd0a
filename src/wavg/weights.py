"""Schedules: rules that turn the checkpoints' steps into averaging weights.

This module knows numbers only: no files, no tensors. A schedule is written in one short text,
``exponential:alpha=2``, that the command line, the reports and the constructors here share.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from wavg.errors import WeightError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

__all__ = [
    "Figures",
    "Schedule",
    "WeightsLike",
    "check_steps",
    "equal",
    "explicit",
    "exponential",
    "figures",
    "is_several",
    "linear",
    "parse",
    "resolve",
]

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A weighting scheme.

    Attributes
    ----------
    text
        The text form, which `parse` reads back.
    coefficients
        From the steps, oldest first, shape (N,), to unnormalised weights, shape (N,), float64.
    update
        For a stream whose length is unknown: from a model's 1-based position, its step and the
        step of the one before (0 for the first) to the pair (keep, add) of
        ``sum = keep * sum + add * model``; the average is the sum divided by the like sum of ones.
        None where there is no such form.

    Examples
    --------
    >>> schedule = linear()
    >>> schedule(np.array([100, 200, 300]))
    array([1., 2., 3.])
    >>> str(exponential(alpha=3))
    'exponential:alpha=3'
    """

    text: str
    coefficients: Callable[[F64], F64]
    update: Callable[[int, float, float], tuple[float, float]] | None = None

    def __call__(self, steps: npt.ArrayLike) -> F64:
        """Return the weights of checkpoints saved at these steps, oldest first."""
        return self.coefficients(np.asarray(steps, dtype=np.float64))

    def __str__(self) -> str:
        return self.text


WeightsLike: TypeAlias = "str | Schedule | Sequence[float] | npt.NDArray[np.float64]"


def equal() -> Schedule:
    """Weigh all alike: ``c_i = 1``. Also called SWA, LAWA, a uniform soup.

    References
    ----------
    Polyak & Juditsky 1992, *Acceleration of Stochastic Approximation by Averaging*;
    Izmailov et al. 2018, arXiv:1803.05407; Kaddour 2022, arXiv:2209.14981.

    Examples
    --------
    >>> equal()([10, 20, 30])
    array([1., 1., 1.])
    """
    return Schedule("equal", lambda steps: np.ones(len(steps)), lambda position, *_: (1.0, 1.0))


def linear() -> Schedule:
    """Weigh newer checkpoints more, in proportion to their position: ``c_i = i``, oldest first.

    Of N checkpoints, newest first j = 1 … N, this is (N - j + 1) / N up to the factor N.

    References
    ----------
    PMA-WMA in arXiv:2505.12082.

    Examples
    --------
    >>> linear()([10, 20, 30])
    array([1., 2., 3.])
    """
    return Schedule(
        "linear",
        lambda steps: np.arange(1.0, len(steps) + 1),
        lambda position, *_: (1.0, float(position)),
    )


def exponential(alpha: float = 2.0) -> Schedule:
    """Weigh the j-th newest checkpoint ``exp(-j / alpha)``.

    Parameters
    ----------
    alpha
        The decay, in checkpoints: after so many, the weight has fallen to 1/e. Positive.

    Examples
    --------
    >>> exponential(alpha=2)([10, 20, 30]).round(4)
    array([0.3679, 0.6065, 1.    ])
    """
    if not (isinstance(alpha, Real) and math.isfinite(alpha) and alpha > 0):
        raise WeightError(f"exponential: alpha must be a positive number, not {alpha!r}")
    decay = float(alpha)

    def coefficients(steps: F64) -> F64:
        with np.errstate(over="ignore"):  # so small an alpha leaves the newest alone
            return np.exp(np.arange(1.0 - len(steps), 1.0) / decay)

    return Schedule(
        f"exponential:alpha={_text(decay)}",
        coefficients,
        lambda *_: (math.exp(-1.0 / decay), 1.0),
    )


def explicit(weights: Sequence[float] | F64) -> Schedule:
    """Give one weight a checkpoint, oldest first.

    Parameters
    ----------
    weights
        Finite numbers; negative ones are allowed, a sum of zero is not.

    Examples
    --------
    >>> explicit([0.5, 0.3, 0.2])([10, 20, 30])
    array([0.5, 0.3, 0.2])
    """
    try:
        values = np.array(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise WeightError(f"weights must be numbers, not {weights!r}") from None
    if values.ndim != 1 or not len(values):
        raise WeightError(f"weights must be a flat list of numbers, not shape {values.shape}")
    if not np.isfinite(values).all():
        raise WeightError(f"weights must be finite, not {values.tolist()}")
    if sum(map(Fraction, values.tolist())) == 0:
        raise WeightError("the weights sum to zero, so there is no average; change one of them")

    def coefficients(steps: F64) -> F64:
        if len(steps) != len(values):
            raise WeightError(f"{len(values)} weights were given for {len(steps)} checkpoints")
        return values.copy()

    return Schedule(",".join(map(_text, values.tolist())), coefficients)


def _text(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


_SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "equal": equal,
    "linear": linear,
    "exponential": exponential,
}


def parse(text: str) -> Schedule:
    """Read the text form of a schedule: ``NAME``, ``NAME:KEY=VALUE,…`` or numbers with commas.

    Raises
    ------
    WeightError
        For an unknown name or parameter, with what there is.

    Examples
    --------
    >>> parse("exponential:alpha=4").text
    'exponential:alpha=4'
    >>> parse("0.2,0.3,0.5")([1, 2, 3])
    array([0.2, 0.3, 0.5])
    >>> parse("cubic")
    Traceback (most recent call last):
    ...
    wavg.errors.WeightError: unknown weights 'cubic'; there are equal, linear, ...
    """
    name, _, rest = text.strip().partition(":")
    if name not in _SCHEDULES:
        try:
            return explicit([float(part) for part in text.split(",")])
        except ValueError as error:
            if isinstance(error, WeightError):
                raise
            known = ", ".join(str(schedule()) for schedule in _SCHEDULES.values())
            raise WeightError(
                f"unknown weights {text!r}; there are {known} and numbers with commas, "
                "one a checkpoint, oldest first, such as 0.2,0.3,0.5"
            ) from None
    takes = list(inspect.signature(_SCHEDULES[name]).parameters)
    arguments: dict[str, float] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in takes or not equals or key in arguments:
            raise WeightError(
                f"cannot understand {part!r} in weights {text!r}; "
                f"{name} takes {', '.join(takes) or 'no parameters'}"
            )
        try:
            arguments[key] = float(value)
        except ValueError:
            raise WeightError(f"{value!r} in weights {text!r} is not a number") from None
    return _SCHEDULES[name](**arguments)


def is_several(weights: WeightsLike | Sequence[WeightsLike]) -> TypeIs[Sequence[WeightsLike]]:
    """Tell a list of schedules from one: numbers are the weights of a single one.

    >>> is_several("linear"), is_several([1, 2]), is_several(["equal", "linear"])
    (False, False, True)
    >>> is_several([[1, 2], [1, 3]])
    True
    """
    if isinstance(weights, (str, Schedule)) or not isinstance(weights, Iterable):
        return False
    return any(isinstance(item, (str, Schedule)) or np.ndim(item) > 0 for item in weights)


def resolve(weights: WeightsLike) -> Schedule:
    """Return the schedule that a text, a schedule or a list of numbers stands for."""
    if isinstance(weights, Schedule):
        return weights
    if isinstance(weights, str):
        return parse(weights)
    if callable(weights):
        raise WeightError(
            f"{weights!r} is not a schedule; call it, as in wavg.exponential(alpha=3)"
        )
    return explicit(weights)


@dataclass(frozen=True, slots=True)
class Figures:
    """What to print beside any weights.

    Attributes
    ----------
    proportions
        The weights divided by their sum, shape (N,).
    effective_number
        ``1 / Σ c²``: how many equally weighted checkpoints average out noise as well.
    mean_age
        ``Σ c_i (t_N - t_i)``, in steps.
    amplification
        ``Σ |c|``: 1 without negative weights.
    """

    proportions: F64
    effective_number: float
    mean_age: float
    amplification: float


def check_steps(steps: Sequence[float]) -> tuple[float, ...]:
    """Return steps as numbers, or refuse those that do not increase.

    >>> check_steps([10, 20])
    (10.0, 20.0)
    """
    numbers = tuple(map(float, steps))
    rising = all(a < b for a, b in itertools.pairwise(numbers))
    if not rising or not all(map(math.isfinite, numbers)):
        raise WeightError(f"steps must increase, oldest checkpoint first, not {list(numbers)}")
    return numbers


def figures(coefficients: npt.ArrayLike, steps: npt.ArrayLike) -> Figures:
    """Compute the figures of merit of weights.

    Parameters
    ----------
    coefficients
        Unnormalised weights, oldest first, shape (N,).
    steps
        Where in training the checkpoints were saved, shape (N,).

    Raises
    ------
    WeightError
        The weights sum to zero, or so nearly that no number can say how much they amplify.

    Examples
    --------
    >>> figures([1, 1, 1, 1], [10, 20, 30, 40]).mean_age
    15.0
    """
    row = np.asarray(coefficients, dtype=np.float64)
    total = sum(map(Fraction, row.tolist()))
    if not total:
        raise WeightError("the weights sum to zero, so there is no average; change one of them")
    try:
        proportions = np.array([float(Fraction(value) / total) for value in row.tolist()])
    except OverflowError:
        raise WeightError(
            "the weights nearly cancel, and would amplify beyond all bounds; change one of them"
        ) from None
    ages = np.asarray(steps, dtype=np.float64)
    return Figures(
        proportions,
        1.0 / float(np.sum(proportions**2)),
        float(np.sum(proportions * (ages[-1] - ages))),
        float(np.sum(np.abs(proportions))),
    )
