"""Mutants of Keras' files, in isolation: an index and its numbers, or a typed error.

`python benchmarks/hdf5_mutations.py FOLDER` tries very many, some without protection as well.
"""

from __future__ import annotations

import json
import random
import sys
import zipfile
from pathlib import Path

import pytest

import wavg
from wavg.formats import isolated

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def script():
    """benchmarks/hdf5_mutations.py."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(BENCHMARKS)
        import hdf5_mutations

        yield hdf5_mutations
    for name in ("hdf5_mutations", "hdf5_mutants", "mutants", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def trial(script, tmp_path):
    trial = script.Trial(tmp_path, plain_every=1_000_000, recipes=False)
    yield trial
    trial.close()


@pytest.mark.parametrize("part", ["whole_files", "parts"])
def test_mutants_give_an_index_or_a_typed_error(script, trial, part):
    rng = random.Random(f"everyday {part}")
    bases = getattr(script, part)()
    for number in range(1, 31):
        base = bases[number % len(bases)]
        trial.one(number, base, base.mutant(rng))
    counts = trial.found.counts["isolated"]
    assert counts.keys() <= {"accepted", "error"}
    assert counts["error"] > 5
    assert counts["accepted"] > 1
    assert (trial.found.good, trial.found.spoilt) == (1, 0)


def test_what_is_no_damage_is_read(script, trial):
    bases = script.whole_files()[::6] + script.parts()[::6]
    for number, base in enumerate(bases, start=1):
        trial.one(number, base, script.Mutant(base.name, (), None, base.part))
    assert trial.found.counts["isolated"] == {"accepted": len(bases)}


def test_a_part_is_damaged_in_an_archive_that_is_sound(script, tmp_path):
    base = next(each for each in script.parts() if each.part == "config.json")
    new = b'{"damaged": 1}'
    path = script.Mutant(base.name, ((0, new.hex()),), len(new), base.part).write(tmp_path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(base.path) as old:
        assert archive.testzip() is None
        assert archive.namelist() == old.namelist()
        assert json.loads(archive.read("config.json")) == {"damaged": 1}
        assert archive.read("model.weights.h5") == old.read("model.weights.h5")
    assert wavg.load(path).keys() == wavg.load(base.path).keys()


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (lambda *_: "no index", "nonsense"),
        (KeyError("planted"), "untyped KeyError"),
        (wavg.CheckpointFormatError("planted"), "error"),
    ],
)
def test_a_planted_fault_is_seen(script, trial, monkeypatch, capsys, plant, found):
    def read_index(*arguments):
        if isinstance(plant, Exception):
            raise plant
        return plant(*arguments)

    monkeypatch.setattr(trial.reader, "read_index", read_index)
    base = script.whole_files()[0]
    trial.one(1, base, base.mutant(random.Random(0)))
    assert trial.found.counts["isolated"] == {found: 1}
    assert ("AGAINST THE RULES" in capsys.readouterr().out) == (found != "error")


def test_a_spoilt_process_is_seen(script, trial, monkeypatch):
    base, other = script.whole_files()[:2]
    true = isolated.Reader.read_index
    monkeypatch.setattr(
        trial.reader, "read_index", lambda kind, _: true(trial.reader, kind, str(other.path))
    )
    trial.one(0 + script.GOOD_EVERY, base, base.mutant(random.Random(0)))
    assert (trial.found.good, trial.found.spoilt) == (1, 1)
