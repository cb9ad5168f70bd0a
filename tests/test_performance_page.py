"""The pages with figures say what the recorded results do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page",
    [
        "performance.md",
        "memory.md",
        "keras.md",
        "streaming.md",
        "reliability.md",
        "weights.md",
        "sweep.md",
    ],
)
def test_every_table_is_made_from_the_results(report, page):
    text = (SCRIPT.parent.parent / "docs" / page).read_text("utf-8")
    assert "<!-- table:" in text
    assert report.filled(text) == text


def test_the_check_sees_a_changed_figure(report):
    text = (SCRIPT.parent.parent / "docs" / "memory.md").read_text("utf-8")
    assert report.filled(text.replace(" MiB |", " KiB |")) == text
