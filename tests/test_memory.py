"""The promised peak is a bound on the measured one, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import wavg
from contract import random_array

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)


def measure(folder, suffix, weights="equal", max_memory="64MiB", target=None, record=()) -> dict:
    probe = Path(__file__).with_name("memory_probe.py")
    output = subprocess.run(
        [
            sys.executable,
            probe,
            f"{folder}/m_*{suffix}",
            f"{folder}/avg{target or suffix}",
            weights,
            max_memory,
            *record,
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return json.loads(output)


def save_run(folder, suffix, count, tensors, shape, dtype):
    rng = np.random.default_rng(0)
    for step in range(count):
        model = {f"layer_{i}/w": random_array(rng, dtype, shape) for i in range(tensors)}
        wavg.save(folder / f"m_{step}{suffix}", model)


@pytest.mark.parametrize("weights", ["equal", "exponential"])
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (".safetensors", "float32"),
        (".safetensors", "bfloat16"),
        (".safetensors", "float64"),
        (".h5", "float32"),
        (".weights.h5", "float32"),
        (".npz", "float16"),
    ],
)
def test_the_peak_is_within_the_projection_and_the_budget(tmp_path, suffix, dtype, weights):
    save_run(tmp_path, suffix, 4, 2, (2000, 500), dtype)
    figures = measure(tmp_path, suffix, weights)
    assert figures["measured"] <= figures["projected"] <= figures["allowed"]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_digests_are_within_the_projection_and_the_budget(tmp_path, suffix):
    save_run(tmp_path, suffix, 4, 2, (2000, 500), "float32")
    record = ["sha256"] if suffix == ".safetensors" else ()  # the other has checksums
    figures = measure(tmp_path, suffix, max_memory="20MiB", record=record)
    assert figures["measured"] <= figures["projected"] <= figures["allowed"]


def test_a_smaller_budget_is_honoured(tmp_path):
    save_run(tmp_path, ".safetensors", 4, 2, (2000, 500), "float32")
    for budget in ("20MiB", "32MiB"):
        figures = measure(tmp_path, ".safetensors", max_memory=budget)
        assert figures["measured"] <= figures["projected"] <= figures["allowed"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_many_outputs_are_within_the_projection_and_the_budget(tmp_path, suffix):
    save_run(tmp_path, suffix, 4, 2, (2000, 500), "float32")
    weights = ";".join(f"exponential:alpha={alpha}" for alpha in range(1, 11))
    for budget in ("64MiB", "48MiB"):
        figures = measure(tmp_path, suffix, weights, budget, target=f"-{{weights}}{suffix}")
        assert figures["measured"] <= figures["projected"] <= figures["allowed"]


def test_an_impossible_budget_is_refused_with_what_is_needed(tmp_path):
    save_run(tmp_path, ".safetensors", 2, 1, (10,), "float32")
    with pytest.raises(wavg.MemoryBudgetError, match=r"at least [\d.]+ MiB, and 1 MiB are allowed"):
        wavg.plan_average(tmp_path, max_memory="1MiB")
    with pytest.raises(wavg.MemoryBudgetError, match=r"and 0\.00095 MiB are allowed"):
        wavg.plan_average(tmp_path, max_memory="1KB")


def test_memory_does_not_grow_with_the_model(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    save_run(tmp_path / "small", ".safetensors", 3, 1, (2000, 500), "float32")
    save_run(tmp_path / "large", ".safetensors", 3, 12, (2000, 500), "float32")
    small, large = (measure(tmp_path / name, ".safetensors") for name in ("small", "large"))
    assert large["bytes_read"] == 12 * small["bytes_read"]
    assert large["projected"] < small["projected"] + (1 << 20)
    assert large["measured"] < large["projected"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_many_tensors_in_many_files_share_one_index(tmp_path, suffix):
    save_run(tmp_path, suffix, 5, 700, (20,), "float32")
    figures = measure(tmp_path, suffix)
    assert figures["measured"] <= figures["projected"] <= figures["allowed"]


def test_huge_values_keep_the_promise(tmp_path):
    rng = np.random.default_rng(0)
    for step in range(10):
        model = random_array(rng, "bfloat16", (600_000,))
        model[::100_000] = -3.38e38  # next to the least value, as in a mask
        wavg.save(tmp_path / f"m_{step}.safetensors", {"w": model})
    figures = measure(tmp_path, ".safetensors")
    assert figures["measured"] <= figures["projected"] <= figures["allowed"]


@pytest.mark.slow
def test_compressed_archives_keep_the_promise(tmp_path):
    rng = np.random.default_rng(0)
    for step in range(4):
        np.savez_compressed(tmp_path / f"m_{step}.npz", w=rng.standard_normal(1_000_000))
    figures = measure(tmp_path, ".npz")
    assert figures["measured"] <= figures["projected"] <= figures["allowed"]


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [(100, 100), (2000, 10), (1, 500)])
def test_compressed_datasets_keep_the_promise(tmp_path, chunks):
    rng = np.random.default_rng(0)
    for step in range(4):
        with h5py.File(tmp_path / f"m_{step}.weights.h5", "w") as file:
            for number in range(2):
                values = rng.integers(0, 99, (2000, 500)).astype(np.float32)
                file.create_dataset(
                    f"layers/dense_{number}/vars/0", data=values, chunks=chunks, compression="lzf"
                )
    figures = measure(tmp_path, ".weights.h5")
    assert figures["measured"] <= figures["projected"] <= figures["allowed"]


@pytest.mark.slow
@pytest.mark.parametrize("target", [".h5", ".npz"])
def test_writing_another_format_keeps_the_promise(tmp_path, target):
    save_run(tmp_path, ".safetensors", 3, 2000, (20,), "float32")
    figures = measure(tmp_path, ".safetensors", target=target)
    assert figures["measured"] <= figures["projected"] <= figures["allowed"]
