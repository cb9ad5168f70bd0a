"""Schedules by position, by step and by window: each a formula from steps to weights.

Moving averages are in `wavg.moving`. All weights are unnormalised, oldest checkpoint first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from numbers import Integral

import numpy as np

from wavg.errors import WeightError
from wavg.schedule import F64, Schedule, checked, checked_steps, spell, spell_number, unrolled

__all__ = [
    "cumulative_window",
    "equal",
    "explicit",
    "exponential",
    "lawa",
    "linear",
    "polynomial",
    "polynomial_decay",
    "schedule_free",
    "wsm",
]


def equal() -> Schedule:
    """Weigh all alike: ``c_i = 1``. Also called SWA, PMA-SMA, a uniform soup.

    References
    ----------
    Polyak & Juditsky 1992, *Acceleration of Stochastic Approximation by Averaging*;
    Izmailov et al. 2018, arXiv:1803.05407.

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
    decay = checked(alpha, "exponential: alpha")

    def coefficients(steps: F64) -> F64:
        with np.errstate(over="ignore"):  # so small an alpha leaves the newest alone
            return np.exp(np.arange(1.0 - len(steps), 1.0) / decay)

    return Schedule(
        spell("exponential", alpha=decay),
        coefficients,
        lambda *_: (math.exp(-1.0 / decay), 1.0),
    )


def polynomial(power: float = 2.0) -> Schedule:
    """Weigh by a power of the step: ``c_i = t_i^p``.

    Steps count, not positions, so that gaps in a series of checkpoints change nothing for those
    that are there. A checkpoint at step 0 weighs nothing.

    Parameters
    ----------
    power
        The power p, at least 0. With 1 the weights are linear in the step.

    References
    ----------
    arXiv:2003.04339.

    Examples
    --------
    >>> polynomial(power=2)([1, 2, 4])  # in proportion to the newest's
    array([0.0625, 0.25  , 1.    ])
    """
    exponent = checked(power, "polynomial: power", "a number of at least 0", lambda p: p >= 0)

    def coefficients(steps: F64) -> F64:
        steps = checked_steps("polynomial", steps)
        return np.asarray((steps / (steps[-1] or 1.0)) ** exponent, np.float64)

    return Schedule(
        spell("polynomial", power=exponent),
        coefficients,
        lambda _, step, before: _relative(before, step, exponent),
    )


def _relative(before: float, step: float, power: float) -> tuple[float, float]:
    """Take in a model at a step whose weight is t^p: in proportion to it, nothing overflows."""
    return (before / step) ** power if step else 0.0, 1.0 if step else 0.0**power


def polynomial_decay(eta: float = 3.0) -> Schedule:
    """Average so that the t-th model enters with ``(η+1) / (t+η)``, and the older ones give way.

    ``M_t = (1 - (η+1)/(t+η)) M_{t-1} + (η+1)/(t+η) θ_t``, which is ``c_i ∝ Γ(i+η) / Γ(i)``: equal
    weights for η = 0, linear ones for 1, about i^η. The recursion counts the models it is given,
    t = 1, 2, …, whatever their steps.

    Parameters
    ----------
    eta
        At least 0; 3 in the paper's experiments.

    References
    ----------
    Shamir & Zhang 2013, *Stochastic Gradient Descent for Non-smooth Optimization*, section 4.

    Examples
    --------
    >>> polynomial_decay(eta=1)([10, 20, 30]) * 6
    array([1., 2., 3.])
    """
    decay = checked(eta, "polynomial_decay: eta", "a number of at least 0", lambda e: e >= 0)

    def update(position: int, *_: float) -> tuple[float, float]:
        return (position - 1) / (position + decay), (decay + 1) / (position + decay)

    return Schedule(spell("polynomial_decay", eta=decay), unrolled(update), update)


def schedule_free(r: float = 0.0, warmup: float = 0.0) -> Schedule:
    """Weigh as Schedule-Free's average does: ``c_i = t_i^r · min(1, t_i / warmup)²``.

    The method weighs the k-th iterate, k = 0, 1, …, by (k+1)^r times the square of the largest
    learning rate so far. Here t = k + 1 is the step of a checkpoint, and the learning rate rises
    linearly over the warm-up and then stays. Without a warm-up this is `polynomial`.

    Parameters
    ----------
    r
        The power, at least 0.
    warmup
        The steps over which the learning rate rises.

    References
    ----------
    Defazio et al. 2024, *The Road Less Scheduled*, arXiv:2405.15682.

    Examples
    --------
    >>> schedule_free(warmup=20)([10, 20, 30])
    array([0.25, 1.  , 1.  ])
    """
    power = checked(r, "schedule_free: r", "a number of at least 0", lambda p: p >= 0)
    rise = checked(warmup, "schedule_free: warmup", "a number of at least 0", lambda w: w >= 0)

    def squared_rate(step: float) -> float:
        return min(1.0, step / rise) ** 2 if rise else 1.0

    def coefficients(steps: F64) -> F64:
        steps = checked_steps("schedule_free", steps)
        rates = np.array([squared_rate(step) for step in steps.tolist()])
        return np.asarray((steps / (steps[-1] or 1.0)) ** power * rates, np.float64)

    def update(_: int, step: float, before: float) -> tuple[float, float]:
        keep, add = _relative(before, step, power)
        return keep, add * squared_rate(step)

    return Schedule(spell("schedule_free", r=power, warmup=rise or None), coefficients, update)


def lawa(last: int = 10, every: int = 1) -> Schedule:
    """Average the newest and every k-th before it alike, up to so many; others weigh nothing.

    Parameters
    ----------
    last
        How many count; 10 in the paper's runs.
    every
        How far apart, in checkpoints: 2 leaves out every other.

    References
    ----------
    Kaddour 2022, arXiv:2209.14981; Sanyal et al. 2023, arXiv:2306.03241.

    Examples
    --------
    >>> lawa(last=2, every=3)([1, 2, 3, 4, 5, 6])
    array([0., 0., 1., 0., 0., 1.])
    """
    for key, value in (("last", last), ("every", every)):
        if not isinstance(value, Integral) or value < 1:
            raise WeightError(f"lawa: {key} must be a whole number from 1 on, not {value!r}")

    def coefficients(steps: F64) -> F64:
        ages = np.arange(len(steps))[::-1]
        return np.where((ages % every == 0) & (ages < last * every), 1.0, 0.0)

    return Schedule(spell("lawa", last=last, every=None if every == 1 else every), coefficients)


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "1-square": lambda x: 1 - x * x,
}


def wsm(shape: str | Callable[[float], float] = "linear") -> Schedule:
    """Merge checkpoints of a constant learning rate in place of letting it decay by a shape f.

    ``c_j = f(x_j) - f(x_{j+1})``, oldest j = 0: the average then has of each update what f leaves
    of it. ``x_j`` is the checkpoint's relative time; of K evenly spaced ones j / K. Where they are
    not, ``x_j = (K-1)/K · (t_j - t_0) / (t_{K-1} - t_0)``: the end is a mean gap beyond the newest.

    Parameters
    ----------
    shape
        ``"linear"`` (1-x, equal weights), ``"cosine"`` ((1+cos πx)/2), ``"1-sqrt"`` (1-√x, the most
        weight on the oldest), ``"1-square"`` (1-x², on the newest), or a function f with f(0) = 1
        and f(1) = 0.

    References
    ----------
    *WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging*, 2025, arXiv:2507.17634.

    Examples
    --------
    >>> wsm(shape="1-sqrt")(range(10)).round(3).tolist()
    [0.316, 0.131, 0.101, 0.085, 0.075, 0.067, 0.062, 0.058, 0.054, 0.051]
    >>> str(wsm(lambda x: (1 - x) ** 3))
    'wsm:shape=function(lambda)'
    """
    if callable(shape):
        decay = shape
        name = getattr(shape, "__name__", type(shape).__name__).strip("<>")
        text = f"function({name})"
        ends = [float(decay(x)) for x in (0.0, 1.0)]
        if not np.allclose(ends, [1, 0], rtol=0, atol=1e-9):
            raise WeightError(
                f"wsm: a shape must fall from f(0) = 1 to f(1) = 0; {name} goes from {ends[0]:g} "
                f"to {ends[1]:g}"
            )
    elif shape in _SHAPES:
        decay, text = _SHAPES[shape], shape
    else:
        raise WeightError(
            f"wsm: shape must be one of {', '.join(_SHAPES)}, or, in Python, a function as in "
            f"wavg.wsm(f), not {shape!r}"
        )

    def coefficients(steps: F64) -> F64:
        count = len(steps)
        if count == 1:
            return np.ones(1)
        times = (steps - steps[0]) / (steps[-1] - steps[0]) * ((count - 1) / count)
        left = [float(decay(x)) for x in [*times.tolist(), 1.0]]
        return -np.diff(np.array(left))

    return Schedule(f"wsm:shape={text}", coefficients)


def cumulative_window() -> Schedule:
    """Take the mean over a window from means over all steps: ``(e·M_e - s·M_s) / (e - s)``.

    The inputs are cumulative means, each over all models up to its step. The newest, of step e, and
    the oldest, of step s, give the mean over the steps behind s up to e; those between weigh
    nothing. `last` chooses where the window begins.

    Examples
    --------
    >>> cumulative_window()([100, 200, 300])
    array([-100.,    0.,  300.])
    """

    def coefficients(steps: F64) -> F64:
        steps = checked_steps("cumulative_window", steps)
        weights = np.zeros(len(steps))
        weights[0] = -steps[0]
        weights[-1] = steps[-1]  # of one input, that alone
        return weights

    return Schedule("cumulative_window", coefficients)


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
    except OverflowError as error:
        raise WeightError(f"weights must be numbers that float64 has: {error}") from None
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

    text = ",".join(map(spell_number, values.tolist()))
    return Schedule(text, coefficients, count=len(values))
