"""The kernel's modules one by one, at the very edges of what each promises."""

from __future__ import annotations

import importlib.util
import math
import sys
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

import reference
import wavg
from wavg import compiled, exact, ieee, kernel, leftovers, rounding, tiles
from wavg.combination import Combination
from wavg.dtypes import lookup
from wavg.errors import NonFiniteError, WavgError, WeightError

F64, F32, F16, BF16 = map(lookup, ("float64", "float32", "float16", "bfloat16"))
E4M3, E5M2 = lookup("float8_e4m3fn"), lookup("float8_e5m2")
TINY = 2.0**-1074  # the smallest of float64


@pytest.fixture(autouse=True)
def no_warnings():
    """As the kernel calls its parts."""
    with np.errstate(all="ignore"):
        yield


# ieee


@pytest.mark.parametrize("place", [0, 1, 8190, 8191, 8192, 8193, 16383])
def test_the_first_number_that_is_not_finite_is_found_wherever_it_stands(place):
    numbers = np.zeros((3, 20_000), np.float32)
    numbers[1:, place] = np.inf
    numbers[0, -1] = np.nan
    assert ieee.first_nonfinite(numbers) == (1, place)


def test_where_all_is_finite_there_is_no_first():
    assert ieee.first_nonfinite(np.zeros((2, 8193))) is None
    assert ieee.first_nonfinite(np.zeros((2, 0))) is None


def test_a_sum_of_zeros_is_negative_if_every_term_is():
    zeros = np.array([[0.0, -0.0, 0.0, -0.0], [0.0, 0.0, -0.0, -0.0]])
    for weights in ([1, 2], [1, -2], [-1, 2], [0, 1], [0, -1], [3, 0]):
        ours = ieee.signed_zeros(weights, zeros)
        terms = [[w * z for w, z in zip(weights, column, strict=True) if w] for column in zeros.T]
        assert not ours.any()
        assert np.signbit(ours).tolist() == [all(np.signbit(t)) for t in terms]


def test_sums_with_infinities_and_one_nan():
    inf, odd = np.inf, np.array([0xFFF8_0000_0000_1234], np.uint64).view(np.float64)[0]
    columns = np.array([[inf, inf, inf, 1.0, odd], [1.0, -inf, -1e308, 2.0, 1.0]])
    sums = ieee.sums(np.array([1.0, 1e-3]), columns)
    assert sums.tolist()[:1] + sums.tolist()[2:4] == [inf, inf, 1.002]
    assert sums[[1, 4]].tobytes() == np.array([np.nan, np.nan]).tobytes()


# combination


def test_weights_are_told_in_errors_all_of_them_or_the_ends():
    with pytest.raises(WeightError) as caught:
        Combination.of([1, -1, 2, -2, 3, -3, 4.5, -4.5])
    assert str(caught.value) == (
        "the weights [1, -1, 2, -2, 3, -3, 4.5, -4.5] sum to zero, so there is no average; "
        "change one of them"
    )
    with pytest.raises(WeightError) as caught:
        Combination.of([1, 2, 3, 4, 5, 6, 7, 8, np.nan])
    assert str(caught.value) == "weights must be finite numbers, not [1, 2, 3, 4, …, 7, 8, nan]"
    for none in ([], [[]], np.ones((2, 2, 2)), np.ones((2, 2, 0))):
        with pytest.raises(WeightError) as caught:
            Combination.of(none)
        assert str(caught.value) == "there must be at least one weight"


ROWS = [
    [1.0, 2.0, 3.0],
    [-1.0, -2.0, -3.0],
    [6.0, 0.0, -4.0],
    [0.5, 0.25, 0.0],
    [0.1, 0.2, 0.3],
    [1.0, 2.0**-60, 2.0**-60],
    [2.0**27, 2.0**27 - 1, 0.0],
    [2.0**27, 2.0**27, 1.0],
    [2.0**27, -(2.0**27), 1.0],
    [1.0, -1.0, 2.0**-890],
    [1.0, -1.0, 2.0**-896],
    [1.0, -1.0, 2.0**-897],
    [1.0, 2.0**-1060, 3e-320],
    [1e300, 1e-300, 1e300],
    [1.7e308, 1.7e308, 1.7e308],
    [TINY, TINY, 0.0],
]


@pytest.mark.parametrize("row", ROWS)
def test_a_combination_says_what_is_true_of_its_weights(row):
    ours = Combination.of([[1.0, 1.0, 1.0], row])
    exactly = [Fraction(w) for w in row]
    whole, total = ours.integers[1], sum(ours.integers[1])
    assert [Fraction(w, total) for w in whole] == [w / sum(exactly) for w in exactly]
    assert total > 0
    assert math.gcd(*whole) == 1
    # One power of two scales all of them, and leaves room for as many as there are.
    scale = Fraction(1, 2 ** (max(map(abs, whole)).bit_length() + 2))
    assert ours.matrix[1].tolist() == [float(w * scale) for w in whole]
    assert sum(map(abs, ours.matrix[1])) <= 1
    high, low = Fraction(ours.totals[1]), Fraction(ours.low_totals[1])
    assert ours.totals[1] == float(total * scale)
    assert low == Fraction(float(total * scale - high))
    kept = [Fraction(w) for w in ours.matrix[1].tolist()] == [w * scale for w in whole]
    assert ours.lossless[1] == (kept and high == total * scale)
    assert ours.tame[1] == (ours.totals[1] > 2.0**-900)
    bits = sum(map(abs, whole)).bit_length()
    assert ours.bits[1] == (bits if bits <= 28 else -1)
    if ours.tame[1]:
        growth = sum(map(abs, exactly)) / abs(sum(exactly))
        assert ours.growth[1] == pytest.approx(float(growth), rel=1e-12)
    assert ours.growth[0] == pytest.approx(1.0)


def test_the_rows_include_each_kind_of_weights():
    found = [Combination.of(row) for row in ROWS]
    assert {one.lossless[0] for one in found} == {True, False}
    assert {one.tame[0] for one in found} == {True, False}
    assert {one.bits[0] for one in found} >= {-1, 3, 28}
    assert any(one.low_totals[0] for one in found)


def test_weights_without_a_float64_of_their_total_raise_no_alarm():
    with np.errstate(all="raise"):
        Combination.of([1, -1, TINY, 0])


def test_the_bound_on_errors_is_the_textbooks():
    """(n + 6) units, a hundredth more, times how much larger than the numbers a mean can be."""
    ours = Combination.of([[1, 1, 1, 1], [3, -1, 0, 0]])
    np.testing.assert_allclose(ours.error(2.0**-24), [10.1 * 2.0**-24, 20.2 * 2.0**-24])


# rounding

NARROW = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


@pytest.mark.parametrize("name", NARROW)
def test_rounding_to_a_narrow_format_at_every_midpoint_and_beside_it(name):
    entry = lookup(name)
    width = np.dtype(f"u{entry.itemsize}")
    grid = np.arange(2**entry.bits, dtype=width).view(entry.numpy).astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)])
    grid = grid[:: 1 + len(grid) // 3000] if len(grid) > 3000 else grid
    low, high = grid[:-1], grid[1:]
    if len(grid) > 300:  # neighbours again
        codes = low.astype(entry.numpy).view(width)
        high = (codes + np.where(low < 0, -1, 1).astype(width)).view(entry.numpy).astype(float)
        low, high = low[np.isfinite(high) & (low != 0)], high[np.isfinite(high) & (low != 0)]
        low, high = np.minimum(low, high), np.maximum(low, high)
    middle = low + (high - low) / 2
    below, above = np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)
    assert rounding.round_to(below, entry).astype(float).tolist() == low.tolist()
    assert rounding.round_to(above, entry).astype(float).tolist() == high.tolist()
    ties = rounding.round_to(middle, entry).astype(float)
    even = [x if reference_bits(x, entry) % 2 == 0 else y for x, y in zip(low, high, strict=True)]
    assert ties.tolist() == even
    for beyond in (1e39, 1e300, np.inf, np.nan):
        ends = rounding.round_to(np.array([beyond, -beyond]), entry)
        wanted = np.array([beyond, -beyond]).astype(np.float32).astype(entry.numpy)
        assert ends.tobytes() == wanted.tobytes()
    zeros = rounding.round_to(np.array([0.0, -0.0, TINY, -TINY]), entry)
    assert zeros.dtype == entry.numpy
    assert not zeros.astype(float).any()
    if not name.endswith("fnuz"):  # those have one zero
        assert np.signbit(zeros.astype(float)).tolist() == [False, True, False, True]


def reference_bits(value, entry):
    return int(np.array([value]).astype(entry.numpy).view(f"u{entry.itemsize}")[0])


@pytest.mark.parametrize("entry", [F64, F32, F16])
def test_rounding_to_wide_formats_is_numpys(entry):
    values = np.array([1 + 2.0**-11, 1 + 2.0**-24 + 2.0**-50, 1e-9, -0.0])
    with np.errstate(all="ignore"):
        assert rounding.round_to(values, entry).tobytes() == values.astype(entry.numpy).tobytes()


def test_what_was_cut_off_makes_the_last_bit_odd():
    one = float(np.nextafter(1, 2))  # odd
    cases = [
        (1.0, 0.0, 1.0),
        (1.0, 1e-30, one),
        (1.0, -1e-30, float(np.nextafter(1, 0))),
        (-1.0, -1e-30, -one),
        (-1.0, 1e-30, -float(np.nextafter(1, 0))),
        (one, 1e-30, one),
        (one, -1e-30, one),
        (-one, 1e-30, -one),
    ]
    high, low, right = np.array(cases).T
    assert rounding.odd(high, low, F32).tolist() == right.tolist()
    assert rounding.odd(high, low, F64).tolist() == high.tolist()


# exact


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


def test_the_compiled_step_is_told_totals_windows_and_errors():
    rows = [
        [1, 2, 3],
        [0.1, 0.25, 0.3],
        [3, -1, 0],
        [1, -1, 2.0**-1000],
        [1, 2.0**-1074, -0.5],
        [2.0**-1074, 0, 1],
    ]
    combination = Combination.of(rows)
    for source in (F32, BF16, F16):
        ours = compiled.Compiled(combination, source, F32)
        errors = combination.error(2.0**-53).tolist()
        narrow = 2.0 ** (source.precision - 52)
        assert ours._rows.tolist() == [
            [6.0, 6 * narrow, errors[0]],
            [float(combination.totals[1]), np.inf, errors[1]],
            [2.0, 4 * narrow, errors[2]],
            *[[1.0, np.inf, np.inf]] * 3,  # settles nothing but zeros
        ]
        assert ours._weights.tolist() == [
            [1.0, 2.0, 3.0],
            combination.matrix[1].tolist(),
            [3.0, -1.0, 0.0],
            [1.0, -1.0, 1.0],
            [1.0, 1.0, -1.0],
            [1.0, 0.0, 1.0],
        ]
    assert combination.matrix[4][1] == combination.matrix[5][0] == 0  # they vanished


@pytest.mark.parametrize(
    ("source", "target", "start", "unit", "least"),
    [
        (BF16, BF16, "float32", 2.0**-24, 2.0**-149),
        (E4M3, BF16, "float32", 2.0**-24, 2.0**-149),
        (BF16, F16, "float64", 2.0**-53, 2.0**-1074),
        (F16, BF16, "float64", 2.0**-53, 2.0**-1074),
        (F32, F32, "float64", 2.0**-53, 2.0**-1074),
    ],
)
def test_the_bounds_of_the_step_in_numpy(source, target, start, unit, least):
    combination = Combination.of([[1, 2, 3], [0.1, 0.25, 0.3]])
    ours = tiles.Tiles(combination, source, target)
    assert ours._matrix.dtype == start
    assert ours._error.tolist() == combination.error(unit).tolist()
    assert ours._least == 9 * least
    assert ours._bound(0.0).tolist() == [9 * least] * 2
    assert ours._bound(3.0).tolist() == (combination.error(unit) * 3 + 9 * least).tolist()
    assert ours._range == float(np.finfo(start).max) / 4
    means = combination.matrix / combination.totals[:, None]
    factor = 2.0**112 if source is F16 else 1.0
    assert ours._matrix.tolist() == (means * factor).astype(start).tolist()


def test_sums_of_float16_are_known_to_be_exact_for_few_whole_weights():
    for weights, expected in [
        ([4095, 0], True),
        ([4095, 1], False),  # 13 bits
        ([2000, -2093], True),  # 12 bits
        ([0.1, 0.25], False),
    ]:
        ours = tiles.Tiles(Combination.of(weights), F16, F32)
        assert ours._exact is expected
        assert tiles.Tiles(Combination.of(weights), F32, F32)._exact is False
        assert tiles.Tiles(Combination.of(weights), F16, F64)._exact is False
    both = Combination.of([[1, 1], [0.1, 0.25]])
    assert tiles.Tiles(both, F16, F32)._exact is False


def test_a_row_that_nearly_cancels_leaves_all_to_the_further_steps():
    block = np.ones((3, 5), np.float64)
    for weights, hopeless in [([[1, 1, 1]], False), ([[1, 1, 1], [1, -1, 1e-300]], True)]:
        ours = tiles.Tiles(Combination.of(weights), F64, F32)
        (portion,) = ours.portions(block, np.empty((len(weights), 5), np.float32))
        assert portion.flags.all() == hopeless


# leftovers


@pytest.mark.parametrize("entry", [F64, F32, F16, BF16])
def test_fits_is_as_generous_as_the_theorem_and_no_more(entry):
    """Up to 2**52 quanta; a quantum is the last bit of the smallest number."""
    precision = entry.precision
    for lowest in (-13, 0, 7):
        quantum = lowest - precision + 1
        for bits in (0, 1, 5, 28):
            assert leftovers.fits(bits, quantum + 52 - bits, lowest, entry)
            assert not leftovers.fits(bits, quantum + 53 - bits, lowest, entry)
            assert leftovers.fits(bits, quantum + 51 - bits, lowest, entry)
        assert not leftovers.fits(-1, lowest, lowest, entry)
    # Below the normal numbers the quantum is that of the smallest of them.
    if entry is not F64:
        least = entry.min_exponent
        quantum = least - precision + 1
        for lowest in (least, least - 1, least - 5):
            assert leftovers.fits(2, quantum + 50, lowest, entry)
            assert not leftovers.fits(2, quantum + 51, lowest, entry)


def test_nothing_fits_where_products_may_underflow():
    assert leftovers.fits(0, -899, -899, F64)
    assert not leftovers.fits(0, -900, -900, F64)


def test_the_exponents_bound_all_numbers():
    assert leftovers._exponents(np.array([[1.0, -7.9], [0.0, 0.25]])) == (3, -2)
    assert leftovers._exponents(np.array([[8.0, -0.26]])) == (4, -2)
    assert leftovers._exponents(np.zeros((2, 2))) == (0, 1024)


def test_the_second_look_at_bfloat16_is_as_sure_as_its_bound():
    """Of one input the bound is 3.5 units of float64 at 1; a midpoint of bfloat16 is 1 + 2**-8."""
    ours = leftovers.Leftovers(Combination.of([1]), BF16, BF16, allow_nonfinite=False)
    unit, tie = 2.0**-52, 1 + 2.0**-8
    for sign in (1.0, -1.0):
        for units, right, settled in [(5, 2, True), (4, 2, False), (-3, 0, False), (-4, 0, True)]:
            values, sure = ours._closer(0, np.array([[sign * (tie + units * unit)]]))
            assert sure.tolist() == [settled]
            if settled:
                assert values.astype(float).tolist() == [sign * (1 + right * 2.0**-8)]
    _, sure = ours._closer(0, np.array([[0.0, -0.0]]))
    assert sure.tolist() == [False, False]  # nor of the sign of zero


def test_total_weights_that_lost_digits_are_not_trusted():
    """In pairs of float64, the total is too small to be known well enough for this tie."""
    weights = [1.0, -1.0, 2.0**-1000, TINY]
    column = np.array([1.0, -(2.0**-53) * (1 + 2.0**-27), 0.0, 0.0]) * 2.0**-500
    block = np.tile(column[:, None], 101)
    assert (means(weights, block) == 2.0**500).all()
    assert reference.average(weights, block[:, :1]) == 2.0**500


def test_what_double_double_is_not_sure_of_is_done_in_whole_numbers():
    block = planted(np.random.default_rng(8), F64, 200)
    block[:, 50:60] = np.finfo(float).max / np.arange(1, 11)
    block[1, 55:] *= -1
    weights = [0.1, 0.7, 0.3]
    right = reference.average(weights, block)
    assert means(weights, block).tobytes() == right.tobytes()


@pytest.mark.parametrize(
    ("inputs", "columns"), [(1, 8192), (16, 8192), (17, 7710), (2048, 64), (2000, 65), (10**6, 64)]
)
def test_columns_settled_at_once_are_fewer_of_many_inputs(inputs, columns):
    assert leftovers.at_once(inputs) == columns


def test_columns_are_taken_in_turns(monkeypatch):
    monkeypatch.setattr(leftovers, "_COLUMNS", 64)
    ours = leftovers.Leftovers(Combination.of([1, 2]), F32, F32, allow_nonfinite=False)
    assert list(ours._slices(150)) == [slice(0, 64), slice(64, 128), slice(128, 192)]


# sizes and memory


def test_spans_and_tiles_have_the_sizes_that_were_measured():
    """They decide on time and memory, not on results."""
    assert tiles.span(10, 1, F32) == 4 * 65536
    assert tiles.span(1, 1, F32) == 4 * 65536  # never wider
    assert tiles.span(20, 1, F32) == 4 * 32768
    assert tiles.span(10, 2, F32) == 2 * (655360 // 12)
    assert tiles.span(10, 3, BF16) == 655360 // 14
    assert tiles.span(10, 5, F32) == 655360 // 18
    assert tiles.span(10**6, 1, F32) == 4 * 256  # never narrower
    assert tiles.span(10, 1, F64) == leftovers.at_once(10) == 8192
    assert tiles.span(10_000, 500, F64) == 64
    assert compiled.width(10, F32) == 65536 // 4
    assert compiled.width(10, BF16) == 65536 // 2
    assert compiled.width(1000, F32) == 8192 // 4
    assert compiled.width(81, F32) == 8192 // 4


@pytest.mark.parametrize("with_compiled", [True, False])
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("target", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(10, 1), (3, 4)])
def test_what_a_combiner_allocates_is_bounded(monkeypatch, with_compiled, source, target, shape):
    if not with_compiled:
        monkeypatch.setattr(compiled, "COMPILED", False)
    monkeypatch.setattr(leftovers, "_COLUMNS", 256)
    inputs, outputs = shape
    source, target = lookup(source), lookup(target)
    rng = np.random.default_rng(0)
    block = np.ones((inputs, 12_000), source.numpy)
    block[:, ::3] = rng.standard_normal((inputs, len(block[0, ::3]))).astype(source.numpy)
    outs = np.empty((outputs, 12_000), target.numpy)
    combination = Combination.of(rng.uniform(0.5, 1, (outputs, inputs)))
    tracemalloc.start()
    try:
        kernel.Combiner(combination, source, target)(block, outs)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    bound = kernel.scratch_bytes(inputs, outputs, source, target, 6_000)
    assert taken <= bound


def test_scratch_memory_is_what_the_parts_take():
    """In the words of the code: any change of a bound has to be meant."""
    assert leftovers.scratch_bytes(10, F32, 100) == 100 * (10 * 36 + 200) + 100
    assert leftovers.scratch_bytes(10, BF16, 80_000) == 8192 * (10 * 34 + 200) + 80_000
    assert isinstance(leftovers.scratch_bytes(10, BF16, 80_000), int)
    assert compiled.scratch_bytes(10, 3, F32, 1000, reads=False) == 3 * (1000 + (2 << 13))
    assert (
        compiled.scratch_bytes(10, 3, F32, 1000, reads=True)
        == 3 * (1000 + (2 << 13)) + 10 * 1000 * 4
    )
    tile = 655360 // 10  # columns that are widened at once
    spans = 4 * tile
    assert tiles.scratch_bytes(10, 1, F32, F16, spans) == tile * 10 * 8 + spans * (16 + 4 + 1)
    assert tiles.scratch_bytes(10, 1, F16, F32, 500) == 500 * 10 * 12 + 500 * (16 + 8 + 1)
    assert tiles.scratch_bytes(10, 1, BF16, BF16, 500) == 500 * 10 * 4 + 500 * (8 + 4 + 1)
    assert tiles.scratch_bytes(10, 1, BF16, F16, 500) == 500 * 10 * 8 + 500 * (16 + 4 + 1)
    assert tiles.scratch_bytes(10, 1, F32, BF16, 500) == 500 * 10 * 8 + 500 * (16 + 4 + 1)


@pytest.mark.parametrize(("source", "target"), [(F16, F32), (BF16, E4M3), (F32, BF16), (E4M3, F16)])
def test_scratch_memory_of_the_step_in_numpy_is_kept_and_as_large_as_told(source, target):
    combination = Combination.of([[1, 2, 3], [0.1, 0.25, 0.3]])
    ours = tiles.Tiles(combination, source, target)
    before = set(vars(ours))
    for columns in (100, 700, 700):
        block = np.ones((3, columns), source.numpy)
        list(ours.portions(block, np.empty((2, columns), target.numpy)))
        arrays = {name: vars(ours)[name] for name in set(vars(ours)) - before}
        taken = sum(array.nbytes for array in arrays.values())
        rounding_takes = 2 * columns * target.itemsize
        assert taken + rounding_takes == tiles.scratch_bytes(3, 2, source, target, columns)
    list(ours.portions(block, np.empty((2, columns), target.numpy)))
    assert all(vars(ours)[name] is array for name, array in arrays.items())


def test_scratch_memory_of_a_wide_span_is_that_of_one_tile(monkeypatch):
    monkeypatch.setattr(tiles, "_WIDEST_TILE", 256)
    ours = tiles.Tiles(Combination.of([1, 2, 3]), F16, F32)
    before = set(vars(ours))
    ours._reserve(1000)
    taken = sum(vars(ours)[name].nbytes for name in set(vars(ours)) - before)
    assert taken + 1000 * 4 == tiles.scratch_bytes(3, 1, F16, F32, 1000) < 1000 * 3 * 12
    ours._reserve(300)
    assert ours._wide.shape == ours._half.shape == (3, 256)


def test_scratch_memory_of_the_compiled_step_is_kept_and_as_large_as_told(tmp_path):
    if not compiled.COMPILED:
        pytest.skip("wavg was installed without a C compiler")
    combination = Combination.of([[1, 2, 3], [0.1, 0.25, 0.3]])
    ours = compiled.Compiled(combination, F16, F32)
    outs = np.empty((2, 100), np.float32)
    list(ours.in_memory(np.ones((3, 100), np.float16), outs))
    left = ours._left
    assert (left.shape, left.dtype) == ((2, 100), bool)
    list(ours.in_memory(np.ones((3, 100), np.float16), outs))
    assert ours._left is left
    with open(tmp_path / "rows", "w+b") as file:
        file.write(np.ones((3, 100), np.float16).tobytes())
        file.flush()
        places = np.full(3, file.fileno(), np.intc), np.arange(3, dtype=np.int64) * 200
        list(ours.in_files(*places, outs))
        block = ours._block
        list(ours.in_files(*places, outs))
    assert ours._block is block
    assert block.dtype == np.float16
    width = compiled.width(3, F16)
    flags = ours._left.nbytes
    assert flags + block.nbytes + 2 * (2 << 13) == compiled.scratch_bytes(
        3, 2, F16, width, reads=True
    )


def test_scratch_memory_of_a_combiner_is_that_of_its_first_step_and_the_others(monkeypatch):
    rest = 1 << 18
    expected = (
        tiles.scratch_bytes(10, 2, F64, F32, 2000) + leftovers.scratch_bytes(10, F64, 2000) + rest
    )
    assert kernel.scratch_bytes(10, 2, F64, F32, 1000) == expected  # a complex number is two
    span = tiles.span(10, 2, F32)
    assert kernel.scratch_bytes(10, 2, F64, F32, 10**7) == (
        tiles.scratch_bytes(10, 2, F64, F32, span) + leftovers.scratch_bytes(10, F64, span) + rest
    )
    if not compiled.COMPILED:
        pytest.skip("wavg was installed without a C compiler")
    assert kernel.scratch_bytes(10, 2, F32, F32, 1000) == (
        compiled.scratch_bytes(10, 2, F32, 2000, reads=False)
        + leftovers.scratch_bytes(10, F32, 2000)
        + rest
    )
    width = compiled.width(10, F32)
    assert kernel.scratch_bytes(10, 2, F32, F32, 1000, from_files=True) == (
        compiled.scratch_bytes(10, 2, F32, width, reads=True)
        + leftovers.scratch_bytes(10, F32, width)
        + rest
    )


def test_what_is_read_from_files_is_what_is_compiled(monkeypatch):
    names = ["float32", "bfloat16", "float16", "float64", "float8_e5m2"]
    for there in (True, False):
        monkeypatch.setattr(compiled, "COMPILED", there)
        for source in names:
            for target in names:
                expected = there and source in names[:3] and target in names[:3]
                assert compiled.reads_files(lookup(source), lookup(target)) is expected


def test_without_a_compiler_at_hand_the_compiled_step_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "wavg._compiled", None)
    monkeypatch.delattr(wavg, "_compiled", raising=False)
    spec = importlib.util.spec_from_file_location("installed_without", compiled.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.COMPILED
    assert not module.reads_files(F32, F32)


@pytest.mark.parametrize("with_compiled", [True, False])
def test_a_row_of_outputs_may_have_nothing_finite(monkeypatch, with_compiled):
    if not with_compiled:
        monkeypatch.setattr(compiled, "COMPILED", False)
    outs = np.empty((2, 1), np.float32)
    block = np.float32([[np.inf], [3.0]])
    kernel.combine(Combination.of([[1, 1], [0, 1]]), block, outs, allow_nonfinite=True)
    assert outs.tolist() == [[np.inf], [3.0]]


# the ladder as a whole, by either form of its first step


@pytest.fixture(params=["compiled", "numpy"])
def step(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(compiled, "COMPILED", False)
    elif not compiled.COMPILED:
        pytest.skip("wavg was installed without a C compiler")


def means(weights, block, target=None, **options):
    entry = lookup(target or block.dtype.name)
    combination = Combination.of(weights)
    outs = np.empty((len(combination.matrix), block.shape[1]), entry.numpy)
    kernel.combine(combination, block, outs, **options)
    return outs


def test_an_input_that_is_not_finite_is_told(step):
    block = np.ones((3, 20_000), np.float32)
    block[1, 15_000] = -np.inf
    with pytest.raises(NonFiniteError) as caught:
        means([1, 2, 3], block)
    assert str(caught.value) == "input 1 holds -inf at index 15000"
    assert (caught.value.input, caught.value.index, caught.value.value) == (1, 15_000, -np.inf)


def test_a_result_beyond_its_format_is_told(step):
    block = np.ones((2, 20_000), np.float32)
    block[:, 15_000] = 1e38, -3e38
    block[0, 17_000] = 1e38
    with pytest.raises(NonFiniteError) as caught:
        means([[1, 1], [3, -2]], block)  # only the second row overflows, and only there
    assert str(caught.value) == (
        "the average at index 15000 does not fit float32; write a wider dtype"
    )
    assert (caught.value.input, caught.value.index) == (None, 15_000)
    assert means([3, -2], block, allow_nonfinite=True)[0, 15_000] == np.inf
    assert means([3, -2], block, "float64")[0, 15_000] == 3 * float(block[0, 15_000]) - 2 * float(
        block[1, 15_000]
    )
    with pytest.raises(NonFiniteError):
        means([1, 0], block, "float16")


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float64", "float16"])
def test_sums_that_overflow_on_the_way_do_not_matter(step, source):
    entry = lookup(source)
    top = float(np.array(LARGEST[source]).astype(entry.numpy))
    block = np.array([[top, top, -top], [top, top, -top], [top / 4, 1, 8]]).astype(entry.numpy)
    ours = means([[3, -2, 0], [1, -1, 1], [4, -4, 1]], block).astype(float)
    third = float(block[2, 0])
    assert ours.tolist() == [[top, top, -top], [third, 1, 8], [third, 1, 8]]


LARGEST = {
    "float64": np.finfo(np.float64).max,
    "float32": np.finfo(np.float32).max,
    "float16": 65504.0,
    "bfloat16": 255 * 2.0**120,
}


def planted(rng, source, columns, inputs=3):
    """Ordinary numbers, zeros of both signs, ties, what nearly cancels, and subnormal numbers."""
    block = rng.standard_normal((inputs, columns))
    step = 2.0 ** (1 - source.precision)
    block[:, ::7] = 0.0
    block[:, ::21] *= -1.0
    block[0, 14::21] = 1.0
    block[:, 3::11] = 1.0
    block[0, 3::11] += step
    block[1, 5::13] = -block[0, 5::13]
    block[2, 5::13] *= 2.0**-20
    block[:, 6::17] *= 2.0 ** (source.min_exponent - source.precision + 3)
    return block.astype(source.numpy)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_blocks_of_many_tiles_and_spans_are_right_in_every_column(step, monkeypatch, name):
    monkeypatch.setattr(tiles, "_WIDEST_TILE", 256)
    monkeypatch.setattr(leftovers, "_COLUMNS", 64)
    block = planted(np.random.default_rng(2), lookup(name), 1300)
    rows = [[1.0, 1.0, 1.0], [0.1, 0.7, 0.3], [3.0, -1.0, 0.0]]
    right = [reference.average(row, block) for row in rows]
    for weights, expected in zip(rows, right, strict=True):
        assert means(weights, block, allow_nonfinite=True)[0].tobytes() == expected.tobytes()
    together = means(rows, block, allow_nonfinite=True)
    assert together.tobytes() == b"".join(one.tobytes() for one in right)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_a_wide_block_with_infinities_is_right_beside_them(step, name):
    entry = lookup(name)
    block = planted(np.random.default_rng(3), entry, 700)
    weights = [[1.0, 1.0, 1.0], [0.1, 0.0, 0.3]]
    usual = means(weights, block)
    wide = np.tile(block, 30)  # 21,000 columns
    infinite = wide.copy()
    infinite[1, 20_001] = np.inf
    infinite[0, 9_000] = -np.inf
    infinite[2, 9_001] = np.nan
    ours = means(weights, infinite, allow_nonfinite=True).astype(float)
    right = np.tile(usual, 30).astype(float)
    right[:, 9_000], right[:, 9_001], right[0, 20_001] = -np.inf, np.nan, np.inf
    assert ours.tobytes() == right.tobytes()


def test_blocks_that_are_not_contiguous_are_combined_as_well(step):
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((3, 1000)).astype(np.float32)
    weights = [0.1, 0.2, 0.4]
    right = means(weights, np.ascontiguousarray(wide[:, ::2]))
    assert means(weights, wide[:, ::2]).tobytes() == right.tobytes()
    outs = np.zeros((1, 1000), np.float32)
    kernel.combine(Combination.of(weights), np.ascontiguousarray(wide[:, ::2]), outs[:, ::2])
    assert outs[:, ::2].tobytes() == right.tobytes()
    assert not outs[:, 1::2].any()


def test_arrays_that_are_no_plain_floats_are_refused():
    block, outs = np.ones((1, 3), np.float32), np.ones((1, 3), np.float32)
    for kind in (">f4", np.int32, np.complex64, "M8[s]"):
        with pytest.raises(WavgError) as caught:
            kernel.combine(Combination.of([1]), block.astype(kind), outs)
        assert str(caught.value) == f"dtype {np.dtype(kind)} cannot be averaged"
        with pytest.raises(WavgError):
            kernel.combine(Combination.of([1]), block, outs.astype(kind))


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
def test_subnormal_numbers_lose_nothing_on_the_way(step, target):
    """Where products lose bits to underflow, the bound has to know."""
    entry = lookup(target)
    least = 2.0 ** (entry.min_exponent - entry.precision + 1)
    numbers = np.arange(0, 64) * least
    block = np.stack([numbers, numbers[::-1], np.roll(numbers, 7)]).astype(entry.numpy)
    for weights in ([1, 1, 1], [0.1, 0.1, 0.3], [2, 1, 1], [1e-30, 1, 1], [1e-45, 1e-45, 3e-45]):
        ours = means(weights, block)[0]
        assert ours.tobytes() == reference.average(weights, block).tobytes()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_sums_are_taken_for_exact_only_where_they_are(step, name):
    """Two terms as far apart as the window allows, and a little more; ties between outputs."""
    entry = lookup(name)
    unit = 2.0 ** (1 - entry.precision)
    reach = {"float32": 60, "bfloat16": 80, "float16": 14}[name]
    for low in range(-reach, 1):
        top = np.array([1 + unit, 1 + 3 * unit, 1.0, -1 - unit] * 4)
        tail = np.ldexp([1 + unit, -1.0, 1.0, 1 + unit], low).repeat(4)
        for weights in ([1, 1, 0], [1, 1, 2], [2**13 - 1, 1, 0]):
            block = np.stack([top, tail, np.roll(top, 1)]).astype(entry.numpy)
            right = reference.average(weights, block)
            assert means(weights, block)[0].tobytes() == right.tobytes()


def test_whole_weights_of_the_largest_size_that_is_known_to_be_exact(step):
    rng = np.random.default_rng(1)
    for weights in ([2**27 - 1, 2**27, 1], [2**28, 3, 1], [2**27, 1 - 2**27, 2**20]):
        for name in ("float32", "bfloat16", "float16"):
            block = planted(rng, lookup(name), 200)
            right = reference.average(weights, block)
            ours = means(weights, block, allow_nonfinite=True)[0]
            assert ours.tobytes() == right.tobytes()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_a_row_whose_total_is_too_small_for_float64_is_exact(step, name):
    block = planted(np.random.default_rng(5), lookup(name), 60, inputs=4)
    block[0] = block[1]  # else the mean is beyond any format
    weights = [1.0, -1.0, TINY, 0.0]
    right = reference.average(weights, block)
    assert means([weights, [1, 1, 1, 1]], block)[0].tobytes() == right.tobytes()


def test_zeros_by_the_hundred_keep_their_signs(step, monkeypatch):
    monkeypatch.setattr(leftovers, "_COLUMNS", 64)
    for name in ("float16", "bfloat16", "float32", "float64"):
        block = np.full((2, 400), -0.0).astype(lookup(name).numpy)
        assert (
            means([[1, 1], [1, -1.5]], block).tobytes() == np.stack([block[0], -block[0]]).tobytes()
        )


def test_exact_sums_are_rounded_once_to_float64_as_well(step):
    block = planted(np.random.default_rng(6), F32, 200).astype(np.float32)
    for weights in ([1, 1, 1], [2**27, 2**26, 1], [3, -1, 0]):
        right = reference.average(weights, block, "float64")
        assert means(weights, block, "float64")[0].tobytes() == right.tobytes()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("inputs", [4, 5, 8, 9])
def test_inputs_without_weight_make_no_term_wherever_they_stand(step, name, inputs):
    """Four rows are taken at once if all of them have weight."""
    block = np.full((inputs, inputs), -0.0)
    np.fill_diagonal(block, 1.0)
    block = block.astype(lookup(name).numpy)
    for unused in range(inputs):
        weights = np.ones(inputs)
        weights[unused] = 0.0
        right = reference.average(weights, block)
        assert np.signbit(right[unused].astype(float))
        assert means(weights, block)[0].tobytes() == right.tobytes()
        both = means([np.arange(1, inputs + 1), weights], block)
        assert both[1].tobytes() == right.tobytes()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("columns", [1, 1023, 1024, 1025, 2048])
def test_every_column_of_tiles_that_are_full_or_not(step, name, columns):
    rng = np.random.default_rng(columns)
    wide = rng.standard_normal((7, columns)).astype(lookup(name).numpy)
    weights = np.array([[1, 2, 3, 4, 5, 6, 7], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75]])
    exactly = wide.astype(np.float64).T @ weights.T / weights.sum(axis=1)
    ours = means(weights, wide).astype(np.float64).T
    unit = 2.0 ** (1 - lookup(name).precision)
    assert (np.abs(ours - exactly) <= unit * np.abs(exactly) + 2.0**-24).all()
    alone = np.concatenate([means(row, wide) for row in weights]).astype(np.float64).T
    assert alone.tobytes() == ours.tobytes()
