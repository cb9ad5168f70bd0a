"""The weighted sum against exact fractions, and the invariants that follow from its definition."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
import strategies
from wavg import compiled, kernel, tiles
from wavg.combination import Combination
from wavg.dtypes import lookup
from wavg.errors import NonFiniteError, WavgError, WeightError
from wavg.kernel import combine
from wavg.rounding import round_to


@pytest.fixture(autouse=True, scope="module", params=["compiled", "numpy"])
def step(request):
    """Every test here runs with step 1 compiled and in NumPy."""
    if request.param == "compiled":
        if not compiled.COMPILED:
            pytest.skip("wavg was installed without a C compiler")
        yield
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "COMPILED", False)
            yield


def mean(weights, block, dtype=None, **options):
    out = np.empty((1, block.shape[1]), lookup(dtype or block.dtype.name).numpy)
    combine(Combination.of(weights), block, out, **options)
    return out[0]


def assert_exact(weights, block, dtype=None):
    ours = mean(weights, block, dtype, allow_nonfinite=True)
    with np.errstate(over="ignore"):
        right = reference.average(weights, block, dtype)
    differing = [
        (block[:, i].tolist(), ours[i], right[i])
        for i in range(len(ours))
        if ours[i : i + 1].tobytes() != right[i : i + 1].tobytes()
    ]
    assert not differing


@pytest.mark.parametrize("dtype", strategies.FLOATS)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), inputs=st.integers(1, 12))
def test_every_element_is_the_correctly_rounded_mean(dtype, data, inputs):
    spread = data.draw(st.sampled_from([None, 2, 12, 40, 100 if dtype != "float16" else 20]))
    block = data.draw(strategies.bit_patterns(dtype, inputs * 64, spread)).reshape(inputs, 64)
    assert_exact(data.draw(strategies.weights(inputs)), block)


@pytest.mark.parametrize("target", strategies.FLOATS)
@pytest.mark.parametrize("source", strategies.FLOATS)
def test_rounds_once_into_another_dtype(source, target):
    rng = np.random.default_rng(5)
    block = rng.standard_normal((7, 200)).astype(lookup(source).numpy)
    assert_exact([1, 2, 3, 4, 5, 6, 7], block, target)
    assert_exact(np.exp(np.arange(7) / 2.0), block, target)


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@settings(deadline=None, max_examples=25)
@given(data=st.data(), inputs=st.integers(1, 9))
def test_any_bits_round_once_into_another_dtype(source, target, data, inputs):
    block = data.draw(strategies.bit_patterns(source, inputs * 32, None)).reshape(inputs, 32)
    assert_exact(data.draw(strategies.weights(inputs)), block, target)


def test_a_value_that_is_not_finite_in_a_late_tile_leaves_the_others_exact():
    rng = np.random.default_rng(1)
    block = rng.standard_normal((5, 5000)).astype(np.float32)
    usual = mean([1, 2, 3, 4, 5], block)
    block[3, 4999] = np.inf
    result = mean([1, 2, 3, 4, 5], block, allow_nonfinite=True)
    assert result[:-1].tobytes() == usual[:-1].tobytes()
    assert result[-1] == np.inf


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.3, 0.3, 0.1], [1, -2, 4]])
def test_columns_of_zeros_keep_their_signs(weights):
    block = np.zeros((3, 8), np.float32)
    block[:, [1, 2, 3]] *= -1
    block[0, 2] = block[1, 3] = 0.0
    assert_exact(weights, block)


@pytest.mark.parametrize("dtype", strategies.FLOATS)
@pytest.mark.parametrize("inputs", [2, 4, 10])
def test_exact_ties_go_to_even(dtype, inputs):
    entry = lookup(dtype)
    step = 2.0 ** (1 - entry.precision)
    base = 1 + step * np.arange(64)
    block = np.tile(base, (inputs, 1))
    block[: inputs // 2] += step  # half of the inputs one unit higher: the mean is a midpoint
    block = block.astype(entry.numpy)
    assert_exact([1.0] * inputs, block)


def test_wide_exponent_spans_where_a_float64_sum_goes_wrong():
    rng = np.random.default_rng(1)
    values = np.ldexp(
        rng.integers(128, 256, (10, 900)).astype(float), rng.integers(-120, 100, (10, 900))
    )
    block = (values * rng.choice([-1, 1], values.shape)).astype(lookup("bfloat16").numpy)
    assert_exact(np.arange(1, 11), block)
    # Two large terms cancel and leave what a float64 sum has already lost.
    cancel = np.array([[2.0**100], [1.0], [-(2.0**100)]]).astype(lookup("bfloat16").numpy)
    assert mean([1, 1, 1], cancel)[0] == round_to(np.array([1 / 3]), lookup("bfloat16"))[0]


@pytest.mark.parametrize("dtype", strategies.FLOATS)
@settings(deadline=None, max_examples=25)
@given(data=st.data(), inputs=st.integers(1, 9))
def test_identical_models_come_back_byte_for_byte(dtype, data, inputs):
    row = data.draw(strategies.bit_patterns(dtype, 200))
    block = np.tile(row, (inputs, 1))
    ours = mean(data.draw(strategies.weights(inputs, negative=False)), block)
    assert ours.tobytes() == row.tobytes()


@settings(deadline=None, max_examples=25)
@given(data=st.data(), dtype=st.sampled_from(strategies.FLOATS))
def test_order_of_inputs_does_not_matter(data, dtype):
    block = data.draw(strategies.bit_patterns(dtype, 6 * 50, 30)).reshape(6, 50)
    weights = np.array(data.draw(strategies.weights(6)))
    order = data.draw(st.permutations(range(6)))
    assert mean(weights, block).tobytes() == mean(weights[order], block[order]).tobytes()


@pytest.mark.parametrize("dtype", strategies.FLOATS)
def test_bytes_do_not_depend_on_where_a_block_is_cut(dtype):
    rng = np.random.default_rng(3)
    block = rng.standard_normal((5, 700)).astype(lookup(dtype).numpy)
    weights = np.exp(np.arange(5) / 2)
    whole = mean(weights, block)
    for cut in (1, 7, 333):
        parts = [mean(weights, block[:, i : i + cut]) for i in range(0, 700, cut)]
        assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_a_scaled_list_of_weights_gives_the_same_bytes():
    block = np.random.default_rng(0).standard_normal((3, 999)).astype(np.float32)
    assert mean([1, 2, 3], block).tobytes() == mean([-4, -8, -12], block).tobytes()


def test_many_rows_of_weights_equal_one_at_a_time():
    rng = np.random.default_rng(0)
    block = rng.standard_normal((6, 3000)).astype(np.float32)
    weights = np.stack([np.ones(6), np.arange(1.0, 7), np.exp(np.arange(6) / 2), np.eye(6)[5]])
    outs = np.empty((4, 3000), np.float32)
    combine(Combination.of(weights), block, outs)
    for row, out in zip(weights, outs, strict=True):
        assert out.tobytes() == mean(row, block).tobytes()


def test_zero_weight_rows_do_not_decide_the_sign_of_zero():
    block = np.array([[0.0], [-0.0], [-0.0]], np.float32)
    assert np.signbit(mean([0, 1, 1], block)[0])
    assert not np.signbit(mean([1, 1, 1], block)[0])


@pytest.mark.parametrize("dtype", strategies.FLOATS)
def test_nonfinite_inputs_are_named(dtype):
    block = np.ones((3, 40000), lookup(dtype).numpy)
    block[1, 39999] = np.nan
    with pytest.raises(NonFiniteError, match="input 1 holds nan at index 39999") as caught:
        mean([1, 1, 1], block)
    assert (caught.value.input, caught.value.index) == (1, 39999)


@pytest.mark.parametrize("dtype", strategies.FLOATS)
def test_nonfinite_values_pass_by_ieee_rules_when_allowed(dtype):
    inf, nan = np.inf, np.nan
    block = np.array([[inf, inf, nan, 1, inf], [1, -inf, 1, 2, 5]]).astype(lookup(dtype).numpy)
    ours = mean([1, 1], block, allow_nonfinite=True).astype(float)
    np.testing.assert_array_equal(ours, [inf, nan, nan, 1.5, inf])
    unused = mean([0, 1], block, allow_nonfinite=True).astype(float)
    np.testing.assert_array_equal(unused, [1, -inf, 1, 2, 5])


def test_a_result_outside_the_output_range_is_an_error():
    block = np.array([[60000.0], [-60000.0]], np.float16)
    with pytest.raises(NonFiniteError, match="does not fit float16"):
        mean([3, -2], block)
    with pytest.raises(NonFiniteError, match="does not fit float16"):
        mean([1], np.array([[1e6]], np.float32), "float16")


@pytest.mark.parametrize(
    "weights", [[], [[]], [np.nan], [np.inf, 1], [1, -1], [0, 0], [0.1, 0.2, -0.1, -0.2]]
)
def test_weights_without_an_average_are_refused(weights):
    with pytest.raises(WeightError):
        Combination.of(weights)


def test_integers_are_refused():
    with pytest.raises(WavgError, match="int32 cannot be averaged"):
        mean([1], np.ones((1, 3), np.int32), "float32")


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_round_to_is_correct_at_and_around_every_tie(name):
    entry = lookup(name)
    bits = (
        np.arange(2**16, dtype=np.uint16)
        if entry.bits == 16
        else (np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32))
    )
    with np.errstate(invalid="ignore"):
        values = bits.view(entry.numpy).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    middles = (values[1:] + values[:-1]) / 2
    for points in (values, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)):
        points = points[::57]
        ours = round_to(points, entry)
        right = [reference.round_fraction(Fraction(p), entry) for p in points.tolist()]
        np.testing.assert_array_equal(ours.astype(float), right)


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
)
def test_float8_averages_are_the_nearest_values(name):
    entry = lookup(name)
    grid = np.arange(256, dtype=np.uint8).view(entry.numpy).astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)])
    rng = np.random.default_rng(0)
    block = rng.choice(grid, (3, 2000)).astype(entry.numpy)
    ours = mean([1, 2, 4], block).astype(float)
    exact = (np.array([1.0, 2, 4]) @ block.astype(float)) / 7
    distance = np.abs(grid[None, :] - exact[:, None]).min(axis=1)
    np.testing.assert_array_equal(np.abs(ours - exact), distance)


def test_the_oracle_itself_sees_a_planted_error():
    block = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    right = reference.average([1, 2, 3], block)
    planted = right.copy()
    planted[7] = np.nextafter(planted[7], np.float32(np.inf))
    assert not reference.same_bytes(planted, right)
    assert reference.round_fraction(Fraction(1) + Fraction(1, 2**24), lookup("float32")) == 1.0
    assert (
        reference.round_fraction(Fraction(1) + Fraction(3, 2**24), lookup("float32")) == 1 + 2**-22
    )


def test_every_finite_float16_widens_exactly():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    out = np.empty(2**16, np.float32)
    tiles._widen_half(halves, out)
    finite = np.isfinite(halves)
    expected = np.ldexp(halves[finite].astype(np.float64), -112)
    assert out[finite].astype(np.float64).tobytes() == expected.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", strategies.FLOATS)
@pytest.mark.parametrize("weights", ["ties", "linear", "exponential"])
def test_whole_tiles_agree_with_the_oracle_on_a_sample(dtype, weights):
    """Blocks wider than a tile, like those of a real run, by every step of the ladder."""
    rng = np.random.default_rng(11)
    base = rng.standard_normal(150_000)
    block = (base + 0.1 * rng.standard_normal((4, 150_000))).astype(lookup(dtype).numpy)
    block[:, rng.integers(0, 150_000, 20_000)] = 0.0
    row = {"ties": np.ones(4), "linear": np.arange(1.0, 5), "exponential": np.exp(np.arange(4) / 2)}
    ours = mean(row[weights], block)
    sample = np.unique(np.concatenate([rng.integers(0, 150_000, 3000), np.arange(65530, 65542)]))
    right = reference.average(row[weights], block[:, sample])
    assert reference.same_bytes(ours[sample], right)


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("source", ["float64", "float32"])
@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [0.3, 0.2, 0.4, 0.1]])
def test_just_beside_a_midpoint_of_a_narrower_format(source, target, weights):
    half = 2.0 ** -lookup(target).precision  # half a unit at 1
    block = np.full((4, 3), 1 + half)
    block[0, 0] += 2.0**-23
    block[0, 1] -= 2.0**-23
    ours = mean(weights, block.astype(source), target).astype(float)
    assert ours[:2].tolist() == [1 + 2 * half, 1.0]


def test_float8_ends_of_the_range_do_not_settle_each_other():
    block = np.array([[1e10, 1], [-1e10, 1]]).astype(lookup("bfloat16").numpy)
    assert mean([1, 1], block, "float8_e4m3fnuz").astype(float).tolist() == [0, 1]


def test_huge_numbers_and_weights_that_nearly_cancel_are_exact():
    rng = np.random.default_rng(0)
    block = rng.standard_normal((3, 400)).astype(lookup("bfloat16").numpy)
    block[:, 7] = np.finfo(np.float32).max / 2
    assert_exact([1, 2, 3], block)
    half = rng.standard_normal((3, 100)).astype(np.float16)
    assert_exact([1.0, -1.0, 2.0**-1000], half)


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("with_hopeless", [False, True])
def test_rows_read_from_files_give_the_bytes_of_rows_in_memory(
    monkeypatch, tmp_path, source, target, with_hopeless
):
    """In portions that do not divide the columns; with zeros, and columns that are left over."""
    hopeless = [1, -1, 1e-300, 0, 0]
    weights = [[1, 1, 1, 1, 1], [0.1, 0.1, 0.3, 0.3, 0], [2, 0, 0, 0, 1]]
    if with_hopeless:
        weights.append(hopeless)
    if not compiled.COMPILED:
        pytest.skip("it is the compiled step that reads")
    monkeypatch.setattr(compiled, "_SHORTEST", 1)
    monkeypatch.setattr(compiled, "_PORTION", 5 * 1500 * 4)
    rng = np.random.default_rng(1)
    block = rng.standard_normal((5, 4099)).astype(lookup(source).numpy)
    block[:, 2000:2100] = 0
    block[:, 3333] = block[0, 3333]
    block[0, 2000:2050] = -0.0
    block[1, 2025:2075] = -0.0
    # Next to a midpoint of the target for the row 0.1, 0.1, 0.3, 0.3, where the source can say it.
    step = 2.0 ** (1 - lookup(target).precision)
    planted = [3, 1499, 1500, 4090, 4098]
    block[:, planted] = np.array([[1], [1 + step], [1], [1 + step], [1]])
    formats = lookup(source), lookup(target)
    combiner = kernel.Combiner(Combination.of(weights), *formats, allow_nonfinite=True)
    expected = np.empty((len(weights), 4099), lookup(target).numpy)
    found = np.empty_like(expected)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "COMPILED", False)
        combine(Combination.of(weights), block, expected, allow_nonfinite=True)
    with open(tmp_path / "rows", "w+b") as file:
        file.write(b"head" + block.tobytes())
        file.flush()
        offsets = 4 + np.arange(5, dtype=np.int64) * block[0].nbytes
        descriptors = np.full(5, file.fileno(), np.intc)
        counts = []
        settle = combiner._leftovers.settle

        def counting(portion, outs):
            counts.append(int(portion.flags[1].sum()))
            settle(portion, outs)

        monkeypatch.setattr(combiner._leftovers, "settle", counting)
        combiner.from_files(descriptors, offsets, found)
        assert found.tobytes() == expected.tobytes()
        if lookup(source).precision >= lookup(target).precision and not with_hopeless:
            left = [n for n in counts if n]
            assert len(left) >= 2
            assert 5 <= sum(left) <= 4099 // 8  # few: picked one by one
        with pytest.raises(EOFError) as caught:
            combiner.from_files(descriptors, offsets + block[0].nbytes, found)
        assert caught.value.args == (4,)
        with pytest.raises(OSError, match="Bad file descriptor"):
            combiner.from_files(descriptors * 0 + 9999, offsets, found)
        block[3, 3000] = np.inf
        file.seek(4)
        file.write(block.tobytes())
        file.flush()
        strict = kernel.Combiner(Combination.of(weights[0]), *formats)
        with pytest.raises(NonFiniteError) as refused:
            strict.from_files(descriptors, offsets, found[:1])
        assert (refused.value.input, refused.value.index) == (3, 3000)
