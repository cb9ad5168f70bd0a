"""How the script of mutation tests judges what becomes of a fork."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

MODULE = """
import os, signal
from mutation_run import switch

def original(): return 1
original.__name__ = "x_f__mutmut_orig"

def end(number): os.kill(os.getpid(), number)

f = switch({
    "_mutmut_orig": original,
    "x_f__mutmut_1": lambda: 2,
    "x_f__mutmut_2": lambda: 1,
    "x_f__mutmut_3": lambda: end(signal.SIGSEGV),
    "x_f__mutmut_4": lambda: end(signal.SIGXCPU),
    "x_f__mutmut_5": lambda: end(signal.SIGKILL),
    "x_f__mutmut_6": lambda: os._exit(3),
})(original)
"""
TEST = """
import os
from small import f

HOME = os.getpid()

def test_f(): assert f() == 1

def test_home(): assert not {strict} or HOME == os.getpid()
"""


def judged(folder, asked, *, strict=False):
    """Run the plugin over a small module; return its process and what it kept."""
    names = [f"small.x_f__mutmut_{number}" for number in asked]
    (folder / "small.py").write_text(MODULE)
    (folder / "test_small.py").write_text(TEST.format(strict=strict))
    (folder / "asked.json").write_text(json.dumps(names))
    benchmarks = Path(__file__).parent.parent / "benchmarks"
    environment = {
        "PYTHONPATH": os.pathsep.join((str(folder), str(benchmarks))),
        "MUTATION_FOLDER": str(folder),
        "MUTATION_SECONDS": "1.5",
        "MUTATION_MINUTES": "1",
    }
    plugin = ("-p", "mutation_run", "-p", "no:cacheprovider", "-q", "test_small.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    kept = folder / "outcomes.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    return done, [line.split("\t")[1] for line in lines]


@pytest.mark.parametrize(("last", "status"), [(5, -9), (6, 3)])
def test_an_end_that_is_no_tests_or_crash_ends_the_run(tmp_path, last, status):
    done, outcomes = judged(tmp_path, [1, 2, 3, 4, last, 1])
    assert outcomes == ["killed", "survived", "killed", "timed out"]
    assert done.returncode != 0
    told = f"small.x_f__mutmut_{last}: a fork ended with status {status}, at test_small.py::test_f"
    assert told in done.stdout + done.stderr


def test_a_test_that_fails_in_any_fork_kills_no_mutant(tmp_path):
    done, outcomes = judged(tmp_path, [2], strict=True)
    assert not outcomes
    assert done.returncode != 0
    told = "without any mutation a fork is killed, at test_small.py::test_home"
    assert told in done.stdout + done.stderr
