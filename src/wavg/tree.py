"""Pytrees: nested dicts, lists, tuples and named tuples with arrays as leaves.

It flattens, rebuilds and names leaves; it knows nothing of arithmetic. Leaves come in a stable
order: a dict's own order, position in a sequence. Dicts align by key, whatever their order.
``None`` is a tree without leaves. Anything else, dataclasses included, is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
            yield from leaves(child, f"{path}/{key}" if path else str(key))
    elif isinstance(tree, (list, tuple)):
        names = getattr(tree, "_fields", None)
        for position, child in enumerate(tree):
            name = f".{names[position]}" if names else f"[{position}]"
            yield from leaves(child, f"{path}{name}")
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
    first = dict(leaves(trees[0]))
    rows = [[leaf] for leaf in first.values()]
    for number, tree in enumerate(trees[1:], start=1):
        differences = sorted(_differences(trees[0], tree, ""))
        if differences:
            raise StructureMismatchError(
                f"tree {number} differs from tree 0:\n  " + "\n  ".join(differences),
                differences=differences,
            )
        other = dict(leaves(tree))
        for row, path in zip(rows, first, strict=True):
            row.append(other[path])
    return list(first), rows


def _differences(a: Tree, b: Tree, path: str) -> Iterator[str]:
    here = path or "the top"
    if _kind(a) != _kind(b):
        yield f"{here}: {_kind(a)} in one, {_kind(b)} in the other"
    elif isinstance(a, Mapping):
        for key in a.keys() | b.keys():
            name = f"{path}/{key}" if path else str(key)
            if key not in a or key not in b:
                yield f"{name}: only in {'the other' if key in b else 'the first'}"
            else:
                yield from _differences(a[key], b[key], name)
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f"{here}: length {len(a)} in one, {len(b)} in the other"
        for position, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from _differences(x, y, f"{path}[{position}]")


def _kind(tree: Tree) -> str:
    if isinstance(tree, Mapping):
        return "dict"
    if isinstance(tree, (list, tuple)):
        return type(tree).__name__
    return "None" if tree is None else "leaf"
