"""The journal of a long series of evaluations: JSON lines, each on disk before the next is begun.

The first line says what the series is; a journal of another one is refused. Each evaluation has a
line when it begins and one with what came of it, so that one during which the process died is
known. It is tried once more, for that may have been a power cut.
"""

from __future__ import annotations

import collections
import json
import os
import stat
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from wavg.destinations import refuse_unnamable
from wavg.errors import WavgError
from wavg.evaluation import Outcome
from wavg.publish import failures
from wavg.renames import sync_file, sync_folder

try:
    import fcntl
except ImportError:  # Windows: nobody is kept from a journal in use
    fcntl = None  # type: ignore[assignment]

__all__ = ["Journal"]

_HEAD = b'{"wavg"'
_TORN = "its last line may be torn, which the next run to it mends"
_KILLED = "killed: the process ended during this evaluation, twice"


class Journal:
    """Outcomes of evaluations by their keys; remembered in a file if there is one.

    Parameters
    ----------
    path
        The file; one that exists is continued. None keeps nothing.
    series
        What the series is: plain data.
    fatal
        Whether an evaluation can end the process: one that twice began and did not end is then
        recorded as killed.

    Raises
    ------
    WavgError
        The file is no journal, of another series, or in use.
    OutputError
        The system does not let it be written.
    """

    def __init__(self, path: str | None, series: Mapping[str, Any], *, fatal: bool = True) -> None:
        self.path, self._fatal = path, fatal
        self.outcomes: dict[str, Outcome] = {}
        self._descriptor = -1
        if path is None:
            return
        refuse_unnamable(path)
        with failures(path, path):
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise WavgError(f"{path} is no file, as a journal has to be", path=path)
            self._lock(path)
            with failures(path, path, _TORN):
                self._resume(path, json.loads(json.dumps(dict(series))))
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def begin(self, key: str) -> None:
        """Note that an evaluation is under way."""
        self._write({"begun": key})

    def end(self, key: str, outcome: Outcome) -> None:
        """Note what came of an evaluation."""
        self.outcomes[key] = outcome
        line: dict[str, Any] = {"done": key, "score": outcome.score}
        if outcome.error:
            line["error"] = outcome.error
        if outcome.examples is not None:
            line["examples"] = [
                int(value) if value.is_integer() else value for value in outcome.examples.tolist()
            ]
        self._write({**line, "seconds": round(outcome.seconds, 6)})

    def stop(self, key: str) -> None:
        """Note that an evaluation was stopped and is to be tried again, unless its end is noted."""
        self._write({"stopped": key})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.path is None or self._descriptor < 0:
            return
        data = (json.dumps(line) + "\n").encode()
        with failures(self.path, self.path, _TORN):
            while data:
                data = data[os.write(self._descriptor, data) :]
            sync_file(self._descriptor)

    def _lock(self, path: str) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WavgError(f"{path} is in use by another process", path=path) from None
        except OSError:  # a file system without locks, where nobody is kept from it either
            return

    def _resume(self, path: str, series: dict[str, Any]) -> None:
        with open(path, "rb") as file:
            data = file.read()
        whole = data.rfind(b"\n") + 1  # what follows was torn off when the process ended
        lines = data[:whole].splitlines()
        if not lines and data and not data.startswith(_HEAD):
            raise _no_journal(path, 1)
        entries = [_parsed(path, *line) for line in enumerate(lines, start=1)]
        if entries:
            head = entries[0]
            if head.pop("wavg", None) != 1:
                raise _no_journal(path, 1)
            if head != series:
                raise WavgError(
                    f"{path} is the journal of another series of evaluations; name another file, "
                    "or remove this one:",
                    path=path,
                    differences=list(_differences(head, series)),
                )
        os.ftruncate(self._descriptor, whole)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        if entries:
            self._read(path, entries)
        else:
            self._write({"wavg": 1, **series})
            sync_folder(os.path.dirname(os.path.realpath(path)))  # its name is to stay, too

    def _read(self, path: str, entries: list[dict[str, Any]]) -> None:
        begun: collections.Counter[str] = collections.Counter()
        line = 1
        try:
            for entry in entries[1:]:
                line += 1
                if "begun" in entry:
                    begun[entry["begun"]] += 1
                elif "stopped" in entry:
                    begun[entry["stopped"]] -= 1
                else:
                    self.outcomes[entry["done"]] = _outcome(entry)
        except (TypeError, KeyError, ValueError):
            raise _no_journal(path, line) from None
        for key, times in begun.items():
            if self._fatal and times > 1 and key not in self.outcomes:
                self.end(key, Outcome(None, _KILLED))

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def _parsed(path: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise _no_journal(path, number)
    return entry


def _outcome(entry: Mapping[str, Any]) -> Outcome:
    examples = entry.get("examples")
    return Outcome(
        entry["score"],
        entry.get("error", ""),
        None if examples is None else np.array(examples, np.float64),
        entry["seconds"],
    )


def _no_journal(path: str, line: int) -> WavgError:
    return WavgError(
        f"{path} is no journal of wavg's: cannot understand line {line}; name another file",
        path=path,
    )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say in what a journal's series is not the one asked for."""
    lines = []
    for key in dict.fromkeys([*found, *wanted]):
        old, new = found.get(key), wanted.get(key)
        if old == new:
            continue
        if isinstance(old, list) and isinstance(new, list):
            gone = [item for item in old if item not in new]
            came = [item for item in new if item not in old]
            text = [f"there {_some(gone)}"] * bool(gone) + [f"now {_some(came)}"] * bool(came)
            lines.append(f"{key}: {', '.join(text) or 'another order'}")
        else:
            lines.append(f"{key}: there {json.dumps(old)}, now {json.dumps(new)}")
    return lines


def _some(items: list[Any]) -> str:
    text = ", ".join(json.dumps(item) for item in items[:3])
    return text + f" and {len(items) - 3:,} more" * (len(items) > 3)
