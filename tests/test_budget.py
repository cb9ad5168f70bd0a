"""Which blocks and workers a budget allows, and what they promise (measured by test_memory.py)."""

from __future__ import annotations

import dataclasses

import pytest

import wavg
from wavg import budget
from wavg.budget import fit
from wavg.checkpoint import Checksum, FileIdentity, Index, TensorSpec
from wavg.decisions import decide
from wavg.dtypes import lookup
from wavg.extents import Extent
from wavg.options import Options

MIB = 1 << 20
PLENTY = 10_000 * MIB


@pytest.fixture(params=[True, False], ids=["compiled", "numpy"])
def compiled(request, monkeypatch):
    """Whether there is a compiled kernel, for float32 and its halves, as far as a plan can see."""
    formats = {"float32", "float16", "bfloat16"} if request.param else set()
    monkeypatch.setattr(budget, "reads_files", lambda *pair: {one.name for one in pair} <= formats)
    monkeypatch.setattr(budget, "scratch_bytes", taken)
    return request.param


def taken(inputs, outputs, source, target, block, *, from_files):
    """Stand for the kernel's scratch, and tell every argument from every other."""
    rows = inputs * (300 if from_files else 500) + outputs * 700
    return rows * block + 11 * source.bits + 13 * target.bits


def index(*tensors, form="npz", others=0, in_place=True, reader_bytes=0):
    """Return an index of (dtype, size), with tensors beside the model."""
    extent = Extent(0, 0, 1) if in_place else None
    specs = [TensorSpec(f"t{n}", dtype, (size,), extent) for n, (dtype, size) in enumerate(tensors)]
    beside = tuple(TensorSpec(f"o{n}", "float32", (9,)) for n in range(others))
    files = (FileIdentity("m", 0, 0, 0, 0),)
    return Index(form, files, tuple(specs), beside, reader_bytes=reader_bytes)


def fitted(*indexes, created=None, outputs=1, max_memory=PLENTY, workers=1, **options):
    asked = Options(max_memory=max_memory, workers=workers, **options)
    _, elements = decide(indexes[-1], zip(indexes[-1].tensors), asked)
    return fit(indexes, elements, asked, created, outputs)


def scratch(inputs, outputs, source, target, block, *, from_files):
    return taken(inputs, outputs, lookup(source), lookup(target), block, from_files=from_files)


def test_the_projected_memory_is_the_sum_of_its_parts(compiled):
    same = index(("float32", 100), ("float32", 200))
    block, workers, projected = fitted(same, same, same, outputs=2)
    assert (block, workers) == (300, 1)
    buffer = 300 * (2 * 4 + (0 if compiled else 3 * 4))
    worker = MIB + buffer + scratch(3, 2, "float32", "float32", 300, from_files=compiled)
    assert projected == 10 * MIB + 2 * 900 + worker


def test_numbers_that_no_compiled_step_takes_are_read_into_the_buffer(compiled):
    block, _, projected = fitted(*[index(("float64", 50))] * 5)
    worker = MIB + 50 * (8 + 5 * 8) + scratch(5, 1, "float64", "float64", 50, from_files=False)
    assert (block, projected) == (50, 10 * MIB + 900 + worker)


def test_complex_numbers_are_pairs_of_floats(compiled):
    _, _, projected = fitted(*[index(("complex64", 50))] * 5)
    buffer = 50 * (8 + (0 if compiled else 5 * 8))
    worker = MIB + buffer + scratch(5, 1, "float32", "float32", 50, from_files=compiled)
    assert projected == 10 * MIB + 900 + worker


def test_another_dtype_is_written_from_another_buffer(compiled):
    _, _, projected = fitted(*[index(("float32", 50))] * 5, dtype="float64")
    worker = MIB + 50 * (8 + 5 * 4) + scratch(5, 1, "float32", "float64", 50, from_files=False)
    assert projected == 10 * MIB + 900 + worker


def test_numbers_that_are_compared_take_two_blocks_of_the_one_buffer(compiled):
    few = scratch(2, 1, "float16", "float16", 1001, from_files=compiled)
    _, _, projected = fitted(*[index(("float16", 1), ("int64", 1000))] * 2)
    assert projected == 10 * MIB + 2 * 900 + MIB + few + 2 * 1001 * 8
    few = scratch(2, 1, "float16", "float16", 1001, from_files=compiled)
    _, _, projected = fitted(*[index(("float16", 1), ("float4_e2m1fn", 1000))] * 2)
    smaller = 1001 * (2 + (0 if compiled else 2 * 2))
    assert projected == 10 * MIB + 2 * 900 + MIB + few + max(smaller, 2 * 1001)
    _, _, swapped = fitted(*[index(("int64", 1000), ("float16", 1))] * 2)
    assert swapped == fitted(*[index(("float16", 1), ("int64", 1000))] * 2)[2]
    unseen = index(("float16", 1), ("int64", 1000))
    assert fitted(unseen, unseen, exclude=("t1",))[2] < fitted(unseen, unseen)[2]


def test_a_worker_keeps_the_largest_buffer_and_the_largest_scratch(compiled):
    both = index(("float64", 40), ("bfloat16", 60))
    _, _, projected = fitted(both, both)
    wide = scratch(2, 1, "float64", "float64", 100, from_files=False)
    narrow = scratch(2, 1, "bfloat16", "bfloat16", 100, from_files=compiled)
    assert projected == 10 * MIB + 2 * 900 + MIB + 100 * (8 + 2 * 8) + max(wide, narrow)
    swapped = index(("bfloat16", 60), ("float64", 40))
    assert fitted(swapped, swapped)[2] == projected


def test_indexes_are_counted_once_where_files_share_them():
    one, other = index(("float32", 9), others=2), index(("float32", 9), others=3)
    base = fitted(one, one)[2]
    assert fitted(other, one)[2] == base + (1 + 3) * 900
    assert fitted(other, other)[2] == base + 900


def test_the_hdf5_library_and_its_readers_are_counted_where_they_are_needed():
    tensors = (("float32", 9), ("float32", 8))
    plain, keras = index(*tensors, others=3), index(*tensors, others=3, form="keras-h5")
    keras = dataclasses.replace(keras, reader_bytes=77)
    assert fitted(keras, keras)[2] - fitted(plain, plain)[2] == (
        22 * MIB + 2 * 77 + (2 + 3) * 900  # and a table of the output, which is looked into
    )
    assert fitted(plain, created="keras-h5", outputs=3)[2] >= fitted(plain)[2] + 22 * MIB


def test_a_new_file_is_laid_out_in_memory_once_an_output():
    model = index(("float32", 9), ("float32", 9))
    assert fitted(model, created="safetensors")[2] == fitted(model)[2] + 2 * 600
    more = fitted(model, created="safetensors", outputs=5)[2] - fitted(model, outputs=5)[2]
    assert more == 2 * 600 * 5


def test_what_makes_digests_is_counted_once_a_worker():
    model = index(("float64", 100_000))
    checked = dataclasses.replace(model, checksums=(Checksum(Extent(0, 0, 1), 0, ""),))
    for workers in (1, 2):
        plain = fitted(model, model, workers=workers)[2]
        assert fitted(model, model, workers=workers, digests=True)[2] == plain + workers * MIB // 2
        assert fitted(checked, model, workers=workers)[2] == plain + workers * MIB // 2


def test_tensors_without_a_place_are_read_by_one_worker_in_larger_blocks(compiled):
    packed = index(("float32", 30 * MIB), in_place=False)
    block, workers, projected = fitted(packed, packed, workers=8)
    assert (block, workers) == (4 * MIB, 1)
    buffer = block * (4 + 2 * 4)  # read as arrays, whatever the kernel could do
    taken = [
        scratch(2, 1, "float32", "float32", block, from_files=reads) for reads in {compiled, False}
    ]
    assert projected == 10 * MIB + 900 + MIB + buffer + max(taken)
    mixed = index(("float32", 30 * MIB))
    assert fitted(packed, mixed, workers=8)[:2] == (4 * MIB, 1)
    assert fitted(mixed, mixed, workers=8)[:2] == (MIB // 8, 8)


def test_a_block_is_half_a_mebibyte_of_the_widest_averaged_numbers():
    large = 10 * MIB
    assert fitted(index(("float32", large)))[0] == MIB // 8
    assert fitted(index(("float32", large), ("float64", 1)))[0] == MIB // 16
    assert fitted(index(("float16", large), ("complex128", 1)), exclude=("t1",))[0] == MIB // 4
    assert fitted(index(("float32", large), ("int64", large)))[0] == MIB // 8


def test_no_more_workers_than_blocks_and_never_none():
    model = index(("float64", 100_000))  # 65,536 of them are a block
    assert fitted(model, workers=9)[:2] == (65_536, 2)
    assert fitted(index(("float64", 65_536)), workers=9)[:2] == (65_536, 1)
    assert fitted(index(("float64", 65_537)), workers=9)[:2] == (65_536, 2)
    assert fitted(index(("float64", 0)), workers=9)[:2] == (1, 1)


def ladder(*indexes, **options):
    """Return (workers, block) of ever smaller budgets, and the error of the first too small."""
    steps, budget = [], PLENTY
    while True:
        try:
            block, workers, projected = fitted(*indexes, max_memory=budget, **options)
        except wavg.MemoryBudgetError as error:
            return steps, error, budget
        assert projected <= budget
        assert fitted(*indexes, max_memory=projected, **options) == (block, workers, projected)
        steps.append((workers, block))
        budget = projected - 1


def test_scarce_memory_takes_smaller_blocks_first_then_fewer_workers():
    model = index(("float64", 200_000))
    steps, _, _ = ladder(model, workers=3)
    halved = [65_536, 32_768, 16_384, 8_192]
    assert steps[:4] == [(3, block) for block in halved]
    two = [block for workers, block in steps if workers == 2]
    one = [block for workers, block in steps if workers == 1]
    assert two == halved[-len(two) :]
    assert one[-4:] == [8_192, 4_096, 2_048, 1_024]
    assert steps == sorted(steps, reverse=True)


def test_the_smallest_block_is_reached_exactly_and_named_when_it_does_not_fit():
    steps, error, budget = ladder(index(("float64", 3_000)))
    assert [block for _, block in steps] == [3_000, 1_024]
    assert error.needed == budget + 1
    assert error.allowed == budget
    assert [block for _, block in ladder(index(("float64", 7)))[0]] == [7]
    steps, error, budget = ladder(index(("float64", 3_000)), workers=2)
    assert [block for _, block in steps] == [3_000, 1_024]
    assert str(error) == (
        f"averaging 1 checkpoints needs at least {(budget + 1) / MIB:.0f} MiB, and "
        f"{budget / MIB:.0f} MiB are allowed; allow more with max_memory (--max-memory)"
    )


def test_a_large_budget_is_told_in_whole_mebibytes():
    with pytest.raises(wavg.MemoryBudgetError, match="and 150 MiB are allowed"):
        fitted(index(("float32", 9)), outputs=10**7, max_memory=150 * MIB)


@pytest.mark.parametrize(
    ("allowed", "said"),
    [(0, "0"), (1000, "0.00095"), (3 * MIB // 2, "1.5"), (10 * MIB - 1, "10"), (10 * MIB, "10")],
)
def test_a_small_budget_is_not_rounded_to_nothing(allowed, said):
    with pytest.raises(wavg.MemoryBudgetError, match=f"and {said} MiB are allowed"):
        fitted(index(("float32", 9)), max_memory=allowed)
