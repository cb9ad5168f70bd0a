"""Sizes of what is done at once, and the memory that it takes."""

from __future__ import annotations

import importlib.util
import sys
import tracemalloc

import numpy as np
import pytest

import wavg
from wavg import compiled, kernel, leftovers, tiles
from wavg.combination import Combination
from wavg.dtypes import lookup

pytestmark = pytest.mark.usefixtures("no_alarms")  # as the kernel calls its parts
F64, F32, F16, BF16 = map(lookup, ("float64", "float32", "float16", "bfloat16"))
E4M3 = lookup("float8_e4m3fn")


def test_spans_and_tiles_have_the_sizes_that_were_measured():
    """They decide on time and memory, not on results."""
    assert tiles.span(10, 1, F32) == 4 * 65536
    assert tiles.span(1, 1, F32) == 4 * 65536  # never wider
    assert tiles.span(20, 1, F32) == 4 * 32768
    assert tiles.span(10, 2, F32) == 2 * (655360 // 12)
    assert tiles.span(10, 3, BF16) == 655360 // 14
    assert tiles.span(10, 5, F32) == 655360 // 18
    assert tiles.span(10**6, 1, F32) == 4 * 256  # never narrower
    assert tiles.span(10, 1, F64) == leftovers.at_once(10) == 8192
    assert tiles.span(10_000, 500, F64) == 64
    assert compiled.width(10, F32) == 65536 // 4
    assert compiled.width(10, BF16) == 65536 // 2
    assert compiled.width(1000, F32) == 8192 // 4
    assert compiled.width(81, F32) == 8192 // 4


@pytest.mark.parametrize("with_compiled", [True, False])
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("target", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(10, 1), (3, 4)])
def test_what_a_combiner_allocates_is_bounded(monkeypatch, with_compiled, source, target, shape):
    if not with_compiled:
        monkeypatch.setattr(compiled, "COMPILED", False)
    monkeypatch.setattr(leftovers, "_COLUMNS", 256)
    inputs, outputs = shape
    source, target = lookup(source), lookup(target)
    rng = np.random.default_rng(0)
    block = np.ones((inputs, 12_000), source.numpy)
    block[:, ::3] = rng.standard_normal((inputs, len(block[0, ::3]))).astype(source.numpy)
    outs = np.empty((outputs, 12_000), target.numpy)
    combination = Combination.of(rng.uniform(0.5, 1, (outputs, inputs)))
    tracemalloc.start()
    try:
        kernel.Combiner(combination, source, target)(block, outs)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    bound = kernel.scratch_bytes(inputs, outputs, source, target, 6_000)
    assert taken <= bound


def test_scratch_memory_is_what_the_parts_take():
    """In the words of the code: any change of a bound has to be meant."""
    assert leftovers.scratch_bytes(10, F32, 100) == 100 * (10 * 36 + 200) + 100
    assert leftovers.scratch_bytes(10, BF16, 80_000) == 8192 * (10 * 34 + 200) + 80_000
    assert isinstance(leftovers.scratch_bytes(10, BF16, 80_000), int)
    assert compiled.scratch_bytes(10, 3, F32, 1000, reads=False) == 3 * (1000 + (2 << 13))
    assert (
        compiled.scratch_bytes(10, 3, F32, 1000, reads=True)
        == 3 * (1000 + (2 << 13)) + 10 * 1000 * 4
    )
    tile = 655360 // 10  # columns that are widened at once
    spans = 4 * tile
    assert tiles.scratch_bytes(10, 1, F32, F16, spans) == tile * 10 * 8 + spans * (16 + 4 + 1)
    assert tiles.scratch_bytes(10, 1, F16, F32, 500) == 500 * 10 * 12 + 500 * (16 + 8 + 1)
    assert tiles.scratch_bytes(10, 1, BF16, BF16, 500) == 500 * 10 * 4 + 500 * (8 + 4 + 1)
    assert tiles.scratch_bytes(10, 1, BF16, F16, 500) == 500 * 10 * 8 + 500 * (16 + 4 + 1)
    assert tiles.scratch_bytes(10, 1, F32, BF16, 500) == 500 * 10 * 8 + 500 * (16 + 4 + 1)


@pytest.mark.parametrize(("source", "target"), [(F16, F32), (BF16, E4M3), (F32, BF16), (E4M3, F16)])
def test_scratch_memory_of_the_step_in_numpy_is_kept_and_as_large_as_told(source, target):
    combination = Combination.of([[1, 2, 3], [0.1, 0.25, 0.3]])
    ours = tiles.Tiles(combination, source, target)
    before = set(vars(ours))
    for columns in (100, 700, 700):
        block = np.ones((3, columns), source.numpy)
        list(ours.portions(block, np.empty((2, columns), target.numpy)))
        arrays = {name: vars(ours)[name] for name in set(vars(ours)) - before}
        taken = sum(array.nbytes for array in arrays.values())
        rounding_takes = 2 * columns * target.itemsize
        assert taken + rounding_takes == tiles.scratch_bytes(3, 2, source, target, columns)
    list(ours.portions(block, np.empty((2, columns), target.numpy)))
    assert all(vars(ours)[name] is array for name, array in arrays.items())


def test_scratch_memory_of_a_wide_span_is_that_of_one_tile(monkeypatch):
    monkeypatch.setattr(tiles, "_WIDEST_TILE", 256)
    ours = tiles.Tiles(Combination.of([1, 2, 3]), F16, F32)
    before = set(vars(ours))
    ours._reserve(1000)
    taken = sum(vars(ours)[name].nbytes for name in set(vars(ours)) - before)
    assert taken + 1000 * 4 == tiles.scratch_bytes(3, 1, F16, F32, 1000) < 1000 * 3 * 12
    ours._reserve(300)
    assert ours._wide.shape == ours._half.shape == (3, 256)


def test_scratch_memory_of_the_compiled_step_is_kept_and_as_large_as_told(tmp_path):
    if not compiled.COMPILED:
        pytest.skip("wavg was installed without a C compiler")
    combination = Combination.of([[1, 2, 3], [0.1, 0.25, 0.3]])
    ours = compiled.Compiled(combination, F16, F32)
    outs = np.empty((2, 100), np.float32)
    list(ours.in_memory(np.ones((3, 100), np.float16), outs))
    left = ours._left
    assert (left.shape, left.dtype) == ((2, 100), bool)
    list(ours.in_memory(np.ones((3, 100), np.float16), outs))
    assert ours._left is left
    with open(tmp_path / "rows", "w+b") as file:
        file.write(np.ones((3, 100), np.float16).tobytes())
        file.flush()
        places = np.full(3, file.fileno(), np.intc), np.arange(3, dtype=np.int64) * 200
        list(ours.in_files(*places, outs))
        block = ours._block
        list(ours.in_files(*places, outs))
    assert ours._block is block
    assert block.dtype == np.float16
    width = compiled.width(3, F16)
    flags = ours._left.nbytes
    assert flags + block.nbytes + 2 * (2 << 13) == compiled.scratch_bytes(
        3, 2, F16, width, reads=True
    )


def test_scratch_memory_of_a_combiner_is_that_of_its_first_step_and_the_others(monkeypatch):
    rest = 1 << 18
    expected = (
        tiles.scratch_bytes(10, 2, F64, F32, 2000) + leftovers.scratch_bytes(10, F64, 2000) + rest
    )
    assert kernel.scratch_bytes(10, 2, F64, F32, 1000) == expected  # a complex number is two
    span = tiles.span(10, 2, F32)
    assert kernel.scratch_bytes(10, 2, F64, F32, 10**7) == (
        tiles.scratch_bytes(10, 2, F64, F32, span) + leftovers.scratch_bytes(10, F64, span) + rest
    )
    if not compiled.COMPILED:
        pytest.skip("wavg was installed without a C compiler")
    assert kernel.scratch_bytes(10, 2, F32, F32, 1000) == (
        compiled.scratch_bytes(10, 2, F32, 2000, reads=False)
        + leftovers.scratch_bytes(10, F32, 2000)
        + rest
    )
    width = compiled.width(10, F32)
    assert kernel.scratch_bytes(10, 2, F32, F32, 1000, from_files=True) == (
        compiled.scratch_bytes(10, 2, F32, width, reads=True)
        + leftovers.scratch_bytes(10, F32, width)
        + rest
    )


def test_what_is_read_from_files_is_what_is_compiled(monkeypatch):
    names = ["float32", "bfloat16", "float16", "float64", "float8_e5m2"]
    for there in (True, False):
        monkeypatch.setattr(compiled, "COMPILED", there)
        for source in names:
            for target in names:
                expected = there and source in names[:3] and target in names[:3]
                assert compiled.reads_files(lookup(source), lookup(target)) is expected


def test_without_a_compiler_at_hand_the_compiled_step_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "wavg._compiled", None)
    monkeypatch.delattr(wavg, "_compiled", raising=False)
    spec = importlib.util.spec_from_file_location("installed_without", compiled.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.COMPILED
    assert not module.reads_files(F32, F32)


@pytest.mark.parametrize("with_compiled", [True, False])
def test_a_row_of_outputs_may_have_nothing_finite(monkeypatch, with_compiled):
    if not with_compiled:
        monkeypatch.setattr(compiled, "COMPILED", False)
    outs = np.empty((2, 1), np.float32)
    block = np.float32([[np.inf], [3.0]])
    kernel.combine(Combination.of([[1, 1], [0, 1]]), block, outs, allow_nonfinite=True)
    assert outs.tolist() == [[np.inf], [3.0]]
