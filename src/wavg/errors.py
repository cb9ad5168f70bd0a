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

Advice has the names of Python with the command line's behind them, as in ``overwrite=True
(--overwrite)``; the command line shows only its own.

A missing input stays `FileNotFoundError`, one that may not be read `PermissionError`. An argument
that makes no sense, whatever the files, is a `ValueError` or, of a wrong type, a `TypeError`.
"""

from __future__ import annotations

from typing import Any

from wavg.printable import printable

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
    r"""The root of the errors that files, weights and the system give cause to.

    Parameters
    ----------
    message
        What is wrong, where, what was expected and found, and what to do.
    details
        Raw values for programs (``path``, ``tensor``, ``index``, ``differences`` …); each becomes
        an attribute of the exception.

    Notes
    -----
    What is printed is the message, in one line, and below it the differences, if there are any, a
    line for each. Names in them are shown so that they cannot forge lines or steer a terminal.

    Examples
    --------
    >>> error = WavgError("a\nb.h5: truncated", path="a\nb.h5")
    >>> print(error)
    a\nb.h5: truncated
    >>> error.path
    'a\nb.h5'
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        for name, value in details.items():
            setattr(self, name, value)

    @property
    def message(self) -> str:
        """What is wrong, with names as they are."""
        return str(self.args[0])

    def __str__(self) -> str:
        lines = (f"  {printable(difference)}" for difference in self.differences or ())
        return "\n".join((printable(self.message), *lines))

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
