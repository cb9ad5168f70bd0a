"""Evaluators: a Python function of a model's tensors, or a command on a checkpoint's file.

Whatever an evaluator does (raise, hang, be killed, print nothing) becomes an `Outcome`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from wavg.errors import WavgError

__all__ = ["Command", "Evaluate", "Function", "Outcome", "evaluator_of"]

Tensors: TypeAlias = "dict[str, npt.NDArray[Any]]"
Evaluate: TypeAlias = "Callable[[Tensors], Any] | str"

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?|nan|inf(?:inity)?)(?!\w)",
    re.IGNORECASE,
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
            score, examples = None, None
            told = " ".join(str(problem).split())
            error = f"{type(problem).__name__}: {told}" if told else type(problem).__name__
        return _checked(score, error, examples, time.perf_counter() - begun)


def _read(result: Any) -> tuple[float, npt.NDArray[np.float64] | None]:
    values = np.asarray(result)
    if values.dtype.kind not in "biuf" or not values.size:
        raise TypeError(
            f"the evaluator returned {_short(result)}; expected a number, or an array of the "
            "scores of single examples"
        )
    if values.ndim == 0:
        return float(values), None
    examples = values.astype(np.float64).reshape(-1)
    return float(examples.mean()), examples


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

    The last number that it prints on standard output is the score.

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
    'it printed no number'
    """

    takes_files = True

    def __init__(self, text: str, timeout: float | None = None) -> None:
        import shlex

        try:
            self._words = shlex.split(text)
        except ValueError as error:
            raise WavgError(f"cannot split the command {text!r} into words: {error}") from None
        if not any("{}" in word for word in self._words[1:]):
            raise WavgError(
                f"the command {text!r} has no {{}}, which stands for the checkpoint to score; "
                "write it as in 'python score.py {}'"
            )
        self.text, self._timeout = text, timeout

    def __call__(self, subject: Any) -> Outcome:
        """Evaluate a checkpoint's file or folder."""
        begun = time.perf_counter()
        words = [word.replace("{}", os.fspath(subject)) for word in self._words]
        try:
            output, error = self._run(words)
        except OSError as problem:
            output, error = "", f"cannot run {words[0]}: {problem.strerror}"
        score = None
        if not error:
            numbers = _NUMBER.findall(output)
            score = float(numbers[-1]) if numbers else None
            error = "" if numbers else "it printed no number"
        return _checked(score, error, None, time.perf_counter() - begun)

    def _run(self, words: list[str]) -> tuple[str, str]:
        """Return what it printed, and why it failed if it did."""
        import signal
        import subprocess  # with the two above half of what `import wavg` would cost

        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # so that all it starts can be ended with it
        )
        try:
            output, told = process.communicate(timeout=self._timeout)
        except subprocess.TimeoutExpired:
            return "", f"it took more than {self._timeout:g} s and was killed"
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        lines = told.split("\n")
        last = next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
        code = process.returncode
        if code < 0:
            return output, f"it was killed by {_signal_name(-code)}{last}"
        return output, f"it ended with exit code {code}{last}" if code else ""


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
            "say how to score a model: either with a function (evaluate, --evaluate) or with a "
            "command (evaluate_command, --evaluate-command)"
        )
    if timeout is not None and not timeout > 0:
        raise WavgError(f"timeout must be a positive number of seconds, not {timeout}")
    if command is not None:
        return Command(command, timeout)
    if timeout is not None:
        raise WavgError(
            "a function in this process cannot be timed out; use a command (evaluate_command, "
            "--evaluate-command), which can"
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
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # a command's own path is that of its script
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise WavgError(f"cannot import the evaluator {text!r}: {error}") from error
    if not callable(found):
        raise WavgError(f"the evaluator {text!r} is {_short(found)}, not a function")
    function: Callable[[Tensors], Any] = found
    return function
