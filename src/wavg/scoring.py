"""A series of evaluations: each recorded, shown, and done once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from wavg.checkpoint import Checkpoint
from wavg.errors import WavgError
from wavg.evaluation import Command, Function, Outcome
from wavg.inputs import PathLike
from wavg.journal import Journal

__all__ = ["Scorer", "better", "described", "journal_of", "resumable"]

_TELLING = ("dtype", "include", "exclude", "align", "allow_nonfinite", "opaque_dtype")


def better(score: float, other: float, maximize: bool) -> bool:
    """Tell whether one score is better than another; equal ones are not.

    >>> better(0.9, 0.8, maximize=True), better(0.9, 0.8, maximize=False)
    (True, False)
    """
    return score > other if maximize else score < other


class Scorer:
    """Evaluates what has not been evaluated yet, and shows how far it is.

    Parameters
    ----------
    evaluator
        What scores a model.
    journal
        Knows what has been done.
    maximize
        Whether a higher score is better.
    total
        How many evaluations there will be.
    progress
        Show a bar on standard error if that is a terminal.
    """

    def __init__(
        self,
        evaluator: Function | Command,
        journal: Journal,
        *,
        maximize: bool,
        total: int,
        progress: bool,
    ) -> None:
        self._evaluator, self._journal, self._maximize = evaluator, journal, maximize
        self._best: tuple[float, str] | None = None
        self._bar: Any = None
        for key, outcome in journal.outcomes.items():
            self._compare(key, outcome)
        if progress and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="score", leave=False)
            self._show(len(journal.outcomes))

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def done(self) -> int:
        """How many evaluations there have been, those of the journal included."""
        return len(self._journal.outcomes)

    def pending(self, key: str) -> bool:
        """Whether this evaluation has still to be done."""
        return key not in self._journal.outcomes

    def outcome(self, key: str) -> Outcome:
        """Return what came of an evaluation."""
        return self._journal.outcomes[key]

    def run(self, key: str, subject: Any) -> Outcome:
        """Evaluate a model's tensors, or a path, whichever the evaluator takes."""
        try:
            self._journal.begin(key)
            outcome = self._evaluator(subject)
            self._journal.end(key, outcome)
        except BaseException:  # this process lives: the evaluation has not ended it
            with contextlib.suppress(OSError):
                self._journal.stop(key)
            raise
        self._seen(key, outcome)
        return outcome

    def fail(self, key: str, reason: str) -> None:
        """Record that there is nothing to evaluate."""
        outcome = Outcome(None, reason)
        self._journal.end(key, outcome)
        self._seen(key, outcome)

    def _seen(self, key: str, outcome: Outcome) -> None:
        self._compare(key, outcome)
        self._show(1)

    def _compare(self, key: str, outcome: Outcome) -> None:
        score = outcome.score
        if score is not None and (
            self._best is None or better(score, self._best[0], self._maximize)
        ):
            self._best = score, key

    def _show(self, done: int) -> None:
        if self._bar is not None:
            if self._best is not None:
                self._bar.set_postfix_str(f"best {self._best[0]:.5g}: {self._best[1]}", False)
            self._bar.update(done)


def journal_of(journal: PathLike | None, evaluator: Function | Command) -> str | None:
    """Return the path of a journal, if there is one that can tell this evaluator from others.

    Raises
    ------
    WavgError
        The evaluator has no name of its own.
    """
    if journal is None:
        return None
    if evaluator.text == "partial" or evaluator.text.endswith("<lambda>"):
        raise WavgError(
            f"a journal knows an evaluator by its name, and {evaluator.text} might be any; "
            "write a function with a name (def)"
        )
    return os.fspath(journal)


@contextlib.contextmanager
def resumable(journal: str | None) -> Iterator[None]:
    """Have an interruption tell how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        told = (
            f"interrupted; the same call with the journal {journal} goes on from here"
            if journal
            else "interrupted; with a journal (--journal FILE) a later run can go on"
        )
        raise KeyboardInterrupt(told) from None


def described(
    evaluator: Function | Command,
    maximize: bool,
    steps: Sequence[float],
    checkpoints: Iterable[Checkpoint],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a journal tells two series of evaluations apart by."""
    return {
        "evaluate": evaluator.text,
        "maximize": maximize,
        "steps": list(steps),
        "inputs": [
            [os.path.realpath(identity.path), identity.size, identity.mtime_ns]
            for checkpoint in checkpoints
            for identity in checkpoint.index.files
        ],
        "options": {name: options[name] for name in _TELLING},
    }
