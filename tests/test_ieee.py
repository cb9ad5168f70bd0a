"""What holds of numbers that are not finite, and of zeros."""

from __future__ import annotations

import numpy as np
import pytest

from wavg import ieee

pytestmark = pytest.mark.usefixtures("no_alarms")  # as the kernel calls its parts


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
