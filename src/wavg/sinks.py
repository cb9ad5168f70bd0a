"""Where results go: arrays in memory, or places in a file in the making."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from wavg.checkpoint import Checkpoint, reading
from wavg.extents import extent_table, side_by_side
from wavg.plan import Plan
from wavg.publish import NewFile
from wavg.templates import Template

__all__ = ["FileSink", "MemorySink"]

Array = npt.NDArray[Any]


class MemorySink:
    """Collects the result as arrays."""

    def __init__(self, plan: Plan) -> None:
        self._outputs = {decision.spec.name: decision.output for decision in plan.decisions}
        self._flat = {name: spec.empty() for name, spec in self._outputs.items()}

    def wants(self, name: str) -> bool:
        """Do as `wavg.checkpoint.Sink.wants` says."""
        return True

    def joined(self, names: Sequence[str]) -> bool:
        """Do as `wavg.checkpoint.Sink.joined` says."""
        return len(names) == 1

    def write(self, name: str, start: int, values: Array) -> None:
        """Do as `wavg.checkpoint.Sink.write` says."""
        self._flat[name][start : start + len(values)] = values

    def arrays(self) -> dict[str, Array]:
        """Return the tensors by name, in the model's order."""
        return {name: spec.array(self._flat[name]) for name, spec in self._outputs.items()}


class FileSink:
    """Writes results to their places in temporary files made after templates, one a file."""

    def __init__(
        self,
        files: Sequence[NewFile],
        templates: Sequence[Template],
        reference: Checkpoint | None,
    ) -> None:
        self._files = files
        self._in_place = all(template.in_place for template in templates)
        self._shifts = [template.shift for template in templates]
        self._targets = templates[0].targets
        if len(templates) > 1:
            self._targets = {
                name: spec._replace(extent=spec.extent and spec.extent._replace(file=number))
                for number, template in enumerate(templates)
                for name, spec in template.targets.items()
            }
        for file, template in zip(files, templates, strict=True):
            file.resize(template.size)
            for offset, data in template.pieces:
                file.write(data, offset)
            for extent, offset in template.carry:
                assert reference is not None  # only a patched reference carries anything over
                source = reference.descriptor(extent.file)
                with reading(reference.index.files[extent.file].path):
                    file.copy_from(source, extent.offset, extent.length, offset)

    def wants(self, name: str) -> bool:
        """Do as `wavg.checkpoint.Sink.wants` says."""
        return name in self._targets

    def joined(self, names: Sequence[str]) -> bool:
        """Do as `wavg.checkpoint.Sink.joined` says."""
        if self._in_place:
            return True
        extents = [self._targets[name].extent for name in names]
        return bool(side_by_side(extent_table(extents)).all())

    def write(self, name: str, start: int, values: Array) -> None:
        """Do as `wavg.checkpoint.Sink.write` says."""
        extent = self._targets[name].extent
        assert extent is not None  # a target is a place
        place = self._shifts[extent.file] + extent.offset + start * values.itemsize
        self._files[extent.file].write(values, place)
