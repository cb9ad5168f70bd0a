"""How an averaged file came to be: the one key that wavg adds to a file's metadata.

Compact JSON with a version, so that later ones can be told apart. It owns the text, and knows
neither files nor formats.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wavg._version import __version__
from wavg.errors import RecordError

__all__ = ["KEY", "STATE_KEY", "Record", "Source", "names_within"]

KEY = "wavg"
STATE_KEY = "wavg_state"  # of a file that is no model: the sums of a StreamingAverager
_VERSION = 1
_LONGEST = 60  # of a value in a message


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that went into an average.

    Attributes
    ----------
    name
        Its path from the folder that all of them are in.
    size
        Bytes of its file, or of its files together.
    step
        Where in training it was saved.
    coefficient
        Its weight, before division by the sum of all.
    sha256
        The digest of its file, or those of its files by their names; None if it was not asked for.
    """

    name: str
    size: int
    step: float
    coefficient: float
    sha256: str | Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """What averaged a file, and from what.

    Attributes
    ----------
    weights
        The schedule's text.
    step
        That of the newest model in it.
    sources
        The checkpoints, oldest first; none where models came one by one from memory.
    count
        How many models there were.
    options
        What else was asked for and shows in the numbers, as `wavg.average_checkpoints` names it;
        what is not there was left at its default.
    version
        That of wavg.

    Examples
    --------
    >>> record = Record("linear", 20.0, (Source("m_10.npz", 64, 10.0, 1.0),
    ...                                  Source("m_20.npz", 64, 20.0, 2.0)), 2, {}, "0.1.0")
    >>> print(record.text())
    {"v":1,"wavg":"0.1.0","weights":"linear","step":20,"count":2,"inputs":["m_10.npz","m_20.npz"],"sizes":[64,64],"steps":[10,20],"coefficients":[1,2]}
    >>> Record.read({"wavg": record.text()}) == record
    True
    """

    weights: str
    step: float
    sources: tuple[Source, ...]
    count: int
    options: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__

    @property
    def proportions(self) -> list[float]:
        """Each source's coefficient divided by the sum of all."""
        total = math.fsum(source.coefficient for source in self.sources)
        return [source.coefficient / total for source in self.sources]

    def text(self) -> str:
        """Return the record as one line of JSON, a list for each property of the inputs."""
        content: dict[str, Any] = {
            "v": _VERSION,
            "wavg": self.version,
            "weights": self.weights,
            "step": _short(self.step),
            "count": self.count,
        }
        if self.options:
            content["options"] = dict(self.options)
        if self.sources:
            content["inputs"] = [source.name for source in self.sources]
            content["sizes"] = [source.size for source in self.sources]
            content["steps"] = [_short(source.step) for source in self.sources]
            content["coefficients"] = [_short(source.coefficient) for source in self.sources]
            if all(source.sha256 for source in self.sources):
                digests = [source.sha256 for source in self.sources]
                content["sha256"] = [d if isinstance(d, str) else dict(d or {}) for d in digests]
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Record | None:
        """Return the record in a file's metadata; None if there is none that can be understood.

        >>> Record.read({"format": "pt"}) is None
        True
        """
        try:
            return cls.parse(metadata[KEY]) if KEY in metadata else None
        except RecordError:
            return None  # whatever it is, it stays a text like others

    @classmethod
    def parse(cls, text: str) -> Record:
        """Read what `text` returns.

        Raises
        ------
        RecordError
            It is of a later version, or damaged, or another program's.

        Examples
        --------
        >>> Record.parse('{"v":2,"wavg":"7.0"}')
        Traceback (most recent call last):
        ...
        wavg.errors.RecordError: it has version 2, of wavg '7.0', and wavg ... knows 1; ...
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise RecordError("it is no JSON: it is damaged, or not by wavg") from None
        if not isinstance(content, dict) or type(version := content.get("v")) is not int:
            raise RecordError("it has no version: it is damaged, or not by wavg")
        if version > _VERSION:
            raise RecordError(
                f"it has version {_shown(version)}, of wavg {_shown(content.get('wavg'))}, and "
                f"wavg {__version__} knows {_VERSION}; a later wavg reads it"
            )
        try:
            if version != _VERSION:
                raise ValueError(f"there is no version {version}")
            return cls._of(content)
        except KeyError as error:
            raise RecordError(f"it is damaged: it lacks {error}") from None
        except (ArithmeticError, ValueError, TypeError) as error:
            raise RecordError(f"it is damaged: {error}") from None

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> Record:
        columns = [_list(content, name) for name in ("inputs", "sizes", "steps", "coefficients")]
        digests = _list(content, "sha256") or [None] * len(columns[0])
        if len({*map(len, columns), len(digests)}) != 1:
            raise ValueError("it has not as much of everything on its inputs")
        names = list(map(_text, columns[0]))
        if len(set(names)) != len(names):
            raise ValueError("it names an input twice")
        record = cls(
            _text(content["weights"]),
            _number(content["step"]),
            tuple(
                Source(name, _whole(size), _number(step), _number(weight), _digest(sha))
                for name, size, step, weight, sha in zip(names, *columns[1:], digests, strict=True)
            ),
            _whole(content["count"]),
            _options(content.get("options", {})),
            _text(content["wavg"]),
        )
        if record.sources and not math.fsum(source.coefficient for source in record.sources):
            raise ValueError("the coefficients sum to zero")
        return record


def _short(value: float) -> int | float:
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _list(content: Mapping[str, Any], name: str) -> list[Any]:
    value = content.get(name, [])
    if not isinstance(value, list):
        raise _unlike(value, "a list")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _unlike(value, "a text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _unlike(value, "a whole number")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _unlike(value, "a number")
    return float(value)


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _unlike(value, "a table")
    return value


def _options(value: Any) -> dict[str, Any]:
    table = _table(value)
    for name, option in table.items():
        parts = option if isinstance(option, list) else [option]
        if any(isinstance(part, (dict, list)) for part in parts):
            raise ValueError(f"{_shown(name)} has more in it than an option can")
    return table


def _digest(value: Any) -> str | dict[str, str] | None:
    if isinstance(value, dict):
        return {_text(name): _text(digest) for name, digest in value.items()}
    return None if value is None else _text(value)


def _unlike(value: Any, kind: str) -> TypeError:
    return TypeError(f"{_shown(value)} is not {kind}")


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "a table" if isinstance(value, dict) else "a list"  # of whatever depth
    text = str(value)
    return repr(value) if len(text) <= _LONGEST else f"{text[:_LONGEST]!r} ..."


def names_within(paths: Sequence[str]) -> list[str]:
    """Return what tells paths apart: each from the folder that all of them are in.

    >>> names_within(["run/checkpoint-9/model.safetensors", "run/checkpoint-10/model.safetensors"])
    ['checkpoint-9/model.safetensors', 'checkpoint-10/model.safetensors']
    """
    full = [os.path.abspath(path) for path in paths]
    try:
        top = os.path.commonpath([os.path.dirname(path) for path in full])
    except ValueError:  # on several of Windows' drives
        return [path.replace(os.sep, "/") for path in full]
    return [os.path.relpath(path, top).replace(os.sep, "/") for path in full]
