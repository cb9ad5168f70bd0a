"""The commands that look at a file: ``wavg inspect`` and ``wavg verify``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from wavg.checkpoint import Index
from wavg.cli_options import (
    add_command,
    add_isolate,
    add_json,
    add_limits,
    add_opaque,
    bytes_of,
    count_of,
    positive,
    tell_json,
)
from wavg.cli_weights import glyph
from wavg.errors import RecordError, WavgError
from wavg.printable import padded, printable
from wavg.record import KEY, Record
from wavg.stored import open_checkpoint

if TYPE_CHECKING:
    from wavg.verification import Verification

__all__ = ["add_inspect", "add_verify"]

_LONGEST = 60  # of a text of metadata


def add_inspect(commands: Any) -> None:
    """Declare ``wavg inspect``."""
    command = add_command(
        commands,
        "inspect",
        _inspect,
        "show what a checkpoint holds, and how an average came to be",
        "PATH [OPTION...]",
        "wavg inspect model.safetensors",
    )
    command.add_argument("path", metavar="PATH", help="a file, or a folder that is a checkpoint")
    add_opaque(command)
    add_isolate(command)
    add_json(command)


def add_verify(commands: Any) -> None:
    """Declare ``wavg verify``."""
    command = add_command(
        commands,
        "verify",
        _verify,
        "compute an averaged safetensors file again from its inputs, and compare",
        "OUTPUT [INPUT...] [OPTION...]",
        "wavg verify average.safetensors run/ --full",
    )
    add = command.add_argument
    command.description = (command.description or "") + (
        " The exit code is 0 if it is what its record says, as far as that was compared; 1 if it "
        "is not, or cannot be compared; 2 for a command that makes no sense."
    )
    add(
        "output",
        metavar="OUTPUT",
        help="what wavg average wrote; of a folder, what was copied into it is compared, too",
    )
    add(
        "inputs",
        metavar="INPUT",
        nargs="*",
        help="where its inputs are, or, if they have other names now, just these (default: beside "
        "it)",
    )
    add("--full", action="store_true", help="compare every number, not a sample")
    add(
        "--blocks",
        type=positive,
        default=1000,
        metavar="N",
        help="the sample: so many blocks of 4,096 numbers (default: %(default)s)",
    )
    add("--seed", type=int, metavar="N", help="of the sample (default: another each time)")
    add_opaque(command)
    add_limits(command)
    add_isolate(command)
    add_json(command)


def _inspect(options: argparse.Namespace) -> None:
    with open_checkpoint(
        options.path, opaque_dtype=options.opaque_dtype, isolate=options.isolate
    ) as checkpoint:
        index = checkpoint.index
    record, trouble = None, ""
    try:
        record = Record.parse(index.metadata[KEY]) if KEY in index.metadata else None
    except RecordError as error:
        trouble = str(error)
    if options.json:
        tell_json(options, json.dumps(_as_json(index, record, trouble), indent=2))
    else:
        for line in _as_text(index, record, trouble):
            print(printable(line))


def _as_json(index: Index, record: Record | None, trouble: str) -> dict[str, Any]:
    return {
        "path": index.path,
        "format": index.format,
        "bytes": sum(identity.size for identity in index.files),
        "metadata": dict(index.metadata),
        "record": dataclasses.asdict(record) if record else None,
        "unreadable_record": trouble or None,
        **{
            key: [
                {"name": s.name, "dtype": s.dtype, "shape": s.shape, "bytes": s.nbytes}
                for s in specs
            ]
            for key, specs in (("tensors", index.tensors), ("optimizer", index.others))
        },
    }


def _as_text(index: Index, record: Record | None, trouble: str) -> Iterator[str]:
    total = sum(identity.size for identity in index.files)
    numbers = sum(spec.size for spec in index.tensors)
    yield f"{index.path}: {index.format}, {bytes_of(total)}"
    for key, value in index.metadata.items():
        if key != KEY or record is None:
            yield f"  {key}: {value if len(value) <= _LONGEST else value[: _LONGEST - 3] + '...'}"
    if trouble:
        yield f"its record of how it came to be cannot be read: {trouble}"
    if record is not None:
        yield from _record_as_text(record)
    for title, specs in (("tensors", index.tensors), ("optimizer state", index.others)):
        if not specs:
            continue
        yield f"{title}: {len(specs):,}" + (f", {numbers:,} numbers" if title == "tensors" else "")
        for name, spec in zip(padded(spec.name for spec in specs), specs, strict=True):
            shape = f" {glyph('×', 'x')} ".join(map(str, spec.shape)) or "scalar"
            yield (f"  {name}  {spec.dtype:<9} {shape:>16}  {bytes_of(spec.nbytes):>12}")


def _record_as_text(record: Record) -> Iterator[str]:
    yield (
        f"made by wavg {record.version} from {count_of(record.count, 'model')} up to step "
        f"{record.step:.15g}, weights {record.weights}"
        + "".join(f", {name} {value}" for name, value in record.options.items())
    )
    if not record.sources:
        return
    title, *names = padded(["inputs, oldest first", *(part.name for part in record.sources)])
    yield f"  {title}  {'step':>10}  weight  {'size':>10}"
    for name, part, proportion in zip(names, record.sources, record.proportions, strict=True):
        size = bytes_of(part.size)
        yield f"  {name}  {part.step:>10.15g}  {proportion:.4f}  {size:>10}"
        digests = part.sha256 if isinstance(part.sha256, dict) else {"": part.sha256 or ""}
        for file, digest in digests.items():
            if digest:
                yield f"    sha256 {digest}  {file}".rstrip()


def _verify(options: argparse.Namespace) -> None:
    from wavg.verification import verify

    found = verify(
        options.output,
        options.inputs or None,
        full=options.full,
        blocks=options.blocks,
        seed=options.seed,
        isolate=options.isolate,
        opaque_dtype=options.opaque_dtype,
        max_memory=options.max_memory,
        workers=options.workers,
    )
    if options.json:
        tell_json(options, json.dumps(dataclasses.asdict(found), indent=2))
    else:
        for line in _verified_as_text(found):
            print(printable(line))
    if found.faults:
        unsure = not all(source.sha256 for source in found.record.sources)
        doubt = "; or an input has changed, which --sha256 would tell" if unsure else ""
        raise WavgError(
            f"{found.output} is not what its record says{doubt}:",
            path=found.output,
            differences=list(found.faults),
        )


def _verified_as_text(found: Verification) -> Iterator[str]:
    if found:
        yield f"{found.output} is the average that its record says"
    for title, texts in (("compared", found.checked), ("not compared", found.unchecked)):
        if texts:
            yield f"{title}:"
            yield from (f"  {text}" for text in texts)
    yield from (f"note: {note}" for note in found.notes)
