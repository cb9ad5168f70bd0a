"""The command line: what it prints where, what it writes, and how it exits."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import wavg
from wavg import cli, demo, picture, temporaries
from wavg import weights as schedules
from wavg.formats import FORMATS

STEPS = (1, 2, 9, 10)
FILES = [f"m_{step}.safetensors" for step in STEPS]
SHELL_ORDER = ["m_1.safetensors", "m_10.safetensors", "m_2.safetensors", "m_9.safetensors"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Four checkpoints in the current folder; call it with arguments for (exit, out, err)."""
    monkeypatch.chdir(tmp_path)
    for step, name in zip(STEPS, FILES, strict=True):
        tensors = {"w": np.float32([step, 1]), "b/c": np.full((2, 3), step, "f4"), "n": step}
        wavg.save(name, tensors, metadata={"step": str(step)})

    def call(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's way out
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def assert_fails(outcome, message, code=1):
    """One line on standard error that says why, nothing on standard output, no traceback."""
    found, out, err = outcome
    assert (found, out) == (code, "")
    lines = err.splitlines()
    if code == 1:
        assert len(lines) == 1
        assert lines[0].startswith("wavg: ")
    else:
        assert lines[0].startswith("usage: wavg")
        assert len(lines) == 2
    assert re.search(message, lines[-1])
    assert "Traceback" not in err


def values(path):
    return {name: array.tolist() for name, array in wavg.load(path).items()}


def error_of(outcome):
    """The one JSON object on standard output that tells the error of standard error."""
    code, out, err = outcome
    assert (code, err.startswith("wavg: ")) == (1, True)
    return json.loads(out)["error"]


# wavg average


def test_average_writes_the_file_and_tells_what_it_did(run):
    code, out, err = run("average", *FILES, "-o", "a.safetensors", "--weights", "linear")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()[1:5]] == [
        ["m_1.safetensors", "1", "0.1000"],
        ["m_2.safetensors", "2", "0.2000"],
        ["m_9.safetensors", "9", "0.3000"],
        ["m_10.safetensors", "10", "0.4000"],
    ]
    assert "weights linear: effective number 3.33 of 4, mean age 2.8 steps" in out
    assert "averaged: 2 tensors, 8 numbers" in out
    assert "carried over from the newest: 1 tensor" in out
    assert "n: int64 is not averaged, and the inputs differ" in out
    assert "wrote a.safetensors" in out.splitlines()[-1]
    mean = np.float32(7.2)
    assert values("a.safetensors") == {"w": [mean, 1], "b/c": [[mean] * 3] * 2, "n": 10}


def test_negative_weights_show_their_amplification(run):
    _, out, _ = run("average", *FILES[:2], "-o", "a.npz", "--weights=-1,2")
    assert "amplification 3" in out
    assert values("a.npz")["w"] == [3, 1]


JSON_KEYS = {
    "output", "written", "weights", "inputs", "effective_number", "mean_age", "amplification",
    "averaged", "carried", "differing", "optimizer_tensors", "bytes_read", "bytes_written",
    "disk_bytes", "paired", "projected_memory", "block", "workers",
}  # fmt: skip


def test_average_json_is_one_object_for_scripts(run):
    code, out, err = run("average", *FILES[:2], "-o", "a.npz", "--json", "--weights", "linear")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told.keys() == JSON_KEYS
    assert told["output"] == "a.npz"
    assert told["written"] is True
    assert told["weights"] == "linear"
    assert told["inputs"] == [
        {"path": "m_1.safetensors", "step": 1, "weight": pytest.approx(1 / 3)},
        {"path": "m_2.safetensors", "step": 2, "weight": pytest.approx(2 / 3)},
    ]
    assert told["effective_number"] == pytest.approx(1.8)
    assert told["mean_age"] == pytest.approx(1 / 3)
    assert told["amplification"] == pytest.approx(1)
    assert told["averaged"] == ["w", "b/c"]
    assert told["carried"] == {"n": "int64 is not averaged"}
    assert told["differing"] == ["n"]
    assert told["optimizer_tensors"] == 0
    assert told["bytes_read"] == 2 * (8 + 24 + 8)
    assert told["bytes_written"] == 8 + 24 + 8


def test_quiet_prints_nothing(run):
    assert run("average", *FILES, "-o", "a.npz", "--quiet") == (0, "", "")
    assert os.path.exists("a.npz")


def test_quiet_still_tells_errors(run):
    assert_fails(run("average", *FILES, "-o", FILES[0], "--quiet"), "exists")


def test_a_dry_run_writes_nothing(run):
    before = {name: os.stat(name).st_mtime_ns for name in sorted(os.listdir())}
    code, out, err = run("average", *FILES, "-o", "a.npz", "--dry-run")
    assert (code, err) == (0, "")
    assert "would write a.npz" in out
    assert "wrote" not in out
    assert {name: os.stat(name).st_mtime_ns for name in sorted(os.listdir())} == before


def test_a_dry_run_tells_the_same_plan_as_the_run(run):
    told = []
    for option in ("--dry-run", "--json"):
        _, out, _ = run("average", *FILES, "-o", "a.npz", "--json", option)
        told.append(json.loads(out))
    assert told[0].pop("written") is False
    assert told[1].pop("written") is True
    assert told[0].pop("differing") is None
    assert told[1].pop("differing") == ["n"]
    assert told[0] == told[1]


def test_an_existing_output_is_refused_and_left_as_it_is(run):
    with open("a.safetensors", "wb") as file:
        file.write(b"precious")
    outcome = run("average", *FILES, "-o", "a.safetensors")
    assert_fails(outcome, r"a\.safetensors exists; .*--overwrite")
    with open("a.safetensors", "rb") as file:
        assert file.read() == b"precious"


@pytest.mark.parametrize("output", [FILES[0], FILES[-1]])
def test_overwrite_replaces_the_output_even_where_it_is_an_input(run, output):
    code, _, _ = run("average", *FILES, "-o", output, "--overwrite")
    assert code == 0
    assert values(output)["w"] == [5.5, 1]
    assert sorted(os.listdir()) == sorted(FILES)


def test_inputs_are_put_in_natural_order_whatever_the_shell_made_of_them(run):
    _, out, _ = run("average", *SHELL_ORDER, "-o", "a.npz", "--json")
    assert [part["path"] for part in json.loads(out)["inputs"]] == FILES
    assert values("a.npz")["n"] == 10


def test_inputs_stay_as_given_on_request(run):
    _, out, _ = run("average", *SHELL_ORDER, "-o", "a.npz", "--json", "--order", "given")
    inputs = json.loads(out)["inputs"]
    assert [part["path"] for part in inputs] == SHELL_ORDER
    assert [part["step"] for part in inputs] == [1, 2, 3, 4]  # no increasing series in the names
    assert values("a.npz")["n"] == 9


@pytest.mark.parametrize("given", ["m_*.safetensors", "."])
def test_a_glob_or_a_folder_is_an_input(run, given):
    assert run("average", given, "-o", "a.npz", "--quiet")[0] == 0
    assert values("a.npz")["w"] == [5.5, 1]


def test_last_takes_the_newest(run):
    _, out, _ = run("average", *SHELL_ORDER, "-o", "a.npz", "--last", 2, "--json")
    assert [part["path"] for part in json.loads(out)["inputs"]] == FILES[2:]
    assert values("a.npz")["w"] == [9.5, 1]


def test_explicit_weights_are_oldest_first(run):
    code, out, _ = run("average", *SHELL_ORDER, "-o", "a.npz", "--weights", "1,2,3,10", "--json")
    assert code == 0
    weights = [part["weight"] for part in json.loads(out)["inputs"]]
    assert weights == [1 / 16, 2 / 16, 3 / 16, 10 / 16]
    assert values("a.npz")["w"] == [(1 + 4 + 27 + 100) / 16, 1]


def test_steps_may_be_given(run):
    _, out, _ = run("average", *FILES[:2], "-o", "a.npz", "--steps", "100,300", "--json")
    told = json.loads(out)
    assert [part["step"] for part in told["inputs"]] == [100, 300]
    assert told["mean_age"] == 100


def test_tensors_are_chosen_by_globs(run):
    options = ["--include", "b/*", "--include", "w", "--exclude", "w"]
    _, out, _ = run("average", *FILES, "-o", "a.npz", "--json", *options)
    told = json.loads(out)
    assert told["averaged"] == ["b/c"]
    assert told["carried"] == {"w": "excluded", "n": "not included"}
    assert values("a.npz") == {"w": [10, 1], "b/c": [[5.5] * 3] * 2, "n": 10}


def test_the_output_dtype_may_be_chosen(run):
    assert run("average", *FILES, "-o", "a.npz", "--dtype", "float64", "--quiet")[0] == 0
    dtypes = {name: array.dtype.name for name, array in wavg.load("a.npz").items()}
    assert dtypes == {"w": "float64", "b/c": "float64", "n": "int64"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "cubic"], "unknown weights 'cubic'; there are equal, linear"),
        (["--weights", "exponential:alpha=0"], "alpha must be a positive number"),
        (["--weights", "1,2,3"], "3 weights were given for 4 checkpoints"),
        (["--weights", "1,1,-1,-1"], "sum to zero"),
        (["--last", "5"], "last must be between 1 and 4"),
        (["--steps", "1,2"], "2 steps were given for 4 checkpoints"),
        (["--steps", "1,2,2,3"], "steps must increase"),
        (["--exclude", "nothing*"], "the pattern 'nothing\\*' matches no tensor"),
        (["--exclude", "*"], "there is no tensor to average"),
        (["--max-memory", "1kB"], "needs at least .* allow more with .*--max-memory"),
        (["nowhere.safetensors"], "there is no file or folder nowhere.safetensors"),
        (["*.h5"], r"no file matches \*\.h5"),
        (["./m_1.safetensors"], "is given twice"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_what_cannot_be_done_is_told_in_one_line(run, arguments, message, dry):
    extra = ["--dry-run"] if dry else []
    outcome = run("average", *FILES, *arguments, "-o", "a.safetensors", *extra)
    assert_fails(outcome, message)
    assert sorted(os.listdir()) == sorted(FILES)


def test_integers_that_differ_are_refused_on_request(run):
    outcome = run("average", *FILES, "-o", "a.npz", "--integers", "error")
    assert_fails(outcome, "n is int64, which is not averaged, and differs between")


@pytest.mark.parametrize("output", ["a.xyz", "a", "a.pt"])
def test_an_output_of_no_known_format_is_refused(run, output):
    assert_fails(run("average", *FILES, "-o", output), "end the output's name with one of")


def test_a_folder_as_output_after_files_is_told_as_one(run):
    assert_fails(run("average", *FILES, "-o", "."), r"\.: this is a folder; end the output's name")


def test_an_output_in_a_folder_that_does_not_exist_is_refused(run):
    assert_fails(
        run("average", *FILES, "-o", "no/a.npz"), "cannot write no/a.npz: there is no folder"
    )


def test_nan_in_an_input_is_told_with_its_place_and_allowed_on_request(run):
    wavg.save("m_11.safetensors", {**wavg.load(FILES[0]), "w": np.float32([1, np.nan])})
    arguments = ["average", *FILES, "m_11.safetensors", "-o", "a.npz"]
    assert_fails(run(*arguments), r"m_11\.safetensors: w\[1\] is nan; .*--allow-nonfinite")
    assert not os.path.exists("a.npz")
    assert run(*arguments, "--allow-nonfinite")[0] == 0
    assert np.isnan(values("a.npz")["w"][1])


def test_a_mismatch_lists_its_differences_below(run):
    wavg.save("m_11.safetensors", {"w": np.float32([1, 2, 3]), "n": 1, "extra": 1.0})
    code, out, err = run("average", FILES[0], "m_11.safetensors", "-o", "a.npz")
    assert (code, out) == (1, "")
    first, *differences = err.splitlines()
    assert first.startswith("wavg: 3 differences between the inputs and the newest")
    assert [line.strip() for line in differences] == [
        "m_1.safetensors: w is float32[2], not float32[3]",
        "m_1.safetensors: lacks extra (float64[])",
        "m_1.safetensors: also has b/c (float32[2, 3])",
    ]


def test_a_damaged_input_is_told_in_one_line(run):
    with open("m_11.safetensors", "wb") as file:
        file.write(b"<!doctype html><p>Please log in")
    assert_fails(run("average", *FILES, "m_11.safetensors", "-o", "a.npz"), "this is a web page")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["median"],
        ["average"],
        ["average", *FILES],
        ["average", "-o", "a.npz"],
        ["average", *FILES, "-o", "a.npz", "--last", "0"],
        ["average", *FILES, "-o", "a.npz", "--last", "two"],
        ["average", *FILES, "-o", "a.npz", "--workers", "0"],
        ["average", *FILES, "-o", "a.npz", "--steps", "1,two"],
        ["average", *FILES, "-o", "a.npz", "--max-memory", "lots"],
        ["average", *FILES, "-o", "a.npz", "--dtype", "int8"],
        ["average", *FILES, "-o", "a.npz", "--order", "random"],
        ["average", *FILES, "-o", "a.npz", "--colour"],
        ["weights", "linear"],
        ["weights", "linear", "-n", "0"],
        ["inspect"],
    ],
)
def test_bad_usage_exits_with_two(run, arguments):
    assert_fails(run(*arguments), r"^wavg.*: error: ", code=2)
    assert sorted(os.listdir()) == sorted(FILES)


def test_the_check_of_failures_sees_planted_ones():
    good = (1, "", "wavg: why\n")
    assert_fails(good, "why")
    for planted in [
        (0, "", "wavg: why\n"),
        (1, "partly done\n", "wavg: why\n"),
        (1, "", "wavg: something else\n"),
        (1, "", "Traceback (most recent call last):\nValueError: why\n"),
        (1, "", "why\n"),
        (2, "", "wavg: why\n"),
    ]:
        with pytest.raises(AssertionError):
            assert_fails(planted, "why")


def test_the_version_is_the_packages(run):
    code, out, err = run("--version")
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"wavg {re.escape(wavg.__version__)} \(kernel .+\)\n", out)


COMMANDS = sorted(cli._parser()[1])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_gives_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert out.partition("\nexample:\n")[2].startswith(f"  wavg {command} ")


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_understood(command):
    parser = cli._parser()[1][command]
    example = parser.epilog.splitlines()[1]
    parser.parse_intermixed_args(shlex.split(example)[2:])


def test_help_has_the_options_in_parts(run):
    out = run("average", "--help")[1]
    parts = re.findall(r"^(\w[\w ]*):$", out, re.MULTILINE)
    assert parts == [
        *("options", "inputs", "recorded metrics", "weights", "output", "numbers"),
        *("resources", "trust", "printing", "example"),
    ]
    assert re.findall("  -.*", out.partition("\noptions:")[2].partition("\n\n")[0]) == [
        "  -h, --help            show this help message and exit"
    ]


@pytest.mark.parametrize("command", ["average", "sweep", "soup"])
def test_help_lists_the_endings_of_outputs(run, command):
    out = run(command, "--help")[1]
    assert all(suffix in out for row in FORMATS for suffix in row.suffixes)


# wavg weights


def chart(out):
    """The rows of the chart as (step, weight, length of the bar)."""
    rows = [line.split() for line in out.splitlines()[1:-1]]
    return [(float(row[0]), float(row[1]), len("".join(row[2:]))) for row in rows]


def test_weights_for_n_checkpoints(run):
    code, out, err = run("weights", "linear", "-n", 4)
    assert (code, err) == (0, "")
    assert [row[:2] for row in chart(out)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert out.splitlines()[-1] == (
        "weights linear: effective number 3.33 of 4, mean age 1 steps, amplification 1"
    )


@pytest.mark.parametrize("spec", ["equal", "linear", "exponential:alpha=3", "5,0,1,-2,9,1,1"])
def test_bars_are_in_proportion_to_the_weights(run, spec):
    _, out, _ = run("weights", spec, "-n", 7)
    rows = chart(out)
    largest = max(abs(weight) for _, weight, _ in rows)
    assert len(rows) == 7
    for _, weight, bar in rows:
        assert bar == pytest.approx(40 * abs(weight) / largest, abs=0.51)


def test_negative_weights_have_bars_of_their_own(run):
    _, out, _ = run("weights", "2,-1,1", "-n", 3)
    assert [set(line.split()[2]) == {"-"} for line in out.splitlines()[1:4]] == [False, True, False]


def test_weights_for_steps(run):
    _, out, _ = run("weights", "equal", "--steps", "100,250,1000", "--json")
    told = json.loads(out)
    assert told["steps"] == [100, 250, 1000]
    assert told["mean_age"] == pytest.approx((900 + 750) / 3)


@pytest.mark.parametrize("given", [SHELL_ORDER, ["m_*.safetensors"], ["."]])
def test_weights_for_inputs_take_the_steps_from_their_names(run, given):
    _, out, _ = run("weights", "linear", *given)
    assert [row[:2] for row in chart(out)] == [(1, 0.1), (2, 0.2), (9, 0.3), (10, 0.4)]


def test_weights_json_is_one_object_for_scripts(run):
    _, out, _ = run("weights", "exponential", "-n", 3, "--json")
    told = json.loads(out)
    assert told.keys() == {
        "weights", "steps", "coefficients", "effective_number", "mean_age", "amplification",
    }  # fmt: skip
    merit = wavg.figures(wavg.exponential()([1, 2, 3]), [1, 2, 3])
    assert told["weights"] == "exponential:alpha=2"
    assert told["coefficients"] == merit.proportions.tolist()
    assert told["effective_number"] == merit.effective_number
    assert told["mean_age"] == merit.mean_age
    assert told["amplification"] == merit.amplification


@pytest.mark.parametrize("arguments", [[], ["--list"], ["linear", "--list"]])
def test_weights_are_listed_with_parameters_and_defaults(run, arguments):
    code, out, err = run("weights", *arguments)
    assert (code, err) == (0, "")
    for line in (
        "bema:kappa=0.5,eta=0.2,rho=10,gamma=1",
        "exponential:alpha=2",
        "post_hoc_ema:[gamma],[sigma_rel],[step],[tracked]",
        "    Weigh the j-th newest checkpoint exp(-j / alpha).",
    ):
        assert line in out.splitlines()
    _, out, _ = run("weights", *arguments, "--json")
    assert json.loads(out)["ema"] == {
        "decay": None, "half_life": None, "per": "snapshot", "debias": "true", "warmup": None,
        "gamma": "1", "power": "0.6666666666666666",
    }  # fmt: skip


def test_checkpoints_without_weights_are_refused(run):
    assert_fails(run("weights", "-n", 3), "say which weights: a SPEC", code=2)


def test_numbers_say_for_how_many_checkpoints_they_are(run, tmp_path):
    _, out, _ = run("weights", "1,2,5", "--compare", "equal")
    assert [row[1] for row in chart(out.partition("\n\n")[0])] == [0.125, 0.25, 0.625]
    (tmp_path / "w.csv").write_text("1\n3\n")
    _, out, _ = run("weights", "w.csv")
    assert [row[1] for row in chart(out)] == [0.25, 0.75]


def test_batch_norm_is_noted_where_anything_was_averaged(run):
    for step in (1, 2):
        wavg.save(f"n_{step}.npz", {"bn/running_mean": np.float32([step])})
    _, out, _ = run("average", "n_1.npz", "n_2.npz", "-o", "a.npz")
    assert "note: batch-norm statistics" in out
    _, out, _ = run("average", "n_1.npz", "n_2.npz", "-o", "b.npz", "--weights", "0,1")
    assert "batch-norm" not in out


@pytest.mark.parametrize(
    "sources",
    [[], ["-n", 3, "--steps", "1,2,3"], [*FILES, "-n", 4], [*FILES, "--steps", "1,2,3,4"]],
)
def test_weights_need_exactly_one_source(run, sources):
    assert_fails(
        run("weights", "linear", *sources), "one of -n N, --steps A,B,... or INPUT", code=2
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cubic", "-n", 3], "unknown weights 'cubic'"),
        (["1,2", "-n", 3], "2 weights were given for 3 checkpoints"),
        (["1,-1", "-n", 2], "sum to zero"),
        (["linear", "nowhere.h5"], "there is no file or folder nowhere.h5"),
    ],
)
def test_weights_without_sense_are_told_in_one_line(run, arguments, message):
    assert_fails(run("weights", *arguments), message)


def test_more_checkpoints_than_there_are_get_advice(run):
    message = "last must be between 1 and 4, .* not 9; leave it away for all, or take lawa:last=9"
    assert_fails(run("average", *FILES, "-o", "a.npz", "--last", 9), message)
    outcome = run("average", *FILES, "-o", "a.npz", "--last", "0")
    assert_fails(outcome, "expected a whole number from 1 to 1,000,000, not '0'", code=2)


@pytest.mark.parametrize("steps", ["3,2,1", "1,1,2", "1,nan,3", "1,2,inf"])
def test_steps_that_do_not_increase_are_refused_here_too(run, steps):
    assert run("weights", "equal", "--steps", steps)[0] in (1, 2)


@pytest.mark.parametrize("steps", ["1,nan,3,4", "1,2,3,inf"])
def test_steps_that_are_not_finite_are_refused(run, steps):
    assert run("average", *FILES, "-o", "a.npz", "--steps", steps, "--dry-run")[0] in (1, 2)


def test_weights_that_nearly_sum_to_zero_are_shown_or_told_in_one_line(run):
    assert run("weights", "1e200,-1e200,1e-200", "-n", 3)[0] in (0, 1)


def test_several_schedules_are_shown_one_after_the_other(run):
    _, out, _ = run(
        "weights", "linear", "-n", 4, "--compare", "equal", "--compare", "dema:decay=0.5"
    )
    parts = out.split("\n\n")
    assert [len(chart(part)) for part in parts] == [4, 4, 4]
    lasts = [part.splitlines()[-1].partition(": ")[0] for part in parts]
    assert lasts == ["weights linear", "weights equal", "weights dema:decay=0.5"]


def test_several_schedules_are_one_json_object_with_a_list(run):
    _, out, _ = run("weights", "linear", *FILES, "--compare", "lawa:last=2", "--json")
    told = json.loads(out)["schedules"]
    assert [each["weights"] for each in told] == ["linear", "lawa:last=2"]
    assert [each["coefficients"] for each in told] == [[0.1, 0.2, 0.3, 0.4], [0, 0, 0.5, 0.5]]
    assert all(each["steps"] == list(STEPS) for each in told)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_weights_are_drawn(run, tmp_path, ending):
    pytest.importorskip("matplotlib")
    arguments = ["weights", "linear", "-n", 5, "--compare", "bema", "--plot", f"w.{ending}"]
    code, out, err = run(*arguments)
    assert (code, err, out.splitlines()[-1]) == (0, "", f"drew w.{ending}")
    picture = (tmp_path / f"w.{ending}").read_bytes()
    assert picture.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[ending])
    run(*arguments)
    assert (tmp_path / f"w.{ending}").read_bytes() == picture


def test_a_picture_has_whole_steps_and_what_its_figures_are(run, tmp_path):
    pytest.importorskip("matplotlib")
    run("weights", "linear", "-n", 10, *["--compare", "equal"] * 3, "--plot", "w.svg")
    words = re.findall(r">([^<]+)</text>", (tmp_path / "w.svg").read_text())
    assert "in a panel: effective number, mean age in steps, × amplification" in words
    assert "dotted: equal weights" in words  # a line of its own beside one row of panels
    steps = [word for word in words if re.fullmatch(r"\d+(\.\d+)?", word) and float(word) > 1]
    assert steps
    assert not any("." in step for step in steps)


def test_bars_are_seen_however_near_some_steps_are():
    assert picture._width([1, 2, 3]) == 0.8
    assert picture._width([1, 2, 1_000_001]) == 5000
    assert picture._width([7]) == picture._width([7, 7]) == 0.8


def test_large_steps_keep_their_digits(run):
    _, out, _ = run("weights", "equal", "--steps", "1234567,1234568")
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["1234567", "1234568"]
    files = [f"b_{step}.npz" for step in (1234567, 1234568)]
    for name in files:
        wavg.save(name, {"w": np.float32([1])})
    _, out, _ = run("average", *files, "-o", "b.safetensors")
    assert re.search(r"^b_1234568\.npz +1234568 ", out, re.MULTILINE)
    _, out, _ = run("inspect", "b.safetensors")
    assert "up to step 1234568, weights" in out
    assert re.search(r"^ +b_1234567\.npz +1234567 ", out, re.MULTILINE)


@pytest.mark.parametrize("name", ["w.doc", "nowhere/w.png"])
def test_a_picture_that_cannot_be_is_told_in_one_line(run, name):
    pytest.importorskip("matplotlib")
    assert_fails(run("weights", "linear", "-n", 5, "--plot", name), f"wavg: {name}: ")


def test_a_picture_without_matplotlib_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = run("weights", "linear", "-n", 5, "--plot", "w.png")
    assert_fails(outcome, r"a picture needs matplotlib .*: pip install 'wavg\[plot\]'")


@pytest.mark.parametrize("command", ["average", "weights"])
def test_help_lists_every_schedule(run, command):
    _, out, _ = run(command, "--help")
    told = re.sub(r"\s|-", "", out)
    assert all(spec.replace("-", "") in told for spec in schedules.KNOWN)


def test_weights_may_begin_with_a_minus(run):
    code, out, _ = run("weights", "-1,2", "-n", 2)
    assert (code, [row[1] for row in chart(out)]) == (0, [-1, 2])


@pytest.mark.parametrize(
    "arguments",
    [
        ["weights", "linear", "--json", *FILES],
        ["average", FILES[0], "-o", "a.npz", *FILES[1:]],
        ["average", *FILES[:2], "--last", "3", *FILES[2:], "-o", "a.npz"],
    ],
)
def test_options_may_stand_before_or_between_inputs(run, arguments):
    assert run(*arguments)[0] == 0


# wavg inspect


def test_inspect_shows_names_dtypes_shapes_and_metadata(run):
    code, out, err = run("inspect", FILES[0])
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("m_1.safetensors: safetensors, ")
    assert lines[1:3] == ["  step: 1", "tensors: 3, 9 numbers"]
    assert [line.split() for line in lines[3:]] == [
        ["w", "float32", "2", "8", "bytes"],
        ["b/c", "float32", "2", "×", "3", "24", "bytes"],
        ["n", "int64", "scalar", "8", "bytes"],
    ]


def test_inspect_json_is_one_object_for_scripts(run):
    _, out, _ = run("inspect", FILES[0], "--json")
    told = json.loads(out)
    assert told == {
        "path": FILES[0],
        "format": "safetensors",
        "bytes": os.path.getsize(FILES[0]),
        "metadata": {"step": "1"},
        "tensors": [
            {"name": "w", "dtype": "float32", "shape": [2], "bytes": 8},
            {"name": "b/c", "dtype": "float32", "shape": [2, 3], "bytes": 24},
            {"name": "n", "dtype": "int64", "shape": [], "bytes": 8},
        ],
        "record": None,
        "unreadable_record": None,
        "optimizer": [],
    }


@pytest.mark.parametrize("suffix", ["npz", "h5"])
def test_inspect_opens_every_format(run, suffix):
    wavg.save(f"m.{suffix}", {"layer/w": np.ones((2, 3), np.float16)})
    _, out, _ = run("inspect", f"m.{suffix}", "--json")
    assert json.loads(out)["tensors"] == [
        {"name": "layer/w", "dtype": "float16", "shape": [2, 3], "bytes": 12}
    ]


@pytest.mark.parametrize("path", ["nowhere.h5", ".", "text.h5"])
def test_inspect_of_no_checkpoint_is_told_in_one_line(run, path):
    with open("text.h5", "w") as file:
        file.write("hello")
    assert_fails(run("inspect", path), "")


# wavg demo


def rows_of(text):
    """The table of the demo: n, then scores."""
    lines = re.findall(r"^ *\d+(?: +\d\.\d{3})+$", text, re.MULTILINE)
    return {int(n): [float(score) for score in scores] for n, *scores in map(str.split, lines)}


def recomputed(folder):
    """The demo's table, from its files, through the public functions and other arithmetic."""
    _, _, x, y = demo.blobs()
    paths = [os.path.join(folder, f"model_{epoch}.safetensors") for epoch in range(491, 501)]
    models = [wavg.load(path) for path in paths]

    def score(model):
        hidden = np.maximum(x @ model["hidden/kernel"] + model["hidden/bias"], 0)
        logits = hidden @ model["output/kernel"] + model["output/bias"]
        return round(float((logits.argmax(axis=1) == y).mean()), 3)

    return {
        n: [score(models[-n]), *(score(wavg.average(models[-n:], spec)) for spec in demo.SCHEDULES)]
        for n in range(1, 11)
    }


def test_demo_shows_what_the_public_functions_compute(run):
    code, out, err = run("demo", "first")
    assert (code, err) == (0, "")
    shown, right = rows_of(out), recomputed("first")
    assert shown == right
    assert shown[1] == [shown[1][0]] * 4  # the average of one is that one
    planted = out.replace(f"{right[10][1]:.3f}", "0.123")
    assert rows_of(planted) != right


def test_demo_runs_twice_and_tells_the_same(run):
    first, second = run("demo", "again"), run("demo", "again")
    assert first[0] == 0
    assert first == second
    names = sorted(os.listdir("again"))
    assert [name for name in names if not name.endswith(".png")] == sorted(
        f"model_{epoch}.safetensors" for epoch in range(491, 501)
    )


@pytest.mark.parametrize("name", ["model_500.safetensors", "model_1.safetensors", "m.h5"])
def test_demo_stays_out_of_a_folder_with_checkpoints_of_another_run(run, name):
    os.mkdir("mine")
    wavg.save(f"mine/{name}", {"w": np.float32([7])})
    code, _, err = run("demo", "mine")
    assert (code, os.listdir("mine")) == (1, [name])
    assert "mine holds checkpoints that are not the demo's" in err


def test_demo_keeps_to_its_own_files(run):
    os.mkdir("mine")
    with open("mine/notes.txt", "w") as file:
        file.write("keep")
    run("demo", "mine")
    with open("mine/notes.txt") as file:
        assert file.read() == "keep"


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_demo_draws_a_picture(run):
    _, out, _ = run("demo", "drawn")
    [path] = re.findall(r"picture: (.*\.png)", out)
    with open(path, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_demo_without_matplotlib_says_how_to_get_the_picture(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, _ = run("demo", "plain")
    assert code == 0
    assert "picture: none: `pip install matplotlib`" in out
    assert not [name for name in os.listdir("plain") if name.endswith(".png")]


def test_what_the_demo_says_comes_next_works(run):
    _, out, _ = run("demo", "next")
    [line] = re.findall(r"next: +wavg (.*)", out)
    assert run(*line.replace("'", "").split(), "--quiet") == (0, "", "")
    models = [wavg.load(f"next/model_{epoch}.safetensors") for epoch in range(491, 501)]
    right = wavg.average(models, re.search("--weights (.*)", line)[1])
    for name, array in wavg.load("average.safetensors").items():
        assert array.tobytes() == right[name].tobytes()


# As a process of its own


def process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "wavg", *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        timeout=60,
    )


def test_as_a_process_it_averages_and_exits_with_zero(run):
    done = process("average", *SHELL_ORDER, "-o", "a.npz", "--last", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "wrote a.npz" in done.stdout
    assert values("a.npz")["w"] == [9.5, 1]


def test_as_a_process_it_fails_in_one_line(run):
    done = process("average", "nowhere.h5", "-o", "a.npz")
    assert_fails(
        (done.returncode, done.stdout, done.stderr), "there is no file or folder nowhere.h5"
    )


def test_bars_are_ascii_where_the_terminal_is(run):
    done = process("weights", "linear", "-n", "3", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert [row[2] for row in chart(done.stdout)] == [13, 27, 40]
    assert set(done.stdout.splitlines()[3].split()[2]) == {"#"}


def test_inspect_works_where_the_terminal_is_ascii(run):
    assert process("inspect", FILES[0], PYTHONIOENCODING="ascii").returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_report_that_cannot_be_printed_does_not_hide_that_the_work_is_done(tmp_path):
    inputs = [str(tmp_path / f"m_{step}.safetensors") for step in (1, 2)]
    for path in inputs:
        wavg.save(path, {"w": np.float32([1])})
    output = tmp_path / "average.safetensors"
    command = [sys.executable, "-m", "wavg", "average", *inputs, "-o", str(output)]
    for unbuffered in ("", "1"):
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*command, "--overwrite"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                env=environment,
            )
        assert done.returncode == 1
        assert done.stderr == (
            "wavg: standard output takes no more: No space left on device; "
            "what was done by then stands\n"
        )
        assert wavg.load(output)


# what went wrong, as JSON and in a line


def test_an_error_is_one_json_object_where_one_was_asked_for(run):
    outcome = run("average", *FILES, "-o", "a.npz", "--exclude", "*", "--json")
    told = error_of(outcome)
    assert list(told) == ["type", "message", "path", "tensor", "differences"]
    assert outcome[2] == f"wavg: {told['message']}\n"
    Path("a.npz").touch()
    assert error_of(run("average", *FILES, "-o", "a.npz", "--json")) == {
        "type": "OutputExistsError",
        "message": "a.npz exists; choose another output, or pass --overwrite",
        "path": "a.npz",
        "tensor": None,
        "differences": [],
    }


def test_an_error_as_json_has_the_tensor_and_the_differences(run):
    tensors = wavg.load(FILES[0]) | {"w": np.float32([np.nan, 1])}
    wavg.save("nan_11.safetensors", tensors)
    wavg.save("other_12.safetensors", tensors | {"b/c": np.ones((3, 2), np.float32)})
    told = error_of(run("average", FILES[0], "other_12.safetensors", "-o", "a.npz", "--json"))
    assert (told["type"], told["tensor"]) == ("StructureMismatchError", None)
    assert len(told["differences"]) == 1
    assert "b/c" in told["differences"][0]
    assert told["message"].endswith(":")
    told = error_of(run("average", FILES[0], "nan_11.safetensors", "-o", "a.npz", "--json"))
    found = [told[key] for key in ("type", "path", "tensor")]
    assert found == ["NonFiniteError", "nan_11.safetensors", "w"]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["inspect", "nothing.npz"], "FileNotFoundError"),
        (["verify", FILES[0]], "RecordError"),
        (["weights", "nonesuch", "-n", "3"], "WeightError"),
        (["sweep", *FILES, "--evaluate", "nonesuch:f", "--minimize"], "WavgError"),
        (["soup", *FILES, "--evaluate", "nonesuch:f", "--minimize"], "WavgError"),
    ],
)
def test_every_command_tells_its_errors_as_json(run, words, kind):
    assert error_of(run(*words, "--json"))["type"] == kind
    code, out, _ = run(*words)
    assert (code, out) == (1, "")


def test_an_error_behind_a_result_that_is_printed_is_no_second_object(run):
    run("average", *FILES, "-o", "a.safetensors", "--quiet")
    with open("a.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x77")
    code, out, err = run("verify", "a.safetensors", "--full", "--json")
    assert code == 1
    assert json.loads(out)["faults"]
    assert err.startswith("wavg: a.safetensors is not what")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_an_error_as_json_that_cannot_be_printed_is_told_once(run):
    words = [sys.executable, "-m", "wavg", "inspect", "nothing.npz", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "wavg: nothing.npz: No such file or directory\n"


@pytest.mark.skipif(os.name != "posix", reason="elsewhere the current folder is not removed")
@pytest.mark.parametrize("json_too", [False, True])
def test_a_current_folder_that_was_removed_is_told_as_that(run, json_too):
    Path("gone").mkdir()
    os.chdir("gone")
    os.rmdir("../gone")
    inputs = [f"../{name}" for name in FILES[:2]]
    code, out, err = run("average", *inputs, "-o", "../a.npz", *["--json"] * json_too)
    assert (code, out != "") == (1, json_too)
    assert err.startswith("wavg: the current folder is no more")


@pytest.mark.parametrize("quiet", [False, True])
def test_what_cannot_be_removed_is_a_warning_in_one_line(run, monkeypatch, quiet):
    def refused(path):
        raise PermissionError(13, "Permission denied", path)

    Path("a\nb").mkdir()
    words = ["average", *FILES, "-o", "a\nb/m.npz", *["--quiet"] * quiet]
    assert run(*words)[0] == 0
    monkeypatch.setattr(temporaries, "remove", refused)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        code, out, err = run(*words, "--overwrite")
        assert warnings.showwarning is before
    assert (code, out == "") == (0, quiet)
    for line in err.splitlines():
        assert re.match(r"wavg: warning: .*a\\nb/\.m\.npz\..* cannot be removed \(Permiss", line)
    assert err


def test_warnings_of_others_keep_their_place(run, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda *told: shown.append(told[2:4]))
    Path("me.py").write_text(
        "import warnings\ndef f(t):\n    warnings.warn('mine')\n    return 1\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = run("sweep", *FILES, "--evaluate", "me:f", "--minimize", "--quiet")
    assert (code, err) == (0, "")
    assert {*shown} == {(os.path.abspath("me.py"), 3)}


def test_an_empty_name_of_an_output_is_told_as_that(run):
    for words in (["average", *FILES], ["average", "."]):
        assert_fails(run(*words, "-o", ""), "^wavg: the output's name is empty; name a file")
    with pytest.raises(wavg.OutputError, match="name is empty"):
        wavg.save("", {"w": 1.0})


def test_a_refused_permission_is_told_with_what_to_do(run, monkeypatch):
    def refused(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refused)
    assert_fails(run("inspect", FILES[0]), f"{FILES[0]}: Permission denied; ask whoever owns it")


SCRIPT = "import sys; from _wavg import main; sys.exit(main())"  # what an installer makes of it


@pytest.mark.skipif(os.name != "posix", reason="signals and shells of POSIX")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_it_as_one_and_a_shell_sees_which(run, tmp_path, name, status):
    (tmp_path / "me.py").write_text(
        f"import os, signal\ndef end(tensors):\n    os.kill(os.getpid(), signal.{name})\n"
    )
    words = [sys.executable, "-c", SCRIPT, "sweep", *FILES, "--evaluate", "me:end", "--minimize"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == -getattr(signal, name)
    assert done.stdout == ""
    assert re.fullmatch("wavg: interrupted; .*\n", done.stderr)
    done = subprocess.run(["sh", "-c", '"$@"; echo $?', "sh", *words], capture_output=True)
    assert done.stdout.split()[-1] == b"%d" % status


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interruption_before_anything_is_begun_is_silent(tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    places = [str(tmp_path), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--version"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def beginning(numpy, tmp_path, limit=""):
    """Run the command with a module in NumPy's place, in a shell that may set a limit first."""
    (tmp_path / "numpy.py").write_text(numpy)
    places = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    environment = {key: text for key, text in os.environ.items() if "BLAS" not in key}
    return subprocess.run(
        ["sh", "-c", f'{limit} "$@"', "sh", sys.executable, "-c", SCRIPT, "--version"],
        capture_output=True,
        text=True,
        env={**environment, **places},
        timeout=60,
    )


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize(
    ("limit", "threads"),
    [
        ("ulimit -v 16000000;", "1"),
        ("ulimit -v 16000000; OPENBLAS_NUM_THREADS=2", "2"),
        ("ulimit -v unlimited;", "None"),
    ],
)
def test_openblas_starts_no_threads_where_memory_is_limited(tmp_path, limit, threads):
    numpy = "import os\nprint(os.environ.get('OPENBLAS_NUM_THREADS'), flush=True)\nos._exit(0)\n"
    done = beginning(numpy, tmp_path, limit)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{threads}\n", "")


def test_no_memory_to_begin_with_is_told_in_a_line(tmp_path):
    done = beginning("raise MemoryError\n", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("wavg: out of memory before .*\n", done.stderr)


def test_an_interruption_while_arguments_are_read_is_told(run, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", interrupted)
    expected = (130, "", "wavg: interrupted; nothing is half-written\n")
    assert run("--version") == expected


def advice():
    """All that messages say of options, as the source has it."""
    for path in sorted(Path(wavg.__file__).parent.rglob("*.py")):
        if not path.name.startswith("cli"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield from re.findall(r"[^\s(]*\s?\([^\s)]*--[^)]*\)", node.value)


def test_what_a_person_at_a_terminal_is_told_has_no_names_of_python(run):
    for words, told in [
        (["-o", FILES[0]], "choose another output, or pass --overwrite$"),
        (["-o", "/dev/null"], "name a file, or, to write nothing, use --dry-run$"),
        (["-o", "a.npz", "--last", "9"], "^wavg: --last must be between 1 and 4"),
        (["-o", "a.npz", "--sha256"], "leave --sha256 out, or write safetensors$"),
        (["-o", "a.npz", "--max-memory", "1"], "allow more with --max-memory$"),
    ]:
        assert_fails(run("average", *FILES, *words), told)


def test_advice_names_an_option_of_python_and_behind_it_one_of_the_command_line():
    options = {
        option
        for command in cli._parser()[1].values()
        for action in command._actions
        for option in action.option_strings
    }
    found = list(advice())
    assert len(found) > 15
    for text in found:
        shown = cli._BOTH_NAMES.sub(r"\1", text.replace("\n", " ").strip("`"))
        assert re.match("--[a-z0-9-]+", shown)[0] in options, text


def test_an_average_among_the_inputs_is_said_to_be_one(tmp_path, capsys):
    for step in (1, 2):
        wavg.save(tmp_path / f"m_{step}.safetensors", {"w": np.float32([step])})
    inputs = f"{tmp_path}/*.safetensors"
    assert cli.main(["average", inputs, "-o", f"{tmp_path}/average.safetensors"]) == 0
    assert "itself an average" not in capsys.readouterr().out
    assert cli.main(["average", inputs, "-o", f"{tmp_path}/again.safetensors"]) == 0
    told = f"note: {tmp_path}/average.safetensors is itself an average that wavg made\n"
    assert told in capsys.readouterr().out


def test_a_dry_run_says_that_it_compares_no_digests_and_two_lists_are_refused(tmp_path, capsys):
    wavg.save(tmp_path / "m_1.safetensors", {"w": np.float32([1])})
    (tmp_path / "sums").write_text(f"{'0' * 64}  m_1.safetensors\n")
    words = ["average", f"{tmp_path}/m_1.safetensors", "-o", f"{tmp_path}/out.safetensors"]
    words += ["--check-sha256", f"{tmp_path}/sums"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "note: a dry run reads no tensors, and so compares no digests" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main([*words, "--check-sha256", f"{tmp_path}/sums"])
    assert "--check-sha256 is given twice" in capsys.readouterr().err
