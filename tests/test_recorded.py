"""Steps from metadata, weights from files that list them, and checkpoints without a weight."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest

import wavg
from wavg import cli, listed, recorded
from wavg.errors import WeightError
from wavg.weights import parse


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(name, value=0.0, **metadata):
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    wavg.save(name, {"w": np.float32([value])}, metadata=metadata)
    return name


def planned(paths, **options):
    return {
        os.path.basename(part.path): part.step
        for part in wavg.plan_average(paths, **options).inputs
    }


# Steps from metadata

SOONER, RECORD = (wavg.Record("linear", step, (), 5).text() for step in (600.0, 700.0))


@pytest.mark.parametrize(
    ("first", "second", "steps"),
    [
        ({"step": "100"}, {"step": "250"}, (100, 250)),
        ({"global_step": "100"}, {"global_step": "250"}, (100, 250)),
        ({"epoch": "1.5"}, {"epoch": "2"}, (1.5, 2)),
        ({"step": "7", "epoch": "1"}, {"step": "9", "epoch": "2"}, (7, 9)),
        ({"step": "9", "epoch": "1"}, {"step": "9", "epoch": "2"}, (1, 2)),
        ({"step": "7"}, {"wavg": RECORD, "step": "9"}, (7, 9)),
        ({"wavg": SOONER, "step": "9"}, {"wavg": RECORD, "step": "8"}, (600, 700)),
    ],
)  # fmt: skip
def test_where_names_tell_no_steps_metadata_do(first, second, steps):
    paths = [save("best.safetensors", **first), save("last.safetensors", **second)]
    assert tuple(planned(paths).values()) == steps


@pytest.mark.parametrize(
    "second",
    [{}, {"step": "soon"}, {"step": "nan"}, {"step": "inf"}, {"step": "100"}, {"step": "50"},
     {"epoch": "200"}, {"wavg": "{", "step": "1"}, {"wavg": "[" * 10_000},
     {"wavg": '{"step": "x"}'}],
)  # fmt: skip
def test_metadata_that_tell_no_increasing_series_count_for_nothing(second):
    paths = [save("best.safetensors", step="100"), save("last.safetensors", **second)]
    assert tuple(planned(paths).values()) == (1, 2)


def test_names_come_before_metadata_and_then_no_file_is_opened(monkeypatch):
    paths = [save(f"m_{step}.safetensors", step=str(1000 - step)) for step in (10, 20)]
    monkeypatch.setattr(recorded, "_metadata", None)
    assert tuple(planned(paths).values()) == (10, 20)


def test_steps_that_are_given_come_before_all():
    paths = [save(f"m_{step}.safetensors", step=str(1000 + step)) for step in (10, 20)]
    assert tuple(planned(paths, steps=[3, 4]).values()) == (3, 4)


def test_the_trainers_state_beside_the_weights_tells_the_step():
    for folder, step in (("early", 500), ("late", 1500)):
        save(f"{folder}/model.safetensors", format="pt")
        with open(f"{folder}/trainer_state.json", "w") as file:
            json.dump({"global_step": step, "log_history": []}, file)
    plan = wavg.plan_average(["early", "late"])
    assert [part.step for part in plan.inputs] == [500, 1500]


def test_a_trainers_state_that_is_none_tells_nothing():
    for folder in ("early", "late"):
        save(f"{folder}/model.safetensors")
        with open(f"{folder}/trainer_state.json", "w") as file:
            file.write("[1")
    assert [part.step for part in wavg.plan_average(["early", "late"]).inputs] == [1, 2]


def test_the_command_line_takes_steps_from_metadata_too(capsys):
    save("best.safetensors", step="100"), save("last.safetensors", step="400")
    assert cli.main(["weights", "polynomial:power=1", "best.safetensors", "last.safetensors"]) == 0
    assert re.findall(r"^ *(\d+)  ", capsys.readouterr().out, re.MULTILINE) == ["100", "400"]
    assert cli.main(["average", "best.safetensors", "last.safetensors", "-o", "a.npz"]) == 0
    assert "note" not in capsys.readouterr().out


# Weights listed in files


def write(name, text):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


@pytest.fixture
def three():
    return [save(f"m_{step}.safetensors", step) for step in (1, 2, 10)]


LISTS = [
    ("w.json", "[0.5, 0.25, 0.25]"),
    ("w.csv", "0.5\n0.25\n\n0.25\n"),
    ("w.csv", "weight\n0.5\n0.25\n0.25\n"),
    ("W.JSON", "\ufeff[0.5, 0.25, 0.25]"),
]
NAMED = [
    ("w.json", '{"m_10": 0.25, "m_1": 0.5, "m_2": 0.25}'),
    ("w.json", '{"m_10.safetensors": 0.25, "m_1.safetensors": 0.5, "m_2": 0.25}'),
    ("w.json", '{"10": 0.25, "1": 0.5, "2": 0.25}'),
    ("w.csv", "m_10,0.25\nm_1 , 0.5\nm_2,0.25"),
    ("w.csv", "name,weight\n10,0.25\n1,0.5\n2,0.25"),
]


@pytest.mark.parametrize(("name", "text"), LISTS + NAMED)
def test_weights_come_from_a_file(three, name, text):
    made = wavg.average_checkpoints("m_*.safetensors", weights=write(name, text))
    assert made["w"] == [0.5 * 1 + 0.25 * 2 + 0.25 * 10]


@pytest.mark.parametrize(("name", "text"), NAMED[:1] + LISTS[:1])
def test_weights_come_from_a_file_on_the_command_line(three, name, text, capsys):
    write(name, text)
    assert cli.main(["average", *three[::-1], "-o", "a.npz", "--weights", name, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [part["weight"] for part in told["inputs"]] == [0.5, 0.25, 0.25]
    assert cli.main(["weights", name, *three, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["coefficients"] == [0.5, 0.25, 0.25]


def test_weights_by_name_may_be_given_in_python(three):
    names = {"m_10": 0.25, "m_1.safetensors": 0.5, "2": 0.25}
    assert wavg.average_checkpoints("m_*.safetensors", weights=names)["w"] == [3.5]
    made = wavg.average_checkpoints("m_*.safetensors", weights=[names, "equal"])
    assert made[0]["w"] == [3.5]
    plan = wavg.plan_average("m_*.safetensors", weights=names)
    assert plan.schedule == "m_10=0.25,m_1.safetensors=0.5,2=0.25"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, "a number for each name"),
        ({1: 1.0}, "a number for each name"),
        ({"m_1": "x"}, "weights must be numbers"),
        (
            {"m_1": 1, "m_2": 1},
            "the table of weights does not match the checkpoints; without a weight",
        ),
    ],
)
def test_weights_by_name_that_do_not_fit_are_refused(three, names, message):
    with pytest.raises(WeightError, match=message):
        wavg.average_checkpoints("m_*.safetensors", weights=names)


def test_what_the_command_line_prints_is_a_file_of_weights(three, capsys):
    assert cli.main(["weights", "linear", *three, "--json"]) == 0
    write("w.json", capsys.readouterr().out)
    ours = wavg.average_checkpoints("m_*.safetensors", weights="w.json")
    np.testing.assert_allclose(ours["w"], (1 + 2 * 2 + 3 * 10) / 6)


def test_the_name_of_a_folder_is_that_of_the_checkpoint_in_it():
    for step in (100, 900):
        save(f"h/checkpoint-{step}/model.safetensors", step)
    write("w.json", '{"checkpoint-100": 0.25, "checkpoint-900": 0.75}')
    assert wavg.average_checkpoints("h/checkpoint-*", weights="w.json")["w"] == [700]


def test_the_record_has_the_name_of_a_file_of_weights_and_not_its_folder(three):
    path = os.path.abspath(write("w.json", '{"m_10": 0.25, "m_1": 0.5, "m_2": 0.25}'))
    report = wavg.average_checkpoints("m_*.safetensors", "a.safetensors", weights=path)
    assert report.plan.schedule == "w.json"
    with wavg.open_checkpoint("a.safetensors") as made:
        assert os.path.dirname(path) not in made.metadata["wavg"]


def test_names_are_steps_where_there_are_no_files(capsys):
    schedule = listed.named({"5": 1, "7.5": 3}, "w.json")
    assert schedule([5, 7.5]).tolist() == [1, 3]
    assert str(parse(write("v.json", '{"5": 1}'))) == "v.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"m_1": 1, "m_2": 1}', "does not match the checkpoints; without a weight: m_10.safetens"),
        ('{"m_1": 1, "m_2": 1, "m_10": 1, "m_3": 1, "x": 2}', "names of no input: m_3, x"),
        ('{"m_1": 1, "1": 2, "m_2": 1, "m_10": 1}', "1 and m_1 would both be for m_1.safetensors"),
        ('{"m_1": 1, "m_2": 1, "m_10": -2}', "sum to zero"),
        ('{"m_1": 1, "m_2": 1, "m_10": NaN}', "weights must be finite"),
        ("[1, 2]", "w.json: 2 weights were given for 3 checkpoints"),
        ('{"m_1": 1, "m_1": 2, "m_2": 1, "m_10": 1}', "'m_1' is listed twice"),
        ("[1, 2, NaN]", "w.json: weights must be finite"),
        ("[1, 1, -2]", "w.json: the weights sum to zero"),
        ("[1, 2", "w.json: cannot be read as weights: "),
        ("[]", "w.json: expected a list of numbers, one a checkpoint, oldest first, or a number"),
        ("{}", "w.json: expected a list of numbers"),
        ("3", "w.json: expected a list of numbers"),
        ('["1", 2, 3]', "w.json: expected a list of numbers"),
        ('{"m_1": true}', "w.json: expected a list of numbers"),
        ("[" * 100_000, "w.json: cannot be read as weights: "),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(three, text, message):
    write("w.json", text)
    with pytest.raises(WeightError, match=re.escape(message)):
        wavg.average_checkpoints("m_*.safetensors", weights="w.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m_1,1,2", "'m_1,1,2' is not a name and a number"),
        ("m_1,1\nm_1,2", "'m_1' is listed twice"),
        ("m_1,1\nm_2,x", "could not convert"),
        ("", "expected a list of numbers"),
        ("weight\n", "expected a list of numbers"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_the_reason(three, text, message):
    write("w.csv", text)
    with pytest.raises(WeightError, match=re.escape(message)):
        wavg.average_checkpoints("m_*.safetensors", weights="w.csv")


def test_a_name_that_several_checkpoints_have_is_refused():
    for step in (1, 2):
        save(f"c-{step}/model.npz", step)
    schedule = listed.named({"model": 1}, "w.json")
    with pytest.raises(WeightError, match="model is the name of several checkpoints; go by their"):
        wavg.average_checkpoints(["c-1/model.npz", "c-2/model.npz"], weights=schedule)
    by_steps = listed.named({"1": 1, "2": 3}, "w.json")
    made = wavg.average_checkpoints(["c-1/model.npz", "c-2/model.npz"], weights=by_steps)
    assert made["w"] == [1.75]


def test_a_file_that_is_missing_is_told(three, capsys):
    assert cli.main(["average", *three, "-o", "a.npz", "--weights", "none.json"]) == 1
    assert capsys.readouterr().err == "wavg: none.json: No such file or directory\n"


# Checkpoints without a weight


def test_a_checkpoint_without_a_weight_is_not_read():
    for step, value in ((1, np.inf), (2, np.nan), (3, 3.0), (4, 5.0)):
        save(f"m_{step}.safetensors", value)
    made = wavg.average_checkpoints(".", weights="lawa:last=2")
    assert made["w"] == [4]
    plan = wavg.plan_average(".", weights="lawa:last=2")
    assert [part.step for part in plan.inputs] == [3, 4]
    assert plan.bytes_read == 8


def test_a_checkpoint_without_a_weight_need_not_even_be_one():
    open("m_1.safetensors", "w").close()
    save("m_2.safetensors", 3)
    assert wavg.average_checkpoints(".", weights=[0, 1])["w"] == [3]


def test_what_one_of_several_averages_needs_is_read_for_it_alone():
    for step in (1, 2, 3, 4):
        save(f"m_{step}.safetensors", 2**step)
    made = wavg.average_checkpoints(
        ".", weights=["lawa:last=2,every=2", [0, 0, 0, 1], "lawa:last=1"], last=[4]
    )
    assert [each["w"].tolist() for each in made] == [[10], [16], [16]]
    reports = wavg.average_checkpoints(
        ".", "o-{weights}-{last}.npz", weights=["lawa:last=2,every=2", "equal"], last=[2, 3]
    )
    found = {report.output: wavg.load(report.output)["w"].tolist() for report in reports}
    assert found == {
        "o-lawa-last=2,every=2-2.npz": [16],
        "o-lawa-last=2,every=2-3.npz": [10],
        "o-equal-2.npz": [12],
        "o-equal-3.npz": [np.float32(28 / 3)],
    }


def test_the_newest_stays_the_reference_without_a_weight():
    save("m_1.safetensors", 1, told="old"), save("m_2.safetensors", 2, told="new")
    wavg.average_checkpoints(".", "out.safetensors", weights=[1, 0])
    assert wavg.load("out.safetensors")["w"] == [1]
    with wavg.open_checkpoint("out.safetensors") as checkpoint:
        assert checkpoint.metadata["told"] == "new"


def test_the_output_is_named_after_all_inputs():
    for step in (1, 2, 3):
        save(f"m_{step}.safetensors", step)
    report = wavg.average_checkpoints("m_*", "o{last}.npz", weights="lawa:last=1", sort=True)
    assert report.output == "o3.npz"


# What averages say of themselves


def test_own_steps_are_those_of_the_records_or_none_at_all():
    paths = [save("b.safetensors", wavg=RECORD), save("a.safetensors", wavg=SOONER)]
    assert recorded.own_steps(paths, wavg.open_checkpoint) == (700, 600)
    paths.append(save("c.safetensors", step="9"))
    assert recorded.own_steps(paths, wavg.open_checkpoint) is None


@pytest.mark.parametrize(
    ("options", "text"), [({}, "linear"), ({"window": 3}, "linear (window=3)")]
)
def test_the_schedule_that_made_an_average_is_told_with_its_window(options, text):
    made = wavg.Record("linear", 9.0, (), 5, options).text()
    path = save("a.safetensors", wavg=made)
    assert recorded.recorded_weights(path, wavg.open_checkpoint) == text
    assert recorded.recorded_weights(save("b.safetensors"), wavg.open_checkpoint) is None
