"""Checkpoints chosen by recorded metrics."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import wavg


@pytest.fixture
def run(tmp_path):
    """Checkpoints of epochs 1 … 5, and a function that chooses by a file's content."""
    for epoch in range(1, 6):
        wavg.save(tmp_path / f"m_{epoch}.npz", {"w": np.float32([epoch])})

    def choose(content, name="log.csv", **options):
        metrics = content
        if not isinstance(content, dict) or name.endswith("json"):
            metrics = tmp_path / name
            metrics.write_text(content if isinstance(content, str) else json.dumps(content))
        options = {"best": 2, "maximize": False, **options}
        paths = wavg.best_checkpoints(tmp_path / "m_*.npz", metrics, **options)
        return [int(os.path.basename(path)[2]) for path in paths]

    return choose


SCORES = {"m_1": 3.0, "m_2": 1.0, "m_3": 5.0, "m_4": 2.0, "m_5": 4.0}


def test_a_dict_chooses_in_training_order(run):
    assert run(SCORES) == [2, 4]
    assert run(SCORES, maximize=True, best=3) == [1, 3, 5]


def test_of_equal_ones_the_newer_is_chosen(run):
    assert run(dict.fromkeys(SCORES, 1.0)) == [4, 5]


@pytest.mark.parametrize("key", ["m_{}", "m_{}.npz", "run/../m_{}.npz"])
def test_json_of_names(run, tmp_path, key):
    content = {key.format(n): SCORES[f"m_{n}"] for n in range(1, 6)}
    if "/" in key:
        (tmp_path / "run").mkdir()
        content = {str(tmp_path / name): value for name, value in content.items()}
    assert run(content, "log.json") == [2, 4]


@pytest.mark.parametrize("label", ["step", "epoch", "global_step"])
def test_json_of_a_list(run, label):
    rows = [{label: n, "loss": SCORES[f"m_{n}"]} for n in range(1, 6)]
    assert run(rows, "log.json") == [2, 4]


def test_json_of_objects_by_name(run):
    rows = {name: {"loss": value, "note": "x"} for name, value in SCORES.items()}
    assert run(rows, "log.json") == [2, 4]


def test_csv_by_name(run):
    lines = ["checkpoint,loss", *(f"m_{n}.npz,{SCORES[f'm_{n}']}" for n in range(1, 6))]
    assert run("\n".join(lines)) == [2, 4]


KERAS = "epoch,loss,val_loss\n0,.9,3\n1,.8,1\n2,.7,5\n3,.6,2\n4,.5,4\n"


def test_the_table_of_keras_counts_from_zero_and_its_names_from_one(run):
    assert run(KERAS, metric="val_loss") == [2, 4]


def test_a_metric_has_to_be_named_where_there_are_several(run):
    with pytest.raises(wavg.WavgError, match="has loss, val_loss; say which"):
        run(KERAS)
    with pytest.raises(wavg.WavgError, match="no numbers in a column 'acc'; there are loss, val"):
        run(KERAS, metric="acc")


def test_where_either_count_fits_it_is_asked_for(run):
    table = KERAS + "5,.4,0\n"  # epochs 0 … 5: names 1 … 5 fit both ways
    with pytest.raises(wavg.WavgError, match=r"\(1 … 5\) might count from 0 or from 1.*--first-ep"):
        run(table, metric="val_loss")
    assert run(table, metric="val_loss", first_epoch=1) == [2, 4]
    assert run(table, metric="val_loss", first_epoch=0) == [1, 5]


def test_rows_without_a_number_tell_where_the_count_begins_too(run):
    """With validation_freq=2 Keras writes NA for epoch 0, 2 and 4."""
    table = "epoch,loss,val_loss\n0,.9,NA\n1,.8,3\n2,.7,NA\n3,.6,1\n4,.5,NA\n"
    assert run(table, metric="val_loss", best=1) == [4]
    assert run(table, metric="val_loss") == [2, 4]


def test_a_first_epoch_is_of_tables_that_count_from_zero(run):
    table = "epoch,loss\n1,3\n2,1\n3,5\n4,2\n5,4\n"
    assert run(table, first_epoch=1) == run(table, first_epoch=0) == [2, 4]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_columns_may_be_divided_otherwise_and_have_capitals(run, delimiter):
    table = "Epoch,loss\n1,3\n2,1\n3,5\n4,2\n5,4\n".replace(",", delimiter)
    assert run(table) == [2, 4]
    assert run(table, "log.tsv") == [2, 4]


def test_json_of_a_line_each(run):
    rows = [{"Step": n, "loss": SCORES[f"m_{n}"]} for n in range(1, 6)]
    assert run("\n".join(map(json.dumps, rows)) + "\n", "log.jsonl") == [2, 4]


def test_the_state_of_a_trainer_of_hugging_face(run):
    rows = [
        row
        for n in range(1, 6)
        for row in (
            {"epoch": n / 5, "step": n, "loss": 9.0 - n},
            {"epoch": n / 5, "step": n, "eval_loss": SCORES[f"m_{n}"]},
        )
    ]
    state = {"best_metric": None, "global_step": 5, "log_history": rows}
    assert run(state, "trainer_state.json", metric="eval_loss") == [2, 4]


def test_a_table_that_is_not_utf8_is_told(run, tmp_path):
    (tmp_path / "log.csv").write_bytes("epoch,größe\n1,2\n".encode("latin-1"))
    with pytest.raises(wavg.WavgError, match=r"log\.csv is not UTF-8"):
        wavg.best_checkpoints(tmp_path / "m_*.npz", tmp_path / "log.csv", best=1, maximize=True)


def test_a_table_that_counts_from_one_is_taken_as_it_is(run):
    assert run("epoch,loss\n1,3\n2,1\n3,5\n4,2\n5,4\n") == [2, 4]


def test_steps_are_never_shifted(run):
    assert run("step,loss\n0,0\n1,3\n2,1\n3,5\n4,2\n5,4\n") == [2, 4]


def test_the_last_row_with_a_number_counts(run):
    lines = "step,loss,lr\n1,3,\n2,9,\n2,1,\n2,,0.1\n3,5,\n4,nan,\n4,2,\n5,4,\n"
    assert run(lines, metric="loss") == [2, 4]


def test_checkpoints_without_a_metric_are_never_chosen(run):
    assert run({"m_2": 9.0, "m_4": 8.0}) == [2, 4]
    with pytest.raises(wavg.WavgError, match="best 3: of 5 checkpoints 2 have"):
        run({"m_2": 9.0, "m_4": 8.0}, best=3)


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        ("{", "log.json", "is no JSON"),
        ("3", "log.json", "expected an object"),
        ("[]", "log.json", "expected an object"),
        ({"a": [1]}, "log.json", "expected an object"),
        ("step,note\n1,x\n", "log.csv", "no column of numbers"),
        ("step,loss\n77,1\n", "log.csv", r"no row .* belongs to any .*m_5.npz of step 5"),
        ("loss\n1\n", "log.csv", "rows are found by a column of name"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(run, content, name, told):
    with pytest.raises(wavg.WavgError, match=told):
        run(content, name)


def test_a_missing_table_is_told(run, tmp_path):
    with pytest.raises(FileNotFoundError):
        wavg.best_checkpoints(tmp_path / "m_*.npz", tmp_path / "none.csv", best=1, maximize=True)


def test_given_steps_find_the_rows(tmp_path):
    for name in ("a", "b", "c"):
        wavg.save(tmp_path / f"{name}.npz", {"w": np.float32([1])})
    paths = [tmp_path / f"{name}.npz" for name in ("b", "a", "c")]
    (tmp_path / "log.csv").write_text("step,loss\n100,3\n200,1\n300,2\n")
    found = wavg.best_checkpoints(
        paths, tmp_path / "log.csv", best=1, maximize=False, steps=[100, 200, 300]
    )
    assert found == [str(tmp_path / "a.npz")]
