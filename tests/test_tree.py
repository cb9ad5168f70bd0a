"""Flattening, rebuilding and aligning trees."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trees import Pair, assert_same_tree, fill, shuffled, trees, walk
from wavg import tree as pytree
from wavg.errors import StructureMismatchError

NESTED = {
    "layers": [{"kernel": 1, "bias": 2}, {"kernel": 3, "bias": None}],
    "head": (4, Pair(5, [6])),
    "state": OrderedDict(z=7, a=8),
    "nothing": None,
    "empty": {},
}


def paths(tree):
    return [path for path, _ in pytree.leaves(tree)]


def differences(*trees):
    with pytest.raises(StructureMismatchError) as caught:
        pytree.align(list(trees))
    for difference in caught.value.differences:
        assert difference in str(caught.value)
    return caught.value.differences


def test_leaves_are_named_by_where_they_stand():
    assert list(pytree.leaves(NESTED)) == [
        ("layers[0]/kernel", 1),
        ("layers[0]/bias", 2),
        ("layers[1]/kernel", 3),
        ("head[0]", 4),
        ("head[1].left", 5),
        ("head[1].right[0]", 6),
        ("state/z", 7),
        ("state/a", 8),
    ]


@pytest.mark.parametrize("tree", [None, {}, [], (), [None, {"a": []}]])
def test_none_and_empty_containers_have_no_leaves(tree):
    assert paths(tree) == []
    assert_same_tree(pytree.rebuild(tree, iter(())), tree)


@pytest.mark.parametrize("leaf", [1.5, "text", np.ones(3), object(), {1, 2}, b"bytes"])
def test_whatever_is_no_container_is_a_leaf(leaf):
    [(path, found)] = pytree.leaves(leaf)
    assert path == ""
    assert found is leaf


def test_keys_that_are_no_text_appear_as_text():
    assert paths({0: "a", (1, 2): "b"}) == ["0", "(1, 2)"]


def test_rebuild_keeps_types_and_order():
    rebuilt = pytree.rebuild(NESTED, iter("abcdefgh"))
    assert_same_tree(rebuilt, fill(NESTED, lambda number: "abcdefgh"[number - 1]))
    assert type(rebuilt["state"]) is OrderedDict
    assert type(rebuilt["head"][1]) is Pair


def test_rebuild_keeps_subclasses_that_are_built_from_their_content():
    class Layers(list):
        pass

    class Parameters(dict):
        pass

    rebuilt = pytree.rebuild(Parameters(a=Layers([1, 2])), iter("xy"))
    assert type(rebuilt) is Parameters
    assert type(rebuilt["a"]) is Layers


@pytest.mark.parametrize(
    "tree",
    [defaultdict(list, a=1, b=2), MappingProxyType({"a": 1, "b": 2})],
    ids=["defaultdict", "mappingproxy"],
)
def test_a_mapping_that_is_not_built_from_items_becomes_a_dict(tree):
    rebuilt = pytree.rebuild(tree, iter("xy"))
    assert rebuilt == {"a": "x", "b": "y"}
    assert type(rebuilt) is dict


@given(trees(st.integers()))
def test_rebuilding_from_its_own_leaves_is_the_identity(tree):
    leaves = [leaf for _, leaf in pytree.leaves(tree)]
    assert_same_tree(pytree.rebuild(tree, iter(leaves)), tree)


@given(trees(st.integers()))
def test_leaves_come_in_order_under_different_names(tree):
    pairs = list(pytree.leaves(tree))
    assert [leaf for _, leaf in pairs] == list(walk(tree))
    assert len({path for path, _ in pairs}) == len(pairs)
    assert pairs == list(pytree.leaves(tree))


@given(trees(st.integers()))
def test_rebuild_takes_one_value_a_leaf_and_does_not_touch_the_tree(tree):
    before = fill(tree, lambda leaf: leaf)
    count = len(list(walk(tree)))
    values = iter(range(count + 1))
    rebuilt = pytree.rebuild(tree, values)
    assert list(walk(rebuilt)) == list(range(count))
    assert next(values) == count
    assert_same_tree(tree, before)


@settings(deadline=None)
@given(trees(st.integers()), st.integers(0, 2**32), st.integers(1, 4))
def test_trees_align_by_key_whatever_the_order_of_their_dicts(tree, seed, count):
    rng = np.random.default_rng(seed)
    others = [shuffled(fill(tree, lambda leaf, n=n: f"{leaf}:{n}"), rng) for n in range(count)]
    names, rows = pytree.align([tree, *others])
    assert names == paths(tree)
    assert rows == [[leaf, *(f"{leaf}:{n}" for n in range(count))] for leaf in walk(tree)]


def test_dicts_of_different_classes_align():
    assert pytree.align([{"a": 1}, OrderedDict(a=2)]) == (["a"], [[1, 2]])


def test_one_tree_alone_is_aligned():
    assert pytree.align([{"a": [1]}]) == (["a[0]"], [[1]])


def test_every_difference_of_a_tree_is_listed_with_its_path():
    first = {"layers": [{"kernel": 1, "bias": 2}, {"kernel": 3}], "head": (4, 5), "scale": 6}
    other = {"layers": [{"kernel": 1}, {"kernel": [3]}], "head": (4,), "shift": None}
    assert sorted(differences(first, other)) == [
        "head: length 2 in one, 1 in the other",
        "layers[0]/bias: only in the first",
        "layers[1]/kernel: leaf in one, list in the other",
        "scale: only in the first",
        "shift: only in the other",
    ]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1], (1,), "the top: list in one, tuple in the other"),
        ({"a": 1}, [1], "the top: dict in one, list in the other"),
        ({"a": Pair(1, 2)}, {"a": (1, 2)}, "a: Pair in one, tuple in the other"),
        ({"a": None}, {"a": 1}, "a: None in one, leaf in the other"),
        ([1, 2], [1, 2, 3], "the top: length 2 in one, 3 in the other"),
        ([[], {"x": 1}], [[], {"y": 1}], "[1]/x: only in the first"),
    ],
)
def test_each_kind_of_difference_is_told(a, b, expected):
    assert expected in differences(a, b)
    with pytest.raises(StructureMismatchError, match=r"\(tree 2\)"):
        pytree.align([a, a, b])


@given(trees(st.integers()), trees(st.integers()))
def test_trees_align_exactly_when_their_shapes_are_equal(a, b):
    def shape(tree):
        if isinstance(tree, dict):
            return {key: shape(child) for key, child in tree.items()}
        if isinstance(tree, list | tuple):
            return [type(tree), *(shape(child) for child in tree)]
        return tree is None

    if shape(a) == shape(b):
        pytree.align([a, b])
    else:
        assert differences(a, b)


def test_differences_of_every_tree_are_listed():
    found = "\n".join(differences({"a": 1, "b": 2}, {"a": 1}, {"b": 2}))
    assert "a: only in the first" in found
    assert "b: only in the first" in found


def test_differences_and_leaves_name_a_field_alike():
    [difference] = differences(Pair(1, 2), Pair(1, [2]))
    assert difference.startswith(paths(Pair(1, 2))[1])


@pytest.mark.parametrize("tree", [{"a/b": 1, "a": {"b": 2}}, {1: 1, "1": 2}, {"a": [1], "a[0]": 2}])
def test_leaves_whose_paths_read_alike_stay_apart(tree):
    _, rows = pytree.align([tree, tree])
    assert rows == [[1, 1], [2, 2]]


@pytest.mark.parametrize(
    "other",
    [
        {"a": [np.float32(1), np.float32(2)]},
        {"a": (np.float32(1), np.float32(3))},
        {"a": (np.float32(1), np.float64(2))},
        {"b": (np.float32(1), np.float32(2))},
        {"a": (np.float32(1),)},
        OrderedDict(a=(np.float32(1), np.float32(2))),
    ],
)
def test_the_comparison_of_trees_sees_a_planted_difference(other):
    tree = {"a": (np.float32(1), np.float32(2))}
    assert_same_tree(fill(tree, np.asarray), fill(tree, np.asarray))
    with pytest.raises(AssertionError):
        assert_same_tree(fill(tree, np.asarray), fill(other, np.asarray))
