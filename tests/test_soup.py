"""Greedy soups: who joins, in which order, at what cost."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import hf_folders
import wavg
from wavg.evaluation import Command

# The target is 1.5; own distances are .1, .25, .5, .5, 7.5 in the order 4, 0, 1, 2, 3.
VALUES = [1.25, 2.0, 1.0, 9.0, 1.6]


@pytest.fixture
def run(tmp_path):
    for step, value in enumerate(VALUES):
        tensors = {"w": np.float32([value]), "count": np.array(step), "b": np.float32([0])}
        wavg.save(tmp_path / f"m_{step}.safetensors", tensors)
    return [str(tmp_path / f"m_{step}.safetensors") for step in range(len(VALUES))]


def distance(tensors):
    return abs(float(tensors["w"][0]) - 1.5)


def by_hand(values, score):
    """The recipe, a loop of plain means: (step, taken) by turns."""
    order = sorted(range(len(values)), key=lambda p: (score([values[p]]), -p))
    chosen, turns = [], []
    for position in order:
        trial = [*chosen, position]
        worse = chosen and score([values[p] for p in trial]) > score([values[p] for p in chosen])
        turns.append((position, not worse))
        chosen = chosen if worse else trial
    return turns


def test_the_recipe_is_followed(run):
    result = wavg.soup(run, distance, maximize=False)
    expected = by_hand(VALUES, lambda values: abs(np.mean(values) - 1.5))
    assert [(int(t.step), t.taken) for t in result.trials] == expected
    assert result.chosen == (run[0], run[4])
    assert result.score == pytest.approx(0.075, rel=1e-5)
    assert result.evaluations == 5 + 4


@pytest.mark.parametrize("seed", range(4))
def test_random_runs_follow_the_recipe(tmp_path, seed):
    values = np.random.default_rng(seed).integers(-8, 8, 9).astype("f4").tolist()
    for step, value in enumerate(values):
        wavg.save(tmp_path / f"m_{step}.npz", {"w": np.float64([value])})
    result = wavg.soup(tmp_path, lambda m: -abs(m["w"][0] - 1), maximize=True)
    expected = by_hand(values, lambda chosen: abs(np.mean(chosen) - 1))
    assert [(int(t.step), t.taken) for t in result.trials] == expected
    assert -result.score == pytest.approx(
        abs(np.mean([values[p] for p, taken in expected if taken]) - 1)
    )


def test_what_leaves_the_score_the_same_joins(run):
    assert len(wavg.soup(run, lambda m: 1.0, maximize=True).chosen) == 5
    assert [t.step for t in wavg.soup(run, lambda m: 1.0, maximize=True).trials] == [4, 3, 2, 1, 0]


def test_each_model_tried_is_the_average_of_its_members(run):
    seen = []

    def evaluate(tensors):
        seen.append(tensors)
        return distance(tensors)

    wavg.soup(run, evaluate, maximize=False)
    members = [[4], [3], [2], [1], [0], [0, 4], [0, 2, 4], [0, 1, 4], [0, 3, 4]]
    assert len(seen) == len(members)
    for tensors, positions in zip(seen, members, strict=True):
        expected = wavg.average_checkpoints([run[p] for p in positions], sort=False)
        assert list(tensors) == list(expected)
        assert all(np.array_equal(tensors[name], expected[name]) for name in expected)


def test_the_newest_member_is_the_reference_even_where_names_differ(tmp_path):
    for step, (value, name) in enumerate([(1, "a"), (2, "b"), (9, "c")]):
        tensors = {name: np.float32([value]), name + "/count": np.array(step)}
        wavg.save(tmp_path / f"m_{step}.npz", tensors)
    seen = []

    def evaluate(tensors):
        seen.append({name: array.item() for name, array in tensors.items() if array.ndim == 0})
        return abs(next(a for a in tensors.values() if a.ndim)[0] - 1.4)

    result = wavg.soup(tmp_path, evaluate, maximize=False, align="position")
    assert [os.path.basename(path) for path in result.chosen] == ["m_0.npz", "m_1.npz"]
    assert seen[3:] == [{"b/count": 1}, {"c/count": 2}]


def test_each_checkpoint_is_read_once_alone_and_once_at_its_turn(run):
    result = wavg.soup(run, distance, maximize=False)
    assert result.bytes_read <= 2 * 5 * (4 + 4 + 8) + 5 * 8


def test_a_budget_ends_the_trials(run):
    calls = []
    result = wavg.soup(run, lambda m: calls.append(1) or distance(m), maximize=False, budget=7)
    assert len(calls) == result.evaluations == 7
    assert [t.error for t in result.trials] == ["", "", ""] + 2 * ["not tried: the budget is spent"]
    with pytest.raises(wavg.WavgError, match="budget of 5 evaluations leaves none"):
        wavg.soup(run, distance, maximize=False, budget=5)


def test_a_budget_is_a_whole_number(run):
    with pytest.raises(TypeError, match="integer"):
        wavg.soup(run, distance, maximize=False, budget=7.5)


def test_recorded_metrics_save_the_evaluations_alone(run):
    calls = []
    result = wavg.soup(
        run,
        lambda m: calls.append(1) or distance(m),
        maximize=False,
        metrics={f"m_{step}": abs(value - 1.5) for step, value in enumerate(VALUES) if step != 3},
    )
    assert result.chosen == (run[0], run[4])
    assert len(calls) == 4
    assert result.trials[-1].error == "no recorded metric"


def test_failures_keep_a_checkpoint_out(run):
    def evaluate(tensors):
        value = distance(tensors)
        if value > 5 or tensors["w"][0] == np.float32(1.425):  # one alone; the first trial
            raise ValueError("too far")
        return value

    result = wavg.soup(run, evaluate, maximize=False)
    assert result.chosen == (run[4],)
    errors = {int(t.step): t.error for t in result.trials if t.error}
    assert errors == {0: "ValueError: too far", 3: "ValueError: too far"}
    for options in ({}, {"metrics": {f"m_{step}": 1.0 for step in range(5)}}):
        with pytest.raises(wavg.WavgError, match=r"no soup: .* so: ZeroDivisionError: division by"):
            wavg.soup(run, lambda m: 1 / 0, maximize=False, **options)


def test_a_number_that_is_not_finite_keeps_its_checkpoint_out(run):
    wavg.save(run[1], {**wavg.load(run[1]), "w": np.float32([np.nan])}, overwrite=True)
    metrics = {f"m_{step}": float(step != 1) for step in range(5)}  # it has the first turn
    for options in ({}, {"metrics": metrics}):
        result = wavg.soup(run, distance, maximize=False, **options)
        assert result.chosen == (run[0], run[4])
        assert [int(t.step) for t in result.trials if "w[0] is nan" in t.error] == [1]


@pytest.mark.parametrize("stop", range(1, 10))
def test_a_journal_goes_on_wherever_it_was_stopped(run, tmp_path, stop):
    calls = []

    def evaluate(tensors):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return distance(tensors)

    with pytest.raises(KeyboardInterrupt, match="goes on from here"):
        wavg.soup(run, evaluate, maximize=False, journal=tmp_path / "j")
    result = wavg.soup(run, evaluate, maximize=False, journal=tmp_path / "j")
    assert len(calls) == 10
    whole = wavg.soup(run, distance, maximize=False)
    assert result.trials == whole.trials


def test_a_journal_of_a_sweep_is_none_of_a_soup(run, tmp_path):
    wavg.sweep(run, distance, maximize=False, journal=tmp_path / "j")
    with pytest.raises(wavg.WavgError, match='series: there "sweep", now "soup"'):
        wavg.soup(run, distance, maximize=False, journal=tmp_path / "j")


def test_the_output_is_the_soup(run, tmp_path):
    wavg.soup(run, distance, maximize=False, output=tmp_path / "soup.safetensors")
    wavg.average_checkpoints([run[0], run[4]], tmp_path / "same.safetensors")
    same = (tmp_path / "same.safetensors").read_bytes()
    assert (tmp_path / "soup.safetensors").read_bytes() == same
    with pytest.raises(wavg.OutputExistsError):
        wavg.soup(run, pytest.fail, maximize=False, output=tmp_path / "soup.safetensors")


def test_the_report_shows_each_decision(run, tmp_path):
    result = wavg.soup(run, distance, maximize=False)
    lines = str(result).splitlines()
    assert [line.split()[-1] for line in lines[2:7]] == ["joins", "joins", "out", "out", "out"]
    assert lines[7] == "soup of 2 of 5 checkpoints: 0.075, after 9 evaluations"
    whole = json.loads(result.to_json(tmp_path / "s.json"))
    assert whole == json.loads((tmp_path / "s.json").read_text())
    assert [trial["taken"] for trial in whole["trials"]] == [True, True, False, False, False]


def test_decisions_within_the_standard_error_are_marked(run):
    def evaluate(tensors):
        return distance(tensors) + np.array([0.3, -0.3, 0.1, -0.1]) * (tensors["w"][0] > 1.5)

    result = wavg.soup(run, evaluate, maximize=False)
    assert [(int(t.step), t.tie) for t in result.trials[:2]] == [(4, False), (0, True)]
    assert result.standard_error == result.trials[1].standard_error
    lines = str(result).splitlines()
    assert "± " in lines[2]
    assert lines[3].split()[-2:] == ["~", "joins"] or lines[3].split()[-3:] == ["~", "stays", "out"]
    assert lines[7].startswith("~ within the standard error of the difference from the soup before")
    assert json.loads(result.to_json())["trials"][1]["tie"] is True


def test_a_command_gets_folders_after_their_newest_member(tmp_path, monkeypatch):
    hf_folders.trainer_run(tmp_path / "run", (10, 20, 30), (2, 2, 2))
    seen = []

    def call(self, words):
        tensors = wavg.load(words[1])
        seen.append(sorted(os.listdir(words[1])))
        mean = next(iter(tensors.values())).astype("f8").mean()
        return str(abs(float(mean))), ""

    monkeypatch.setattr(Command, "_run", call)
    result = wavg.soup(tmp_path / "run", evaluate_command="true {}", maximize=False)
    assert not any(t.error for t in result.trials)
    assert all("config.json" in names for names in seen)
