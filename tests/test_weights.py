"""Schedules against their formulas, their text form, their streaming form, and the figures."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wavg
from wavg.errors import WeightError
from wavg.weights import check_steps, equal, explicit, exponential, figures, linear, parse, resolve

ALPHAS = [0.3, 1, 2.0, 7.5, 1000]
STREAMING = [equal(), linear(), *map(exponential, ALPHAS)]


def newest_first(schedule, count):
    """The weights in proportion to the newest's, j = 1 … N."""
    coefficients = schedule(np.arange(1, count + 1))
    assert coefficients.dtype == np.float64
    assert coefficients.shape == (count,)
    return [Fraction(c) / Fraction(coefficients[-1]) for c in coefficients[::-1].tolist()]


def streamed(schedule, count):
    """The weight of every model, oldest first, after `count` updates."""
    weights = []
    for position in range(1, count + 1):
        keep, add = schedule.update(position, position, position - 1)
        weights = [keep * weight for weight in weights] + [add]
    return np.array(weights)


# The formulas


@pytest.mark.parametrize("count", [1, 2, 3, 10, 97])
def test_equal_weighs_one(count):
    assert newest_first(equal(), count) == [1] * count


@pytest.mark.parametrize("count", [1, 2, 3, 10, 97])
def test_linear_weighs_the_jth_newest_of_n_by_n_minus_j_plus_one_over_n(count):
    assert newest_first(linear(), count) == [
        Fraction(count - j + 1, count) for j in range(1, count + 1)
    ]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("count", [1, 2, 3, 10, 97])
def test_exponential_weighs_the_jth_newest_by_exp_of_minus_j_over_alpha(count, alpha):
    formula = [math.exp(-j / alpha) / math.exp(-1 / alpha) for j in range(1, count + 1)]
    found = [float(weight) for weight in newest_first(exponential(alpha), count)]
    np.testing.assert_allclose(found, formula, rtol=1e-13)


def test_exponential_has_alpha_two_unless_told():
    assert str(exponential()) == str(parse("exponential")) == "exponential:alpha=2"


@pytest.mark.parametrize("schedule", STREAMING, ids=str)
def test_weights_depend_on_positions_and_not_on_steps(schedule):
    np.testing.assert_array_equal(schedule([5, 100, 101]), schedule([1, 2, 3]))


def test_a_schedule_of_ones_own_takes_the_steps():
    assert wavg.Schedule("steps", lambda steps: steps**2)([1, 2, 3]).tolist() == [1, 4, 9]


def test_explicit_weights_are_as_given():
    assert explicit([0.2, -1, 3])([7, 8, 9]).tolist() == [0.2, -1, 3]


def test_explicit_weights_cannot_be_changed_from_outside():
    given = np.array([1.0, 2.0])
    schedule = explicit(given)
    schedule([1, 2])[:] = 0
    assert schedule([1, 2]).tolist() == [1, 2]


def test_explicit_weights_do_not_follow_the_array_they_came_from():
    given = np.array([1.0, 2.0])
    schedule = explicit(given)
    given[:] = 5
    assert schedule([1, 2]).tolist() == [1, 2]


# Very long and very uneven


def test_a_very_long_exponential_does_not_overflow():
    coefficients = exponential(2.0)(np.arange(10_000))
    assert np.isfinite(coefficients).all()
    assert (np.diff(coefficients) >= 0).all()
    assert coefficients.sum() / coefficients[-1] == pytest.approx(1 / (1 - math.exp(-0.5)))
    merit = figures(coefficients, np.arange(10_000))
    assert merit.proportions[-1] == pytest.approx(1 - math.exp(-0.5))
    assert merit.mean_age == pytest.approx(1 / (math.exp(0.5) - 1))


def test_a_very_long_exponential_stream_does_not_overflow():
    schedule, total = exponential(2.0), 0.0
    for position in range(1, 10_001):
        keep, add = schedule.update(position, position, position - 1)
        total = keep * total + add
    assert total == pytest.approx(1 / (1 - math.exp(-0.5)))


def test_a_very_long_exponential_averages():
    given = [np.float32([i % 7]) for i in range(10_000)]
    short = wavg.average(given[-200:], "exponential:alpha=2")
    np.testing.assert_array_equal(wavg.average(given, "exponential:alpha=2"), short)


def test_alpha_goes_from_the_newest_alone_to_the_equal_average():
    assert exponential(1e-3)(range(4)).tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(exponential(1e300)(range(4)), 1, rtol=1e-15)


def test_the_smallest_alpha_leaves_the_newest_alone():
    assert exponential(1e-310)(range(3)).tolist() == [0, 0, 1]


# The streaming form


@pytest.mark.parametrize("schedule", STREAMING, ids=str)
def test_streaming_gives_the_same_weights_up_to_scale(schedule):
    for count in range(1, 51):
        ours, right = streamed(schedule, count), schedule(np.arange(count))
        np.testing.assert_allclose(ours / ours[-1], right / right[-1], rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("schedule", [equal(), linear()], ids=str)
def test_streaming_equal_and_linear_weights_are_exact(schedule):
    for count in range(1, 51):
        np.testing.assert_array_equal(streamed(schedule, count), schedule(np.arange(count)))


def test_the_comparison_of_streamed_weights_sees_a_planted_error():
    late = wavg.Schedule("late", linear().coefficients, lambda position, *_: (1.0, position + 1.0))
    ours, right = streamed(late, 3), late(np.arange(3))
    assert not np.allclose(ours / ours[-1], right / right[-1])


def test_explicit_weights_have_no_streaming_form():
    assert explicit([1, 2]).update is None


# The text form


@given(
    st.one_of(
        st.sampled_from([equal(), linear()]),
        st.floats(1e-300, 1e300).map(exponential),
        st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=5)
        .filter(lambda values: sum(map(Fraction, values)) != 0)
        .map(explicit),
    )
)
def test_the_text_form_reads_back_to_the_same_weights(schedule):
    again = parse(str(schedule))
    count = str(schedule).count(",") + 1
    assert str(again) == str(schedule)
    np.testing.assert_array_equal(again([*range(count)]), schedule([*range(count)]))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("equal", "equal"),
        (" linear ", "linear"),
        ("exponential", "exponential:alpha=2"),
        ("exponential:", "exponential:alpha=2"),
        ("exponential:alpha=2.0", "exponential:alpha=2"),
        ("exponential:alpha=0.5", "exponential:alpha=0.5"),
        ("exponential:alpha=1e3", "exponential:alpha=1000"),
        ("1,2,3", "1,2,3"),
        ("1.0, .5,-2e-3", "1,0.5,-0.002"),
        ("5", "5"),
    ],
)
def test_texts_have_a_canonical_form(text, canonical):
    assert str(parse(text)) == canonical


def test_resolve_takes_a_text_a_schedule_or_numbers():
    schedule = linear()
    assert resolve(schedule) is schedule
    assert str(resolve("linear")) == "linear"
    for numbers in ([1, 2], (1.0, 2.0), np.array([1, 2])):
        assert str(resolve(numbers)) == "1,2"


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cubic",
            "cumulative_window, numbers with commas, one a checkpoint, oldest first, such as "
            "0.2,0.3,0.5, and files that list them, such as weights.json or weights.csv",
        ),
        ("cubic", "unknown weights 'cubic'; there are equal, linear, exponential:alpha=2, poly"),
        ("", "unknown weights ''; there are equal"),
        ("Equal", "unknown weights 'Equal'; did you mean equal? Otherwise there are equal"),
        ("linaer", "unknown weights 'linaer'; did you mean linear? "),
        ("EXPONENTIAL:alpha=2", "did you mean exponential? "),
        ("uniform", "unknown weights 'uniform'; did you mean equal? "),
        ("1,2,", "unknown weights '1,2,'; there are equal"),
        ("1,two", "unknown weights '1,two'; there are equal"),
        (
            "linear:alpha=2",
            "cannot understand 'alpha=2' in weights 'linear:alpha=2'; linear takes no parameters",
        ),
        (
            "exponential:beta=2",
            "cannot understand 'beta=2' in weights 'exponential:beta=2'; exponential takes alpha",
        ),
        ("exponential:2", "cannot understand '2' in weights 'exponential:2'; exponential takes"),
        ("exponential:alpha=1,alpha=2", "cannot understand 'alpha=2' in weights"),
        ("exponential:alpha=two", "'two' in weights 'exponential:alpha=two' is not a number"),
        ("exponential:alpha=", "'' in weights 'exponential:alpha=' is not a number"),
        ("exponential:alpha=0", "exponential: alpha must be a positive number, not 0.0"),
        ("exponential:alpha=-1", "exponential: alpha must be a positive number, not -1.0"),
        ("exponential:alpha=nan", "exponential: alpha must be a positive number, not nan"),
        ("exponential:alpha=inf", "exponential: alpha must be a positive number, not inf"),
        ("1,nan", "weights must be finite, not [1.0, nan]"),
        ("1,-1", "the weights sum to zero, so there is no average; change one of them"),
    ],
)
def test_a_text_without_sense_is_refused_with_the_reason(text, message):
    with pytest.raises(WeightError, match=re.escape(message)):
        parse(text)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "weights must be a flat list of numbers, not shape (0,)"),
        ([[1, 2]], "weights must be a flat list of numbers, not shape (1, 2)"),
        (3.0, "weights must be a flat list of numbers, not shape ()"),
        (["a", "b"], "weights must be numbers, not ['a', 'b']"),
        ([[1], [1, 2]], "weights must be numbers, not [[1], [1, 2]]"),
        (None, "weights must be"),
        ([1, math.inf], "weights must be finite, not [1.0, inf]"),
        ([10**400, 1], "weights must be numbers that float64 has: int too large"),
        ([0.0, 0.0], "the weights sum to zero"),
        ([0.1, 0.2, -0.1, -0.2], "the weights sum to zero"),
    ],
)
def test_numbers_without_sense_are_refused_with_the_reason(weights, message):
    with pytest.raises(WeightError, match=re.escape(message)):
        resolve(weights)


@pytest.mark.parametrize("steps", [[1, 10**400], [1, None], [1, "x"]])
def test_steps_that_are_no_numbers_are_refused(steps):
    with pytest.raises(WeightError, match="steps must be numbers: "):
        check_steps(steps)


@pytest.mark.parametrize("alpha", ["2", None, [1.0], 1j, 10**400])
def test_an_alpha_that_is_no_number_is_refused(alpha):
    with pytest.raises(WeightError, match="alpha must be a positive number, not"):
        exponential(alpha)


@pytest.mark.parametrize("alpha", [np.float32(2), np.int64(2), Fraction(2)])
def test_an_alpha_may_be_any_real_number(alpha):
    assert str(exponential(alpha)) == "exponential:alpha=2"


@pytest.mark.parametrize("count", [1, 3])
def test_explicit_weights_for_another_number_of_checkpoints_are_refused(count):
    with pytest.raises(WeightError, match=f"2 weights were given for {count} checkpoints"):
        explicit([1, 2])(range(count))


# The figures


@pytest.mark.parametrize("count", [1, 2, 10])
def test_figures_of_equal_weights(count):
    merit = figures(np.full(count, 7.0), 10 * np.arange(count))
    assert merit.effective_number == pytest.approx(count)
    assert merit.mean_age == pytest.approx(10 * (count - 1) / 2)
    assert merit.amplification == pytest.approx(1)


def test_figures_by_hand():
    merit = figures([1, -2, 5], [100, 150, 400])
    assert merit.proportions.tolist() == [0.25, -0.5, 1.25]
    assert merit.effective_number == 1 / (0.0625 + 0.25 + 1.5625)
    assert merit.mean_age == 0.25 * 300 - 0.5 * 250
    assert merit.amplification == 2.0


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=20), st.floats(1e-200, 1e200))
def test_figures_do_not_depend_on_the_scale_of_the_weights(weights, scale):
    steps = np.arange(len(weights))
    ours, right = figures(np.array(weights) * scale, steps), figures(weights, steps)
    np.testing.assert_allclose(ours.proportions, right.proportions, rtol=1e-12)
    np.testing.assert_allclose(ours.proportions.sum(), 1, rtol=1e-12)
    assert ours.effective_number == pytest.approx(right.effective_number)
    assert ours.mean_age == pytest.approx(right.mean_age)
    assert 1 - 1e-9 <= ours.effective_number <= len(weights) + 1e-9
    assert ours.amplification == pytest.approx(1)


def test_only_signs_that_differ_amplify():
    assert figures([-1, -3], [1, 2]).amplification == 1
    assert figures([-1, 3], [1, 2]).amplification == 2


def test_proportions_are_exact_where_floats_cancel():
    merit = figures([1e16, 1, -1e16], [1, 2, 3])
    assert merit.proportions.tolist() == [1e16, 1, -1e16]


def test_figures_of_weights_that_sum_to_zero_are_refused():
    with pytest.raises(WeightError, match="sum to zero"):
        figures([1, -1], [1, 2])


def test_weights_that_nearly_sum_to_zero_have_figures_or_a_reason():
    try:
        merit = figures([1e200, -1e200, 1e-200], [1, 2, 3])
    except WeightError:
        return
    assert merit.amplification == math.inf


def test_schedules_are_frozen():
    with pytest.raises(AttributeError):
        equal().text = "other"
