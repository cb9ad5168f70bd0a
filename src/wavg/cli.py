"""The command line as a whole: commands, which are modules beside it, signals, errors."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import wavg
from wavg import cli_average, cli_inspect, cli_sweep, cli_weights
from wavg.cli_options import Parser, add_command, shortened
from wavg.errors import WavgError
from wavg.kernel import COMPILED
from wavg.printable import printable

__all__ = ["main"]

_BOTH_NAMES = re.compile(r"\b[a-z]\w*(?:=\S+)? \((--[a-z][^()]*)\)")  # overwrite=True (--overwrite)
_SHOWN_DIFFERENCES = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 done, 1 an error, 2 usage, 128 + a signal."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name the terminal cannot show
    ended: list[int] = []
    options = argparse.Namespace()
    try:
        with _terminable(ended), _warnings_in_a_line():
            options = _parsed(words)
            options.run(options)
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough (`| head`)
        _drop_output()
    except KeyboardInterrupt as stop:
        told = stop.args[0] if stop.args else "interrupted; nothing is half-written"
        print(f"wavg: {told}", file=sys.stderr)
        return 128 + (ended[0] if ended else signal.SIGINT)
    except (WavgError, OSError) as error:
        lines = shortened(_told(error).split("\n"), _SHOWN_DIFFERENCES)
        print("\n".join(lines), file=sys.stderr)
        if _unprinted(error):
            _drop_output()
        elif getattr(options, "json", False) and not hasattr(options, "json_told"):
            return _print_error(error)
        return 1
    return 0


def _print_error(error: Exception) -> int:
    """Print an error as the JSON object that was asked for; return the exit code."""
    try:
        print(json.dumps({"error": _error_as_json(error)}, indent=2))
        sys.stdout.flush()
    except OSError:  # there is one error to tell, and it was told
        _drop_output()
    return 1


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parser()
    if words and words[0] in commands:  # options and inputs may be mixed
        return commands[words[0]].parse_intermixed_args(words[1:])
    return parser.parse_args(words)


def _drop_output() -> None:
    """Have what is still to be printed go nowhere, at the interpreter's end, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unprinted(error: Exception) -> bool:
    """Whether it was printing that the system refused: of files, errors have the names.

    But not of the current folder, which is not there if it was removed.
    """
    if isinstance(error, (WavgError, FileNotFoundError)) or not isinstance(error, OSError):
        return False
    return error.errno is not None and not error.filename


def _told(error: Exception) -> str:
    if isinstance(error, WavgError):
        return "wavg: " + _BOTH_NAMES.sub(r"\1", str(error))
    return printable(f"wavg: {_message(error)}")


def _message(error: Exception) -> str:
    """Return what an error says, with names as they are, and options as they are called here."""
    if isinstance(error, WavgError):
        return _BOTH_NAMES.sub(r"\1", error.message)
    if _unprinted(error):
        why = os.strerror(getattr(error, "errno", 0))
        return f"standard output takes no more: {why}; what was done by then stands"
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    if not error.filename:
        return "the current folder is no more, and names are looked for in it; change to another"
    advice = "; ask whoever owns it for access, or name only what you may read"
    return f"{error.filename}: {error.strerror}" + advice * isinstance(error, PermissionError)


def _error_as_json(error: Exception) -> dict[str, Any]:
    path = getattr(error, "path", None) or getattr(error, "filename", None)
    return {
        "type": type(error).__name__,
        "message": _message(error),
        "path": None if path is None else str(path),
        "tensor": getattr(error, "tensor", None),
        "differences": list(getattr(error, "differences", None) or ()),
    }


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print wavg's own warnings as a person can use them; those of others keep their place."""
    before, own = warnings.showwarning, os.path.dirname(wavg.__file__) + os.sep

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if filename.startswith(own):
            print(printable(f"wavg: warning: {message}"), file=sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextlib.contextmanager
def _terminable(ended: list[int]) -> Iterator[None]:
    """End on SIGTERM and SIGHUP as on Ctrl-C, so that nothing half-written stays behind.

    The signal is added to those that `ended` it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: object) -> None:
        ended.append(number)
        raise KeyboardInterrupt

    ends = [getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGHUP")]
    heard = [n for n in ends if n and signal.getsignal(n) != signal.SIG_IGN]  # but for nohup
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _version() -> str:
    step = "compiled" if COMPILED else "in NumPy: no C compiler when it was installed"
    return f"wavg {wavg.__version__} (kernel {step})"


def _parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="wavg",
        description="Average the checkpoints of a training run, file to file.",
        epilog="`wavg COMMAND --help` has a command's options and an example.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    cli_average.add_average(commands)
    cli_weights.add_weights(commands)
    cli_inspect.add_inspect(commands)
    cli_inspect.add_verify(commands)
    cli_sweep.add_sweep(commands)
    cli_sweep.add_soup(commands)
    command = add_command(
        commands,
        "demo",
        _demo,
        "the whole story on a real training run",
        "[FOLDER]",
        "wavg demo wavg-demo",
    )
    command.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        default="wavg-demo",
        help="where its checkpoints and picture go (default: wavg-demo)",
    )
    return parser, commands.choices


def _demo(options: argparse.Namespace) -> None:
    from wavg import demo

    result = demo.run(options.folder)
    print(demo.story(result))


if __name__ == "__main__":
    sys.exit(main())
