"""What the two forms of the first step are told: bounds, windows, totals."""

from __future__ import annotations

import numpy as np
import pytest

from wavg import compiled, tiles
from wavg.combination import Combination
from wavg.dtypes import lookup

pytestmark = pytest.mark.usefixtures("no_alarms")  # as the kernel calls its parts
F64, F32, F16, BF16 = map(lookup, ("float64", "float32", "float16", "bfloat16"))
E4M3 = lookup("float8_e4m3fn")


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


def test_the_step_in_numpy_comes_by_every_column_once(monkeypatch):
    monkeypatch.setattr(tiles, "_WIDEST_TILE", 256)
    ours = tiles.Tiles(Combination.of([1, 2]), F32, F32)
    portions = ours.portions(np.ones((2, 3000), np.float32), np.empty((1, 3000), np.float32))
    assert [portion.first for portion in portions] == [0, 1024, 2048]
