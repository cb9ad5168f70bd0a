"""Sums that are only added to are exact, whatever the numbers; and what updates allocate."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
import strategies
import wavg
from trees import assert_same_tree
from wavg.blocks import BLOCK, blocks
from wavg.dtypes import lookup
from wavg.errors import NonFiniteError, WeightError
from wavg.sums import Table

EXACT = ["equal", "linear"]


def streamed(models, weights="equal", **options):
    averager = wavg.StreamingAverager(weights, **options)
    for model in models:
        averager.update(model)
    return averager


def table_of(averager, leaf=0):
    """The elements that are not held by arrays alone, and how many arrays there are."""
    (running,) = averager._held._sums[leaf]
    return running.rest.items(), len(running.levels)


# Numbers that are made to be hard

NASTY = {
    "cancellation": [1e30, 1.0, -1e30],
    "three levels": [1e30, 1e-7, 1e-38, -1e30],
    "subnormal beside huge": [3e38, 1e-45, -3e38, 1e-45],
    "tie broken far below": [1.0, 1 + 2.0**-23, 2.0**-140, 0.0],
    "tie held": [1.0, 1 + 2.0**-23, 0.0, 0.0],
    "below a tie": [1 + 2.0**-23, 1.0, -(2.0**-149), -0.0],
    "opposite": [7.0, -7.0],
    "opposite but for the last bit": [1 + 2.0**-23, -1.0],
    "zeros of both signs": [-0.0, 0.0],
    "negative zeros": [-0.0, -0.0, -0.0],
    "largest": [3.4028235e38] * 5,
    "smallest": [1e-45, 1e-45, 0.0],
    "halves of the smallest": [1e-45, 0.0],
    "underflow to a signed zero": [-1e-45, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("weights", EXACT)
@pytest.mark.parametrize("dtype", strategies.FLOATS)
@pytest.mark.parametrize("values", NASTY.values(), ids=NASTY)
def test_hard_numbers_give_the_bytes_of_exact_fractions(values, dtype, weights):
    models = [np.array([value, 1.0, -value]) for value in values]
    limit = float(reference.LARGEST[dtype]) if dtype != "bfloat16" else 3e38
    models = [np.clip(model, -limit, limit).astype(lookup(dtype).numpy) for model in models]
    weight = np.ones(len(models)) if weights == "equal" else np.arange(1.0, len(models) + 1)
    ours = streamed(models, weights).result()
    assert reference.same_bytes(ours, reference.average(weight, np.array(models)))
    assert reference.same_bytes(ours, wavg.average(models, weights))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_a_large_leaf_keeps_few_elements_aside_and_all_bytes(dtype, data):
    """Most elements fit one number; some, here and there, do not."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    size, count = BLOCK + 500, data.draw(st.integers(2, 7))
    models = []
    for _ in range(count):
        values = 1 + rng.random(size) / 4
        places = rng.integers(0, size, data.draw(st.integers(1, 12)))
        values[places] *= 10.0 ** rng.integers(-38, 38, len(places))
        models.append(values.astype(lookup(dtype).numpy))
    averager = streamed(models, "linear")
    _, levels = table_of(averager)
    assert levels == (2 if dtype == "float64" else 1)
    assert_same_tree(averager.result(), wavg.average(models, "linear"))


def test_an_element_that_outgrows_its_sum_is_kept_aside():
    models = np.ones((4, 10 * BLOCK), np.float32)
    place = 3 * BLOCK + 17
    models[:, place] = [1e30, 1, -1e30, 2.0**-100]
    averager = streamed(list(models[:2]))
    assert table_of(averager) == ([(place, Fraction(1))], 1)
    averager.update(models[2])
    assert_same_tree(averager.result(), wavg.average(list(models[:3])))
    assert_same_tree(streamed(list(models)).result(), wavg.average(list(models)))


def test_a_leaf_of_many_such_elements_gets_another_array():
    rng = np.random.default_rng(0)
    models = [np.ldexp(rng.random(3 * BLOCK), 90 * (i % 3) - 60).astype("f4") for i in range(6)]
    averager = streamed(models, "linear")
    places, levels = table_of(averager)
    assert levels > 2
    assert len(places) * 64 <= 3 * BLOCK
    assert_same_tree(averager.result(), wavg.average(models, "linear"))


def test_under_a_large_sum_of_weights_the_mean_is_still_rounded_once():
    # Just above a midpoint, which the quotient in float64 cannot tell from it: a sum of weights of
    # 31 bits is too much for rounding twice.
    weights = [2.0**29 + 1, 2.0**29 + 2]
    rule = wavg.Schedule("own", lambda steps: steps, lambda i, *_: (1.0, weights[i - 1]))
    rows = np.float32([[1.0], [1 + 2.0**-23]])
    ours = streamed(list(rows), rule).result()
    assert ours == 1 + 2.0**-23
    assert reference.same_bytes(ours, reference.average(weights, rows))


@pytest.mark.parametrize("dtype", strategies.FLOATS)
def test_fractional_and_negative_weights_that_only_add_are_exact(dtype):
    factors = [0.1, 1 / 3, -0.25, 2.0**40 + 2.0**-10, 7.0]
    rule = wavg.Schedule(
        "own", lambda steps: np.array(factors[: len(steps)]), lambda i, *_: (1.0, factors[i - 1])
    )
    rows = np.random.default_rng(0).standard_normal((5, 60)).astype(lookup(dtype).numpy)
    for count in range(1, 6):
        ours = streamed(list(rows[:count]), rule).result()
        assert reference.same_bytes(ours, reference.average(factors[:count], rows[:count]))


def test_a_schedule_that_forgets_begins_a_new_exact_sum():
    restart = wavg.Schedule("own", lambda steps: steps, lambda i, *_: (float(i != 4), 1.0))
    models = [np.float64([1e300, 0.1]), np.float64([1, 0.2]), np.float64([2, 1e-300])] + [
        np.float64([i, 0.1 * i]) for i in range(4)
    ]
    assert_same_tree(streamed(models, restart).result(), wavg.average(models[3:]))


def test_a_schedule_that_adds_and_then_decays_keeps_what_it_had():
    fading = wavg.Schedule("own", lambda steps: steps, lambda i, *_: (0.5 if i > 3 else 1.0, 1.0))
    rows = np.random.default_rng(0).standard_normal((6, 2 * BLOCK))
    rows[:, 5] = [1e20, 1e-20, 3, 4, 5, 6]
    weights = [0.125, 0.125, 0.125, 0.25, 0.5, 1.0]
    ours = streamed(list(rows), fading).result()
    np.testing.assert_allclose(ours, wavg.average(list(rows), weights), rtol=1e-12, atol=1e-15)


def test_weights_that_sum_to_zero_have_no_average():
    rule = wavg.Schedule("own", lambda steps: steps, lambda i, *_: (1.0, 1.0 if i % 2 else -1.0))
    averager = streamed([np.float32(1), np.float32(2)], rule)
    with pytest.raises(WeightError, match="own of the models so far sum to zero"):
        averager.result()
    averager.update(np.float32(5))
    assert averager.result() == 4


@pytest.mark.parametrize("pair", [(np.nan, 1.0), (1.0, np.inf), (2.0**900, 2.0**1010)])
def test_weights_beyond_all_bounds_are_refused_and_leave_the_state(pair):
    rule = wavg.Schedule("own", lambda steps: steps, lambda i, *_: pair if i > 1 else (1.0, 1.0))
    averager = streamed([np.float32(3)], rule)
    with pytest.raises(WeightError, match="own"):
        averager.update(np.float32(4))
    assert (averager.count, averager.result()) == (1, 3)


# NaN and infinity, where they are allowed


@pytest.mark.parametrize("weights", EXACT)
@pytest.mark.parametrize("dtype", strategies.FLOATS)
def test_allowed_infinities_and_nans_are_those_of_the_average(weights, dtype):
    values = [
        [1, 5, np.inf, np.inf, np.nan, -0.0],
        [3, 5, 1, -np.inf, 1, 0.1],
        [9, np.inf, 2, 1, 1, 1],
    ]
    models = [np.array(row).astype(lookup(dtype).numpy) for row in values]
    ours = streamed(models, weights, allow_nonfinite=True).result()
    right = wavg.average(models, weights, allow_nonfinite=True)
    assert_same_tree(ours, right)


def test_an_average_that_does_not_fit_its_dtype_is_refused():
    rule = wavg.Schedule("own", lambda steps: steps, lambda i, *_: (1.0, 2.0 if i == 1 else -1.0))
    averager = streamed([{"w": np.float16([60000])}, {"w": np.float16([-60000])}], rule)
    with pytest.raises(NonFiniteError, match="the average of w does not fit float16"):
        averager.result()


# float32 sums


@pytest.mark.parametrize("weights", [*EXACT, "exponential:alpha=50"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_float32_sums_keep_their_error_bound(weights, dtype):
    rng = np.random.default_rng(0)
    models = [rng.standard_normal(500).astype(lookup(dtype).numpy) for _ in range(60)]
    ours = streamed(models, weights, precision="float32").result().astype(np.float64)
    right = wavg.average(models, weights).astype(np.float64)
    scale = wavg.average([np.abs(model) for model in models], weights).astype(np.float64)
    bound = 60 * 2.0**-24 * scale + np.abs(right) * 2.0 ** -lookup(dtype).precision
    assert (np.abs(ours - right) <= bound).all()
    assert ours.tobytes() != right.tobytes() or dtype == "bfloat16"


def test_a_slow_average_in_float32_has_no_bias_from_its_decay():
    # float32(0.9999) is off by 2e-8, which 1 - 0.9999 would see as 2e-4.
    rule = wavg.Schedule("own", lambda steps: steps, lambda *_: (0.9999, 1.0))
    averager = wavg.StreamingAverager(rule, precision="float32")
    for _ in range(2000):
        averager.update(np.full(3, 1.1, np.float32))
    np.testing.assert_allclose(averager.result(), np.float32(1.1), rtol=2e-5)


def test_a_sum_beyond_float32_is_refused():
    averager = streamed([np.float32([3e38])], precision="float32")
    with pytest.raises(NonFiniteError, match="exceeds float32"):
        averager.update(np.float32([3e38]))
    assert averager.result() == np.float32([3e38])


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision must be one of float64, float32, not 'f8'"):
        wavg.StreamingAverager(precision="f8")


# Memory


def traced(function):
    """Bytes at the peak of a call beyond those before it."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        function()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


WAYS = {
    "equal": ("equal", {}),
    "linear": ("linear", {}),
    "ema": ("ema:decay=0.9", {}),
    "ema in float32": ("ema:decay=0.9", {"precision": "float32"}),
    "two": (["linear", "ema:decay=0.9"], {}),
    "window": ("exponential", {"window": 2}),
}
LAYOUTS = {
    "contiguous": lambda a: a,
    "transposed": np.asfortranarray,
    "strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
}


def state_bytes(way, dtype):
    """What an averager takes for a number of a model."""
    size = lookup(dtype).itemsize
    if way == "window":
        return 2 * size
    if dtype == "int64":
        return 8
    exact = {"equal": 1, "linear": 1, "two": 1}.get(way, 0) * (2 if dtype == "float64" else 1)
    moving = {"two": 1, "ema in float32": 0.5, "ema": 1}.get(way, 0)
    return 8 * (exact + moving) * (2 if dtype == "complex64" else 1)


@pytest.mark.parametrize(
    ("way", "dtype", "layout"),
    [(way, dtype, "contiguous") for way in WAYS for dtype in ("float32", "bfloat16", "float64")]
    + [(way, "float32", layout) for way in ("linear", "window") for layout in LAYOUTS]
    + [("linear", dtype, "transposed") for dtype in ("complex64", "int64")],
)
def test_updates_after_the_first_allocate_nothing_of_the_models_size(way, dtype, layout):
    rng = np.random.default_rng(0)
    models = [
        {"w": LAYOUTS[layout](rng.standard_normal((250, 2000)).astype(lookup(dtype).numpy))}
        for _ in range(3)
    ]
    weights, options = WAYS[way]
    averager = wavg.StreamingAverager(weights, **options)
    first, *later = [traced(lambda m=model: averager.update(m)) for model in models]
    assert first == pytest.approx(500_000 * state_bytes(way, dtype), rel=0.2)
    assert max(later) < 300_000  # buffers of a block


# Parts


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (BLOCK * 2 + 1,), (300, 77, 2)])
@pytest.mark.parametrize("dtype", [*strategies.FLOATS, "float8_e4m3fn", "complex64"])
def test_blocks_are_the_numbers_in_order(shape, dtype):
    rng = np.random.default_rng(0)
    array = rng.standard_normal(shape).astype(lookup(dtype).numpy)
    views = [array, array.T, array[::-1] if array.ndim else array, np.asfortranarray(array)]
    for view in views:
        flat = np.array(view, order="C").reshape(-1)
        flat = flat.view(np.float32) if dtype == "complex64" else flat
        found = [(start, block.copy()) for start, block in blocks(view)]
        whole = np.concatenate([block for _, block in found]) if found else np.empty(0)
        np.testing.assert_array_equal(whole, flat.astype(np.float64))
        assert [start for start, _ in found] == list(
            np.cumsum([0, *(len(block) for _, block in found)])[: len(found)]
        )
        assert all(len(block) <= BLOCK for _, block in found)


def test_a_table_is_what_its_arrays_say():
    table = Table()
    for place, value in ((5, 0.1), (BLOCK * 3, 2.0), (5, 1e-30), (7, 1.0), (7, -1.0)):
        table.add(place, value)
    assert table.count == 2
    exact = [(5, Fraction(0.1) + Fraction(1e-30)), (BLOCK * 3, Fraction(2))]
    assert table.items() == exact
    assert table.items(0, BLOCK) == exact[:1]
    assert table.items(6, BLOCK * 4) == exact[1:]
    twin = Table()
    twin.fill(*table.arrays())
    assert twin.items() == exact
