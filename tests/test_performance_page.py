"""The pages with figures say what the recorded results do."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "report.py"


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(SCRIPT.parent)  # scripts in benchmarks import each other
        return importlib.import_module("report")


PAGES = ["performance.md", "memory.md", "keras.md", "reliability.md", "founding.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_table_is_made_from_the_results(report, page):
    text = (SCRIPT.parent.parent / "docs" / page).read_text("utf-8")
    assert "<!-- table:" in text
    assert report.filled(text) == text


def test_the_check_sees_a_changed_figure(report):
    text = (SCRIPT.parent.parent / "docs" / "memory.md").read_text("utf-8")
    assert report.filled(text.replace(" MiB |", " KiB |")) == text
