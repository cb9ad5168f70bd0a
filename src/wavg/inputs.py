"""From what a person names to an ordered list of paths.

It looks at names only, and at what folders hold; whether a file is a checkpoint is for the formats
to say.
"""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections.abc import Iterable
from typing import TypeAlias

from wavg.checkpoint import identify
from wavg.errors import WavgError, WeightError
from wavg.formats import ending_of, format_of_output, is_checkpoint_name
from wavg.formats.folders import INDEX, checkpoint_in, is_shard, is_unfinished, names_in, why_none
from wavg.names import in_order, is_numbered, natural_key, numbers_say_otherwise
from wavg.places import is_folder, look
from wavg.printable import printable

__all__ = ["PathLike", "expand"]

PathLike: TypeAlias = "str | os.PathLike[str]"


def expand(
    inputs: PathLike | Iterable[PathLike],
    *,
    sort: bool | None = None,
    output: str | None = None,
) -> list[str]:
    """Return the paths of the checkpoints, oldest first.

    A glob or a folder is put in training order, see `in_order`. A list stays as given unless
    `sort`; with ``sort=None`` there is a warning where the last numbers of names say otherwise. Of
    a glob or a folder, the `output` is left out where the other names have a number and it has
    none: that is what an earlier run wrote. Else an output among them is refused.

    Raises
    ------
    FileNotFoundError
        A path that does not exist, a glob or a folder without a checkpoint, a link in it that has a
        checkpoint's name and leads to nothing.
    PermissionError
        What may not be looked into: nothing that may be a checkpoint is passed over for that.
    WavgError
        The same file twice; a folder that holds checkpoints of several kinds, or others besides
        those of a numbered series.
    """
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    paths = [path for name in given for path in _expand_one(os.fspath(name), output)]
    if not paths:
        raise WeightError("there is nothing to average: no checkpoint was given")
    if sort:
        paths = in_order(paths)
    elif sort is None and numbers_say_otherwise(paths):
        ends = f"from {printable(paths[0])} to {printable(paths[-1])}"
        warnings.warn(
            "the checkpoints' names suggest another order than that of the list, which is taken as "
            "oldest first; pass sort=True to go by the names, sort=False for the list as it is"
            if len(given) > 1
            else f"the last numbers of the names suggest another order than {ends}, which is taken "
            "as oldest first; pass sort=True if it is right, or else a list in the order of "
            "training and sort=False",
            stacklevel=4,
        )
    seen: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise WavgError(f"{path} is given twice (as {seen[real]})", path=path)
        seen[real] = path
    return paths


def _expand_one(name: str, output: str | None) -> list[str]:
    if is_folder(name):
        return in_order(_of_folder(name, output))
    if not os.path.lexists(name) and glob.has_magic(name):
        _refuse_unseen(name)
        files = glob.glob(name, recursive=True)
        if not files:
            hint = "; write [[] for a bracket that is meant" if "[" in name else ""
            raise FileNotFoundError(f"no file matches {printable(name)}{hint}")
        if any(map(os.path.isdir, files)):
            files = _without_output(_without_aliases(files), output)
            return [p for file in sorted(files, key=natural_key) for p in _expand_one(file, output)]
        return in_order(_without_output(_without_shards(_without_aliases(files)), output))
    if look(name) is None:
        raise _missing(name)
    return [name]


def _missing(path: str) -> FileNotFoundError:
    if not os.path.islink(path):
        return FileNotFoundError(
            f"there is no file or folder {printable(path) or 'without a name'}"
        )
    return FileNotFoundError(
        printable(
            f"{path} is a link to {os.readlink(path)}, where nothing is; bring that back, remove "
            "the link, or name the checkpoints to average"
        )
    )


def _refuse_unseen(pattern: str) -> None:
    """Raise `PermissionError` if a glob passes over a folder because it may not be looked into."""
    above, name = os.path.split(pattern)
    folders = [above]
    if glob.has_magic(above):
        _refuse_unseen(above)
        folders = glob.glob(above, recursive=True)
    for folder in folders:
        if not glob.has_magic(name):
            look(os.path.join(folder, name))
        elif is_folder(folder or os.curdir):
            names_in(folder or os.curdir)


def _of_folder(folder: str, output: str | None) -> list[str]:
    """Return a folder that is one checkpoint, or the files or folders in it that are."""
    entries = (entry for entry in names_in(folder) if not entry.startswith("."))
    paths = [os.path.join(folder, entry) for entry in entries]
    whole, files, inner = checkpoint_in(folder), list[str](), list[str]()
    if not whole:
        files = [path for path in paths if is_checkpoint_name(path) and not is_folder(path)]
        for path in files:
            _refuse_other(path)
        files = _without_shards(_without_aliases(files))
    if not files:
        files = [whole] if whole else []
        paths = [path for path in paths if not is_unfinished(os.path.basename(path))]
        if whole:  # folders of other parts (a vision tower, a pooling layer) are none of a series
            paths = [path for path in paths if _stem(path)]
        folders = [path for path in paths if os.path.isdir(path)]
        inner = [path for path in folders if checkpoint_in(path)]
        _refuse_gaps({*paths} - {*folders} if whole else paths, inner)
        if whole and not inner:
            return files
        inner = _without_aliases(inner)
    found = _without_output(files + inner, output)
    if not found:
        raise _no_checkpoint(folder)
    if whole in found and len(found) > 1:
        raise WavgError(
            f"the folder {folder} is a checkpoint, {os.path.basename(whole or '')}, and holds "
            f"others, such as {found[-1]}; name those to average with a glob",
            path=folder,
        )
    if not inner and len({format_of_output(path) for path in found}) > 1:
        endings = sorted({ending_of(path) for path in found})
        raise WavgError(
            f"the folder {folder} holds several kinds of files ({', '.join(endings)}); "
            f"name one with a glob, such as {os.path.join(folder, '*' + endings[0])}",
            path=folder,
        )
    plain = sorted(os.path.basename(path) for path in found if not is_numbered(path))
    if plain and len(found) - len(plain) > 1:
        raise WavgError(
            f"the folder {folder} holds {', '.join(plain[:3])} besides a numbered series of "
            "checkpoints; name those to average with a glob",
            path=folder,
        )
    return [(checkpoint_in(path) or path) if path in inner else path for path in found]


def _refuse_gaps(paths: Iterable[str], checkpoints: Iterable[str]) -> None:
    """Raise an error if a folder of a series is no checkpoint: none is passed over in silence.

    A link to a folder that is not there, or may not be seen, is such a gap.
    """
    series = {"checkpoint-", *map(_stem, checkpoints)} - {""}
    for path in sorted({*paths} - {*checkpoints}, key=natural_key):
        if _stem(path) in series:
            if is_folder(path):
                raise _no_checkpoint(path)
            _refuse_other(path)


def _refuse_other(path: str) -> None:
    """Raise an error unless what is in a folder under a checkpoint's name is a file."""
    if look(path) is None:
        raise _missing(path)
    identify(path)


def _stem(path: str) -> str:
    """Return what stands before the number at the end of a name; nothing if there is none."""
    match = re.fullmatch(r"(.*[-_=])[0-9]+", os.path.basename(path), re.DOTALL)
    return match[1] if match else ""


def _no_checkpoint(folder: str) -> FileNotFoundError:
    why = why_none(folder)
    why = f": {why}" if why else ""
    return FileNotFoundError(printable(f"there is no checkpoint in the folder {folder}{why}"))


def _without_output(paths: list[str], output: str | None) -> list[str]:
    if output is None:
        return paths
    # An output's name may have fields: whatever they stand for, it is an output of such a run.
    fixed = re.split(r"\{(?:weights|last)\}", os.path.realpath(output))
    pattern = re.compile("[^/]*".join(map(re.escape, fixed)))
    others = [path for path in paths if not pattern.fullmatch(os.path.realpath(path))]
    if len(others) == len(paths):
        return paths
    if others and all(map(is_numbered, others)) and not is_numbered(output):
        return others
    raise WavgError(
        f"the output {output} is among the files that the input's pattern or folder stands for; "
        "name the inputs one by one if it is one of them, or choose another output",
        path=output,
    )


def _without_shards(paths: list[str]) -> list[str]:
    """Leave out shards that are there because another of the paths names them."""
    keras = {path[: -len(".weights.json")] for path in paths if path.endswith(".weights.json")}
    named = {os.path.dirname(path) for path in paths if path.endswith(INDEX)}
    shards = {path: re.fullmatch(r"(.*)_[0-9]{5}\.weights\.h5", path) for path in paths}
    return [
        path
        for path, match in shards.items()
        if (match is None or match[1] not in keras)
        and not (is_shard(path) and os.path.dirname(path) in named)
    ]


def _without_aliases(paths: list[str]) -> list[str]:
    """Leave out links to files that are there by their own name, such as ``latest``."""
    own = {os.path.realpath(path) for path in paths if not os.path.islink(path)}
    return [p for p in paths if not (os.path.islink(p) and os.path.realpath(p) in own)]
