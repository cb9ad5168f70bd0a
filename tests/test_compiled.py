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


FORMATS = {
    # the last bit of 1, the smallest number, a window that the format has room for
    "float32": (2.0**-23, 2.0**-149, 2.0**-10),
    "bfloat16": (2.0**-7, 2.0**-133, 2.0**-10),
    "float16": (2.0**-10, 2.0**-24, 2.0**-4),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_compiled_step_sees_a_number_that_is_not_finite_in_every_row(name, outputs):
    ours = compiled.Compiled(Combination.of(np.ones((outputs, 9))), lookup(name), FLOAT32)
    for row in range(9):
        block = np.ones((9, 70)).astype(lookup(name).numpy)
        block[row, 66] = np.inf
        (portion,) = ours.in_memory(block, np.empty((outputs, 70), np.float32))
        assert portion.flags is None


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("row", range(9))
def test_the_compiled_step_takes_sums_for_exact_within_the_window_and_no_further(name, row):
    """Of nine rows two make a tie, and one more has the smallest number; it has no weight."""
    bit, least, window = FORMATS[name]
    bound = (1 + bit) * window  # the largest number is 1 + bit
    block = np.ones((9, 4))
    block[(row + 1) % 9] = 1 + bit
    block[row] = bound, bound - bit * window, least, 0.0
    weights = np.zeros(9)
    weights[[(row + 1) % 9, (row + 2) % 9]] = 1.0
    outs, flags = np.empty(4, lookup(name).numpy), np.empty(4, bool)
    given = {
        "block": block.astype(lookup(name).numpy).reshape(-1).view(np.uint8),
        "outs": outs.view(np.uint8),
        "flags": flags.view(np.uint8),
        "counts": np.zeros(8, np.uint8),
        "matrix": weights.view(np.uint8),
        "rows": np.array([2.0, window, 2.0**-50]).view(np.uint8),
    }
    settle(**given, **dict.fromkeys(("source", "target"), list(FORMATS).index(name)))
    assert flags.tolist() == [False, True, True, False]
    assert outs[~flags].tolist() == [1.0, 1.0]  # to even


@pytest.mark.parametrize("name", FORMATS)
def test_the_compiled_step_settles_columns_of_zeros_whatever_the_weights(name):
    weights = [0.1, 0.7, 1e-9], [1.0, -1.0, 2.0**-1000]  # of the second it settles nothing else
    ours = compiled.Compiled(Combination.of(weights), lookup(name), FLOAT32)
    block, outs = np.zeros((3, 5), lookup(name).numpy), np.ones((2, 5), np.float32)
    assert list(ours.in_memory(block, outs)) == []
    assert outs.tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize("there", range(12))
def test_the_compiled_step_tells_which_file_ends_within_its_row(tmp_path, there):
    """Where there are more bytes in front of the row than are missing."""
    (tmp_path / "numbers").write_bytes(np.ones(10, np.float32).tobytes())
    with open(tmp_path / "numbers", "rb") as file:
        descriptors = np.array([file.fileno()] * 2, np.intc).view(np.uint8)
        offsets = np.array([0, 40 - there]).view(np.uint8)
        with pytest.raises(EOFError) as caught:
            settle(True, descriptors=descriptors, offsets=offsets)
    assert caught.value.args == (1,)


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
