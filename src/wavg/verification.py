"""Whether an averaged file is what its record says: computed again from the inputs it names."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wavg import stream
from wavg.checkpoint import Checkpoint, TensorSpec
from wavg.decisions import Decision
from wavg.digests import Digest, Digests
from wavg.errors import CheckpointFormatError, NonFiniteError, RecordError, WavgError
from wavg.formats import open_file
from wavg.formats.folders import checkpoint_in
from wavg.inputs import PathLike, expand
from wavg.opening import available_cores, opened, verify_unchanged
from wavg.options import IN_THE_NUMBERS, Options, parse_size
from wavg.plan import Weighting, make_plans
from wavg.record import KEY, Record, Source
from wavg.stored import open_checkpoint

__all__ = ["Verification", "verify"]

_BLOCK = 4096
_Open = Callable[[str], Checkpoint]


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of looking at an averaged file.

    Attributes
    ----------
    output
        Its path.
    record
        What it says of itself.
    inputs
        The checkpoints it was computed from again, oldest first.
    compared, numbers
        How many numbers were compared, of how many.
    faults
        What is not as the record says; empty if all is well.
    """

    output: str
    record: Record
    inputs: tuple[str, ...]
    compared: int
    numbers: int
    faults: tuple[str, ...]


def verify(
    output: PathLike,
    inputs: PathLike | Iterable[PathLike] | None = None,
    *,
    full: bool = False,
    blocks: int = 1000,
    seed: int | None = None,
    isolate: bool = False,
    opaque_dtype: str | None = None,
    max_memory: int | str = "64MiB",
    workers: int | None = None,
) -> Verification:
    """Compute an averaged safetensors file again from its inputs, and compare.

    The inputs' sizes, and their digests where the record has them, are compared too.

    Parameters
    ----------
    output
        A file or folder that `average_checkpoints` wrote, with a record.
    inputs
        Where its inputs are: paths, folders, globs, which may hold others besides. By default they
        are looked for beside the output, in the folder above and the current one, and in the
        folders directly in these; those of the recorded sizes are taken.
    full
        Compare every number, not a sample.
    blocks
        The size of the sample: so many blocks of 4,096 numbers, or less at a tensor's end.
    seed
        Of the sample; by default another one each time.
    isolate, opaque_dtype, max_memory, workers
        As for `average_checkpoints`.

    Returns
    -------
    Verification
        Its ``faults`` are empty if the file is what it claims to be.

    Raises
    ------
    RecordError
        The file has no record, or one that is damaged, newer, or of models that came from memory.
    FileNotFoundError
        An input is not where it was looked for.

    Notes
    -----
    The average is defined to the last bit, so that the comparison is one of bytes. What is compared
    is the inputs, the coefficients and the options; the schedule's name and the steps are what the
    record says, and change no number. It reads the
    sample from every input; with digests, every input whole. A full comparison finds any change of
    a number in the output or, with digests, of any bit in an input; a sample finds a damage of the
    share p of all blocks with probability ``1 - (1 - p)^blocks``.

    Examples
    --------
    >>> import numpy as np, tempfile, wavg
    >>> run = tempfile.mkdtemp()
    >>> for step in (9, 10):
    ...     wavg.save(f"{run}/model_{step}.safetensors", {"w": np.float32([step, 1])})
    >>> _ = wavg.average_checkpoints(run, f"{run}/average.safetensors", weights="linear")
    >>> wavg.verify(f"{run}/average.safetensors").faults
    ()
    """
    if blocks < 1:
        raise ValueError(f"blocks must be a positive number, not {blocks}")
    open_ = functools.partial(open_file, opaque_dtype=opaque_dtype, isolate=isolate)
    with open_checkpoint(output, opaque_dtype=opaque_dtype, isolate=isolate) as made:
        record = _record(made)
        if inputs is None:
            paths = _located(record, _candidates(os.path.abspath(made.path)), made.path, open_)
        else:
            paths = _located(record, [[_given(inputs)]], made.path, open_, whatever_size=True)
        workers = workers if workers is not None else available_cores()
        options = _options(
            record,
            made.path,
            digests=any(source.sha256 for source in record.sources),
            max_memory=parse_size(max_memory),
            workers=workers,
        )
        with opened(paths, opaque_dtype, isolate) as checkpoints:
            weights = np.array([source.coefficient for source in record.sources])
            (plan,) = make_plans(
                [checkpoint.index for checkpoint in checkpoints],
                [source.step for source in record.sources],
                [Weighting(record.weights, weights, None)],
                options,
                output_format=None,
            )
            decisions = [decision._replace(compare=False) for decision in plan.decisions]
            faults = [*_differences(decisions, made)]
            known = {name: made.spec(name) for name in made}
            decisions = [d for d in decisions if _alike(d.output, known.get(d.spec.name))]
            numbers = sum(decision.spec.size for decision in decisions)
            parts = [_Part(decision, decision.spec.name, 0) for decision in decisions]
            if not full:
                parts = _sample(decisions, made, blocks, random.Random(seed))
            sink = _Comparison(made, parts)
            looked_at = dataclasses.replace(plan, decisions=tuple(part.decision for part in parts))
            with Digests(checkpoints, plan.workers, sha256=options.digests) as digests:
                try:
                    stream.run([looked_at], checkpoints, [sink], digests=digests)
                except NonFiniteError as error:
                    faults.append(f"it cannot be computed again: {error}")
                changes = [*_changes(record, checkpoints, digests.finish())]
            verify_unchanged([*checkpoints, made])
    compared = sum(part.decision.spec.size for part in parts)
    faults = [*changes, *faults, *sink.faults()]
    return Verification(made.path, record, tuple(paths), compared, numbers, tuple(faults))


def _record(made: Checkpoint) -> Record:
    path = made.path
    if KEY not in made.metadata:
        raise RecordError(
            f"{path} has no record of how it came to be; average_checkpoints keeps one in "
            "safetensors, unless record='none'",
            path=path,
        )
    try:
        record = Record.parse(made.metadata[KEY])
    except RecordError as error:
        raise RecordError(
            f"{path}: its record of how it came to be cannot be read: {error}", path=path
        ) from None
    if not record.sources:
        raise RecordError(
            f"{path} was averaged from models in memory, and cannot be computed again", path=path
        )
    return record


def _options(record: Record, path: str, **limits: int) -> Options:
    told: dict[str, Any] = {}
    for name, value in record.options.items():
        if name not in IN_THE_NUMBERS:
            raise _puzzling(path, f"there is no option {name}")
        listed = name in ("include", "exclude")
        texts = value if listed and isinstance(value, list) else [value]
        if listed != isinstance(value, list) or not all(isinstance(t, (str, bool)) for t in texts):
            raise _puzzling(path, f"{name} is {value!r}")
        told[name] = tuple(value) if listed else value
    try:
        return Options(**{**told, **limits})
    except (TypeError, ValueError, WavgError) as error:
        raise _puzzling(path, str(error)) from None


def _puzzling(path: str, why: str) -> RecordError:
    return RecordError(f"{path}: its record cannot be understood: {why}", path=path)


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
        yield [
            [path] for path in sorted(entry.path for entry in os.scandir(base) if entry.is_dir())
        ]


def _located(
    record: Record,
    rings: Iterable[Sequence[Sequence[str]]],
    output: str,
    open_: _Open,
    *,
    whatever_size: bool = False,
) -> list[str]:
    """Return the inputs' paths: all in the nearest place that has them, in the sizes recorded.

    A place is a list of folders, and of files of which they are some.
    """
    sources = record.sources
    sizes = [source.size for source in sources]
    missing = [source.name for source in sources]
    for ring in rings:
        found = [[_within(source, place, output, open_) for source in sources] for place in ring]
        here = {tuple(map(os.path.realpath, paths)): paths for paths in found if all(paths)}
        fitting = [paths for paths in here.values() if [_size(p, open_) for p in paths] == sizes]
        if len(fitting) > 1:
            folders = ", ".join(os.path.dirname(paths[0]) for paths in fitting[:3])
            raise WavgError(
                f"inputs with the names and sizes that {output} records are in several folders "
                f"({folders}); say which",
                path=output,
            )
        if fitting:
            return fitting[0]
        if here and whatever_size:
            return next(iter(here.values()))
        lacking = [[s.name for s, path in zip(sources, p, strict=True) if not path] for p in found]
        missing = min([missing, *filter(None, lacking)], key=len)
    more = f" and {len(missing) - 1:,} more inputs are" if len(missing) > 1 else " is"
    raise FileNotFoundError(
        f"{missing[0]}, of which {output} was made,{more} not to be found, of the size "
        f"recorded; say where, as in `wavg verify {output} FOLDER`"
    )


def _within(source: Source, place: Sequence[str], output: str, open_: _Open) -> str:
    """Return where in a place an input is, or nothing; the output is not its own input."""
    name = source.name
    found = []
    for path in place:
        if os.path.isdir(path):
            inner = [os.path.join(path, name)] if _is_plain(name) else []
            inner += [p for p in [_checkpoint_of(path)] if p and _ends_with(p, name)]
            found += [p for p in inner if os.path.isfile(p)]
        elif _ends_with(path, name):
            found.append(path)
    found = [path for path in found if not os.path.samefile(path, output)]
    if len(found) > 1:
        found = [path for path in found if _size(path, open_) == source.size] or found
    return found[0] if found else ""


def _is_plain(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in name.split("/")


def _ends_with(path: str, name: str) -> bool:
    return f"/{os.path.abspath(path)}".replace(os.sep, "/").endswith(f"/{name}")


def _checkpoint_of(folder: str) -> str | None:
    try:
        return checkpoint_in(folder)
    except (CheckpointFormatError, PermissionError):
        return None  # whatever is in it, it is not one of the inputs


def _size(path: str, open_: _Open) -> int:
    try:
        with open_(path) as checkpoint:
            return sum(identity.size for identity in checkpoint.index.files)
    except (WavgError, PermissionError):
        return -1  # no checkpoint of this user's, so not one of the inputs


def _changes(
    record: Record, checkpoints: Sequence[Checkpoint], hashes: Sequence[Digest | None]
) -> Iterator[str]:
    """Tell the inputs that are not those which the record names."""
    for source, checkpoint, digest in zip(record.sources, checkpoints, hashes, strict=True):
        if source.sha256 and digest != source.sha256:
            yield f"{_which(digest, source, checkpoint)} does not have the SHA-256 recorded for it"
    for source, checkpoint in zip(record.sources, checkpoints, strict=True):
        size = sum(identity.size for identity in checkpoint.index.files)
        if size != source.size:
            yield f"{checkpoint.path} has {size:,} bytes, and {source.size:,} are recorded"


def _which(digest: Digest | None, source: Source, checkpoint: Checkpoint) -> str:
    if not isinstance(digest, dict) or not isinstance(source.sha256, Mapping):
        return checkpoint.path
    names = sorted({*digest, *source.sha256})
    wrong = [name for name in names if digest.get(name) != source.sha256.get(name)]
    return f"{checkpoint.path}: {', '.join(wrong)}"


def _alike(spec: TensorSpec, other: TensorSpec | None) -> bool:
    return other is not None and (spec.dtype, spec.shape) == (other.dtype, other.shape)


def _differences(decisions: Sequence[Decision], made: Checkpoint) -> Iterator[str]:
    """Tell the tensors that the file should not have, or has otherwise."""
    expected = {decision.spec.name: decision.output for decision in decisions}
    for name, spec in expected.items():
        if name not in made:
            yield f"{name}: it is not there"
        elif not _alike(spec, made.spec(name)):
            yield f"{name}: it is {made.spec(name).describe()}, not {spec.describe()}"
    yield from (f"{name}: it is in none of the inputs" for name in made if name not in expected)


class _Part(NamedTuple):
    """A decision on a block of a tensor, as if that were one of its own; or on all of it."""

    decision: Decision
    name: str
    start: int


def _sample(
    decisions: Sequence[Decision], made: Checkpoint, blocks: int, rng: random.Random
) -> list[_Part]:
    """Return random blocks of tensors, at most so many."""
    counts = [_blocks_of(decision) for decision in decisions]
    ends = list(itertools.accumulate(counts))
    total = ends[-1] if ends else 0
    sampled = []
    for number in sorted(rng.sample(range(total), min(blocks, total))):
        place = bisect.bisect_right(ends, number)
        first = (number - (ends[place] - counts[place])) * _BLOCK
        sampled.append(_part(decisions[place], first, counts[place], made))
    return sampled


def _blocks_of(decision: Decision) -> int:
    whole = any(spec.extent is None or spec.entry.bits % 8 for spec in decision.sources)
    return 1 if whole else -(-decision.spec.size // _BLOCK)


def _part(decision: Decision, start: int, count: int, made: Checkpoint) -> _Part:
    stop = min(start + _BLOCK, decision.spec.size)
    name = f"{decision.spec.name}[{start}:{stop}]"
    if count == 1 or name in made:
        return _Part(decision, decision.spec.name, 0)

    def cut(spec: TensorSpec) -> TensorSpec:
        extent, size = spec.extent, spec.entry.itemsize
        if extent is not None:
            offset = extent.offset + start * size
            extent = extent._replace(offset=offset, length=(stop - start) * size)
        return spec._replace(name=name, shape=(stop - start,), extent=extent)

    block = decision._replace(
        spec=cut(decision.spec),
        sources=tuple(map(cut, decision.sources)),
        output=decision.output._replace(name=name, shape=(stop - start,), extent=None),
    )
    return _Part(block, decision.spec.name, start)


class _Comparison:
    """A sink that compares results with what a file has in their places."""

    def __init__(self, made: Checkpoint, parts: Iterable[_Part]) -> None:
        self._made = made
        self._places = {
            part.decision.spec.name: (made.spec(part.name), part.start) for part in parts
        }
        self._wrong: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()  # threads write, also parts of one tensor

    def wants(self, name: str) -> bool:
        """Do as `wavg.checkpoint.Sink.wants` says."""
        return name in self._places

    def joined(self, names: Sequence[str]) -> bool:
        """Do as `wavg.checkpoint.Sink.joined` says."""
        return len(names) == 1

    def write(self, name: str, start: int, values: npt.NDArray[Any]) -> None:
        """Compare in place of writing."""
        spec, first = self._places[name]
        there = np.empty_like(values)
        self._made.read(spec, first + start, there)
        if values.tobytes() == there.tobytes():
            return
        size = values.itemsize
        rows = [array.view(np.uint8).reshape(-1, size) for array in (values, there)]
        wrong = np.flatnonzero((rows[0] != rows[1]).any(axis=1))
        place = first + start + int(wrong[0])
        with self._lock:
            count, before = self._wrong.get(spec.name, (0, place))
            self._wrong[spec.name] = count + len(wrong), min(before, place)

    def faults(self) -> Iterator[str]:
        """Tell what differs, tensor by tensor."""
        for name, (count, first) in sorted(self._wrong.items()):
            yield (
                f"{name}: {count:,} of the numbers compared differ{'s' * (count == 1)} from the "
                f"average, the first at position {first:,}"
            )
