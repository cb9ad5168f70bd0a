"""Real Keras files, kept in golden/: read, averaged and patched, with no framework installed."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

import reference
import wavg
from wavg.weights import resolve
from zoo_contract import assert_only_numbers_changed, changed_outside

GOLDEN = Path(__file__).parent / "golden"
SUFFIX = {
    "kernels": ".weights.h5",
    "tower": ".keras",
    "attention": ".keras",
    "shards": ".weights.json",
}
LEGACY = ("mlp", "cnn", "lstm", "normalization", "nested", "weights")
FAMILIES = [
    f"{framework}_{family}"
    for framework in ("keras3", "tf_keras")
    for family in (*LEGACY, *SUFFIX)
    # Keras 3 writes bare weights as .weights.h5 only, and only Keras 3 writes shards.
    if (framework, family) not in {("keras3", "weights"), ("tf_keras", "shards")}
]
SCHEDULES = ["equal", "linear", "exponential:alpha=2"]
HIDDEN = ["hidden/{}kernel{}", "hidden/{}bias{}", "classes/{}kernel{}", "classes/{}bias{}"]


def stored(checkpoint, spec) -> bytes:
    with open(checkpoint.index.files[spec.extent.file].path, "rb") as file:
        file.seek(spec.extent.offset)
        return file.read(spec.extent.length)


def suffix(family):
    return SUFFIX.get(family.rpartition("_")[2], ".h5")


def epochs(family):
    paths = sorted(GOLDEN.glob(f"{family}_[0-9]{suffix(family)}"))
    assert len(paths) >= 2
    return paths


def files_of(path):
    """The HDF5 files that a checkpoint consists of, open: itself, an archive's member, shards."""
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            yield h5py.File(io.BytesIO(archive.read("model.weights.h5")))
    elif path.suffix == ".json":
        shards = json.loads(path.read_text("utf-8"))["weight_map"].values()
        names = {name for one in shards for name in ([one] if isinstance(one, str) else one)}
        yield from (h5py.File(path.with_name(name)) for name in sorted(names))
    else:
        yield h5py.File(path)


def stored_weights(path):
    """What get_weights() returned when the file was saved."""
    with np.load(path.with_suffix(".npz")) as arrays:
        return [arrays[f"arr_{i}"] for i in range(len(arrays))]


def fingerprints(arrays):
    return [(array.dtype.name, array.shape, array.tobytes()) for array in arrays]


def expected_average(paths, weights, dtype=None):
    """Each tensor's exact mean, by name; an integer is the newest's."""
    models = [wavg.load(path) for path in paths]
    coefficients = resolve(weights)(np.arange(1.0, len(paths) + 1))
    return {
        name: reference.average(coefficients, np.stack([model[name] for model in models]), dtype)
        if newest.dtype.kind == "f"
        else newest
        for name, newest in models[-1].items()
    }


def differing(ours, right):
    """The names at which two models differ in any bit, or which only one of them has."""
    common = [name for name in ours if name in right]
    return sorted(
        {*ours, *right}.difference(common)
        | {name for name in common if not reference.same_bytes(ours[name], right[name])}
    )


def structure(path, *, dtypes=True):
    """Every group, dataset and attribute of the HDF5 files but those of the optimizer's state."""
    found = {}

    def note(name, item):
        if name.split("/")[0] in ("optimizer_weights", "optimizer"):
            return
        found[name] = item.shape if isinstance(item, h5py.Dataset) else "group"
        if dtypes and isinstance(item, h5py.Dataset):
            found[name, "dtype"] = item.dtype.str
        for key, value in item.attrs.items():
            found[name, "attribute", key] = (item.attrs.get_id(key).dtype, np.array(value).tolist())

    for file in files_of(path):
        with file:
            note("", file)
            file.visititems(note)
    return found


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_every_golden_file_belongs_to_a_family():
    known = {path.with_suffix(".npz").name for family in FAMILIES for path in epochs(family)}
    assert {path.name for path in GOLDEN.glob("*.npz")} == known
    assert all(path.stat().st_size < 65_000 for path in GOLDEN.iterdir())


def test_load_equals_get_weights(family):
    for path in epochs(family):
        assert fingerprints(wavg.load(path).values()) == fingerprints(stored_weights(path))


def test_epochs_differ_from_one_another(family):
    paths = epochs(family)
    assert all(len(differing(wavg.load(paths[0]), wavg.load(path))) >= 4 for path in paths[1:])


@pytest.mark.parametrize(
    ("path", "inner", "ending"),
    [
        ("keras3_mlp_1.h5", "sequential/{}/", ""),
        ("tf_keras_mlp_1.h5", "{}/", ":0"),
        ("tf_keras_weights_1.h5", "{}/", ":0"),
    ],
)
def test_names_are_layer_and_weight_name(path, inner, ending):
    names = [name.format(inner.format(name.split("/")[0]), ending) for name in HIDDEN]
    assert list(wavg.load(GOLDEN / path)) == names


@pytest.mark.parametrize("framework", ["keras3", "tf_keras"])
def test_names_that_repeat_in_two_inner_models_stay_apart(framework):
    tensors = wavg.load(GOLDEN / f"{framework}_nested_1.h5")
    left = [name for name in tensors if name.startswith("left/")]
    right = [name for name in tensors if name.startswith("right/")]
    assert (len(left), len(right), len(tensors)) == (12, 12, 26)


@pytest.mark.parametrize("weights", SCHEDULES)
def test_arrays_are_the_exact_average(family, weights):
    paths = epochs(family)
    ours = wavg.average_checkpoints(paths, weights=weights)
    assert differing(ours, expected_average(paths, weights)) == []
    assert list(ours) == list(wavg.load(paths[-1]))


@pytest.mark.parametrize("weights", SCHEDULES)
def test_file_is_the_newest_with_only_the_averaged_bytes_replaced(family, weights, tmp_path):
    paths, output = epochs(family), tmp_path / f"average{suffix(family)}"
    report = wavg.average_checkpoints(paths, output, weights=weights)
    assert differing(wavg.load(output), expected_average(paths, weights)) == []
    assert_only_numbers_changed(paths[-1], output, report)


@pytest.mark.parametrize(
    ("framework", "count", "differs"),
    [
        ("keras3", "scale/sequential/scale/count", False),  # Keras 3 leaves it at zero
        ("tf_keras", "scale/scale/count:0", True),
    ],
)
def test_an_integer_count_is_carried_over_and_reported_if_it_differs(
    framework, count, differs, tmp_path
):
    paths = epochs(f"{framework}_normalization")
    report = wavg.average_checkpoints(paths, tmp_path / "average.h5")
    assert [decision.spec.name for decision in report.plan.carried] == [count]
    assert report.differing == (count,) * differs
    if differs:
        with pytest.raises(wavg.StructureMismatchError, match="count"):
            wavg.average_checkpoints(paths, integers="error")
    else:
        assert count in wavg.average_checkpoints(paths, integers="error")


@pytest.mark.parametrize("weights", SCHEDULES)
def test_dropping_the_optimizer_leaves_all_else(family, weights, tmp_path):
    paths, output = epochs(family), tmp_path / f"average{suffix(family)}"
    wavg.average_checkpoints(paths, output, weights=weights, optimizer="drop")
    assert differing(wavg.load(output), expected_average(paths, weights)) == []
    assert structure(output) == structure(paths[-1])
    with wavg.open_checkpoint(output) as written:
        assert {spec.name.split("/")[0] for spec in written.index.others} <= {"metrics"}
    if suffix(family) != ".h5":
        return
    with h5py.File(output) as file, h5py.File(paths[-1]) as newest:
        assert "optimizer_weights" not in file
        if not family.endswith(("weights", "nested")):  # these were saved without an optimizer
            assert "optimizer_weights" in newest
            assert file.attrs["training_config"] == newest.attrs["training_config"]
        if not family.endswith("weights"):
            assert file.attrs["model_config"] == newest.attrs["model_config"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["carry", "drop"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_another_dtype_is_rounded_to_once_and_keeps_the_layout(family, dtype, optimizer, tmp_path):
    paths, output = epochs(family), tmp_path / f"average{suffix(family)}"
    wavg.average_checkpoints(
        paths, output, weights="exponential:alpha=2", dtype=dtype, optimizer=optimizer
    )
    ours = wavg.load(output)
    assert differing(ours, expected_average(paths, "exponential:alpha=2", dtype)) == []
    assert {array.dtype.name for array in ours.values() if array.dtype.kind == "f"} == {dtype}
    assert structure(output, dtypes=False) == structure(paths[-1], dtypes=False)
    with wavg.open_checkpoint(output) as written, wavg.open_checkpoint(paths[-1]) as newest:
        kept = [
            spec
            for spec in newest.index.others
            if optimizer == "carry" or spec.name.startswith("metrics/")
        ]
        assert [spec._replace(extent=None) for spec in written.index.others] == [
            spec._replace(extent=None) for spec in kept
        ]
        for ours, theirs in zip(written.index.others, kept, strict=True):
            assert stored(written, ours) == stored(newest, theirs)


def test_helpers_see_planted_errors(tmp_path):
    path = GOLDEN / "tf_keras_mlp_3.h5"
    tensors = wavg.load(path)
    planted = {name: array.copy() for name, array in tensors.items()}
    planted["classes/classes/bias:0"][1] = np.nextafter(
        planted["classes/classes/bias:0"][1], np.float32(9)
    )
    assert differing(planted, tensors) == ["classes/classes/bias:0"]
    assert differing({}, tensors) == sorted(tensors)
    assert fingerprints(planted.values()) != fingerprints(tensors.values())

    data = path.read_bytes()
    with wavg.open_checkpoint(path) as checkpoint:
        extents = [spec.extent[1:] for spec in checkpoint.index.tensors]
    offset, length = min(extents)
    for position, seen in [(offset - 1, True), (offset, False), (offset + length - 1, False)]:
        other = bytearray(data)
        other[position] ^= 1
        assert changed_outside(data, bytes(other), extents) == [position] * seen

    copy = tmp_path / "copy.h5"
    copy.write_bytes(data)
    with h5py.File(copy, "a") as file:
        file["model_weights/hidden"].attrs["extra"] = 1
    assert structure(copy) != structure(path)
