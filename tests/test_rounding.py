"""Rounding once, at the very edges."""

from __future__ import annotations

import numpy as np
import pytest

from wavg import rounding
from wavg.dtypes import lookup

pytestmark = pytest.mark.usefixtures("no_alarms")  # as the kernel calls its parts
F64, F32, F16 = map(lookup, ("float64", "float32", "float16"))
TINY = 2.0**-1074  # the smallest of float64


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
