"""Outputs in the making: the files of an average, from their templates to their appearance."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from wavg.checkpoint import Checkpoint, TensorSpec
from wavg.errors import OutputExistsError
from wavg.formats import Format, format_of_output, load_module, parts_of, refuse_new
from wavg.opening import uncollected
from wavg.plan import Plan
from wavg.publish import AtomicFile, refuse_existing
from wavg.sinks import FileSink
from wavg.templates import Template, can_patch_in_place, in_place

__all__ = ["Output", "new", "planned"]


class Output(NamedTuple):
    """The files of one average in the making; the first names the others, and appears last."""

    files: list[AtomicFile]
    templates: list[Template]
    sink: FileSink

    def finish(self) -> None:
        """Do what is left when all numbers are written."""
        for template, file in zip(self.templates, self.files, strict=True):
            if template.finish is not None:
                with file.failures():
                    template.finish(file.descriptor)

    def sync(self, *, overwrite: bool) -> None:
        """Make the files durable, still under their temporary names."""
        for file in self.files:
            file.sync()
            refuse_existing(file.path, overwrite)

    def commit(self) -> None:
        """Let the files appear."""
        done: list[AtomicFile] = []
        try:
            for file in reversed(self.files):
                file.commit()
                done.append(file)
        except BaseException:
            for file in done:  # without the file that names them they are nothing
                file.withdraw()
            raise


@contextlib.contextmanager
def planned(plan: Plan, reference: Checkpoint, target: str, *, overwrite: bool) -> Iterator[Output]:
    """Begin the output of a plan; leaving without `Output.commit` leaves no trace."""
    row = format_of_output(target, reference.index)
    paths = parts_of(row, target, reference.index)
    if len(paths) > 1 and overwrite:
        _refuse_replacing(paths)
    with _begun(paths, overwrite) as files:
        with _failures(files), uncollected():
            templates = _templates(row, plan, reference, files)
        yield Output(files, templates, FileSink(files, templates, reference))


@contextlib.contextmanager
def new(
    target: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str], *, overwrite: bool
) -> Iterator[Output]:
    """Begin an output of tensors alone."""
    row = format_of_output(target)
    refuse_new(row, target)
    with _begun([target], overwrite) as files:
        with _failures(files):
            templates = load_module(row.name).create(specs, metadata, [files[0].temporary])
        yield Output(files, templates, FileSink(files, templates, None))


@contextlib.contextmanager
def _begun(paths: Sequence[str], overwrite: bool) -> Iterator[list[AtomicFile]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(AtomicFile(path, overwrite=overwrite)) for path in paths]


def _refuse_replacing(paths: Sequence[str]) -> None:
    """Refuse to replace one of several files after the other: between, they would not match."""
    for path in paths:
        if os.path.lexists(path):
            raise OutputExistsError(
                f"{path} exists, and an output of {len(paths)} files cannot be replaced at one "
                "instant; remove it, or choose another output",
                path=path,
            )


@contextlib.contextmanager
def _failures(files: Sequence[AtomicFile]) -> Iterator[None]:
    """Have failures in making any of the files name where they were to appear."""
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(file.failures())
        yield


def _templates(
    row: Format, plan: Plan, reference: Checkpoint, files: Sequence[AtomicFile]
) -> list[Template]:
    averaged = [decision.output for decision in plan.averaged]
    paths = [file.temporary for file in files]
    templates: list[Template]
    if not plan.patches:
        everything = [decision.output._replace(extent=None) for decision in plan.decisions]
        templates = load_module(row.name).create(everything, {}, paths)
        return templates
    if can_patch_in_place(reference.index, averaged, plan.keep_others):
        templates = in_place(reference.index, averaged)
    else:
        module = load_module(row.name)
        templates = module.patch(reference, averaged, plan.keep_others, paths)
    if row.several:
        names = [file.path for file in files]
        module = load_module(row.name)
        templates[0] = module.renamed(reference, averaged, plan.keep_others, names)
    return templates
