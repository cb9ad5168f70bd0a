"""What happens to each tensor, told from the reference's index and the options alone."""

from __future__ import annotations

import pytest

import wavg
from wavg.checkpoint import FileIdentity, Index, TensorSpec
from wavg.decisions import check_patterns, decide
from wavg.dtypes import DTYPES
from wavg.extents import Extent
from wavg.options import Options


def index(*tensors):
    """Return an index of tensors given as (name, dtype, shape)."""
    specs = [TensorSpec(*tensor, Extent(0, 64 * n, 1)) for n, tensor in enumerate(tensors)]
    return Index("npz", (FileIdentity("run/m_9.npz", 999, 0, 0, 0),), tuple(specs))


def decided(reference, **options):
    """Return name → (action, reason, dtype written, compare), and the elements of each of these."""
    sources = [(spec, spec._replace(name=f"old {spec.name}")) for spec in reference.tensors]
    decisions, elements = decide(reference, sources, Options(**options))
    assert [decision.spec for decision in decisions] == [*reference.tensors]
    assert [decision.sources for decision in decisions] == sources
    table = {d.spec.name: (d.action, d.reason, d.output.dtype, d.compare) for d in decisions}
    counts = {
        (kind.action, kind.reason, kind.source, kind.target, kind.compare): count
        for kind, count in elements.items()
    }
    assert len(counts) == len(elements)
    return table, counts


MIXED = index(("a.w", "float32", (2, 3)), ("n", "int64", ()), ("a.b", "float32", (5,)))


def test_floats_are_averaged_and_integers_carried_over_and_compared():
    table, counts = decided(MIXED)
    assert table == {
        "a.w": ("average", "", "float32", False),
        "n": ("carry", "int64 is not averaged", "int64", True),
        "a.b": ("average", "", "float32", False),
    }
    assert counts == {
        ("average", "", "float32", "float32", False): 11,
        ("carry", "int64 is not averaged", "int64", "int64", True): 1,
    }


def test_what_is_not_chosen_is_carried_over_unseen_with_the_reason():
    table, counts = decided(MIXED, include=("a.*", "x"), exclude=("*.b", "*.c"))
    assert table == {
        "a.w": ("average", "", "float32", False),
        "n": ("carry", "not included", "int64", False),
        "a.b": ("carry", "excluded", "float32", False),
    }
    assert counts == {
        ("average", "", "float32", "float32", False): 6,
        ("carry", "not included", "int64", "int64", False): 1,
        ("carry", "excluded", "float32", "float32", False): 5,
    }
    usual = decided(MIXED)[0]
    excluded = ("carry", "excluded", "float32", False)
    assert decided(MIXED, exclude=("a.w",))[0] == usual | {"a.w": excluded}
    left_out = {name: ("carry", "not included", *usual[name][2:3], False) for name in ("a.w", "n")}
    assert decided(MIXED, include=("a.b",))[0] == usual | left_out


@pytest.mark.parametrize("entry", DTYPES, ids=lambda entry: entry.name)
def test_another_dtype_is_for_floats_that_are_averaged(entry):
    reference = index(("w", entry.name, (3,)))
    action, _, dtype, compare = decided(reference, dtype="float16")[0]["w"]
    averaged = entry.kind in ("float", "complex")
    assert action == ("average" if averaged else "carry")
    assert compare == (not averaged)
    assert dtype == ("float16" if entry.kind == "float" else entry.name)
    assert decided(reference, dtype="float16", exclude=("w",))[0]["w"][2] == entry.name


def test_a_tensor_of_another_dtype_lies_nowhere_yet_and_others_where_they_were():
    decisions, _ = decide(MIXED, zip(MIXED.tensors), Options(dtype="float16"))
    assert [decision.output.extent for decision in decisions] == [None, Extent(0, 64, 1), None]
    assert decisions[1].output is MIXED.tensors[1]
    assert decisions[0].output == TensorSpec("a.w", "float16", (2, 3))


def test_patterns_have_to_match_a_tensor_each_and_case_counts():
    check_patterns(MIXED, Options(include=("a.?", "n"), exclude=("*b",)))
    for options in ({"include": ("a.*", "N")}, {"exclude": ("a.*", "N")}):
        with pytest.raises(wavg.WavgError) as caught:
            check_patterns(MIXED, Options(**options))
        assert str(caught.value) == (
            "the pattern 'N' matches no tensor of run/m_9.npz; `wavg inspect` shows their names"
        )
