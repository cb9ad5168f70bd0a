"""Where the inputs of a recorded average are.

It goes by the names and sizes in the record, and reads no numbers.
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from wavg.errors import CheckpointFormatError, WavgError
from wavg.formats.folders import checkpoint_in
from wavg.inputs import PathLike, expand
from wavg.record import Record, Source
from wavg.recorded import Open

__all__ = ["Located", "located"]


class Located(NamedTuple):
    """Where the inputs are, oldest first, and what may be unexpected about that."""

    paths: list[str]
    notes: tuple[str, ...] = ()


def located(
    record: Record, output: str, inputs: PathLike | Iterable[PathLike] | None, open_: Open
) -> Located:
    """Return where an average's inputs are.

    Those of the recorded names are taken, and else, of as many as are recorded, whatever they are
    called.

    Parameters
    ----------
    record
        It names them.
    output
        The average, which is not its own input.
    inputs
        Where they are; None looks around the output.
    open_
        Opens a checkpoint, whose size tells whether it is the one that is meant.

    Raises
    ------
    FileNotFoundError
        One of them is not there.
    WavgError
        They are in several places.
    """
    if inputs is None:
        paths, missing, near = _nearest(record, _candidates(os.path.abspath(output)), output, open_)
        if not paths:
            raise FileNotFoundError(
                f"{_lacking(missing, output)} not to be found, of the size recorded{near}; say "
                f"where, as in `wavg verify {output} FOLDER`"
            )
        return Located(paths)
    place = _given(inputs)
    paths, missing, _ = _nearest(record, [[place]], output, open_, whatever_size=True)
    if paths:
        return Located(paths, tuple(_unused(place, paths, output)))
    given = _expanded(inputs, output)
    if len(given) != len(record.sources):
        raise FileNotFoundError(
            f"{_lacking(missing, output)} not among what was given, which is {len(given):,} "
            f"checkpoints, where {len(record.sources):,} are recorded; if these have other names "
            "now, name them and no others"
        )
    return _renamed(record, place, given, output, open_)


def _renamed(
    record: Record, place: Sequence[str], given: Sequence[str], output: str, open_: Open
) -> Located:
    """Give every input that is not there by its name one of the other paths, in their order."""
    places = _Place(place)
    paths = [places.within(source, output, open_) for source in record.sources]
    known = {os.path.realpath(path) for path in paths if path}
    others = [path for path in given if os.path.realpath(path) not in known]
    rest = iter(others)
    names = [source.name for source in record.sources]
    pairs = [(name, path or next(rest)) for name, path in zip(names, paths, strict=True)]
    told = [f"{name} is {path}" for name, path in pairs if path in others]
    more = f" and {len(told) - 3:,} more" if len(told) > 3 else ""
    note = f"the inputs have other names than recorded: {', '.join(told[:3])}{more}"
    return Located([path for _, path in pairs], (note,))


def _lacking(names: Sequence[str], output: str) -> str:
    more = f" and {len(names) - 1:,} more inputs are" if len(names) > 1 else " is"
    return f"{names[0]}, of which {output} was made,{more}"


def _unused(place: Sequence[str], paths: Sequence[str], output: str) -> Iterator[str]:
    used = {os.path.realpath(path) for path in (*paths, output)}
    left = [p for p in place if not os.path.isdir(p) and os.path.realpath(p) not in used]
    if left:
        others = f" and {len(left) - 1:,} more" if len(left) > 1 else ""
        yield f"not among the recorded inputs: {left[0]}{others}"


def _expanded(inputs: PathLike | Iterable[PathLike], output: str) -> list[str]:
    try:
        paths = expand(inputs, sort=True, output=output)
    except WavgError:  # of several kinds, say
        return []
    return [path for path in paths if not os.path.samefile(path, output)]


def _given(inputs: PathLike | Iterable[PathLike]) -> list[str]:
    """Return the paths in which to look: folders stay as they are, and are not to be averaged."""
    listed = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    places = []
    for path in [os.fspath(path) for path in listed]:
        places += [path] if os.path.isdir(path) else expand(path, sort=False)
    return places


def _candidates(output: str) -> Iterator[list[list[str]]]:
    """Yield the places in which the inputs may be, nearest first, those as near together."""
    home = os.path.dirname(output)
    for base in dict.fromkeys([home, os.path.dirname(home), os.getcwd()]):
        yield [[base]]
        yield [[path] for path in _folders_in(base)]


def _folders_in(base: str) -> list[str]:
    """Return the folders in one, as far as they may be seen: there may be anything."""
    found = []
    with contextlib.suppress(OSError), os.scandir(base) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # a circle of links, say
                if entry.is_dir():
                    found.append(entry.path)
    return sorted(found)


def _nearest(
    record: Record,
    rings: Iterable[Sequence[Sequence[str]]],
    output: str,
    open_: Open,
    *,
    whatever_size: bool = False,
) -> tuple[list[str], list[str], str]:
    """Return the inputs' paths: all in the nearest place that has them, in the sizes recorded.

    A place is a list of folders, and of files of which they are some. Where none has all, there are
    no paths, but the names that the best place lacks, and why the first is not what has its name.
    """
    sources = record.sources
    missing, near = [source.name for source in sources], ""
    for ring in rings:
        places = [_Place(paths) for paths in ring]
        found = [[place.within(one, output, open_) for one in sources] for place in places]
        here = {tuple(map(os.path.realpath, paths)): paths for paths in found if all(paths)}
        others = [
            [(s, p) for s, p in zip(sources, paths, strict=True) if _size(p, open_) != s.size]
            for paths in here.values()
        ]
        fitting = [paths for paths, wrong in zip(here.values(), others, strict=True) if not wrong]
        if len(fitting) > 1:
            folders = ", ".join(os.path.dirname(paths[0]) for paths in fitting[:3])
            raise WavgError(
                f"inputs with the names and sizes that {output} records are in several folders "
                f"({folders}); say which",
                path=output,
            )
        if fitting:
            return fitting[0], [], ""
        if here and whatever_size:
            return next(iter(here.values())), [], ""
        for wrong in others:
            if len(wrong) <= len(missing):
                missing = [source.name for source, _ in wrong]
                near = f" ({_unlike(*wrong[0], open_)})"
        for paths in found:
            lacking = [s.name for s, path in zip(sources, paths, strict=True) if not path]
            if lacking and len(lacking) < len(missing):
                missing, near = lacking, ""
    return [], missing, near


def _unlike(source: Source, path: str, open_: Open) -> str:
    """Say why a file that has an input's name is not that input."""
    try:
        with open_(path) as checkpoint:
            size = sum(identity.size for identity in checkpoint.index.files)
        return f"{path} has {size:,} bytes, not {source.size:,}"
    except (WavgError, PermissionError) as error:
        return str(error)


class _Place:
    """Folders in which inputs may be, and files of which they are some, each looked at once."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._folders: list[str] = []
        self._files: dict[str, list[str]] = collections.defaultdict(list)
        for path in paths:
            folder = os.path.isdir(path)
            file = _checkpoint_of(path) if folder else path
            if folder:
                self._folders.append(path)
            if file:
                self._files[os.path.basename(file)].append(file)

    def within(self, source: Source, output: str, open_: Open) -> str:
        """Return where in the place an input is, or nothing; the output is not its own input."""
        name = source.name
        found = [os.path.join(folder, name) for folder in self._folders if _is_plain(name)]
        found += [path for path in self._files.get(_last(name), ()) if _ends_with(path, name)]
        found = [path for path in found if os.path.isfile(path)]
        found = [path for path in found if not os.path.samefile(path, output)]
        if len(found) > 1:
            found = [path for path in found if _size(path, open_) == source.size] or found
        return found[0] if found else ""


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _is_plain(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in name.split("/")


def _ends_with(path: str, name: str) -> bool:
    return f"/{os.path.abspath(path)}".replace(os.sep, "/").endswith(f"/{name}")


def _checkpoint_of(folder: str) -> str | None:
    try:
        return checkpoint_in(folder)
    except (CheckpointFormatError, PermissionError):
        return None  # whatever is in it, it is not one of the inputs


def _size(path: str, open_: Open) -> int:
    try:
        with open_(path) as checkpoint:
            return sum(identity.size for identity in checkpoint.index.files)
    except (WavgError, PermissionError):
        return -1  # no checkpoint of this user's, so not one of the inputs
