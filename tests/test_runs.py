"""Which neighbours are read as one, beside a slow look at every pair."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wavg
from wavg.checkpoint import TensorSpec
from wavg.decisions import Decision
from wavg.extents import Extent, complement
from wavg.runs import make_runs

SIZES = {"float32": 4, "float16": 2}


@st.composite
def decisions(draw):
    """Return some tensors in one or two layouts, with holes, in any order; some lie nowhere."""
    count = draw(st.integers(0, 8))
    dtypes = draw(st.lists(st.sampled_from([*SIZES]), min_size=count, max_size=count))
    sizes = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))

    def layout():
        order = draw(st.permutations(range(count)))
        position, extents = draw(st.integers(0, 2)), [None] * count
        for index in order:
            length = sizes[index] * SIZES[dtypes[index]]
            if draw(st.integers(0, 5)):
                extents[index] = Extent(draw(st.integers(0, 5)) // 5, position, length)
            position += length + (draw(st.integers(0, 3)) == 0)
        return [
            TensorSpec(f"t{index}", dtypes[index], (sizes[index],), extents[index])
            for index in range(count)
        ]

    layouts = [layout() for _ in range(draw(st.integers(1, 2)))]
    made = []
    for sources in zip(*layouts, strict=True):
        action = draw(st.sampled_from(["average", "average", "average", "carry"]))
        target = draw(st.sampled_from([sources[0].dtype] * 3 + ["float64"]))
        output = sources[0]._replace(dtype=target)
        made.append(Decision(sources[0], sources, action, "", output))
    return made


def adjoin(a, b):
    """Whether one decision's tensor lies just before another's everywhere, with the same dtypes."""
    return (a.spec.dtype, a.output.dtype) == (b.spec.dtype, b.output.dtype) and all(
        left.extent is not None
        and right.extent is not None
        and left.extent.file == right.extent.file
        and left.extent.offset + left.extent.length == right.extent.offset
        for left, right in zip(a.sources, b.sources, strict=True)
    )


@given(decisions())
def test_neighbours_are_joined_just_where_they_adjoin_in_every_layout(made):
    runs = list(make_runs(made))
    chosen = [d for d in made if d.action == "average" and d.spec.size]
    placed = sorted((d for d in chosen if d.spec.extent), key=lambda d: d.spec.extent)
    expected = placed + [d for d in chosen if not d.spec.extent]
    assert [d for run in runs for d in run.decisions] == expected
    assert all(adjoin(*pair) for run in runs for pair in itertools.pairwise(run.decisions))
    for left, right in itertools.pairwise(runs):
        assert not adjoin(left.decisions[-1], right.decisions[0])


@given(decisions())
def test_a_run_is_one_long_tensor_of_every_layout(made):
    for run in make_runs(made):
        sizes = [d.spec.size for d in run.decisions]
        assert run.size == sum(sizes)
        assert [*run.starts] == [sum(sizes[:position]) for position in range(len(sizes))]
        for source, first in zip(run.sources, run.decisions[0].sources, strict=True):
            assert source.size == run.size
            if first.extent is not None:
                assert source.extent == (*first.extent[:2], source.nbytes)


def tensor(name, size, *places, dtype="float32", output=None, action="average", fortran=False):
    """Return the decision on a tensor, of places (file, offset) or None, one a layout."""
    shape = (1, size) if fortran else (size,)
    extents = [place and Extent(*place, size * SIZES[dtype]) for place in places]
    sources = tuple(TensorSpec(name, dtype, shape, extent, fortran) for extent in extents)
    return Decision(sources[0], sources, action, "", sources[0]._replace(dtype=output or dtype))


def test_neighbours_in_every_layout_are_one_tensor_with_parts():
    a = tensor("a", 6, (0, 100), (1, 24), fortran=True)
    b = tensor("b", 2, (0, 124), (1, 48))
    c = tensor("c", 3, (0, 132), (1, 56))
    (run,) = make_runs([b, c, a])  # not in the order of their places
    assert run.decisions == (a, b, c)
    assert run.starts == (0, 6, 8)
    assert run.size == 11
    assert run.sources == (
        TensorSpec("a", "float32", (11,), Extent(0, 100, 44), fortran=False),
        TensorSpec("a", "float32", (11,), Extent(1, 24, 44), fortran=False),
    )
    assert run.sources[0].fortran is False
    assert [*run.pieces(0, 11)] == [(a, 0, 0, 6), (b, 0, 6, 8), (c, 0, 8, 11)]
    assert [*run.pieces(2, 7)] == [(a, 2, 2, 6), (b, 0, 6, 7)]
    assert [*run.pieces(7, 9)] == [(b, 1, 7, 8), (c, 0, 8, 9)]
    assert [*run.pieces(6, 8)] == [(b, 0, 6, 8)]
    assert [*run.pieces(8, 8)] == []


def test_two_neighbours_are_enough():
    a, b = tensor("a", 1, (0, 0)), tensor("b", 1, (0, 4))
    (run,) = make_runs([a, b])
    assert (run.decisions, run.starts, run.size) == ((a, b), (0, 1), 2)
    assert run.sources[0].extent == Extent(0, 0, 8)


@pytest.mark.parametrize(
    "second",
    [
        tensor("b", 2, (0, 13), (0, 12)),
        tensor("b", 2, (1, 12), (0, 12)),
        tensor("b", 2, (0, 12), (0, 16)),
        tensor("b", 2, (0, 12), (1, 12)),
        tensor("b", 2, None, (0, 12)),
        tensor("b", 2, (0, 12), (0, 12), dtype="float16", output="float32"),
        tensor("b", 2, (0, 12), (0, 12), output="float16"),
    ],
)
def test_one_thing_that_differs_keeps_two_apart(second):
    first = tensor("a", 3, (0, 0), (0, 0))
    assert [run.decisions for run in make_runs([first, second])] == [(first,), (second,)]
    for run in make_runs([first, second]):
        assert run.sources == run.decisions[0].sources
        assert (run.starts, run.size) == ((0,), run.decisions[0].spec.size)
    others = [tensor(name, 3, (2, at), (2, at)) for name, at in (("x", 0), ("y", 12))]
    runs = [run.decisions for run in make_runs([*others, first, second])]
    assert sorted(runs, key=len) == [(first,), (second,), tuple(others)]


def test_a_tensor_by_itself_stays_as_it_is_stored():
    alone = tensor("a", 3, None, fortran=True)
    (run,) = make_runs([alone])
    assert run == ((alone,), (0,), alone.sources, 3)


def test_what_is_carried_over_or_empty_is_in_no_run_and_parts_nothing():
    a, b = tensor("a", 1, (0, 0)), tensor("b", 1, (0, 4))
    carried, empty = tensor("n", 1, (0, 8), action="carry"), tensor("e", 0, (0, 4))
    assert [run.decisions for run in make_runs([a, carried, empty, b])] == [(a, b)]
    assert [*make_runs([carried, empty])] == []


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 9))))
def test_a_complement_is_every_byte_outside(parts):
    extents = [Extent(0, offset, length) for offset, length in parts]
    inside = {byte for _, offset, length in extents for byte in range(offset, offset + length)}
    outside = [
        byte
        for (_, offset, length), _ in complement(30, extents)
        for byte in range(offset, offset + length)
    ]
    assert outside == sorted(set(range(30)) - inside)
    assert all(extent.offset == target for extent, target in complement(30, extents))


def safetensors_in(path, order, arrays):
    """Write tensors with their data in a given order."""
    head, data = {}, b""
    for name in order:
        raw = arrays[name].tobytes()
        head[name] = {"dtype": "F32", "shape": [*arrays[name].shape]}
        head[name]["data_offsets"] = [len(data), len(data) + len(raw)]
        data += raw
    raw = json.dumps(head).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.fixture
def mixed(tmp_path):
    """Return the paths and arrays of a run whose layouts are a, a, b, b."""
    rng = np.random.default_rng(0)
    models = [{n: rng.standard_normal(3).astype("f4") for n in "pqrs"} for _ in range(4)]
    paths = [tmp_path / f"model_{step}.safetensors" for step in range(4)]
    for step, (path, model) in enumerate(zip(paths, models, strict=True)):
        safetensors_in(path, "pqrs" if step < 2 else "psrq", model)
    return paths, models


def test_inputs_of_different_layouts_are_each_read_from_their_places(mixed):
    paths, models = mixed
    for name, value in wavg.average_checkpoints(paths).items():
        exact = sum(model[name].astype(float) for model in models) / 4
        np.testing.assert_array_equal(value, exact.astype("f4"))


def test_inputs_of_the_same_layout_share_what_a_plan_holds_of_them(mixed):
    plan = wavg.plan_average(mixed[0])
    assert plan.layouts == (1, 1, 0, 0)
    assert {len(decision.sources) for decision in plan.decisions} == {2}
    assert all(decision.sources[0] is decision.spec for decision in plan.decisions)
    alike = wavg.plan_average(mixed[0][:2])
    assert alike.layouts == (0, 0)
    assert {len(decision.sources) for decision in alike.decisions} == {1}
