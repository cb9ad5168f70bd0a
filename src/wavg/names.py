"""What the names of a run's checkpoints tell: their order, and their steps.

It knows texts only, and looks at no file.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = [
    "in_order",
    "is_numbered",
    "named_steps",
    "natural_key",
    "numbers_say_otherwise",
    "read_steps",
    "rises",
]

_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_NAMED = (
    r"step[=_-]?(\d+)",
    r"(?:iteration|(?<![a-z])iter|(?<![a-z])it)[=_-]?(\d+)",
    r"(?:epoch|(?<![a-z])ep)[=_-]?(\d+)",
)


def natural_key(path: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts ``model_9`` before ``model_10``.

    >>> sorted(["m_10.h5", "m_9.h5", "m.h5"], key=natural_key)
    ['m.h5', 'm_9.h5', 'm_10.h5']
    """
    # Text before numbers: the end of a name must not sort behind the digits of a longer one.
    return [
        (1, int(part), part) if part.isascii() and part.isdigit() else (0, 0, part)
        for part in re.split(r"([0-9]+)", path)
    ]


def in_order(paths: Iterable[str]) -> list[str]:
    """Sort by the number behind ``step``, ``iter`` or ``epoch`` if all have one, else naturally.

    Natural order goes by whole numbers before decimals, which are metrics, where names differ in
    numbers alone.

    >>> in_order(["loss0.9-epoch10.h5", "loss1.2-epoch9.h5"])
    ['loss1.2-epoch9.h5', 'loss0.9-epoch10.h5']
    >>> in_order(["val_loss-0.4-12.h5", "val_loss-0.5-3.h5"])
    ['val_loss-0.5-3.h5', 'val_loss-0.4-12.h5']
    """
    result = sorted(paths, key=natural_key)
    for names in _names(result):
        for pattern in _NAMED:
            numbers = [_step(name, pattern) for name in names]
            if all(number is not None for number in numbers) and len({*numbers}) == len(numbers):
                ranked = sorted(zip(numbers, range(len(result)), strict=True))
                return [result[position] for _, position in ranked]
    for names in _names(result):
        keys = _whole_numbers(names)
        if keys and len({*keys}) == len(keys):
            return [path for _, path in sorted(zip(keys, result, strict=True))]
    return result


def _whole_numbers(names: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the whole numbers of names that differ in numbers alone, some of them decimals.

    Where one name has a decimal, the number there is none of them in any name.
    """
    if len({_NUMBER.sub("#", name) for name in names}) != 1:
        return []
    columns = list(zip(*map(_NUMBER.findall, names), strict=True))
    whole = [column for column in columns if not any("." in number for number in column)]
    if not whole or len(whole) == len(columns):
        return []
    return [tuple(map(int, row)) for row in zip(*whole, strict=True)]


def numbers_say_otherwise(paths: Sequence[str]) -> bool:
    """Whether the numbers of the names suggest another order."""
    for names in _names(paths):
        numbers = [_step(name, None) for name in names]
        known = [number for number in numbers if number is not None]
        if len({*known}) == len(paths):
            return known != sorted(known)
        if known:
            return False
    return False


def read_steps(
    paths: Sequence[str],
    recorded: Callable[[Sequence[str]], tuple[float, ...] | None] | None = None,
) -> tuple[float, ...]:
    """Read each checkpoint's step from its name; 1 … N where that is not an increasing series.

    A number behind ``step`` counts first, then one behind ``iter`` or ``it``, then one behind
    ``epoch`` or ``ep``, then the last whole number of the name; first of the files' names, then of
    their folders'. Decimals, such as a loss, are no steps. Where names tell nothing, `recorded` is
    asked.

    >>> read_steps(["run/model_490.h5", "run/model_500.h5"])
    (490.0, 500.0)
    >>> read_steps(["w.05-0.81.h5", "w.06-0.72.h5"]), read_steps(["best.h5", "last.h5"])
    ((5.0, 6.0), (1.0, 2.0))
    """
    counted = tuple(float(position) for position in range(1, len(paths) + 1))
    return named_steps(paths) or (recorded and recorded(paths)) or counted


def named_steps(paths: Sequence[str], *, repeats: bool = False) -> tuple[float, ...] | None:
    """Return the steps that the names tell, or None if they tell no increasing series.

    With `repeats` it may be any series, if names differ at all.

    >>> named_steps(["best.h5", "last.h5"]) is None
    True
    >>> named_steps(["ema-0.05-10.h5", "ema-0.10-10.h5"], repeats=True)
    (10.0, 10.0)
    """
    for names in _names(paths):
        for pattern in (*_NAMED, None):
            steps = [_step(name, pattern) for name in names]
            known = [step for step in steps if step is not None]
            series = len({*names}) > 1 or len(paths) == 1 if repeats else rises(known)
            if len(known) == len(paths) and series:
                return tuple(known)
    return None


def rises(steps: Sequence[float]) -> bool:
    """Whether every step is above the one before."""
    return all(a < b for a, b in itertools.pairwise(steps))


def _names(paths: Sequence[str]) -> Iterator[list[str]]:
    """Yield the files' names without ending, then those of their folders, and of the folders' own.

    The last where they tell several apart, as of the parts of a pipeline, ``checkpoint-9/unet``.
    """
    split = [os.path.split(os.path.abspath(path)) for path in paths]
    yield [os.path.splitext(name)[0] for _, name in split]
    yield [os.path.basename(folder) for folder, _ in split]
    above = [os.path.basename(os.path.dirname(folder)) for folder, _ in split]
    if len({*above}) == len(paths) > 1:
        yield above


def _step(name: str, pattern: str | None) -> float | None:
    if pattern is not None:
        match = re.search(pattern, name, re.IGNORECASE)
        return float(match[1]) if match else None
    numbers = [number for number in re.findall(r"\d+(?:\.\d+)?", name) if "." not in number]
    return float(numbers[-1]) if numbers else None


def is_numbered(path: str) -> bool:
    """Whether a file's name has a number."""
    return _step(os.path.splitext(os.path.basename(path))[0], None) is not None
