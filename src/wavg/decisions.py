"""What happens to each tensor: it is averaged, or carried over and for what reason.

Pure functions of the reference's index and the options. Tensors that are alike share a kind, so
that models of very many tensors are decided on quickly.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wavg.checkpoint import Index, TensorSpec
from wavg.dtypes import lookup
from wavg.errors import WavgError
from wavg.options import Options

__all__ = ["Decision", "Kind", "check_patterns", "decide"]


class Decision(NamedTuple):
    """What happens to one tensor.

    Attributes
    ----------
    spec
        The tensor in the reference.
    sources
        The tensor in every layout, the reference's first: `Plan.layouts` tells which an input has.
    action
        ``"average"``, or ``"carry"``: taken from the reference as it is.
    reason
        Why it is carried over; empty for an averaged one.
    output
        The tensor as it is to be written; one of another dtype has no extent yet.
    compare
        Whether the inputs' values are compared, and a difference reported.
    """

    spec: TensorSpec
    sources: tuple[TensorSpec, ...]
    action: str
    reason: str
    output: TensorSpec
    compare: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """What is decided for all tensors that are alike."""

    action: str
    reason: str
    source: str
    target: str
    compare: bool

    @property
    def averaged(self) -> bool:
        """Whether they are averaged, rather than carried over."""
        return self.action == "average"

    def output(self, spec: TensorSpec) -> TensorSpec:
        """Return a tensor as it is to be written."""
        return spec._replace(dtype=self.target, extent=None)


def decide(
    reference: Index, sources: Iterable[tuple[TensorSpec, ...]], options: Options
) -> tuple[tuple[Decision, ...], dict[Kind, int]]:
    """Return what happens to each tensor, and the elements of each kind in all."""
    kinds = _kinds(reference, options)
    elements = dict.fromkeys(kinds, 0)
    decisions = []
    for kind, spec, found in zip(kinds, reference.tensors, sources, strict=True):
        elements[kind] += math.prod(spec.shape)
        output = spec if kind.target == kind.source else kind.output(spec)
        parts = spec, found, kind.action, kind.reason, output, kind.compare
        decisions.append(_new(Decision, parts))
    return tuple(decisions), elements


_new = tuple.__new__  # of very many named tuples: half the time of calling their class


def _kinds(reference: Index, options: Options) -> list[Kind]:
    """Return each tensor's kind; those that are alike share one."""
    dtypes = [spec.dtype for spec in reference.tensors]
    unchosen = [""] * len(dtypes)
    if options.include or options.exclude:
        unchosen = [_why_unchosen(spec.name, options) for spec in reference.tensors]
    alike = list(zip(dtypes, unchosen, strict=True))
    kinds = {key: _kind(*key, options) for key in set(alike)}
    return [kinds[key] for key in alike]


def _why_unchosen(name: str, options: Options) -> str:
    if options.include and not _matches(name, options.include):
        return "not included"
    return "excluded" if _matches(name, options.exclude) else ""


def _kind(dtype: str, unchosen: str, options: Options) -> Kind:
    entry = lookup(dtype)
    if unchosen:
        return Kind("carry", unchosen, dtype, dtype, compare=False)
    if not entry.averaged:
        return Kind("carry", f"{dtype} is not averaged", dtype, dtype, compare=True)
    target = options.dtype if options.dtype and entry.kind == "float" else dtype
    return Kind("average", "", dtype, target, compare=False)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(reference: Index, options: Options) -> None:
    """Raise an error if a pattern matches no tensor: it would be a misspelt one."""
    for pattern in (*options.include, *options.exclude):
        if not any(fnmatch.fnmatchcase(spec.name, pattern) for spec in reference.tensors):
            raise WavgError(
                f"the pattern {pattern!r} matches no tensor of {reference.path}; "
                "`wavg inspect` shows their names"
            )
