"""The order of ``model.get_weights()``, as far as a Keras file allows to know it.

It owns what is known of Keras' walks over a model: pure functions of names and of the model's
configuration, which touch no file. A configuration is somebody else's JSON: where it explains the
names it is followed, where it does not the order given stays. Every result is a permutation.

``get_weights()`` is a walk in the order in which layers were made. In Keras 3 it visits a layer's
own variables, trainable first, and then its sublayers. In Keras 2 it visits a model's layers, then
the model's own variables; of a layer that is no model, all trainable variables of its whole tree
come before the others. The files are written by other walks: Keras 3's forms visit attributes
sorted by name, the legacy form lists a layer's trainable variables before the others even where
the layer is a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["legacy_order", "weights_order"]

Config = Mapping[str, Any]

_DEEPEST = 64
_MOST_NAMESAKES = 16
_LAYERS = ("layers", "_layer_checkpoint_dependencies")  # the latter until tf_keras 2.13
_TOP_LEVEL = "top_level_model_weights"
# Sublayers that Keras makes in another order than that of the attributes they are saved under.
_AS_MADE = (
    ("forward_layer", "backward_layer"),
    ("query_dense", "key_dense", "gate_dense", "value_dense", "output_dense"),
)
# How many of a layer's own variables, counted from the last, are never trainable.
_UNTRAINABLE = {"batch_normalization": 2, "sync_batch_normalization": 2, "normalization": 3}


def weights_order(
    names: Sequence[str], config: object = None, *, keras_version: str = "3"
) -> list[int]:
    """Return positions of tensors of a Keras 3 layout in the order of ``get_weights()``.

    Parameters
    ----------
    names
        Paths such as ``layers/dense/vars/0``, in the order in which they were written.
    config
        The model's configuration, where the file has one (``config.json`` of a ``.keras``). Where
        it explains the groups it decides, otherwise the order given.
    keras_version
        Of the writer; 2 is tf_keras.

    Notes
    -----
    Unknown is the order among attributes of a subclassed model, and of a layer that is not Keras'
    own: they stay as they were written, which is by name.

    >>> weights_order(["layers/dense/vars/1", "layers/dense/vars/0", "vars/0"])
    [2, 1, 0]
    >>> weights_order(["layers/dense/vars/1", "layers/dense/vars/0", "vars/0"], keras_version="2")
    [1, 0, 2]
    """
    root = _Group()
    for position, name in enumerate(names):
        *groups, last = name.split("/")
        if not groups or groups.pop() != "vars" or len(groups) > _DEEPEST or not last.isdecimal():
            return list(range(len(names)))
        node = root
        for group in groups:
            node = node.children.setdefault(group, _Group())
        node.own.append((len(last), last, position))
    walk = root.walk_keras2 if _is_keras2(keras_version) else root.walk
    return list(walk(config))


def legacy_order(
    names: Sequence[str], config: object = None, *, keras_version: str = "3"
) -> list[int]:
    """Return positions of a legacy file's tensors in the order of ``get_weights()``.

    Parameters
    ----------
    names
        Layer and path below it, such as ``inner/inner/dense/kernel``, in the order of the file's
        lists of names.
    config
        The model's configuration, where the file has one (the attribute ``model_config``).
    keras_version
        Of the writer, the attribute of that name.

    Notes
    -----
    Unknown, without a configuration, is the place of partly frozen layers in an inner model.

    >>> names = ["m/d/kernel", "m/norm/gamma", "m/e/kernel", "m/norm/moving_mean"]
    >>> [names[position] for position in legacy_order(names)]
    ['m/d/kernel', 'm/norm/gamma', 'm/norm/moving_mean', 'm/e/kernel']
    """
    keras2 = _is_keras2(keras_version)
    layers: dict[str, list[_Tensor]] = {}
    for position, name in enumerate(names):
        layer, *path = name.split("/")
        layers.setdefault(layer, []).append(_Tensor(position, tuple(path)))
    own = layers.pop(_TOP_LEVEL, [])
    known = {_name(inner): inner for inner in _layers(config)}
    inner = [
        tensor.position
        for layer, tensors in layers.items()
        for tensor in _arranged(layer, tensors, known.get(layer), keras2)
    ]
    top = [tensor.position for tensor in own]
    return inner + top if keras2 else top + inner


def _is_keras2(version: str) -> bool:
    return version.startswith(("1", "2"))


# Configurations, of which nothing is certain


def _parts(config: object) -> Config:
    inner = config.get("config") if isinstance(config, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _layers(config: object) -> list[Config]:
    layers = _parts(config).get("layers")
    if not isinstance(layers, Sequence):
        return []
    return [layer for layer in layers if isinstance(layer, Mapping)]


def _name(config: Config) -> str:
    name = _parts(config).get("name", config.get("name"))
    return name if isinstance(name, str) else ""


def _is_frozen(config: object) -> bool:
    return _parts(config).get("trainable") is False


def _groups(config: object) -> dict[str, Config]:
    """Return the groups that Keras makes for a model's layers: class names, numbered."""
    groups: dict[str, Config] = {}
    used: dict[str, int] = {}
    for layer in _layers(config):
        kind = layer.get("class_name")
        name = _snake_case(kind) if isinstance(kind, str) else ""
        number = used[name] = used.get(name, -1) + 1
        groups[f"{name}_{number}" if number else name] = layer
    return groups


def _snake_case(name: str) -> str:
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


# Keras 3's layout


class _Group:
    """A group of the file: its own variables and the groups in it, as they were written."""

    def __init__(self) -> None:
        self.own: list[tuple[int, str, int]] = []  # sorts by number
        self.children: dict[str, _Group] = {}

    def positions(self) -> list[int]:
        return [position for *_, position in sorted(self.own)]

    def is_model(self) -> bool:
        return any(name in self.children for name in _LAYERS)

    def members(self, config: object) -> Iterator[tuple[str, _Group, object]]:
        """Yield the sublayers as they were made, a model's ``layers`` one by one."""
        for name in _as_made(self.children):
            child = self.children[name]
            if name not in _LAYERS or child.own:
                yield name, child, _parts(config).get(name)
                continue
            known = _groups(config)
            for member in known if known.keys() >= child.children.keys() else child.children:
                if member in child.children:
                    yield member, child.children[member], known.get(member)

    def walk(self, config: object) -> Iterator[int]:
        yield from self.positions()
        for _, child, inner in self.members(config):
            yield from child.walk(inner)

    def walk_keras2(self, config: object) -> Iterator[int]:
        """Walk a model; the tree of a layer that is none has two parts."""
        for name, child, inner in self.members(config):
            if child.is_model() or not self.is_model():
                yield from child.walk_keras2(inner)
            else:
                yield from child.split(name, inner, True)
                yield from child.split(name, inner, False)
        yield from self.positions()

    def split(
        self, name: str, config: object, trainable: bool, frozen: bool = False
    ) -> Iterator[int]:
        """Yield the positions of a tree's trainable variables, or of the others."""
        frozen = frozen or _is_frozen(config)
        own = self.positions()
        kind = name.rstrip("0123456789").removesuffix("_")
        if name == "layer" and isinstance(config, Mapping):
            kind = _snake_case(str(config.get("class_name")))
        count = 0 if frozen else max(0, len(own) - _UNTRAINABLE.get(kind, 0))
        yield from own[:count] if trainable else own[count:]
        for member, child, inner in self.members(config):
            yield from child.split(member, inner, trainable, frozen)


def _as_made(children: Iterable[str]) -> list[str]:
    """Order a layer's groups as far as its class is recognised by them."""
    names = list(children)
    for made in _AS_MADE:
        found = [name for name in names if name.removeprefix("_") in made]
        if len(found) > 1:
            found.sort(key=lambda name: made.index(name.removeprefix("_")))
            return found + [name for name in names if name not in found]
    return names


# The legacy layout


class _Tensor(NamedTuple):
    position: int
    path: tuple[str, ...]  # of the layers around the variable, then the variable


class _Place(NamedTuple):
    """Where in a model's walk a layer's variables come, and the models around it."""

    rank: int
    around: tuple[str, ...]


def _arranged(
    layer: str, tensors: list[_Tensor], config: object, keras2: bool
) -> Iterable[_Tensor]:
    """Return one layer's tensors in the order of its walk."""
    wrapped, steps = config, 0
    while not keras2 and "layer" in _parts(wrapped) and steps < _DEEPEST:
        wrapped, steps = _parts(wrapped)["layer"], steps + 1
    if _layers(wrapped):
        places = _places(wrapped, keras2)
        ranks = [_rank(tensor, places) for tensor in tensors]
        if None not in ranks:
            buckets: dict[int, list[_Tensor]] = {}
            for tensor, rank in zip(tensors, ranks, strict=True):
                buckets.setdefault(rank or 0, []).append(tensor)
            return [
                tensor
                for rank in sorted(buckets)
                for tensor in (buckets[rank] if keras2 else _clustered(buckets[rank]))
            ]
    return tensors if keras2 and not _seems_a_model(layer, tensors, config) else _clustered(tensors)


def _seems_a_model(layer: str, tensors: list[_Tensor], config: object) -> bool:
    # Keras 2 names an inner model's variables without the model's name, as a rule, and those of
    # other layers around layers with it.
    return not (
        config is not None
        or layer.startswith("time_distributed")
        or any(tensor.path[:1] == (layer,) for tensor in tensors)
    )


def _places(config: object, keras2: bool) -> dict[str, list[_Place]]:
    """Walk a model's configuration; the model itself goes by the name ``""``."""
    places: dict[str, list[_Place]] = {}
    rank = 0

    def visit(config: object, name: str, around: tuple[str, ...], depth: int) -> None:
        nonlocal rank
        rank += 1
        entered = rank
        inner = _layers(config) if depth < _DEEPEST else []
        for layer in inner:
            visit(layer, _name(layer), (*around, name) if name else around, depth + 1)
        rank += 1
        here = _Place(rank if keras2 and inner else entered, around)
        places.setdefault(name, []).append(here)

    visit(config, "", (), 0)
    return places


def _rank(tensor: _Tensor, places: Mapping[str, list[_Place]]) -> int | None:
    """Find the layer that a tensor's path names; None where that is not certain."""
    names = frozenset(tensor.path[:-1])
    best: list[tuple[int, int, int]] = []  # models around that are named, that are not, the rank
    for name in names:
        candidates = places.get(name, []) if name else []
        if len(candidates) > _MOST_NAMESAKES:
            return None
        for place in candidates:
            named = sum(outer in names for outer in place.around)
            best.append((named + 1, named - len(place.around), place.rank))
    if not best:
        return places[""][-1].rank if len(tensor.path) < 3 else None
    best.sort()
    if len(best) > 1 and best[-1][:2] == best[-2][:2] and best[-1][2] != best[-2][2]:
        return None
    return best[-1][2]


def _clustered(tensors: list[_Tensor]) -> list[_Tensor]:
    """Bring tensors of one layer together: its own, then those of its sublayers as they come."""
    if any(len(tensor.path) > _DEEPEST for tensor in tensors):
        return tensors
    return list(_clusters(tensors, 0))


def _clusters(tensors: list[_Tensor], depth: int) -> Iterator[_Tensor]:
    own = [tensor for tensor in tensors if len(tensor.path) <= depth + 1]
    inner: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        if len(tensor.path) > depth + 1:
            inner.setdefault(tensor.path[depth], []).append(tensor)
    walk = [tensor for below in inner.values() for tensor in _clusters(below, depth + 1)]
    if [tensor.path[depth:] for tensor in own] == [("vector_u",)]:
        # SpectralNormalization takes the wrapped layer's kernel as its own, before this vector.
        own, walk = walk[:1] + own, walk[1:]
    yield from own
    yield from walk
