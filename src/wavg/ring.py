"""Windows: the last n models of a stream, in memory or as files, averaged all at once."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from decimal import Decimal
from glob import escape, glob
from typing import Any

import numpy as np
import numpy.typing as npt

from wavg.average import average
from wavg.blocks import Scratch, refuse_nonfinite
from wavg.errors import CheckpointFormatError
from wavg.files import average_checkpoints
from wavg.schedule import spell_number
from wavg.stored import load, open_checkpoint, save
from wavg.structure import AHEAD, Leaf, Moment, Structure
from wavg.temporaries import reclaim
from wavg.weights import Schedule

__all__ = ["FolderRing", "MemoryRing"]

Array = npt.NDArray[Any]

_KEY = "wavg_window"
_FILES = "model_*.safetensors"


class MemoryRing:
    """The last models, copied into arrays that are made once.

    Parameters
    ----------
    rules
        Schedules, streaming or not.
    window
        How many models.
    allow_nonfinite
        Let NaN and infinities in.
    """

    ahead = AHEAD

    def __init__(self, rules: Sequence[Schedule], window: int, allow_nonfinite: bool) -> None:
        self._rules, self._window, self._allow_nonfinite = rules, window, allow_nonfinite
        self._slots: list[list[Array]] = []  # oldest first
        self._spare: list[list[Array]] = []  # for those to come; none after `unpack`
        self.steps: list[float] = []  # of the models held, oldest first
        self._scratch = Scratch()
        self.torn = False  # an update has begun, and whoever asked for it has not yet noted it

    def update(self, structure: Structure, arrays: Sequence[Array], moment: Moment) -> None:
        """Take in a model, in place of the oldest if there are n; `torn` until that is noted."""
        if not self._allow_nonfinite:
            refuse_nonfinite(structure.leaves, arrays, self._scratch)
        if not self._slots:
            self._spare = [_empty(structure) for _ in range(self._window)]
        full = len(self._slots) == self._window
        slot = self._slots[0] if full else self._spare.pop() if self._spare else _empty(structure)
        self.torn = True
        self._slots = [*(self._slots[1:] if full else self._slots), slot]
        for place, array in zip(slot, arrays, strict=True):
            np.copyto(place, array)
        self.steps = [*self.steps, moment.step][-self._window :]

    def results(self, structure: Structure, which: Sequence[int]) -> Iterator[list[Array]]:
        """Yield the average by each of some schedules, as new arrays."""
        nonfinite = self._allow_nonfinite
        for index in which:
            rule = self._rules[index]
            yield average(self._slots, rule, steps=self.steps, allow_nonfinite=nonfinite)

    def pack(self, names: Sequence[str]) -> dict[str, Array]:
        """Return all numbers as named arrays; nothing is copied."""
        return {
            f"model{number}/{name}": array
            for number, model in enumerate(self._slots)
            for name, array in zip(names, model, strict=True)
        }

    def unpack(self, structure: Structure, steps: list[float], packed: dict[str, Array]) -> None:
        """Take up what `pack` returned, and remove it from there."""
        if not 0 < len(steps) <= self._window:
            raise ValueError(f"{len(steps)} steps in a window of {self._window}")
        self.steps = steps
        for number in range(len(steps)):
            model = []
            for name, leaf in zip(structure.names(), structure.leaves, strict=True):
                values = packed.pop(f"model{number}/{name}")
                if (values.shape, values.dtype) != (leaf.shape, leaf.format.numpy):
                    raise ValueError(f"model{number}/{name} is {values.dtype}{list(values.shape)}")
                model.append(values)
            self._slots.append(model)


def _empty(structure: Structure) -> list[Array]:
    return [np.empty(leaf.shape, leaf.format.numpy) for leaf in structure.leaves]


class FolderRing:
    """The last models as safetensors files in a folder, which outlives the process.

    Parameters
    ----------
    rules
        Schedules, streaming or not.
    window
        How many models.
    folder
        Made if it is not there; what a run before has left in it is taken up.
    allow_nonfinite
        Let NaN and infinities in.

    Attributes
    ----------
    structure
        Of the models found in the folder; None where there is none.
    last
        When the newest of them came.
    """

    def __init__(
        self, rules: Sequence[Schedule], window: int, folder: str, allow_nonfinite: bool
    ) -> None:
        self._rules, self._window, self._folder = rules, window, folder
        self._allow_nonfinite, self._scratch = allow_nonfinite, Scratch()
        self.torn = False
        self.structure: Structure | None = None
        self.last: Moment | None = None
        os.makedirs(folder, exist_ok=True)
        paths = glob(os.path.join(escape(folder), _FILES))
        found = sorted(((*_read(path), path) for path in paths), key=lambda each: each[0])
        self._held = [(moment, path) for moment, _, path in found]
        for path in paths:
            reclaim(path)  # what a run left that was killed as the file appeared
        if found:
            self.last, self.structure, _ = found[-1]

    @property
    def paths(self) -> list[str]:
        """The files of the window, oldest first."""
        return [path for _, path in self._held[-self._window :]]

    @property
    def ahead(self) -> str:
        """What to do where the folder has a step that the training has yet to take."""
        return (
            f"that is in {self._held[-1][1]}: a training that goes on from an earlier save first "
            f"needs the files of later steps removed from {self._folder}, a new one another folder"
        )

    def update(self, structure: Structure, arrays: Sequence[Array], moment: Moment) -> None:
        """Write a model; when it is on the disk, remove what the window has left behind."""
        if not self._allow_nonfinite:
            refuse_nonfinite(structure.leaves, arrays, self._scratch)
        path = os.path.join(self._folder, _FILES.replace("*", _step_text(moment.step)))
        tensors = dict(zip(structure.names(), arrays, strict=True))
        self.torn = True  # the file may be there, and not yet in the list
        try:
            save(path, tensors, metadata=_metadata(structure, moment))
        except Exception:
            self.torn = False  # it is not
            raise
        self._held.append((moment, path))
        while len(self._held) > self._window:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._held[0][1])
            del self._held[0]

    def results(self, structure: Structure, which: Sequence[int]) -> Iterator[list[Array]]:
        """Yield the average by each of some schedules: `wavg.average_checkpoints` of the files."""
        if not any(leaf.format.averaged for leaf in structure.leaves):
            for _ in which:  # integers are the newest's
                newest = load(self.paths[-1])
                yield [newest[leaf.path] for leaf in structure.leaves]
            return
        averages = average_checkpoints(
            self.paths,
            weights=[self._rules[index] for index in which],
            steps=[moment.step for moment, _ in self._held[-self._window :]],
            sort=False,
            allow_nonfinite=self._allow_nonfinite,
        )
        for tensors in averages:
            yield [tensors[leaf.path] for leaf in structure.leaves]


def _step_text(step: float) -> str:
    """Return a step as part of a file's name, so that names sort by it.

    >>> _step_text(200.0), _step_text(0.25)
    ('200', '0.25000000000000000')
    """
    if step == int(step):
        return str(int(step))
    whole, _, part = format(Decimal(repr(step)), "f").partition(".")
    return f"{whole}.{part:0<17}"  # names are sorted by their numbers: as 25 and 5 they would fall


def _metadata(structure: Structure, moment: Moment) -> dict[str, str]:
    """Return what a file says of its model, in our words and in those that others read."""
    text = json.dumps({"moment": moment, "tree": structure.plain()}, separators=(",", ":"))
    return {"format": "pt", "step": spell_number(moment.step), _KEY: text}


def _read(path: str) -> tuple[Moment, Structure]:
    with open_checkpoint(path) as checkpoint:
        try:
            told = json.loads(checkpoint.metadata[_KEY])
            position, step, before, given = told["moment"]
            moment = Moment(int(position), float(step), float(before), bool(given))
            specs = [checkpoint.spec(name) for name in checkpoint]
            leaves = tuple(Leaf(spec.name, spec.shape, spec.entry) for spec in specs)
            structure = Structure(leaves).shaped(told["tree"])
        except (
            LookupError,
            TypeError,
            ValueError,
            ArithmeticError,
            AttributeError,
            RecursionError,
        ):
            raise CheckpointFormatError(
                f"{path} is no model of a window, which are all that its folder may hold; choose "
                "another folder",
                path=path,
            ) from None
        return moment, structure
