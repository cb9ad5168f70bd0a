"""Folders of safetensors as Hugging Face's libraries write them, made without these."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np

import wavg


def model(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    tensors = {
        f"layers.{layer}.{part}.weight": rng.standard_normal(shape).astype(dtype)
        for layer in range(3)
        for part, shape in (("attention", (8, 8)), ("mlp", (8, 16)))
    }
    tensors["norm.weight"] = rng.standard_normal(8).astype(ml_dtypes.bfloat16)
    tensors["positions"] = np.arange(4)
    return tensors


def single(folder, tensors, name="model.safetensors"):
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    wavg.save(os.path.join(folder, ".safetensors"), tensors, metadata={"format": "pt"})
    os.replace(os.path.join(folder, ".safetensors"), path)  # wavg.save makes no single shard
    return path


def sharded(folder, tensors, shards=2, base="model", edit=lambda content: None):
    """Deal the tensors out to shards; return the path of the index."""
    os.makedirs(folder, exist_ok=True)
    names = [f"{base}-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
    size = -(-len(tensors) // shards)
    mapping, items = {}, list(tensors.items())
    for number, name in enumerate(names):
        part = dict(items[number * size : (number + 1) * size])
        single(folder, part, name)
        mapping.update(dict.fromkeys(part, name))
    content = {
        "metadata": {
            "total_parameters": sum(array.size for array in tensors.values()),
            "total_size": sum(array.nbytes for array in tensors.values()),
        },
        "weight_map": dict(sorted(mapping.items())),
    }
    edit(content)
    path = os.path.join(folder, f"{base}.safetensors.index.json")
    with open(path, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
    return path


BESIDE = {
    "config.json": b'{"model_type": "tiny"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "tokenizer.model": b"sentences in pieces",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_tiny.py": b"class Tiny: ...",
}
STATE = {
    "optimizer.pt": b"optimizer",
    "scheduler.pt": b"scheduler",
    "scaler.pt": b"scaler",
    "rng_state.pth": b"rng",
    "rng_state_0.pth": b"rng",
    "trainer_state.json": b"{}",
    "training_args.bin": b"args",
    "pytorch_model.bin": b"other weights",
    "README.md": b"a card",
}


def trainer_run(folder, steps=(900, 1000), shards=(2, 2), dtype=np.float32):
    """A run as the Trainer leaves it; returns the folders, oldest first."""
    made = []
    for step, count in zip(steps, shards, strict=True):
        path = os.path.join(folder, f"checkpoint-{step}")
        tensors = model(step, dtype)
        if count == 1:
            single(path, tensors)
        else:
            sharded(path, tensors, count)
        for name, data in {**BESIDE, **STATE}.items():
            with open(os.path.join(path, name), "wb") as file:
                file.write(data + f" # {step}".encode())
        made.append(path)
    return made


def contents(folder):
    """The files of a folder, and their bytes."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
