"""Adapters average where their configurations say that their numbers mean the same."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import hf_folders
import wavg
from wavg import CheckpointFormatError, StructureMismatchError

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "base",
    "inference_mode": True,
}


def adapter(folder, step, **changes):
    path = folder / f"checkpoint-{step}"
    rng = np.random.default_rng(step)
    hf_folders.single(
        path,
        {
            f"base_model.model.{part}.weight": rng.standard_normal(shape).astype(np.float32)
            for part, shape in (("q_proj.lora_A", (2, 8)), ("q_proj.lora_B", (8, 2)))
        },
        "adapter_model.safetensors",
    )
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    (path / "optimizer.pt").write_bytes(b"state")
    return path


def test_adapters_average_into_a_folder_with_their_configuration(tmp_path):
    run = [adapter(tmp_path, step, base_model_name_or_path=f"b{step}") for step in (9, 10)]
    wavg.average_checkpoints(tmp_path, tmp_path / "out")
    found = hf_folders.contents(tmp_path / "out")
    assert found.keys() == {"adapter_model.safetensors", "adapter_config.json"}
    assert found["adapter_config.json"] == (run[-1] / "adapter_config.json").read_bytes()
    for name, array in wavg.load(tmp_path / "out").items():
        rows = [wavg.load(path)[name] for path in run]
        np.testing.assert_allclose(array, np.mean(rows, axis=0, dtype=np.float64), rtol=1e-7)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("peft_type", "LOHA", 'is "LOHA"; the newest\'s is "LORA"'),
        ("r", 4, "r is 4; the newest's is 2"),
        ("lora_alpha", 8, "lora_alpha is 8; the newest's is 4"),
        ("rank_pattern", {"q_proj": 4}, 'is {"q_proj": 4}; the newest\'s is not set'),
        ("alpha_pattern", {"q_proj": 4}, 'is {"q_proj": 4}; the newest\'s is not set'),
        ("use_rslora", True, "use_rslora is true; the newest's is not set"),
        ("use_dora", True, "use_dora is true; the newest's is not set"),
        ("target_modules", ["q_proj"], 'target_modules is ["q_proj"]'),
        ("target_modules", "all-linear", 'target_modules is "all-linear"'),
    ],
)
def test_settings_that_differ_are_refused(tmp_path, setting, value, message):
    paths = [adapter(tmp_path, 1, **{setting: value}), adapter(tmp_path, 2)]
    with pytest.raises(StructureMismatchError, match=re.escape(message)) as caught:
        wavg.average_checkpoints(paths)
    assert len(caught.value.differences) == 1
    assert str(paths[0]) in caught.value.differences[0]


def test_every_difference_is_listed(tmp_path):
    adapter(tmp_path, 1, r=4, lora_alpha=8)
    adapter(tmp_path, 2, r=3)
    adapter(tmp_path, 3)
    with pytest.raises(StructureMismatchError, match="3 differences") as caught:
        wavg.plan_average(tmp_path)
    assert len(caught.value.differences) == 3


def test_what_means_the_same_is_no_difference(tmp_path):
    adapter(tmp_path, 1, target_modules=["v_proj", "q_proj"], use_dora=False, rank_pattern=None)
    adapter(tmp_path, 2)
    assert len(wavg.plan_average(tmp_path).inputs) == 2


def test_an_adapter_without_its_configuration_is_told(tmp_path):
    paths = [adapter(tmp_path, step) for step in (1, 2)]
    (paths[0] / "adapter_config.json").unlink()
    with pytest.raises(StructureMismatchError, match="no adapter with adapter_config"):
        wavg.plan_average(paths)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (11 << 20)])
def test_a_configuration_that_cannot_be_understood_is_told(tmp_path, content):
    paths = [adapter(tmp_path, step) for step in (1, 2)]
    (paths[0] / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=r"adapter_config\.json: no sound"):
        wavg.plan_average(paths)


def test_the_configuration_of_an_adapter_beside_a_model_is_not_the_models(tmp_path):
    for step in (1, 2):
        hf_folders.single(adapter(tmp_path, step, r=step), hf_folders.model(step))
    assert len(wavg.plan_average(tmp_path).decisions) == len(hf_folders.model(1))
