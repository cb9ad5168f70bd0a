"""Evaluators: a Python function of a model's tensors, or a command on a checkpoint's file.

Whatever an evaluator does (raise, hang, be killed, print nothing) becomes an `Outcome`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import numbers
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from wavg.dtypes import dtype_of
from wavg.errors import WavgError

__all__ = ["Command", "Evaluate", "Function", "Outcome", "direction_of", "evaluator_of", "is_tie"]

Tensors: TypeAlias = "dict[str, npt.NDArray[Any]]"
Evaluate: TypeAlias = "Callable[[Tensors], Any] | str"

# A number that stands alone: no part of a word, a date, a time, a fraction, nor with a unit, nor
# what follows a plus-minus sign.
_NUMBER = re.compile(
    r"""(?<![\w.]) (?<![\w.][-+]) (?<!\d[:/]) (?<!±) (?<!±\ ) (?<!\+/) (?<!\+/-) (?<!\+/-\ )
    [-+]? (?: (?: \d+ (?:,\d{3})* (?:\.\d*)? | \.\d+ ) (?:e[-+]?\d+)? | nan | inf(?:inity)? )
    (?! \.?\w | ,\d{3}(?!\d) | [:/+-]\d )""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What came of one evaluation.

    Attributes
    ----------
    score
        A finite number, or None where it failed.
    error
        Why it failed; else empty.
    examples
        Scores of single examples, whose mean is the score, if the evaluator tells them.
    seconds
        How long it took.
    """

    score: float | None
    error: str = ""
    examples: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    seconds: float = 0.0

    @property
    def standard_error(self) -> float | None:
        """The standard error of the score, from those of at least two examples."""
        return None if self.examples is None else standard_error(self.examples)


def standard_error(values: npt.NDArray[np.float64]) -> float | None:
    """Return the standard error of a mean, or None of fewer than two values.

    >>> standard_error(np.array([0.0, 1.0, 1.0, 0.0]))
    0.28867513459481287
    """
    if len(values) < 2:
        return None
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def is_tie(one: Outcome, other: Outcome) -> bool:
    """Whether two scores differ by no more than the standard error of their difference.

    That of scores of the same examples is taken pair by pair. Without scores of examples nothing
    is known, and nothing is a tie.

    >>> one, other = np.array([0.0, 1.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0, 1.0])
    >>> is_tie(Outcome(0.5, examples=one), Outcome(0.75, examples=other))
    True
    """
    if one.examples is None or other.examples is None or one.score is None or other.score is None:
        return False
    if len(one.examples) == len(other.examples):
        error = standard_error(one.examples - other.examples)
    elif one.standard_error is None or other.standard_error is None:
        return False
    else:
        error = math.hypot(one.standard_error, other.standard_error)
    # One example of all differing makes both sides equal, but for rounding.
    return error is not None and abs(one.score - other.score) <= error * (1 + 1e-9)


def direction_of(maximize: Any) -> bool:
    """Return whether a higher score is better; refuse what might mean either.

    Raises
    ------
    TypeError
        Anything but True and False.
    """
    if not isinstance(maximize, (bool, np.bool_)):
        raise TypeError(f"maximize must be True or False, not {maximize!r}")
    return bool(maximize)


class Function:
    """An evaluator in this process; it gets an ordered dict of arrays.

    Parameters
    ----------
    function
        Returns a number, or the scores of single examples.
    text
        What to call it in reports and journals.
    """

    takes_files = False

    def __init__(self, function: Callable[[Tensors], Any], text: str) -> None:
        self._function, self.text = function, text

    def __call__(self, subject: Any) -> Outcome:
        """Evaluate a model's tensors."""
        begun = time.perf_counter()
        try:
            score, examples = _read(self._function(subject))
            error = ""
        except (Exception, SystemExit) as problem:
            score, examples, error = None, None, _told(problem)
        return _checked(score, error, examples, time.perf_counter() - begun)


def _told(problem: BaseException) -> str:
    name = type(problem).__name__
    try:
        told = " ".join(str(problem).split())
    except Exception:  # a message that cannot be made is none
        told = ""
    return f"{name}: {told}" if told else name


def _read(result: Any) -> tuple[float, npt.NDArray[np.float64] | None]:
    values = np.asarray(result)
    if not values.size or not _numeric(values):
        raise TypeError(
            f"the evaluator returned {_short(result)}; expected a number, or an array of the "
            "scores of single examples"
        )
    examples = values.astype(np.float64)
    if values.ndim == 0:
        return float(examples), None
    return float(examples.mean()), examples.reshape(-1)


def _numeric(values: npt.NDArray[Any]) -> bool:
    """Whether there are real numbers: also of short formats, and fractions and decimals."""
    if values.dtype.kind == "O":
        return all(
            isinstance(v, numbers.Number) and not isinstance(v, complex) for v in values.flat
        )
    entry = dtype_of(values.dtype)
    return values.dtype.kind in "biuf" or (entry is not None and entry.kind == "float")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _checked(
    score: float | None, error: str, examples: npt.NDArray[np.float64] | None, seconds: float
) -> Outcome:
    if score is not None and not math.isfinite(score):
        return Outcome(None, f"the score is {score}", None, seconds)
    return Outcome(score, error, examples, seconds)


class Command:
    """An evaluator that is a command, run without a shell; ``{}`` stands for a checkpoint's path.

    The last number that it prints on standard output is the score; one with a unit (``12.5s``) or
    within a word, a date or a time is none. What it started is ended with it.

    Parameters
    ----------
    text
        The command, in words as a shell would split them.
    timeout
        Seconds after which it is killed, with all that it started; None waits.

    Examples
    --------
    >>> Command("echo accuracy of {}: 0.93")("model_10.h5").score
    0.93
    >>> Command("echo nothing to see in {}")("model.h5").error
    'it printed no number that stands alone'
    """

    takes_files = True

    def __init__(self, text: str, timeout: float | None = None) -> None:
        import shlex
        import shutil

        try:
            self._words = shlex.split(text)
        except ValueError as error:
            raise WavgError(f"cannot split the command {text!r} into words: {error}") from None
        if not any("{}" in word for word in self._words[1:]):
            raise WavgError(
                f"the command {text!r} has no {{}}, which stands for the checkpoint to score; "
                "write it as in 'python score.py {}'"
            )
        if "{}" not in self._words[0] and shutil.which(self._words[0]) is None:
            raise WavgError(f"cannot run {self._words[0]}: there is no such program")
        self.text, self._timeout = text, timeout

    def __call__(self, subject: Any) -> Outcome:
        """Evaluate a checkpoint's file or folder."""
        begun = time.perf_counter()
        path = os.fspath(subject)
        words = [word.replace("{}", path) for word in self._words]
        try:
            output, error = self._run(words)
        except OSError as problem:
            output, error = "", f"cannot run {words[0]}: {problem.strerror}"
        score = None
        if not error:
            found = _NUMBER.findall(output.replace(path, " "))  # whose numbers are no score
            if not found:
                error = "it printed no number" + " that stands alone" * any(
                    map(str.isdigit, output)
                )
            elif "," in found[-1]:
                error = f"it printed {found[-1]}: write the score without commas"
            else:
                score = float(found[-1])
        return _checked(score, error, None, time.perf_counter() - begun)

    def _run(self, words: list[str]) -> tuple[str, str]:
        """Return what it printed, and why it failed if it did."""
        import signal
        import subprocess  # with the two above half of what `import wavg` would cost
        import tempfile

        # Files, not pipes: these would wait for whoever it left behind to close them.
        with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as complained:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=complained,
                start_new_session=True,  # so that all it starts can be ended with it
            )
            try:
                process.wait(self._timeout)
            except subprocess.TimeoutExpired:
                return "", f"it took more than {self._timeout:g} s and was killed"
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    if hasattr(os, "killpg"):
                        os.killpg(process.pid, signal.SIGKILL)
                    else:  # Windows: what it has started lives on
                        process.kill()
                process.wait()
            output, told = _text(printed), _text(complained)
        lines = told.split("\n")
        last = next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
        code = process.returncode
        if code < 0:
            return output, f"it was killed by {_signal_name(-code)}{last}"
        return output, f"it ended with exit code {code}{last}" if code else ""


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _signal_name(number: int) -> str:
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def evaluator_of(
    evaluate: Evaluate | None, command: str | None, timeout: float | None
) -> Function | Command:
    """Return the evaluator that a function, ``module:function`` or a command stands for.

    Raises
    ------
    WavgError
        There is none, or two; a module or function that is not there; no ``{}`` in the command.
    """
    if (evaluate is None) == (command is None):
        raise WavgError(
            "say how to score a model, in one way: evaluate (--evaluate) with a function, or "
            "evaluate_command (--evaluate-command) with a command"
        )
    if timeout is not None and not timeout > 0:
        raise WavgError(f"timeout must be a positive number of seconds, not {timeout}")
    if command is not None:
        return Command(command, timeout)
    if timeout is not None:
        raise WavgError(
            "a function in this process cannot be timed out; evaluate_command (--evaluate-command) "
            "runs a command, which can"
        )
    if isinstance(evaluate, str):
        return Function(_imported(evaluate), evaluate)
    if not callable(evaluate):
        raise TypeError(f"evaluate must be a function or its 'module:function', not {evaluate!r}")
    module, name = getattr(evaluate, "__module__", ""), getattr(evaluate, "__qualname__", "")
    return Function(evaluate, f"{module}:{name}" if name else type(evaluate).__qualname__)


def _imported(text: str) -> Callable[[Tensors], Any]:
    module, _, name = text.partition(":")
    if not module or not name:
        raise WavgError(f"cannot understand the evaluator {text!r}; write module:function")
    if "/" in module or module.endswith(".py"):
        plain = os.path.basename(module).removesuffix(".py")
        raise WavgError(
            f"the evaluator {text!r} is to be the name of a module, {plain}:{name}, as one imports "
            "it; run wavg where it is, or put its folder into PYTHONPATH"
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # a command's own path is that of its script
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise WavgError(f"cannot import the evaluator {text!r}: {_told(error)}") from error
    if not callable(found):
        raise WavgError(f"the evaluator {text!r} is {_short(found)}, not a function")
    function: Callable[[Tensors], Any] = found
    return function
