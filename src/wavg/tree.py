"""Pytrees: nested dicts, lists, tuples and named tuples with arrays as leaves.

It flattens, rebuilds and names leaves; it knows nothing of arithmetic. Leaves come in a stable
order: a dict's own order, position in a sequence. Dicts align by key, whatever their order.
``None`` is a tree without leaves. Anything else, dataclasses included, is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from wavg.errors import StructureMismatchError

__all__ = ["align", "leaves", "rebuild"]

Tree = Any


def leaves(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) in order.

    >>> list(leaves({"layers": [{"kernel": 1}, {"kernel": 2}], "scale": 3}))
    [('layers[0]/kernel', 1), ('layers[1]/kernel', 2), ('scale', 3)]
    """
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from leaves(child, _below(path, key))
    elif isinstance(tree, (list, tuple)):
        for position, child in enumerate(tree):
            yield from leaves(child, path + _place(tree, position))
    elif tree is not None:
        yield path, tree


def rebuild(tree: Tree, values: Iterator[Any]) -> Tree:
    """Return a tree of the same shape and types with its leaves replaced, in order.

    >>> rebuild({"a": [1, 2], "b": (3, None)}, iter("xyz"))
    {'a': ['x', 'y'], 'b': ('z', None)}
    """
    if isinstance(tree, Mapping):
        items = [(key, rebuild(child, values)) for key, child in tree.items()]
        return _like(tree, dict, items)
    if isinstance(tree, (list, tuple)):
        children = [rebuild(child, values) for child in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*children)
        return _like(tree, list if isinstance(tree, list) else tuple, children)
    return None if tree is None else next(values)


def _like(tree: Tree, plain: Callable[[Any], Any], content: Any) -> Tree:
    # A defaultdict takes a factory first: a container that is not built from its content becomes
    # the plain one.
    try:
        return type(tree)(content)
    except TypeError:
        return plain(content)


def align(trees: list[Tree]) -> tuple[list[str], list[list[Any]]]:
    """Return the leaf paths of the first tree, and for each path that leaf of every tree.

    Raises
    ------
    StructureMismatchError
        Where the trees differ in shape; ``differences`` lists every place.
    """
    first = trees[0]
    differences = [
        f"{text}{f' (tree {number})' if len(trees) > 2 else ''}"
        for number, tree in enumerate(trees)
        for text in _differences(first, tree, "")
    ]
    if differences:
        raise StructureMismatchError("the trees differ from the first:", differences=differences)
    columns = zip(*(_in_order_of(first, tree) for tree in trees), strict=True)
    return [path for path, _ in leaves(first)], [list(column) for column in columns]


def _in_order_of(first: Tree, tree: Tree) -> Iterator[Any]:
    """Yield the leaves of a tree of the same shape in the order of the first one's."""
    if isinstance(first, Mapping):
        for key, child in first.items():
            yield from _in_order_of(child, tree[key])
    elif isinstance(first, (list, tuple)):
        for left, right in zip(first, tree, strict=True):
            yield from _in_order_of(left, right)
    elif first is not None:
        yield tree


def _differences(a: Tree, b: Tree, path: str) -> Iterator[str]:
    here = path or "the top"
    if _kind(a) != _kind(b):
        yield f"{here}: {_kind(a)} in one, {_kind(b)} in the other"
    elif isinstance(a, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            name = _below(path, key)
            if key not in a or key not in b:
                yield f"{name}: only in {'the other' if key in b else 'the first'}"
            else:
                yield from _differences(a[key], b[key], name)
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f"{here}: length {len(a)} in one, {len(b)} in the other"
        for position, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from _differences(x, y, path + _place(a, position))


def _below(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _place(sequence: Sequence[Any], position: int) -> str:
    names = getattr(sequence, "_fields", None)
    return f".{names[position]}" if names else f"[{position}]"


def _kind(tree: Tree) -> str:
    if isinstance(tree, Mapping):
        return "dict"
    if isinstance(tree, (list, tuple)):
        return type(tree).__name__
    return "None" if tree is None else "leaf"
