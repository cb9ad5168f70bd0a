"""Names that would forge lines, steer a terminal or never end: how a person is shown them."""

from __future__ import annotations

import contextlib
import json
import os
import pickle

import numpy as np
import pytest

import wavg
from wavg import cli, errors
from wavg.printable import padded, printable

HOSTILE = "a\n\rwavg:done\x1b[2J\x9b31m\u202e\u2028"
COMMANDS = {
    "inspect": ["inspect", "{a}"],
    "plan": ["average", "{a}", "{b}", "-o", "{out}", "--dry-run"],
    "report": ["average", "{a}", "{b}", "-o", "{out}"],
    "pairs": ["average", "{a}", "{c}", "-o", "{out}", "--align", "position"],
    "verify": ["verify", "{made}", "{a}", "{b}"],
    "soup": ["soup", "{a}", "{b}", "--evaluate-command", "echo 1 {{}}", "--minimize"],
    "failed": ["soup", "{a}", "{b}", "--evaluate-command", "cat {{}}/x", "--minimize"],
    "sweep": ["sweep", "{a}", "{b}", "--evaluate-command", "cat {{}}/x", "--minimize"],
    "mismatch": ["average", "{a}", "{c}", "-o", "{out}"],
    "pattern": ["average", "{a}", "{b}", "-o", "{out}", "--exclude", "{a}"],
    "missing": ["average", "{a}x", "-o", "{out}"],
    "nothing there": ["average", "{a}*.nothing", "-o", "{out}"],
    "empty": ["average", "{empty}", "-o", "{out}"],
    "nowhere": ["average", "{a}", "-o", "{a}/{a}"],
    "existing": ["average", "{a}", "{b}", "-o", "{made}"],
    "twice": ["average", "{a}", "{a}", "-o", "{out}"],
    "usage": ["average", "{a}", "-o", "{out}", "--{a}"],
    "weights": ["weights", "{a}.csv", "-n", "2"],
}


@pytest.fixture
def told(tmp_path, monkeypatch, capfd):
    """What a command prints where names, of files and of a tensor, contain a given one."""
    turns = iter(range(9))

    def tell(name, words):
        folder = tmp_path / str(next(turns))
        folder.mkdir()
        monkeypatch.chdir(folder)
        names = {
            "a": f"{name}1.safetensors",
            "b": f"{name}2.safetensors",
            "c": f"{name}3.safetensors",
            "made": f"{name}made.safetensors",
            "out": f"{name}out.safetensors",
            "empty": f"{name}empty",
        }
        os.mkdir(names["empty"])
        for key in ("a", "b", "c"):
            tensor = name + "x" * (key == "c")
            wavg.save(names[key], {tensor: np.float32([1]), f"{name}n": 1}, metadata={name: name})
        wavg.average_checkpoints([names["a"], names["b"]], names["made"], sort=False)
        with contextlib.suppress(SystemExit):
            cli.main([word.format(**names) for word in words])
        return "".join(capfd.readouterr())

    return tell


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_forges_no_line_and_steers_no_terminal(told, command):
    plain, hostile = told("a", COMMANDS[command]), told(HOSTILE, COMMANDS[command])
    assert len(hostile.splitlines()) == len(plain.splitlines()) > 0
    assert all(line.isprintable() for line in hostile.splitlines())
    assert r"\n\r" in hostile


def test_a_file_name_that_is_no_text_is_shown(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")
    with pytest.raises(FileNotFoundError, match=r"\\udcff\.safetensors$"):
        wavg.average_checkpoints(path)


def test_programs_get_names_as_they_are(told):
    plan = json.loads(told(HOSTILE, [*COMMANDS["plan"], "--json"]))
    assert plan["averaged"] == [HOSTILE]
    assert plan["inputs"][0]["path"] == f"{HOSTILE}1.safetensors"


def test_ordinary_names_stay_as_they_are():
    names = "models/größe 7/重み/ß.h5", r"C:\runs\new.h5", "a'b"
    assert [printable(name) for name in names] == [*names]


def test_an_error_is_shown_in_lines_of_its_own_and_keeps_what_it_was_told():
    error = errors.StructureMismatchError("a\nb", path="a\nb", differences=["c\nd", "e"])
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert str(one) == "a\\nb\n  c\\nd\n  e"
        assert (one.message, one.path, one.differences) == ("a\nb", "a\nb", ["c\nd", "e"])


def test_a_name_of_a_megabyte_is_cut_in_messages_and_does_not_pad_tables(told, tmp_path):
    name = "w" * 1_000_000
    path = tmp_path / "m.safetensors"
    wavg.save(path, {name: np.float32([np.nan]), "b": np.float32([1]), "c": np.float32([1])})
    lines = told("a", ["inspect", str(path)]).splitlines()
    wide = [line for line in lines if len(line) > 200]
    assert ["...[1,000,000 characters]..." in line for line in wide] == [True]
    assert len(wide[0]) < 600
    with pytest.raises(wavg.NonFiniteError, match=r"lets such values through$") as caught:
        wavg.average_checkpoints(path)
    assert len(str(caught.value)) < 3000
    assert caught.value.tensor == name


def test_cells_are_as_wide_as_the_widest_ordinary_name():
    assert padded(["a", "b\n"]) == ["a  ", "b\\n"]
    assert [len(cell) for cell in padded(["a", "b" * 50, "c" * 300])] == [50, 50, 300]


def test_a_warning_shows_names_too(tmp_path):
    path = tmp_path / f"{HOSTILE}.npz"
    wavg.save(path, {"w": np.float32([1])})
    with pytest.warns(ResourceWarning, match=r"a\\n\\rwavg:done\\x1b"):
        wavg.open_checkpoint(path).__del__()
