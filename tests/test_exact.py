"""Double-double and whole numbers: as sure as they say, and no surer."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

import reference
from wavg import exact
from wavg.combination import Combination
from wavg.dtypes import lookup

pytestmark = pytest.mark.usefixtures("no_alarms")  # as the kernel calls its parts
F64, F32, F16, BF16 = map(lookup, ("float64", "float32", "float16", "bfloat16"))


def fractions_of(weights, columns):
    total = sum(map(Fraction, weights))
    return [
        sum(Fraction(w) * Fraction(x) for w, x in zip(weights, column, strict=True)) / total
        for column in columns.T.tolist()
    ]


def rounded(values, entry):
    return [reference.round_fraction(value, entry) for value in values]


def doubled(combination, columns, entry):
    total = float(combination.totals[0]), float(combination.low_totals[0])
    return exact.double_double(
        combination.matrix[0], total, combination.lossless[0], columns, entry
    )


@pytest.mark.parametrize("entry", [F64, F32, BF16])
@pytest.mark.parametrize(
    "weights", [[1.0, 1, 1], [0.1, 0.2, 0.3], [3.0, -1, 2.0**-30], [7.0, 1, 0]]
)
def test_double_double_is_right_where_it_is_certain_and_certain_nearly_everywhere(entry, weights):
    rng = np.random.default_rng(4)
    columns = np.ldexp(rng.standard_normal((3, 300)), rng.integers(-30, 1, (3, 300)))
    columns[:, :20] = rng.integers(-99, 99, (3, 20))
    columns[0, 20:40] = -columns[1, 20:40] * weights[1] / weights[0]
    values, certain = doubled(Combination.of(weights), columns, entry)
    right = np.array(rounded(fractions_of(weights, columns), entry))
    assert (values.astype(float) == right)[certain].all()
    assert certain[right != 0].mean() > 0.98


def test_double_double_settles_ties_of_exact_sums_and_leaves_others():
    columns = np.array([[1.0, 1 + 2.0**-52], [1 + 2.0**-52, 1 + 2.0**-51]])
    values, certain = doubled(Combination.of([1, 1]), columns, F64)
    assert certain.all()
    assert values.tolist() == [1.0, 1 + 2.0**-51]
    # 0.1 + 0.1 is as whole, but 0.1 : 0.3 is not exactly 1 : 3: no tie can be sworn to.
    third = Combination.of([0.1, 0.3])
    _, certain = doubled(third, np.array([[1.0, 5.0], [1 + 2.0**-52, 5.0]]), F64)
    assert certain.tolist() == [True, True]


@pytest.mark.parametrize("entry", [F64, F32])
def test_double_double_is_not_certain_of_what_underflow_may_have_taken(entry):
    rng = np.random.default_rng(0)
    tiny = np.ldexp(rng.standard_normal((3, 100)), -1060)
    combination = Combination.of([0.1, 0.3, 0.7])
    values, certain = doubled(combination, tiny, entry)
    right = np.array(rounded(fractions_of([0.1, 0.3, 0.7], tiny), entry))
    assert (values.astype(float) == right)[certain].all()
    if entry is F64:
        assert not certain.any()


def test_double_double_of_numbers_too_large_to_split_is_not_certain():
    _, certain = doubled(Combination.of([1, 2]), np.array([[1e308, 1.0], [1e308, 2.0]]), F64)
    assert certain.tolist() == [False, True]


def test_a_quotient_that_comes_out_even_has_no_error():
    high, low = np.array([3.0, 1.0, 6.0, 2.0**53]), np.array([0.0, 0.0, 2.0**-60, 1.0])
    error = np.full(4, 2.0**-50)
    for exactly in (True, False):
        values, certain = exact.divide(high, low, error, (4.0, 0.0), F64, exact=np.full(4, exactly))
        assert certain.tolist() == [exactly] * 4
        if exactly:
            assert values.tolist() == [0.75, 0.25, 1.5, 2.0**51]


def test_a_quotient_uses_both_parts_of_dividend_and_divisor():
    """A third less and more than a tie, by what only the second parts say."""
    half = 2.0**-53
    for sign, right in ((1, 1 + 2 * half), (-1, 1.0)):
        top, low = np.array([1.0]), np.array([half + sign * 2.0**-90])
        values, certain = exact.divide(
            top, low, np.array([0.0]), (1.0, 0.0), F64, exact=np.array([False])
        )
        assert (values[0], certain[0]) == (right, True)
        # The same quotient from a longer divisor.
        values, certain = exact.divide(
            top,
            low * 0 + half + 2.0**-90,
            np.array([0.0]),
            (1.0, (1 - sign) * 2.0**-90),
            F64,
            exact=np.array([False]),
        )
        assert (values[0], certain[0]) == (right, True)


@pytest.mark.parametrize("entry", [F64, F32, F16, BF16])
def test_one_column_in_whole_numbers(entry):
    for weights, column in [
        ([1, 2], [1.0, 2.5]),
        ([3, -1, 0], [1e300, 2.0**-300, 5.0]),
        ([10**40, 1, 1], [1.0, 2.0**-52, -3.0]),
        ([1, 1], [1.0, 1 + 2.0 ** (1 - entry.precision)]),
        ([1, 1], [1 + 2.0 ** (1 - entry.precision), 1 + 2.0 ** (2 - entry.precision)]),
        ([1, 2**80, 1], [2.0**-1000, 1 + 2.0**-entry.precision, 0.0]),
    ]:
        ours = float(exact.integer_mean(weights, column, entry))
        total = sum(w * Fraction(x) for w, x in zip(weights, column, strict=True))
        assert ours == reference.round_fraction(total / sum(weights), entry)


@pytest.mark.parametrize("entry", [F64, F32, BF16])
def test_ratios_beyond_float64_have_a_sign(entry):
    huge = 10**400
    assert float(exact.ratio(huge, 1, entry)) == np.inf
    assert float(exact.ratio(-huge, 1, entry)) == -np.inf
    assert exact.ratio(huge, 1, entry).dtype == entry.numpy
    for sign in (1, -1):
        zero = exact.ratio(sign, huge, entry)
        assert zero.dtype == entry.numpy
        assert float(zero) == 0
        assert np.signbit(float(zero)) == (sign < 0)


def test_ratios_next_to_a_tie_go_to_their_side():
    tie = 2**24 * 2 + 1, 2**25  # 1 + 2**-25: half a unit is 2**-24
    assert float(exact.ratio(2**24 + 1, 2**24, F32)) == 1.0
    for far in (60, 120, 300):
        more = (2**24 + 1) * 2**far
        assert float(exact.ratio(more + 1, 2 ** (24 + far), F32)) == 1 + 2.0**-23
        assert float(exact.ratio(more - 1, 2 ** (24 + far), F32)) == 1.0
        assert float(exact.ratio(-more - 1, 2 ** (24 + far), F32)) == -1 - 2.0**-23
        assert float(exact.ratio(-more + 1, 2 ** (24 + far), F32)) == -1.0
    assert float(exact.ratio(*tie, F32)) == 1.0


# The bounds are argued, not measured, and leave room; so the tests hold the code to the argument.


def test_a_bound_of_double_double_counts_its_terms(monkeypatch):
    told = []
    monkeypatch.setattr(exact, "divide", lambda *a, exact: told.append((*a, exact)))
    unit, lost = 2.0**-53, 2.0**-1070
    long = 1 + 2.0**-40  # of two halves
    columns = np.array([[1.0, -2.0, 2.0**-970], [0.0, 3.0, 0.0]])
    exact.double_double(np.array([0.5, 0.25]), (0.75, 0.0), True, columns, F32)
    high, low, error, total, entry, exactly = told.pop()
    assert high.tolist() == [0.5, -0.25, 2.0**-971]
    assert low.tolist() == [0.0, 0.0, 0.0]
    assert (total, entry) == ((0.75, 0.0), F32)
    assert exactly.tolist() == [True, True, False]  # the last may have lost bits
    reach, terms = np.array([0.5, 1.75, 2.0**-971]), 4 + 2
    largest = np.array([1.0, 3.0, 2.0**-970])
    expected = reach * (terms**2 * 8 * unit**2) + terms * lost * (1 + largest)
    assert error.tolist() == expected.tolist()
    exact.double_double(np.array([long / 2]), (1.0, 0.0), False, np.array([[long]]), F32)
    high, low, error, _, _, exactly = told.pop()
    assert Fraction(high[0]) + Fraction(low[0]) == Fraction(long) ** 2 / 2
    assert exactly.tolist() == [False]
    assert error[0] == pytest.approx(0.5 * (8**2 * 8 * unit**2), rel=1e-9)


def test_a_bound_of_double_double_takes_in_weights_that_vanished(monkeypatch):
    monkeypatch.setattr(exact, "divide", lambda high, low, error, *_, exact: error)
    error = exact.double_double(np.zeros(1), (1.0, 0.0), False, np.array([[7.0, 0.0]]), F32)
    assert error.tolist() == [4 * 2.0**-1070 * 8, 4 * 2.0**-1070]


def test_products_below_the_smallest_are_not_taken_for_exact(monkeypatch):
    monkeypatch.setattr(exact, "divide", lambda *a, exact: exact)
    for number, expected in [(2.0**-959, True), (2.0**-960, False), (0.0, True)]:
        found = exact.double_double(
            np.array([0.5, 0.5]), (1.0, 0.0), True, np.array([[number], [0.0]]), F32
        )
        assert found.tolist() == [expected]


def test_sums_of_three_parts_are_not_taken_for_exact(monkeypatch):
    monkeypatch.setattr(exact, "divide", lambda *a, exact: exact)
    three = np.array([[1.0, 1.0], [2.0**-60, 2.0**-60], [2.0**-120, 0.0]])
    found = exact.double_double(np.array([0.25, 0.25, 0.25]), (0.75, 0.0), True, three, F32)
    assert found.tolist() == [False, True]


def test_a_quotients_bound_is_four_units_of_its_correction_and_eight_squares():
    """Next to a tie of 1 and the number above: twelve steps off is too near, thirteen is not."""
    half, step = 2.0**-53, 2.0**-106
    for sign in (1, -1):
        for steps, expected in ((12, False), (13, True)):
            high = np.array([sign * (1 + 2 * half)])
            low, error = np.array([sign * (steps * step - half)]), np.array([0.0])
            values, certain = exact.divide(
                high, low, error, (1.0, 0.0), F64, exact=np.array([False])
            )
            assert certain.tolist() == [expected]
            if expected:
                assert values.tolist() == [sign * (1 + 2 * half)]


def test_a_quotients_bound_takes_in_what_its_dividend_may_be_off():
    half = 2.0**-53
    for error, expected in ((2.0**-63, False), (2.0**-65, True)):
        _, certain = exact.divide(
            np.array([2.0]),
            np.array([2 * half + 2.0**-64]),
            np.array([error]),
            (2.0, 0.0),
            F64,
            exact=np.array([False]),
        )
        assert certain.tolist() == [expected]


def test_sums_splits_and_remainders_lose_nothing():
    rng = np.random.default_rng(0)
    a, b = np.ldexp(rng.standard_normal((2, 400)), rng.integers(-60, 61, (2, 400)))
    for x, y, total, rest in zip(a, b, *exact._two_sum(a, b), strict=True):
        assert Fraction(total) + Fraction(rest) == Fraction(x) + Fraction(y)
        assert total == x + y
    for x, high, low in zip(a, *exact._halves(a), strict=True):
        assert Fraction(high) + Fraction(low) == Fraction(x)
        for half in (high, low):
            whole = int(abs(math.ldexp(math.frexp(half)[0], 53)))
            assert whole % 2**27 == 0  # 26 bits
    quotients = a / b
    for x, y, q, rest in zip(a, b, quotients, exact._remainder(a, quotients, b), strict=True):
        assert Fraction(rest) == Fraction(x) - Fraction(q) * Fraction(y)
