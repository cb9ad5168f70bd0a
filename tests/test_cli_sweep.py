"""The commands that run experiments: what they print and write, and how they stop and go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

import wavg
from test_cli import assert_fails
from wavg import cli

MODULE = """
import numpy as np

def loss(model):
    print("evaluating")
    return abs(float(model["w"][0]) - 2)

def examples(model):
    return np.abs(model["w"][0] - np.array([1.0, 3.0, 5.0]))

def broken(model):
    raise ValueError("no data")

def stopped(model):
    if model["w"][0] == 6:
        raise KeyboardInterrupt
    return loss(model)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Five checkpoints and an evaluator in the current folder; call it as `wavg`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "score_it", raising=False)
    (tmp_path / "score_it.py").write_text(MODULE)
    for step, value in enumerate([6.0, 1.0, 2.0, 0.0, 4.0], start=6):
        wavg.save(f"m_{step}.npz", {"w": np.float32([value])})

    def call(*words):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


SWEEP = ("sweep", "m_*.npz", "--evaluate", "score_it:loss", "--minimize")
SOUP = ("soup", "m_*.npz", "--evaluate", "score_it:loss", "--minimize")


def test_a_sweep_prints_the_table_and_what_it_read(run):
    code, out, err = run(*SWEEP, "--weights", "equal", "--weights", "linear")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "score by score_it:loss, lower is better:"
    assert lines[3].split() == ["1", "10", "2.0000", "2.0000", "2.0000"]
    assert lines[4].split() == ["2", "9", "2.0000", "0.0000*", "0.6667"]
    assert lines[8] == "* best average: 0, the newest 2, equal"
    assert lines[9].endswith("read in 1 pass, with 2 running sums")
    assert lines[10].endswith("wavg average INPUT... -o OUTPUT --weights equal --last 2")
    assert "evaluating" not in out
    assert "evaluating" in err


def test_a_sweep_writes_the_best_the_csv_and_the_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, _ = run(*SWEEP, "-o", "best.npz", "--csv", "s.csv", "--plot", "s.png")
    assert code == 0
    assert out.splitlines()[-3:] == ["wrote best.npz", "wrote s.csv", "wrote s.png"]
    assert wavg.load("best.npz")["w"] == 2
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + 10
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert run(*SWEEP)[0] == 0  # the output is no checkpoint of the series


def test_json_is_one_object(run):
    code, out, _ = run(*SWEEP, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["best"] == {"n": 2, "weights": "equal", "score": 0.0}


@pytest.mark.parametrize("options", [("--csv", "x"), ("--plot", "x.png")])
def test_files_that_exist_are_refused_before_anything_is_scored(run, tmp_path, options):
    pytest.importorskip("matplotlib")
    (tmp_path / options[1]).write_text("mine")
    words = ("sweep", "m_*.npz", "--evaluate", "score_it:broken", "--minimize")
    assert_fails(run(*words, *options), f"{options[1]} exists; ")
    assert (tmp_path / options[1]).read_text() == "mine"
    assert run(*SWEEP, *options, "--overwrite")[0] == 0
    assert (tmp_path / options[1]).read_bytes() != b"mine"


def test_a_table_that_cannot_be_written_leaves_the_scores_on_the_screen(run, tmp_path, monkeypatch):
    spoil = "import os; os.rename('there', 'gone')"
    (tmp_path / "score_it.py").write_text(MODULE.replace('print("evaluating")', spoil, 1))
    (tmp_path / "there").mkdir()
    code, out, err = run(*SWEEP, "--csv", "there/x.csv")
    assert code == 1
    assert "* best average" in out
    assert "there is no folder" in err


def test_programs_of_an_evaluator_print_elsewhere(run, tmp_path):
    printing = "import os; os.system('echo from a program')"
    (tmp_path / "score_it.py").write_text(MODULE.replace('print("evaluating")', printing))
    words = [sys.executable, "-m", "wavg", *SWEEP, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["best"]["n"] == 2
    assert "from a program" in done.stderr


def test_the_best_is_written_with_the_options_of_the_sweep(run):
    words = ("--dtype", "float64", "--include", "w*", "--steps", "1,2,3,4,5", "--order", "given")
    _, out, _ = run(*SWEEP, *words)
    assert out.splitlines()[-1].endswith(
        "--weights equal --last 2 --steps 1.0,2.0,3.0,4.0,5.0 --order given --include 'w*' "
        "--dtype float64"
    )


def test_quiet_prints_nothing(run):
    code, out, _ = run(*SWEEP, "--quiet")
    assert (code, out) == (0, "")


def test_ties_are_marked(run):
    code, out, _ = run("sweep", "m_*.npz", "--evaluate", "score_it:examples", "--minimize")
    assert code == 0
    assert "~ within the standard error" in out


def test_a_command_scores(run):
    command = "stat -c 'size %s' {}"
    code, out, _ = run("sweep", "m_*.npz", "--evaluate-command", command, "--minimize")
    assert code == 0
    assert out.splitlines()[0] == f"score by {command}, lower is better:"
    assert out.splitlines()[8].startswith("* best average: ")


def test_a_stopped_sweep_says_how_to_go_on_and_does(run, tmp_path):
    words = ("sweep", "m_*.npz", "--evaluate", "score_it:stopped", "--minimize", "--journal", "j")
    code, out, err = run(*words)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].startswith("wavg: interrupted; the same call with the journal j ")
    (tmp_path / "score_it.py").write_text(MODULE.replace("KeyboardInterrupt", "ValueError('6')"))
    sys.modules.pop("score_it")
    code, out, _ = run(*words)
    assert code == 0
    assert "! the 5th newest alone: failed, ValueError: 6" in out
    code, out, err = run(*words, "--last", "3")
    assert code == 1
    assert "j is the journal of another series" in err
    assert "\n  steps: there 6.0, 7.0" in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_the_end_of_its_terminal_stops_a_sweep_as_a_person_does(run, tmp_path, name):
    signalled = f"import os, signal; os.kill(os.getpid(), signal.{name})"
    (tmp_path / "score_it.py").write_text(MODULE.replace("raise KeyboardInterrupt", signalled))
    words = ("sweep", "m_*.npz", "--evaluate", "score_it:stopped", "--minimize", "--journal", "j")
    code, _, err = run(*words)
    assert code == 128 + getattr(signal, name)
    assert "goes on from here" in err
    assert json.loads((tmp_path / "j").read_text().splitlines()[-1]) == {"stopped": "5 alone"}


def test_a_sweep_that_is_to_survive_its_terminal_does(run, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        signalled = "import os, signal; os.kill(os.getpid(), signal.SIGHUP)"
        (tmp_path / "score_it.py").write_text(MODULE.replace("raise KeyboardInterrupt", signalled))
        code, _, _ = run("sweep", "m_*.npz", "--evaluate", "score_it:stopped", "--minimize")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 0


def test_without_a_journal_an_interruption_says_there_is_one(run):
    code, _, err = run("sweep", "m_*.npz", "--evaluate", "score_it:stopped", "--minimize")
    assert code == 130
    assert err.splitlines()[-1].endswith("with a journal (--journal FILE) a later run can go on")


def test_nothing_scored_is_an_error_after_the_table(run):
    code, out, err = run("sweep", "m_*.npz", "--evaluate", "score_it:broken", "--minimize")
    assert code == 1
    assert "failed!" in out
    assert err.splitlines()[-1] == (
        "wavg: no evaluation succeeded; the first failed so: ValueError: no data"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("sweep", "m_*.npz", "--evaluate", "a:b"), "--maximize --minimize is required"),
        (("sweep", "m_*.npz", "--maximize"), "--evaluate --evaluate-command is required"),
        ((*SWEEP, "--maximize"), "not allowed with"),
        ((*SWEEP, "--last", "0"), "expected a whole number from 1 to 1,000,000, not '0'"),
        ((*SOUP, "--metric", "x"), "of a file that --metrics names"),
        (("average", "m_*.npz", "-o", "a.npz", "--best", "2"), "go together"),
        (("average", "m_*.npz", "-o", "a.npz", "--metrics", "x", "--minimize"), "go together"),
    ],
)
def test_a_wrong_usage_says_so(run, words, told):
    assert_fails(run(*words), told, code=2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("sweep", "m_*.npz", "--evaluate", "score_it:no", "--minimize"), "cannot import"),
        ((*SWEEP, "--plot", "p.txt"), "end its name with .png"),
        ((*SWEEP, "-o", "none/best.npz"), "there is no folder"),
        ((*SWEEP, "--csv", "none/s.csv"), "there is no folder"),
        ((*SWEEP, "--csv", "s.npz", "-o", "s.npz"), "written twice"),
        ((*SWEEP, "--timeout", "5"), "cannot be timed out"),
        ((*SOUP, "--budget", "3"), "leaves none for a soup"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_scored(run, words, told):
    assert_fails(run(*words), told)


def test_a_soup_reports_each_decision_and_writes_the_soup(run):
    code, out, _ = run(*SOUP, "-o", "soup.npz")
    assert code == 0
    verdicts = [line.split()[0] for line in out.splitlines() if line.endswith("joins")]
    assert verdicts == ["m_8.npz"]
    assert out.splitlines()[-1] == "wrote soup.npz"
    assert wavg.load("soup.npz")["w"] == 2
    code, out, _ = run(*SOUP, "--json", "--budget", "6")
    assert json.loads(out)["evaluations"] == 6


def test_a_soup_goes_by_recorded_metrics(run, tmp_path):
    (tmp_path / "log.csv").write_text("step,val\n6,4\n7,1\n8,0\n9,2\n10,2\n")
    code, out, _ = run(*SOUP, "--metrics", "log.csv")
    assert code == 0
    assert "after 5 evaluations" in out


def test_average_takes_the_best_by_recorded_metrics(run, tmp_path):
    (tmp_path / "log.csv").write_text("epoch,loss,val_loss\n6,0,4\n7,0,1\n8,0,0\n9,0,2\n")
    table = ("--metrics", "log.csv", "--metric", "val_loss", "--minimize")
    assert_fails(run("average", "m_*.npz", "-o", "a.npz", *table, "--best", "5"), "4 have")
    code, out, _ = run("average", "m_*.npz", "-o", "a.npz", *table, "--best", 2, "--overwrite")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["m_7.npz", "m_8.npz"]
    assert wavg.load("a.npz")["w"] == 1.5
    assert_fails(
        run("average", "m_*.npz", "-o", "b.npz", *table, "--best", 2, "--last", 2),
        "use one of them",
        code=2,
    )
