"""Outputs in the making: the files of an average, from their templates to their appearance."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from wavg import destinations
from wavg.carried import carried_files
from wavg.checkpoint import Checkpoint, Index, TensorSpec
from wavg.destinations import refuse_existing
from wavg.errors import CheckpointFormatError, OutputError, OutputExistsError
from wavg.formats import (
    Format,
    format_of_output,
    is_folder_output,
    load_module,
    parts_of,
    refuse_new,
)
from wavg.formats.folders import unlike_an_output
from wavg.opening import uncollected
from wavg.plan import Plan
from wavg.publish import Atomic, AtomicFile, NewFile, failures
from wavg.publish_folder import AtomicFolder, refuse_folders_within
from wavg.record import KEY
from wavg.renames import sync_folder
from wavg.sinks import FileSink
from wavg.templates import Part, Template, can_patch_in_place, in_place
from wavg.temporaries import reclaim_unnamed

__all__ = ["Output", "divided", "new", "planned", "refuse", "refuse_full"]


class Output(NamedTuple):
    """The files of one average in the making; the first names the others, and appears last.

    What is published is these files, or the one folder that they are in.
    """

    files: Sequence[NewFile]
    templates: list[Template]
    sink: FileSink
    published: Sequence[Atomic]
    noted: Callable[[str], list[Template]] | None = None
    proved: Callable[[], None] | None = None

    def note(self, record: str) -> None:
        """Write another record, of the same length, in the place of the one the output has."""
        assert self.noted is not None  # only what keeps one is given another
        for template, file in zip(self.noted(record), self.files, strict=True):
            for offset, data in template.pieces:
                file.write(data, offset)

    def finish(self) -> None:
        """Do what is left when all numbers are written."""
        for template, file in zip(self.templates, self.files, strict=True):
            if template.finish is not None:
                with file.failures():
                    template.finish(file.descriptor)
        if self.proved is not None:
            self.proved()

    def sync(self, *, overwrite: bool) -> None:
        """Make the files durable, still under their temporary names."""
        for made in self.published:
            made.sync()
            _refuse_existing(made.path, overwrite, folder=isinstance(made, AtomicFolder))

    def commit(self) -> None:
        """Let the files appear."""
        try:
            if len(self.published) > 1:
                self._sync_names()
            for made in reversed(self.published):
                made.commit()
        except BaseException as error:  # without the file that names them they are nothing
            left = self._withdrawn()
            if left and len(self.published) > 1:
                raise OutputError(
                    f"{error}; {', '.join(left)} cannot be removed", path=left[0]
                ) from error
            raise

    def _withdrawn(self) -> list[str]:
        """Withdraw what has appeared, first what names the others; return what stays."""
        first, *others = self.published
        if not first.withdraw():
            return [first.path]  # it keeps what it names
        return [made.path for made in others if not made.withdraw()]

    def _sync_names(self) -> None:
        """Make the temporary names durable, by which a run knows files that nothing names yet.

        A loss of power could leave one of the files under its own name alone, and who made it
        would not be known.
        """
        with self.files[0].failures():
            for folder in {os.path.dirname(made.destination) for made in self.published}:
                sync_folder(folder)


def refuse(target: str, reference: str, *, overwrite: bool) -> None:
    """Raise an error if an output after a reference cannot be where it is to be."""
    _refuse_existing(target, overwrite, folder=is_folder_output(target, reference))


def refuse_full(plans: Iterable[Plan]) -> None:
    """Raise an error if the outputs, or those on the same disk, have no room where they are to be.

    An output that is replaced stays until the new one is complete.
    """
    needed: dict[int, int] = collections.defaultdict(int)
    for plan in plans:
        if plan.output is not None:
            with failures(plan.output, plan.output):
                disk = os.stat(os.path.dirname(os.path.realpath(plan.output))).st_dev
            needed[disk] += plan.disk_bytes
            destinations.refuse_full(plan.output, needed[disk])


def _refuse_existing(target: str, overwrite: bool, *, folder: bool) -> None:
    refuse_existing(target, overwrite, folder=folder)
    if not folder or not os.path.isdir(target):
        return
    refuse_folders_within(target)
    if lost := unlike_an_output(target):
        raise OutputExistsError(
            f"{target} is not replaced: it holds {lost[0]}"
            + f" and {len(lost) - 1:,} more files" * (len(lost) > 1)
            + ", which would be lost; choose another output",
            path=target,
        )


def divided(plan: Plan, reference: Index, target: str) -> list[Part]:
    """Return the files that the output of a plan consists of; raise an error if it cannot be so."""
    row = format_of_output(target, reference)
    like = reference if row.name == reference.format else None
    path = os.path.join(target, "") if is_folder_output(target, reference.path) else target
    everything = [decision.output for decision in plan.decisions]
    return parts_of(row, path, everything, like, plan.options.max_shard_size)


@contextlib.contextmanager
def planned(
    plan: Plan,
    reference: Checkpoint,
    target: str,
    record: str | None,
    *,
    overwrite: bool,
    expected_of: Callable[[str], str] | None = None,
) -> Iterator[Output]:
    """Begin the output of a plan; leaving without `Output.commit` leaves no trace.

    The `record` says how it came to be, in a format that has a place for it; `expected_of` returns
    the SHA-256 that a file is to have which is copied into a folder.
    """
    row = format_of_output(target, reference.index)
    folder = is_folder_output(target, reference.path)
    parts = divided(plan, reference.index, target)
    if len(parts) > 1 and not folder:
        _begin_set(parts, overwrite)
    with _begun(parts, target if folder else None, overwrite) as (files, published):
        with _failures(files), _unless_changed(reference), uncollected():
            templates = _templates(row, plan, reference, parts, files)
            noted: Callable[[str | None], list[Template]] | None = None
            if row.recorded and (record or KEY in reference.index.metadata):
                noted = load_module(row.name).noted(templates, reference, KEY)
                templates = noted(record)
        sink = FileSink(files, templates, reference)
        for made in published:
            if isinstance(made, AtomicFolder):
                for carried in carried_files(plan, reference.path):
                    expected = expected_of(carried.path) if expected_of else None
                    _copy(carried.pieces(expected), made.file(carried.name))
        proved: Callable[[], None] | None = None
        if row.isolable and templates[-1].in_place:
            proved = functools.partial(_prove, reference, files, templates)
        yield Output(files, templates, sink, published, noted, proved)


def _prove(reference: Checkpoint, files: Sequence[NewFile], templates: Sequence[Template]) -> None:
    """Raise an error unless tensors written in place are to be found where they were written.

    In HDF5 nothing says where the structure lies. The numbers of a hostile file may lie over it,
    and other ones in their place spoil it.
    """
    assert reference.look is not None  # it was opened here
    several = len(files) > 1  # the first of which is their map
    name = "keras-weights" if several else reference.index.format
    for file, template in [*zip(files, templates, strict=True)][several:]:
        try:
            with file.failures():
                index = reference.look(name, file.temporary)
        except CheckpointFormatError as error:
            raise _spoilt(reference, error.message.replace(file.temporary, file.path)) from error
        found = {spec.name: spec for spec in (*index.tensors, *index.others)}
        for written in template.targets.values():
            read = found.get(written.name)
            if read is None or _place(read) != _place(written):
                raise _spoilt(reference, f"{written.name} would not be found where it was written")


def _copy(pieces: Iterable[bytes], file: NewFile) -> None:
    offset = 0
    for data in pieces:
        file.write(data, offset)
        offset += len(data)


def _place(spec: TensorSpec) -> tuple[object, ...]:
    return spec.dtype, spec.shape, spec.extent and spec.extent[1:]


def _spoilt(reference: Checkpoint, why: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"{reference.path}: its numbers lie over its own structure, so that an average of them in "
        f"their place cannot be read ({why}); nothing was written",
        path=reference.path,
    )


@contextlib.contextmanager
def new(
    target: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str], *, overwrite: bool
) -> Iterator[Output]:
    """Begin an output of tensors alone."""
    row = format_of_output(target)
    refuse_new(row, target)
    parts = parts_of(row, target, specs)
    if len(parts) > 1:
        _begin_set(parts, overwrite)
    with _begun(parts, None, overwrite) as (files, published):
        with _failures(files):
            templates = load_module(row.name).create(specs, metadata, _temporary(parts, files))
        yield Output(files, templates, FileSink(files, templates, None), published)


_Begun: TypeAlias = "tuple[Sequence[NewFile], Sequence[Atomic]]"


@contextlib.contextmanager
def _begun(parts: Sequence[Part], folder: str | None, overwrite: bool) -> Iterator[_Begun]:
    """Begin the files of an output, and yield them and what is to be published."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            overwrite = overwrite and len(parts) == 1  # of several, none is replaced
            made = [stack.enter_context(AtomicFile(p.path, overwrite=overwrite)) for p in parts]
            yield made, made
        else:
            whole = stack.enter_context(AtomicFolder(folder, overwrite=overwrite))
            yield [whole.file(os.path.basename(part.path)) for part in parts], [whole]


def _temporary(parts: Sequence[Part], files: Sequence[NewFile]) -> list[Part]:
    pairs = zip(parts, files, strict=True)
    return [part._replace(temporary=file.temporary) for part, file in pairs]


def _begin_set(parts: Sequence[Part], overwrite: bool) -> None:
    """Refuse to replace one of several files after the other: between, they would not match."""
    first, *others = [part.path for part in parts]
    reclaim_unnamed(first, others)
    for path in (first, *others):
        if overwrite and os.path.lexists(path):
            raise OutputExistsError(
                f"{path} exists, and an output of {len(parts)} files cannot be replaced at one "
                "instant; remove it, or choose another output",
                path=path,
            )


@contextlib.contextmanager
def _failures(files: Sequence[NewFile]) -> Iterator[None]:
    """Have failures in making any of the files name where they were to appear."""
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(file.failures())
        yield


@contextlib.contextmanager
def _unless_changed(reference: Checkpoint) -> Iterator[None]:
    """Have what fails because the reference is another, or gone, be told as that."""
    try:
        yield
    except (OSError, CheckpointFormatError):
        reference.verify_unchanged()
        raise


def _templates(
    row: Format,
    plan: Plan,
    reference: Checkpoint,
    parts: Sequence[Part],
    files: Sequence[NewFile],
) -> list[Template]:
    averaged = [decision.output for decision in plan.averaged]
    temporary = _temporary(parts, files)
    templates: list[Template]
    if not plan.patches:
        everything = [decision.output._replace(extent=None) for decision in plan.decisions]
        templates = load_module(row.name).create(everything, {}, temporary)
        return templates
    alike = plan.options.max_shard_size is None and len(parts) == len(reference.index.files)
    if alike and can_patch_in_place(reference.index, averaged, plan.keep_others):
        templates = in_place(reference.index, averaged)
    else:
        module = load_module(row.name)
        templates = module.patch(reference, averaged, plan.keep_others, temporary)
    if len(parts) > 1:
        module = load_module(row.name)
        templates[0] = module.renamed(reference, averaged, plan.keep_others, parts)
    return templates
