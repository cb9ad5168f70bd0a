"""What the models of a stream have in common: their leaves' paths, shapes, dtypes, and the tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy.typing as npt

from wavg import tree as pytree
from wavg.arrays import leaf_to_numpy
from wavg.dtypes import DType, dtype_of
from wavg.errors import StructureMismatchError, WavgError
from wavg.quantised import refuse_quantised_leaves

__all__ = ["AHEAD", "Leaf", "Moment", "Structure"]

Array = npt.NDArray[Any]

AHEAD = (  # what to do where an average has a step that the training has yet to take
    "a training that goes on from an earlier save needs the averager's state of that time, and one "
    "whose model has been averaged already goes on with the next step"
)
_PLAIN: dict[str, Any] = {"dict": dict, "list": list, "tuple": tuple}


class Moment(NamedTuple):
    """When a model comes: its number, from 1, its step, the step before, and if steps are given."""

    position: int
    step: float
    before: float
    given: bool


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf's path, shape, and number format."""

    path: str
    shape: tuple[int, ...]
    format: DType

    def __str__(self) -> str:
        return f"{self.format.name}{list(self.shape)}"

    @property
    def numbers(self) -> int:
        """How many real numbers it has; two are a complex number."""
        return math.prod(self.shape) * (self.format.bits // self.format.component.bits)

    def array(self, flat: Array) -> Array:
        """Give a flat array of the leaf's real numbers its shape."""
        return flat.view(self.format.numpy).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Structure:
    """The leaves of the first model, and how a model is put together of them.

    Attributes
    ----------
    leaves
        In the first model's order.
    tree
        That model, with each leaf's number in its place; None where only the leaves are known, as
        of a saved state of other nodes than dicts, lists and tuples: the next model tells it.
    """

    leaves: tuple[Leaf, ...]
    tree: tuple[Any] | None = None  # in a tuple, for a tree may be None itself

    @classmethod
    def first(cls, model: Any) -> tuple[Structure, list[Array]]:
        """Return the structure of a model, and its arrays.

        Raises
        ------
        WavgError
            A leaf is no array of numbers, or holds quantised codes.
        """
        pairs = [(path, leaf_to_numpy(path, leaf)) for path, leaf in pytree.leaves(model)]
        leaves = tuple(_leaf(path, array) for path, array in pairs)
        refuse_quantised_leaves((leaf.path, leaf.format) for leaf in leaves)
        tree = pytree.rebuild(model, iter(range(len(leaves))))
        return cls(leaves, (tree,)), [array for _, array in pairs]

    def next(self, model: Any) -> tuple[Structure, list[Array]]:
        """Return the structure, now with a tree, and the arrays of a model that has to be alike.

        Raises
        ------
        StructureMismatchError
            The model differs in structure, shapes or dtypes; every difference is listed.
        """
        whole = self if self.tree else self._with_tree_of(model)
        assert whole.tree
        _, rows = pytree.align([whole.tree[0], model])
        found: list[Any] = [None] * len(rows)
        differences = []
        for number, value in rows:
            leaf, array = self.leaves[number], leaf_to_numpy(self.leaves[number].path, value)
            found[number] = array
            if (array.shape, array.dtype) != (leaf.shape, leaf.format.numpy):
                other = f"{array.dtype}{list(array.shape)}"
                differences.append(f"{leaf.path or 'the leaf'}: {other}, not {leaf}")
        _refuse(differences)
        return whole, found

    def rebuild(self, values: Sequence[Array]) -> Any:
        """Return arrays in the leaves' order as a tree, or as a dict by path if that is unknown."""
        if not self.tree:
            return {leaf.path: value for leaf, value in zip(self.leaves, values, strict=True)}
        (tree,) = self.tree
        return pytree.rebuild(tree, iter([values[number] for _, number in pytree.leaves(tree)]))

    def plain(self) -> list[Any] | None:
        """Return the tree as JSON can hold it; None of other nodes than dicts, lists and tuples.

        >>> Structure.first({"w": (1.0, None)})[0].plain()
        [{'dict': [['w', {'tuple': [0, None]}]]}]
        """
        try:
            return None if self.tree is None else [_plain(self.tree[0])]
        except TypeError:
            return None

    def shaped(self, plain: list[Any] | None) -> Structure:
        """Return the structure of these leaves with the tree that `plain` returned.

        Raises
        ------
        ValueError
            It is of other leaves.
        """
        if plain is None:
            return self
        (tree,) = map(_tree, plain)
        pairs = [(path, number) for path, number in pytree.leaves(tree)]
        if sorted(number for _, number in pairs) != list(range(len(self.leaves))) or any(
            self.leaves[number].path != path for path, number in pairs
        ):
            raise ValueError("its tree is not that of its leaves")
        return replace(self, tree=(tree,))

    def names(self) -> list[str]:
        """Return the paths as names of tensors.

        Raises
        ------
        WavgError
            Two leaves have one path, as ``{"a/b": x, "a": {"b": y}}`` has.
        """
        names = [leaf.path for leaf in self.leaves]
        for name in set(names) if len(set(names)) < len(names) else ():
            if names.count(name) > 1:
                raise WavgError(
                    f"two leaves of the model are called {name!r}, and a file has one tensor of a "
                    "name; rename one",
                    tensor=name,
                )
        return names

    def _with_tree_of(self, model: Any) -> Structure:
        numbers = {leaf.path: number for number, leaf in enumerate(self.leaves)}
        paths = [path for path, _ in pytree.leaves(model)]
        _refuse(
            [f"{path}: only in the model" for path in paths if path not in numbers]
            + [f"{path}: not in the model" for path in numbers if path not in paths]
        )
        return replace(self, tree=(pytree.rebuild(model, iter([numbers[p] for p in paths])),))


def _leaf(path: str, array: Array) -> Leaf:
    entry = dtype_of(array.dtype)
    if entry is None:
        raise WavgError(
            f"leaf {path or 'at the top'} is {array.dtype}, not an array of numbers", tensor=path
        )
    return Leaf(path, array.shape, entry)


def _plain(tree: Any) -> Any:
    kind = type(tree).__name__
    if tree is None or type(tree) is int:
        return tree
    if type(tree) is not _PLAIN.get(kind):
        raise TypeError(f"a {kind} is not plain")
    if type(tree) is not dict:
        return {kind: list(map(_plain, tree))}
    if not all(type(key) in (str, int) for key in tree):
        raise TypeError("a key is not plain")
    return {kind: [[key, _plain(child)] for key, child in tree.items()]}


def _tree(plain: Any) -> Any:
    if plain is None or type(plain) is int:
        return plain
    ((kind, content),) = plain.items()
    if kind == "dict":
        return {key: _tree(child) for key, child in content}
    return _PLAIN[kind](map(_tree, content))


def _refuse(differences: list[str]) -> None:
    if differences:
        raise StructureMismatchError("the model differs from the first:", differences=differences)
