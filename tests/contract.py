"""One battery that every format passes. A test class of a format sets `suffix` and inherits."""

from __future__ import annotations

import os
import pickle
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference
import strategies
import wavg
from wavg.dtypes import lookup

DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "uint8",
    "bool",
    "complex64",
]


def random_array(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape)
    if dtype == "complex64":
        return (values + 1j * rng.standard_normal(shape)).astype(dtype)
    if lookup(dtype).kind == "int":
        return (np.abs(values) * 50).astype(dtype)
    return (values > 0) if dtype == "bool" else np.asarray(values).astype(lookup(dtype).numpy)


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert list(left) == list(right)
    for name in left:
        assert reference.same_bytes(np.asarray(left[name]), np.asarray(right[name])), name


def read_bytes(path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def smallest_budget(paths, output) -> int:
    """The least max_memory that these inputs can be averaged in."""
    with pytest.raises(wavg.MemoryBudgetError) as caught:
        wavg.plan_average(paths, output, max_memory=1)
    return caught.value.needed


class FormatContract:
    suffix = ""
    metadata = True
    refused = ""  # the ending of an output that these inputs cannot have

    def path(self, folder, name="model") -> str:
        return os.path.join(str(folder), f"{name}{self.suffix}")

    def run(self, folder, tensors, count=3, seed=0, noise=None):
        """A run of checkpoints whose floats differ; returns paths and contents, oldest first."""
        rng = np.random.default_rng(seed)
        paths, models = [], []
        for step in range(1, count + 1):
            model = {
                name: random_array(rng, array.dtype.name, array.shape)
                if lookup(array.dtype.name).averaged
                else array
                for name, array in tensors.items()
            }
            paths.append(self.path(folder, f"model_{step}"))
            wavg.save(paths[-1], model, overwrite=True)
            models.append(model)
        return paths, models

    def tensors(self):
        rng = np.random.default_rng(1)
        return {
            "dense/kernel": random_array(rng, "float32", (7, 5)),
            "dense/bias": random_array(rng, "float32", (5,)),
            "norm/count": np.array(3, np.int32),
            "half/kernel": random_array(rng, "float16", (3, 3)),
            "brain/kernel": random_array(rng, "bfloat16", (4, 2)),
            "flags/mask": np.array([True, False, True]),
            "empty/kernel": np.zeros((0, 4), np.float32),
            "scalar/scale": np.array(0.5, np.float64),
            "wave/kernel": random_array(rng, "complex64", (3,)),
        }

    def test_names_order_dtypes_shapes_and_values_come_back(self, tmp_path):
        tensors = self.tensors()
        wavg.save(self.path(tmp_path), tensors)
        assert_same(wavg.load(self.path(tmp_path)), tensors)

    @settings(
        deadline=None,
        max_examples=25,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
        ],
    )
    @given(data=st.data())
    def test_any_tensors_come_back(self, tmp_path, data):
        names = data.draw(
            st.lists(
                st.text("abcXYZ._-0ü", min_size=1, max_size=6).filter(lambda s: s.strip(".")),
                unique=True,
                max_size=5,
            )
        )
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
        tensors = {
            f"{name}/w": random_array(rng, data.draw(st.sampled_from(DTYPES)), data.draw(shapes))
            for name in names
        }
        wavg.save(self.path(tmp_path), tensors, overwrite=True)
        assert_same(wavg.load(self.path(tmp_path)), tensors)

    def test_the_order_given_is_kept_even_where_layers_interleave(self, tmp_path):
        tensors = {name: np.float32([1]) for name in ("b/x", "a/y", "b/z", "plain", "a/deep/x")}
        wavg.save(self.path(tmp_path), tensors)
        assert list(wavg.load(self.path(tmp_path))) == list(tensors)

    def test_an_index_is_plain_data(self, tmp_path):
        wavg.save(self.path(tmp_path), self.tensors())
        with wavg.open_checkpoint(self.path(tmp_path)) as checkpoint:
            assert pickle.loads(pickle.dumps(checkpoint.index)) == checkpoint.index

    def test_lazy_tensors_know_shape_and_dtype_and_read_on_demand(self, tmp_path):
        tensors = self.tensors()
        wavg.save(self.path(tmp_path), tensors)
        with wavg.open_checkpoint(self.path(tmp_path)) as checkpoint:
            assert len(checkpoint) == len(tensors)
            lazy = checkpoint["dense/kernel"]
            assert (lazy.shape, lazy.dtype) == ((7, 5), np.dtype(np.float32))
            np.testing.assert_array_equal(np.asarray(lazy), tensors["dense/kernel"])

    @pytest.mark.parametrize("weights", ["equal", "linear", "exponential:alpha=2", [3, -1, 2.5]])
    def test_the_average_is_the_exact_one_in_memory_and_in_a_file(self, tmp_path, weights):
        paths, models = self.run(tmp_path, self.tensors())
        output = self.path(tmp_path, "average")
        result = wavg.average_checkpoints(paths, weights=weights)
        wavg.average_checkpoints(paths, output, weights=weights)
        assert_same(wavg.load(output), result)
        from wavg.weights import resolve

        coefficients = resolve(weights)([1, 2, 3])
        for name, array in result.items():
            rows = np.stack([model[name] for model in models])
            if array.dtype == np.complex64:
                rows, array = rows.view(np.float32), array.view(np.float32)
            if lookup(rows.dtype.name).averaged:
                assert reference.same_bytes(array, reference.average(coefficients, rows)), name

    @pytest.mark.parametrize("workers", [1, 2, 5])
    def test_the_same_bytes_for_every_budget_and_number_of_workers(self, tmp_path, workers):
        paths, _ = self.run(tmp_path, {"a/w": np.zeros((300, 211), np.float32)})
        expected = wavg.average_checkpoints(paths, weights="exponential", workers=1)
        output = self.path(tmp_path, "average")
        contents, blocks = set(), set()
        for budget in (smallest_budget(paths, output), "64MiB", "1GB"):
            report = wavg.average_checkpoints(
                paths,
                output,
                weights="exponential",
                workers=workers,
                overwrite=True,
                max_memory=budget,
            )
            contents.add(read_bytes(output))
            blocks.add(report.plan.block)
        assert len(contents) == 1
        assert len(blocks) > 1
        assert_same(wavg.load(output), expected)

    def test_averaging_copies_of_one_file_gives_that_file(self, tmp_path):
        wavg.save(self.path(tmp_path, "model_1"), self.tensors())
        original = read_bytes(self.path(tmp_path, "model_1"))
        for step in (2, 3):
            with open(self.path(tmp_path, f"model_{step}"), "wb") as file:
                file.write(original)
        paths = [self.path(tmp_path, f"model_{step}") for step in (1, 2, 3)]
        wavg.average_checkpoints(
            paths, self.path(tmp_path, "average"), weights=[0.3, 0.3, 0.1], record="none"
        )
        assert read_bytes(self.path(tmp_path, "average")) == original

    @pytest.mark.parametrize("target", [".safetensors", ".h5", ".npz"])
    def test_converts_to_every_format(self, tmp_path, target):
        tensors = self.tensors()
        wavg.save(self.path(tmp_path), tensors)
        wavg.save(tmp_path / f"other{target}", wavg.load(self.path(tmp_path)))
        assert_same(wavg.load(tmp_path / f"other{target}"), tensors)

    @pytest.mark.parametrize("target", [".safetensors", ".h5", ".npz"])
    def test_averages_into_every_format(self, tmp_path, target):
        if target == self.refused:
            pytest.skip("has a test of its own")
        paths, _ = self.run(tmp_path, self.tensors())
        wavg.average_checkpoints(paths, tmp_path / f"average{target}", weights="linear")
        expected = wavg.average_checkpoints(paths, weights="linear")
        assert_same(wavg.load(tmp_path / f"average{target}"), expected)

    def test_writes_another_dtype(self, tmp_path):
        paths, _ = self.run(tmp_path, self.tensors())
        output = self.path(tmp_path, "average")
        wavg.average_checkpoints(paths, output, dtype="float16")
        result = wavg.load(output)
        assert result["dense/kernel"].dtype == np.float16
        assert result["norm/count"].dtype == np.int32
        assert_same(result, wavg.average_checkpoints(paths, dtype="float16"))

    def test_every_truncation_of_a_small_file_is_noticed(self, tmp_path):
        wavg.save(self.path(tmp_path), {"a/w": np.arange(6, dtype=np.float32)})
        whole = read_bytes(self.path(tmp_path))
        for length in range(0, len(whole), max(1, len(whole) // 400)):
            with open(self.path(tmp_path), "wb") as file:
                file.write(whole[:length])
            with pytest.raises(wavg.CheckpointFormatError, match=re.escape(self.path(tmp_path))):
                wavg.load(self.path(tmp_path))

    def test_hypothesis_knows_the_hard_numbers(self):
        assert DTYPES[:4] == strategies.FLOATS
