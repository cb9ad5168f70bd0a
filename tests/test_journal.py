"""The journal: every line on disk, and a series that goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import wavg
from wavg.evaluation import Function, Outcome
from wavg.journal import Journal
from wavg.scoring import Scorer

SERIES = {"weights": ["equal"], "inputs": [["a", 1], ["b", 2]]}


@pytest.fixture
def path(tmp_path):
    """A journal with a score, one with examples, and a failure."""
    path = tmp_path / "journal.jsonl"
    with Journal(str(path), SERIES) as journal:
        for key, outcome in (
            ("1 alone", Outcome(0.1)),
            ("2 alone", Outcome(0.5, "", np.array([0.0, 1.0, 0.25]), 2.0)),
            ("3 alone", Outcome(None, "ValueError: x")),
        ):
            journal.begin(key)
            journal.end(key, outcome)
    return path


def outcomes(path, series=SERIES):
    with Journal(str(path), series) as journal:
        return dict(journal.outcomes)


def test_a_journal_gives_back_what_was_written(path):
    found = outcomes(path)
    assert [(key, o.score, o.error) for key, o in found.items()] == [
        ("1 alone", 0.1, ""),
        ("2 alone", 0.5, ""),
        ("3 alone", None, "ValueError: x"),
    ]
    assert found["2 alone"].examples.tolist() == [0, 1, 0.25]
    assert found["2 alone"].seconds == 2


def test_every_line_is_there_at_once(tmp_path):
    path = tmp_path / "j"
    with Journal(str(path), SERIES) as journal:
        journal.begin("a")
        assert json.loads(path.read_text().splitlines()[-1]) == {"begun": "a"}
        journal.end("a", Outcome(1.0))
        assert json.loads(path.read_text().splitlines()[-1])["score"] == 1


def test_the_name_of_a_new_journal_is_on_disk_too(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("wavg.journal.sync_folder", synced.append)
    for _ in range(2):
        outcomes(tmp_path / "j")
    assert synced == [str(tmp_path)]


def test_an_evaluation_under_way_when_the_process_died_is_tried_once_more(path):
    for _ in range(2):
        assert "4 alone" not in outcomes(path)
        with Journal(str(path), SERIES) as journal:
            journal.begin("4 alone")
    assert "killed" in outcomes(path)["4 alone"].error
    assert len(path.read_text().splitlines()) == 1 + 6 + 3
    assert "killed" in outcomes(path)["4 alone"].error


def test_a_command_cannot_have_ended_the_process(path):
    for _ in range(3):
        with Journal(str(path), SERIES, fatal=False) as journal:
            assert "4 alone" not in journal.outcomes
            journal.begin("4 alone")


def test_a_stop_after_the_end_changes_nothing(path):
    with Journal(str(path), SERIES) as journal:
        journal.begin("4 alone")
        journal.end("4 alone", Outcome(0.5))
        journal.stop("4 alone")
    assert outcomes(path)["4 alone"].score == 0.5


@pytest.mark.parametrize("moment", ["begin", "end"])
@pytest.mark.parametrize("before", [True, False])
def test_an_interruption_at_any_line_costs_no_score(path, monkeypatch, moment, before):
    """It may come before the line is on disk, or after."""
    original = getattr(Journal, moment)

    def interrupted(self, *arguments):
        if not before:
            original(self, *arguments)
        raise KeyboardInterrupt

    for _ in range(3):
        monkeypatch.setattr(Journal, moment, interrupted)
        with (
            Journal(str(path), SERIES) as journal,
            Scorer(
                Function(lambda _: 1.0, "f"), journal, maximize=True, total=1, progress=False
            ) as scorer,
            pytest.raises(KeyboardInterrupt),
        ):
            scorer.run("4 alone", {})
    monkeypatch.undo()
    found = outcomes(path).get("4 alone")
    assert (found is None) == (before or moment == "begin")
    assert found is None or found.score == 1


def test_a_stopped_one_is_tried_again(path):
    with Journal(str(path), SERIES) as journal:
        journal.begin("4 alone")
        journal.stop("4 alone")
    assert "4 alone" not in outcomes(path)


@pytest.mark.parametrize("torn", [b"{", b'{"done": "9 alone", "sc', b"\x00\xff"])
def test_a_torn_last_line_is_cut_off(path, torn):
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(outcomes(path)) == 3
    assert path.read_bytes() == whole


def test_a_journal_torn_in_its_first_line_begins_anew(path):
    path.write_bytes(path.read_bytes()[:20])
    assert outcomes(path) == {}
    assert outcomes(path) == {}


def test_a_journal_of_another_series_is_refused_with_what_differs(path):
    before = path.read_text()
    other = {"weights": ["equal", "linear"], "inputs": [["a", 1], ["b", 3]], "maximize": True}
    with pytest.raises(wavg.WavgError) as caught:
        Journal(str(path), other)
    assert str(caught.value).splitlines()[1:] == [
        '  weights: now "linear"',
        '  inputs: there ["b", 2], now ["b", 3]',
        "  maximize: there null, now true",
    ]
    assert path.read_text() == before


def test_another_order_is_another_series(path):
    with pytest.raises(wavg.WavgError, match="inputs: another order"):
        Journal(str(path), {**SERIES, "inputs": SERIES["inputs"][::-1]})


@pytest.mark.parametrize(
    "content", ["notes", "notes\n", "[1]\n", '{"a": 1}\n', '{"wavg": 2}\n', "1,2\n3,4", "\n\n"]
)
def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(wavg.WavgError, match="is no journal"):
        Journal(str(path), SERIES)
    assert path.read_text() == content


@pytest.mark.parametrize("line", ["3", "{}", '{"done": "x"}', "{", '{"done": [], "score": 1}'])
def test_a_damaged_line_is_named(path, line):
    lines = path.read_text().splitlines()
    lines[3] = line
    path.write_text("\n".join([*lines, ""]))
    with pytest.raises(wavg.WavgError, match="cannot understand line 4"):
        Journal(str(path), SERIES)


def test_a_journal_in_use_is_refused(path):
    code = (
        "import sys; from wavg.journal import Journal; import wavg\n"
        "try: Journal(sys.argv[1], {})\n"
        "except wavg.WavgError as error: print(error)"
    )
    with Journal(str(path), SERIES):
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True
        )
    assert "in use by another process" in done.stdout


def test_without_a_path_nothing_is_written():
    with Journal(None, SERIES) as journal:
        journal.begin("a")
        journal.end("a", Outcome(1.0))
        assert journal.outcomes["a"].score == 1
