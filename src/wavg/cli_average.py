"""``wavg average``: its options, and what it says of what it did."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import wavg
from wavg import cli_weights
from wavg.cli_options import (
    Once,
    add_command,
    add_direction,
    add_inputs,
    add_isolate,
    add_json,
    add_limits,
    add_metrics,
    add_output,
    add_overwrite,
    add_quiet,
    add_tensors,
    bytes_of,
    count_of,
    positive,
    shard_size,
    shortened,
    tell_json,
)
from wavg.files import Report, average_checkpoints, plan_average
from wavg.formats import open_file
from wavg.grid import newest
from wavg.names import named_steps
from wavg.options import MIB, RECORDS
from wavg.plan import Plan
from wavg.printable import padded, printable
from wavg.schedule import spell_number
from wavg.weights import AMPLIFIES

__all__ = ["add_average"]

_SHOWN_PAIRS = 60
_STATISTICS = re.compile("running_mean|moving_mean|batch_normalization")


def add_average(commands: Any) -> None:
    """Add the command to the parser's."""
    command = add_command(
        commands,
        "average",
        _average,
        "average checkpoints into one file",
        "INPUT... -o OUTPUT [OPTION...]",
        "wavg average run/model_*.h5 -o average.h5 --weights linear --last 5",
    )
    add_inputs(command)
    inputs = command.part("inputs").add_argument
    inputs(
        "--last",
        action="append",
        type=positive,
        metavar="N",
        help="only the newest N; several times: an average of each",
    )
    add_metrics(command)
    command.part("recorded metrics").add_argument(
        "--best",
        type=positive,
        metavar="K",
        help="only the K checkpoints that are best by their recorded metrics",
    )
    add_direction(command, "recorded metrics", required=False)
    command.part("weights").add_argument(
        "--weights",
        action="append",
        metavar="SPEC",
        help=f"{cli_weights.known()} (default: equal); given several times, so many averages are "
        "made in one pass",
    )
    add_output(
        command,
        "the file to write, in which {weights} and {last} stand for those of an average",
        required=True,
    )
    add = command.part("output").add_argument
    add("--dry-run", action="store_true", help="print the plan, write nothing")
    add_overwrite(command, "an existing output")
    add(
        "--optimizer",
        choices=("carry", "drop"),
        default="carry",
        help="what becomes of the newest checkpoint's optimizer state (default: %(default)s)",
    )
    add(
        "--record",
        choices=RECORDS,
        help="what a safetensors output's metadata says of its inputs: names, sizes, steps, "
        "coefficients; their digests too; or nothing (default: inputs)",
    )
    add("--sha256", action="store_true", help="the same as --record sha256")
    add(
        "--max-shard-size",
        type=shard_size,
        metavar="SIZE",
        help="divide an output folder of safetensors into files of at most so much, such as 5GB "
        "(default: as the newest checkpoint is)",
    )
    add_tensors(command)
    command.part("numbers").add_argument(
        "--integers",
        choices=("reference", "error"),
        default="reference",
        help="integer tensors that differ: take the newest's, or refuse (default: %(default)s)",
    )
    add_limits(command)
    add_isolate(command)
    command.part("trust").add_argument(
        "--check-sha256",
        action=Once,
        metavar="FILE",
        help="a list of the inputs' SHA-256, as sha256sum prints it, with names from the folder "
        "that FILE is in, or else from the current one: another file, or one that is not listed, "
        "is refused, also of those copied into an output's folder",
    )
    add_json(command)
    add_quiet(command)


def _average(options: argparse.Namespace) -> None:
    _settle_record(options)
    if options.metrics or options.best:
        _choose(options)
    chosen = {
        name: getattr(options, name)
        for name in (
            "last",
            "steps",
            "dtype",
            "include",
            "exclude",
            "align",
            "optimizer",
            "integers",
            "allow_nonfinite",
            "opaque_dtype",
            "isolate",
            "record",
            "check_sha256",
            "max_shard_size",
            "max_memory",
            "workers",
        )
    }
    chosen["weights"] = options.weights or ["equal"]  # a list: a list comes back
    chosen["sort"] = options.order == "natural"
    made: list[tuple[Plan, Report | None]]
    with cli_weights.gathered() as notes:
        if options.dry_run:
            plans = plan_average(options.inputs, options.output, **chosen)
            made = [(plan, None) for plan in plans]
        else:
            reports = average_checkpoints(
                options.inputs,
                options.output,
                overwrite=options.overwrite,
                progress=not (options.quiet or options.json),
                **chosen,
            )
            made = [(report.plan, report) for report in reports]
    if options.json:
        figures = [_plan_as_json(*parts) for parts in made]
        whole = figures[0] if len(made) == 1 else {"averages": figures}
        tell_json(options, json.dumps(whole, indent=2))
    elif not options.quiet:
        lines = itertools.chain(_made_as_text(made), _notes(made, options), notes)
        print("\n".join(map(printable, lines)))


def _settle_record(options: argparse.Namespace) -> None:
    """Make one of the two options that say what the output keeps; they must not disagree."""
    if options.sha256 and options.record not in (None, "sha256"):
        options.command.error(
            f"--sha256 keeps the inputs' digests in the record, and --record {options.record} "
            "keeps none; use one of them"
        )
    options.record = "sha256" if options.sha256 else options.record or "inputs"


def _choose(options: argparse.Namespace) -> None:
    """Leave the checkpoints that are best by recorded metrics."""
    if not options.metrics or not options.best or options.maximize is None:
        options.command.error("--metrics, --best and --maximize or --minimize go together")
    if options.last:
        options.command.error("--last and --best both say which checkpoints; use one of them")
    natural = options.order == "natural"
    open_ = partial(open_file, opaque_dtype=options.opaque_dtype, isolate=options.isolate)
    paths, steps = newest(options.inputs, options.steps, (), natural, options.output, None, open_)
    best = wavg.best_checkpoints(
        paths,
        options.metrics,
        best=options.best,
        maximize=options.maximize,
        metric=options.metric,
        first_epoch=options.first_epoch,
        steps=steps,
        sort=False,
    )
    options.inputs, options.order = best, "given"
    options.steps = [step for path, step in zip(paths, steps, strict=True) if path in best]


def _notes(
    made: Sequence[tuple[Plan, Report | None]], options: argparse.Namespace
) -> Iterator[str]:
    """Say what a person might not expect."""
    plan = max((plan for plan, _ in made), key=lambda plan: len(plan.inputs))
    paths = [part.path for part in plan.inputs]
    counted = [part.step for part in plan.inputs] == [*range(1, len(paths) + 1)]
    if options.steps is None and len(paths) > 1 and counted and named_steps(paths) is None:
        yield (
            "note: names and metadata tell no increasing steps; the checkpoints are counted from 1"
        )
    averages = [part.path for part in plan.inputs if part.average]
    if averages:
        more = f" and {len(averages) - 1:,} more inputs are averages" * (len(averages) > 1)
        yield f"note: {averages[0]} is itself an average that wavg made{more}"
    if options.check_sha256 is not None and any(report is None for _, report in made):
        yield "note: a dry run reads no tensors, and so compares no digests"
    explicit = any(plan.schedule[:1] in "-.0123456789" for plan, _ in made)
    if options.order == "natural" and explicit:
        given = [os.path.realpath(path) for path in options.inputs]
        if len(given) > 1 and [os.path.realpath(path) for path in paths] != given[-len(paths) :]:
            yield "note: the inputs were put in order; weights go to the oldest first"
    mixed = any(sum(part.proportion != 0 for part in plan.inputs) > 1 for plan, _ in made)
    if mixed and any(_STATISTICS.search(decision.spec.name) for decision in plan.averaged):
        yield (
            "note: batch-norm statistics were averaged like the rest; "
            "re-estimating them on training data may do better"
        )
    merits = {plan.schedule: plan.figures for plan, _ in made}
    for merit in merits.values():
        if merit.amplification > AMPLIFIES:
            yield cli_weights.amplifies(merit)
    for plan, report in made:
        if report is None and os.path.lexists(plan.output or "") and not options.overwrite:
            yield f"note: {plan.output} exists; writing it needs --overwrite"


def _plan_as_json(plan: Plan, report: Report | None) -> dict[str, Any]:
    return {
        "output": plan.output,
        "written": report is not None,
        "weights": plan.schedule,
        "inputs": [
            {"path": part.path, "step": part.step, "weight": part.proportion}
            for part in plan.inputs
        ],
        "effective_number": plan.figures.effective_number,
        "mean_age": plan.figures.mean_age,
        "amplification": plan.figures.amplification,
        "averaged": [decision.spec.name for decision in plan.averaged],
        "carried": {decision.spec.name: decision.reason for decision in plan.carried},
        "paired": {name: list(others) for name, others in plan.paired.items()},
        "differing": list(report.differing) if report else None,
        "optimizer_tensors": len(plan.others) if plan.keep_others else 0,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "disk_bytes": plan.disk_bytes,
        "projected_memory": plan.projected_memory,
        "block": plan.block,
        "workers": plan.workers,
    }


def _made_as_text(made: Sequence[tuple[Plan, Report | None]]) -> Iterator[str]:
    """Describe one average, or what several have in common and then each of them."""
    plan, report = max(made, key=lambda parts: len(parts[0].inputs))
    several = len(made) > 1
    title, *names = padded(["inputs, oldest first", *(part.path for part in plan.inputs)])
    yield f"{title}  {'step':>10}" + "  weight" * (not several)
    for name, part in zip(names, plan.inputs, strict=True):
        proportion = "" if several else f"  {part.proportion:.4f}"
        yield f"{name}  {spell_number(part.step):>10}{proportion}"
    if not several:
        yield cli_weights.figures_line(plan.schedule, plan.figures, len(plan.inputs))
    averaged = sum(decision.spec.size for decision in plan.averaged)
    yield f"averaged: {count_of(len(plan.averaged), 'tensor')}, {averaged:,} numbers"
    if plan.paired:
        yield f"paired by position: {count_of(len(plan.paired), 'tensor')} of other names"
        yield from shortened(
            [f"  {name} = {', '.join(others)}" for name, others in plan.paired.items()],
            _SHOWN_PAIRS,
        )
    if plan.carried:
        yield f"carried over from the newest: {count_of(len(plan.carried), 'tensor')}"
        differing = set(report.differing) if report else set()
        yield from shortened(
            [
                f"  {decision.spec.name}: {decision.reason}"
                + (", and the inputs differ" if decision.spec.name in differing else "")
                for decision in plan.carried
            ]
        )
    if plan.others:
        what = "carried over" if plan.keep_others else "left out"
        yield f"optimizer state: {count_of(len(plan.others), 'tensor')} {what}"
    if not plan.patches:
        yield "another format: only the tensors are written, no configuration"
    yield (
        f"memory: at most {plan.projected_memory / MIB:.0f} MiB of "
        f"{plan.options.max_memory / MIB:.0f} MiB (blocks of {plan.block:,} numbers, "
        f"{count_of(plan.workers, 'worker')})"
    )
    read, written = bytes_of(plan.bytes_read), bytes_of(plan.bytes_written)
    yield f"disk: {bytes_of(sum(plan.disk_bytes for plan, _ in made))}"
    verb = "would write" if report is None else "wrote"
    if not several:
        yield f"{verb} {plan.output}: {read} read, {written} written"
        return
    yield f"{read} read once, {written} written to each of {len(made)} files"
    for each, _ in made:
        yield f"{verb} {each.output}"
        yield "  " + cli_weights.figures_line(each.schedule, each.figures, len(each.inputs))
