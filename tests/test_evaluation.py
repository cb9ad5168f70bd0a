"""Evaluators: what they return, and how they fail."""

from __future__ import annotations

import os
import select
import shlex
import sys
from decimal import Decimal
from fractions import Fraction

import ml_dtypes
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


@pytest.mark.parametrize(
    "result",
    [
        np.array(0.5, ml_dtypes.bfloat16),
        ml_dtypes.bfloat16(0.5),
        np.array([0, 1], ml_dtypes.bfloat16),
        Fraction(1, 2),
        Decimal("0.5"),
        [Fraction(0), Decimal(1)],
    ],
)
def test_numbers_of_other_kinds_are_scores(result):
    assert outcome(result).score == 0.5


@pytest.mark.parametrize(
    "result", [None, "0.5", ["0.5"], [None], [], {}, 1j, np.datetime64(0, "s"), [1, "a"]]
)
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


def test_an_exception_without_a_message_is_a_failure():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    def evaluate(_):
        raise Mute

    assert Function(evaluate, "test")({}).error == "Mute"


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
        ("the score is 0.93.", 0.93),
        ("accuracy 0.93 in 12.5s", 0.93),
        ('{"loss":0.25,"at":"2024-11-25 12:30:05"}', 0.25),
        ("10,0.93", 0.93),
        ("0.93 ± 0.02 (3/10)", 0.93),
        ("0.93 +/-0.02", 0.93),
        ("accuracy:-1e-3", -0.001),
    ],
)
def test_the_last_number_printed_is_the_score(printed, score):
    assert Command(f"printf '{printed}' {{}}")("m.h5").score == score


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("took 0.93s", "no number that stands alone"),
        ("score=0.5ms", "no number that stands alone"),
        ("1.5e-3x", "no number that stands alone"),
        ("x1.5e-3", "no number that stands alone"),
        ("model-10 v1.2.3", "no number that stands alone"),
        ("5: 1,234.5", "it printed 1,234.5: write the score without commas"),
    ],
)
def test_a_number_with_a_unit_or_cut_out_of_a_word_is_no_score(printed, told):
    found = Command(f"sh -c 'printf %s \"{printed}\"' {{}}")("m.h5")
    assert found.score is None
    assert told in found.error


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


def test_a_command_that_cannot_be_run_says_why(tmp_path):
    program = tmp_path / "score"
    program.write_text("#!/bin/sh\necho 1\n")
    program.chmod(0o755)
    command = Command(f"{program} {{}}")
    program.unlink()
    assert f"cannot run {program}: No such file" in command("m.h5").error


def ends(process):
    """Whether a process, not our child, has ended or is about to."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 10)[0])
    finally:
        os.close(descriptor)


def test_a_command_that_takes_too_long_is_killed_with_what_it_started(tmp_path):
    note = tmp_path / "child"
    shell = shlex.quote(f"sleep 60 & echo $! > {note}; wait")
    found = Command(f"sh -c {shell} {{}}", timeout=1.0)("m.h5")
    assert found.error == "it took more than 1 s and was killed"
    # It had time to start the child, and its group is gone: nobody is left to be killed.
    assert ends(int(note.read_text()))


def test_what_a_command_leaves_behind_delays_nothing(tmp_path):
    """Neither a child that keeps its output open, nor one that left its group."""
    note = tmp_path / "child"
    behind = f"sleep 60 & echo $! > {note}; setsid sleep 5 & echo 0.5"
    assert Command(f"sh -c {shlex.quote(behind)} {{}}", timeout=4.0)("m.h5").score == 0.5
    assert ends(int(note.read_text()))


@pytest.mark.parametrize("timeout", [float("inf"), 1e300])
def test_a_timeout_may_be_without_end(timeout):
    assert Command("echo {} 1", timeout)("m").score == 1


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


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_an_error(tmp_path, monkeypatch, content, told):
    (tmp_path / "broken_in_this_test.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(wavg.WavgError, match=f"cannot import the evaluator .*{told}"):
        evaluator_of("broken_in_this_test:f", None, None)


@pytest.mark.parametrize("maximize", [None, "no", 1])
def test_a_direction_that_is_neither_is_refused(tmp_path, maximize):
    for ask in (wavg.sweep, wavg.soup):
        with pytest.raises(TypeError, match="maximize must be True or False"):
            ask(tmp_path, len, maximize=maximize)
    with pytest.raises(TypeError, match="maximize must be True or False"):
        wavg.best_checkpoints(tmp_path, {}, best=1, maximize=maximize)


def test_a_wrong_type_is_a_type_error():
    with pytest.raises(TypeError, match="must be a function"):
        evaluator_of(3, None, None)


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "scores_of_this_test.py").write_text("class A:\n    def f(model): return 0.25\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert evaluator_of("scores_of_this_test:A.f", None, None)({}).score == 0.25


def test_the_path_that_a_command_prints_is_no_score(tmp_path):
    path = tmp_path / "checkpoint-900" / "average-0"
    assert Command("echo 0.91 for {}")(path).score == 0.91
    assert "no number" in Command("echo {}")(path).error


def test_a_program_that_is_not_there_is_told_before_anything_is_scored():
    with pytest.raises(wavg.WavgError, match="cannot run pythn: there is no such program"):
        Command("pythn score.py {}")


@pytest.mark.parametrize("text", ["../score:accuracy", "score.py:accuracy", "./score.py:accuracy"])
def test_an_evaluator_named_as_a_file_is_told_as_a_module(text):
    with pytest.raises(wavg.WavgError, match="the name of a module, score:accuracy"):
        evaluator_of(text, None, None)
