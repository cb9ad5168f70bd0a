"""An open checkpoint: a mapping that is read while it is open, and can be sent elsewhere."""

from __future__ import annotations

import gc
import os
import pickle

import numpy as np
import pytest

import wavg
from wavg import CheckpointChangedError, CheckpointFormatError, InputError, formats, publish
from wavg.checkpoint import Checkpoint, Index, TensorSpec, identify
from wavg.digests import verify_checksums
from wavg.opening import available_cores


@pytest.fixture
def path(tmp_path):
    np.savez(tmp_path / "m.npz", a=np.float32([1, 2]), b=np.float32([3]))
    return str(tmp_path / "m.npz")


def test_it_says_what_it_is(path):
    with wavg.open_checkpoint(path) as checkpoint:
        assert repr(checkpoint) == f"<Checkpoint {path}: npz, 2 tensors>"
        assert len(checkpoint) == 2
        assert checkpoint.metadata == {}


def test_a_tensor_is_never_an_array_without_a_copy(path):
    with wavg.open_checkpoint(path) as checkpoint:
        with pytest.raises(ValueError, match="read into a new array"):
            checkpoint["a"].__array__(copy=False)
        assert checkpoint["a"].__array__(np.float64).dtype == np.float64


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_tensor_of_a_closed_checkpoint_is_not_read(path, save):
    save(path, a=np.float32([1, 2]))
    with wavg.open_checkpoint(path) as checkpoint:
        tensor = checkpoint["a"]
    with pytest.raises(ValueError, match=r"m\.npz is closed"):
        tensor.read()


def test_sent_elsewhere_it_is_opened_anew(path):
    with wavg.open_checkpoint(path) as checkpoint:
        sent = pickle.dumps(checkpoint)
    with pickle.loads(sent) as there:
        np.testing.assert_array_equal(there["a"], [1, 2])


def test_sent_to_where_the_file_is_another_it_is_refused_and_closed(path, monkeypatch):
    with wavg.open_checkpoint(path) as checkpoint:
        sent = pickle.dumps(checkpoint)
    np.savez(path, a=np.float32([1, 2, 3]))
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda *a: opened.append(real(*a)) or opened[-1])
    with pytest.raises(CheckpointChangedError, match=r"m\.npz changed"):
        pickle.loads(sent)
    (descriptor,) = opened
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_tensor_that_lies_nowhere_is_an_error(path):
    """As an index may have it that comes from a process which a file has taken over."""
    spec = TensorSpec("a", "float32", (2,))
    checkpoint = Checkpoint(Index("keras-shards", (identify(path),), (spec,)))
    with checkpoint, pytest.raises(CheckpointFormatError, match="no bytes to read") as caught:
        checkpoint["a"].read()
    assert (caught.value.path, caught.value.tensor) == (path, "a")


def test_what_is_cut_off_before_its_checksum_is_compared_has_changed(path):
    with formats.open_file(path) as checkpoint:
        os.truncate(path, checkpoint.index.checksums[1].extent.offset + 1)
        with pytest.raises(CheckpointChangedError, match=r"m\.npz changed"):
            verify_checksums([checkpoint], 1)


def test_a_reference_that_is_cut_while_it_is_copied_is_named(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"m_{step}.safetensors") for step in (1, 2)]
    for path in paths:
        wavg.save(path, {"a": np.float32([1, 2])})
    real = publish.NewFile.resize

    def cut(file, size):
        os.truncate(paths[1], 20)
        real(file, size)

    monkeypatch.setattr(publish.NewFile, "resize", cut)
    with pytest.raises(InputError, match=r"m_2\.safetensors: the file became shorter") as caught:
        wavg.average_checkpoints(paths, tmp_path / "average.safetensors", record="none")
    assert caught.value.path == paths[1]
    assert sorted(os.listdir(tmp_path)) == ["m_1.safetensors", "m_2.safetensors"]


def test_only_bfloat16_can_be_declared(path):
    with pytest.raises(ValueError, match="opaque_dtype must be 'bfloat16' or None, not 'float16'"):
        wavg.load(path, opaque_dtype="float16")


def test_a_collector_that_is_off_stays_off(path):
    gc.disable()
    try:
        wavg.load(path)
        assert not gc.isenabled()
    finally:
        gc.enable()
    wavg.load(path)
    assert gc.isenabled()


def test_cores_are_counted_where_the_system_does_not_say_which_are_allowed(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cores() == os.cpu_count()


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([{}]), np.float32([1]).view(">f4")])
def test_what_is_no_plain_number_is_not_saved(tmp_path, array):
    with pytest.raises(wavg.OutputError, match="is not a plain number") as caught:
        wavg.save(tmp_path / "m.safetensors", {"x": array})
    assert (caught.value.path, caught.value.tensor) == (str(tmp_path / "m.safetensors"), "x")
    assert not list(tmp_path.iterdir())


def test_one_that_is_forgotten_is_closed_with_a_warning(path):
    checkpoint = wavg.open_checkpoint(path)
    descriptor = checkpoint.descriptor(0)
    held = [checkpoint]
    del checkpoint
    with pytest.warns(ResourceWarning, match=r"m\.npz was not closed"):
        held.clear()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_closed_one_is_forgotten_without_a_word(path):
    with wavg.open_checkpoint(path) as checkpoint:
        held = [checkpoint]
    del checkpoint
    held.clear()
