"""What the command line's commands share: options, their types, and the words of figures."""

from __future__ import annotations

import argparse
import functools
import re
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from wavg.alignment import ALIGNMENTS
from wavg.dtypes import DTYPES
from wavg.formats import FORMATS
from wavg.options import MIB, parse_size
from wavg.printable import printable

__all__ = [
    "Once",
    "Parser",
    "add_command",
    "add_direction",
    "add_inputs",
    "add_isolate",
    "add_json",
    "add_limits",
    "add_metrics",
    "add_opaque",
    "add_output",
    "add_overwrite",
    "add_quiet",
    "add_tensors",
    "bytes_of",
    "count_of",
    "numbers",
    "positive",
    "shard_size",
    "shortened",
    "size",
    "tell_json",
]

T = TypeVar("T")


class _Help(argparse.HelpFormatter):
    """Help whose texts are wrapped, but for examples, which are to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example:"):
            return text
        return super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser whose options stand in titled parts, and whose errors are printable.

    Its commands have the same.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Help, **settings)
        self._parts: dict[str, Any] = {}

    def part(self, title: str) -> Any:
        """Return the part of that title, a new one behind the others if there is none."""
        if title not in self._parts:
            self._parts[title] = self.add_argument_group(title)
        return self._parts[title]

    def error(self, message: str) -> NoReturn:
        """End with a usage error."""
        super().error(f"{printable(message)}; `{self.prog} --help` tells more")


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    purpose: str,
    usage: str,
    example: str,
) -> Parser:
    """Begin a command; `run` is called with its options.

    The `usage` has what must be given; in the help text are all options.
    """
    command: Parser = commands.add_parser(
        name,
        help=purpose,
        usage=f"%(prog)s {usage}",
        description=purpose[0].upper() + purpose[1:] + ".",
        epilog=f"example:\n{textwrap.indent(textwrap.dedent(example).strip(), '  ')}",
    )
    command.set_defaults(run=run, command=command)
    command._negative_number_matcher = re.compile(r"-[\d.].*")  # so that -1,2 is no option
    return command


def add_inputs(command: Parser) -> None:
    """Add the checkpoints, and what says their order."""
    add = command.part("inputs").add_argument
    add("inputs", metavar="INPUT", nargs="+", help="a checkpoint file, a folder of them, or a glob")
    add(
        "--steps",
        type=numbers,
        metavar="A,B,...",
        help="the checkpoints' steps (default: by name, else by metadata)",
    )
    add(
        "--order",
        choices=("natural", "given"),
        default="natural",
        help="sort inputs (model_9 before model_10) or keep them as given (default: %(default)s)",
    )


def add_output(command: Parser, purpose: str, *, required: bool = False) -> None:
    """Add the file to write."""
    endings = [suffix for row in FORMATS for suffix in row.suffixes]
    command.part("output").add_argument(
        "-o",
        "--output",
        required=required,
        metavar="OUTPUT",
        help=f"{purpose}; its name ends with {', '.join(endings)}, or is that of a folder if the "
        "newest checkpoint is one",
    )


def add_overwrite(command: Parser, what: str) -> None:
    """Add ``--overwrite``."""
    command.part("output").add_argument("--overwrite", action="store_true", help=f"replace {what}")


def add_tensors(command: Parser) -> None:
    """Add what is averaged, and how files are read."""
    add = command.part("numbers").add_argument
    add("--include", action="append", default=[], metavar="GLOB", help="average only these tensors")
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="take these tensors from the newest checkpoint",
    )
    add(
        "--align",
        choices=ALIGNMENTS,
        default="name",
        help="which tensors belong together: those of one name, or of one position, for runs whose "
        "automatic names differ (default: %(default)s)",
    )
    floats = [entry.name for entry in DTYPES if entry.kind == "float"]
    add(
        "--dtype",
        choices=floats,
        metavar="D",
        help="write averaged tensors in this format: " + ", ".join(floats[:4]) + " ...",
    )
    add("--allow-nonfinite", action="store_true", help="let NaN and infinities through")
    add_opaque(command)


def add_direction(command: Parser, title: str, *, required: bool) -> None:
    """Add which score is better: ``maximize`` is True, False, or None where nothing was said."""
    group = command.part(title).add_mutually_exclusive_group(required=required)
    group.add_argument(
        "--maximize", action="store_true", default=None, help="higher is better (an accuracy)"
    )
    group.add_argument(
        "--minimize", dest="maximize", action="store_false", help="lower is better (a loss)"
    )


def add_metrics(command: Parser, note: str = "") -> None:
    """Add a table of recorded metrics, and a note on it."""
    add = command.part("recorded metrics").add_argument
    add(
        "--metrics",
        metavar="FILE",
        help="a .json, .jsonl or .csv of recorded metrics by name, step or epoch, such as Keras' "
        "CSVLogger or Hugging Face's trainer_state.json" + note,
    )
    add("--metric", metavar="COLUMN", help="which metric, where FILE has several")
    add(
        "--first-epoch",
        type=int,
        choices=(0, 1),
        help="what the checkpoints' names call the first epoch of a FILE that counts from 0, where "
        "that is not plain",
    )


def add_limits(command: Parser) -> None:
    """Add the limits of memory and threads."""
    add = command.part("resources").add_argument
    add(
        "--max-memory",
        type=size,
        default=64 * MIB,
        metavar="SIZE",
        help="memory beyond the interpreter (default: 64MiB)",
    )
    add("--workers", type=positive, metavar="N", help="threads (default: the cores available)")


def add_json(command: Parser) -> None:
    """Add ``--json``."""
    add = command.part("printing").add_argument
    add("--json", action="store_true", help="print one JSON object, of an error (exit code 1) too")


def tell_json(options: argparse.Namespace, text: str) -> None:
    """Print the one JSON object that ``--json`` asks for."""
    options.json_told = True
    print(text)


def add_quiet(command: Parser) -> None:
    """Add ``--quiet``."""
    add = command.part("printing").add_argument
    add("--quiet", action="store_true", help="print nothing but errors and warnings")


def add_opaque(command: Parser) -> None:
    """Add what numbers without a name are."""
    command.part("numbers").add_argument(
        "--opaque-dtype", choices=("bfloat16",), help="what unnamed two-byte values of a .h5 are"
    )


def add_isolate(command: Parser) -> None:
    """Add where files of HDF5 are looked into."""
    command.part("trust").add_argument(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="look into HDF5 files in a process of its own, which a hostile file may crash",
    )


def _reader(what: str) -> Callable[[Callable[[str], T]], Callable[[str], T]]:
    """Make a function that reads a text an option's type, which says what it expects."""

    def decorate(read: Callable[[str], T]) -> Callable[[str], T]:
        @functools.wraps(read)
        def reading(text: str) -> T:
            try:
                return read(text)
            except (ValueError, OverflowError):
                raise argparse.ArgumentTypeError(f"expected {what}, not {text!r}") from None

        return reading

    return decorate


@_reader("a whole number from 1 to 1,000,000")
def positive(text: str) -> int:
    """Read a count."""
    number = int(text)
    if not 1 <= number <= 1_000_000:
        raise ValueError
    return number


@_reader("numbers with commas between them")
def numbers(text: str) -> list[float]:
    """Read numbers with commas."""
    return [float(part) for part in text.split(",")]


@_reader("a size such as 64MiB, 512MB or a number of bytes")
def size(text: str) -> int:
    """Read a size in bytes."""
    return parse_size(text)


@_reader("a size above zero, such as 5GB")
def shard_size(text: str) -> int:
    """Read a size of at least a byte."""
    size = parse_size(text)
    if size < 1:
        raise ValueError
    return size


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending * (number != 1)}"


def bytes_of(number: int) -> str:
    """Return a size in words."""
    size = float(number)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


class Once(argparse.Action):
    """An option that must not be given again, lest the last one be taken without a word."""

    why = ""

    def __call__(  # noqa: D102 - argparse's own
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice{self.why}")
        setattr(namespace, self.dest, values)


_SHOWN = 12  # rows of a long list before the rest is counted


def shortened(lines: list[str], most: int = _SHOWN) -> list[str]:
    """Return so many lines at most, the last of which counts those left out."""
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], f"  ... and {len(lines) - most + 1:,} more"]
