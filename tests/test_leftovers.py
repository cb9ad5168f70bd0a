"""What the first step leaves: sums that are exact, second looks, whole numbers."""

from __future__ import annotations

import numpy as np
import pytest

import reference
from kernels import means, planted
from wavg import leftovers
from wavg.combination import Combination
from wavg.dtypes import lookup

pytestmark = pytest.mark.usefixtures("no_alarms")  # as the kernel calls its parts
F64, F32, F16, BF16 = map(lookup, ("float64", "float32", "float16", "bfloat16"))
TINY = 2.0**-1074  # the smallest of float64


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
