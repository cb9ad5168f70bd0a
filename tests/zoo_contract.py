"""What an average of any file of the zoo has to satisfy, in whichever Keras wrote it.

Each check raises AssertionError; `assert_the_checks_see_planted_errors` shows that it can.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

import keras_zoo
import reference
import wavg
from keras_run import assert_bitwise_equal, assert_within_one_ulp, average_in_keras
from keras_zoo import is_integer, quickly_built

LINEAR = [1.0, 2.0, 3.0]


def average_in_framework(run):
    """The linear average as one makes it from get_weights(); integers are the newest's."""
    weights = LINEAR[: len(run.weights)]
    right = []
    for arrays in zip(*run.weights, strict=True):
        newest = arrays[-1]
        if is_integer(newest):
            right.append(newest)
        elif newest.dtype == np.float32:
            right += average_in_keras([[array] for array in arrays], weights)
        else:
            right.append(reference.average(weights, np.stack(arrays), newest.dtype.name))
    return right


def assert_is_the_average(ours, run):
    """Float32 within an ulp of NumPy's double average, halves rounded once, integers carried."""
    for a, b in zip(ours, average_in_framework(run), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype == np.float32:
            assert_within_one_ulp([a], [b])
        else:
            assert_bitwise_equal([a], [b])


def average(run, form, folder, **options):
    """Average a run's files to a file of the same form; return its path and the report."""
    output = Path(folder) / f"{form}_average{keras_zoo.SUFFIX[form]}"
    paths = run.paths[form]
    return output, wavg.average_checkpoints(paths, output, weights="linear", **options)


# Bytes


def checksums_of(archive_path):
    """Where an archive says its weights' checksum: in the local and the central header."""
    data = Path(archive_path).read_bytes()
    with zipfile.ZipFile(archive_path) as archive:
        found = [archive.getinfo("model.weights.h5").header_offset + 14]
        place = archive.start_dir
        for info in archive.infolist():
            if info.filename == "model.weights.h5":
                found.append(place + 16)
            place += 46 + sum(struct.unpack_from("<3H", data, place + 28))
    return [(offset, 4) for offset in found]


def changed_outside(before, after, places):
    """Positions of bytes that differ although no (offset, length) covers them."""
    assert len(before) == len(after)
    changed = np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)
    for offset, length in places:
        changed[offset : offset + length] = False
    return np.flatnonzero(changed).tolist()


def assert_only_numbers_changed(newest, output, report):
    """Every byte but the payloads of averaged tensors, and their checksums, is the newest's."""
    averaged = {decision.spec.name for decision in report.plan.averaged}
    with wavg.open_checkpoint(newest) as old, wavg.open_checkpoint(output) as new:
        assert [spec.name for spec in old.index.tensors] == [s.name for s in new.index.tensors]
        assert old.index.tensors == new.index.tensors  # extents included
        assert old.index.others == new.index.others
        files = list(zip(old.index.files, new.index.files, strict=True))
        extents = [spec.extent for spec in old.index.tensors if spec.name in averaged]
    if newest.suffix == ".json":
        before, after = (json.loads(path.read_text("utf-8")) for path in (newest, output))
        assert before["metadata"] == after["metadata"]
        assert list(before["weight_map"]) == list(after["weight_map"])
    for number, (was, now) in enumerate(files):
        if was.path.endswith(".json"):
            continue
        places = [(offset, length) for file, offset, length in extents if file == number]
        if newest.suffix == ".keras":
            places += checksums_of(newest)
        before, after = Path(was.path).read_bytes(), Path(now.path).read_bytes()
        assert (before != after) == bool(places)  # a shard may hold the optimizer alone
        assert changed_outside(before, after, places) == []
    if newest.suffix == ".keras":
        with zipfile.ZipFile(output) as archive:
            assert archive.testzip() is None


# The framework


def loaded_weights(run, path):
    """What ``load_weights`` puts into a model that held something else."""
    run.model.set_weights([np.zeros_like(array) for array in run.weights[0]])
    run.model.load_weights(str(path))
    return run.model.get_weights()


def loaded_model(run, path, **options):
    with quickly_built(run.keras):
        return run.keras.models.load_model(str(path), **options)


def check_weights(run, form, folder):
    """Average, compare bytes, load into a model."""
    output, report = average(run, form, folder)
    assert_only_numbers_changed(run.paths[form][-1], output, report)
    assert_is_the_average(loaded_weights(run, output), run)


def check_model(run, form, folder):
    """The same, and the file opens as a model, with the newest optimizer's slots."""
    output, report = average(run, form, folder)
    assert_only_numbers_changed(run.paths[form][-1], output, report)
    model = loaded_model(run, output, compile=False)
    assert_is_the_average(model.get_weights(), run)
    if run.slots[-1] and form == "keras":
        compiled = loaded_model(run, output)
        assert compiled.optimizer.get_config() == run.model.optimizer.get_config()
        slots = [np.asarray(variable) for variable in keras_zoo.slots(compiled)]
        assert_bitwise_equal(slots, run.slots[-1])


REWRITTEN = ["cnn", "nested_twice", "transformer", "recurrent", "with_adam", "with_momentum"]


def check_rewritten(run, form, folder):
    """A file in another dtype, or without the optimizer, keeps its order and loads."""
    newest = wavg.load(run.paths[form][-1])
    for options in ({"dtype": "float64"}, {"optimizer": "drop"}):
        folder.joinpath(*options).mkdir()
        output, _ = average(run, form, folder.joinpath(*options), **options)
        arrays = wavg.load(output)
        assert list(arrays) == list(newest)
        if "optimizer" in options:
            with wavg.open_checkpoint(output) as checkpoint:
                assert not any("optimizer" in spec.name for spec in checkpoint.index.others)
            assert_is_the_average(loaded_weights(run, output), run)
        else:
            loaded = loaded_weights(run, output)
            rounded = [a.astype(b.dtype) for a, b in zip(arrays.values(), loaded, strict=True)]
            if is_in_order(run, form):
                assert_bitwise_equal(loaded, rounded)


def is_in_order(run, form, **options):
    """Whether each file's arrays are those of get_weights(), in its order."""
    for path, right in zip(run.paths[form], run.weights, strict=True):
        ours = list(wavg.load(path, **options).values())
        if len(ours) != len(right) or not all(map(reference.same_bytes, ours, right)):
            return False
    return True


def runs_of(keras, tmp_path_factory, forms):
    """A function from a family's builder to its run, made when first asked for."""

    @functools.cache
    def run(build):
        folder = tmp_path_factory.mktemp(build.__name__)
        return keras_zoo.make_run(keras, build, folder, forms)

    return run


def assert_the_checks_see_planted_errors(run, form, tmp_path):
    """One wrong bit in a payload, outside of one, and in a slot: each is seen."""
    right = average_in_framework(run)
    assert_is_the_average(right, run)
    wrong = [array.copy() for array in right]
    flat = wrong[-1].reshape(-1)
    flat[-1] = np.nextafter(np.nextafter(flat[-1], np.float32(9)), np.float32(9))
    with pytest.raises(AssertionError):
        assert_is_the_average(wrong, run)
    with pytest.raises(ValueError, match="zip"):
        assert_is_the_average(right[:-1], run)

    output, report = average(run, form, tmp_path)
    newest = run.paths[form][-1]
    with wavg.open_checkpoint(output) as checkpoint:
        spec = checkpoint.index.tensors[0]
        held = [s.extent for s in (*checkpoint.index.tensors, *checkpoint.index.others)]
    path = Path(checkpoint.index.files[spec.extent.file].path)
    data = path.read_bytes()
    outside = spec.extent.offset - 1
    while any(file == spec.extent.file and o <= outside < o + n for file, o, n in held):
        outside -= 1
    for offset in (outside, checkpoint.index.others[0].extent.offset):
        planted = bytearray(data)
        planted[offset] ^= 1
        path.write_bytes(planted)
        with pytest.raises((AssertionError, wavg.CheckpointFormatError)):
            assert_only_numbers_changed(newest, output, report)
    planted = bytearray(data)
    planted[spec.extent.offset + 2] ^= 255
    path.write_bytes(planted)
    with pytest.raises((AssertionError, zipfile.BadZipFile)):
        assert_is_the_average(loaded_weights(run, output), run)
    path.write_bytes(data)
    assert_only_numbers_changed(newest, output, report)
    assert_is_the_average(loaded_weights(run, output), run)

    assert is_in_order(run, form)
    swapped = [[arrays[1], arrays[0], *arrays[2:]] for arrays in run.weights]
    assert not is_in_order(dataclasses.replace(run, weights=swapped), form)
    assert not is_in_order(dataclasses.replace(run, weights=run.weights[::-1]), form)
