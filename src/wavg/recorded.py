"""What checkpoints say of themselves: the steps they were saved at, how they were averaged.

It opens a file only when asked, and believes names (`wavg.inputs`) before it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from wavg.checkpoint import Checkpoint
from wavg.names import rises
from wavg.places import is_file
from wavg.record import KEY, Record

__all__ = ["Open", "own_steps", "recorded_steps", "recorded_weights"]

Open: TypeAlias = Callable[[str], Checkpoint]

_KEYS = ("step", "global_step", "epoch")
_TRAINER = "trainer_state.json"  # Hugging Face's Trainer puts it beside the weights


def recorded_steps(
    paths: Sequence[str], open_: Open, *, repeats: bool = False
) -> tuple[float, ...] | None:
    """Return the steps that the checkpoints' metadata tell, or None if they tell no series.

    In this order: the step in wavg's own record, a number under ``step``, ``global_step`` or
    ``epoch``, and ``global_step`` in a ``trainer_state.json`` beside the weights.
    """
    told = []
    for path in paths:
        told.append(_steps_of(path, open_))
        if not told[-1]:
            return None
    for key in (KEY, *_KEYS, _TRAINER):
        steps = [each[key] for each in told if key in each]
        if len(steps) == len(paths) and (repeats or rises(steps)):
            return tuple(steps)
    return None


def own_steps(paths: Sequence[str], open_: Open) -> tuple[float, ...] | None:
    """Return the steps of wavg's own records, or None if not every checkpoint has one."""
    steps = []
    for path in paths:
        record = Record.read(_metadata(path, open_))
        if record is None:
            return None
        steps.append(record.step)
    return tuple(steps)


def recorded_weights(path: str, open_: Open) -> str | None:
    """Return the text of the schedule that made a checkpoint, if its metadata have wavg's record.

    For one that `wavg.StreamingAverager` saved this is ``power_ema:sigma_rel=0.05``, say, and over
    a window of three ``power_ema:sigma_rel=0.05 (window=3)``, which is no schedule of any text.
    """
    record = Record.read(_metadata(path, open_))
    if record is None:
        return None
    window = record.options.get("window")
    return record.weights if window is None else f"{record.weights} (window={window})"


def _metadata(path: str, open_: Open) -> Mapping[str, str]:
    with open_(path) as checkpoint:
        return checkpoint.index.metadata


def _object(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}  # a file of another kind, which tells no step
    return found if isinstance(found, dict) else {}


def _steps_of(path: str, open_: Open) -> dict[str, float]:
    metadata = _metadata(path, open_)
    record = Record.read(metadata)
    said: dict[str, Any] = {KEY: record and record.step}
    said |= {key: metadata.get(key) for key in _KEYS}
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    state = os.path.join(folder, _TRAINER)
    if is_file(state):
        with open(state, encoding="utf-8", errors="replace") as file:
            said[_TRAINER] = _object(file.read()).get("global_step")
    return {key: number for key, value in said.items() if (number := _number(value)) is not None}


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
