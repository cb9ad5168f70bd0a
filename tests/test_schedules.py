"""Each schedule against its recursive definition, run naively in exact fractions; against published
numbers; and its streaming form against its closed form."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wavg
from wavg.errors import WeightError
from wavg.moving import gamma_of, sigma_rel_of
from wavg.weights import KNOWN, figures, parse

EVEN = [10.0, 20.0, 30.0, 40.0, 50.0]
UNEVEN = [3.0, 4.0, 10.0, 11.5, 100.0]
FROM_ZERO = [0.0, 1.0, 2.0, 7.0]
LONG = [float(step) for step in np.cumsum(np.random.default_rng(0).integers(1, 50, 30))]
STEPS = [EVEN, UNEVEN, LONG, [5.0]]


def unit(count, position):
    """A model that is 1 for one checkpoint and 0 for the others: its average is that weight."""
    return [Fraction(int(position == place)) for place in range(count)]


def weights_of(recursion, steps):
    """The weights that a recursion over scalar models gives, by running it on unit models."""
    return [recursion(unit(len(steps), place), steps) for place in range(len(steps))]


def assert_weighs(schedule, steps, recursion, rtol=1e-12, atol=0.0):
    expected = np.array([float(w) for w in weights_of(recursion, steps)])
    found = schedule(steps)
    assert found.dtype == np.float64
    np.testing.assert_allclose(
        found / math.fsum(found), expected / math.fsum(expected), rtol=rtol, atol=atol
    )


def streamed(schedule, steps):
    weights, before = [], 0.0
    for position, step in enumerate(steps, start=1):
        keep, add = schedule.update(position, step, before)
        weights = [keep * weight for weight in weights] + [add]
        before = step
    return np.array(weights)


# Recursions, as published


def moving(decay_of, first):
    """``M = β M + (1-β) θ``; begins with 0 and divides by the weights, or with the first model."""

    def run(models, steps):
        average, total, before = Fraction(0), Fraction(0), Fraction(0)
        for n, (model, step) in enumerate(zip(models, steps, strict=True)):
            beta = decay_of(n, Fraction(step) - before)
            before = Fraction(step)
            if first and n == 0:
                average, total = model, Fraction(1)
                continue
            average = beta * average + (1 - beta) * model
            total = beta * total + (1 - beta)
        return average / total

    return run


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_ema_with_a_decay_per_snapshot(decay, steps, debias):
    recursion = moving(lambda n, gap: Fraction(decay), first=not debias)
    assert_weighs(wavg.ema(decay=decay, debias=debias), steps, recursion)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_ema_weights_are_those_of_the_closed_form(count):
    beta, ages = 0.75, np.arange(count)[::-1]
    expected = (1 - beta) * beta**ages
    np.testing.assert_allclose(wavg.ema(decay=beta)(range(1, count + 1)), expected, rtol=1e-13)
    merit = figures(wavg.ema(decay=beta)(range(1, count + 1)), range(1, count + 1))
    np.testing.assert_allclose(merit.proportions, expected / (1 - beta**count), rtol=1e-13)
    expected[0] = beta ** (count - 1)
    np.testing.assert_allclose(
        wavg.ema(decay=beta, debias=False)(range(1, count + 1)), expected, rtol=1e-13
    )


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("steps", [*STEPS, FROM_ZERO])
def test_ema_by_steps_decays_over_a_gap_by_beta_to_its_length(steps, debias):
    by_steps = moving(lambda n, gap: Fraction(0.97 ** float(gap)), first=not debias)
    assert_weighs(wavg.ema(decay=0.97, per="step", debias=debias), steps, by_steps, 1e-9)
    halves = moving(lambda n, gap: Fraction(2.0 ** (-float(gap) / 7)), first=not debias)
    assert_weighs(wavg.ema(half_life=7, debias=debias), steps, halves, 1e-9)


def test_ema_by_steps_is_the_one_tracked_at_every_step_of_a_model_that_changes_at_snapshots():
    steps, decay = [4, 5, 9, 20], 0.9
    for place in range(4):
        average = Fraction(0)
        for step in range(1, 21):
            model = int(next(i for i, s in enumerate(steps) if step <= s) == place)
            average = Fraction(decay) * average + (1 - Fraction(decay)) * model
        found = wavg.ema(decay=decay, per="step")(steps)[place]
        assert found == pytest.approx(float(average), rel=1e-12)


@pytest.mark.parametrize("debias", [True, False])
def test_ema_with_the_warm_up_by_a_ratio(debias):
    recursion = moving(lambda n, _: min(Fraction(0.6), Fraction(1 + n, 10 + n)), first=not debias)
    schedule = wavg.ema(decay=0.6, warmup="ratio", debias=debias)
    assert_weighs(schedule, LONG, recursion)


@pytest.mark.parametrize(("gamma", "power"), [(1.0, 2 / 3), (5.0, 0.75)])
@pytest.mark.parametrize("debias", [True, False])
def test_ema_with_the_warm_up_by_a_power(gamma, power, debias):
    def decay(n, _):
        return min(Fraction(0.9), Fraction(1 - (1 + n / gamma) ** -power))

    schedule = wavg.ema(decay=0.9, warmup="power", gamma=gamma, power=power, debias=debias)
    assert_weighs(schedule, LONG, moving(decay, first=not debias), 1e-11)


def polynomial_decay(eta):
    def run(models, steps):
        average = Fraction(0)
        for t, model in enumerate(models, start=1):
            part = Fraction(eta + 1) / (t + Fraction(eta))
            average = (1 - part) * average + part * model
        return average

    return run


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("eta", [0, 1, 3, 8, Fraction(1, 2)])
def test_polynomial_decay(eta, steps):
    assert_weighs(wavg.polynomial_decay(eta=eta), steps, polynomial_decay(eta))


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_polynomial_decay_weighs_by_a_quotient_of_gammas(eta):
    expected = [math.gamma(i + eta) / math.gamma(i) for i in range(1, 21)]
    found = wavg.polynomial_decay(eta=eta)(range(20))
    np.testing.assert_allclose(found / found[-1], np.array(expected) / expected[-1], rtol=1e-12)


@pytest.mark.parametrize("steps", [*STEPS, FROM_ZERO])
@pytest.mark.parametrize("power", [0, 1, 2, 7.5])
def test_polynomial_weighs_by_a_power_of_the_step(power, steps):
    expected = np.array(steps) ** power
    found = wavg.polynomial(power=power)(steps)
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-12)


def test_polynomial_of_huge_powers_and_steps_is_finite():
    assert np.isfinite(wavg.polynomial(power=500)([1e5, 2e5, 3e5])).all()


def schedule_free(r, warmup):
    def run(models, steps):
        """As published: x ← (1-c) x + c z, c the weight over the sum of weights, by every step."""
        average, total = Fraction(0), Fraction(0)
        for model, step in zip(models, steps, strict=True):
            k = Fraction(step) - 1
            rate = min(Fraction(1), (k + 1) / warmup) if warmup else Fraction(1)
            weight = (k + 1) ** r * rate**2
            total += weight
            c = weight / total
            average = (1 - c) * average + c * model
        return average

    return run


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("r", "warmup"), [(0, 0), (2, 0), (0, 25), (3, 1000)])
def test_schedule_free(r, warmup, steps):
    assert_weighs(wavg.schedule_free(r=r, warmup=warmup), steps, schedule_free(r, warmup))


def power_ema(gamma):
    def run(models, steps):
        average, before = Fraction(0), Fraction(0)
        for model, step in zip(models, map(Fraction, steps), strict=True):
            beta = (1 - (step - before) / step) ** (gamma + 1)
            average, before = beta * average + (1 - beta) * model, step
        return average

    return run


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("gamma", [0, 1, 7, 17])
def test_power_ema(gamma, steps):
    assert_weighs(wavg.power_ema(gamma=gamma), steps, power_ema(gamma))


@pytest.mark.parametrize("gamma", [0.0, 6.94, 16.97])
def test_power_ema_telescopes(gamma):
    times = np.array([0.0, *LONG])
    expected = np.diff(times ** (gamma + 1)) / LONG[-1] ** (gamma + 1)
    np.testing.assert_allclose(wavg.power_ema(gamma=gamma)(LONG), expected, rtol=1e-9)


def test_power_ema_keeps_its_digits_where_gaps_are_short():
    steps = [10.0**9 + i for i in range(4)]
    exact = weights_of(power_ema(6), steps)
    found = wavg.power_ema(gamma=6)(steps)
    np.testing.assert_allclose(found, [float(weight) for weight in exact], rtol=1e-12)


def test_a_checkpoint_at_step_zero_has_no_time_and_no_weight():
    for schedule in (wavg.power_ema(gamma=2), wavg.ema(half_life=3), wavg.polynomial()):
        assert schedule(FROM_ZERO)[0] == 0
        assert schedule(FROM_ZERO)[-1] > 0


# Published numbers: a relative width and its power


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_relative_widths_have_the_published_powers(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-3)


@given(st.floats(0, 1e4))
def test_a_width_and_its_power_are_the_same(gamma):
    assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-8, abs=1e-6)


def test_the_relative_width_is_the_standard_deviation_of_the_profile():
    ages = np.linspace(0, 1, 200_001)[1:]
    profile = ages**6.937
    profile /= profile.sum()
    mean = (profile * ages).sum()
    assert math.sqrt((profile * (ages - mean) ** 2).sum()) == pytest.approx(0.1, abs=1e-4)


# Merging in place of decay

MERGED = {
    "1-sqrt": [0.316, 0.131, 0.101, 0.085, 0.075, 0.067, 0.062, 0.058, 0.054, 0.051],
    "linear": [0.1] * 10,
}


@pytest.mark.parametrize("shape", MERGED)
def test_wsm_has_the_published_weights_of_ten_checkpoints(shape):
    found = wavg.wsm(shape=shape)(range(100, 1100, 100))
    np.testing.assert_allclose(found, MERGED[shape], atol=0.0006)


def test_wsm_by_a_half_cosine_weighs_the_middle_and_by_a_square_the_newest():
    cosine, square = (wavg.wsm(shape=shape)(range(10)) for shape in ("cosine", "1-square"))
    assert [round(float(cosine[i]), 3) for i in (0, 4, 9)] == [0.024, 0.155, 0.024]
    assert [round(float(square[i]), 2) for i in (0, 9)] == [0.01, 0.19]


@pytest.mark.parametrize(
    "shape", ["linear", "cosine", "1-sqrt", "1-square", lambda x: (1 - x) ** 3]
)
@pytest.mark.parametrize("steps", [EVEN, UNEVEN, LONG])
def test_wsm_leaves_of_each_update_what_the_decay_would(shape, steps):
    """θ_j is θ_0 and the updates up to it: the average has of update j the weights from j on."""
    shapes = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
        "1-sqrt": lambda x: 1 - x**0.5,
        "1-square": lambda x: 1 - x**2,
    }
    f = shapes.get(shape, shape)
    count = len(steps)
    end = (steps[-1] - steps[0]) * count / (count - 1)
    survive = [f((step - steps[0]) / end) for step in steps]
    found = np.cumsum(wavg.wsm(shape)(steps)[::-1])[::-1]
    np.testing.assert_allclose(found, survive, rtol=1e-12)


def test_wsm_of_evenly_spaced_checkpoints_goes_by_positions():
    f = lambda x: 1 - math.sqrt(x)  # noqa: E731
    expected = [f(j / 5) - f((j + 1) / 5) for j in range(5)]
    np.testing.assert_allclose(wavg.wsm(shape="1-sqrt")(EVEN), expected, rtol=1e-12)


def test_wsm_of_one_checkpoint_is_that():
    assert wavg.wsm()([7]).tolist() == [1]


# LAWA and windows


@pytest.mark.parametrize(
    ("last", "every", "expected"),
    [
        (1, 1, [0, 0, 0, 0, 0, 1]),
        (3, 1, [0, 0, 0, 1, 1, 1]),
        (3, 2, [0, 1, 0, 1, 0, 1]),
        (2, 3, [0, 0, 1, 0, 0, 1]),
        (9, 1, [1, 1, 1, 1, 1, 1]),
        (9, 4, [0, 1, 0, 0, 0, 1]),
    ],
)
def test_lawa_takes_the_newest_and_every_kth_before_it(last, every, expected):
    assert wavg.lawa(last=last, every=every)(range(6)).tolist() == expected


def test_a_window_of_cumulative_means_is_the_mean_over_it():
    values = np.random.default_rng(0).standard_normal(20)
    means = {end: values[:end].mean() for end in (5, 8, 20)}
    average = wavg.average(
        [[means[5]], [means[8]], [means[20]]], "cumulative_window", steps=[5, 8, 20]
    )
    assert average[0] == pytest.approx(values[5:].mean(), rel=1e-12)
    assert wavg.cumulative_window()([5, 20]).tolist() == [-5, 20]
    assert wavg.cumulative_window()([20]).tolist() == [20]


# Corrected averages


def bema(kappa, eta, rho, gamma):
    def run(models, steps):
        ema = models[0]
        for t, model in enumerate(models[1:], start=1):
            beta = Fraction((rho + gamma * t) ** -kappa)
            ema = (1 - beta) * ema + beta * model
        alpha = Fraction((rho + gamma * (len(steps) - 1)) ** -eta)
        return ema + alpha * (models[-1] - models[0])

    return run


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("parameters", [(0.5, 0.2, 10, 1), (0.5, 0.4, 10, 0.25), (1, 0, 1, 1)])
def test_bema(parameters, steps):
    names = dict(zip(("kappa", "eta", "rho", "gamma"), parameters, strict=True))
    assert_weighs(wavg.bema(**names), steps, bema(*parameters), atol=1e-15)


def dema(decay_of):
    def run(models, steps):
        single = double = models[0]
        for model, before, step in zip(models[1:], steps, steps[1:], strict=False):
            beta = Fraction(decay_of(step - before))
            single = beta * single + (1 - beta) * model
            double = beta * double + (1 - beta) * single
        return 2 * single - double

    return run


@pytest.mark.parametrize("steps", STEPS)
def test_dema(steps):
    assert_weighs(wavg.dema(decay=0.8), steps, dema(lambda gap: 0.8), atol=1e-15)
    halves = dema(lambda gap: 2 ** (-gap / 5))
    assert_weighs(wavg.dema(half_life=5), steps, halves, 1e-9, atol=1e-12)
    by_steps = dema(lambda gap: 0.9**gap)
    assert_weighs(wavg.dema(decay=0.9, per="step"), steps, by_steps, 1e-9, atol=1e-12)


def test_the_comparison_with_a_recursion_sees_a_planted_error():
    with pytest.raises(AssertionError):
        assert_weighs(wavg.ema(decay=0.8), EVEN, moving(lambda *_: Fraction(4, 5), first=True))


# Streams

STREAMING = [
    wavg.polynomial(power=0),
    wavg.polynomial(power=3),
    wavg.polynomial_decay(eta=3),
    wavg.schedule_free(r=1, warmup=30),
    wavg.ema(decay=0.9),
    wavg.ema(decay=0.9, debias=False),
    wavg.ema(decay=0.99, per="step"),
    wavg.ema(half_life=20),
    wavg.ema(half_life=20, debias=False),
    wavg.ema(decay=0.99, warmup="ratio"),
    wavg.ema(decay=0.99, warmup="power"),
    wavg.power_ema(gamma=6.94),
    wavg.power_ema(sigma_rel=0.2),
]


@pytest.mark.parametrize("schedule", STREAMING, ids=str)
@pytest.mark.parametrize("steps", [*STEPS, FROM_ZERO])
def test_a_stream_gives_the_weights_of_the_closed_form(schedule, steps):
    for count in range(1, len(steps) + 1):
        ours, right = streamed(schedule, steps[:count]), schedule(steps[:count])
        if steps[count - 1] == 0 and not right.any():
            continue  # a single checkpoint at step 0, which weighs nothing
        np.testing.assert_allclose(ours / ours[-1], right / right[-1], rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("text", ["lawa", "bema", "dema:decay=0.9", "wsm", "cumulative_window"])
def test_others_do_not_stream(text):
    assert parse(text).update is None


# Texts

NUMBER = st.floats(1e-3, 1e6)
UNIT = st.floats(1e-6, 1 - 1e-6)
WIDTH = st.floats(0.01, 0.28)
EMAS = st.one_of(
    st.builds(
        wavg.ema, decay=UNIT, per=st.sampled_from(["snapshot", "step"]), debias=st.booleans()
    ),
    st.builds(wavg.ema, half_life=NUMBER, debias=st.booleans()),
    st.builds(wavg.ema, decay=UNIT, warmup=st.just("ratio"), debias=st.booleans()),
    st.builds(wavg.ema, decay=UNIT, warmup=st.just("power"), gamma=NUMBER, power=NUMBER),
    st.builds(wavg.dema, decay=UNIT, per=st.sampled_from(["snapshot", "step"])),
    st.builds(wavg.dema, half_life=NUMBER),
)
ANY = st.one_of(
    EMAS,
    st.builds(wavg.polynomial, power=NUMBER),
    st.builds(wavg.polynomial_decay, eta=NUMBER),
    st.builds(wavg.schedule_free, r=NUMBER, warmup=NUMBER),
    st.builds(wavg.lawa, last=st.integers(1, 1000), every=st.integers(1, 1000)),
    st.builds(wavg.bema, kappa=UNIT, eta=UNIT, rho=st.floats(1, 1e3), gamma=NUMBER),
    st.builds(wavg.power_ema, gamma=NUMBER),
    st.builds(wavg.power_ema, sigma_rel=WIDTH),
    st.builds(wavg.wsm, shape=st.sampled_from(["linear", "cosine", "1-sqrt", "1-square"])),
    st.just(wavg.cumulative_window()),
    st.builds(
        wavg.post_hoc_ema,
        sigma_rel=WIDTH,
        step=st.none() | NUMBER,
        tracked=st.none() | st.lists(WIDTH, min_size=1, max_size=4),
    ),
    st.builds(wavg.post_hoc_ema, gamma=st.floats(0, 100)),
)


@given(ANY)
def test_a_text_reads_back_to_the_same_schedule(schedule):
    again = parse(str(schedule))
    assert str(again) == str(schedule)
    if not schedule.repeats:
        np.testing.assert_array_equal(again(UNEVEN), schedule(UNEVEN))


@pytest.mark.parametrize("text", KNOWN)
def test_what_is_listed_as_known_is(text):
    schedule = parse(text)
    assert str(schedule).startswith(text)
    if not schedule.repeats:
        assert np.isfinite(schedule(EVEN)).all()


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (wavg.ema(decay=0.99), "ema:decay=0.99"),
        (wavg.ema(half_life=1000, debias=False), "ema:half_life=1000,debias=false"),
        (wavg.ema(decay=0.9, per="step"), "ema:decay=0.9,per=step"),
        (
            wavg.ema(decay=0.9, warmup="power", power=0.75),
            "ema:decay=0.9,warmup=power,gamma=1,power=0.75",
        ),
        (wavg.lawa(last=np.int64(10), every=2), "lawa:last=10,every=2"),
        (wavg.power_ema(sigma_rel=np.float32(0.125)), "power_ema:sigma_rel=0.125"),
        (
            wavg.post_hoc_ema(sigma_rel=0.1, tracked=np.array([0.05, 0.1])),
            "post_hoc_ema:sigma_rel=0.1,tracked=0.05/0.1",
        ),
        (wavg.wsm(lambda x: 1 - x), "wsm:shape=function(lambda)"),
    ],
)
def test_texts_say_what_is_not_the_default(schedule, text):
    assert str(schedule) == text


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ema", "ema: give one of decay, as in ema:decay=0.99, and half_life, in steps"),
        ("ema:decay=0.9,half_life=3", "ema: give one of decay"),
        ("ema:decay=1", "ema: decay must be a number between 0 and 1, not 1.0"),
        ("ema:decay=0", "ema: decay must be a number between 0 and 1, not 0.0"),
        ("ema:half_life=0", "ema: half_life must be a positive number"),
        ("ema:decay=0.9,per=epoch", "ema: per must be snapshot or step, not 'epoch'"),
        ("ema:decay=0.9,debias=no", "'no' in weights 'ema:decay=0.9,debias=no' is not t"),
        ("ema:decay=0.9,warmup=slow", "ema: warmup must be ratio or power, not 'slow'"),
        ("ema:half_life=9,warmup=ratio", "ema: a warm-up counts snapshots"),
        ("ema:decay=0.9,per=step,warmup=ratio", "ema: a warm-up counts snapshots"),
        ("ema:decay=0.9,warmup=power,gamma=0", "ema: gamma must be a positive number"),
        ("ema:beta=0.9", "ema takes decay=..., half_life=..., per=..., debias=..., warmup"),
        ("dema", "dema: give one of decay, as in dema:decay=0.99"),
        ("bema:rho=0.5", "bema: rho must be a number of at least 1"),
        ("bema:kappa=-1", "bema: kappa must be a number of at least 0"),
        ("polynomial:power=-1", "polynomial: power must be a number of at least 0"),
        ("polynomial_decay:eta=-1", "polynomial_decay: eta must be a number of at least 0"),
        ("schedule_free:r=-1", "schedule_free: r must be a number of at least 0"),
        ("schedule_free:warmup=-1", "schedule_free: warmup must be a number of at least 0"),
        ("lawa:last=0", "lawa: last must be a whole number from 1 on, not 0"),
        ("lawa:every=0", "lawa: every must be a whole number from 1 on, not 0"),
        ("lawa:last=2.5", "'2.5' in weights 'lawa:last=2.5' is not a whole number"),
        ("power_ema", "power_ema: give one of sigma_rel, as in power_ema:sigma_rel=0.1, and gamma"),
        ("power_ema:gamma=1,sigma_rel=0.1", "power_ema: give one of sigma_rel"),
        ("power_ema:sigma_rel=0.3", "power_ema: sigma_rel must be a number from 1e-6 to 0.28"),
        ("power_ema:sigma_rel=1e-200", "power_ema: sigma_rel must be a number from 1e-6 to 0.28"),
        ("power_ema:gamma=1e200", "power_ema: gamma must be a number from 0 to 1e9"),
        ("power_ema:gamma=-0.5", "power_ema: gamma must be a number from 0 to 1e9"),
        ("post_hoc_ema", "post_hoc_ema: give one of sigma_rel"),
        ("post_hoc_ema:gamma=2,step=0", "post_hoc_ema: step must be a positive number"),
        ("post_hoc_ema:gamma=2,tracked=a", "'a' in weights 'post_hoc_ema:gamma=2,tracked=a' is"),
        ("post_hoc_ema:sigma_rel=0.1,tracked=0.05/7", "post_hoc_ema: tracked: sigma_rel must be"),
        ("wsm:shape=cubic", "wsm: shape must be one of linear, cosine, 1-sqrt, 1-square, or,"),
        ("wsm:shape=function(lambda)", "in Python, a function as in wavg.wsm(f), not 'function("),
        ("cumulative_window:a=1", "cumulative_window takes no parameters"),
    ],
)  # fmt: skip
def test_parameters_without_sense_are_refused_with_what_is_allowed(text, message):
    with pytest.raises(WeightError) as caught:
        parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("f", [lambda x: x, lambda x: 2 - x, lambda x: math.exp(-x)])
def test_a_shape_that_does_not_fall_from_one_to_zero_is_refused(f):
    with pytest.raises(WeightError, match=r"must fall from f\(0\) = 1 to f\(1\) = 0"):
        wavg.wsm(f)


@pytest.mark.parametrize(
    "text",
    [
        "polynomial",
        "schedule_free",
        "ema:half_life=3",
        "ema:decay=0.9,per=step",
        "power_ema:gamma=1",
        "cumulative_window",
    ],
)
def test_steps_before_the_start_of_the_training_are_refused(text):
    with pytest.raises(WeightError, match="counts steps from the start of the training at 0"):
        parse(text)([-3, 1, 2])


@pytest.mark.parametrize("value", ["0.9", None, [0.9], 1j])
def test_a_decay_that_is_no_number_is_refused(value):
    with pytest.raises(WeightError):
        wavg.ema(decay=value)


def test_a_debias_that_is_no_truth_is_refused():
    with pytest.raises(WeightError, match="debias must be true or false, not 'false'"):
        wavg.ema(decay=0.9, debias="false")
