"""One checkpoint file by itself: opened, loaded, saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg import outputs
from wavg.checkpoint import Checkpoint, TensorSpec
from wavg.digests import verify_checksums
from wavg.dtypes import dtype_of
from wavg.errors import OutputError
from wavg.formats import open_file
from wavg.inputs import PathLike
from wavg.opening import available_cores, uncollected
from wavg.shortage import shortages

__all__ = ["load", "open_checkpoint", "save"]

Array = npt.NDArray[Any]


def open_checkpoint(
    path: PathLike, *, opaque_dtype: str | None = None, isolate: bool = False
) -> Checkpoint:
    """Open a checkpoint: an ordered mapping from tensor names to lazy tensors.

    Parameters
    ----------
    path
        A Keras ``.h5``, ``.weights.h5``, ``.keras`` or ``.weights.json``, safetensors or ``.npz``
        file, its content tells which; the index of sharded safetensors; or a folder with
        safetensors that are one checkpoint.
    opaque_dtype
        ``"bfloat16"`` declares unnamed two-byte values to be so.
    isolate
        Look into an HDF5 file in a process of its own, for files from strangers: one that crashes
        the HDF5 library, or keeps it busy for more than 30 s, is then a `CheckpointFormatError`.
        The process starts with the first such file, in some 0.2 s, and stays for the next ones.

    Returns
    -------
    Checkpoint
        To be used in a ``with`` statement. A tensor has ``shape`` and ``dtype``, and
        `numpy.asarray` reads it. Only the index is read on opening.

    Raises
    ------
    CheckpointFormatError
        The file is damaged, or no checkpoint.

    Examples
    --------
    >>> import numpy as np, tempfile, wavg
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> wavg.save(path, {"kernel": np.zeros((2, 3), np.float32)})
    >>> with wavg.open_checkpoint(path) as checkpoint:
    ...     checkpoint["kernel"]
    <kernel: float32[2, 3]>
    """
    with shortages():
        with uncollected():
            checkpoint = open_file(os.fspath(path), opaque_dtype=opaque_dtype, isolate=isolate)
        try:
            verify_checksums([checkpoint], available_cores())
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint


def load(
    path: PathLike, *, opaque_dtype: str | None = None, isolate: bool = False
) -> dict[str, Array]:
    """Read all tensors of a checkpoint into an ordered dict.

    Parameters are those of `open_checkpoint`. Optimizer state is not part of the model. Costs one
    reading of the file and memory for its tensors.

    Examples
    --------
    >>> import numpy as np, tempfile, wavg
    >>> path = tempfile.mkdtemp() + "/model.npz"
    >>> wavg.save(path, {"b": np.float32([1]), "a": np.arange(2)})
    >>> list(wavg.load(path).items())
    [('b', array([1.], dtype=float32)), ('a', array([0, 1]))]
    """
    with (
        shortages(),
        open_checkpoint(path, opaque_dtype=opaque_dtype, isolate=isolate) as checkpoint,
    ):
        tensors = {name: tensor.read() for name, tensor in checkpoint.items()}
        checkpoint.verify_unchanged()
    return tensors


def save(
    path: PathLike,
    tensors: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write named arrays to a new checkpoint; the name's ending tells the format.

    Parameters
    ----------
    path
        Ends with ``.safetensors``, ``.npz``, ``.h5`` (Keras' legacy layout of weights; the first
        part of a name, up to a slash, is the layer) or ``.weights.h5`` (a name is a path).
    tensors
        Names to arrays, or whatever `numpy.asarray` takes. Names, order, dtypes, shapes are kept.
    metadata
        Texts for the header; not for ``.npz``.
    overwrite
        Replace an existing file.

    Raises
    ------
    OutputExistsError
        The file exists.
    OutputError
        It cannot be written, or the format cannot hold a name or dtype.

    Examples
    --------
    >>> import numpy as np, tempfile, wavg
    >>> wavg.save(tempfile.mkdtemp() + "/model.h5", {"dense/kernel": np.ones((2, 3))})
    """
    target = os.fspath(path)
    # Not ascontiguousarray: it would make a zero-dimensional array one-dimensional.
    arrays = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    specs = [_spec_of(target, name, array) for name, array in arrays.items()]
    with shortages(), outputs.new(target, specs, metadata or {}, overwrite=overwrite) as output:
        for name, array in arrays.items():
            if array.size:
                output.sink.write(name, 0, array.reshape(-1))
        output.finish()
        output.commit()


def _spec_of(path: str, name: str, array: Array) -> TensorSpec:
    entry = dtype_of(array.dtype)
    if entry is None or entry.bits % 8 or array.dtype.byteorder == ">":
        raise OutputError(
            f"{path}: cannot store {name!r}: {array.dtype} is not a plain number",
            path=path,
            tensor=name,
        )
    return TensorSpec(name, entry.name, array.shape)
