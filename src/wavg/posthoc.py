"""Post-hoc EMA: the average of any width at any step, from a few that were tracked.

It knows profiles and steps; where a file says what width it has is for `Input` to tell.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence

import numpy as np

from wavg.errors import WeightError
from wavg.moving import power_of
from wavg.schedule import F64, Input, Schedule, checked, checked_steps, spell, spell_number

__all__ = ["AMPLIFIES", "post_hoc_ema"]

# Where rounding and noise of the inputs come out ten times as large, a decimal digit of them is
# lost: of the two to three that bfloat16 has, that shows.
AMPLIFIES = 10.0

# The weights sum to about one where the inputs know the whole profile; what is missing at its end,
# behind the newest of them, no scaling brings back.
_KNOWN = 0.9


def post_hoc_ema(
    gamma: float | None = None,
    sigma_rel: float | None = None,
    step: float | None = None,
    tracked: Sequence[float] | None = None,
) -> Schedule:
    """Combine averages tracked by `power_ema` into the one of another width, or at another step.

    The weights x are those for which ``Σ x_i p_i`` is nearest to the wanted profile, p_i being the
    profile of the i-th input: the least-squares solution of ``A x = b``, where ⟨a,b⟩ of two
    profiles is ``(γ_a+1)(γ_b+1) (t_a/t_b)^e / ((γ_a+γ_b+1) max(t_a,t_b))``, e = γ_b if t_a < t_b,
    else -γ_a.

    Parameters
    ----------
    gamma, sigma_rel
        The width wanted, as for `power_ema`.
    step
        The end of the average wanted; by default the newest input's step, and not beyond it. Inputs
        that end later weigh nothing.
    tracked
        The widths that the inputs have, in the measure of the one wanted: one an input, or those of
        each step. A file whose name has one of them in it (``ema-0.05-1000``) is of that; without
        such names the order of the inputs counts, which are then as many at every step. By default
        what a file's metadata says (as `wavg.StreamingAverager` writes it), or its name
        (``sigma_rel=0.05`` or ``gamma=6.94`` in it). The name of a folder counts where inputs are
        in several.

    Notes
    -----
    Averages of two widths or more have to be given for each of many steps; equal steps are allowed
    here. A has the profiles' scalar products, and neighbours are nearly alike: its condition
    reaches 10⁸. The singular value decomposition, in float64, leaves out directions that rounding
    has swallowed, which the result does not depend on. What it does depend on are rounding and
    noise in the inputs: they come out larger by the amplification Σ|x|, and above 10 there is a
    warning. Before it is made one, the sum of x is the share of the profile that the inputs know;
    at a step between two of theirs it falls, and below 0.9 there is a warning, too.

    References
    ----------
    Karras et al. 2024, arXiv:2312.02696, section 3.2 and appendix C.

    Examples
    --------
    >>> schedule = post_hoc_ema(sigma_rel=0.08, tracked=[0.05, 0.10])
    >>> schedule([1000, 1000, 2000, 2000, 3000, 3000]).round(2) + 0.0
    array([ 0.  ,  0.  ,  0.  , -0.02,  0.26,  0.76])
    """
    wanted = power_of("post_hoc_ema", gamma, sigma_rel)
    end = None if step is None else checked(step, "post_hoc_ema: step")
    widths = None if tracked is None else _powers(tracked, sigma_rel is None)
    given = None if tracked is None else tuple(map(float, tracked))

    def combine(steps: F64, powers: F64) -> F64:
        checked_steps("post_hoc_ema", steps, positive=True)
        until = float(steps[-1]) if end is None else end
        used = steps <= until
        if not used.any():
            raise WeightError(
                f"post_hoc_ema: no input ends at step {spell_number(until)} or before; the first "
                f"ends at {spell_number(steps[0])}"
            )
        if until > steps[-1]:
            raise WeightError(
                f"post_hoc_ema: no input knows of step {spell_number(until)}; the newest ends at "
                f"{spell_number(steps[-1])}, so ask for a step up to that"
            )
        weights = np.zeros(len(steps))
        solution = _solve(steps[used], powers[used], until, wanted)
        known = float(solution.sum())
        if not known > 0:
            raise WeightError(f"{text}: the inputs know nothing of that average")
        weights[used] = solution / known
        if known < _KNOWN:
            warnings.warn(
                f"{text}: the inputs know a share of only {known:.2g} of that average, and are "
                f"scaled up; the newest up to step {spell_number(until)} ends at "
                f"{spell_number(steps[used][-1])}, and a step at which inputs end needs no scaling",
                stacklevel=3,
            )
        amplification = float(np.abs(weights).sum())
        if amplification > AMPLIFIES:
            warnings.warn(
                f"{text}: rounding and noise in the inputs grow by the amplification, "
                f"{amplification:.3g}; a width between those tracked, or more snapshots, need less",
                stacklevel=3,
            )
        return weights

    def coefficients(steps: F64) -> F64:
        if widths is None:
            raise WeightError(
                "post_hoc_ema needs the widths of the averages that were tracked: tracked=..., as "
                f"in {text},tracked=0.05/0.1, one an input or those of each step"
            )
        return combine(steps, _spread(widths, steps))

    def of_inputs(steps: F64, inputs: Sequence[Input]) -> F64:
        if widths is not None:
            named = _named(inputs, given or ())
            return coefficients(steps) if named is None else combine(steps, widths[named])
        return combine(steps, _powers_told(inputs, text))

    text = spell(
        "post_hoc_ema",
        gamma=gamma,
        sigma_rel=sigma_rel,
        step=end,
        tracked=given,
    )
    return Schedule(text, coefficients, of_inputs=of_inputs, repeats=True)


def _powers(tracked: Sequence[float], are_gammas: bool) -> F64:
    name = "post_hoc_ema: tracked"
    if isinstance(tracked, str) or not np.size(tracked):
        raise WeightError(f"{name} must be a list of widths, not {tracked!r}")
    if are_gammas:
        return np.array([power_of(name, gamma, None) for gamma in tracked])
    return np.array([power_of(name, None, width) for width in tracked])


def _named(inputs: Sequence[Input], tracked: Sequence[float]) -> list[int] | None:
    """Return which of the widths each input has by its name; None where names have none of them.

    The order alone would not do: naturally sorted, 0.1 comes before 0.05.
    """
    if len({*tracked}) < len(tracked):
        return None
    names, folders = _names(inputs)
    places = _widths_in(names, tracked)
    if not any(places) and len({*folders}) > 1:  # one folder for all is that of a run
        places = _widths_in(folders, tracked)
    if not any(places):
        return None
    for given, found in zip(inputs, places, strict=True):
        if len(found) != 1:
            raise WeightError(
                f"{given.path}: its name has {len(found) or 'none'} of the tracked widths, those "
                "of other inputs have one; give one width an input, in their order",
                path=given.path,
            )
    of_inputs = [found[0] for found in places]
    missing = sorted({*range(len(tracked))} - {*of_inputs})
    if missing:
        raise WeightError(
            f"post_hoc_ema: by their names ({inputs[0].path}) all inputs have the width "
            f"{' or '.join(spell_number(tracked[place]) for place in sorted({*of_inputs}))}, and "
            f"none has {spell_number(tracked[missing[0]])}, which is tracked, too; give one width "
            "an input, in their order"
        )
    return of_inputs


def _widths_in(names: Sequence[str], tracked: Sequence[float]) -> list[list[int]]:
    said = [{float(decimal) for decimal in re.findall(r"\d+\.\d+", name)} for name in names]
    return [[place for place, width in enumerate(tracked) if width in each] for each in said]


def _spread(powers: F64, steps: F64) -> F64:
    """Return the power of each input, from those of each or of each step."""
    if len(powers) == len(steps):
        return powers
    groups, rest = divmod(len(steps), len(powers))
    if rest or (np.diff(steps.reshape(groups, -1), axis=1) != 0).any():
        raise WeightError(
            f"post_hoc_ema: {len(powers)} widths were given for {len(steps)} inputs; give one an "
            "input, or as many as there are inputs at every step"
        )
    return np.tile(powers, groups)


def _powers_told(inputs: Sequence[Input], text: str) -> F64:
    """Return the power of each input, as its metadata, its name or its folder tells."""
    names, folders = _names(inputs)
    found = []
    for given, name, folder in zip(inputs, names, folders, strict=True):
        made_by = given.weights() or ""
        recorded = _RECORDED.fullmatch(made_by)
        if made_by.startswith("power_ema") and not recorded:
            raise WeightError(
                f"{given.path}: it was made by {made_by}, which is no power EMA over all steps",
                path=given.path,
            )
        match = recorded or _TOLD.search(name)
        if not match and len({*folders}) > 1:  # one folder for all is that of a run
            match = _TOLD.search(folder)
        if not match:
            raise WeightError(
                f"{given.path}: which width was it tracked with? Neither wavg's record in it nor "
                f"sigma_rel=... in its name tells; say it in the weights: {text},tracked=0.05/0.1, "
                "either the widths of all inputs in their order, or the few that were saved at "
                "every step",
                path=given.path,
            )
        widths = {"gamma": None, "sigma_rel": None, match[1]: float(match[2])}
        found.append(power_of(given.path, **widths))
    return np.array(found)


_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_TOLD = re.compile(rf"(gamma|sigma_rel)[=_-]?{_NUMBER}")
_RECORDED = re.compile(
    rf"(?:power_ema|post_hoc_ema):(gamma|sigma_rel)={_NUMBER}(?:,(?:step|tracked)=[^,]*)*"
)


def _names(inputs: Sequence[Input]) -> tuple[list[str], list[str]]:
    """Return the names of the inputs without ending, and those of their folders."""
    split = [os.path.split(os.path.abspath(given.path)) for given in inputs]
    names = [os.path.splitext(name)[0] for _, name in split]
    return names, [os.path.basename(folder) for folder, _ in split]


def _solve(steps: F64, powers: F64, end: float, wanted: float) -> F64:
    """Return the weights with which profiles come nearest to the wanted one."""
    from threadpoolctl import threadpool_limits

    times = steps / end
    products = _product(times[:, None], powers[:, None], times[None, :], powers[None, :])
    target = _product(times, powers, np.ones(1), np.full(1, wanted))
    with threadpool_limits(1, user_api="blas"):  # the same digits on every machine's cores
        weights, *_ = np.linalg.lstsq(products, target, rcond=None)
    return np.asarray(weights, np.float64)


def _product(times: F64, powers: F64, ends: F64, others: F64) -> F64:
    """Return the scalar product of profiles ``p(τ) = (γ+1)/t · (τ/t)^γ`` on (0, t]."""
    ratio = np.minimum(times, ends) / np.maximum(times, ends)
    exponent = np.where(times < ends, others, powers)
    scale = (powers + 1) * (others + 1) / ((powers + others + 1) * np.maximum(times, ends))
    return np.asarray(scale * ratio**exponent, np.float64)
