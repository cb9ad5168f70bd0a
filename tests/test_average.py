"""`wavg.average` against exact fractions, on trees of every kind, and what it refuses."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
import strategies
import wavg
from trees import Pair, assert_same_tree, fill, trees, walk
from wavg.dtypes import dtype_of, lookup
from wavg.errors import NonFiniteError, StructureMismatchError, WavgError, WeightError

AVERAGED = [*strategies.FLOATS, "complex64", "complex128"]
SHAPES = st.sampled_from([(), (0,), (1,), (5,), (2, 3), (3, 0, 2), (2, 1, 3)])


@dataclass(frozen=True)
class Spec:
    """A leaf to be drawn; no tuple, for that would be a tree."""

    dtype: str
    shape: tuple[int, ...]


SPECS = st.builds(Spec, st.sampled_from(AVERAGED), SHAPES)
BFLOAT16 = lookup("bfloat16").numpy


def components(array):
    """A flat copy, in C order, a complex number as two reals."""
    return np.ravel(array).view(dtype_of(array.dtype).component.numpy)


@st.composite
def arrays(draw, spec, spread=None):
    entry = lookup(spec.dtype)
    if not entry.averaged:
        return np.arange(math.prod(spec.shape)).astype(spec.dtype).reshape(spec.shape)
    count = math.prod(spec.shape) * (2 if entry.kind == "complex" else 1)
    values = draw(strategies.bit_patterns(entry.component.name, count, spread))
    return values.view(entry.numpy).reshape(spec.shape)


@st.composite
def models(draw, count, specs=SPECS, spread=None):
    skeleton = draw(trees(specs, max_leaves=5))
    return [fill(skeleton, lambda s: draw(arrays(s, spread))) for _ in range(count)]


def oracle(weights, row):
    """The correctly rounded mean of arrays, from exact fractions."""
    with np.errstate(over="ignore"):  # in ml_dtypes' casts
        flat = reference.average(weights, np.stack([components(array) for array in row]))
    return flat.view(row[0].dtype).reshape(row[0].shape)


def expected(weights, given):
    rows = iter(zip(*(walk(model) for model in given), strict=True))
    return fill(given[0], lambda _: oracle(weights, next(rows)))


@settings(deadline=None, max_examples=100)
@given(data=st.data(), count=st.integers(1, 6), spread=st.sampled_from([None, 3, 20]))
def test_every_leaf_is_the_correctly_rounded_mean(data, count, spread):
    given = data.draw(models(count, spread=spread))
    weights = data.draw(strategies.weights(count))
    ours = wavg.average(given, weights, allow_nonfinite=True)
    assert_same_tree(ours, expected(weights, given))


@pytest.mark.parametrize("weights", ["equal", "linear", "exponential:alpha=0.7"])
@settings(deadline=None, max_examples=15)
@given(data=st.data(), count=st.integers(1, 5))
def test_schedules_by_name_weigh_oldest_first(weights, data, count):
    given = data.draw(models(count))
    coefficients = {
        "equal": [1.0] * count,
        "linear": list(range(1, count + 1)),
        "exponential:alpha=0.7": np.exp((np.arange(count) + 1.0 - count) / 0.7),
    }[weights]
    assert_same_tree(wavg.average(given, weights), expected(coefficients, given))


def test_the_oracle_for_trees_sees_a_planted_error():
    given = [{"a": np.float32([1, 2]), "b": np.complex64(1 + 2j)} for _ in range(3)]
    right = expected([1, 2, 3], given)
    for key, planted in (("a", np.float32([1, 2.0000002])), ("b", np.complex64(1 - 2j))):
        with pytest.raises(AssertionError):
            assert_same_tree({**right, key: np.asarray(planted)}, wavg.average(given))


def test_weights_may_be_a_schedule_a_text_a_list_or_an_array():
    given = [np.float32([1, 2]), np.float32([4, 8])]
    right = np.float32([3, 6])
    for weights in ("linear", wavg.linear(), [1, 2], (1, 2), np.array([0.5, 1.0]), "1,2"):
        assert_same_tree(wavg.average(given, weights), right)


def test_the_default_is_the_equal_average():
    assert_same_tree(wavg.average([np.float32(1), np.float32(2)]), np.array(1.5, np.float32))


def test_models_may_come_from_a_generator():
    assert_same_tree(wavg.average([float(i)] for i in range(3)), [np.array(1.0)])


def test_python_numbers_and_lists_are_leaves_and_trees():
    assert_same_tree(wavg.average([[1.0, True], [2.0, False]]), [np.array(1.5), np.array(False)])


def test_the_result_has_the_structure_of_the_first_tree():
    first = {"b": [np.float32(1), None], "a": Pair(np.float32(2), ())}
    other = {"a": Pair(np.float32(4), ()), "b": [np.float32(3), None]}
    right = {
        "b": [np.array(2, np.float32), None],
        "a": Pair(np.array(3, np.float32), ()),
    }
    assert_same_tree(wavg.average([first, other]), right)


@pytest.mark.parametrize("tree", [{}, [], None, {"a": [None, ()]}])
def test_trees_without_leaves_average_to_themselves(tree):
    assert_same_tree(wavg.average([tree, tree]), tree)


def test_a_model_larger_than_a_block_is_averaged_whole():
    size = 5 * (1 << 20) // 4 + 3
    given = [np.arange(size, dtype=np.float32), np.full(size, 2, np.float32)]
    assert_same_tree(wavg.average(given), (given[0] + given[1]) / np.float32(2))


# Weights


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [0.1, 0.2, -0.1, -0.2], "1,-1"])
def test_weights_that_sum_to_zero_are_refused(weights):
    count = len(weights.split(",")) if isinstance(weights, str) else len(weights)
    with pytest.raises(WeightError, match="sum to zero"):
        wavg.average([np.ones(2)] * count, weights)


def test_weights_that_sum_to_zero_only_in_float_arithmetic_are_used():
    weights = [0.1, 0.2, -0.30000000000000004]  # exact sum: 1.4e-17 off zero
    given = [np.float64([1]), np.float64([2]), np.float64([3])]
    assert_same_tree(wavg.average(given, weights), oracle(weights, given))


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], "1,2,3"])
def test_one_weight_a_tree_is_needed(weights):
    with pytest.raises(WeightError, match="weights were given for 2 checkpoints"):
        wavg.average([np.ones(2), np.ones(2)], weights)


@pytest.mark.parametrize("weights", ["cubic", [np.nan, 1], [[1, 2]], "exponential:alpha=0"])
def test_weights_without_sense_are_refused(weights):
    with pytest.raises(WeightError):
        wavg.average([np.ones(2), np.ones(2)], weights)


def test_no_tree_is_an_error():
    with pytest.raises(WeightError, match="nothing to average"):
        wavg.average([])


def test_steps_reach_the_schedule():
    seen = []
    schedule = wavg.Schedule("by step", lambda steps: seen.append(steps.tolist()) or steps)
    given = [np.float32(1), np.float32(5)]
    assert wavg.average(given, schedule, steps=[10, 30]) == 4
    assert wavg.average(given, schedule) == np.float32(11 / 3)
    assert seen == [[10, 30], [1, 2]]


@pytest.mark.parametrize("steps", [[1], [1, 2, 3]])
def test_steps_for_another_number_of_trees_are_refused(steps):
    with pytest.raises(WeightError, match="steps"):
        wavg.average([np.ones(2), np.ones(2)], steps=steps)


# Integers


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
)
def test_integers_are_the_newest_whatever_the_weights(dtype):
    given = [{"n": np.array([0, 1, 0], dtype)}, {"n": np.array([1, 1, 0], dtype)}]
    assert_same_tree(wavg.average(given, [5, 1]), {"n": np.array([1, 1, 0], dtype)})


def test_large_integers_are_kept_to_the_last_bit():
    newest = np.array([2**63 - 1, 2**53 + 1])
    assert_same_tree(wavg.average([np.zeros_like(newest), newest]), newest)


def test_differing_integers_are_an_error_on_request():
    given = [{"w": np.ones(2), "steps": {"n": np.int64(i)}} for i in (1, 2)]
    with pytest.raises(StructureMismatchError, match="steps/n is int64 and differs") as caught:
        wavg.average(given, integers="error")
    assert caught.value.tensor == "steps/n"


def test_equal_integers_pass_either_policy():
    given = [{"n": np.int32([3, 4])}, {"n": np.int32([3, 4])}]
    for integers in ("reference", "error"):
        assert_same_tree(wavg.average(given, integers=integers), given[0])


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="integers must be 'reference' or 'error', not 'mean'"):
        wavg.average([np.ones(1)], integers="mean")


# What is refused


@pytest.mark.parametrize("dtype", AVERAGED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_named_by_tree_leaf_and_index(dtype, value):
    given = [{"layers": [{"kernel": np.ones((3, 4), lookup(dtype).numpy)}]} for _ in range(3)]
    given[1]["layers"][0]["kernel"][2, 1] = value
    message = rf"tree 1 holds {value} at layers\[0\]/kernel\[2, 1\]"
    with pytest.raises(NonFiniteError, match=message) as caught:
        wavg.average(given)
    assert caught.value.tensor == "layers[0]/kernel"
    assert caught.value.index == (2, 1)


def test_a_nonfinite_imaginary_part_has_the_index_of_its_number():
    given = np.ones(5, np.complex64)
    given[3] = complex(0, np.inf)
    with pytest.raises(NonFiniteError) as caught:
        wavg.average([np.ones(5, np.complex64), given])
    assert caught.value.index == (3,)


def test_the_index_counts_from_the_start_of_the_leaf_not_of_a_block():
    given = np.zeros((4, 1 << 19), np.float32)
    given[3, 5] = np.nan
    with pytest.raises(NonFiniteError) as caught:
        wavg.average([given])
    assert caught.value.index == (3, 5)


def test_the_index_of_an_array_that_is_not_contiguous_is_its_own():
    given = np.ones((3, 4))
    given[2, 1] = np.nan
    with pytest.raises(NonFiniteError) as caught:
        wavg.average([given.T])
    assert caught.value.index == (1, 2)


def test_nonfinite_values_pass_when_allowed():
    given = [np.float32([np.inf, 1, np.nan]), np.float32([1, 2, 3])]
    np.testing.assert_array_equal(
        wavg.average(given, allow_nonfinite=True), np.float32([np.inf, 1.5, np.nan])
    )


def test_a_result_outside_the_range_of_its_dtype_is_an_error():
    given = [{"w": np.float16([1, 60000])}, {"w": np.float16([1, -60000])}]
    with pytest.raises(NonFiniteError, match=r"average at w\[1\] does not fit float16") as caught:
        wavg.average(given, [3, -2])
    assert (caught.value.tensor, caught.value.index) == ("w", (1,))


def test_every_differing_leaf_of_every_tree_is_listed():
    given = [
        {"layers": [np.ones(2), np.ones((2, 3))], "scale": np.float32(1)},
        {"layers": [np.ones(3), np.ones((2, 3))], "scale": np.float64(1)},
        {"layers": [np.ones(2), np.ones((3, 2))], "scale": np.int32(1)},
    ]
    with pytest.raises(StructureMismatchError) as caught:
        wavg.average(given)
    assert caught.value.differences == [
        "layers[0]: float64[2] in tree 0, float64[3] in tree 1",
        "layers[1]: float64[2, 3] in tree 0, float64[3, 2] in tree 2",
        "scale: float32[] in tree 0, float64[] in tree 1",
        "scale: float32[] in tree 0, int32[] in tree 2",
    ]
    assert all(difference in str(caught.value) for difference in caught.value.differences)


def test_shapes_that_would_broadcast_are_not_broadcast():
    with pytest.raises(StructureMismatchError, match=r"float64\[1\].*float64\[3\]"):
        wavg.average([np.ones(1), np.ones(3)])


def test_trees_of_another_structure_are_refused_with_every_difference():
    with pytest.raises(StructureMismatchError) as caught:
        wavg.average([{"a": 1.0, "b": [2.0]}, {"a": [1.0], "c": 2.0}])
    assert len(caught.value.differences) == 3


@pytest.mark.parametrize("leaf", ["text", b"bytes", object(), np.longdouble(1), np.array([None])])
def test_a_leaf_that_is_no_array_of_numbers_is_named(leaf):
    with pytest.raises(WavgError, match=r"leaf a/b is .*, not an array of numbers") as caught:
        wavg.average([{"a": {"b": leaf}}, {"a": {"b": leaf}}])
    assert caught.value.tensor == "a/b"


def test_leaves_whose_paths_read_alike_are_both_averaged():
    given = [{"a/b": 1.0, "a": {"b": 2.0}}, {"a/b": 3.0, "a": {"b": 6.0}}]
    right = {"a/b": np.array(2.0), "a": {"b": np.array(4.0)}}
    assert_same_tree(wavg.average(given), right)


# Inputs stay as they are


def frozen(array):
    array.setflags(write=False)
    return array


@settings(deadline=None, max_examples=25)
@given(data=st.data(), count=st.integers(1, 3))
def test_inputs_are_neither_changed_nor_shared(data, count):
    given = data.draw(models(count, st.one_of(SPECS, st.just(Spec("int16", (2, 2))))))
    given = [fill(model, frozen) for model in given]
    before = [fill(model, np.copy) for model in given]
    result = wavg.average(given)
    for model, copy in zip(given, before, strict=True):
        assert_same_tree(model, copy)
    for leaf in walk(result):
        assert leaf.flags.writeable
        assert not any(np.shares_memory(leaf, array) for m in given for array in walk(m))


@pytest.mark.parametrize("dtype", [*strategies.FLOATS, "int32"])
@pytest.mark.parametrize(
    "view",
    [
        np.transpose,
        np.asfortranarray,
        lambda array: array[::2, 1::3],
        lambda array: array[::-1, ::-1],
        lambda array: np.broadcast_to(array[:1], array.shape),
        lambda array: array[:, 2:3],
    ],
    ids=["transposed", "fortran", "strided", "reversed", "broadcast", "column"],
)
def test_arrays_that_are_not_contiguous_average_like_their_copies(dtype, view):
    rng = np.random.default_rng(0)
    given = [(100 * rng.standard_normal((6, 8))).astype(lookup(dtype).numpy) for _ in range(3)]
    copies = [np.array(view(array), order="C") for array in given]
    ours = wavg.average([view(array) for array in given], "linear")
    assert_same_tree(ours, wavg.average(copies, "linear"))
    assert ours.flags.c_contiguous


@pytest.mark.parametrize("part", [slice(None, None, -1), slice(1, None, 3)])
def test_complex_arrays_that_are_not_contiguous_average_like_their_copies(part):
    given = [np.arange(7) * np.complex64(1 + 2j), np.arange(7) * np.complex64(3 - 1j)]
    copies = [array[part].copy() for array in given]
    assert_same_tree(wavg.average([array[part] for array in given]), wavg.average(copies))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "complex64"])
def test_the_order_of_bytes_does_not_change_the_numbers(dtype):
    given = [np.array([1, 2], dtype), np.array([3, 4], dtype)]
    foreign = [array.astype(array.dtype.newbyteorder()) for array in given]
    np.testing.assert_array_equal(wavg.average(foreign), [2, 3])


# Properties


@settings(deadline=None, max_examples=40)
@given(data=st.data(), count=st.integers(1, 6), spread=st.sampled_from([None, 4]))
def test_the_average_lies_between_its_inputs(data, count, spread):
    spec = Spec(data.draw(st.sampled_from(strategies.FLOATS)), (40,))
    given = [data.draw(arrays(spec, spread)) for _ in range(count)]
    ours = wavg.average(given, data.draw(strategies.weights(count, negative=False)))
    stacked = np.stack(given).astype(np.float64)
    wide = ours.astype(np.float64)
    assert (stacked.min(axis=0) <= wide).all()
    assert (wide <= stacked.max(axis=0)).all()


@settings(deadline=None, max_examples=40)
@given(data=st.data(), count=st.integers(1, 6))
def test_equal_models_come_back_byte_for_byte(data, count):
    [model] = data.draw(models(1))
    weights = data.draw(strategies.weights(count, negative=False))
    ours = wavg.average([model] * count, weights)
    assert_same_tree(ours, model)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), count=st.integers(1, 5), power=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_average_exactly(data, count, power):
    dtype = data.draw(st.sampled_from(["float64", "float32", "bfloat16", "complex64"]))
    given = [data.draw(arrays(Spec(dtype, (30,)), spread=8)) for _ in range(count)]
    # Not the extreme ones: among subnormal numbers a power of two rounds.
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=count, max_size=count))

    def scaled(array):  # by components: a complex product would touch the sign of zeros
        parts = components(array)
        return (parts * np.array(2.0**power, parts.dtype)).view(array.dtype)

    ours = wavg.average([scaled(array) for array in given], weights)
    assert_same_tree(ours, scaled(wavg.average(given, weights)))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(-8, 8), st.integers(-1000, 1000))
def test_an_affine_map_of_the_models_is_the_map_of_the_average(seed, power, shift):
    rng = np.random.default_rng(seed)
    given = rng.integers(-1000, 1000, (3, 20)).astype(np.float64)
    weights = [1, 2, 5]  # a power of two in sum: everything here is exact
    mapped = wavg.average(list(given * 2.0**power + shift), weights)
    np.testing.assert_array_equal(mapped, wavg.average(list(given), weights) * 2.0**power + shift)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), count=st.integers(2, 6))
def test_the_order_of_models_with_their_weights_does_not_matter(data, count):
    given = data.draw(models(count))
    weights = data.draw(strategies.weights(count))
    order = data.draw(st.permutations(range(count)))
    permuted = wavg.average(
        [given[i] for i in order], [weights[i] for i in order], allow_nonfinite=True
    )
    assert_same_tree(permuted, wavg.average(given, weights, allow_nonfinite=True))


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_common_factor_of_the_weights_does_not_matter(data):
    given = data.draw(models(3))
    ours = wavg.average(given, [1, 2, 3])
    for factor in (-1.0, 2.0**-1000, 2.0**1000):
        assert_same_tree(wavg.average(given, [factor, 2 * factor, 3 * factor]), ours)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_model_of_weight_zero_counts_for_nothing(data):
    given = data.draw(models(4))
    assert_same_tree(wavg.average(given, [1, 0, 2, 0]), wavg.average([given[0], given[2]], [1, 2]))


# JAX


def test_jax_arrays_are_leaves():
    jnp = pytest.importorskip("jax.numpy")
    given = [
        {"w": jnp.asarray([1, 2.5], jnp.bfloat16), "v": [jnp.float32(3)], "n": jnp.int32(i)}
        for i in (1, 2)
    ]
    right = {
        "w": np.array([1, 2.5], BFLOAT16),
        "v": [np.array(3, np.float32)],
        "n": np.array(2, np.int32),
    }
    assert_same_tree(wavg.average(given), right)


def test_jax_flattens_leaves_that_average_returns():
    jax = pytest.importorskip("jax")
    tree = {"w": jax.numpy.ones((2, 3)), "b": [jax.numpy.zeros(3)]}
    averaged = wavg.average([tree, tree])
    assert jax.tree.structure(averaged) == jax.tree.structure(tree)


def test_options_are_keyword_only():
    kinds = [p.kind for p in inspect.signature(wavg.average).parameters.values()]
    assert kinds[2:] == [inspect.Parameter.KEYWORD_ONLY] * 3
