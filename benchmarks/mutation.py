"""Break the code on purpose, one small change at a time, and see whether the tests tell.

    python benchmarks/mutation.py GROUP [--folder FOLDER] [--again] [--only PATTERN]

GROUP is one of `GROUPS` below: modules, and the tests that judge them. mutmut makes the mutants
(``pip install wavg[mutation]``), in a copy in FOLDER of what is needed; mutation_run.py runs the
tests. With ``--again`` what was killed there before is taken for killed, and what has a reason for
surviving; with ``--only``, of the rest what the pattern names is run, nothing if it is empty.

A mutant that no test tells from the original, in `--seconds` of processor time, needs a reason in
survivors.toml, found by module, function and text, not by a number. The script fails on one
without, and on a reason for nothing.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import tomllib
from common import RESULTS, figures_of, record

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
        (
            "ieee",
            "combination",
            "rounding",
            "exact",
            "first_steps",
            "leftovers",
            "kernel_memory",
            "ladder",
            "compiled",
            "kernel",
        ),
        FIXED,
    ),
    "plan": Group(
        ("options", "alignment", "quantised", "decisions", "budget", "plan", "runs"),
        (
            "options",
            "alignment",
            "quantised",
            "decisions",
            "budget",
            "plan",
            "runs",
        ),
        FIXED,
    ),
}

KINDS = {
    "speed": "the same bytes, in another time or with other scratch memory",
    "same": "the same value for whatever can come",
    "wider": "a bound that is wider than it need be: more goes to the next step, to the same bytes",
    "elsewhere": "told by another script or test",
}
THEIRS = "from mutmut.mutation.trampoline import wrap_in_trampoline as _mutmut_mutated, MutantDict"
OURS = "from mutation_run import switch as _mutmut_mutated, MutantDict"


class Mutant(NamedTuple):
    """One change, by its text."""

    module: str
    function: str
    was: str
    becomes: str

    def __str__(self) -> str:
        return f"{self.module}.{self.function}\n    - {self.was}\n    + {self.becomes}"


# --- the run --------------------------------------------------------------------------------------


def prepare(folder: Path, group: Group) -> dict[str, Mutant]:
    """Copy what a run needs, with the modules mutated; return the mutants by mutmut's names."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    for name in ("src", "tests"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    mutants = {}
    for module in group.modules:
        path = folder / "src" / "wavg" / f"{module}.py"
        mutated = mutate_file_contents(str(path), path.read_text("utf-8"))
        assert THEIRS in mutated.code
        path.write_text(mutated.code.replace(THEIRS, OURS), "utf-8")
        lines = mutated.code.splitlines()
        spans = mutated.line_span_by_function_name
        for name in mutated.mutant_names:
            stem = name.partition("__mutmut_")[0]
            texts = []
            for key in (f"{stem}__mutmut_orig", name):
                body = lines[spans[key].start - 1 : spans[key].end]
                texts.append([line.strip().replace(key, stem) for line in body])
            changed = list(difflib.ndiff(*texts))
            was, becomes = (" ".join(t[2:] for t in changed if t.startswith(c)) for c in "-+")
            function = re.sub("^(x_|xǁ)", "", stem).replace("ǁ", ".")
            mutants[f"wavg.{module}.{name}"] = Mutant(module, function, was, becomes)
    return mutants


def run(
    folder: Path,
    group: Group,
    names: list[str],
    seconds: float,
    minutes: float,
    *,
    source: Path | None = None,
    more: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run the tests against mutants, one at a time; so long for each, and for all, at most.

    The code and the tests are those in `source`, if it is not the folder; `more` goes to the
    environment.
    """
    source = source or folder
    (folder / "asked.json").write_text(json.dumps(names))
    tests = (f"tests/test_{name}.py" for name in group.tests)
    plugin = ("-p", "mutation_run", "-p", "no:cacheprovider", "-n", "0", "--assert=plain", "-q")
    command = [sys.executable, "-m", "pytest", *plugin, *group.options, *tests]
    environment = {
        "PYTHONPATH": os.pathsep.join((str(source / "src"), str(Path(__file__).parent))),
        "MUTATION_FOLDER": str(folder),
        "MUTATION_SECONDS": str(seconds),
        "MUTATION_MINUTES": str(minutes),
        "OPENBLAS_NUM_THREADS": "1",  # threads do not outlive a fork
    }
    subprocess.run(command, cwd=source, env={**os.environ, **environment, **more}, check=True)
    print()


def outcomes(folder: Path) -> dict[str, str]:
    """Return what became of mutants, by name: the last of each counts."""
    path = folder / "outcomes.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(line.split("\t") for line in lines)  # type: ignore[misc]


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
        if self.module not in (mutant.module, "any") or not re.fullmatch(
            self.function, mutant.function
        ):
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


def count(
    mutants: dict[str, Mutant], found: dict[str, str], group: Group, known: list[Reason]
) -> tuple[dict[str, dict], list[str]]:
    """Return the figures by module, and what is wrong."""
    empty = dict.fromkeys(("mutants", "killed", "timed out", *KINDS, "unexplained"), 0)
    figures = {module: dict(empty) for module in group.modules}
    wrong = []
    used: set[Reason] = set()
    for name, mutant in mutants.items():
        outcome = found.get(name, "not run")
        if outcome in ("survived", "untested"):
            reason = next((one for one in known if one.explains(mutant)), None)
            if reason:
                used.add(reason)
            else:
                wrong.append(f"{outcome}: {mutant}")
            outcome = reason.kind if reason else "unexplained"
        elif outcome == "not run":
            wrong.append(f"not run: {name}")
            continue
        figures[mutant.module]["mutants"] += 1
        figures[mutant.module][outcome] += 1
    for reason in known:
        if reason.module in group.modules and reason not in used:
            text = reason.pattern or f"{reason.was} -> {' or '.join(reason.becomes)}"
            wrong.append(f"a reason for nothing: {reason.module}: {text}")
    return figures, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", help="a regular expression of mutants to run")
    parser.add_argument("--seconds", type=float, default=6, help="of processor, for a mutant")
    parser.add_argument("--minutes", type=float, default=40)
    options = parser.parse_args()
    group = GROUPS[options.group]
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="mutation-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    kept = folder / "mutants.json"
    before = json.loads(kept.read_text()) if options.again and kept.exists() else {}
    told = outcomes(folder)
    mutants = prepare(folder, group)
    # What was killed before stays so, if it is still the same mutant.
    found = {
        name: told[name]
        for name, mutant in mutants.items()
        if name in told and before.get(name) == [*mutant]
    }
    kept.write_text(json.dumps(mutants))
    lines = (f"{name}\t{outcome}\n" for name, outcome in found.items())
    (folder / "outcomes.jsonl").write_text("".join(lines))
    known = reasons()
    names = [
        name
        for name, mutant in mutants.items()
        if found.get(name, "untested") == "untested"
        or (found[name] == "survived" and not any(one.explains(mutant) for one in known))
    ]
    if options.only is not None:
        names = [name for name in names if options.only and re.search(options.only, name)]
    if names:
        run(folder, group, names, options.seconds, options.minutes)
    figures, wrong = count(mutants, outcomes(folder), group, known)
    for module, counts in figures.items():
        print(module, ", ".join(f"{key} {number}" for key, number in counts.items()))
    if wrong:
        sys.exit("\n".join(wrong))
    recorded = figures_of("mutation") if (RESULTS / "mutation.json").exists() else {}
    record("mutation", "warm", recorded | {options.group: figures})


if __name__ == "__main__":
    main()
