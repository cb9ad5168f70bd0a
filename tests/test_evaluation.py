"""Evaluators: what they return, and how they fail."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import wavg
from wavg.evaluation import Command, Function, evaluator_of


def outcome(result):
    return Function(lambda _: result, "test")({})


def python(code, *, timeout=None):
    """A command that runs Python code with the path as sys.argv[1]."""
    return Command(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {{}}", timeout)


@pytest.mark.parametrize("result", [0.5, np.float32(0.5), np.array(0.5), np.array([0, 1]), [0, 1]])
def test_a_number_or_the_mean_of_an_array_is_the_score(result):
    assert outcome(result).score == 0.5


def test_scores_of_examples_are_kept_with_their_standard_error():
    found = outcome(np.array([[True, False], [True, True]]))
    assert found.examples.tolist() == [1, 0, 1, 1]
    assert found.standard_error == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    assert outcome(0.5).standard_error is None
    assert outcome([0.5]).standard_error is None


@pytest.mark.parametrize("result", [None, "0.5", [], {}, 1j])
def test_what_is_no_score_is_a_failure(result):
    assert outcome(result).score is None
    assert "expected a number, or an array" in outcome(result).error


@pytest.mark.parametrize("result", [float("nan"), float("inf"), [0.5, float("nan")]])
def test_a_score_that_is_not_finite_is_a_failure(result):
    assert outcome(result).score is None
    assert "the score is" in outcome(result).error


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (ValueError("bad\n  shape"), "ValueError: bad shape"),
        (KeyError("w"), "KeyError: 'w'"),
        (MemoryError(), "MemoryError"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_an_exception_is_a_failure_with_its_type_and_message(problem, told):
    def evaluate(_):
        raise problem

    found = Function(evaluate, "test")({})
    assert (found.score, found.error) == (None, told)


def test_an_interruption_passes_through():
    def evaluate(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Function(evaluate, "test")({})


@pytest.mark.parametrize(
    ("printed", "score"),
    [
        ("0.93", 0.93),
        ("loss 1.5e-3, accuracy: 93.5%%", 93.5),
        ("epoch 3\\nscore=-2", -2),
        ("took 3s for model_10: .5", 0.5),
        ("7.", 7),
    ],
)
def test_the_last_number_printed_is_the_score(printed, score):
    assert Command(f"printf '{printed}' {{}}")("m.h5").score == score


def test_the_path_is_given_without_a_shell(tmp_path):
    path = tmp_path / "a b; echo 1 $(echo 2)"
    assert python("import sys; print(len(sys.argv), len(sys.argv[1]))")(path).score == len(
        str(path)
    )


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("print('none')", "it printed no number"),
        ("import sys; print(1); sys.exit('no data\\n\\n')", "exit code 1: no data"),
        ("import os; print(1, flush=True); os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("print('nan')", "the score is nan"),
    ],
)
def test_a_command_that_fails_says_why(code, told):
    found = python(code)("m.h5")
    assert found.score is None
    assert told in found.error


def test_a_command_that_cannot_be_run_says_why():
    assert "cannot run no-such-program" in Command("no-such-program {}")("m.h5").error


def test_a_command_that_takes_too_long_is_killed_with_what_it_started(tmp_path):
    note = tmp_path / "child"
    shell = shlex.quote(f"sleep 60 & echo $! > {note}; wait")
    found = Command(f"sh -c {shell} {{}}", timeout=1.0)("m.h5")
    assert found.error == "it took more than 1 s and was killed"
    # It had time to start the child, and its group is gone: nobody is left to be killed.
    state = Path(f"/proc/{note.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((None, None, None), "say how to score"),
        ((len, "echo {}", None), "say how to score"),
        ((None, "echo 1", None), r"has no \{\}"),
        ((None, "{}", None), r"has no \{\}"),
        ((None, "echo 'x {}", None), "cannot split"),
        ((None, "echo {}", 0), "timeout must be a positive"),
        ((len, None, 5), "cannot be timed out"),
        (("module", None, None), "write module:function"),
        (("no_such_module:f", None, None), "cannot import the evaluator"),
        (("math:no_such_function", None, None), "cannot import the evaluator"),
        (("math:pi", None, None), "not a function"),
    ],
)
def test_an_evaluator_that_makes_no_sense_is_refused_at_once(arguments, told):
    with pytest.raises(wavg.WavgError, match=told):
        evaluator_of(*arguments)


def test_a_wrong_type_is_a_type_error():
    with pytest.raises(TypeError, match="must be a function"):
        evaluator_of(3, None, None)


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "scores_of_this_test.py").write_text("class A:\n    def f(model): return 0.25\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert evaluator_of("scores_of_this_test:A.f", None, None)({}).score == 0.25
