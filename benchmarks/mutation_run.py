"""Run tests against mutants: a plugin of pytest, and the switch that mutated modules import.

Everything is imported and collected once. The tests run once on the originals, which shows what
each of them reaches and how long it takes; then, for each mutant, those that reach its function run
in a fork of that process until one fails or their time is over: those first that told another
mutant of it, then quick ones. Before that the originals have to pass in such a fork, too, and a
fork that ends in any way that is no test's or mutant's own ends the run. See mutation.py.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import math
import mmap
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MutantDict = dict[str, Callable[..., Any]]

active = ""  # the mutant that takes the place of its function
reached: set[str] = set()  # functions that were called
ORIGINAL = "original"  # takes the place of no function
# How forks end: by themselves, by a test that fails or by what a mutant may do to its own process.
# SIGKILL is none of these: it is the system's that lacks memory, or another one's.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
OUTCOMES = {
    0: "survived",
    1: "killed",
    -signal.SIGXCPU: "timed out",
    **{-number: "killed" for number in CRASHES},
}


def stem_of(name: str) -> str:
    """Return what the names of a function's mutants have in common."""
    return name.partition("__mutmut_")[0]


def switch(mutants: MutantDict, is_classmethod: bool = False) -> Callable[..., Any]:
    """Decorate a function so that calls go to it, or to the mutant of it that is active."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            chosen = mutants["_mutmut_orig"]
            if active:
                module, _, key = active.rpartition(".")
                if module == function.__module__:
                    chosen = mutants.get(key, chosen)
            else:
                reached.add(f"{function.__module__}.{stem_of(chosen.__name__)}")
            if is_classmethod:
                return getattr(args[0], chosen.__name__)(*args[1:], **kwargs)
            return chosen(*args, **kwargs)

        return call

    return decorate


class Forks:
    """Takes the place of pytest's loop over the tests."""

    def __init__(self, folder: Path) -> None:
        self._asked: list[str] = json.loads((folder / "asked.json").read_text())
        self._folder, self._outcomes = folder, folder / "outcomes.jsonl"
        self._deadline = time.time() + 60 * float(os.environ["MUTATION_MINUTES"])
        self._failed = False
        self._seconds: dict[Any, float] = {}
        self._items_of: dict[str, list[Any]] = {}
        self._told: dict[str, dict[Any, int]] = {}  # how often a test told mutants of a function
        self._budget = float(os.environ["MUTATION_SECONDS"])
        self._killer = mmap.mmap(-1, 4)  # the place of the test that failed, told by a child

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo) -> None:
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            if active:
                os._exit(1)  # before it is told in so many words
            self._failed = True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            reached.clear()
            start = time.process_time()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self._seconds[item] = time.process_time() - start
            for name in reached:
                self._items_of.setdefault(name, []).append(item)
        if self._failed:
            raise pytest.UsageError("tests fail without any mutation")
        terminal = session.config.pluginmanager.getplugin("terminalreporter")
        session.config.pluginmanager.unregister(terminal)
        gc.freeze()  # so that forks share it
        every = list(self._seconds)
        if (outcome := self._run(ORIGINAL, every, math.inf)) != "survived":
            at = every[self._place()].nodeid
            raise pytest.UsageError(f"without any mutation a fork is {outcome}, at {at}")
        with open(self._outcomes, "a") as file:
            for number, name in enumerate(self._asked):
                if time.time() > self._deadline:
                    break
                print(name, self._outcome(name), sep="\t", file=file, flush=True)
                if sys.__stderr__.isatty():
                    print(f"\r{number + 1} of {len(self._asked)}", end="", file=sys.__stderr__)
        os._exit(0)

    def _outcome(self, name: str) -> str:
        compiled = self._library(name).exists()
        stem = ".so" if compiled else stem_of(name)
        items = list(self._seconds) if compiled else self._items_of.get(stem, [])
        if not items:
            return "untested"
        told = self._told.setdefault(stem, {})
        items = sorted(items, key=lambda item: (-told.get(item, 0), self._seconds[item]))
        outcome = self._run(name, items, self._budget)
        if outcome == "killed":
            killer = items[self._place()]
            told[killer] = told.get(killer, 0) + 1
            self._seconds[killer] /= 2  # it is worth more
        return outcome

    def _run(self, name: str, items: list[Any], budget: float) -> str:
        """Run tests in a fork, for so many seconds of processor time."""
        child = os.fork()
        if not child:
            self._judge(name, items, budget)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status not in OUTCOMES:
            at = items[self._place()].nodeid
            raise pytest.UsageError(f"{name}: a fork ended with status {status}, at {at}")
        return OUTCOMES[status]

    def _library(self, name: str) -> Path:
        return self._folder / f"{name}.so"  # a mutant of the compiled step

    def _place(self) -> int:
        return int.from_bytes(self._killer[:], "little")

    def _judge(self, name: str, items: list[Any], budget: float) -> None:
        """Run tests in a child; never returns. A mutant may loop, or ask for all memory."""
        global active
        active = name
        gc.disable()
        library = self._library(name)
        seconds = 10 + int(4 * min(budget, 10 + sum(map(self._seconds.get, items))))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        if "ASAN_OPTIONS" not in os.environ:  # which asks for addresses, not for memory
            resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            if library.exists():
                spec = importlib.util.spec_from_file_location("wavg._compiled", library)
                module = importlib.util.module_from_spec(spec)
                sys.modules["wavg.compiled"]._compiled = module  # type: ignore[attr-defined]
            for place, item in enumerate(items):
                if time.process_time() > budget:
                    break
                self._killer[:] = place.to_bytes(4, "little")
                following = items[place + 1] if place + 1 < len(items) else None
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        except BaseException:
            os._exit(1)
        os._exit(0)


def pytest_configure(config: pytest.Config) -> None:
    folder = os.environ.get("MUTATION_FOLDER")
    if folder:
        config.pluginmanager.register(Forks(Path(folder)))
