"""An averager's saved state: a safetensors file of its numbers, and a text that tells the rest."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy.typing as npt

from wavg import weights as schedules
from wavg.checkpoint import has_array
from wavg.dtypes import lookup
from wavg.errors import (
    CheckpointFormatError,
    OutputError,
    OutputExistsError,
    WavgError,
    WeightError,
)
from wavg.listed import ENDINGS
from wavg.record import STATE_KEY
from wavg.stored import open_checkpoint, save
from wavg.structure import Leaf, Moment, Structure
from wavg.weights import Schedule

__all__ = [
    "moment_of",
    "read",
    "rule_of",
    "steps_of",
    "structure_of",
    "text_of",
    "total_texts",
    "totals_of",
    "write",
]

Array = npt.NDArray[Any]

_VERSION = 1
_ENDING = ".safetensors"
_EXACT = re.compile(r"-?[0-9]{1,1000}(/[0-9]{1,1000})?")
_ROUNDED = re.compile(r"-?0x[01]\.[0-9a-f]{1,13}p[+-][0-9]{1,4}")


def write(
    path: str,
    structure: Structure,
    header: Mapping[str, Any],
    packed: Mapping[str, Array],
    *,
    overwrite: bool,
) -> None:
    """Write a state; it appears under its name when complete."""
    if not path.endswith(_ENDING):
        raise OutputError(f"{path}: a state is a safetensors file; end its name {_ENDING}")
    _refuse_other(path)
    leaves = [[leaf.path, leaf.format.name, leaf.shape] for leaf in structure.leaves]
    content = {"v": _VERSION, **header, "leaves": leaves, "tree": structure.plain()}
    text = json.dumps(content, separators=(",", ":"))
    save(path, packed, metadata={STATE_KEY: text}, overwrite=overwrite)


def _refuse_other(path: str) -> None:
    """Raise `OutputExistsError` if there is a file that is no saved state."""
    if not os.path.isfile(path):
        return
    try:
        with open_checkpoint(path) as checkpoint:
            held = STATE_KEY in checkpoint.metadata
    except CheckpointFormatError:
        held = False
    if not held:
        raise OutputExistsError(
            f"{path} exists and is not the saved state of a StreamingAverager, which is all that "
            "saving one replaces; choose another name, or remove it",
            path=path,
        )


@contextmanager
def read(path: str) -> Iterator[tuple[dict[str, Any], dict[str, Array]]]:
    """Yield what was written, to be taken up in the ``with`` block.

    Raises
    ------
    CheckpointFormatError
        The file holds no such state, or the block finds that it lacks something.
    """
    with open_checkpoint(path) as checkpoint:
        text = checkpoint.metadata.get(STATE_KEY)
        if text is None:
            raise CheckpointFormatError(
                f"{path} is not the saved state of a StreamingAverager", path=path
            )
        try:
            header = json.loads(text)
            if header["v"] != _VERSION:
                raise ValueError(f"it is of version {header['v']}, later than this wavg knows")
            packed = {name: tensor.read() for name, tensor in checkpoint.items()}
            checkpoint.verify_unchanged()
            yield header, packed
            if packed:
                raise ValueError(f"{next(iter(packed))!r} has no place in it")
        except CheckpointFormatError:
            raise
        except (
            WavgError,
            LookupError,
            TypeError,
            ValueError,
            ArithmeticError,
            AttributeError,
            RecursionError,
        ) as error:
            raise CheckpointFormatError(
                f"{path}: not a sound state of a StreamingAverager: {error}", path=path
            ) from None


def structure_of(header: Mapping[str, Any]) -> Structure:
    """Return the leaves that a header tells, and the tree if it is a plain one."""
    leaves = []
    for path, name, shape in header["leaves"]:
        leaf = Leaf(str(path), tuple(shape), lookup(name))
        if not all(type(n) is int and n >= 0 for n in shape) or not has_array(
            shape, leaf.format.bits
        ):
            raise ValueError(f"{path!r} has the shape {shape}")
        leaves.append(leaf)
    return Structure(tuple(leaves)).shaped(header["tree"])


def steps_of(values: Sequence[Any]) -> list[float]:
    """Return the steps of models held, checked."""
    return list(schedules.check_steps(values))


def moment_of(values: Sequence[Any]) -> Moment:
    """Return when the newest model came, checked."""
    position, step, before, given = values
    if type(position) is not int or position < 1:
        raise ValueError(f"the number of models is {position!r}")
    known = [step] if position == 1 else [before, step]  # before the first there is none
    return Moment(position, steps_of(known)[-1], float(before), bool(given))


def text_of(rule: Schedule) -> str:
    """Return a schedule's text, by which it can be had again.

    Raises
    ------
    WeightError
        There is none: it was made by hand, or its numbers are in a file.
    """
    if rule.text.lower().endswith(ENDINGS):
        raise WeightError(
            f"weights {rule} stand in a file, which may change before the state is loaded; to save "
            "a state, average with a list of the numbers"
        )
    try:
        again = schedules.parse(rule.text)
    except WeightError:
        again = None
    if again is None or again.text != rule.text or (again.update is None) != (rule.update is None):
        raise WeightError(
            f"weights {rule} are a schedule of your own, which a file cannot hold; "
            "average with one that has a text form, or keep the models"
        )
    return rule.text


def rule_of(text: str) -> Schedule:
    """Return the schedule that `text_of` wrote; a text that would open a file is refused."""
    if text.lower().endswith(ENDINGS):
        raise ValueError(f"its weights are a file's, {text}")
    return schedules.parse(text)


def total_texts(totals: Sequence[Fraction | float]) -> list[str]:
    """Return exact texts: ``5050`` or ``1/3`` of an exact total, ``0x1.8p+1`` of a rounded one.

    >>> total_texts([Fraction(3), 3.0])
    ['3', '0x1.8000000000000p+1']
    """
    return [str(total) if isinstance(total, Fraction) else total.hex() for total in totals]


def totals_of(texts: Sequence[str]) -> list[Fraction | float]:
    """Read what `total_texts` wrote.

    >>> totals_of(["3", "0x1.8p+1"])
    [Fraction(3, 1), 3.0]
    """
    totals: list[Fraction | float] = []
    for text in texts:
        if _ROUNDED.fullmatch(text):
            totals.append(float.fromhex(text))
        elif _EXACT.fullmatch(text):
            totals.append(Fraction(text))
        else:
            raise ValueError(f"{text!r} is no sum of weights")
    return totals
