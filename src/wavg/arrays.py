"""Arrays of any framework as NumPy's, without importing a framework.

Most arrays follow the protocols that NumPy asks for. PyTorch, whose tensors NumPy cannot always
take, and Keras are looked up among the modules that are loaded already.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg.dtypes import lookup, native
from wavg.errors import WavgError

__all__ = ["leaf_to_numpy", "to_numpy"]

Array = npt.NDArray[Any]


def to_numpy(leaf: Any) -> Array:
    """Return a leaf of a model as a NumPy array of this machine's byte order.

    Parameters
    ----------
    leaf
        A NumPy array or number; a tensor or variable of PyTorch, JAX, TensorFlow or Keras, on any
        device, with a gradient or without, bfloat16 and float8 included; anything else with
        ``__array__`` or ``__dlpack__``.

    Returns
    -------
    array
        It shares memory with what is in this machine's memory already: not to be written to.

    Examples
    --------
    >>> to_numpy(2.5)
    array(2.5)
    """
    if isinstance(leaf, np.ndarray):
        return native(leaf)
    torch: Any = sys.modules.get("torch")
    keras: Any = sys.modules.get("keras")
    if isinstance(leaf, getattr(torch, "Tensor", ())):
        return _from_torch(leaf, torch)
    if isinstance(leaf, getattr(keras, "Variable", ())):
        held: Any = leaf
        return to_numpy(held.value)  # the backend's own; a variable's __array__ warns
    if callable(getattr(leaf, "numpy", None)):  # TensorFlow
        leaf = leaf.numpy()
    elif not hasattr(leaf, "__array__") and hasattr(leaf, "__dlpack__"):
        leaf = np.from_dlpack(leaf)
    return native(np.asarray(leaf))


def leaf_to_numpy(path: str, leaf: Any) -> Array:
    """Return a leaf as an array; errors say which it is."""
    try:
        return to_numpy(leaf)
    except (WavgError, TypeError, ValueError, RuntimeError) as error:
        raise WavgError(f"leaf {path or 'at the top'}: {error}", tensor=path) from error


def _from_torch(tensor: Any, torch: Any) -> Array:
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else "sparse"
        raise WavgError(f"a {kind} {name} tensor of PyTorch is not an array of numbers")
    if hasattr(tensor, "full_tensor"):
        raise WavgError(
            f"a {type(tensor).__name__} of PyTorch, of which each process has a part; hand over "
            "its full_tensor(), in every process"
        )
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if name == "bfloat16":
        tensor = tensor.view(torch.int16)  # the same bytes, in a type that NumPy knows
    elif name.startswith("float8"):
        tensor = tensor.view(torch.uint8)
    else:
        name = ""
    array: Array = tensor.numpy()
    return array.view(lookup(name).numpy) if name else array
