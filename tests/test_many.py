"""Several averages in one pass over the inputs: the bytes of as many passes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import wavg
from contract import random_array
from wavg import cli, stream, tasks, workers

WEIGHTS = ["equal", "linear", "exponential:alpha=2"]
LASTS = [1, 2, 5]


@pytest.fixture(params=[".safetensors", ".h5", ".npz"])
def run(request, tmp_path):
    """Five checkpoints with numbers of several formats, integers that differ, and zeros."""
    rng = np.random.default_rng(3)
    for step in range(1, 6):
        model = {
            f"layer/{dtype}": random_array(rng, dtype, (40, 30))
            for dtype in ("float32", "float16", "float64")
        }
        model["layer/zeros"] = np.array([0.0, -0.0, 0.0 if step < 5 else -0.0], np.float32)
        model["layer/steps"] = np.array([step if step < 4 else 4])
        wavg.save(tmp_path / f"model_{step}{request.param}", model)
    return tmp_path, request.param


def test_the_files_are_those_of_single_passes(run):
    folder, suffix = run
    inputs = f"{folder}/model_*{suffix}"
    reports = wavg.average_checkpoints(
        inputs, folder / f"a-{{weights}}-{{last}}{suffix}", weights=WEIGHTS, last=LASTS
    )
    assert len(reports) == 9
    for report, (weights, last) in zip(reports, itertools.product(WEIGHTS, LASTS), strict=True):
        single = wavg.average_checkpoints(
            inputs, folder / f"b{suffix}", weights=weights, last=last, overwrite=True
        )
        assert Path(report.output).read_bytes() == Path(single.output).read_bytes()
        assert report.plan.inputs == single.plan.inputs
        assert report.plan.figures.mean_age == single.plan.figures.mean_age
        assert report.differing == single.differing
        assert report.output == report.plan.output
    assert {report.differing for report in reports} == {(), ("layer/steps",)}


def test_arrays_come_as_a_list(run):
    folder, suffix = run
    inputs = f"{folder}/model_*{suffix}"
    results = wavg.average_checkpoints(inputs, last=[2, 3])
    assert len(results) == 2
    for result, last in zip(results, (2, 3), strict=True):
        single = wavg.average_checkpoints(inputs, last=last)
        assert list(result) == list(single)
        assert all(result[name].tobytes() == single[name].tobytes() for name in single)


def test_every_input_is_read_once(run, monkeypatch):
    folder, suffix = run
    read = []
    original = workers.Checkpoint.read
    monkeypatch.setattr(
        workers.Checkpoint,
        "read",
        lambda self, spec, start, out: (
            read.append(out.nbytes),
            original(self, spec, start, out),
        )[1],
    )
    inputs = f"{folder}/model_*{suffix}"
    wavg.average_checkpoints(inputs)
    once = sum(read)
    read.clear()
    wavg.average_checkpoints(inputs, weights=WEIGHTS, last=LASTS)
    assert sum(read) == once


def test_explicit_weights_may_be_several():
    assert len(wavg.weights.resolve([1, 2]).coefficients(np.arange(2.0))) == 2
    assert wavg.weights.is_several([[1, 2], [3, 4]])
    assert wavg.weights.is_several(np.eye(2))
    assert not wavg.weights.is_several(np.ones(2))


def test_a_list_of_one_still_returns_a_list(run):
    folder, suffix = run
    (plan,) = wavg.plan_average(f"{folder}/model_*{suffix}", last=[3])
    assert len(plan.inputs) == 3


def test_an_average_asked_for_twice_is_told_so(run):
    folder, suffix = run
    with pytest.raises(wavg.WavgError, match="one of them is asked for twice"):
        wavg.average_checkpoints(
            f"{folder}/model_*{suffix}",
            folder / f"a-{{weights}}{suffix}",
            weights=["exponential", "exponential:alpha=2"],
        )


def test_a_misspelt_placeholder_is_refused(run):
    folder, suffix = run
    with pytest.raises(wavg.WavgError, match=r"\{weight\} stands for nothing"):
        wavg.average_checkpoints(f"{folder}/model_*{suffix}", folder / f"a-{{weight}}{suffix}")
    assert not list(folder.glob("a-*"))


def test_outputs_that_would_be_one_file_are_refused(run):
    folder, suffix = run
    with pytest.raises(wavg.OutputError, match=r"put \{weights\} and \{last\} into"):
        wavg.average_checkpoints(
            f"{folder}/model_*{suffix}", folder / f"a-{{last}}{suffix}", weights=["equal", "linear"]
        )
    assert not list(folder.glob("a-*"))


def test_nothing_is_written_if_one_output_exists(run):
    folder, suffix = run
    (folder / f"a-2{suffix}").write_bytes(b"precious")
    with pytest.raises(wavg.OutputExistsError, match="a-2"):
        wavg.average_checkpoints(
            f"{folder}/model_*{suffix}", folder / f"a-{{last}}{suffix}", last=[1, 2]
        )
    assert [path.name for path in folder.glob("a-*")] == [f"a-2{suffix}"]
    assert (folder / f"a-2{suffix}").read_bytes() == b"precious"


@pytest.mark.parametrize("options", [{"weights": []}, {"last": []}])
def test_an_empty_list_is_refused(run, options):
    folder, suffix = run
    with pytest.raises(wavg.WeightError):
        wavg.average_checkpoints(f"{folder}/model_*{suffix}", **options)


def test_every_last_is_checked(run):
    folder, suffix = run
    with pytest.raises(wavg.WeightError, match="between 1 and 5"):
        wavg.average_checkpoints(f"{folder}/model_*{suffix}", last=[2, 6])


def test_a_name_may_hold_the_fields_for_one_average_too(run):
    folder, suffix = run
    report = wavg.average_checkpoints(
        f"{folder}/model_*{suffix}", f"{folder}/{{weights}}-{{last}}{suffix}"
    )
    assert Path(report.output).name == f"equal-5{suffix}"


def test_the_command_makes_them(run, capsys):
    folder, suffix = run
    arguments = ["average", f"{folder}/model_*{suffix}", "-o", f"{folder}/{{weights}}-{{last}}.npz"]
    arguments += ["--weights", "equal", "--weights", "linear", "--last", "2", "--last", "5"]
    assert cli.main([*arguments, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert dry.replace("would write", "wrote") == told.replace(", and the inputs differ", "")
    assert sorted(path.name for path in folder.glob("*-?.npz")) == [
        "equal-2.npz",
        "equal-5.npz",
        "linear-2.npz",
        "linear-5.npz",
    ]
    assert cli.main([*arguments, "--overwrite", "--json"]) == 0
    averages = json.loads(capsys.readouterr().out)["averages"]
    assert [(len(a["inputs"]), a["weights"]) for a in averages] == [
        (2, "equal"),
        (5, "equal"),
        (2, "linear"),
        (5, "linear"),
    ]


def test_a_second_run_over_the_folder_does_not_average_the_first_ones_outputs(run):
    folder, suffix = run
    template = folder / f"avg-{{weights}}-{{last}}{suffix}"
    first = wavg.average_checkpoints(folder, template, weights=["equal", "linear"])
    again = wavg.average_checkpoints(folder, template, weights=["equal", "linear"], overwrite=True)
    assert [report.plan.inputs for report in again] == [report.plan.inputs for report in first]
    assert [report.output for report in again] == [report.output for report in first]


def test_the_work_is_divided_alike_whatever_the_order_of_the_lasts(run, monkeypatch):
    folder, suffix = run
    monkeypatch.setattr(tasks, "_CHUNK_BYTES", 5 * 1200 * 8)
    chunks = []
    original = workers.Job.__call__
    monkeypatch.setattr(
        workers.Job,
        "__call__",
        lambda self, chunk: (chunks.append(len(chunk)), original(self, chunk))[1],
    )
    wavg.average_checkpoints(f"{folder}/model_*{suffix}", last=[1, 5])
    ascending = list(chunks)
    chunks.clear()
    wavg.average_checkpoints(f"{folder}/model_*{suffix}", last=[5, 1])
    assert sorted(chunks) == sorted(ascending)


def test_if_an_output_appears_meanwhile_none_is_published(run, monkeypatch):
    folder, suffix = run
    original = stream.run

    def appear(*arguments, **options):
        (folder / f"a-3{suffix}").write_bytes(b"precious")
        return original(*arguments, **options)

    monkeypatch.setattr(stream, "run", appear)
    with pytest.raises(wavg.OutputExistsError, match="a-3"):
        wavg.average_checkpoints(
            f"{folder}/model_*{suffix}", folder / f"a-{{last}}{suffix}", last=[2, 3]
        )
    assert [path.name for path in folder.glob("a-*")] == [f"a-3{suffix}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 2.0}, "whole number"),
        ({"weights": 5}, "list of numbers"),
        ({"weights": wavg.exponential}, "call it"),
    ],
)
def test_what_makes_no_sense_is_told(run, options, message):
    folder, suffix = run
    with pytest.raises((wavg.WeightError, TypeError), match=message):
        wavg.average_checkpoints(f"{folder}/model_*{suffix}", **options)
