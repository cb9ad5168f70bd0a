"""The exception tree, and nothing else.

::

    WavgError
    ├── CheckpointFormatError   (ValueError)       a file is damaged, hostile or of an unknown kind
    ├── CheckpointChangedError  (RuntimeError)     an input changed while it was being read
    ├── RecordError             (ValueError)       what a file says of its origin is of no use
    ├── StructureMismatchError  (ValueError)       the inputs do not hold the same tensors
    ├── WeightError             (ValueError)       a schedule or a list of weights makes no sense
    ├── NonFiniteError          (ValueError)       NaN or infinity in an input, or an overflow
    ├── InputError              (OSError)          the system cannot read an input
    ├── OutputError             (OSError)          the output cannot be written
    │   └── OutputExistsError   (FileExistsError)  the output exists and was not to be replaced
    ├── MemoryBudgetError       (ValueError)       the work does not fit the memory allowed
    ├── OutOfMemoryError        (MemoryError)      the system has no memory, or thread, for it
    └── MissingDependencyError  (ImportError)      an optional package is needed

A missing input stays `FileNotFoundError`, a wrong argument type `TypeError`.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CheckpointChangedError",
    "CheckpointFormatError",
    "InputError",
    "MemoryBudgetError",
    "MissingDependencyError",
    "NonFiniteError",
    "OutOfMemoryError",
    "OutputError",
    "OutputExistsError",
    "RecordError",
    "StructureMismatchError",
    "WavgError",
    "WeightError",
]


class WavgError(Exception):
    """The root of every error that wavg raises on purpose.

    Parameters
    ----------
    message
        What is wrong, where, what was expected and found, and what to do.
    details
        Raw values for programs (``path``, ``tensor``, ``index``, ``differences`` …); each becomes
        an attribute of the exception.

    Examples
    --------
    >>> error = WavgError("model.h5: truncated", path="model.h5")
    >>> error.path
    'model.h5'
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        for name, value in details.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name in ("path", "tensor", "index", "differences"):
            return None  # details that this error has nothing to say about
        raise AttributeError(name)


class CheckpointFormatError(WavgError, ValueError):
    """A file is not a checkpoint wavg can read: damaged, hostile, or of another kind."""


class CheckpointChangedError(WavgError, RuntimeError):
    """An input changed while it was being read; nothing was published."""


class RecordError(WavgError, ValueError):
    """A file's record of how it came to be is missing, damaged, newer, or tells too little."""


class StructureMismatchError(WavgError, ValueError):
    """The inputs do not hold the same tensors; ``differences`` lists every difference."""


class WeightError(WavgError, ValueError):
    """A schedule cannot be understood, or its weights cannot be used."""


class NonFiniteError(WavgError, ValueError):
    """NaN or infinity in an input, or a result outside the range of its dtype."""


class InputError(WavgError, OSError):
    """The system cannot read an input that it has opened: a failing disk, a lost network."""


class OutputError(WavgError, OSError):
    """The output could not be written; the message says how things stand there now."""


class OutputExistsError(OutputError, FileExistsError):
    """The output exists, and replacing it was not asked for."""


class MemoryBudgetError(WavgError, ValueError):
    """The work cannot be done within the memory allowed."""


class OutOfMemoryError(WavgError, MemoryError):
    """The system has no memory, or no thread, for the work; nothing was published."""


class MissingDependencyError(WavgError, ImportError):
    """An optional package is needed for what was asked."""
