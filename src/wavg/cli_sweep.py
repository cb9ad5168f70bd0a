"""The commands that run experiments: ``wavg sweep`` and ``wavg soup``."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from wavg.cli_options import (
    Once,
    Parser,
    add_command,
    add_direction,
    add_inputs,
    add_isolate,
    add_json,
    add_metrics,
    add_output,
    add_overwrite,
    add_quiet,
    add_tensors,
    bytes_of,
    count_of,
    positive,
    size,
    tell_json,
)
from wavg.cli_weights import known
from wavg.destinations import is_stream, refuse_existing
from wavg.errors import WavgError
from wavg.printable import printable

__all__ = ["add_soup", "add_sweep"]

_USAGE = (
    "INPUT... (--evaluate MODULE:FUNCTION | --evaluate-command COMMAND) (--maximize | --minimize) "
    "[OPTION...]"
)
_PASSED_ON = (
    "evaluate_command",
    "timeout",
    "maximize",
    "last",
    "steps",
    "dtype",
    "include",
    "exclude",
    "align",
    "allow_nonfinite",
    "opaque_dtype",
    "isolate",
    "output",
    "overwrite",
    "journal",
)


def add_sweep(commands: Any) -> None:
    """Add ``wavg sweep``."""
    command = add_command(
        commands,
        "sweep",
        _sweep,
        "score the newest n checkpoints averaged, for n = 1 ... N, by one or several schedules",
        _USAGE,
        "wavg sweep run/model_*.h5 --evaluate score:accuracy --maximize --weights linear\n"
        "where score.py in this folder has a function accuracy(tensors) of a dict of arrays",
    )
    _add_evaluation(command)
    command.part("weights").add_argument(
        "--weights",
        action="append",
        metavar="SPEC",
        help=f"{known()} (default: equal); several times: a line each",
    )
    add_output(command, "write the best average here")
    add = command.part("output").add_argument
    add("--csv", metavar="FILE", help="write the scores here")
    add("--plot", metavar="FILE", help="draw them here: .png, .svg, .pdf (needs matplotlib)")
    add_overwrite(command, "existing outputs")
    add_tensors(command)
    command.part("resources").add_argument(
        "--max-memory",
        type=size,
        metavar="SIZE",
        help="the most that running sums take, in memory, or on disk for a command; with less the "
        "checkpoints are read more often (default: four sums, on disk sixteen, or 256MiB if that "
        "is more)",
    )
    add_isolate(command)
    add_json(command)
    add_quiet(command)


def add_soup(commands: Any) -> None:
    """Add ``wavg soup``."""
    command = add_command(
        commands,
        "soup",
        _soup,
        "average those checkpoints that do not make the average's score worse, best first",
        _USAGE,
        'wavg soup run/*.h5 --evaluate-command "python score.py {}" --minimize -o soup.h5',
    )
    _add_evaluation(command)
    command.part("evaluation").add_argument(
        "--budget",
        type=positive,
        metavar="N",
        help="the most evaluations in all: each checkpoint alone, then the soup with each",
    )
    add_metrics(
        command,
        "; --maximize and --minimize mean the metric and the score alike",
    )
    add_output(command, "write the soup here")
    add_overwrite(command, "an existing output")
    add_tensors(command)
    add_isolate(command)
    add_json(command)
    add_quiet(command)


def _add_evaluation(command: Parser) -> None:
    add_inputs(command)
    add = command.part("inputs").add_argument
    add("--last", type=positive, action=_OneLength, metavar="N", help="only the newest N")
    part = command.part("evaluation")
    how = part.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--evaluate",
        metavar="MODULE:FUNCTION",
        help="a Python function of a model's tensors (a dict of arrays) that returns its score, or "
        "an array of the scores of single examples; modules of the current folder are found",
    )
    how.add_argument(
        "--evaluate-command",
        metavar="COMMAND",
        help="a command that scores the checkpoint {}, run without a shell; the last number it "
        "prints is the score",
    )
    add_direction(command, "evaluation", required=True)
    add = part.add_argument
    add("--timeout", type=float, metavar="SECONDS", help="end a COMMAND that takes longer")
    add(
        "--journal",
        metavar="FILE",
        help="remember every score here; the same command goes on from there after a stop",
    )


class _OneLength(Once):
    why = "; all lengths up to N are tried anyway"


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        **{name: getattr(options, name) for name in _PASSED_ON},
        "sort": options.order == "natural",
        "progress": not (options.quiet or options.json),
    }


def _sweep(options: argparse.Namespace) -> None:
    from wavg.sweeps import sweep

    _refuse(options)
    with _apart():
        result = sweep(
            options.inputs,
            options.evaluate,
            weights=options.weights or "equal",
            max_memory=options.max_memory,
            **_arguments(options),
        )
    if options.json:
        tell_json(options, result.to_json().rstrip())
    elif not options.quiet:
        print(result)
        print(
            f"{bytes_of(result.bytes_read)} read in {count_of(result.passes, 'pass')}, "
            f"with {count_of(result.sums, 'running sum')}"
        )
    if options.csv:
        result.to_csv(options.csv, overwrite=options.overwrite)
    best = result.best  # an error if nothing could be scored
    if options.plot:
        result.plot(options.plot, overwrite=options.overwrite)
    if not (options.quiet or options.json):
        for path in filter(None, (options.output, options.csv, options.plot)):
            print(printable(f"wrote {path}"))
        if not options.output:
            words = ["--weights", str(best.weights), "--last", str(best.n), *_repeated(options)]
            print(f"to write the best: wavg average INPUT... -o OUTPUT {shlex.join(words)}")


def _refuse(options: argparse.Namespace) -> None:
    """Raise an error before a long work if its results cannot be written."""
    from wavg.sweep_picture import require

    if options.plot:
        require(options.plot)
    for path in filter(None, (options.csv, options.plot)):
        if not is_stream(path):
            refuse_existing(path, options.overwrite)
    named = [options.output, options.csv, options.plot, options.journal]
    places = [os.path.realpath(path) for path in named if path]
    for place in places:
        if places.count(place) > 1:
            raise WavgError(f"{place} is to be written twice; give each file its own name")


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Have all that an evaluator prints, its programs' words too, be no part of the results."""
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # there is no standard output, or error
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        yield


def _repeated(options: argparse.Namespace) -> list[str]:
    """Return the words that say what is averaged and how, as they were given."""
    words = []
    if options.steps:
        words += ["--steps", ",".join(map(repr, options.steps))]
    if options.order != "natural":
        words += ["--order", options.order]
    for name in ("include", "exclude"):
        for pattern in getattr(options, name):
            words += [f"--{name}", pattern]
    if options.align != "name":
        words += ["--align", options.align]
    if options.dtype:
        words += ["--dtype", options.dtype]
    if options.allow_nonfinite:
        words.append("--allow-nonfinite")
    if options.opaque_dtype:
        words += ["--opaque-dtype", options.opaque_dtype]
    return words


def _soup(options: argparse.Namespace) -> None:
    from wavg.soups import soup

    if not options.metrics and (options.metric or options.first_epoch is not None):
        options.command.error("--metric and --first-epoch are of a file that --metrics names")
    with _apart():
        result = soup(
            options.inputs,
            options.evaluate,
            budget=options.budget,
            metrics=options.metrics,
            metric=options.metric,
            first_epoch=options.first_epoch,
            **_arguments(options),
        )
    if options.json:
        tell_json(options, result.to_json().rstrip())
    elif not options.quiet:
        print(result)
        print(f"{bytes_of(result.bytes_read)} read")
        if options.output:
            print(printable(f"wrote {options.output}"))
