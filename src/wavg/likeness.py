"""What an average has of its newest input besides numbers, compared with that input.

An output is the newest input with its numbers replaced: the same tensors, metadata and index of
shards, and in a folder the same files beside. Each function compares one of these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence

from wavg.carried import CarriedFile, carried_files
from wavg.checkpoint import Checkpoint, Index, TensorSpec, reading
from wavg.decisions import Decision
from wavg.findings import Findings, shortened
from wavg.formats import load_module
from wavg.formats.folders import beside, has_folder, unlike_an_output
from wavg.plan import Plan
from wavg.record import KEY
from wavg.templates import Part

__all__ = ["are_alike", "files", "metadata", "shards", "tensors"]


def are_alike(spec: TensorSpec, other: TensorSpec | None) -> bool:
    """Whether two tensors can have the same numbers."""
    return other is not None and (spec.dtype, spec.shape) == (other.dtype, other.shape)


def tensors(decisions: Sequence[Decision], made: Checkpoint) -> Findings:
    """Compare the tensors that a file has with those that are decided on."""
    return Findings(
        checked=("the names, dtypes and shapes of all tensors",),
        faults=tuple(_differences(decisions, made)),
    )


def _differences(decisions: Sequence[Decision], made: Checkpoint) -> Iterator[str]:
    expected = {decision.spec.name: decision.output for decision in decisions}
    for name, spec in expected.items():
        if name not in made:
            yield f"{name}: it is not there"
        elif not are_alike(spec, made.spec(name)):
            yield f"{name}: it is {made.spec(name).describe()}, not {spec.describe()}"
    yield from (f"{name}: it is in none of the inputs" for name in made if name not in expected)


def metadata(reference: Index, made: Index) -> Findings:
    """Compare the metadata, but for the record, with the newest input's.

    An output in another format has those of a new file. Where there are none ``"format": "pt"`` is
    added; of shards some may have had none.
    """
    after = reference.format == made.format
    before = reference.metadata if after else {}
    expected = {key: text for key, text in before.items() if key != KEY}
    found = {key: text for key, text in made.metadata.items() if key != KEY}
    if not before or (len(made.files) > 1 and found.get("format") == "pt"):
        expected.setdefault("format", "pt")
    source = "the newest input's" if after else "a new file's"
    faults = (
        f"metadata: {key} is {_said(found.get(key))}, not {_said(expected.get(key))}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    )
    return Findings(checked=(f"the metadata with {source}",), faults=tuple(faults))


def _said(text: str | None) -> str:
    return "missing" if text is None else repr(shortened(text))


def shards(plan: Plan, reference: Checkpoint, made: Checkpoint) -> Findings:
    """Compare what an index of shards says besides where tensors are, which its reader does.

    The shards are to have one record, as those of one average have.
    """
    if made.index.format != "safetensors" or len(made.index.files) == 1:
        return Findings()
    names: list[list[str]] = [[] for _ in made.index.files]
    for spec in made.index.tensors:
        assert spec.extent is not None  # every tensor of this format has one
        names[spec.extent.file].append(spec.name)
    parts = [
        Part(file.path, tuple(inner)) for file, inner in zip(made.index.files, names, strict=True)
    ]
    averaged = [decision.output for decision in plan.averaged]
    module = load_module("safetensors")
    ((_, text),) = module.renamed(reference, averaged, plan.keep_others, parts).pieces
    with reading(made.path), open(made.path, "rb") as file:
        found = json.load(file)
    expected = json.loads(text)
    name = os.path.basename(made.path)
    faults = [
        f"{name}: its {key} is not what its shards and the newest input make it"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    ]
    faults += [
        f"{os.path.basename(path)}: its record is another than the first shard's"
        for path in (file.path for file in made.index.files[1:])
        if module.read_index(path).metadata.get(KEY) != made.metadata[KEY]
    ]
    return Findings(checked=(f"{name} with its shards and the newest input",), faults=tuple(faults))


def files(plan: Plan, reference: str, made: str, folder: str | None) -> Findings:
    """Compare the files of a folder with those that an output has of the newest input's.

    Parameters
    ----------
    plan
        What was averaged, which may change the dtype in a configuration.
    reference, made
        Where the newest input and the average lie.
    folder
        The average, if it was named as a folder: of a file, what stands beside is not looked at.
    """
    if folder is None:
        if has_folder(reference) and has_folder(made) and beside(made):
            return Findings(unchecked=("the files beside the weights: name the folder for that",))
        return Findings()
    if not has_folder(reference):
        why = f"the folder's other files: {reference} has no folder of its own"
        return Findings(unchecked=(why,))
    expected = {file.name: file for file in carried_files(plan, reference)}
    found = {os.path.basename(path): path for path in beside(made)}
    home = os.path.dirname(os.path.abspath(reference))
    faults = []
    for name in sorted({*expected, *found}):
        if name not in expected:
            faults.append(f"{name}: it is not in {home}")
        elif name not in found:
            faults.append(f"{name}: it is missing, and in {home}")
        elif not _same(expected[name], found[name]):
            faults.append(f"{name}: it is another than in {home}")
    others = unlike_an_output(folder)
    more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
    return Findings(
        checked=(f"the files beside the weights with those of {home}",),
        unchecked=(f"what no average's folder has: {others[0]}{more}",) if others else (),
        faults=tuple(faults),
    )


def _same(file: CarriedFile, path: str) -> bool:
    with reading(path), open(path, "rb") as copy:
        for data in file.pieces():
            if copy.read(len(data)) != data:
                return False
        return not copy.read(1)
