"""The founding experiment: the page's code as a reader would run it, the benchmark behind it."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from pages import run

os.environ["KERAS_BACKEND"] = "jax"

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "founding.md"
SCHEDULES = ("equal", "linear", "exponential:alpha=2")

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings(
        # Keras 3.15's variables, turned into arrays by NumPy 2.
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    ),
]


def of(sweep, weights):
    scores = sweep.averages if weights else sweep.singles
    return [score.score for score in scores if score.weights == weights]


@pytest.fixture(scope="module")
def benchmark():
    pytest.importorskip("keras")
    pytest.importorskip("sklearn")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("founding")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("keras")
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield run(PAGE, folder, monkeypatch), folder


def test_the_page_runs_and_says_what_happens(page):
    names, folder = page
    assert {f"model_{epoch}.h5" for epoch in range(491, 501)} | {"averages.svg"} <= {
        path.name for path in folder.iterdir()
    }
    assert [score.n for score in names["sweep"].singles] == list(range(1, 11))


def test_the_average_of_the_newest_alone_is_the_newest(page):
    sweep = page[0]["sweep"]
    assert {of(sweep, weights)[0] for weights in SCHEDULES} == {of(sweep, None)[0]}


def test_the_page_scores_as_the_recorded_run_of_its_seed(page):
    """Not to the last point: that depends on the machine and on Keras' version."""
    recorded = json.loads((ROOT / "benchmarks/results/founding.json").read_text())["figures"]
    first = recorded["runs"][0]
    assert (first["way"], first["seed"]) == ("as published", 0)
    for weights in (None, *SCHEDULES):
        line = np.array(first["right"][weights or "alone"].split(), float)[:10]
        np.testing.assert_allclose(of(page[0]["sweep"], weights), line / 1000, atol=0.005)


@pytest.fixture(scope="module")
def found(benchmark, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return benchmark.one_run("as published", 0, folder, epochs=24, keep=20), folder


def test_averages_of_a_sweep_and_of_single_calls_score_the_same(found, benchmark):
    right, by_end = found[0]["right"], found[0]["right_by_end"]
    for rule in SCHEDULES:
        first, last = map(int, by_end[rule].split())
        assert last == int(right[rule].split()[9])
        assert 0 < first < 1000
    by_alpha = dict(zip(benchmark.ALPHAS, found[0]["right_by_alpha"].split(), strict=True))
    assert by_alpha[2] == right["exponential:alpha=2"].split()[19]


def test_its_evaluation_is_that_of_keras_and_the_check_sees_another(found, benchmark, monkeypatch):
    x = benchmark.data("as published", 0)[2]
    benchmark.check(found[1], x)
    right = benchmark.probabilities
    monkeypatch.setattr(benchmark, "probabilities", lambda *given: right(*given) + 1e-4)
    with pytest.raises(AssertionError):
        benchmark.check(found[1], x)


def test_points_drawn_anew_are_of_the_same_classes(benchmark):
    _, _, x, labels = benchmark.data("as published", 0)
    _, _, other, other_labels = benchmark.data("points drawn anew", 0)
    assert not np.array_equal(x, other)
    for label in range(3):
        mean, other_mean = x[labels == label].mean(0), other[other_labels == label].mean(0)
        np.testing.assert_allclose(mean, other_mean, atol=0.6)  # 0.11 a standard error
