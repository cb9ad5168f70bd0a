"""The experiment of docs/experiments.md: what its tables compute, and a tiny run of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import digits_tables

    return digits_tables


@pytest.fixture
def scores(tables, tmp_path):
    """Two rates, five seeds of which the first two choose."""

    def part(*by_rate):
        return {"train": by_rate, "choose": by_rate, "test": by_rate, "accuracy": by_rate}

    figures = {
        "rates": [0.1, 0.2],
        "choosing_seeds": 2,
        "along": {},
        "scores": {
            "constant": part([5, 5, 9, 9, 9], [8, 8, 1, 1, 1]),
            "average equal, 20 %": part([4, 4, 7, 8, 6], [6, 6, 0, 0, 0]),
        },
    }
    path = tmp_path / "digits.json"
    path.write_text(json.dumps({"machine": {}, "figures": figures}))
    return tables.Scores(path)


def test_the_choosing_seeds_choose_and_the_others_are_reported(tables, scores):
    arm = scores.chosen(tables.AVERAGE)
    assert arm == ("average equal, 20 %", 0.1)  # at 0.2 the reported seeds are better: unseen
    assert scores.of(arm) == [7, 8, 6]
    assert scores.in_hindsight(tables.AVERAGE) == ("average equal, 20 %", 0.2)


def test_differences_are_paired_by_seed_with_their_standard_error(scores):
    mean, error = scores.difference(("average equal, 20 %", 0.1), ("constant", 0.1))
    assert (mean, error) == (-2.0, pytest.approx(1 / math.sqrt(3)))  # of -2, -1, -3


def test_shapes_are_merged_by_the_schedules_of_their_names(tables):
    assert tables.SHAPES.keys() == {"linear", "cosine", "1-sqrt"}
    for shape, weights in tables.SHAPES.items():
        assert weights == ("equal" if shape == "linear" else f"wsm:shape={shape}")


@pytest.mark.frameworks
def test_a_tiny_run_records_every_arm_of_every_seed(tables, tmp_path):
    pytest.importorskip("sklearn", reason="it has the digits")
    options = ["--seeds", "2", "--steps", "100", "--rates", "0.004", "--workers", "1", "--output"]
    subprocess.run(
        [sys.executable, str(BENCHMARKS / "digits.py"), *options, str(tmp_path)],
        check=True,
        capture_output=True,
    )
    scores = tables.Scores(tmp_path / "digits.json")
    for name, parts in scores.figures["scores"].items():
        assert parts.keys() == {"train", "choose", "test", "accuracy"}
        values = [value for by_rate in parts.values() for value in by_rate[0]]
        assert all(len(by_rate) == 1 and len(by_rate[0]) == 2 for by_rate in parts.values()), name
        assert all(map(math.isfinite, values)), name
    recorded = tables.Scores()  # the page's: the same arms
    assert scores.figures["scores"].keys() == recorded.figures["scores"].keys()
    assert scores.along.keys() == recorded.along.keys()
    tables.draw(tmp_path / "digits.json", tmp_path / "digits.svg")
    assert "</svg>" in (tmp_path / "digits.svg").read_text()
