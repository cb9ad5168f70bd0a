"""What the script of mutation tests takes for explained, and for wrong."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("tomllib")  # of Python 3.11


@pytest.fixture(scope="module")
def mutation():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
        return importlib.import_module("mutation")


@pytest.fixture
def known(mutation, tmp_path):
    path = tmp_path / "survivors.toml"
    path.write_text(
        """
[[m]]
kind = "speed"
why = "again"
function = "f"
was = "a < b"
becomes = ["a <= b", "a < c"]
[[any]]
kind = "same"
why = "None"
pattern = '(.*)float64\\)(.*) -> \\1None\\)\\2'
"""
    )
    return mutation.reasons(path)


def counted(mutation, known, outcome, *texts):
    mutants = {"wavg.m.x_f__mutmut_1": mutation.Mutant("m", *texts)}
    found = dict.fromkeys(mutants, outcome)
    figures, wrong = mutation.count(mutants, found, mutation.Group(("m",), ()), known)
    return {key: n for key, n in figures["m"].items() if n}, wrong


def test_a_survivor_is_explained_by_its_own_lines_or_by_a_pattern(mutation, known):
    for texts, kind in [
        (("f", "a < b", "a <= b"), "speed"),
        (("g", "x(float64) + 1", "x(None) + 1"), "same"),
    ]:
        figures, wrong = counted(mutation, known, "survived", *texts)
        assert figures == {"mutants": 1, kind: 1}
        assert not [text for text in wrong if text.startswith("survived")]


@pytest.mark.parametrize(
    "texts",
    [
        ("g", "a < b", "a <= b"),  # another function
        ("f", "a < b", "a > b"),
        ("f", "a <= b", "a < b"),
        ("f", "x(float64) + 1", "x(None) - 1"),
    ],
)
@pytest.mark.parametrize("outcome", ["survived", "untested"])
def test_other_survivors_are_wrong(mutation, known, texts, outcome):
    figures, wrong = counted(mutation, known, outcome, *texts)
    assert figures == {"mutants": 1, "unexplained": 1}
    assert any(text.startswith(outcome) for text in wrong)


def test_a_reason_for_nothing_and_a_mutant_that_was_not_run_are_wrong(mutation, known):
    figures, wrong = counted(mutation, known, "killed", "f", "a < b", "a <= b")
    assert figures == {"mutants": 1, "killed": 1}
    assert wrong == ["a reason for nothing: m: a < b -> a <= b or a < c"]
    figures, wrong = counted(mutation, known, "not run", "f", "a < b", "a <= b")
    assert not figures
    assert wrong[0].startswith("not run")


def test_every_kept_reason_can_be_read(mutation):
    found = mutation.reasons()
    assert found
    assert all(reason.kind in mutation.KINDS and reason.why for reason in found)
