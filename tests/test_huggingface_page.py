"""The Hugging Face page, from top to bottom: its code and its commands, as a reader runs them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

import pages

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for module in ("torch", "transformers", "accelerate", "peft", "jax"):
        pytest.importorskip(module)

PAGE = Path(__file__).parent.parent / "docs" / "huggingface.md"

pytestmark = [
    pytest.mark.frameworks,
    # What transformers 5 says of the way in which peft asks it.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield pages.run(PAGE, tmp_path_factory.mktemp("page"), monkeypatch)


def test_the_page_runs_and_says_what_happens(page):
    assert {"Averaging", "merged", "parameters"} <= page.keys()


def test_the_losses_are_those_of_the_runs(page):
    rows = re.findall(r"^\| \D.* \| (2\.\d+) \| (2\.\d+) \| (2\.\d+) \|$", PAGE.read_text(), re.M)
    printed = [[float(text) for text in row] for row in rows]
    names = ("newest", "mean of ten", "linear", "1-sqrt", "decayed")
    assert len(printed) == len(names)
    for name, row in zip(names, printed, strict=True):
        # Other processors and versions sum in another order, and training makes that grow.
        assert row == pytest.approx(page["losses"][name], abs=0.01), name
