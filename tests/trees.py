"""Random pytrees, and the slow obvious ways to walk them: nothing here comes from `wavg.tree`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

KEYS = st.text("abcdefgh", min_size=1, max_size=2)


class Pair(NamedTuple):
    left: Any
    right: Any


def trees(leaf: st.SearchStrategy, max_leaves: int = 8) -> st.SearchStrategy:
    """Nested dicts, lists, tuples and named tuples; None and empty containers among them."""

    def extend(child: st.SearchStrategy) -> st.SearchStrategy:
        items = st.lists(st.tuples(KEYS, child), max_size=3, unique_by=lambda item: item[0])
        return st.one_of(
            items.map(dict),
            items.map(OrderedDict),
            st.lists(child, max_size=3),
            st.lists(child, max_size=3).map(tuple),
            st.builds(Pair, child, child),
        )

    return st.recursive(st.one_of(leaf, st.none()), extend, max_leaves=max_leaves)


def fill(tree: Any, make: Callable[[Any], Any]) -> Any:
    """The tree with every leaf replaced by what `make` returns for it."""
    if isinstance(tree, dict):
        return type(tree)((key, fill(child, make)) for key, child in tree.items())
    if isinstance(tree, Pair):
        return Pair(fill(tree.left, make), fill(tree.right, make))
    if isinstance(tree, list | tuple):
        return type(tree)(fill(child, make) for child in tree)
    return None if tree is None else make(tree)


def walk(tree: Any) -> Iterator[Any]:
    """The leaves, in order."""
    found: list[Any] = []
    fill(tree, found.append)
    yield from found


def shuffled(tree: Any, rng: np.random.Generator) -> Any:
    """The tree with the keys of every dict in another order."""
    if isinstance(tree, dict):
        items = [(key, shuffled(child, rng)) for key, child in tree.items()]
        return type(tree)(items[i] for i in rng.permutation(len(items)))
    if isinstance(tree, Pair):
        return Pair(*(shuffled(child, rng) for child in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(shuffled(child, rng) for child in tree)
    return tree


def assert_same_tree(a: Any, b: Any) -> None:
    """Same containers of the same types, same order of keys, same dtypes, shapes and bytes."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same_tree(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_tree(x, y)
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert a == b
