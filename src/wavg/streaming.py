"""Averaging during training: one model at a time, their number unknown in advance."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wavg import state
from wavg import weights as schedules
from wavg.errors import OutputError, WavgError, WeightError
from wavg.record import KEY, Record
from wavg.ring import FolderRing, MemoryRing
from wavg.schedule import spell_number
from wavg.stored import save
from wavg.structure import Moment, Structure
from wavg.tracks import PRECISIONS, Tracks

if TYPE_CHECKING:
    from wavg.inputs import PathLike

__all__ = ["StreamingAverager"]


class StreamingAverager:
    """A running average of the models of a training run, or several at once.

    Parameters
    ----------
    weights
        A schedule that streams, or its text: ``"equal"``, ``"linear"``,
        ``"exponential:alpha=2"`` …; with a `window` any schedule. A list of them tracks several
        averages, each model being read once for all.
    precision
        Of the sums: ``"float64"``, or ``"float32"`` for half the memory. Not with a window, which
        has no sums.
    window
        Average the last so many models alone. They are all kept.
    folder
        Keep the models of the window as safetensors files there, not in memory. What an earlier
        run has left in it is taken up.
    allow_nonfinite
        Let NaN and infinities into the average in place of an error.

    Raises
    ------
    WeightError
        Without a window, a schedule whose weights depend on how many models will come.

    Notes
    -----
    *Arrays.* A model is a pytree: nested dicts, lists, tuples, named tuples. Leaves are arrays of
    NumPy, PyTorch, JAX, TensorFlow or Keras, on any device, or anything with ``__array__`` or
    ``__dlpack__``. Integers and booleans are the newest model's.

    *Exactness.* With float64 sums, an average whose sum is only added to (equal, linear) is the
    exact weighted mean, rounded once: byte for byte that of `wavg.average_checkpoints` of the same
    models, as far as float64 reaches. What does not fit the sums is kept beside them. A sum that is
    also scaled (exponential, EMA) is rounded at every update, to a relative error of some n · 2⁻⁵³
    times its condition, n the models it has not yet forgotten. With ``precision="float32"`` that is
    n · 2⁻²⁴, whatever the schedule.

    *Memory.* Eight bytes a number and average, or four; for a model of float64 and an average that
    is exact, 16. All is made at the first update; later ones work in place, in blocks. Only if one
    number in 64 of a leaf outgrows its sum (values some 2²⁵ apart at one place) is another array
    made. A window takes its n models in memory, or on the disk.

    Examples
    --------
    >>> import numpy as np, wavg
    >>> averager = wavg.StreamingAverager("linear")
    >>> for value in (1, 2, 3):
    ...     averager.update([np.float32([value, 10]), np.int64(value)])
    >>> averager.result()
    [array([ 2.3333333, 10.       ], dtype=float32), array(3)]

    The newest two of a run, and two averages in one go:

    >>> newest = wavg.StreamingAverager(window=2)
    >>> both = wavg.StreamingAverager(["equal", "exponential:alpha=1"])
    >>> for step in (100, 200, 300):
    ...     newest.update({"w": np.float32(step)}, step)
    ...     both.update({"w": np.float32(step)}, step)
    >>> newest.result()
    {'w': array(250., dtype=float32)}
    >>> both.result()
    [{'w': array(200., dtype=float32)}, {'w': array(257.52103, dtype=float32)}]
    """

    def __init__(
        self,
        weights: schedules.WeightsLike | Sequence[schedules.WeightsLike] = "equal",
        *,
        precision: str = "float64",
        window: int | None = None,
        folder: PathLike | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        self._many = schedules.is_several(weights)
        several = weights if schedules.is_several(weights) else [weights]
        self._rules = [schedules.resolve(rule) for rule in several]
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        if window is not None:
            window = _checked_window(window)
            if precision != PRECISIONS[0]:
                raise ValueError(f"a window keeps models, not sums of {precision}; leave it out")
        if folder is not None and window is None:
            raise ValueError("a folder holds the models of a window; give window=n as well")
        self._precision, self._window, self._allow_nonfinite = precision, window, allow_nonfinite
        self._structure: Structure | None = None
        self._last: Moment | None = None
        self._held: Tracks | MemoryRing | FolderRing
        if window is None:
            self._held = Tracks(self._rules, precision, allow_nonfinite)
        elif folder is None:
            self._held = MemoryRing(self._rules, window, allow_nonfinite)
        else:
            self._held = FolderRing(self._rules, window, os.fspath(folder), allow_nonfinite)
            self._structure, self._last = self._held.structure, self._held.last

    @property
    def count(self) -> int:
        """How many models have come."""
        return self._last.position if self._last else 0

    @property
    def step(self) -> float | None:
        """The newest model's step, its number if none was given; None before the first."""
        return self._last.step if self._last else None

    def update(self, model: Any, step: float | None = None) -> None:
        """Take in the next model: a pytree of arrays of one structure throughout.

        Parameters
        ----------
        model
            It is read once, copied from, and left alone.
        step
            Where in training it stands; steps increase. Its number, 1, 2, …, if never given.

        Raises
        ------
        StructureMismatchError
            It differs from the first in structure, shapes or dtypes; the state is as before.
        NonFiniteError
            It holds NaN or infinity, or a sum would exceed its precision; the state is as before.
        WeightError
            The step does not increase, or is none that the schedule can begin with, or steps are
            given for some models only.
        """
        self._refuse_torn()
        moment = self._moment(step)
        if self._structure is None:
            structure, arrays = Structure.first(model)
        else:
            structure, arrays = self._structure.next(model)
        self._held.update(structure, arrays, moment)
        self._structure, self._last = structure, moment
        self._held.torn = False

    def result(self) -> Any:
        """Return the average so far: the first model's structure with new NumPy arrays.

        Of several schedules, a list of averages in their order. After `load`, and before an update
        has shown the structure again, models of other nodes than dicts, lists and tuples are dicts
        of arrays by path.

        Raises
        ------
        WeightError
            No model has come yet, or the weights sum to zero.
        """
        structure = self._begun()
        every = range(len(self._rules))
        results = [structure.rebuild(arrays) for arrays in self._held.results(structure, every)]
        return results if self._many else results[0]

    def save(self, path: PathLike, *, overwrite: bool = True) -> None:
        """Write the state to a safetensors file, from which `load` goes on as if nothing had been.

        Whatever happens, there is the old file or the new one, whole.

        Raises
        ------
        WeightError
            There is no state yet, or a schedule is your own, without a text form.
        OutputExistsError
            There is a file that is no saved state, or any with ``overwrite=False``.
        OutputError
            The file cannot be written. A window in a folder needs no file: the folder is its state.
        """
        structure = self._begun()
        if isinstance(self._held, FolderRing):
            raise OutputError(
                "a window in a folder is kept there: StreamingAverager with the same folder goes on"
            )
        header: dict[str, Any] = {
            "weights": [state.text_of(rule) for rule in self._rules],
            "many": self._many,
            "precision": self._precision,
            "window": self._window,
            "allow_nonfinite": self._allow_nonfinite,
            "last": self._last,
        }
        if isinstance(self._held, Tracks):
            header["totals"] = state.total_texts(self._held.totals)
        else:
            header["steps"] = self._held.steps
        packed = self._held.pack(structure.names())
        state.write(os.fspath(path), structure, header, packed, overwrite=overwrite)

    @classmethod
    def load(cls, path: PathLike) -> StreamingAverager:
        """Return the averager that `save` wrote.

        The next model has to be like those before. Of named tuples and other nodes of one's own the
        file tells the leaves alone, by path, shape and dtype.

        Raises
        ------
        CheckpointFormatError
            The file is damaged, or no saved state.
        """
        with state.read(os.fspath(path)) as (header, packed):
            weights = [state.rule_of(text) for text in header["weights"]]
            averager = cls(
                weights if header["many"] else weights[0],
                precision=header["precision"],
                window=header["window"],
                allow_nonfinite=bool(header["allow_nonfinite"]),
            )
            structure, held = state.structure_of(header), averager._held
            if isinstance(held, Tracks):
                held.unpack(structure, state.totals_of(header["totals"]), packed)
            elif isinstance(held, MemoryRing):
                held.unpack(structure, state.steps_of(header["steps"]), packed)
            averager._structure, averager._last = structure, state.moment_of(header["last"])
        return averager

    def save_average(
        self, path: PathLike, which: int | None = None, *, overwrite: bool = False
    ) -> None:
        """Write an average as a checkpoint: its arrays by path, and where they come from.

        Parameters
        ----------
        path
            As `wavg.save` takes it. A safetensors file tells schedule, step and count in its
            metadata, under ``wavg``.
        which
            Of several averages, the number in their list, from 0.
        overwrite
            Replace an existing file.

        Raises
        ------
        WeightError
            There is no average yet, or none of that number; `result` has more.
        """
        structure = self._begun()
        count = len(self._rules)
        if which is None and count == 1:
            which = 0
        if which is None or not -count <= which < count:
            raise WeightError(
                f"there are {count} averages, {', '.join(map(str, self._rules))}: which=0 is the "
                f"first, and the last which={count - 1}" + (f", not {which}" if which else "")
            )
        (arrays,) = self._held.results(structure, [which])
        tensors = dict(zip(structure.names(), arrays, strict=True))
        assert self._last
        count, options = self.count, dict[str, int]()
        if self._window is not None:
            count, options = min(count, self._window), {"window": self._window}
        record = Record(str(self._rules[which]), self._last.step, (), count, options)
        target = os.fspath(path)
        metadata: dict[str, str] = {}
        if target.lower().endswith(".safetensors"):  # with the format that loaders insist on
            metadata = {"format": "pt", KEY: record.text()}
        save(target, tensors, metadata=metadata, overwrite=overwrite)

    def __repr__(self) -> str:
        texts = [str(rule) for rule in self._rules]
        return f"StreamingAverager({texts if self._many else texts[0]!r}, count={self.count})"

    def _begun(self) -> Structure:
        if self._structure is None:
            raise WeightError("there is no average yet: update() has not been called")
        self._refuse_torn()
        return self._structure

    def _refuse_torn(self) -> None:
        if self._held.torn:
            raise WavgError(
                "an update was interrupted half-way, so that the sums are of no model; go on from "
                "a saved state, or, where the window is in a folder, from that folder"
            )

    def _moment(self, step: float | None) -> Moment:
        position = self.count + 1
        if self._last and self._last.given != (step is not None):
            raise WeightError(
                "steps are given for every model or for none, and those before "
                + ("had one" if self._last.given else "had none")
            )
        number = float(position if step is None else step)
        before = self._last.step if self._last else 0.0
        if not math.isfinite(number) or (self._last and number <= before):
            raise WeightError(
                f"steps must increase, and {spell_number(number)} came after "
                f"{spell_number(before)}; {self._held.ahead}"
                if self._last
                else f"a step must be a finite number, not {number}"
            )
        return Moment(position, number, before, step is not None)


def _checked_window(window: int) -> int:
    try:
        number = operator.index(window)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"window must be a positive number of models, not {window}")
    return number
