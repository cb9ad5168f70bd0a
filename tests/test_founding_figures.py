"""What docs/founding.md concludes in words is in the recorded figures."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

SCHEDULES = ("equal", "linear", "exponential")
PUBLISHED, ANEW, FAST = "as published", "points drawn anew", "ten times the rate"


@pytest.fixture(scope="module")
def tables():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
        return importlib.import_module("founding_tables")


def errors_above(differences):
    """By how many standard errors a mean lies above zero."""
    return differences.mean() / differences.std(ddof=1) * np.sqrt(len(differences))


def test_there_are_fifty_seeds_of_three_ways_and_a_hundred_models_of_each(tables):
    for way in (PUBLISHED, ANEW, FAST):
        assert [run["seed"] for run in tables.runs(way)] == list(range(50))
        for name in ("alone", *SCHEDULES):
            assert tables.scores(way, name).shape == (50, 100)


def test_the_published_ranges_are_those_the_page_names(tables):
    alone = tables.PUBLISHED["alone"]
    averages = [score for name in SCHEDULES for score in tables.PUBLISHED[name]]
    assert (min(alone), max(alone), min(averages), max(averages)) == (802, 814, 807, 815)


def test_the_published_run_is_one_of_ours_its_models_farther_apart_than_most(tables):
    alone = tables.scores(PUBLISHED, "alone")[:, :10]
    theirs = np.array(tables.PUBLISHED["alone"])
    assert alone.min() <= theirs.min() <= theirs.max() <= alone.max()
    assert 0 < (np.ptp(alone, axis=1) >= np.ptp(theirs)).mean() < 0.3
    assert np.ptp(alone, axis=0).min() > np.median(np.ptp(alone, axis=1))  # seeds, and epochs


@pytest.mark.parametrize("way", [PUBLISHED, ANEW])
@pytest.mark.parametrize("name", SCHEDULES)
def test_in_a_settled_run_ten_change_next_to_nothing(tables, way, name):
    for over in ("mean", "newest"):
        found = tables.gain(way, name, 10, over)
        assert abs(found.mean()) < 1.2
        assert 0.2 < (found < 0).mean() < 0.6
    ends = tables.at_ends(way, name) - tables.at_ends(way, "alone")
    assert abs(ends.mean()) < 0.3


@pytest.mark.parametrize("name", SCHEDULES)
def test_where_epochs_bounce_ten_help_on_average_and_hurt_in_a_third_of_the_runs(tables, name):
    assert errors_above(tables.gain(FAST, name, 10, "mean")) > 3
    found = tables.gain(FAST, name, 10, "newest")
    assert found.mean() > 0
    assert 0.25 < (found < 0).mean() < 0.45
    newest, averages = tables.at_ends(FAST, "alone"), tables.at_ends(FAST, name)
    assert errors_above((averages - newest).mean(axis=1)) > 3
    assert errors_above(newest.std(axis=1) - averages.std(axis=1)) > 3  # steadier


@pytest.mark.parametrize("way", [PUBLISHED, ANEW, FAST])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_best_of_the_ten_beats_nearly_every_average(tables, way, name):
    assert (tables.gain(way, name, 10, "best") < 0).mean() > 0.8


def test_averages_are_no_cure_for_the_rate(tables):
    single = tables.scores(PUBLISHED, "alone")[:, 0]
    for name in SCHEDULES:
        assert tables.scores(FAST, name).mean(axis=0).max() < single.mean() - 5


@pytest.mark.parametrize("name", ["equal", "linear"])
def test_a_hundred_are_better_than_ten_only_where_epochs_bounce(tables, name):
    more = {way: tables.scores(way, name)[:, [9, 99]] for way in (PUBLISHED, ANEW, FAST)}
    above = {way: errors_above(found[:, 1] - found[:, 0]) for way, found in more.items()}
    assert above[FAST] > 2
    assert max(above[PUBLISHED], above[ANEW]) < 2
    assert abs(tables.gain(PUBLISHED, name, 100, "newest").mean()) < 0.5


def test_a_slower_decay_is_better_only_where_epochs_bounce(tables):
    first, last = (tables.figures()["alphas"].index(alpha) for alpha in (2, 64))
    for way, expected in ((PUBLISHED, False), (ANEW, False), (FAST, True)):
        found = tables.by_alpha(way)
        assert (errors_above(found[:, last] - found[:, first]) > 2) == expected
