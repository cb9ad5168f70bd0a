"""Two small checkpoints of each kind, to be averaged into an output of that kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import wavg

GOLDEN = Path(__file__).parent / "golden"
KERAS = {
    ".h5": "keras3_mlp",
    ".weights.h5": "keras3_kernels",
    ".keras": "keras3_tower",
    ".weights.json": "keras3_shards",
}
SUFFIXES = [".safetensors", ".npz", *KERAS, "/"]
_EVERYDAY = [".safetensors", ".h5", ".weights.json", "/"]
# For parametrize; the longer run takes those that differ little from others.
ALL = [
    pytest.param(suffix, marks=[pytest.mark.slow] * (suffix not in _EVERYDAY))
    for suffix in SUFFIXES
]
REPLACED = [each for each in ALL if each.values != (".weights.json",)]  # these never are


def inputs(folder: Path, suffix: str) -> list[str]:
    """Make the checkpoints; a slash stands for folders of safetensors."""
    folder.mkdir(exist_ok=True)
    return [_input(folder, suffix, number) for number in (1, 2)]


def _input(folder: Path, suffix: str, number: int) -> str:
    if suffix in KERAS:
        for path in GOLDEN.glob(f"{KERAS[suffix]}_{number}*"):
            if path.suffix != ".npz":
                shutil.copy(path, folder)
        return str(folder / f"{KERAS[suffix]}_{number}{suffix}")
    tensors = {"a/w": np.float32([[number, 2], [3, 4]]), "b/w": np.float16([number, 5])}
    path = folder / f"model_{number}{suffix.rstrip('/')}"
    if suffix == "/":
        path.mkdir()
        (path / "config.json").write_text("{}")
        wavg.save(path / "model.safetensors", tensors)
    else:
        wavg.save(path, tensors)
    return str(path)


def output(folder: Path, suffix: str) -> str:
    """The name of an output of that kind."""
    return f"{folder}/out{suffix}"


def contents(folder: Path) -> dict[str, bytes]:
    """All that a folder holds, by path, hidden files too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
