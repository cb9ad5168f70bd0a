"""`StreamingAverager` against `wavg.average`, and what it leaves alone."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
import strategies
import wavg
from trees import Pair, assert_same_tree, fill
from wavg.dtypes import lookup
from wavg.errors import NonFiniteError, StructureMismatchError, WavgError, WeightError

SCHEDULES = ["equal", "linear", "exponential:alpha=2", "exponential:alpha=0.4"]
EXACT = SCHEDULES[:2]


def stream(models, weights="equal", **options):
    averager = wavg.StreamingAverager(weights, **options)
    for model in models:
        averager.update(model)
    return averager.result()


def every_prefix(models, weights):
    """Yield what the stream and `wavg.average` say after each model."""
    averager = wavg.StreamingAverager(weights)
    for count, model in enumerate(models, start=1):
        averager.update(model)
        assert averager.count == count
        yield averager.result(), wavg.average(models[:count], weights)


def rows(data, dtype, spread, count=None):
    count = count or data.draw(st.integers(1, 12))
    drawn = data.draw(strategies.bit_patterns(dtype, count * 30, spread))
    return list(drawn.reshape(count, 5, 6))


# Against the average of all at once


@pytest.mark.parametrize("weights", EXACT)
@pytest.mark.parametrize("spread", [None, 3, 28])
@pytest.mark.parametrize("dtype", strategies.FLOATS)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_equal_and_linear_have_the_bytes_of_the_average(weights, dtype, spread, data):
    models = rows(data, dtype, spread)
    if dtype == "float64" and spread is None:  # so that no sum exceeds float64
        models = [np.clip(model, -1e300, 1e300) for model in models]
    for ours, right in every_prefix(models, weights):
        assert_same_tree(ours, right)


@pytest.mark.parametrize("weights", SCHEDULES[2:])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_half_precision_is_within_one_unit_of_the_average(weights, dtype, data):
    for ours, right in every_prefix(rows(data, dtype, 10), weights):
        distance = np.abs(ordered(ours) - ordered(right))
        assert distance.max() <= 1


@pytest.mark.parametrize("weights", SCHEDULES[2:])
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_float32_is_within_one_unit_of_the_average(weights, data):
    for ours, right in every_prefix(rows(data, "float32", 12), weights):
        np.testing.assert_array_max_ulp(ours, right, maxulp=1)


@pytest.mark.parametrize("weights", SCHEDULES[2:])
@settings(deadline=None, max_examples=15)
@given(data=st.data(), spread=st.sampled_from([3, 40]))
def test_float64_keeps_the_error_bound_of_a_sum(weights, data, spread):
    models = rows(data, "float64", spread)
    for count, (ours, right) in enumerate(every_prefix(models, weights), start=1):
        magnitude = wavg.average([np.abs(model) for model in models[:count]], weights)
        assert (np.abs(ours - right) <= (count + 3) * 2.0**-53 * magnitude).all()


def ordered(array):
    """Numbers of two bytes as integers that count representable values."""
    bits = array.view(np.uint16).astype(np.int64)
    return np.where(bits < 0x8000, bits, 0x8000 - bits)


def test_the_count_of_units_sees_a_planted_error():
    for dtype in ("float16", "bfloat16"):
        array = np.array([1.0, -0.0, 0.0, -2.0]).astype(lookup(dtype).numpy)
        beyond = (array.view(np.uint16) + np.uint16(2)).view(array.dtype)
        assert np.abs(ordered(array) - ordered(beyond)).tolist() == [2, 2, 2, 2]
        assert ordered(array)[1] == ordered(array)[2]
    with pytest.raises(AssertionError):
        np.testing.assert_array_max_ulp(np.float32(1), np.float32(1 + 2**-22), maxulp=1)


@pytest.mark.parametrize("weights", SCHEDULES)
def test_a_tree_of_mixed_leaves_follows_the_average(weights):
    rng = np.random.default_rng(0)
    models = [
        {
            "layers": [Pair(rng.standard_normal((3, 4)).astype(np.float32), None), ()],
            "half": rng.standard_normal(5).astype(lookup("bfloat16").numpy),
            "scalar": np.float32(i),
            "empty": np.empty((0, 3), np.float16),
            "count": np.int64(i),
            "flag": np.array([i % 2 == 0]),
            "phase": (rng.standard_normal(4) + 1j).astype(np.complex64),
        }
        for i in range(8)
    ]
    for ours, right in every_prefix(models, weights):
        assert ours.keys() == right.keys()
        assert_same_tree(fill(ours, np.shape), fill(right, np.shape))
        assert_same_tree(ours["count"], right["count"])
        assert_same_tree(ours["flag"], right["flag"])
        np.testing.assert_array_max_ulp(ours["layers"][0].left, right["layers"][0].left, maxulp=1)
        np.testing.assert_array_max_ulp(ours["scalar"], right["scalar"], maxulp=1)
        pairs = [tree["phase"].view(np.float32) for tree in (ours, right)]
        np.testing.assert_array_max_ulp(*pairs, maxulp=1)


@pytest.mark.parametrize("weights", SCHEDULES)
@pytest.mark.parametrize("dtype", [*strategies.FLOATS, "complex64", "complex128"])
def test_one_model_comes_back_byte_for_byte(weights, dtype):
    model = [np.array([1.1, -0.0, 0.0, 2e-5, -3e4]).astype(lookup(dtype).numpy)]
    assert_same_tree(stream([model], weights), model)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_follows_the_average(dtype):
    rng = np.random.default_rng(0)
    models = [rng.standard_normal(200).astype(lookup(dtype).numpy) for _ in range(7)]
    for ours, right in every_prefix(models, "linear"):
        assert_same_tree(ours, right)


def test_a_long_exponential_forgets_and_stays_finite():
    averager = wavg.StreamingAverager("exponential:alpha=2")
    for value in [1e30] * 10 + [1.0] * 5000:
        averager.update(np.float64(value))
    assert averager.result() == pytest.approx(1.0, rel=1e-12)


def test_a_schedule_of_ones_own_streams_by_its_update():
    halves = wavg.Schedule("halves", lambda steps: 2.0**steps, lambda position, *_: (0.5, 1.0))
    models = [np.float32(value) for value in (1, 5, 2)]
    assert_same_tree(stream(models, halves), wavg.average(models, [1, 2, 4]))


# Values that are not averaged, and zeros


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "int32"])
def test_integers_are_the_newest(dtype):
    models = [{"n": np.array(values, dtype)} for values in ([1, 0], [0, 0], [1, 1], [0, 1])]
    averager = wavg.StreamingAverager("linear")
    for model in models:
        averager.update(model)
        assert_same_tree(averager.result(), model)


def test_large_integers_are_kept_to_the_last_bit():
    newest = np.array([2**63 - 1, 2**53 + 1])
    assert_same_tree(stream([np.zeros_like(newest), newest]), newest)


@pytest.mark.parametrize("weights", SCHEDULES)
@pytest.mark.parametrize("dtype", [*strategies.FLOATS, "complex64"])
def test_a_mean_of_negative_zeros_is_a_negative_zero(weights, dtype):
    # Built by sign: -0.0 would lose it on the way to complex.
    negative = np.copysign(np.zeros(6), -1).view(np.complex128).astype(np.complex64)
    if dtype != "complex64":
        negative = np.copysign(np.zeros(3), -1).astype(lookup(dtype).numpy)
    assert_same_tree(stream([negative] * 4, weights), negative)
    positive = np.zeros_like(negative)
    assert_same_tree(stream([negative, positive, negative], weights), positive)


def test_opposite_numbers_average_to_a_positive_zero():
    assert_same_tree(stream([np.float32([3]), np.float32([-3])]), np.float32([0.0]))


def test_complex_numbers_average_by_parts():
    ours = stream([np.array([1 + 2j, 3j]), np.array([3 + 4j, 1 - 1j])])
    assert_same_tree(ours, np.array([2 + 3j, 0.5 + 1j]))


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_arrays_that_are_not_contiguous_count_like_their_copies(dtype):
    array = np.arange(24).reshape(4, 6).astype(dtype)
    for view in (array.T, array[::-1, ::2], np.broadcast_to(array[0], (2, 6)), array[:, 1]):
        assert_same_tree(stream([view, view]), np.array(view, order="C"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "complex64"])
def test_the_order_of_bytes_does_not_change_the_numbers(dtype):
    models = [np.array([1, 2], dtype), np.array([3, 4], dtype)]
    foreign = [array.astype(array.dtype.newbyteorder()) for array in models]
    np.testing.assert_array_equal(stream(foreign), [2, 3])


def test_a_sum_beyond_float64_is_refused_and_leaves_the_state_as_it_was():
    averager = wavg.StreamingAverager()
    averager.update([np.array([1.7e308])])
    with pytest.raises(NonFiniteError, match="exceeds float64"):
        averager.update([np.array([1.7e308])])
    assert averager.result() == [1.7e308]


def test_a_sum_beyond_float64_is_infinite_where_that_is_allowed():
    models = [np.array([1.7e308])] * 2
    assert stream(models, allow_nonfinite=True).tolist() == [np.inf]
    assert wavg.average(models).tolist() == [1.7e308]


@pytest.mark.parametrize("exponent", [-963, -300, 0, 900])
def test_weights_with_fractions_are_exact_above_1e_290(exponent):
    rows = list(np.ldexp(np.random.default_rng(0).uniform(1, 2, (5, 99)), exponent))
    rule, steps = "schedule_free:r=0,warmup=70", [0.1, 0.2, 0.7, 1.1, 1.3]
    averager = wavg.StreamingAverager(rule)
    for row, step in zip(rows, steps, strict=True):
        averager.update(row, step)
    assert_same_tree(averager.result(), wavg.average(rows, rule, steps=steps))


# What is refused leaves the state as it was


GOOD = [{"a": np.float32([1, 2]), "b": [np.float64(3)]}, {"a": np.float32([5, 4]), "b": [7.0]}]


def assert_refused(averager, model, error, match):
    """The model is refused, and everything that can be seen of the state stays."""
    before, result = averager.count, averager.result() if averager.count else None
    with pytest.raises(error, match=match) as caught:
        averager.update(model)
    assert averager.count == before
    if before:
        assert_same_tree(averager.result(), result)
    return caught.value


STRUCTURES = [
    ({"a": np.float32([1, 2])}, "b: only in the first"),
    ({**GOOD[0], "c": 1.0}, "c: only in the other"),
    ({"a": np.float32([1, 2]), "b": (3.0,)}, "b: list in one, tuple in the other"),
    ({"a": np.float32([1, 2]), "b": [3.0, 4.0]}, "b: length 1 in one, 2 in the other"),
    ({"a": None, "b": [3.0]}, "a: leaf in one, None in the other"),
    ({"a": np.float32([1, 2, 3]), "b": [3.0]}, r"a: float32\[3\], not float32\[2\]"),
    ({"a": np.float64([1, 2]), "b": [3.0]}, r"a: float64\[2\], not float32\[2\]"),
    ({"a": np.float32([1, 2]), "b": [3]}, r"b\[0\]: int64\[\], not float64\[\]"),
    ({"a": np.float32([1, 2]), "b": ["x"]}, r"b\[0\]: <U1\[\], not float64\[\]"),
]


@pytest.mark.parametrize("weights", SCHEDULES)
@pytest.mark.parametrize(("bad", "match"), STRUCTURES)
def test_a_model_of_another_structure_leaves_the_state_as_it_was(weights, bad, match):
    averager = wavg.StreamingAverager(weights)
    averager.update(GOOD[0])
    assert_refused(averager, bad, StructureMismatchError, match)
    averager.update(GOOD[1])
    assert_same_tree(averager.result(), stream(GOOD, weights))


def test_every_difference_of_a_model_is_listed():
    averager = wavg.StreamingAverager()
    averager.update(GOOD[0])
    bad = {"a": np.float32([1]), "b": [np.float32(1)]}
    error = assert_refused(averager, bad, StructureMismatchError, "differs from the first")
    assert error.differences == [
        "a: float32[1], not float32[2]",
        "b[0]: float32[], not float64[]",
    ]


@pytest.mark.parametrize("weights", SCHEDULES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [*strategies.FLOATS, "complex64"])
def test_a_model_with_nan_leaves_the_state_as_it_was(weights, value, dtype):
    dtype = lookup(dtype).numpy
    models = [{"a": np.float64(i), "b": [np.full(3, i).astype(dtype)]} for i in (1, 2)]
    bad = {"a": np.float64(9), "b": [np.array([1, value, 2]).astype(dtype)]}
    averager = wavg.StreamingAverager(weights)
    for model in models:
        error = assert_refused(averager, bad, NonFiniteError, r"b\[0\] holds NaN or infinity")
        assert error.tensor == "b[0]"
        averager.update(model)
    assert_same_tree(averager.result(), stream(models, weights))


def test_a_first_model_that_was_refused_does_not_settle_the_structure():
    averager = wavg.StreamingAverager()
    assert_refused(averager, {"x": [np.nan]}, NonFiniteError, r"x\[0\]")
    assert_refused(averager, {"x": "text"}, WavgError, "leaf x is <U4, not an array of numbers")
    averager.update([np.float32(2)])
    assert_same_tree(averager.result(), [np.array(2, np.float32)])


def test_the_check_of_the_state_sees_a_planted_change():
    class Careless(wavg.StreamingAverager):
        def update(self, model, step=None):
            if self.count:
                self._held._sums[0][0].levels[0] += 1.0
            super().update(model, step)

    averager = Careless()
    averager.update([1.0])
    with pytest.raises(AssertionError):
        assert_refused(averager, [np.nan], NonFiniteError, "holds NaN")


def test_nonfinite_values_pass_when_allowed():
    models = [np.float32([1, np.inf, np.nan]), np.float32([3, 1, 1])]
    ours = stream(models, allow_nonfinite=True)
    np.testing.assert_array_equal(ours, np.float32([2, np.inf, np.nan]))


def test_there_is_no_result_before_the_first_model():
    with pytest.raises(WeightError, match="no average yet"):
        wavg.StreamingAverager().result()


@pytest.mark.parametrize("weights", [[1, 2], "0.5,0.5", wavg.Schedule("own", lambda steps: steps)])
def test_weights_that_need_the_number_of_models_are_refused(weights):
    with pytest.raises(WeightError, match="need to know how many models will come"):
        wavg.StreamingAverager(weights)


# What it shares with the caller: nothing


@pytest.mark.parametrize("dtype", [*strategies.FLOATS, "complex64", "int32"])
def test_the_result_is_the_callers_own(dtype):
    averager = wavg.StreamingAverager()
    averager.update([np.ones(3).astype(lookup(dtype).numpy)])
    for _ in range(2):
        first, second = averager.result(), averager.result()
        assert not np.shares_memory(first[0], second[0])
        first[0][...] = 7
        assert_same_tree(averager.result(), second)
        averager.update([np.ones(3).astype(lookup(dtype).numpy)])


@pytest.mark.parametrize("dtype", [*strategies.FLOATS, "complex64", "int32"])
def test_a_model_is_neither_changed_nor_remembered(dtype):
    averager = wavg.StreamingAverager("linear")
    array = np.arange(4).astype(lookup(dtype).numpy)
    array.setflags(write=False)
    model = {"w": array}
    for _ in range(3):
        averager.update(model)
    np.testing.assert_array_equal(array.astype(complex), np.arange(4))
    assert list(model) == ["w"]
    array.setflags(write=True)
    before = averager.result()
    array[...] = 1  # the training goes on in place
    assert_same_tree(averager.result(), before)
    alive = weakref.ref(array)
    del array, model
    gc.collect()
    assert alive() is None


def test_two_averagers_share_nothing():
    models = [np.float32([i]) for i in range(4)]
    ours = [wavg.StreamingAverager("linear"), wavg.StreamingAverager("linear")]
    for averager, part in zip(ours, (models[:2], models[2:]), strict=True):
        for model in part:
            averager.update(model)
    assert_same_tree(ours[0].result(), wavg.average(models[:2], "linear"))
    assert_same_tree(ours[1].result(), wavg.average(models[2:], "linear"))


def test_it_says_what_it_is():
    averager = wavg.StreamingAverager("exponential")
    averager.update([1.0])
    assert repr(averager) == "StreamingAverager('exponential:alpha=2', count=1)"


def test_jax_arrays_are_leaves():
    jnp = pytest.importorskip("jax.numpy")
    models = [{"w": jnp.asarray([i, 2.5], jnp.bfloat16)} for i in (1, 2)]
    assert_same_tree(stream(models), wavg.average(models))


def test_the_oracle_of_exact_fractions_agrees():
    rows = np.random.default_rng(0).standard_normal((9, 50)).astype(np.float16)
    ours = stream(list(rows), "linear")
    assert reference.same_bytes(ours, reference.average(range(1, 10), rows))
