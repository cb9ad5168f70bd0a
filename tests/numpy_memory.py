"""NumPy's own allocations counted, and one of them refused, through its interface for allocators.

That is NEP 49, from Python: only blocks of arrays, and only those of the thread that asked. Files,
lists and what other libraries take are not among them; benchmarks/injected.py fails those.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

_SET_HANDLER, _GET_HANDLER = 304, 305  # places in NumPy's table of C functions
_size, _pointer = ctypes.c_size_t, ctypes.c_void_p
_malloc = ctypes.CFUNCTYPE(_pointer, _pointer, _size)
_calloc = ctypes.CFUNCTYPE(_pointer, _pointer, _size, _size)
_realloc = ctypes.CFUNCTYPE(_pointer, _pointer, _pointer, _size)
_free = ctypes.CFUNCTYPE(None, _pointer, _pointer, _size)


class _Handler(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("context", _pointer),
        ("malloc", _malloc),
        ("calloc", _calloc),
        ("realloc", _realloc),
        ("free", _free),
    )


_NAME = b"mem_handler"
_python = ctypes.pythonapi
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = (_pointer, ctypes.c_char_p, _pointer)
_python.PyCapsule_GetPointer.restype = _pointer
_python.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _numpys(place: int, *arguments: Any) -> Any:
    """Call one of NumPy's C functions that take and give Python's objects."""
    table = _python.PyCapsule_GetPointer(np._core._multiarray_umath._ARRAY_API, None)
    function = ctypes.cast(table, ctypes.POINTER(_pointer))[place]
    kinds = [ctypes.py_object] * (1 + len(arguments))
    return ctypes.PYFUNCTYPE(*kinds)(function)(*arguments)


class Allocations:
    """The allocations since `refusing` was entered; the `refused`-th of them gives nothing."""

    count = 0
    refused = 0

    def next_is_refused(self) -> bool:
        """Count one."""
        self.count += 1
        return self.count == self.refused


_allocations = Allocations()


_own = _Handler.from_address(_python.PyCapsule_GetPointer(_numpys(_GET_HANDLER), _NAME))


def _take(function: Any, *sizes: int) -> Any:
    return None if _allocations.next_is_refused() else function(None, *sizes)


# These live as long as the process: an array is given back by the handler that made it. That is
# NumPy's own function, for it may be called while an exception is on its way.
_callbacks = (
    _malloc(lambda _, size: _take(_own.malloc, size)),
    _calloc(lambda _, number, size: _take(_own.calloc, number, size)),
    _realloc(lambda _, old, size: _take(_own.realloc, old, size)),
)
_handler = _Handler(b"counting", 1, None, *_callbacks, _own.free)
_capsule = _python.PyCapsule_New(ctypes.addressof(_handler), _NAME, None)


@contextlib.contextmanager
def refusing(which: int) -> Iterator[Allocations]:
    """Have this thread's `which`-th allocation by NumPy fail; none does if that is 0."""
    _allocations.count, _allocations.refused = 0, which
    before = _numpys(_SET_HANDLER, _capsule)
    try:
        yield _allocations
    finally:
        _numpys(_SET_HANDLER, before)
