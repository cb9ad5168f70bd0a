"""The table of formats, and how a file is told to be of one.

A format is a short module with three functions:

- ``read_index(path, *, opaque_dtype, like)`` → `Index`: what is in a file. Trusts nothing it
  reads. `like` is the index of a checkpoint of the same run; what is the same need not be parsed
  again.
- ``patch(reference, specs, keep_others, parts)`` → `list[Template]`: an output that is the
  reference with the numbers of `specs` replaced, where that cannot be done in place
  (`wavg.templates`).
- ``create(specs, metadata, parts)`` → `list[Template]`: an output that holds just these tensors,
  unless the table says that it needs more.

An output is one file, and the last two may write a skeleton to its path. Formats of several files
have ``parts(output, specs, reference, limit)``: the files of an output after the reference of that
index, first the file that names the others; and ``renamed(reference, specs, keep_others, parts)``,
the template of that file. Those that keep a record have ``noted(templates, reference, key)``: a
function that gives the templates with a text in the files' metadata, or with None without it. A
module may have ``block_reader(index)`` for tensors without extents.
Modules are imported when first needed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from wavg.checkpoint import Checkpoint, Index, TensorSpec, identify, reading
from wavg.errors import CheckpointFormatError, OutputError
from wavg.formats.folders import INDEX, checkpoint_in, has_folder, is_shard, why_none
from wavg.formats.stand_ins import stand_in
from wavg.places import is_folder
from wavg.templates import Part

__all__ = [
    "FORMATS",
    "Format",
    "ending_of",
    "format_of_output",
    "is_checkpoint_name",
    "is_folder_output",
    "load_module",
    "open_file",
    "parts_of",
    "refuse_new",
]


class Format(NamedTuple):
    """A row of the table.

    ``isolable``: its index is HDF5's business, and can be read in a process of its own.
    ``several``: an output may be several files.
    ``recorded``: its files say how they came to be.
    ``needs``: what only inputs of this format have, without which there is no output in it.
    """

    name: str
    suffixes: tuple[str, ...]
    magic: tuple[bytes, ...]
    module: str
    isolable: bool = False
    several: bool = False
    recorded: bool = False
    needs: str = ""


_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"

FORMATS = (
    Format("keras-h5", (".h5", ".hdf5"), (_HDF5_MAGIC,), "wavg.formats.keras_h5", True),
    Format("keras-weights", (".weights.h5",), (), "wavg.formats.keras_weights", True),
    Format(
        "keras",
        (".keras",),
        (),
        "wavg.formats.keras_archive",
        isolable=True,
        needs="a model's configuration, which only .keras inputs have",
    ),
    Format(
        "keras-shards",
        (".weights.json",),
        (),
        "wavg.formats.keras_shards",
        isolable=True,
        several=True,
        needs="shards to follow, which only .weights.json inputs have",
    ),
    Format(
        "safetensors",
        (".safetensors", INDEX),
        (),
        "wavg.formats.safetensors_shards",
        several=True,
        recorded=True,
    ),
    Format("npz", (".npz",), (b"PK\x03\x04", b"PK\x05\x06"), "wavg.formats.npz"),
)
_HDF5 = {"keras-h5", "keras-weights"}  # what the same ending, .h5, may stand for
_KERAS_3 = {"keras-weights", "keras", "keras-shards"}
_KERAS_MEMBERS = (b"metadata.json", b"config.json", b"model.weights.h5")

_PICKLES = "PyTorch pickles (write a state_dict with safetensors.torch.save_file)"
# Known by name, and not read by this version: said plainly, rather than "unknown".
_RECOGNISED = {
    ".pt": _PICKLES,
    ".pth": _PICKLES,
    ".ckpt": "PyTorch or TensorFlow checkpoints (save as safetensors)",
    ".bin": _PICKLES,
}


def load_module(name: str) -> Any:
    """Import the module of a format named in the table."""
    return importlib.import_module(_row(name).module)


def _row(name: str) -> Format:
    return next(row for row in FORMATS if row.name == name)


def parts_of(
    row: Format,
    output: str,
    specs: Sequence[TensorSpec],
    reference: Index | None = None,
    limit: int | None = None,
) -> list[Part]:
    """Return the files that an output of these tensors consists of; the first names the others.

    `limit` is the most bytes of tensors in each of several. An output that ends with a slash is a
    folder.
    """
    if row.several:
        parts: list[Part] = load_module(row.name).parts(output, specs, reference, limit)
        return parts
    if limit is not None:
        raise OutputError(f"{output} is one file, and has no shards", path=output)
    return [Part(output, tuple(spec.name for spec in specs))]


def open_file(
    path: str,
    *,
    opaque_dtype: str | None = None,
    like: Index | None = None,
    isolate: bool = False,
) -> Checkpoint:
    """Open a checkpoint, a file or a folder, whatever its format; its first bytes tell which.

    The checkpoints of one run mostly have the same layout: what an index has equal to `like`, its
    lists of tensors and its texts, it shares, so that a thousand take the memory of one. With
    `isolate` the index of a file that needs HDF5 is read in another process, which that library may
    crash or hang.

    Raises
    ------
    CheckpointFormatError
        Not a checkpoint, a damaged one, or of a kind this version does not read.
    InputError
        The system cannot read it.
    FileNotFoundError
        No such file.
    """
    with reading(path):
        return _open_file(path, opaque_dtype, like, isolate)


def _open_file(
    path: str, opaque_dtype: str | None, like: Index | None, isolate: bool
) -> Checkpoint:
    if is_folder(path):
        whole = checkpoint_in(path)
        if whole is None and (why := why_none(path)):
            raise CheckpointFormatError(f"{path} is no checkpoint: {why}", path=path)
        path = whole or path
    identify(path)  # refuses pipes and devices before they are opened
    if opaque_dtype not in (None, "bfloat16"):
        raise ValueError(f"opaque_dtype must be 'bfloat16' or None, not {opaque_dtype!r}")
    row = _detect(path)
    look = functools.partial(_look, opaque_dtype=opaque_dtype, isolate=isolate)
    index = look(row.name, path, like=like)
    if like is not None:
        index = dataclasses.replace(
            index,
            tensors=like.tensors if index.tensors == like.tensors else index.tensors,
            others=like.others if index.others == like.others else index.others,
            metadata=like.metadata if index.metadata == like.metadata else index.metadata,
        )
    block_reader = None
    if not row.isolable or any(spec.extent is None for spec in index.tensors):
        # Else without h5py, which an isolated index spares this process.
        block_reader = getattr(load_module(index.format), "block_reader", None)
    return Checkpoint(index, block_reader, look)


def _look(
    name: str,
    path: str,
    *,
    opaque_dtype: str | None,
    isolate: bool,
    like: Index | None = None,
) -> Index:
    """Return the index of a file of the format of that name."""
    row = _row(name)
    index: Index
    if isolate and row.isolable:
        from wavg.formats import isolated

        index = isolated.read_index(row.module, path, opaque_dtype=opaque_dtype)
    else:
        index = load_module(name).read_index(path, opaque_dtype=opaque_dtype, like=like)
    return index


def is_checkpoint_name(path: str) -> bool:
    """Whether a file's name ends like that of a checkpoint this version reads."""
    return _format_by_name(path) is not None


def format_of_output(path: str, reference: Index | None = None) -> Format:
    """Return the format of an output: the one its name asks for.

    Keras tells its layouts by name: an output after a `reference` in one of them is refused the
    name of another that Keras would not load, unless the reference has such a name itself.
    A folder is of safetensors, see `is_folder_output`.
    """
    _refuse_nameless(path)
    if reference is not None and is_folder_output(path, reference.path):
        return _row("safetensors")
    row = _format_by_name(path)
    if row is None:
        known = ", ".join(suffix for row in FORMATS for suffix in row.suffixes)
        kind = _recognised(path)
        why = "this is a folder" if os.path.isdir(path) else "no format is named so"
        why = f"{kind} are not written by this version of wavg" if kind else why
        raise OutputError(
            f"{path}: {why}; end the output's name with one of {known} (only after an input "
            "that is a folder of safetensors it may have no ending)",
            path=path,
        )
    if reference is None or row.name == reference.format:
        return row
    own = _row(reference.format)
    if {row.name, own.name} == _HDF5 and _format_by_name(reference.path) is row:
        return own
    if {row.name, own.name} == _HDF5 or (row.name == "keras-h5" and own.name in _KERAS_3):
        endings = dict.fromkeys((own.suffixes[0], *[".weights.h5"] * bool(own.needs)))
        raise OutputError(
            f"{path}: Keras would not load what {reference.path} holds under this name; "
            f"end it with {' or '.join(endings)}",
            path=path,
        )
    refuse_new(row, path)
    return row


def is_folder_output(path: str, reference: str) -> bool:
    """Whether an output's name asks for a folder: it ends with a slash, or tells no format.

    That can only be made after a `reference` which has a folder to itself.
    """
    _refuse_nameless(path)
    slash = not os.path.basename(path)
    if not slash and (ending_of(path) or _recognised(path)):
        return False
    if has_folder(reference):
        return True
    if slash:
        raise OutputError(
            f"{path} is the name of a folder, and {reference} is no folder of safetensors for it "
            "to follow; name a file",
            path=path,
        )
    return False


def _refuse_nameless(path: str) -> None:
    if not path:
        raise OutputError("the output's name is empty; name a file, or a folder", path=path)


def refuse_new(row: Format, path: str) -> None:
    """Raise an error if an output cannot be made of tensors alone."""
    if row.needs:
        raise OutputError(
            f"{path}: {row.suffixes[0]} files need {row.needs}; end the output's name otherwise, "
            "with .weights.h5 for Keras' load_weights",
            path=path,
        )


def ending_of(path: str) -> str:
    """Return what of a name tells its format, or nothing.

    >>> ending_of("run/model_1.weights.h5"), ending_of("notes.txt")
    ('.weights.h5', '')
    """
    if _recognised(path):
        return ""
    endings = (suffix for row in FORMATS for suffix in row.suffixes)
    return max((end for end in endings if path.lower().endswith(end)), key=len, default="")


def _format_by_name(path: str) -> Format | None:
    ending = ending_of(path)
    return next((row for row in FORMATS if ending in row.suffixes), None)


def _recognised(path: str) -> str | None:
    name = os.path.basename(path).lower()
    if is_shard(name):
        return "single shards of safetensors (name their folder, or their index)"
    return next((text for suffix, text in _RECOGNISED.items() if name.endswith(suffix)), None)


def _detect(path: str) -> Format:
    with open(path, "rb") as file:
        start = file.read(64)
    named = _format_by_name(path)
    by_magic = next((row for row in FORMATS if row.magic and start.startswith(row.magic)), None)
    if by_magic is not None and by_magic.name == "npz":
        if _recognised(path):
            by_magic = None
        elif path.lower().endswith(".keras") or start[30:].startswith(_KERAS_MEMBERS):
            return _row("keras")
    if by_magic is not None:
        return by_magic
    if path.lower().endswith((INDEX, ".weights.json")) and start.lstrip()[:1] == b"{":
        assert named is not None  # these endings are in the table
        return named
    if start[8:9] == b"{" and not is_shard(path):
        return _row("safetensors")
    raise CheckpointFormatError(f"{path}: {_diagnose(path, start)}", path=path)


def _diagnose(path: str, start: bytes) -> str:
    if instead := stand_in(start):
        return instead
    if kind := _recognised(path):
        return f"{kind} are not read by this version of wavg"
    if path.endswith(INDEX):
        return "this is no index of shards: no JSON where it belongs"
    if path.endswith(".safetensors"):
        return "this is no safetensors file: no header where one belongs"
    known = ", ".join(suffix for row in FORMATS for suffix in row.suffixes)
    return f"not a checkpoint wavg knows; it reads {known}"
