"""What a record says that no number shows: which inputs, steps and schedule, how many models.

A record is read from a file, and not believed: what it says is compared with the inputs found, and
with what else it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from wavg import listed
from wavg import weights as schedules
from wavg.checkpoint import Checkpoint
from wavg.digests import Digest
from wavg.errors import WavgError
from wavg.findings import Findings, shortened
from wavg.grid import weigh
from wavg.names import named_steps
from wavg.record import Record, Source
from wavg.recorded import Open, own_steps, recorded_steps
from wavg.schedule import spell_number

__all__ = ["inputs", "schedule", "steps", "totals"]

_CLOSE = 1e-9  # of a proportion: other machines may compute a schedule to another last bit


def inputs(
    record: Record, checkpoints: Sequence[Checkpoint], digests: Sequence[Digest | None]
) -> Findings:
    """Compare the inputs' sizes and SHA-256 with those recorded."""
    recorded = [bool(source.sha256) for source in record.sources]
    why = "the inputs' SHA-256: record='sha256' (--sha256) would have recorded them"
    sha256 = " and SHA-256" if all(recorded) else ""
    return Findings(
        checked=(f"the inputs' sizes{sha256} with those recorded",),
        unchecked=() if sha256 else (why,),
        faults=tuple(_changes(record, checkpoints, digests)),
    )


def _changes(
    record: Record, checkpoints: Sequence[Checkpoint], digests: Sequence[Digest | None]
) -> Iterator[str]:
    for source, checkpoint, digest in zip(record.sources, checkpoints, digests, strict=True):
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


def totals(record: Record) -> Findings:
    """Compare the number of models and the newest one's step with the inputs that are listed."""
    faults = []
    if record.count != len(record.sources):
        faults.append(
            f"its record says {record.count:,} models, and lists {len(record.sources):,} inputs"
        )
    newest = max(source.step for source in record.sources if source.coefficient)
    if record.step != newest:
        faults.append(
            f"its record says step {spell_number(record.step)}, and the newest input that has a "
            f"weight in it is of step {spell_number(newest)}"
        )
    return Findings(faults=tuple(faults))


def schedule(record: Record, paths: Sequence[str], open_: Open) -> Findings:
    """Compare the recorded weights with those that the schedule gives at the recorded steps."""
    said = shortened(record.weights)
    what = f"the recorded weights with those of {said}"
    rule = _rule(record.weights)
    if rule is None:
        return Findings(unchecked=(f"{what}, which is no schedule known by its text",))
    if rule.count is not None:  # numbers, and one that is zero may have no input
        numbers = rule(np.arange(rule.count))
        agree = [*filter(None, numbers)] == [*filter(None, (s.coefficient for s in record.sources))]
        return _judged(said, agree)
    try:
        with np.errstate(all="ignore"):
            row = weigh(rule, paths, [source.step for source in record.sources], open_)
            proportions = (row / row.sum()).tolist()
    except (WavgError, ArithmeticError, ValueError) as error:  # of steps that are none
        return Findings(unchecked=(f"{what}: {error}",))
    pairs = zip(record.sources, proportions, record.proportions, strict=True)
    wrong = [part for part in pairs if not abs(part[1] - part[2]) <= _CLOSE]
    if not wrong:
        return _judged(said, True)
    if not row.all():
        return Findings(unchecked=(f"{what}: checkpoints that it leaves out are not recorded",))
    source, gives, has = wrong[0]
    return _judged(said, False, f": {gives:.6g} to {source.name}, which has {has:.6g}")


def _judged(said: str, agree: bool, detail: str = "") -> Findings:
    if agree:
        what = f"the recorded weights with those of {said} at the recorded steps"
        return Findings(checked=(what,))
    return Findings(faults=(f"its record contradicts itself: {said} gives other weights{detail}",))


def _rule(text: str) -> schedules.Schedule | None:
    if text.lower().endswith(listed.ENDINGS):  # a record must not have files opened that it names
        return None
    try:
        return schedules.parse(text)
    except WavgError:
        return None


def steps(record: Record, paths: Sequence[str], open_: Open) -> Findings:
    """Compare the recorded steps with those that the inputs' names or metadata tell.

    Steps may have been given, so that others are no fault.
    """
    recorded = tuple(source.step for source in record.sources)
    repeats = len({*recorded}) < len(recorded)
    told = own_steps(paths, open_) if repeats else None
    told = told or named_steps(paths, repeats=repeats)
    told = told or recorded_steps(paths, open_, repeats=repeats)
    if told is None:
        why = "neither names nor metadata of the inputs tell any"
        return Findings(unchecked=(f"the recorded steps: {why}",))
    if told == recorded:
        return Findings(checked=("the recorded steps with those that the inputs tell",))
    return Findings(
        notes=(
            f"the steps recorded are {_listed(recorded)}, and the inputs tell {_listed(told)}: "
            "they were given, or these are other files",
        )
    )


def _listed(numbers: Sequence[float]) -> str:
    shown = ", ".join(map(spell_number, numbers[:3]))
    return shown + (f" ... {spell_number(numbers[-1])}" if len(numbers) > 3 else "")
