"""Running sums give every row: the arithmetic of prefixes, on weights alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wavg
from wavg.prefixes import most_sums, passes, programme


def rows_of(shape, count):
    """A schedule's rows for the newest 1 … count, newest first."""
    return [np.asarray(shape(n), np.float64)[::-1] for n in range(1, count + 1)]


def carried_out(steps):
    """What each row's weights come to when the steps are taken with unit vectors as models."""
    kept = np.zeros((0, len(steps)))
    found = {}
    for position, step in enumerate(steps):
        column = np.vstack([kept, np.eye(len(steps))[position]])
        found.update(zip(step.ended, step.outputs @ column, strict=True))
        kept = step.sums @ column
    assert not len(kept)
    return found


def worst_error(rows, steps):
    """The largest error of any weight, relative to its row's."""
    found = carried_out(steps)
    assert found.keys() == set(range(len(rows)))
    errors = [0.0]
    for number, row in enumerate(rows):
        whole = np.zeros(len(steps))
        whole[: len(row)] = row
        scale = np.abs(row).sum()
        errors.append(np.abs(found[number] - whole).max() / (scale or 1.0))
    return max(errors)


SHAPES = {
    "equal": (lambda n: np.ones(n), 1),
    "linear": (lambda n: np.arange(1.0, n + 1), 2),
    "exponential": (lambda n: wavg.exponential(alpha=2)(range(n)), 1),
    "squares": (lambda n: np.arange(1.0, n + 1) ** 2, 3),
    "ema": (lambda n: np.r_[0.9 ** (n - 1), 0.1 * 0.9 ** np.arange(n - 2, -1.0, -1)], 1),
    "power ema": (lambda n: np.diff(np.r_[0.0, np.arange(21.0 - n, 21.0) ** 8]), 1),
    "every second": (lambda n: (np.arange(n)[::-1] % 2 == 0).astype(float), 1),
    "decay by square root": (lambda n: -np.diff(1 - np.sqrt(np.arange(n + 1) / n)), 10),
    "half cosine": (lambda n: np.diff(-np.cos(np.pi * np.arange(n + 1) / n)), 10),
    "signs": (lambda n: np.where(np.arange(n) == 0, -0.5, 1.0), 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_row_comes_out_of_few_sums(name):
    shape, most = SHAPES[name]
    rows = rows_of(shape, 20)
    steps = programme(rows)
    assert worst_error(rows, steps) < 1e-13
    assert 1 <= most_sums(steps) <= most


def test_a_plain_sum_stays_one():
    for step in programme(rows_of(np.ones, 9))[:-1]:
        assert set(step.sums.ravel()) | set(step.outputs.ravel()) == {1.0}


@pytest.mark.parametrize("name", ["equal", "linear", "squares", "every second"])
def test_whole_weights_come_from_whole_multiples(name):
    rows = rows_of(SHAPES[name][0], 60)
    steps = programme(rows)
    for step in steps:
        assert np.array_equal(step.sums, np.round(step.sums))
        assert np.array_equal(step.outputs, np.round(step.outputs))
        assert np.abs(step.outputs[:, :-1]).max(initial=0) <= 61**2
    assert worst_error(rows, steps) < 1e-15


@pytest.mark.parametrize("power", [4, 5, 8])
def test_high_powers_stay_well_conditioned(power):
    rows = rows_of(lambda n: np.arange(1.0, n + 1) ** power, 60)
    steps = programme(rows)
    assert worst_error(rows, steps) < 1e-9
    assert most_sums(steps) <= power + 1


def test_schedules_share_sums():
    equal, linear = (rows_of(SHAPES[name][0], 30) for name in ("equal", "linear"))
    assert most_sums(programme(equal + linear)) == 2

    def decay(alpha):
        return lambda n: wavg.exponential(alpha=alpha)(range(n))

    grid = [row for a in range(1, 31) for row in rows_of(decay(a / 3), 30)]
    assert most_sums(programme(grid)) < 20  # of 30 decays


def test_no_more_sums_than_rows_or_models_on_either_side():
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=n) for n in range(1, 21)]
    steps = programme(rows)
    assert worst_error(rows, steps) < 1e-12
    for position, step in enumerate(steps, start=1):
        assert len(step.sums) <= min(position, 20 - position)


values = st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5, 3.0, 1e-3, -7.0])


@given(st.lists(st.lists(values, min_size=1, max_size=7), min_size=1, max_size=9))
@settings(deadline=None, max_examples=60)
def test_any_rows_of_any_lengths_come_out(lists):
    rows = [np.array(row) for row in lists]
    assert worst_error(rows, programme(rows)) < 1e-9


def test_the_check_of_rows_sees_a_planted_error():
    rows = rows_of(np.ones, 4)
    steps = programme(rows)
    steps[2] = steps[2]._replace(outputs=steps[2].outputs * 1.001)
    assert worst_error(rows, steps) > 1e-4


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_passes_keep_the_limit_and_leave_no_row_out(limit):
    rows = [
        row for name in ("equal", "linear", "half cosine") for row in rows_of(SHAPES[name][0], 12)
    ]
    groups = passes(rows, limit)
    assert sorted(position for group in groups for position in group) == list(range(len(rows)))
    assert all(most_sums(programme([rows[p] for p in group])) <= limit for group in groups)
    assert len(groups) > 1


def test_there_may_be_no_rows():
    assert programme([]) == []
    assert passes([], 3) == []
