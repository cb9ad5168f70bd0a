"""The search of a greedy soup: whose turn it is, and who stays, from running sums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from wavg.errors import WavgError
from wavg.evaluation import Outcome, is_tie
from wavg.prefix_sums import PrefixSums
from wavg.prefixes import Step
from wavg.scoring import Scorer, better
from wavg.subjects import Subjects

__all__ = ["Turn", "evaluated", "greedy"]

F64 = npt.NDArray[np.float64]


class Turn(NamedTuple):
    """What came of a checkpoint's turn: the outcome with it, whether it joined.

    `tie` tells that the score differs from the soup's before by no more than the standard error.
    """

    position: int
    outcome: Outcome
    taken: bool
    tie: bool = False


def _key(positions: Iterable[int]) -> str:
    return "checkpoints " + ", ".join(str(position + 1) for position in sorted(positions))


def evaluated(subjects: Subjects, scorer: Scorer, positions: Sequence[int]) -> Outcome:
    """Return what came of a checkpoint alone, evaluated now if need be."""
    key = _key(positions)
    if scorer.pending(key):
        with contextlib.closing(subjects.take(positions[0], alone=True)) as taken:
            for _, model, problem in taken:
                if problem:
                    scorer.fail(key, problem)
                else:
                    scorer.run(key, model)
    return scorer.outcome(key)


def greedy(
    subjects: Subjects,
    scorer: Scorer,
    own: Mapping[int, float],
    maximize: bool,
    budget: int | None,
) -> tuple[list[Turn], list[int], Outcome]:
    """Give each checkpoint its turn, best own score first; return turns, members, soup's outcome.

    Parameters
    ----------
    subjects, scorer
        The checkpoints, and what scores them.
    own
        The checkpoints' own scores by their positions; others stay out.
    maximize
        Whether a higher score is better.
    budget
        The most evaluations in all.
    """
    sign = -1.0 if maximize else 1.0
    order = sorted(own, key=lambda position: (sign * own[position], -position))
    turns: list[Turn] = []
    chosen: list[int] = []
    best = Outcome(None)
    with subjects.sums(2) as sums:  # that of the soup, and that with the checkpoint on trial
        kept, base = 0, 0
        for position in order:
            members = sorted([*chosen, position])
            key = _key(members)
            if scorer.pending(key) and budget is not None and scorer.done >= budget:
                told = Outcome(None, "not tried: the budget is spent")
                turns.append(Turn(position, told, False))
                continue
            fresh = scorer.pending(key)
            if not chosen:
                outcome = evaluated(subjects, scorer, members)
            elif fresh:
                before, joined = _rows(kept, base)
                step = Step(np.array([before, joined]), joined[None], (0,))
                with contextlib.closing(
                    subjects.take(position, sums, step, {0: len(members)}, reference=members[-1])
                ) as taken:
                    for _, model, problem in taken:
                        if problem:
                            scorer.fail(key, problem)
                        else:
                            scorer.run(key, model)
                kept, base = 2, 0
                outcome = scorer.outcome(key)
            else:
                outcome = scorer.outcome(key)
            joins = outcome.score is not None and (
                best.score is None or not better(best.score, outcome.score, maximize)
            )
            turns.append(Turn(position, outcome, joins, is_tie(outcome, best)))
            if not joins:
                continue
            if chosen and fresh:
                base = 1
            else:
                _add(subjects, sums, position, _rows(kept, base)[1])
                kept, base = 1, 0
            chosen, best = members, outcome
    for position in reversed(range(len(subjects.checkpoints))):
        if position not in own:
            key = _key([position])
            error = "no recorded metric" if scorer.pending(key) else scorer.outcome(key).error
            turns.append(Turn(position, Outcome(None, error), False))
    if not chosen:
        reason = next((turn.outcome.error for turn in turns), "there was none")
        raise WavgError(
            f"there is no soup: no checkpoint could be scored; the first failed so: {reason}"
        )
    return turns, chosen, best


def _rows(kept: int, base: int) -> tuple[F64, F64]:
    """Return by the sums kept and the next checkpoint: the soup as it is, and with that one."""
    before = np.zeros(kept + 1)
    before[base] = float(kept > 0)
    joined = before.copy()
    joined[-1] = 1.0
    return before, joined


def _add(subjects: Subjects, sums: PrefixSums, position: int, row: F64) -> None:
    """Have a checkpoint join without being scored."""
    step = Step(row[None], np.empty((0, len(row))), ())
    for _ in subjects.take(position, sums, step):
        pass
