"""Sweeps: the averages are those of `average_checkpoints`, each checkpoint is read once, and a
sweep survives what evaluators do."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import shlex
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import tqdm

import hf_folders
import wavg
from contract import random_array
from wavg import weights as schedules
from wavg.dtypes import dtype_of
from wavg.evaluation import Command, Outcome, is_tie

DTYPES = ("float64", "float32", "float16", "bfloat16", "complex64")


def decay_by_square_root(steps):
    return -np.diff(1 - np.sqrt(np.arange(len(steps) + 1) / len(steps)))


SCHEDULES = [
    "equal",
    "linear",
    "exponential:alpha=2",
    wavg.Schedule("1-sqrt", decay_by_square_root),
    wavg.Schedule("steps", lambda steps: steps**2),
    wavg.Schedule("signs", lambda steps: np.where(np.arange(len(steps)) == 0, -0.5, 1.0)),
    wavg.Schedule("every second", lambda steps: (np.arange(len(steps))[::-1] % 2 == 0) * 1.0),
]


def model(seed, dtypes=DTYPES, shape=(40, 5)):
    rng = np.random.default_rng(seed)
    tensors = {f"{dtype}/w": random_array(rng, dtype, shape) for dtype in dtypes}
    return {**tensors, "count": np.array(seed), "scalar": np.float32(seed)}


@pytest.fixture
def run(tmp_path):
    """Nine checkpoints at uneven steps."""
    steps = [1, 2, 3, 5, 8, 9, 10, 20, 40]
    for step in steps:
        wavg.save(tmp_path / f"m_{step}.safetensors", model(step))
    return [str(tmp_path / f"m_{step}.safetensors") for step in steps]


def seen_by(paths, **options):
    """A sweep, and every model its evaluator got: singles, then each schedule's by n."""
    models = []

    def evaluate(tensors):
        models.append(tensors)
        return len(models)

    result = wavg.sweep(paths, evaluate, maximize=True, **options)
    return result, {
        (score.n, score.weights): models[int(score.score) - 1]
        for score in (*result.singles, *result.averages)
        if score.score is not None
    }


def units(array):
    """Numbers as integers in their order, so that neighbours differ by one."""
    component = dtype_of(array.dtype).component
    bits = array.reshape(-1).view(component.numpy).view(f"i{component.itemsize}").astype(object)
    return np.where(bits < 0, -(bits & (2 ** (component.bits - 1) - 1)), bits)


def test_every_average_is_that_of_average_checkpoints_to_the_last_place(run):
    result, models = seen_by(run, weights=SCHEDULES)
    assert len(result.averages) == len(SCHEDULES) * len(run)
    differing = numbers = 0
    for (n, weights), found in models.items():
        if weights is None:
            expected = wavg.load(run[-n])
        else:
            rule = next(s for s in SCHEDULES if str(s) == weights)
            expected = wavg.average_checkpoints(run, weights=rule, last=n)
        assert list(found) == list(expected)
        for name, array in expected.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            if name == "count":
                assert np.array_equal(found[name], array)
                continue
            if name == "float64/w":  # sums of float64 have no bits to spare
                np.testing.assert_allclose(found[name], array, rtol=1e-9, atol=1e-13)
                continue
            off = np.abs(units(found[name]) - units(array))
            assert off.max() <= 1
            differing += np.count_nonzero(off)
            numbers += off.size
    assert differing <= numbers / 10_000


@pytest.mark.parametrize("text", [*schedules.KNOWN, "ema:half_life=7", "lawa:last=3,every=2"])
def test_every_schedule_can_be_swept(run, text):
    if text.startswith("post_hoc_ema"):
        with pytest.raises(wavg.WeightError):  # of averages tracked while training, not of models
            wavg.sweep(run, len, maximize=True, weights=text)
        return
    result, models = seen_by(run, weights=text)
    assert result.passes == 1
    assert result.sums <= 4
    for score in result.averages:
        found = models[score.n, score.weights]
        expected = wavg.average_checkpoints(run, weights=text, last=score.n)
        for name in ("float64/w", "float32/w"):
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-7, atol=1e-12)


def test_a_checkpoint_without_a_weight_is_in_no_average(run):
    tensors = wavg.load(run[-2])
    tensors["float32/w"][0, 0] = np.inf
    wavg.save(run[-2], tensors, overwrite=True)
    second = wavg.Schedule("2", lambda steps: (np.arange(len(steps))[::-1] % 2 == 0) * 1.0)
    result, models = seen_by(run, weights=second)
    assert "is inf" in result.singles[1].error
    assert all(np.isfinite(models[s.n, "2"]["float32/w"]).all() for s in result.averages if s.n > 2)


def test_the_comparison_of_last_places_sees_neighbours():
    for dtype in ("float32", "float16", "bfloat16"):
        numpy = random_array(np.random.default_rng(0), dtype, (3,)).dtype
        values = np.array([1.0, -1.0, 0.0], numpy)
        bits = values.view(f"i{numpy.itemsize}")
        assert np.abs(units((bits + 1).view(numpy)) - units(values)).tolist() == [1, 1, 1]


def test_each_checkpoint_is_read_once(run):
    size = sum(array.nbytes for array in model(0).values())
    result, _ = seen_by(run, weights=["equal", "linear", "exponential:alpha=2"])
    counter = np.array(0).nbytes  # carried over from the newest
    assert result.bytes_read == len(run) * size + counter
    assert (result.passes, result.sums) == (1, 3)


def test_models_in_memory_do_not_grow_with_the_number_of_schedules(tmp_path):
    for step in range(4):
        wavg.save(tmp_path / f"m_{step}.npz", {"w": np.ones(250_000, "f4")})
    most = []
    for count in (4, 16):
        weights = [f"exponential:alpha={1 + n / 20}" for n in range(count)]
        tracemalloc.start()
        result = wavg.sweep(tmp_path, lambda m: 1.0, maximize=True, weights=weights)
        most.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
        assert result.passes == 1
    sums = 2 * (result.sums - 1)  # of float64, more than with one
    assert most[1] - most[0] < sums + 3  # scratch; twelve averages more would be 12


def test_the_count_of_bytes_is_what_the_system_saw(tmp_path, monkeypatch):
    paths = []
    for step in range(5):
        paths.append(str(tmp_path / f"m_{step}.safetensors"))
        wavg.save(paths[-1], {"w": np.arange(50_000, dtype="f4")})
    read = []
    preadv = os.preadv

    def counting(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    result = wavg.sweep(paths, lambda m: 1.0, maximize=True, weights=["equal", "linear"])
    assert result.bytes_read == sum(read) == 5 * 200_000


def test_with_less_memory_it_reads_more_often_and_finds_the_same(run):
    whole, models = seen_by(run, weights=SCHEDULES)
    result, again = seen_by(run, weights=SCHEDULES, max_memory=0)
    assert result.passes > 1
    assert result.sums == 1
    assert result.bytes_read > whole.bytes_read
    for key, found in models.items():
        for name, array in found.items():
            if name in ("float64/w", "count"):  # with 53 bits the order of the sums shows
                np.testing.assert_allclose(again[key][name], array, rtol=1e-9, atol=1e-12)
            else:
                assert np.abs(units(again[key][name]) - units(array)).max() <= 1


def test_an_evaluator_may_do_as_it_likes_with_its_arrays(run):
    def spoil(tensors):
        score = float(tensors["float32/w"].sum())
        for array in tensors.values():
            array[...] = 99
        return score

    def keep(tensors):
        return float(tensors["float32/w"].sum())

    spoilt, kept = (
        wavg.sweep(run, evaluate, maximize=True, weights=["equal", "linear"])
        for evaluate in (spoil, keep)
    )
    assert [s.score for s in spoilt.averages] == [s.score for s in kept.averages]
    assert [s.score for s in spoilt.singles] == [s.score for s in kept.singles]


def test_a_model_that_two_ask_for_is_scored_once(run):
    calls = []
    half = wavg.Schedule("half", lambda steps: np.full(len(steps), 0.5))
    result = wavg.sweep(
        run, lambda m: calls.append(1) or len(calls), maximize=True, weights=["equal", half]
    )
    assert len(calls) == 9 + 8
    by = {(s.n, s.weights): s.score for s in (*result.singles, *result.averages)}
    assert by[1, "equal"] == by[1, "half"] == by[1, None]
    assert all(by[n, "equal"] == by[n, "half"] for n in range(1, 10))


def test_last_limits_how_many(run):
    result, models = seen_by(run, last=3)
    assert result.inputs == tuple(run[-3:])
    assert result.steps == (10, 20, 40)
    assert models.keys() == {(n, w) for n in (1, 2, 3) for w in (None, "equal")}


def test_explicit_weights_are_scored_for_as_many_as_there_are(run):
    result, _ = seen_by(run, weights=["equal", [0.2, 0.3, 0.5]])
    assert [s.n for s in result.averages if s.weights == "0.2,0.3,0.5"] == [3]
    assert result.to_csv().count("0.2,0.3,0.5") == 1
    assert [line.split()[-1] for line in str(result).splitlines()[4:6]] == ["-", "5.000"]


def test_weights_that_fit_no_number_are_refused(run):
    with pytest.raises(wavg.WeightError, match="2 weights were given"):
        wavg.sweep(run[:1], len, maximize=True, weights=[0.5, 0.5])
    with pytest.raises(wavg.WeightError, match="given twice"):
        wavg.sweep(run, len, maximize=True, weights=["equal", "equal"])


def test_options_reach_the_averages(run):
    _, models = seen_by(run, include="float32*", dtype="float16", last=2)
    expected = wavg.average_checkpoints(run, include="float32*", dtype="float16", last=2)
    assert models[2, "equal"]["float32/w"].dtype == np.float16
    assert all(np.array_equal(models[2, "equal"][name], expected[name]) for name in expected)
    assert models[1, "equal"]["float32/w"].dtype == np.float16
    assert models[1, None]["float32/w"].dtype == np.float32


def test_tensors_of_other_names_are_paired_by_position(tmp_path):
    for step, name in enumerate(["a", "b", "c"]):
        wavg.save(tmp_path / f"m_{step}.npz", {name: np.float32([step]), name * 2: np.array(step)})
    _, models = seen_by(tmp_path, align="position")
    assert models[2, None] == {"b": 1, "bb": 1}
    assert models[3, "equal"] == {"c": 1, "cc": 2}


def test_a_number_that_is_not_finite_fails_what_holds_it_and_no_more(run, in_process):
    tensors = wavg.load(run[4])
    tensors["float32/w"][3, 1] = np.nan
    wavg.save(run[4], tensors, overwrite=True)
    second = wavg.Schedule("2", lambda steps: (np.arange(len(steps))[::-1] % 2 == 0) * 1.0)
    third = wavg.Schedule("3", lambda steps: (np.arange(len(steps))[::-1] % 3 == 0) * 1.0)
    for options in ({}, {"max_memory": 0}, {"evaluate_command": "true {}"}):
        evaluate = None if "evaluate_command" in options else (lambda m: 1.0)
        result = wavg.sweep(
            run, evaluate, maximize=True, weights=["linear", second, third], **options
        )
        for score in (*result.singles, *result.averages):
            holds = (score.n == 5) if score.weights is None else score.n >= 5
            assert ("m_8.safetensors: float32/w[3, 1] is nan" in score.error) == (
                holds and score.weights != "3"
            ), score
        assert result.best.score is not None
    result = wavg.sweep(
        run, lambda m: np.isnan(m["float32/w"]).sum(), maximize=True, allow_nonfinite=True
    )
    assert [s.score for s in result.averages] == [0] * 4 + [1] * 5


def test_an_average_that_does_not_fit_its_dtype_is_a_failure(tmp_path):
    for step, value in enumerate([-60000, 60000, 60000]):
        wavg.save(tmp_path / f"m_{step}.npz", {"w": np.float16([value])})
    beyond = wavg.Schedule("beyond", lambda steps: np.where(np.arange(len(steps)) == 0, -0.5, 1.0))
    result = wavg.sweep(tmp_path, lambda m: 1.0, maximize=True, weights=beyond)
    assert [s.error for s in result.averages] == ["", "", "the average of w does not fit its dtype"]


# Failures, and going on


def test_failures_are_recorded_and_the_sweep_goes_on(run):
    def evaluate(tensors):
        if tensors["count"] == 8:  # only alone: averages have the newest's
            raise ValueError("not this one")
        return float(tensors["scalar"]) if tensors["scalar"] < 39 else float("nan")

    result = wavg.sweep(run, evaluate, maximize=False)
    assert {s.n: s.error for s in result.singles if s.error} == {
        1: "the score is nan",
        5: "ValueError: not this one",
    }
    assert result.best.n == 9
    assert "! the 5th newest alone: failed, ValueError: not this one" in str(result)


def test_nothing_that_succeeds_has_no_best(run):
    result = wavg.sweep(run, lambda m: m["none"], maximize=True)
    with pytest.raises(wavg.WavgError, match=r"no evaluation succeeded.*KeyError: 'none'"):
        _ = result.best
    assert "no average could be scored" in str(result)
    assert json.loads(result.to_json())["best"] is None


def test_an_interruption_tells_how_to_go_on_and_a_later_run_does(run, tmp_path):
    journal = tmp_path / "j.jsonl"
    calls = []

    def stopping(tensors):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return float(tensors["scalar"])

    options = {"maximize": True, "weights": ["equal", "linear"], "journal": journal}
    with pytest.raises(KeyboardInterrupt, match=r"journal .*j\.jsonl goes on from here"):
        wavg.sweep(run, stopping, **options)
    result = wavg.sweep(run, stopping, **options)
    assert len(calls) == 9 + 2 * 8 + 1
    whole = wavg.sweep(run, lambda m: m["scalar"], maximize=True, weights=["equal", "linear"])
    assert [s.score for s in result.averages] == [s.score for s in whole.averages]
    again = wavg.sweep(run, stopping, **options)
    assert len(calls) == 9 + 2 * 8 + 1
    assert (again.bytes_read, again.passes) == (0, 0)
    assert str(again).splitlines()[2:] == str(result).splitlines()[2:]


def test_an_evaluator_that_kills_the_process_is_known_in_the_next_run(run, tmp_path):
    code = (
        "import sys, os, wavg\n"
        "def evaluate(m):\n"
        "    if m['count'] == 9 and not os.environ.get('MILD'): os._exit(9)\n"
        "    return float(m['scalar'])\n"
        "result = wavg.sweep(sys.argv[2:], evaluate, maximize=True, journal=sys.argv[1])\n"
        "print(result.singles[3].error, result.best.n)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "j"), *run]
    first = subprocess.run(words, capture_output=True, text=True)
    assert (first.returncode, first.stdout) == (9, "")
    assert subprocess.run(words).returncode == 9  # it might have been a power cut
    third = subprocess.run(words, capture_output=True, text=True)
    assert third.stdout == "killed: the process ended during this evaluation, twice 1\n"


def test_a_terminal_shows_how_far_it_is_and_the_best_so_far(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("tqdm.tqdm", functools.partial(tqdm.tqdm, mininterval=0))
    wavg.sweep(run, lambda m: m["scalar"], maximize=False, progress=True, last=2)
    shown = sys.stderr.getvalue()
    assert "3/3" in shown
    assert "best 20: 2 alone" in shown


def test_a_journal_needs_an_evaluator_with_a_name(run, tmp_path):
    for evaluate in (lambda m: 1.0, functools.partial(len)):
        with pytest.raises(wavg.WavgError, match="might be any; write a function with a name"):
            wavg.sweep(run, evaluate, maximize=True, journal=tmp_path / "j")
    assert not (tmp_path / "j").exists()


def test_a_journal_of_other_inputs_is_refused(run, tmp_path):
    wavg.sweep(run, len, maximize=True, journal=tmp_path / "j")
    wavg.save(run[0], model(100), overwrite=True)
    with pytest.raises(wavg.WavgError, match=r"another series(.|\n)*inputs: there.*m_1\."):
        wavg.sweep(run, len, maximize=True, journal=tmp_path / "j")


# Best, ties, forms of the result


def test_the_direction_is_explicit(run):
    with pytest.raises(TypeError, match="maximize"):
        wavg.sweep(run, len)
    scores = {
        m: wavg.sweep(run, lambda t: t["scalar"], maximize=m).best.score for m in (True, False)
    }
    assert scores[True] == 40
    assert scores[False] == pytest.approx(98 / 9)


def test_of_equal_scores_the_fewest_checkpoints_are_best(run):
    result = wavg.sweep(run, lambda m: 1, maximize=False, weights=["linear", "equal"])
    assert (result.best.n, result.best.weights) == (1, "linear")


def test_differences_within_their_standard_error_are_ties(run):
    rng = np.random.default_rng(0)
    noise, shift = rng.normal(size=400), iter([0.5, 1.0, 0, 0.5, 0.999])

    def evaluate(_):
        value = next(shift)  # of the newest, then of an average, of one alone, and so on
        return value + noise + (rng.normal(size=400) * 0.1 if value == 0.999 else 0)

    result = wavg.sweep(run, evaluate, maximize=True, last=3)
    best, tie = result.averages[1], result.singles[2]
    assert result.best is best
    assert (best.score, best.tie) == (pytest.approx(1 + noise.mean()), False)
    assert tie.tie
    # Each score's own standard error is far larger than that of differences, pair by pair.
    assert best.standard_error == pytest.approx(noise.std(ddof=1) / 20)
    far = [s for s in (*result.singles, *result.averages) if s not in (best, tie)]
    assert far
    assert not any(s.tie for s in far)
    assert "~ within the standard error" in str(result)


def test_other_numbers_of_examples_are_compared_unpaired(run):
    sizes = iter([10, 20, 30])

    def evaluate(_):
        size = next(sizes)
        return np.arange(size) % 2 + size / 1000

    result = wavg.sweep(run, evaluate, maximize=True, last=2)
    assert result.singles[0].tie


def test_one_example_of_all_that_differs_is_a_tie_whatever_rounding_says():
    for size in range(2, 60):
        other = np.ones(size)
        other[0] = 0
        assert is_tie(
            Outcome(float(other.mean()), examples=other), Outcome(1.0, examples=np.ones(size))
        )
    two = np.array([0.0, 0.0, *np.ones(98)])  # at two of them the difference is beyond it
    assert not is_tie(Outcome(float(two.mean()), examples=two), Outcome(1.0, examples=np.ones(100)))


def test_the_same_model_in_another_column_is_a_tie(run):
    result = wavg.sweep(
        run, lambda m: -m["scalar"] - np.arange(3), maximize=False, weights=["equal", "linear"]
    )
    assert (result.best.n, result.best.weights, result.best.tie) == (1, "equal", False)
    assert [result.singles[0].tie, result.averages[1].tie] == [True, True]
    assert [line.split()[2:] for line in str(result).splitlines()[3:4]] == [
        ["-41.000~", "-41.000*", "-41.000~"]
    ]


def test_a_single_that_is_better_is_told_to_be_a_tie(run):
    def evaluate(tensors):
        return np.array([tensors["scalar"] / 1000, 0, 1, 0, 1 + (tensors["scalar"] == 20) * 0.2])

    text = str(wavg.sweep(run, evaluate, maximize=True))
    assert "  a checkpoint alone scores better, though it is a tie: 0.44" in text


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ((1234.51, 1234.55), ["1234.5100", "1234.5500"]),
        ((5e-9, 4e-9), ["5.0000e-09", "4.0000e-09"]),
        ((0.7, 0.5), ["0.70000", "0.50000"]),
        ((0.7, 0.1 * 7), ["0.70000", "0.70000"]),
        ((0.0, 0.0), ["0.0000", "0.0000"]),
    ],
)
def test_scores_are_shown_with_the_digits_that_tell_them_apart(run, scores, shown):
    given = iter(scores)
    result = wavg.sweep(run[-2:], lambda m: next(given, scores[1]), maximize=True)
    lines = str(result).splitlines()
    assert [line.split()[2].rstrip("*") for line in lines[3:5]] == shown


def test_without_examples_nothing_is_a_tie(run):
    result = wavg.sweep(run, lambda m: 1.0, maximize=True)
    assert not any(s.tie for s in (*result.singles, *result.averages))
    assert "~" not in str(result)


def test_the_table_has_a_line_each_n_and_marks_the_best(run):
    result = wavg.sweep(run, lambda m: m["scalar"], maximize=False, weights=["equal", "linear"])
    lines = str(result).splitlines()
    assert lines[2].split() == ["n", "step", "alone", "equal", "linear"]
    assert lines[3].split() == ["1", "40", "40.000", "40.000", "40.000"]
    assert lines[11].split()[3] == "10.889*"
    assert lines[12] == "* best average: 10.889, the newest 9, equal"
    assert lines[13] == "  a checkpoint alone scores better: 1, the 9th newest alone"


def test_csv_and_json_hold_every_score(run, tmp_path):
    result = wavg.sweep(run, lambda m: [1.0, m["scalar"]], maximize=False)
    assert (tmp_path / "s.csv").write_text(result.to_csv()) == len(
        result.to_csv(tmp_path / "t.csv")
    )
    assert (tmp_path / "s.csv").read_text() == (tmp_path / "t.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    whole = json.loads(result.to_json(tmp_path / "s.json"))
    assert whole == json.loads((tmp_path / "s.json").read_text())
    assert len(rows) == len(whole["scores"]) == 18
    assert [(r["n"], r["weights"]) for r in rows if r["best"] == "True"] == [("9", "equal")]
    assert whole["best"]["n"] == 9
    assert whole["scores"][1]["path"] == run[-2]
    assert float(rows[1]["score"]) == whole["scores"][1]["score"] == 10.5
    assert float(rows[1]["standard_error"]) == pytest.approx(9.5)


@pytest.mark.parametrize("count", [1, 6])
def test_the_picture_has_dots_a_line_a_schedule_and_the_best(run, tmp_path, count):
    pytest.importorskip("matplotlib")
    names = ["equal", *(f"exponential:alpha={a}" for a in range(1, count))]
    result = wavg.sweep(run, lambda m: m["scalar"], maximize=False, weights=names, last=4)
    result.plot(tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    assert all(f"average, {name} -->" in text for name in names)
    assert "n-th newest alone -->" in text
    assert "best: 19.75, newest 4 -->" in text
    assert "score (lower is better) -->" in text
    with pytest.raises(wavg.OutputError, match=r"end its name with \.png"):
        result.plot(tmp_path / "p.txt")
    for write in (result.plot, result.to_csv, result.to_json):
        with pytest.raises(wavg.OutputExistsError):
            write(tmp_path / "p.svg")
        write(tmp_path / "p.svg", overwrite=True)


def test_a_missing_matplotlib_is_told(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    result = wavg.sweep(run, lambda m: 1.0, maximize=True, last=2)
    with pytest.raises(wavg.MissingDependencyError, match="pip install"):
        result.plot("p.png")


def test_the_output_is_the_best_average_correctly_rounded(run, tmp_path):
    output = tmp_path / "best.safetensors"
    result = wavg.sweep(
        run, lambda m: m["scalar"], maximize=False, weights=["linear", "equal"], output=output
    )
    assert (result.best.n, result.best.weights) == (9, "equal")
    wavg.average_checkpoints(run, tmp_path / "same.safetensors", steps=result.steps)
    assert output.read_bytes() == (tmp_path / "same.safetensors").read_bytes()


def test_an_output_that_exists_is_refused_before_anything_is_scored(run, tmp_path):
    (tmp_path / "best.safetensors").write_text("mine")
    with pytest.raises(wavg.OutputExistsError):
        wavg.sweep(run, pytest.fail, maximize=True, output=tmp_path / "best.safetensors")


# Commands

# The number called "scalar" of a safetensors file, by Python alone: it starts in no time.
SCORE = """
import json, struct, sys
data = open(sys.argv[1], "rb").read()
size = int.from_bytes(data[:8], "little")
start, stop = json.loads(data[8 : 8 + size])["scalar"]["data_offsets"]
print("the score is", *struct.unpack("<f", data[8 + size + start : 8 + size + stop]))
"""


@pytest.fixture
def in_process(monkeypatch):
    """Commands that score with a function, at the cost of a function; the paths they saw."""
    seen = []

    def call(self, words):
        seen.append(words[1])
        self.check(words[1])
        return str(float(sum(t.sum().real for t in wavg.load(words[1]).values()))), ""

    monkeypatch.setattr(Command, "_run", call)
    monkeypatch.setattr(Command, "check", lambda self, path: None, raising=False)
    return seen


def test_a_real_command_scores_files(run, tmp_path):
    command = f"{shlex.quote(sys.executable)} -ISc {shlex.quote(SCORE)} {{}}"
    result = wavg.sweep(run, evaluate_command=command, maximize=True, last=2)
    assert [s.score for s in result.singles] == [40, 20]
    assert [s.score for s in result.averages] == [40, 30]


@pytest.mark.parametrize("ending", [".safetensors", ".npz", ".h5", ".weights.h5"])
def test_a_command_gets_files_of_the_inputs_format(tmp_path, monkeypatch, in_process, ending):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    paths = [str(tmp_path / f"m_{step}{ending}") for step in range(5)]
    for step, path in enumerate(paths):
        wavg.save(path, model(step, ("float32", "float16")))
    found = []

    def check(self, path):
        assert path.endswith(ending)
        found.append(wavg.load(path))
        if path not in paths:
            assert len(os.listdir(os.path.dirname(path))) == 1

    monkeypatch.setattr(Command, "check", check)
    weights = ["equal", "linear"]
    result = wavg.sweep(paths, evaluate_command="true {}", maximize=True, weights=weights)
    assert [path for path in in_process if path in paths] == paths[::-1]
    assert os.listdir(tmp_path / "temporary") == []
    averages = [model for path, model in zip(in_process, found, strict=True) if path not in paths]
    expected = [
        wavg.average_checkpoints(paths, weights=weight, last=n)
        for n in range(2, 6)
        for weight in weights
    ]
    assert len(averages) == len(expected)
    for one, other in zip(averages, expected, strict=True):
        assert list(one) == list(other)
        for name in one:
            assert np.abs(units(one[name]) - units(other[name])).max(initial=0) <= 1 or (
                name == "count"
            )
    assert result.best.score == max(s.score for s in result.averages)


def test_a_command_reads_each_checkpoint_once_besides_what_it_copies(tmp_path, in_process):
    paths = [str(tmp_path / f"m_{step}.npz") for step in range(4)]
    for path in paths:
        wavg.save(path, {"w": np.arange(3000, dtype="f4")})
    result = wavg.sweep(
        paths, evaluate_command="true {}", maximize=True, weights=["equal", "linear"]
    )
    data = 4 * 12_000
    checksums = 4 * 12_128  # with the header of the array in it
    copied = result.bytes_read - data - checksums
    assert 0 < copied < 6 * 600  # headers, of six averages


@pytest.mark.parametrize("shards", [(1, 1, 1), (2, 2, 2)])
def test_a_command_gets_folders_where_the_inputs_are(tmp_path, monkeypatch, in_process, shards):
    hf_folders.trainer_run(tmp_path / "run", (10, 20, 30), shards)
    kinds = []

    def check(self, path):
        assert os.path.isdir(path)
        assert "config.json" in os.listdir(path)
        kinds.append(os.path.basename(path))

    monkeypatch.setattr(Command, "check", check)
    result = wavg.sweep(tmp_path / "run", evaluate_command="true {}", maximize=True)
    assert kinds == [f"checkpoint-{step}" for step in (30, 30, 20, 30, 10)]
    assert not any(s.error for s in result.averages)


def test_folders_named_by_their_files_stay_files(tmp_path, monkeypatch, in_process):
    hf_folders.trainer_run(tmp_path / "run", (10, 20), (1, 1))
    monkeypatch.setattr(Command, "check", lambda self, path: os.path.isfile(path) or 1 / 0)
    pattern = tmp_path / "run" / "*" / "model.safetensors"
    result = wavg.sweep(pattern, evaluate_command="true {}", maximize=True)
    assert not any(s.error for s in result.averages)


MEMORY = """
import sys, wavg
def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))
before = status("VmRSS")
wavg.sweep(sys.argv[1], evaluate_command="echo 0 {}", maximize=True, weights=["equal", "linear"])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_memory_for_a_command_does_not_grow_with_the_model(tmp_path):
    for step in range(2):
        wavg.save(tmp_path / f"m_{step}.safetensors", {"w": np.full(8_000_000, step, "f4")})
    words = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 << 20  # a sum alone takes 64 MB


def test_a_command_with_little_room_reads_more_often(run, in_process):
    result = wavg.sweep(
        run, evaluate_command="true {}", maximize=True, weights=["equal", "linear"], max_memory=0
    )
    assert result.passes > 1
    assert not any(s.error for s in result.averages)
