"""NumPy gets no memory, for one array after the other: a typed error, the old output, no trace.

That `malloc` fails, in any library, is tried by benchmarks/injected.py.
"""

from __future__ import annotations

import sys
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest

import wavg
from numpy_memory import refusing
from wavg import OutOfMemoryError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


class Here(Executor):
    """Does the work in the thread that asks for it, whose allocations are counted."""

    def submit(self, function, /, *arguments, **options):
        future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.fixture
def runs():
    """benchmarks/small_runs.py: an average of each format over an existing output."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(BENCHMARKS)
        import small_runs

        yield small_runs
    for name in ("small_runs", "common"):
        sys.modules.pop(name, None)


KINDS = ["safetensors", "folder of safetensors", ".h5", ".h5 written anew", ".weights.h5"]
KINDS += [".keras", ".keras written anew", ".weights.json", ".npz"]


@pytest.mark.parametrize("most", [3, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_whichever_array_gets_no_memory_the_old_output_stands(tmp_path, runs, name, most):
    small = runs.Small(next(kind for kind in runs.KINDS if kind.name == name), tmp_path / "run")
    small.options |= {"workers": 1, "executor": Here()}
    with refusing(0) as allocations:
        small.run()
    assert small.state() == ("new", 0)
    small.restore()
    count = allocations.count
    assert count > 50
    for which in range(1, count + 1, max(1, count // (most or count))):
        with refusing(which), pytest.raises(OutOfMemoryError, match="max_memory"):
            small.run()
        assert small.state() == ("old", 0), which
    small.close()


def test_every_format_is_tried(runs):
    assert [kind.name for kind in runs.KINDS] == KINDS


def test_a_plan_without_memory_is_a_typed_error_from_the_first_array_on(tmp_path):
    for step in (1, 2):
        wavg.save(tmp_path / f"model_{step}.safetensors", {"w": np.float32([step])})
    with refusing(0) as allocations:
        wavg.plan_average(tmp_path / "model_*.safetensors")
    count = allocations.count
    assert count > 5
    for which in range(1, count + 1):
        with refusing(which), pytest.raises(OutOfMemoryError):
            wavg.plan_average(tmp_path / "model_*.safetensors")


def test_the_refused_allocation_is_the_one_asked_for():
    with refusing(2) as allocations:
        first = np.empty(1000)
        with pytest.raises(MemoryError):
            np.zeros(1000)
        assert np.arange(3).tolist() == [0, 1, 2]
    assert allocations.count == 3
    assert first.size == 1000
