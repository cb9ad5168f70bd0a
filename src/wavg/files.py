"""Averaging checkpoint files: open, plan, stream, commit.

The composition root: here, and only here, formats, plan, stream and publishing meet.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy.typing as npt

from wavg import outputs, stream
from wavg.carried import carried_files
from wavg.checkpoint import Checkpoint
from wavg.digests import Digest, Digests
from wavg.errors import WavgError
from wavg.formats import adapters, format_of_output, is_folder_output, open_file
from wavg.grid import Grid, Selection, select
from wavg.inputs import PathLike
from wavg.opening import available_cores, opened, uncollected, verify_unchanged
from wavg.options import Options, parse_size
from wavg.plan import Plan, Weighting, make_plans
from wavg.printable import printable
from wavg.record import Record, Source, names_within
from wavg.sha256sums import Sums, SumsLike
from wavg.shortage import shortages
from wavg.sinks import FileSink, MemorySink
from wavg.weights import WeightsLike

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from typing_extensions import Unpack

    from wavg.signatures import ManyAverages, ManyPlans, OneAverage, OnePlan

__all__ = ["Report", "average_checkpoints", "plan_average"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """What an average from files to a file did.

    Attributes
    ----------
    output
        The path written.
    plan
        The decision that was carried out: inputs, weights, tensors, bytes.
    differing
        Names of carried-over tensors (integers) whose values differ between the inputs: the output
        has the newest's.
    """

    output: str
    plan: Plan
    differing: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<Report: {printable(self.output)}, {self.plan!r}>"


@overload
def average_checkpoints(
    inputs: PathLike | Iterable[PathLike],
    output: None = None,
    **options: Unpack[OneAverage],
) -> dict[str, Array]: ...
@overload
def average_checkpoints(
    inputs: PathLike | Iterable[PathLike],
    output: PathLike,
    **options: Unpack[OneAverage],
) -> Report: ...
@overload
def average_checkpoints(
    inputs: PathLike | Iterable[PathLike],
    output: None = None,
    **options: Unpack[ManyAverages],
) -> list[dict[str, Array]]: ...
@overload
def average_checkpoints(
    inputs: PathLike | Iterable[PathLike],
    output: PathLike,
    **options: Unpack[ManyAverages],
) -> list[Report]: ...
@shortages()
def average_checkpoints(
    inputs: PathLike | Iterable[PathLike],
    output: PathLike | None = None,
    *,
    weights: WeightsLike | Sequence[WeightsLike] = "equal",
    last: int | Sequence[int] | None = None,
    steps: Sequence[float] | None = None,
    sort: bool | None = None,
    dtype: str | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    align: str = "name",
    optimizer: str = "carry",
    integers: str = "reference",
    allow_nonfinite: bool = False,
    opaque_dtype: str | None = None,
    isolate: bool = False,
    overwrite: bool = False,
    record: str = "inputs",
    check_sha256: SumsLike | None = None,
    max_shard_size: int | str | None = None,
    max_memory: int | str = "64MiB",
    workers: int | None = None,
    executor: Executor | None = None,
    progress: bool = False,
) -> dict[str, Array] | Report | list[dict[str, Array]] | list[Report]:
    """Average the checkpoints of a training run, from files to arrays or to files.

    Parameters
    ----------
    inputs
        A glob, a folder, a path, or a list of them, oldest first. A glob or a folder is put in
        training order by its names (``model_9`` before ``model_10``); a list is taken as given. A
        folder of Hugging Face's layout, with ``model.safetensors`` or its shards, is one
        checkpoint; another folder is those in it.
    output
        The file to write. None returns the arrays. A file of the inputs' format is the newest
        input with its numbers replaced: configuration, attributes, optimizer state and all else
        stay, byte for byte. Any other format is a new file that holds the tensors. If the newest
        is a folder of safetensors, a name of no format's ending, or with a slash behind it, is a
        folder with configuration and tokenizer copied from the newest. In the name
        ``{weights}`` and ``{last}`` stand for what an average was made with.
    weights
        ``"equal"``, ``"linear"``, ``"ema:half_life=1000"`` (docs/weights.md has all), a schedule
        such as ``wavg.exponential(alpha=3)``, one number a checkpoint, oldest first, or a file that
        lists them, ``"weights.json"``. A list of these makes an average with each. A checkpoint
        that none gives a weight is not opened, unless it is the newest.
    last
        Only the newest so many. A list makes an average of each: with every one of the weights, in
        one pass over the inputs.
    steps
        Where in training each checkpoint was saved; by default read from the file names, or else
        from metadata, or else counted from 1.
    sort
        True puts a list, too, in the order of its names. With None a list whose names suggest
        another order gets a warning, with False none.
    dtype
        Write averaged tensors in this floating-point format rather than their own.
    include, exclude
        Globs over tensor names: average only these; take these from the newest.
    align
        Tensors belong together that have the same ``"name"``, or, for runs whose automatic names
        differ (``dense``, ``dense_3``), the same ``"position"``; shapes and dtypes must agree.
    optimizer
        ``"carry"`` the newest's optimizer state over, or ``"drop"`` it.
    integers
        Integer and boolean tensors are not averaged: ``"reference"`` takes the newest's and reports
        those that differ, ``"error"`` refuses them.
    allow_nonfinite
        Let NaN and infinities through in place of an error.
    opaque_dtype
        ``"bfloat16"`` declares unnamed two-byte values, as a Keras ``.h5`` has them, to be so.
    isolate
        Look into HDF5 files in a process of their own, as for `open_checkpoint`.
    overwrite
        Replace an existing output. It may be one of the inputs.
    record
        What safetensors outputs keep of how they came to be, in the key ``wavg`` of their
        metadata, see `wavg.Record`: the ``"inputs"``, their sizes, steps and coefficients;
        ``"sha256"`` their digests too, made as they are read; ``"none"``.
    check_sha256
        The SHA-256 that the inputs' files are to have: a list of them as ``sha256sum`` prints it,
        with names from the folder that the list is in, or else from the current one; or a mapping
        from paths. A file that has another, or is not listed, ends the run; so does one that would
        be copied into an output's folder.
    max_shard_size
        Divide a folder of safetensors into files of at most so many bytes of tensors, a number or
        text (``"5GB"``), as huggingface_hub does; by default it is divided as the newest's is.
    max_memory
        The most memory to use beyond the interpreter with wavg imported, in bytes or as text.
        Arrays returned come on top.
    workers
        Threads; by default as many as there are cores for this process.
    executor
        Runs the workers in place of threads of its own: any `concurrent.futures.Executor`. Each
        process of a pool has the memory of a worker besides what it makes of some 32 MiB, and
        that comes back to this one: `max_memory` does not bound it.
    progress
        Show a progress bar on standard error if that is a terminal.

    Returns
    -------
    dict or Report
        Without an output, an ordered dict from tensor names to arrays, in the order of the newest
        file. For Keras that is the order of ``get_weights()``, as far as a file tells it (see
        docs/keras.md), so that ``model.set_weights(list(result.values()))`` takes it. With an
        output, what was done. With a list of weights or of lasts, a list of these, the lasts of
        the first weights first.

    Raises
    ------
    WavgError
        See `wavg.errors`: damaged input, mismatched structures, NaN, an output that exists …
    FileNotFoundError, PermissionError
        An input that is missing, or may not be read.
    ValueError, TypeError
        An argument that makes no sense, whatever the files.

    Notes
    -----
    Every element is ``Σ c_i x_i / Σ c_i`` computed exactly and rounded once, to nearest even. Each
    input is read once from the disk, the output written once, in blocks; checksums and digests are
    made of the blocks just before these are averaged. Memory does not depend on the size of the
    tensors. The output appears under its name only when it is complete and on disk.

    Examples
    --------
    >>> import numpy as np, os, tempfile, wavg
    >>> folder = tempfile.mkdtemp()
    >>> for step in (9, 10):
    ...     wavg.save(f"{folder}/model_{step}.safetensors", {"w": np.float32([step, 1])})
    >>> wavg.average_checkpoints(f"{folder}/model_*.safetensors")
    {'w': array([9.5, 1. ], dtype=float32)}
    >>> report = wavg.average_checkpoints(
    ...     f"{folder}/model_*.safetensors", f"{folder}/average.safetensors", weights="linear")
    >>> [f"{part.step:g}: {part.proportion:.3f}" for part in report.plan.inputs]
    ['9: 0.333', '10: 0.667']
    >>> reports = wavg.average_checkpoints(
    ...     f"{folder}/model_*.safetensors", f"{folder}/{{weights}}-{{last}}.safetensors",
    ...     weights=["equal", "linear"], last=[1, 2])
    >>> [os.path.basename(report.output) for report in reports]
    ['equal-1.safetensors', 'equal-2.safetensors', 'linear-1.safetensors', 'linear-2.safetensors']
    """
    options = Options(
        dtype=dtype,
        include=_patterns(include),
        exclude=_patterns(exclude),
        align=align,
        optimizer=optimizer,
        integers=integers,
        allow_nonfinite=allow_nonfinite,
        record=record,
        digests=_makes_digests(record, check_sha256, output),
        max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
        max_memory=parse_size(max_memory),
        workers=workers if workers is not None else available_cores(),
    )
    grid = Grid.of(weights, last)
    selection = select(inputs, steps, grid, sort, output, _opening(opaque_dtype, isolate))
    paths = selection.paths
    targets = grid.outputs(output, selection)
    for target in targets:
        outputs.refuse(target, paths[-1], overwrite=overwrite)
    with opened(paths, opaque_dtype, isolate, len(targets)) as checkpoints:
        plans = _plans(checkpoints, selection, grid, targets, options)
        outputs.refuse_full(plans)
        expected = None if check_sha256 is None else Sums(check_sha256)
        with (
            Digests(
                checkpoints, plans[0].workers, sha256=options.digests, expected=expected
            ) as digests,
            _progress_bar(plans[0], progress) as tick,
        ):
            carry_out = functools.partial(
                stream.run, plans, checkpoints, digests=digests, executor=executor, progress=tick
            )
            if not targets:
                memory = [MemorySink(plan) for plan in plans]
                carry_out(memory)
                digests.finish()
                verify_unchanged(checkpoints)
                results = [sink.arrays() for sink in memory]
                return results if grid.many else results[0]
            differing = _write(plans, checkpoints, targets, digests, overwrite, expected, carry_out)
    reports = [Report(*parts) for parts in zip(targets, plans, differing, strict=True)]
    return reports if grid.many else reports[0]


def _records(
    plans: Sequence[Plan],
    checkpoints: Sequence[Checkpoint],
    hashes: Sequence[Digest | None],
) -> list[str | None]:
    """Return what each average's file is to say of how it came to be."""
    options = plans[0].options
    if options.record == "none":
        return [None] * len(plans)
    if options.record != "sha256":
        hashes = [None] * len(checkpoints)
    sizes = [sum(identity.size for identity in c.index.files) for c in checkpoints]
    names = names_within([checkpoint.path for checkpoint in checkpoints])
    records: list[str | None] = []
    for plan in plans:
        newest = slice(-len(plan.inputs), None)
        columns = names[newest], sizes[newest], plan.inputs, plan.coefficients.tolist()
        sources = tuple(
            Source(name, size, part.step, coefficient, digest)
            for name, size, part, coefficient, digest in zip(*columns, hashes[newest], strict=True)
        )
        step = max(source.step for source in sources if source.coefficient)
        records.append(Record(plan.schedule, step, sources, len(sources), options.told()).text())
    return records


def _write(
    plans: Sequence[Plan],
    checkpoints: Sequence[Checkpoint],
    targets: Sequence[str],
    digests: Digests,
    overwrite: bool,
    expected: Sums | None,
    carry_out: Callable[[Sequence[FileSink]], list[tuple[str, ...]]],
) -> list[tuple[str, ...]]:
    """Carry plans out into files; they appear, one after the other, when all are on the disk."""
    begun = _records(plans, checkpoints, digests.values())
    with contextlib.ExitStack() as stack:
        made = [
            stack.enter_context(
                outputs.planned(
                    plan,
                    checkpoints[-1],
                    target,
                    record,
                    overwrite=overwrite,
                    expected_of=expected,
                )
            )
            for plan, target, record in zip(plans, targets, begun, strict=True)
        ]
        differing = carry_out([output.sink for output in made])
        ended = _records(plans, checkpoints, digests.finish())
        for output, before, record in zip(made, begun, ended, strict=True):
            if record is not None and record != before:
                output.note(record)
            output.finish()
        verify_unchanged(checkpoints)
        for output in made:
            output.sync(overwrite=overwrite)
        for checkpoint in checkpoints:
            checkpoint.close()  # Windows replaces no open file, and the output may be an input
        for output in made:
            output.commit()
    return differing


@overload
def plan_average(
    inputs: PathLike | Iterable[PathLike],
    output: PathLike | None = None,
    **options: Unpack[OnePlan],
) -> Plan: ...
@overload
def plan_average(
    inputs: PathLike | Iterable[PathLike],
    output: PathLike | None = None,
    **options: Unpack[ManyPlans],
) -> list[Plan]: ...
@shortages()
def plan_average(
    inputs: PathLike | Iterable[PathLike],
    output: PathLike | None = None,
    *,
    weights: WeightsLike | Sequence[WeightsLike] = "equal",
    last: int | Sequence[int] | None = None,
    steps: Sequence[float] | None = None,
    sort: bool | None = None,
    dtype: str | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    align: str = "name",
    optimizer: str = "carry",
    integers: str = "reference",
    allow_nonfinite: bool = False,
    opaque_dtype: str | None = None,
    isolate: bool = False,
    record: str = "inputs",
    check_sha256: SumsLike | None = None,
    max_shard_size: int | str | None = None,
    max_memory: int | str = "64MiB",
    workers: int | None = None,
) -> Plan | list[Plan]:
    """Return what `average_checkpoints` would do, without reading a tensor or writing a byte.

    What that refuses before it begins is refused, too: a folder that may not be written to, a disk
    without room. An output that exists is not. Parameters are those of `average_checkpoints`; a
    list where that returns a list.

    Examples
    --------
    >>> import numpy as np, tempfile, wavg
    >>> folder = tempfile.mkdtemp()
    >>> for step in (9, 10):
    ...     wavg.save(f"{folder}/model_{step}.safetensors", {"w": np.float32([step, 1])})
    >>> plan = wavg.plan_average(folder, "average.safetensors", weights="linear")
    >>> plan.bytes_read, round(plan.figures.effective_number, 2)
    (16, 1.8)
    """
    options = Options(
        dtype=dtype,
        include=_patterns(include),
        exclude=_patterns(exclude),
        align=align,
        optimizer=optimizer,
        integers=integers,
        allow_nonfinite=allow_nonfinite,
        record=record,
        digests=_makes_digests(record, check_sha256, output),
        max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
        max_memory=parse_size(max_memory),
        workers=workers if workers is not None else available_cores(),
    )
    grid = Grid.of(weights, last)
    selection = select(inputs, steps, grid, sort, output, _opening(opaque_dtype, isolate))
    paths = selection.paths
    targets = grid.outputs(output, selection)
    for target in targets:
        outputs.refuse(target, paths[-1], overwrite=True)  # a folder that is missing is told now
    with opened(paths, opaque_dtype, isolate) as checkpoints:
        plans = _plans(checkpoints, selection, grid, targets, options)
        outputs.refuse_full(plans)
        if check_sha256 is not None:
            expected, newest = Sums(check_sha256), paths[-1]
            files = [identity.path for c in checkpoints for identity in c.index.files]
            if any(is_folder_output(target, newest) for target in targets):
                files += [carried.path for carried in carried_files(plans[0], newest)]
            for file in files:
                expected(file)  # listed, at least
    return plans if grid.many else plans[0]


def _makes_digests(record: str, check: SumsLike | None, output: PathLike | None) -> bool:
    return check is not None or (record == "sha256" and output is not None)


def _patterns(globs: str | Sequence[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _opening(opaque_dtype: str | None, isolate: bool) -> Callable[[str], Checkpoint]:
    return functools.partial(open_file, opaque_dtype=opaque_dtype, isolate=isolate)


def _plans(
    checkpoints: Sequence[Checkpoint],
    selection: Selection,
    grid: Grid,
    targets: Sequence[str],
    options: Options,
) -> list[Plan]:
    cells = grid.cells(selection.count)
    places: Sequence[str | None] = targets or [None] * len(cells)
    weightings = [
        Weighting(str(rule), row, target)
        for (rule, _), row, target in zip(cells, selection.rows, places, strict=True)
    ]
    reference = checkpoints[-1].index
    adapters.refuse_unlike([checkpoint.path for checkpoint in checkpoints])
    created = format_of_output(targets[0], reference) if targets else None
    if options.record == "sha256" and created is not None and not created.recorded:
        raise WavgError(
            f"{targets[0]} keeps no record, so no digests either: only safetensors do; "
            "leave record='sha256' (--sha256) out, or write safetensors",
            path=targets[0],
        )
    with uncollected():
        plans = make_plans(
            [checkpoint.index for checkpoint in checkpoints],
            selection.steps,
            weightings,
            options,
            output_format=created.name if created else None,
        )
    if options.max_shard_size is not None:
        for plan, target in zip(plans, targets, strict=False):  # no targets: arrays
            outputs.divided(plan, reference, target)
    return plans


@contextlib.contextmanager
def _progress_bar(plan: Plan, wanted: bool) -> Iterator[Callable[[int], object] | None]:
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=plan.bytes_read, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update
