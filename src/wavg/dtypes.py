"""The one table of number formats: how each is named, how wide it is, what may be done with it.

It knows nothing of files and does no arithmetic. ``ml_dtypes`` is imported only when an array of
one of its types is really made.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wavg.errors import WavgError

__all__ = ["DTYPES", "DType", "dtype_of", "lookup", "native"]


class DType(NamedTuple):
    """A number format.

    Attributes
    ----------
    name
        NumPy's or ml_dtypes' name, ``"float32"``, ``"bfloat16"``.
    code
        The name in a safetensors header, ``"F32"``, ``"BF16"``.
    bits
        Width of one element; sub-byte formats have fewer than 8.
    kind
        ``"float"`` is averaged, and so is ``"complex"``, as pairs of floats; ``"int"``, ``"bool"``
        and ``"code"`` (sub-byte or exponent-only) never are.
    precision, min_exponent
        For floats: significant bits, the leading one included, and the exponent of the smallest
        normal number.
    """

    name: str
    code: str
    bits: int
    kind: str
    precision: int = 0
    min_exponent: int = 0

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype object; imports ml_dtypes where NumPy has none of its own."""
        return _numpy_dtype(self.name)

    @property
    def itemsize(self) -> int:
        """Bytes per element of a format of whole bytes."""
        return self.bits // 8

    @property
    def averaged(self) -> bool:
        """Whether tensors of this format take part in the arithmetic."""
        return self.kind in ("float", "complex")

    @property
    def component(self) -> DType:
        """The real format the arithmetic sees: a complex number is two floats side by side."""
        return _BY_NAME[f"float{self.bits // 2}"] if self.kind == "complex" else self


DTYPES = (
    DType("float64", "F64", 64, "float", 53, -1022),
    DType("float32", "F32", 32, "float", 24, -126),
    DType("float16", "F16", 16, "float", 11, -14),
    DType("bfloat16", "BF16", 16, "float", 8, -126),
    DType("float8_e4m3fn", "F8_E4M3", 8, "float", 4, -6),
    DType("float8_e5m2", "F8_E5M2", 8, "float", 3, -14),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", 8, "float", 4, -7),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", 8, "float", 3, -15),
    DType("float8_e8m0fnu", "F8_E8M0", 8, "code"),
    DType("float6_e2m3fn", "F6_E2M3", 6, "code"),
    DType("float6_e3m2fn", "F6_E3M2", 6, "code"),
    DType("float4_e2m1fn", "F4", 4, "code"),
    DType("complex64", "C64", 64, "complex"),
    DType("complex128", "", 128, "complex"),
    DType("int64", "I64", 64, "int"),
    DType("int32", "I32", 32, "int"),
    DType("int16", "I16", 16, "int"),
    DType("int8", "I8", 8, "int"),
    DType("uint64", "U64", 64, "int"),
    DType("uint32", "U32", 32, "int"),
    DType("uint16", "U16", 16, "int"),
    DType("uint8", "U8", 8, "int"),
    DType("bool", "BOOL", 8, "bool"),
)

_BY_NAME = {entry.name: entry for entry in DTYPES}


def lookup(name: str) -> DType:
    """Return the table's entry for a dtype name.

    >>> lookup("bfloat16").itemsize
    2
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        known = ", ".join(entry.name for entry in DTYPES)
        raise WavgError(f"unknown dtype {name!r}; known are {known}") from None


def dtype_of(dtype: np.dtype[Any]) -> DType | None:
    """Return the table's entry for a NumPy dtype, or None for one that is not a plain number.

    >>> dtype_of(np.dtype("<f4")).name, dtype_of(np.dtype(object))
    ('float32', None)
    """
    return _BY_NAME.get(dtype.name)


def native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array with bytes in this machine's order; itself if they are.

    >>> native(np.array([1, 2], ">i2")).dtype.isnative
    True
    """
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


@functools.cache
def _numpy_dtype(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError:
        dtype: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
        return dtype
