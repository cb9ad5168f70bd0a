"""Where results go: arrays in memory, or places in a file in the making."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from wavg.checkpoint import Checkpoint
from wavg.extents import Extent, extent_table, side_by_side
from wavg.plan import Plan
from wavg.publish import AtomicFile
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
        files: Sequence[AtomicFile],
        templates: Sequence[Template],
        reference: Checkpoint | None,
    ) -> None:
        self._files = files
        self._places: dict[str, Extent] = {}
        for number, (file, template) in enumerate(zip(files, templates, strict=True)):
            for name, spec in template.targets.items():
                assert spec.extent is not None  # a target is a place
                extent = spec.extent
                self._places[name] = extent._replace(file=number) if number else extent
            file.resize(template.size)
            for offset, data in template.pieces:
                file.write(data, offset)
            for extent, offset in template.carry:
                assert reference is not None  # only a patched reference carries anything over
                source = reference.descriptor(extent.file)
                file.copy_from(source, extent.offset, extent.length, offset)

    def wants(self, name: str) -> bool:
        """Do as `wavg.checkpoint.Sink.wants` says."""
        return name in self._places

    def joined(self, names: Sequence[str]) -> bool:
        """Do as `wavg.checkpoint.Sink.joined` says."""
        return bool(side_by_side(extent_table([self._places[name] for name in names])).all())

    def write(self, name: str, start: int, values: Array) -> None:
        """Do as `wavg.checkpoint.Sink.write` says."""
        extent = self._places[name]
        self._files[extent.file].write(values, extent.offset + start * values.itemsize)
