"""Average the checkpoints of a training run, for any framework.

>>> import wavg
>>> wavg.average([[1.0, 2.0], [3.0, 4.0]])
[array(2.), array(3.)]
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from wavg._version import __version__ as __version__
from wavg.average import average
from wavg.checkpoint import Checkpoint
from wavg.errors import (
    CheckpointChangedError,
    CheckpointFormatError,
    InputError,
    MemoryBudgetError,
    MissingDependencyError,
    NonFiniteError,
    OutOfMemoryError,
    OutputError,
    OutputExistsError,
    RecordError,
    StructureMismatchError,
    WavgError,
    WeightError,
)
from wavg.files import Report, average_checkpoints, plan_average
from wavg.plan import Plan
from wavg.record import Record, Source
from wavg.stored import load, open_checkpoint, save
from wavg.weights import (
    Schedule,
    bema,
    cumulative_window,
    dema,
    ema,
    equal,
    explicit,
    exponential,
    figures,
    lawa,
    linear,
    polynomial,
    polynomial_decay,
    post_hoc_ema,
    power_ema,
    schedule_free,
    wsm,
)

if _TYPE_CHECKING:
    from wavg.results import Score, Sweep
    from wavg.selection import best_checkpoints
    from wavg.soups import Soup, Trial, soup
    from wavg.streaming import StreamingAverager
    from wavg.sweeps import sweep
    from wavg.verification import Verification, verify

__all__ = [
    "Checkpoint",
    "CheckpointChangedError",
    "CheckpointFormatError",
    "InputError",
    "MemoryBudgetError",
    "MissingDependencyError",
    "NonFiniteError",
    "OutOfMemoryError",
    "OutputError",
    "OutputExistsError",
    "Plan",
    "Record",
    "RecordError",
    "Report",
    "Schedule",
    "Score",
    "Soup",
    "Source",
    "StreamingAverager",
    "StructureMismatchError",
    "Sweep",
    "Trial",
    "Verification",
    "WavgError",
    "WeightError",
    "average",
    "average_checkpoints",
    "bema",
    "best_checkpoints",
    "cumulative_window",
    "dema",
    "ema",
    "equal",
    "explicit",
    "exponential",
    "figures",
    "lawa",
    "linear",
    "load",
    "open_checkpoint",
    "plan_average",
    "polynomial",
    "polynomial_decay",
    "post_hoc_ema",
    "power_ema",
    "save",
    "schedule_free",
    "soup",
    "sweep",
    "verify",
    "wsm",
]

# Not every program needs these: they are imported when they are first asked for.
_LATER = {
    "Score": "results",
    "Soup": "soups",
    "StreamingAverager": "streaming",
    "Sweep": "results",
    "Trial": "soups",
    "Verification": "verification",
    "best_checkpoints": "selection",
    "soup": "soups",
    "sweep": "sweeps",
    "verify": "verification",
}


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
