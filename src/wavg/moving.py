"""Exponential moving averages and their kin, from snapshots taken at any steps.

Each is defined by its recursion, which is also its streaming form; the weights are that unrolled.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from wavg.errors import WeightError
from wavg.schedule import F64, Schedule, Update, checked, checked_steps, spell, unrolled

__all__ = ["bema", "dema", "ema", "gamma_of", "power_ema", "sigma_rel_of"]

_NARROWEST = 1e-6  # of a million steps, the last; the power is a million, too
_WIDEST = math.sqrt(1 / 12)  # the relative width of equal weights over time, gamma = 0


def ema(
    decay: float | None = None,
    half_life: float | None = None,
    per: str = "snapshot",
    debias: bool = True,
    warmup: str | None = None,
    gamma: float = 1.0,
    power: float = 2 / 3,
) -> Schedule:
    """Average exponentially: ``M_i = β_i M_{i-1} + (1 - β_i) θ_i``.

    With a decay per snapshot β is the same for each. Per step it is ``β^Δt`` over a gap of Δt
    steps, and a half-life h in steps is ``2^(-Δt/h)``: what an average tracked at every step would
    be, had the model changed only at the snapshots; the oldest then stands for all steps since 0.

    Parameters
    ----------
    decay
        β, between 0 and 1.
    half_life
        In place of a decay: after so many steps, a snapshot counts half. Positive.
    per
        ``"snapshot"``, or ``"step"``: what the decay is for.
    debias
        True begins with nothing and divides by the weights so far, ``1 - Π β_i``. False begins with
        the oldest, ``M_1 = θ_1``, which keeps the weight ``Π β_i``.
    warmup
        ``"ratio"``: the decay is at most ``(1+n) / (10+n)``, n = 0, 1, … the snapshots before it;
        ``"power"``: at most ``1 - (1 + n/γ)^(-p)``. Only per snapshot.
    gamma, power
        γ and p of that warm-up, positive.

    Examples
    --------
    >>> ema(decay=0.5)([10, 20, 30])
    array([0.125, 0.25 , 0.5  ])
    >>> ema(decay=0.5, debias=False)([10, 20, 30])
    array([0.25, 0.25, 0.5 ])
    >>> ema(half_life=10)([10, 20, 40])  # two half-lives behind the last but one
    array([0.0625, 0.125 , 0.75  ])
    """
    beta = _decay("ema", decay, half_life, per)
    if not isinstance(debias, bool):
        raise WeightError(f"ema: debias must be true or false, not {debias!r}")
    if warmup not in (None, "ratio", "power"):
        raise WeightError(f"ema: warmup must be ratio or power, not {warmup!r}")
    if warmup and (per == "step" or half_life is not None):
        raise WeightError("ema: a warm-up counts snapshots, so the decay must be per snapshot")
    scale = checked(gamma, "ema: gamma")
    exponent = checked(power, "ema: power")

    def update(position: int, step: float, before: float) -> tuple[float, float]:
        if position == 1 and not debias:
            return 0.0, 1.0
        keep, lost = beta(step - before)
        n = position - 1
        if warmup == "ratio" and (1 + n) / (10 + n) < keep:
            keep, lost = (1 + n) / (10 + n), 9 / (10 + n)
        if warmup == "power" and (1 + n / scale) ** -exponent > lost:
            lost = (1 + n / scale) ** -exponent
            keep = 1 - lost
        return keep, lost

    text = spell(
        "ema",
        **_given(decay, half_life, per),
        debias=None if debias else False,
        warmup=warmup,
        gamma=scale if warmup == "power" else None,
        power=exponent if warmup == "power" else None,
    )
    return Schedule(text, _from_zero("ema", update, debias and _by_steps(half_life, per)), update)


def _by_steps(half_life: float | None, per: str) -> bool:
    return half_life is not None or per == "step"


def _from_zero(name: str, update: Update, counts: bool) -> Callable[[F64], F64]:
    """Unroll a recursion; one that counts from step 0 refuses steps before."""
    plain = unrolled(update)
    return (lambda steps: plain(checked_steps(name, steps))) if counts else plain


def _given(decay: float | None, half_life: float | None, per: str) -> dict[str, float | str | None]:
    return {
        "decay": decay,
        "half_life": half_life,
        "per": "step" if decay is not None and per == "step" else None,
    }


def _decay(
    name: str, decay: float | None, half_life: float | None, per: str
) -> Callable[[float], tuple[float, float]]:
    """Return the function from a gap in steps to the decay β over it, and to 1 - β."""
    if (decay is None) == (half_life is None):
        raise WeightError(
            f"{name}: give one of decay, as in {name}:decay=0.99, and half_life, in steps"
        )
    if per not in ("snapshot", "step"):
        raise WeightError(f"{name}: per must be snapshot or step, not {per!r}")
    if half_life is not None:
        rate = -math.log(2) / checked(half_life, f"{name}: half_life")
    else:
        beta = checked(
            decay, f"{name}: decay", "a number between 0 and 1", lambda number: 0 < number < 1
        )
        if per == "snapshot":
            return lambda _: (beta, 1 - beta)
        rate = math.log(beta)
    # expm1: 1 - β keeps its digits where β is nearly one
    return lambda gap: (math.exp(rate * gap), -math.expm1(rate * gap))


def dema(
    decay: float | None = None, half_life: float | None = None, per: str = "snapshot"
) -> Schedule:
    """Average doubly exponentially, ``2·EMA - EMA(EMA)``: with less lag; weights may be negative.

    Both averages begin with the oldest checkpoint, as `ema` does with ``debias=False``.

    Parameters
    ----------
    decay, half_life, per
        As for `ema`.

    References
    ----------
    Mulloy 1994, *Smoothing Data with Faster Moving Averages*.

    Examples
    --------
    >>> dema(decay=0.5)([10, 20, 30])
    array([0.  , 0.25, 0.75])
    """
    beta = _decay("dema", decay, half_life, per)

    def coefficients(steps: F64) -> F64:
        decays = [(0.0, 1.0), *map(beta, np.diff(steps).tolist())]
        weights = np.empty(len(steps))
        # Backwards: what of the result goes to M_i, and through it to the models before.
        double, single = -1.0, 2.0  # still to be shared out: of EMA(EMA), and of EMA
        for i in range(len(steps) - 1, -1, -1):
            keep, add = decays[i]
            single += add * double
            double *= keep
            weights[i] = add * single
            single *= keep
        return weights

    return Schedule(spell("dema", **_given(decay, half_life, per)), coefficients)


def bema(kappa: float = 0.5, eta: float = 0.2, rho: float = 10.0, gamma: float = 1.0) -> Schedule:
    """Average exponentially and take back the lag: ``EMA_t + α_t (θ_t - θ_0)``.

    ``EMA_t = (1 - β_t) EMA_{t-1} + β_t θ_t``, ``β_t = (ρ+γt)^(-κ)``, ``α_t = (ρ+γt)^(-η)``. The
    recursion counts the checkpoints it is given, whatever their steps: t = 0 is the oldest, which
    is θ_0 and the first average. (Counting steps, but moving once a snapshot, the average would
    stay where it began.)

    Parameters
    ----------
    kappa, eta
        The powers with which averaging grows longer and the correction fades; at least 0.
    rho
        The lag, at least 1.
    gamma
        The multiplier of t, at least 0.

    References
    ----------
    *EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes*, 2025.

    Examples
    --------
    >>> bema()([10, 20, 30]).round(3)
    array([-0.112,  0.214,  0.897])
    """
    k, e = (
        checked(value, f"bema: {name}", "a number of at least 0", lambda number: number >= 0)
        for name, value in (("kappa", kappa), ("eta", eta))
    )
    lag = checked(rho, "bema: rho", "a number of at least 1", lambda number: number >= 1)
    times = checked(gamma, "bema: gamma", "a number of at least 0", lambda number: number >= 0)

    def coefficients(steps: F64) -> F64:
        scale = lag + times * np.arange(len(steps))
        beta = scale**-k
        beta[0] = 1.0
        weights = beta * np.append(np.cumprod(1 - beta[:0:-1])[::-1], 1.0)
        correction = scale[-1] ** -e
        weights[-1] += correction
        weights[0] -= correction
        return np.asarray(weights, np.float64)

    text = spell(
        "bema",
        kappa=None if k == 0.5 else k,
        eta=None if e == 0.2 else e,
        rho=None if lag == 10 else lag,
        gamma=None if times == 1 else times,
    )
    return Schedule(text, coefficients)


def power_ema(gamma: float | None = None, sigma_rel: float | None = None) -> Schedule:
    """Average with weights that grow as a power of time: density ``∝ t^γ`` up to the newest step.

    ``M_i = β_i M_{i-1} + (1 - β_i) θ_i`` with ``β_i = (t_{i-1} / t_i)^(γ+1)``, t_0 = 0, which is
    ``c_i = (t_i^(γ+1) - t_{i-1}^(γ+1)) / t_N^(γ+1)``: the width stays in proportion to the run.

    Parameters
    ----------
    gamma
        The power γ, from 0 to 1e9.
    sigma_rel
        In place of it the width of the profile relative to the run: its standard deviation over
        its end, ``σ² = (γ+1) / ((γ+2)² (γ+3))``. From 1e-6 to √(1/12) = 0.2886.

    References
    ----------
    Karras et al. 2024, *Analyzing and Improving the Training Dynamics of Diffusion Models*,
    arXiv:2312.02696, section 3.

    Examples
    --------
    >>> power_ema(gamma=1)([1, 2, 3]) * 9
    array([1., 3., 5.])
    >>> round(gamma_of(sigma_rel=0.1), 3)
    6.937
    """
    power = power_of("power_ema", gamma, sigma_rel)

    def update(_: int, step: float, before: float) -> tuple[float, float]:
        if step <= 0:
            return 0.0, 0.0  # at step 0 there is no time yet
        if before <= 0:
            return 0.0, 1.0
        # expm1 and log1p: the weight keeps its digits where a gap is short
        log = (power + 1) * math.log1p((before - step) / step)
        return math.exp(log), -math.expm1(log)

    return Schedule(
        spell("power_ema", gamma=gamma, sigma_rel=sigma_rel),
        _from_zero("power_ema", update, True),
        update,
    )


def power_of(name: str, gamma: float | None, sigma_rel: float | None) -> float:
    """Return the power γ that one of the two stands for, or refuse them."""
    if (gamma is None) == (sigma_rel is None):
        raise WeightError(
            f"{name}: give one of sigma_rel, as in {name}:sigma_rel=0.1, and gamma, the power"
        )
    if gamma is not None:
        return checked(gamma, f"{name}: gamma", "a number from 0 to 1e9", lambda g: 0 <= g <= 1e9)
    width = checked(
        sigma_rel,
        f"{name}: sigma_rel",
        "a number from 1e-6 to 0.2886, the width of equal weights",
        lambda s: _NARROWEST <= s <= _WIDEST,
    )
    return gamma_of(width)


def gamma_of(sigma_rel: float) -> float:
    """Return the power γ of the profile ``t^γ`` with a relative width.

    It is the largest real root of ``γ³ + 7γ² + (16 - s)γ + (12 - s)``, s = σ^(-2).

    >>> round(gamma_of(0.05), 2), round(gamma_of(0.1), 2)
    (16.97, 6.94)
    """
    s = sigma_rel**-2
    roots = np.roots([1, 7, 16 - s, 12 - s])
    return max(0.0, float(roots[np.isreal(roots)].real.max()))


def sigma_rel_of(gamma: float) -> float:
    """Return the relative width of the profile ``t^γ``.

    >>> round(sigma_rel_of(6.94), 4)
    0.1
    """
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
