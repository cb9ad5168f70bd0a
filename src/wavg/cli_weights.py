"""``wavg weights``: schedules shown as numbers, bars, figures of merit, and in a picture."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from wavg import weights as schedules
from wavg.cli_options import add_command, add_json, numbers, positive, tell_json
from wavg.formats import open_file
from wavg.grid import in_time, weigh
from wavg.inputs import expand
from wavg.printable import printable
from wavg.schedule import spell_number

__all__ = ["add_weights", "amplifies", "figures_line", "gathered", "glyph", "known"]


def known() -> str:
    """Return what a SPEC may be, for a help text."""
    return (
        f"{', '.join(schedules.KNOWN)}; or numbers, oldest first, such as 1,2,3; or a file that "
        "lists them, weights.json or weights.csv"
    )


def add_weights(commands: Any) -> None:
    """Declare ``wavg weights``."""
    command = add_command(
        commands,
        "weights",
        _run,
        "show the weights of a schedule",
        "SPEC (-n N | --steps A,B,... | INPUT...) [OPTION...]",
        "wavg weights linear -n 10 --compare ema:decay=0.8 --plot weights.png",
    )
    add = command.part("weights").add_argument
    add("spec", metavar="SPEC", nargs="?", help=known())
    add(
        "--compare",
        action="append",
        default=[],
        metavar="SPEC",
        help="show this schedule, too; may be given several times",
    )
    add(
        "--list",
        action="store_true",
        help="list all schedules with their parameters; as without a SPEC",
    )
    add = command.part("of which checkpoints").add_argument
    add("inputs", metavar="INPUT", nargs="*", help="checkpoints, for their steps")
    add("-n", type=positive, metavar="N", help="N of them, one step apart")
    add("--steps", type=numbers, metavar="A,B,...", help="those at these steps")
    command.part("printing").add_argument(
        "--plot", metavar="FILE", help="draw the weights into a picture, .png, .svg or .pdf"
    )
    add_json(command)


def _run(options: argparse.Namespace) -> None:
    """Show what was asked for."""
    given = [bool(options.inputs), options.n is not None, options.steps is not None]
    if options.list or not (options.spec or any(given)):
        if options.json:
            tell_json(options, json.dumps(schedules.parameters(), indent=2))
        else:
            print("\n".join(_listing()))
        return
    if options.spec is None:
        options.command.error("say which weights: a SPEC, as wavg weights --list shows them")
    rules = [schedules.resolve(text) for text in (options.spec, *options.compare)]
    if not any(given):
        options.n = rules[0].count
    if sum(given) > 1 or (not any(given) and options.n is None):
        options.command.error("say for which checkpoints: one of -n N, --steps A,B,... or INPUT...")
    with gathered() as notes:
        steps, rows = _rows(options, rules)
    merits = [schedules.figures(row, steps) for row in rows]
    if options.plot:
        from wavg import picture

        picture.draw(options.plot, steps, [*zip(map(str, rules), merits, strict=True)])
    if options.json:
        told = [
            _as_json(str(rule), steps, merit) for rule, merit in zip(rules, merits, strict=True)
        ]
        tell_json(options, json.dumps(told[0] if len(told) == 1 else {"schedules": told}, indent=2))
        return
    for number, (rule, merit) in enumerate(zip(rules, merits, strict=True)):
        if number:
            print()
        print("\n".join(_chart(str(rule), steps, merit)))
    print("".join(f"{note}\n" for note in notes), end="")
    if options.plot:
        print(printable(f"drew {options.plot}"))


@contextlib.contextmanager
def gathered() -> Iterator[list[str]]:
    """Gather what `post_hoc_ema` warns of, as notes; `amplifies` says the rest."""
    notes = list[str]()
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", "post_hoc_ema")
            yield notes
    finally:
        for warning in caught:
            said = str(warning.message)
            if not said.startswith("post_hoc_ema"):
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
            elif "amplification" not in said and f"note: {said}" not in notes:
                notes.append(f"note: {said}")


def _listing() -> Iterator[str]:
    yield "NAME, or NAME:KEY=VALUE,... with these keys and their defaults; [KEY] has none"
    for name, parameters in schedules.parameters().items():
        keys = [f"[{key}]" if said is None else f"{key}={said}" for key, said in parameters.items()]
        yield f"\n{name}{':' * bool(keys)}{','.join(keys)}"
        yield f"    {schedules.purpose(name)}"
    yield "\n0.2,0.3,0.5\n    Weights of one's own, oldest checkpoint first."
    yield "\nweights.json, weights.csv\n    A file that lists them, in order or by name."


def _rows(
    options: argparse.Namespace, rules: Sequence[schedules.Schedule]
) -> tuple[tuple[float, ...], list[schedules.F64]]:
    """Return the steps and each schedule's weights."""
    if options.inputs:
        opening = partial(open_file, isolate=True)
        paths, steps = in_time(expand(options.inputs, sort=True), None, rules, opening)
        return steps, [weigh(rule, paths, steps, opening) for rule in rules]
    given = options.steps or range(1, options.n + 1)
    for rule in rules:
        steps = schedules.check_steps(given, repeats=rule.repeats)
    return steps, [rule(steps) for rule in rules]


def _as_json(text: str, steps: Sequence[float], merit: schedules.Figures) -> dict[str, Any]:
    return {
        "weights": text,
        "steps": list(steps),
        "coefficients": merit.proportions.tolist(),
        "effective_number": merit.effective_number,
        "mean_age": merit.mean_age,
        "amplification": merit.amplification,
    }


def _chart(text: str, steps: Sequence[float], merit: schedules.Figures) -> Iterator[str]:
    block = glyph("█", "#")
    largest = max(abs(merit.proportions))
    yield f"{'step':>10}  weight"
    for step, weight in zip(steps, merit.proportions.tolist(), strict=True):
        bar = (block if weight >= 0 else "-") * round(40 * abs(weight) / largest)
        yield f"{spell_number(step):>10}  {weight:8.5f}  {bar}"
    yield figures_line(text, merit, len(steps), always=True)
    if merit.amplification > schedules.AMPLIFIES:
        yield amplifies(merit)


def figures_line(text: str, merit: schedules.Figures, count: int, *, always: bool = False) -> str:
    """Describe weights in one line; an amplification of 1 only if `always`."""
    line = (
        f"weights {printable(text)}: effective number {merit.effective_number:.2f} of {count}, "
        f"mean age {merit.mean_age:.4g} steps"
    )
    if always or merit.amplification > 1.0000001:
        line += f", amplification {merit.amplification:.3g}"
    return line


def amplifies(merit: schedules.Figures) -> str:
    """Say what a large amplification does."""
    return (
        f"note: rounding and noise in the inputs come out {merit.amplification:.3g} times as large"
    )


def glyph(fine: str, plain: str) -> str:
    """Choose what the terminal can show."""
    return fine if "utf" in (sys.stdout.encoding or "").lower() else plain
