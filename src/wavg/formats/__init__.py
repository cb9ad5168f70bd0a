"""The table of formats, and how a file is told to be of one.

A format is a short module with three functions:

- ``read_index(path, *, opaque_dtype, like)`` → `Index`: what is in a file. Trusts nothing it reads.
  `like` is the index of a checkpoint of the same run; what is the same need not be parsed again.
- ``patch(reference, specs, keep_others, path)`` → `Template`: an output that is the reference file
  with the numbers of `specs` replaced; every other byte as it was wherever the layout allows.
- ``create(specs, metadata, path)`` → `Template`: a new file that holds just these tensors.

The last two may write a skeleton to `path` and say where its payloads lie. A module may have
``block_reader(index)`` for tensors without extents. Modules are imported when first needed.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from typing import Any, NamedTuple

from wavg.checkpoint import Checkpoint, Index, identify
from wavg.errors import CheckpointFormatError, OutputError

__all__ = [
    "FORMATS",
    "Format",
    "format_of_output",
    "is_checkpoint_name",
    "is_other_keras_name",
    "load_module",
    "open_file",
]


class Format(NamedTuple):
    """A row of the table; `isolable`: its index can be read in a process of its own."""

    name: str
    suffixes: tuple[str, ...]
    magic: tuple[bytes, ...]
    module: str
    isolable: bool = False


FORMATS = (
    Format("keras-h5", (".h5", ".hdf5"), (b"\x89HDF\r\n\x1a\n",), "wavg.formats.keras_h5", True),
    Format("safetensors", (".safetensors",), (), "wavg.formats.safetensors"),
    Format("npz", (".npz",), (b"PK\x03\x04", b"PK\x05\x06"), "wavg.formats.npz"),
)

# Known by name, and not read by this version: said plainly, rather than "unknown".
_RECOGNISED = {
    ".weights.h5": "Keras 3 weights (.weights.h5)",
    ".keras": "Keras 3 archives (.keras)",
    ".weights.json": "sharded Keras weights",
    ".safetensors.index.json": "sharded safetensors",
    ".pt": "PyTorch pickles (save as safetensors)",
    ".pth": "PyTorch pickles (save as safetensors)",
    ".ckpt": "PyTorch or TensorFlow checkpoints (save as safetensors)",
    ".bin": "PyTorch pickles (save as safetensors)",
}


def load_module(name: str) -> Any:
    """Import the module of a format named in the table."""
    return importlib.import_module(next(row.module for row in FORMATS if row.name == name))


def open_file(
    path: str,
    *,
    opaque_dtype: str | None = None,
    like: Index | None = None,
    isolate: bool = False,
) -> Checkpoint:
    """Open a checkpoint file, whatever its format; its first bytes tell which.

    The checkpoints of one run mostly have the same layout: an index equal to `like` shares its
    list of tensors, so that a thousand checkpoints take the memory of one. With `isolate` the index
    of a file that needs HDF5 is read in another process, which that library may crash or hang.

    Raises
    ------
    CheckpointFormatError
        Not a checkpoint, a damaged one, or of a kind this version does not read.
    FileNotFoundError
        No such file.
    """
    identify(path)  # refuses pipes and devices before they are opened
    if opaque_dtype not in (None, "bfloat16"):
        raise ValueError(f"opaque_dtype must be 'bfloat16' or None, not {opaque_dtype!r}")
    row = _detect(path)
    index: Index
    if isolate and row.isolable:
        from wavg.formats import isolated

        index = isolated.read_index(row.module, path, opaque_dtype=opaque_dtype)
    else:
        index = load_module(row.name).read_index(path, opaque_dtype=opaque_dtype, like=like)
    if like is not None and index.tensors == like.tensors:
        index = dataclasses.replace(index, tensors=like.tensors)
    if all(spec.extent is not None for spec in index.tensors):
        return Checkpoint(index)
    return Checkpoint(index, getattr(load_module(row.name), "block_reader", None))


def is_checkpoint_name(path: str) -> bool:
    """Whether a file's name ends like that of a checkpoint this version reads."""
    return _format_by_name(path) is not None


def is_other_keras_name(path: str) -> bool:
    """Whether a file's name is that of a Keras checkpoint this version does not read."""
    return "Keras" in (_recognised(path) or "")


def format_of_output(path: str) -> Format:
    """Return the format an output's name asks for."""
    row = _format_by_name(path)
    if row is not None:
        return row
    known = ", ".join(suffix for row in FORMATS for suffix in row.suffixes)
    kind = _recognised(path)
    why = f"{kind} are not written by this version of wavg" if kind else "no format is named so"
    raise OutputError(f"{path}: {why}; end the output's name with one of {known}", path=path)


def _format_by_name(path: str) -> Format | None:
    if _recognised(path):
        return None
    return next((row for row in FORMATS if path.lower().endswith(row.suffixes)), None)


def _recognised(path: str) -> str | None:
    name = os.path.basename(path).lower()
    if re.search(r"-\d{5}-of-\d{5}\.safetensors$", name):
        return "single shards of sharded safetensors"
    return next((text for suffix, text in _RECOGNISED.items() if name.endswith(suffix)), None)


def _detect(path: str) -> Format:
    with open(path, "rb") as file:
        start = file.read(64)
    by_magic = [row for row in FORMATS if start.startswith(row.magic)]
    if by_magic and not (by_magic[0].name == "npz" and _recognised(path)):
        return by_magic[0]
    if start[8:9] == b"{" and "shard" not in (_recognised(path) or ""):
        return next(row for row in FORMATS if row.name == "safetensors")
    raise CheckpointFormatError(f"{path}: {_diagnose(path, start)}", path=path)


def _diagnose(path: str, start: bytes) -> str:
    text = start.lstrip().lower()
    if not start:
        return "the file is empty"
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git-LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html")):
        return "this is a web page; the download did not give the file itself"
    if kind := _recognised(path):
        return f"{kind} are not read by this version of wavg"
    if path.endswith(".safetensors"):
        return "this is no safetensors file: no header where one belongs"
    return "not a checkpoint wavg knows; it reads Keras .h5, .safetensors and .npz"
