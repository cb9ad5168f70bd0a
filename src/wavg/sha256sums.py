"""Lists of files and their SHA-256, as `sha256sum` and `shasum` print and publishers give them."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from wavg.checkpoint import reading
from wavg.errors import WavgError
from wavg.inputs import PathLike
from wavg.places import look

__all__ = ["Sums", "SumsLike"]

SumsLike: TypeAlias = "PathLike | Mapping[PathLike, str]"
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *]([^\0]+)")
_TAGGED = re.compile(r"(\\?)SHA256 ?\(([^\0]+)\) ?= ?([0-9a-fA-F]{64})")
_ESCAPED = {r"\\": "\\", r"\n": "\n", r"\r": "\r"}
_LONGEST = 100 << 20
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Sums:
    """The SHA-256 that files are to have, by their paths.

    Parameters
    ----------
    listed
        A mapping from paths to digests, or the path of a list: lines of ``DIGEST  NAME`` or
        ``SHA256 (NAME) = DIGEST``. Names are taken from the folder that the list is in, and else
        from the current one.

    Raises
    ------
    WavgError
        A line is no such one, or a file has two digests; the system cannot read the list.
    FileNotFoundError
        There is no such list.

    Examples
    --------
    >>> sums = Sums({"run/model_9.safetensors": "9F" * 32})
    >>> sums("run/../run/model_9.safetensors")[:8]
    '9f9f9f9f'
    """

    def __init__(self, listed: SumsLike) -> None:
        if isinstance(listed, Mapping):
            self.source = "the digests given"
            pairs, bases = _checked(listed.items()), [os.getcwd()]
        else:
            self.source = os.fspath(listed)
            pairs, bases = _read(self.source), [os.path.dirname(os.path.abspath(self.source))]
            bases.append(os.getcwd())
        told = [(name, digest.lower()) for name, digest in pairs]
        self._tables = [self._table(base, told) for base in bases]

    def _table(self, base: str, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
        table: dict[str, str] = {}
        for name, digest in pairs:
            path = os.path.realpath(os.path.join(base, name))
            if table.setdefault(path, digest) != digest:
                raise WavgError(f"{self.source} has two different digests of {name}")
        return table

    def __call__(self, path: str) -> str:
        """Return the digest that a file is to have."""
        real = os.path.realpath(path)
        for table in self._tables:
            if real in table:
                return table[real]
        raise WavgError(
            f"{path} is not among the files of {self.source}; list it too, for whatever is "
            "averaged, or copied into an output's folder, has to be listed",
            path=path,
        )


def _checked(pairs: Iterable[tuple[PathLike, str]]) -> list[tuple[str, str]]:
    result = []
    for name, digest in pairs:
        if not isinstance(digest, str) or re.fullmatch("[0-9a-fA-F]{64}", digest) is None:
            raise WavgError(
                f"{digest!r} is not a SHA-256 (of {name}): expected a text of 64 hex digits"
            )
        path = os.fspath(name)
        if "\0" in path:
            raise WavgError(f"{path!r} is no path: it holds a NUL")
        result.append((path, digest))
    return result


def _read(path: str) -> list[tuple[str, str]]:
    look(path)  # which tells a name that no file can have
    with reading(path), open(path, "rb") as file:
        raw = file.read(_LONGEST + 1)
    if len(raw) > _LONGEST:
        raise WavgError(f"{path} is too long for a list of digests", path=path)
    if raw.startswith(_UTF16):
        raise WavgError(
            f"{path} is text in UTF-16, as Windows PowerShell's > writes it; save it as UTF-8, as "
            "`| Out-File -Encoding utf8 FILE` does",
            path=path,
        )
    pairs = []
    for number, line in enumerate(os.fsdecode(raw.removeprefix(codecs.BOM_UTF8)).split("\n"), 1):
        text = line.rstrip("\r")
        if not text.strip() or text.startswith("#"):
            continue
        if match := _LINE.fullmatch(text):
            escaped, digest, name = match.groups()
        elif match := _TAGGED.fullmatch(text):
            escaped, name, digest = match.groups()
        else:
            raise WavgError(
                f"{path}, line {number}: {text[:80]!r} is not a digest and a name; expected lines "
                "as sha256sum prints them",
                path=path,
            )
        if escaped:
            name = re.sub(r"\\[\\nr]", lambda found: _ESCAPED[found[0]], name)
        pairs.append((name, digest))
    if not pairs:
        raise WavgError(
            f"{path} lists no digest; expected lines as sha256sum prints them", path=path
        )
    return pairs
