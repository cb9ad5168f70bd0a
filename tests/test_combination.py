"""What is known of weights before any number is seen."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from wavg.combination import Combination
from wavg.errors import WeightError

pytestmark = pytest.mark.usefixtures("no_alarms")  # as the kernel calls its parts
TINY = 2.0**-1074  # the smallest of float64


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
