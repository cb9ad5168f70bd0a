"""What the compiled step takes, and what it refuses: it is C, and believes no sizes."""

from __future__ import annotations

import numpy as np
import pytest

from wavg import compiled
from wavg.combination import Combination
from wavg.dtypes import lookup

pytestmark = pytest.mark.skipif(not compiled.COMPILED, reason="there is no compiled step")

FLOAT32 = lookup("float32")
ARGUMENTS = (
    *("block", "outs", "flags", "counts", "matrix", "rows", "source", "target", "start"),
    *("descriptors", "offsets"),
)


def settle(reads=False, **changes):
    """Call it for one float32 input of two, and two outputs, of three columns; with changes."""
    some = {
        "block": np.ones((2, 3), np.float32),
        "outs": np.zeros((2, 3), np.float32),
        "flags": np.zeros((2, 3), bool),
        "counts": np.zeros(2, np.int64),
        "matrix": np.ones((2, 2)),
        "rows": np.array([[2.0, np.inf, 1e-15]] * 2),
        "descriptors": np.zeros(2 * reads, np.intc),
        "offsets": np.zeros(2 * reads, np.int64),
    }
    given = {name: array.reshape(-1).view(np.uint8) for name, array in some.items()}
    given |= {"source": 0, "target": 0, "start": 0} | changes
    return compiled._compiled.settle(*(given[name] for name in ARGUMENTS)), some


def test_the_compiled_step_takes_buffers_that_fit_together():
    (first, stop, finite), some = settle()
    assert (first, stop, finite) == (3, 3, True)
    assert some["outs"].tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("name", [n for n in ARGUMENTS if n not in ("source", "target", "start")])
def test_the_compiled_step_refuses_buffers_that_do_not_fit(name, reads):
    sizes = {
        "block": 24,
        "outs": 24,
        "flags": 6,
        "counts": 16,
        "matrix": 32,
        "rows": 48,
        "descriptors": 8 * reads,
        "offsets": 16 * reads,
    }
    refused = "do not fit together|at least one output"
    for change in (-8, -4, -1, 1, 4, 8, 24, -sizes[name]):
        size = sizes[name] + change
        if size < 0 or size == sizes[name]:
            continue
        if name == "outs" and reads and size % 8 == 0:
            continue  # other columns, which may be read in several portions
        if name == "counts" and size % 8:
            continue  # its whole numbers are counted
        with pytest.raises(ValueError, match=refused):
            settle(reads, **{name: np.zeros(size, np.uint8)})


@pytest.mark.parametrize("changes", [{"start": 1}, {"start": -1}, {"start": -1, "reads": True}])
def test_the_compiled_step_begins_anew_only_where_it_reads(changes):
    with pytest.raises(ValueError, match="do not fit together"):
        settle(**changes)


def test_the_compiled_step_reads_only_into_what_may_be_written():
    block = np.ones(24, np.uint8)
    block.flags.writeable = False
    with pytest.raises(ValueError, match="do not fit together"):
        settle(True, block=block)
    empty = np.zeros(0, np.uint8)
    with pytest.raises(ValueError, match="do not fit together"):
        settle(True, block=empty, flags=empty)


@pytest.mark.parametrize("name", ["source", "target"])
@pytest.mark.parametrize("number", [-1, 3, 4])
def test_the_compiled_step_knows_three_formats(name, number):
    with pytest.raises(ValueError, match="formats are 0, 1 and 2"):
        settle(**{name: number})


def test_the_compiled_step_flags_only_what_it_left():
    """In the second of three tiles, next to a tie, of terms too far apart for exact sums."""
    block = np.ones((4, 3000), np.float32)
    block[:, 1500] = 1 + 2.0**-23, 1, 1, 2.0**-60
    block[:, 1501] = 1, 1, 1, 2.0**-60
    outs = np.empty((1, 3000), np.float32)
    ours = compiled.Compiled(Combination.of([1, 1, 1, 1]), FLOAT32, FLOAT32)
    (portion,) = ours.in_memory(block, outs)
    assert (portion.first, portion.raw.shape) == (0, (4, 3000))
    assert np.flatnonzero(portion.flags[0]).tolist() == [1500]


def test_the_compiled_step_lets_go_of_all_buffers():
    """A bytearray that is still looked at cannot grow."""
    given = {
        "block": bytearray(24),
        "outs": bytearray(24),
        "flags": bytearray(6),
        "counts": bytearray(16),
        "matrix": bytearray(np.ones(4).tobytes()),
        "rows": bytearray(np.array([[2.0, np.inf, 1e-15]] * 2).tobytes()),
        "descriptors": bytearray(),
        "offsets": bytearray(),
    }
    settle(**given)
    with pytest.raises(ValueError, match="fit together"):
        settle(**given, start=-1)
    for buffer in given.values():
        buffer.append(0)
