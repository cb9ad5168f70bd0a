"""The pages with figures say what the recorded results do."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {page.name: page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md")}


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(ROOT / "benchmarks")  # scripts in benchmarks import each other
        return importlib.import_module("report")


@pytest.mark.parametrize("page", [n for n, text in PAGES.items() if "<!-- table: " in text])
def test_every_table_is_made_from_the_results(report, page):
    assert report.filled(PAGES[page]) == PAGES[page]


def test_the_check_sees_a_changed_figure(report):
    text = PAGES["memory.md"]
    assert report.filled(text.replace(" MiB |", " KiB |")) == text
