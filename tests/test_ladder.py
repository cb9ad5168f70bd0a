"""The steps of the kernel as a whole, by either form of the first."""

from __future__ import annotations

import numpy as np
import pytest

import reference
from kernels import means, planted
from wavg import compiled, kernel, leftovers, tiles
from wavg.combination import Combination
from wavg.dtypes import lookup
from wavg.errors import NonFiniteError, WavgError

pytestmark = pytest.mark.usefixtures("no_alarms")  # as the kernel calls its parts
F32 = lookup("float32")
TINY = 2.0**-1074  # the smallest of float64


@pytest.fixture(params=["compiled", "numpy"])
def step(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(compiled, "COMPILED", False)
    elif not compiled.COMPILED:
        pytest.skip("wavg was installed without a C compiler")


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
