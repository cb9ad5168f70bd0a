"""Quantised codes beside their scales, which no average takes: it would mean nothing.

Formats name the two in ways of their own; what is known of these is here.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

from wavg.checkpoint import TensorSpec
from wavg.dtypes import DTYPES, DType
from wavg.errors import WavgError

__all__ = ["refuse_quantised", "refuse_quantised_leaves"]

_NARROW = {
    entry.name for entry in DTYPES if entry.bits <= 8 and entry.kind in ("int", "float", "code")
}
_CODE_NAMES = ("qweight", "qzeros")
_SCALE_SUFFIXES = ("_scale", "_scales", "_scale_inv", ".scale", ".absmax", ".SCB", "_absmax")
_SCALE_NAMES = ("scale", "scales", "SCB", "weight_scb", "absmax")
_NUMBERED = "vars/"  # Keras 3 names a layer's variables by number only


def refuse_quantised(path: str, specs: Sequence[TensorSpec], averaged: Iterable[str]) -> None:
    """Raise an error if codes, or their scales, are among the tensors to be averaged.

    Where both are taken from the reference, as by `exclude`, they stay together and are fine.
    """
    codes = [
        spec
        for spec in specs
        if spec.dtype in _NARROW
        or (spec.name.endswith(_CODE_NAMES) and _last(spec.name) in _CODE_NAMES)
    ]
    if not codes:
        return
    names, averaged = {spec.name for spec in specs}, set(averaged)
    numbered: collections.defaultdict[str, list[str]] = collections.defaultdict(list)
    for spec in specs:
        group = spec.name.removesuffix(_last(spec.name))
        if group.endswith(_NUMBERED) and spec.entry.kind == "float":
            numbered[group].append(spec.name)
    for spec in codes:
        group = spec.name.removesuffix(_last(spec.name))
        scales: Iterable[str] = [
            *(f"{spec.name}{suffix}" for suffix in _SCALE_SUFFIXES),
            *(f"{group}{name}" for name in _SCALE_NAMES),
            *reversed(numbered[group]),
        ]
        found = next((name for name in scales if name in names and name != spec.name), None)
        if found is not None and (spec.name in averaged or found in averaged):
            raise WavgError(
                f"{path}: {spec.name} holds quantised codes ({spec.dtype}) with the scale {found}: "
                "their average has no meaning. Average the checkpoints before they are quantised, "
                "or exclude both",
                path=path,
                tensor=spec.name,
            )


def refuse_quantised_leaves(leaves: Iterable[tuple[str, DType]]) -> None:
    """Raise an error if codes beside their scales are among a model's leaves, told by path.

    >>> from wavg.dtypes import lookup
    >>> refuse_quantised_leaves([("w", lookup("int8")), ("w_scale", lookup("float32"))])
    Traceback (most recent call last):
    ...
    wavg.errors.WavgError: the model: w holds quantised codes (int8) with the scale w_scale: ...
    """
    specs = [TensorSpec(path, entry.name, ()) for path, entry in leaves]
    averaged = (spec.name for spec in specs if spec.entry.averaged)
    refuse_quantised("the model", specs, averaged)


def _last(name: str) -> str:
    return name[max(name.rfind("."), name.rfind("/")) + 1 :]
