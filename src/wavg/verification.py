"""Whether an averaged file is what its record says: computed again from the inputs it names."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wavg import claims, likeness, stream
from wavg.checkpoint import Checkpoint
from wavg.comparison import Comparison, Part, sample
from wavg.digests import Digest, Digests
from wavg.errors import NonFiniteError, RecordError, WavgError
from wavg.findings import Findings, joined
from wavg.formats import open_file
from wavg.inputs import PathLike
from wavg.likeness import are_alike
from wavg.located import located
from wavg.opening import available_cores, opened, verify_unchanged
from wavg.options import IN_THE_NUMBERS, Options, parse_size
from wavg.plan import Plan, Weighting, make_plans
from wavg.record import KEY, Record
from wavg.stored import open_checkpoint

__all__ = ["Verification", "verify"]


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
    checked, unchecked
        What was compared, and what was not.
    notes
        What is no fault and may be unexpected: inputs that have other names or steps now.
    """

    output: str
    record: Record
    inputs: tuple[str, ...]
    compared: int
    numbers: int
    faults: tuple[str, ...]
    checked: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether the file is what it claims to be, as far as that was compared."""
        return not self.faults


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

    Compared are its numbers, its tensors and metadata, the inputs' sizes and digests, and whether
    the record agrees with itself and with the inputs' steps; of a folder also the files beside.

    Parameters
    ----------
    output
        A file or folder that `average_checkpoints` wrote, with a record. Of a folder, what was
        copied into it from the newest input is compared, too; of a file in it, the file.
    inputs
        Where its inputs are: paths, folders, globs, which may hold others besides. If they have
        other names now, just as many. By default they are looked for beside the output, in the
        folder above and the current one, and in the folders directly in these; those of the
        recorded sizes are taken.
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
        It is true if the file is what it claims to be; else ``faults`` says what is not.

    Raises
    ------
    RecordError
        The file has no record, or one that is damaged, newer, or of models that came from memory.
    FileNotFoundError
        An input is not where it was looked for.

    Notes
    -----
    The average is defined to the last bit, so that the comparison is one of bytes. An output is its
    newest input with the numbers replaced, and so the metadata, what an index of shards says and
    the files copied into a folder are compared with that input's. How numbers are laid out, and
    into how many files, is not: that changes no model.

    It reads the sample from every input; with digests, every input whole. A full comparison finds
    any change of a number in the output or, with digests, of any bit in an input; a sample finds a
    damage of the share p of all blocks with probability ``1 - (1 - p)^blocks``.

    Examples
    --------
    >>> import numpy as np, tempfile, wavg
    >>> run = tempfile.mkdtemp()
    >>> for step in (9, 10):
    ...     wavg.save(f"{run}/model_{step}.safetensors", {"w": np.float32([step, 1])})
    >>> _ = wavg.average_checkpoints(run, f"{run}/average.safetensors", weights="linear")
    >>> result = wavg.verify(f"{run}/average.safetensors", full=True)
    >>> bool(result), result.faults
    (True, ())
    >>> result.checked[0]
    '2 of 2 numbers, computed again from 2 inputs in ...'
    """
    if blocks < 1:
        raise ValueError(f"blocks must be a positive number, not {blocks}")
    open_ = functools.partial(open_file, opaque_dtype=opaque_dtype, isolate=isolate)
    with open_checkpoint(output, opaque_dtype=opaque_dtype, isolate=isolate) as made:
        record = _record(made)
        paths, notes = located(record, made.path, inputs, open_)
        workers = workers if workers is not None else available_cores()
        options = _options(
            record,
            made.path,
            digests=any(source.sha256 for source in record.sources),
            max_memory=parse_size(max_memory),
            workers=workers,
        )
        with opened(paths, opaque_dtype, isolate) as checkpoints:
            reference = checkpoints[-1]
            weights = np.array([source.coefficient for source in record.sources])
            (plan,) = make_plans(
                [checkpoint.index for checkpoint in checkpoints],
                [source.step for source in record.sources],
                [Weighting(record.weights, weights, None)],
                options,
                output_format=None,
            )
            decisions = [decision._replace(compare=False) for decision in plan.decisions]
            tensors = likeness.tensors(decisions, made)
            known = {name: made.spec(name) for name in made}
            decisions = [d for d in decisions if are_alike(d.output, known.get(d.spec.name))]
            parts = [Part(decision, decision.spec.name, 0) for decision in decisions]
            if not full:
                parts = sample(decisions, made, blocks, random.Random(seed))
            numbers = sum(decision.spec.size for decision in decisions)
            compared, wrong, hashes = _computed(plan, parts, checkpoints, made)
            folder = os.fspath(output) if os.path.isdir(output) else None
            findings = joined(
                [
                    _share(compared, numbers, paths),
                    claims.inputs(record, checkpoints, hashes),
                    tensors,
                    Findings(faults=wrong),
                    likeness.metadata(reference.index, made.index),
                    likeness.shards(plan, reference, made) if not tensors.faults else Findings(),
                    likeness.files(plan, reference.path, made.path, folder),
                    claims.totals(record),
                    claims.schedule(record, paths, open_),
                    Findings(notes=notes),
                    claims.steps(record, paths, open_),
                ]
            )
            verify_unchanged([*checkpoints, made])
    return Verification(
        output=made.path,
        record=record,
        inputs=tuple(paths),
        compared=compared,
        numbers=numbers,
        **dataclasses.asdict(findings),
    )


def _computed(
    plan: Plan, parts: Sequence[Part], checkpoints: Sequence[Checkpoint], made: Checkpoint
) -> tuple[int, tuple[str, ...], list[Digest | None]]:
    """Compute parts of a plan again; return how many numbers, what is wrong, and the digests."""
    sink = Comparison(made, parts)
    looked_at = dataclasses.replace(plan, decisions=tuple(part.decision for part in parts))
    compared, wrong = sum(part.decision.spec.size for part in parts), list[str]()
    with Digests(checkpoints, plan.workers, sha256=plan.options.digests) as digests:
        try:
            stream.run([looked_at], checkpoints, [sink], digests=digests)
        except NonFiniteError as error:
            compared, wrong = 0, [f"it cannot be computed again: {error}"]
        hashes = digests.finish()
    return compared, (*wrong, *sink.faults()), hashes


def _share(compared: int, numbers: int, paths: Sequence[str]) -> Findings:
    """Say how many numbers were compared, and which not."""
    source = f"{len(paths):,} inputs" if len(paths) > 1 else "1 input"
    with contextlib.suppress(ValueError):  # on several of Windows' drives
        source += f" in {os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in paths])}"
    left = f"{numbers - compared:,} numbers"
    why = "outside the sample: full=True (--full)" if compared else "that cannot be computed"
    return Findings(
        checked=(f"{compared:,} of {numbers:,} numbers, computed again from {source}",),
        unchecked=(f"{left} {why}",) if compared < numbers else (),
    )


def _record(made: Checkpoint) -> Record:
    path = made.path
    if KEY not in made.metadata:
        raise RecordError(
            f"{path} has no record of how it came to be; wavg keeps one in "
            "safetensors that it averages, unless record='none' (--record none)",
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
