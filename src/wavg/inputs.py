"""From what a person names to an ordered list of paths with steps.

It looks at names only; whether a file is a checkpoint is for the formats to say.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from wavg.errors import WavgError, WeightError
from wavg.formats import format_of_output, is_checkpoint_name

__all__ = ["PathLike", "expand", "natural_key", "read_steps"]

PathLike: TypeAlias = "str | os.PathLike[str]"


def natural_key(path: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts ``model_9`` before ``model_10``.

    >>> sorted(["m_10.h5", "m_9.h5", "m.h5"], key=natural_key)
    ['m.h5', 'm_9.h5', 'm_10.h5']
    """
    # Text before numbers: the end of a name must not sort behind the digits of a longer one.
    return [
        (1, int(part), part) if part.isascii() and part.isdigit() else (0, 0, part)
        for part in re.split(r"([0-9]+)", path)
    ]


def expand(
    inputs: PathLike | Iterable[PathLike], *, sort: bool = False, output: str | None = None
) -> list[str]:
    """Return the paths of the checkpoints, oldest first.

    A glob or a folder is sorted naturally; a list stays as given, unless `sort`. In a folder, the
    files named like checkpoints count, but for the `output`; they must be of one kind.

    Raises
    ------
    FileNotFoundError
        A path that does not exist, a glob or a folder without a checkpoint.
    WavgError
        The same file twice, or a folder with checkpoints of several kinds.
    """
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    paths = [path for name in given for path in _expand_one(os.fspath(name), output)]
    if not paths:
        raise WeightError("there is nothing to average: no checkpoint was given")
    if sort:
        paths.sort(key=natural_key)
    seen: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise WavgError(f"{path} is given twice (as {seen[real]})", path=path)
        seen[real] = path
    return paths


def _expand_one(name: str, output: str | None) -> list[str]:
    if os.path.isdir(name):
        entries = (entry for entry in os.listdir(name) if not entry.startswith("."))
        files = [os.path.join(name, entry) for entry in entries]
        files = [path for path in files if is_checkpoint_name(path) and os.path.isfile(path)]
        if output is not None:  # what an earlier run wrote there is no checkpoint of the training
            files = [path for path in files if os.path.realpath(path) != os.path.realpath(output)]
        if not files:
            raise FileNotFoundError(f"there is no checkpoint in the folder {name}")
        if len({format_of_output(path) for path in files}) > 1:
            kinds = sorted({os.path.splitext(path)[1] for path in files})
            raise WavgError(
                f"the folder {name} holds several kinds of files ({', '.join(kinds)}); "
                f"name one with a glob, such as {name.rstrip(os.sep)}/*{kinds[0]}",
                path=name,
            )
        return sorted(files, key=natural_key)
    if not os.path.lexists(name) and glob.has_magic(name):
        files = sorted(glob.glob(name, recursive=True), key=natural_key)
        if not files:
            raise FileNotFoundError(f"no file matches {name}")
        if any(map(os.path.isdir, files)):
            return [path for file in files for path in _expand_one(file, output)]
        return files
    if not os.path.exists(name):
        raise FileNotFoundError(f"there is no file {name}")
    return [name]


def read_steps(paths: Sequence[str]) -> tuple[float, ...]:
    """Read each checkpoint's step from its name; 1 … N where that is not an increasing series.

    A number behind ``step`` counts first, then one behind ``epoch``, then the last whole number of
    the name; first of the files' names, then of their folders'. Decimals, such as a loss, are no
    steps.

    >>> read_steps(["run/model_490.h5", "run/model_500.h5"])
    (490.0, 500.0)
    >>> read_steps(["w.05-0.81.h5", "w.06-0.72.h5"]), read_steps(["best.h5", "last.h5"])
    ((5.0, 6.0), (1.0, 2.0))
    """
    split = [os.path.split(os.path.abspath(path)) for path in paths]
    files = [os.path.splitext(name)[0] for _, name in split]
    folders = [os.path.basename(folder) for folder, _ in split]
    for names in (files, folders):
        for pattern in (r"step[=_-]?(\d+)", r"epoch[=_-]?(\d+)", None):
            steps = [_step(name, pattern) for name in names]
            known = [step for step in steps if step is not None]
            rising = all(a < b for a, b in itertools.pairwise(known))
            if len(known) == len(paths) and rising:
                return tuple(known)
    return tuple(float(position) for position in range(1, len(paths) + 1))


def _step(name: str, pattern: str | None) -> float | None:
    if pattern is not None:
        match = re.search(pattern, name, re.IGNORECASE)
        return float(match[1]) if match else None
    numbers = [number for number in re.findall(r"\d+(?:\.\d+)?", name) if "." not in number]
    return float(numbers[-1]) if numbers else None
