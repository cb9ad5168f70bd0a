"""The page on averaging while training, section by section, each with its framework."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import pages

os.environ["KERAS_BACKEND"] = "jax"

PAGE = Path(__file__).parent.parent / "docs" / "streaming.md"
SECTIONS = re.split(r"^(?=## )", PAGE.read_text("utf-8"), flags=re.MULTILINE)
FRAMEWORKS = {"Keras": ["keras"], "PyTorch": ["torch"], "JAX and optax": ["jax", "optax"]}


def title(section):
    return section.partition("\n")[0].removeprefix("## ")


def marks(section):
    """Keras is there in every test environment, and takes some seconds to train."""
    if title(section) == "Keras":
        return pytest.mark.slow
    return pytest.mark.frameworks if title(section) in FRAMEWORKS else ()


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(
            section,
            id=title(section),
            marks=marks(section),
        )
        for section in SECTIONS
        if "```python" in section
    ],
)
@pytest.mark.filterwarnings(
    # Keras 3.15's variables, turned into arrays by NumPy 2.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
)
def test_a_section_runs_and_says_what_happens(section, tmp_path, monkeypatch):
    for framework in FRAMEWORKS.get(title(section), ()):
        pytest.importorskip(framework)
    page = tmp_path / PAGE.name
    page.write_text(section, "utf-8")
    pages.run(page, tmp_path, monkeypatch)


def test_the_sections_of_frameworks_are_there():
    assert {title(section) for section in SECTIONS} >= FRAMEWORKS.keys()
