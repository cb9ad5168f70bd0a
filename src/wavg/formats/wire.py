"""An index, or why there is none, as a line of JSON between processes.

What arrives comes from a process that has read a hostile file and may say anything: its words are
checked as those of a file are. Fields are known only by their annotations.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from wavg import errors
from wavg.checkpoint import Index, has_array
from wavg.errors import CheckpointFormatError, MissingDependencyError, WavgError
from wavg.extents import Extent
from wavg.formats import FORMATS

__all__ = ["decode", "encode", "encode_error"]

_LONGEST = 4000  # characters of a message
_KINDS = ("CheckpointFormatError", "CheckpointChangedError", "MissingDependencyError")


class _Failure(NamedTuple):
    kind: str
    message: str
    path: str | None
    tensor: str | None
    number: int | None


def encode(index: Index) -> str:
    """Return an index as one line: an object of its fields.

    >>> from wavg.checkpoint import FileIdentity
    >>> encode(Index("keras", (FileIdentity("m.keras", 9, 8, 7, 6),), ()))
    '{"format": "keras", "files": [["m.keras", 9, 8, 7, 6]], "tensors": [], ...}'
    """
    fields = {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}
    return json.dumps(fields, default=lambda v: v.hex() if isinstance(v, bytes) else dict(v))


def encode_error(path: str, error: Exception) -> str:
    """Return as one line, a list, an exception that reading a file raised."""
    kind, message, number = type(error).__name__, str(error), getattr(error, "errno", None)
    where, tensor = path, None
    if isinstance(error, WavgError):
        message, where, tensor = error.message, error.path, error.tensor
    if isinstance(error, ImportError):
        kind = MissingDependencyError.__name__
    elif isinstance(error, MemoryError):
        message = f"{path}: reading it takes too much memory"
    elif not isinstance(error, WavgError) and number is None:
        message = f"{path}: reading it failed ({kind}: {error})"
    return json.dumps(_Failure(kind, message[:_LONGEST], where, tensor, number))


def decode(path: str, line: bytes) -> Index | Exception:
    """Return what was encoded: the index of the file at `path`, or an exception to raise.

    That its files are what it says of them, `Checkpoint` verifies on opening.

    Raises
    ------
    CheckpointFormatError
        The line is neither, or it is an index that cannot be one of this file.
    """
    try:
        answer = json.loads(line)
        if isinstance(answer, list):
            return _exception(path, _decoder(_Failure)(answer))
        return _checked(path, _index(answer))
    except (TypeError, ValueError, LookupError, RecursionError, WavgError) as error:
        why = f"the process that read it talks nonsense: {str(error)[:200]}"
        raise CheckpointFormatError(f"{path}: {why}", path=path) from None


def _exception(path: str, failure: _Failure) -> Exception:
    if failure.number is not None and failure.number in errno.errorcode:
        return OSError(failure.number, os.strerror(failure.number), path)
    kind = failure.kind if failure.kind in _KINDS else CheckpointFormatError.__name__
    error: Exception = getattr(errors, kind)(
        failure.message, path=failure.path, tensor=failure.tensor
    )
    return error


def _checked(path: str, index: Index) -> Index:
    paths = [identity.path for identity in index.files]
    if paths[:1] != [path] or {*map(os.path.dirname, paths)} != {os.path.dirname(path)}:
        raise ValueError("other files than asked for")
    for file, offset, length in _extents([getattr(index, name) for name in _hints(Index)]):
        if min(file, offset, length) < 0 or offset + length > index.files[file].size:
            raise ValueError("bytes outside of the file")
    if len({spec.name for spec in index.tensors}) != len(index.tensors):
        raise ValueError("two tensors of one name")
    if index.format not in {row.name for row in FORMATS if row.isolable}:
        raise ValueError(f"the format {index.format!r}")
    if index.reader_bytes < 0:
        raise ValueError("less memory than none")
    for checksum in index.checksums:
        size = index.files[checksum.extent.file].size
        if not all(0 <= place <= size - 4 for place in checksum.places):
            raise ValueError("checksums outside of the file")
    for spec in (*index.tensors, *index.others):
        length = spec.nbytes if spec.extent is None else spec.extent.length
        possible = min(spec.shape, default=0) >= 0 and has_array(spec.shape, spec.entry.bits)
        if not possible or spec.nbytes != length:
            raise ValueError(f"{spec.name}, {spec.describe()}, of {length} bytes")
    return index


def _extents(value: Any) -> Iterator[Extent]:
    if isinstance(value, Extent):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _extents(part)


_hints = functools.cache(get_type_hints)


def _index(answer: Any) -> Index:
    hints = _hints(Index)
    if _expect(dict, answer).keys() != hints.keys():
        raise ValueError(f"an index of {list(answer)}")
    return Index(**{name: _decoder(hint)(answer[name]) for name, hint in hints.items()})


@functools.cache
def _decoder(hint: Any) -> Callable[[Any], Any]:
    """Return what makes of JSON's types a value of an annotation, or raises."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (some,) = (_decoder(part) for part in parts if part is not types.NoneType)
        return lambda value: None if value is None else some(value)
    if origin is tuple and parts[1:] == (...,):
        each = _decoder(parts[0])
        return lambda value: tuple([each(part) for part in _expect(list, value)])
    if origin is Mapping:
        key, item = map(_decoder, parts)
        return lambda value: {key(k): item(v) for k, v in _expect(dict, value).items()}
    if hint is bytes:
        return lambda value: bytes.fromhex(_expect(str, value))
    if hint in (str, int, float, bool):
        return functools.partial(_expect, hint)
    decoders = [_decoder(part) for part in _hints(hint).values()]  # a NamedTuple
    return lambda value: hint(
        *[one(part) for one, part in zip(decoders, _expect(list, value), strict=True)]
    )


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:  # True is an int, and 1.0 is none
        raise TypeError(f"{str(value)[:60]!r} where {kind.__name__} belongs")
    return value
