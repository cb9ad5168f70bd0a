"""Weights by name: the text form of schedules, what stands for one, and figures of merit.

The schedules themselves are in `wavg.rules`, `wavg.moving`, `wavg.posthoc` and `wavg.listed`; other
modules take them from here. A schedule is written in one short text, ``exponential:alpha=2``, that
the command line, the reports and the constructors share.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from wavg import listed
from wavg.errors import WeightError
from wavg.moving import bema, dema, ema, power_ema
from wavg.posthoc import AMPLIFIES, post_hoc_ema
from wavg.rules import (
    cumulative_window,
    equal,
    explicit,
    exponential,
    lawa,
    linear,
    polynomial,
    polynomial_decay,
    schedule_free,
    wsm,
)
from wavg.schedule import F64, Input, Schedule, spell

if TYPE_CHECKING:
    from typing_extensions import TypeIs

__all__ = [
    "AMPLIFIES",
    "F64",
    "KNOWN",
    "Figures",
    "Input",
    "Schedule",
    "WeightsLike",
    "as_numbers",
    "bema",
    "check_steps",
    "cumulative_window",
    "dema",
    "ema",
    "equal",
    "explicit",
    "exponential",
    "figures",
    "is_several",
    "lawa",
    "linear",
    "parameters",
    "parse",
    "polynomial",
    "polynomial_decay",
    "post_hoc_ema",
    "power_ema",
    "purpose",
    "resolve",
    "schedule_free",
    "wsm",
]

WeightsLike: TypeAlias = (
    "str | Schedule | Sequence[float] | npt.NDArray[np.float64] | Mapping[str, float]"
)

_CONSTRUCTORS: dict[str, Callable[..., Schedule]] = {
    made.__name__: made
    for made in (
        equal,
        linear,
        exponential,
        polynomial,
        polynomial_decay,
        schedule_free,
        lawa,
        ema,
        dema,
        bema,
        power_ema,
        post_hoc_ema,
        wsm,
        cumulative_window,
    )
}
KNOWN = (
    *("equal", "linear", "exponential:alpha=2", "polynomial:power=2", "polynomial_decay:eta=3"),
    *("schedule_free:r=0", "lawa:last=10", "ema:decay=0.99", "ema:half_life=1000"),
    *("dema:decay=0.99", "bema", "power_ema:sigma_rel=0.1", "post_hoc_ema:sigma_rel=0.1"),
    *("wsm:shape=1-sqrt", "cumulative_window"),
)


def parse(text: str) -> Schedule:
    """Read the text form of a schedule: ``NAME``, ``NAME:KEY=VALUE,…`` or numbers with commas.

    A text that ends with ``.json`` or ``.csv`` is a file that lists the weights.

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
    if name not in _CONSTRUCTORS:
        if text.lower().endswith(listed.ENDINGS):
            return listed.read(text)
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            raise WeightError(
                f"unknown weights {text!r}; {_meant(name)}there are {', '.join(KNOWN)}, numbers "
                "with commas, one a checkpoint, oldest first, such as 0.2,0.3,0.5, and files that "
                "list them, such as weights.json or weights.csv"
            ) from None
        return explicit(numbers)
    takes = inspect.signature(_CONSTRUCTORS[name]).parameters
    arguments: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in takes or not equals or key in arguments:
            raise WeightError(
                f"cannot understand {part!r} in weights {text!r}; "
                f"{name} takes {', '.join(f'{key}=...' for key in takes) or 'no parameters'}"
            )
        read, kind = _READERS[takes[key].annotation.partition(" |")[0]]
        try:
            arguments[key] = read(value)
        except (ValueError, KeyError):
            raise WeightError(f"{value!r} in weights {text!r} is not {kind}") from None
    return _CONSTRUCTORS[name](**arguments)


def _meant(name: str) -> str:
    """Ask about the name that is nearest, or that others have for the same; or say nothing."""
    said = name.strip().lower()
    near = difflib.get_close_matches(said, _CONSTRUCTORS, n=1)
    near = [_ELSEWHERE[said]] if said in _ELSEWHERE else near
    return f"did you mean {near[0]}? Otherwise " if near else ""


_ELSEWHERE = {
    **dict.fromkeys(("uniform", "mean", "average", "swa", "sma"), "equal"),
    **dict.fromkeys(("wma",), "linear"),
    **dict.fromkeys(("exp",), "exponential"),
}


def parameters() -> dict[str, dict[str, str | None]]:
    """Return every schedule's parameters with their defaults as text, or None where there is none.

    >>> parameters()["schedule_free"]
    {'r': '0', 'warmup': '0'}
    """
    return {
        name: {
            key: None if each.default is None else spell(key, _=each.default).partition("=")[2]
            for key, each in inspect.signature(made).parameters.items()
        }
        for name, made in _CONSTRUCTORS.items()
    }


def purpose(name: str) -> str:
    """Return what a schedule is for, in a line.

    >>> purpose("polynomial")
    'Weigh by a power of the step: c_i = t_i^p.'
    """
    said = inspect.getdoc(_CONSTRUCTORS[name]) or ""
    return said.partition("\n")[0].replace("`", "")


# How a parameter's value is read, by its annotation.
_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "float": (float, "a number"),
    "int": (int, "a whole number"),
    "str": (str, "a text"),
    "bool": ({"true": True, "false": False}.__getitem__, "true or false"),
    "Sequence[float]": (lambda text: [float(part) for part in text.split("/")], "numbers with /"),
}


def is_several(weights: WeightsLike | Sequence[WeightsLike]) -> TypeIs[Sequence[WeightsLike]]:
    """Tell a list of schedules from one: numbers are the weights of a single one.

    >>> is_several("linear"), is_several([1, 2]), is_several(["equal", "linear"])
    (False, False, True)
    >>> is_several([[1, 2], [1, 3]])
    True
    """
    if isinstance(weights, (str, Schedule, Mapping)) or not isinstance(weights, Iterable):
        return False
    return any(isinstance(item, (str, Schedule, Mapping)) or np.ndim(item) > 0 for item in weights)


def resolve(weights: WeightsLike) -> Schedule:
    """Return what a text, a schedule, a list of numbers or numbers by name stand for."""
    if isinstance(weights, Schedule):
        return weights
    if isinstance(weights, str):
        return parse(weights)
    if isinstance(weights, Mapping):
        return listed.of_mapping(weights)
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


def as_numbers(steps: Sequence[float]) -> tuple[float, ...]:
    """Return steps as floats, or refuse them.

    >>> as_numbers([10, 20])
    (10.0, 20.0)
    """
    try:
        return tuple(map(float, steps))
    except (TypeError, ValueError, OverflowError) as error:
        raise WeightError(f"steps must be numbers: {error}") from None


def check_steps(steps: Sequence[float], *, repeats: bool = False) -> tuple[float, ...]:
    """Return steps as numbers, or refuse those that do not increase, or fall where they may repeat.

    >>> check_steps([10, 20])
    (10.0, 20.0)
    """
    numbers = as_numbers(steps)
    rising = all(a < b or (repeats and a == b) for a, b in itertools.pairwise(numbers))
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
