"""Break the code on purpose, one small change at a time, and see whether the tests tell.

    python benchmarks/mutation.py GROUP [--folder FOLDER] [--again] [--minutes 40]

GROUP is one of `GROUPS` below: modules, and the tests that judge them. mutmut makes the mutants and
runs the tests in forks of a process that has imported everything (``pip install mutmut==3.8.1``);
it works on a copy, in FOLDER, of what it needs. With ``--again`` what was killed there before stays
killed, and only the rest is run.

A mutant that no test tells from the original needs a reason in survivors.toml, found by module,
function and text, not by a number. The script fails on one without, and on a reason for nothing.
"""

from __future__ import annotations

import argparse
import collections
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tomllib
from common import figures_of, record

ROOT = Path(__file__).parent.parent
REASONS = Path(__file__).parent / "survivors.toml"


class Group(NamedTuple):
    """Modules, the tests that judge them, and further options of pytest."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()


# Tests with fixed examples only: what hypothesis draws takes longer and differs between runs.
FIXED = ("-m", "not hypothesis and not slow and not frameworks")
GROUPS = {
    "kernel": Group(
        (
            "kernel",
            "compiled",
            "tiles",
            "leftovers",
            "ieee",
            "combination",
            "rounding",
            "exact",
        ),
        ("tests/test_kernel_parts.py", "tests/test_kernel.py"),
        FIXED,
    ),
    "plan": Group(("plan",), ("tests/test_files.py",), FIXED),
}

KINDS = {
    "speed": "the same bytes, in another time or with other scratch memory",
    "same": "the same value for whatever can come",
    "wider": "a bound that is wider than it need be: more goes to the next step, to the same bytes",
}
KILLED, SURVIVED, UNTESTED = (1, 3), 0, (5, 33)
TIMED_OUT = (36, -24, 24, 152, 255)


class Mutant(NamedTuple):
    """One change, by its text."""

    module: str
    function: str
    was: str
    becomes: str

    def __str__(self) -> str:
        return f"{self.module}.{self.function}\n    - {self.was}\n    + {self.becomes}"


# --- the run --------------------------------------------------------------------------------------


def prepare(folder: Path, group: Group) -> None:
    """Copy what a run needs, and say in setup.cfg what is to be done."""
    for name in ("src", "tests"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.rmtree(folder / "mutants" / "tests", ignore_errors=True)
    (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)  # tests may have changed
    lists = {
        "source_paths": ("src/wavg",),
        "only_mutate": tuple(f"src/wavg/{module}.py" for module in group.modules),
        "pytest_add_cli_args_test_selection": group.tests,
        "pytest_add_cli_args": ("-p", "no:cacheprovider", *group.options),
    }
    text = ["[mutmut]", "timeout_multiplier = 5", "timeout_constant = 5"]
    for key, values in lists.items():
        text += [f"{key} =", *(f"    {value}" for value in values)]
    (folder / "setup.cfg").write_text("\n".join(text) + "\n")


def run(folder: Path, names: list[str], minutes: float) -> None:
    """Run mutmut, one process at a time, or end it after a while."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        subprocess.run(command, cwd=folder, env=environment, timeout=minutes * 60, check=True)
    except subprocess.TimeoutExpired:
        print(f"ended after {minutes:g} minutes; go on with --again")


def outcomes(folder: Path, module: str) -> dict[str, int | None]:
    """Return the tests' exit codes by the mutants' names; None of one that was not run."""
    path = folder / "mutants" / "src" / "wavg" / f"{module}.py.meta"
    codes: dict[str, int | None] = json.loads(path.read_text())["exit_code_by_key"]
    return codes


def mutant_of(folder: Path, module: str, name: str) -> Mutant:
    """Find what a mutant's name stands for in the file that mutmut wrote."""
    path = folder / "mutants" / "src" / "wavg" / f"{module}.py"
    spans = json.loads(Path(f"{path}.spans").read_text())["spans"]
    lines = path.read_text().splitlines()
    mangled = name.rpartition(".")[2]
    stem = mangled.partition("__mutmut_")[0]

    def body(key: str) -> list[str]:
        first, last = spans[key]
        return [line.strip().replace(key, stem) for line in lines[first - 1 : last]]

    changed = list(difflib.ndiff(body(f"{stem}__mutmut_orig"), body(mangled)))
    was, becomes = (" ".join(t[2:] for t in changed if t.startswith(sign)) for sign in "-+")
    return Mutant(module, re.sub(r"^x_|^xǁ", "", stem).replace("ǁ", "."), was, becomes)


# --- the reasons ----------------------------------------------------------------------------------


class Reason(NamedTuple):
    """Why survivors of one kind are as good as the original.

    Either `was` and `becomes` are the very lines, or `pattern` is a regular expression of both,
    with `` -> `` between. `function` may be a pattern too.
    """

    kind: str
    why: str
    module: str
    function: str
    was: str
    becomes: tuple[str, ...]
    pattern: str

    def explains(self, mutant: Mutant) -> bool:
        if self.module != mutant.module or not re.fullmatch(self.function, mutant.function):
            return False
        if self.pattern:
            both = f"{mutant.was} -> {mutant.becomes}"
            return re.fullmatch(self.pattern, both) is not None
        return mutant.was == self.was and mutant.becomes in self.becomes


def reasons(path: Path = REASONS) -> list[Reason]:
    found = []
    for module, entries in tomllib.loads(path.read_text("utf-8")).items():
        for entry in entries:
            becomes = entry.get("becomes", [])
            lines = (becomes,) if isinstance(becomes, str) else tuple(becomes)
            reason = Reason(
                entry["kind"],
                entry["why"],
                module,
                entry.get("function", ".*"),
                entry.get("was", ""),
                lines,
                entry.get("pattern", ""),
            )
            assert reason.kind in KINDS
            assert bool(reason.pattern) != bool(reason.was)
            found.append(reason)
    return found


# --- the count ------------------------------------------------------------------------------------


def count(folder: Path, group: Group, known: list[Reason]) -> tuple[dict[str, dict], list[str]]:
    """Return the figures by module, and what is wrong."""
    figures, wrong = {}, []
    used: set[Reason] = set()
    for module in group.modules:
        counts: collections.Counter = collections.Counter(mutants=0, killed=0, timed_out=0)
        counts |= dict.fromkeys((*KINDS, "unexplained", "not_run"), 0)
        for name, code in outcomes(folder, module).items():
            counts["mutants"] += 1
            if code is None or code == 2:
                counts["not_run"] += 1
            elif code in TIMED_OUT:
                counts["timed_out"] += 1
            elif code != SURVIVED and code not in UNTESTED:  # a crash is told as well
                counts["killed"] += 1
            else:
                mutant = mutant_of(folder, module, name)
                reason = next((one for one in known if one.explains(mutant)), None)
                if reason:
                    used.add(reason)
                    counts[reason.kind] += 1
                else:
                    counts["unexplained"] += 1
                    wrong.append(f"{'survived' if code == SURVIVED else 'not tested'}: {mutant}")
        if counts["not_run"]:
            wrong.append(f"{counts['not_run']} mutants of {module} were not run")
        figures[module] = {key: counts[key] for key in counts}
    for reason in known:
        if reason.module in group.modules and reason not in used:
            text = reason.pattern or f"{reason.was} -> {' or '.join(reason.becomes)}"
            wrong.append(f"a reason for nothing: {reason.module}: {text}")
    return figures, wrong


def rest(folder: Path, group: Group) -> Iterator[str]:
    """Yield the mutants that were not killed before."""
    for module in group.modules:
        for name, code in outcomes(folder, module).items():
            if code in (None, SURVIVED, *UNTESTED):
                yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--look", action="store_true", help="run nothing, record nothing")
    options = parser.parse_args()
    group = GROUPS[options.group]
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mutation-"))
    folder.mkdir(parents=True, exist_ok=True)
    if not options.look:
        if not options.again:
            shutil.rmtree(folder / "mutants", ignore_errors=True)
        names = list(rest(folder, group)) if options.again else []
        prepare(folder, group)
        if names or not options.again:
            run(folder, names, options.minutes)
    figures, wrong = count(folder, group, reasons())
    for module, counts in figures.items():
        print(module, ", ".join(f"{key} {number}" for key, number in counts.items()))
    if wrong:
        sys.exit("\n".join(wrong))
    if not options.look:
        try:
            before = figures_of("mutation")
        except FileNotFoundError:
            before = {}
        record("mutation", "warm", before | {options.group: figures})


if __name__ == "__main__":
    main()
