"""Break the compiled step on purpose, as mutation.py does the modules of Python.

    python benchmarks/mutation_compiled.py [--folder FOLDER]

Operators and whole numbers in the text of _compiled.c are changed, one at a time; what still
compiles (``cc -O1``, with AddressSanitizer if that is there) is loaded in the place of the module,
in forks of one session of the kernel's tests. Survivors need a reason in survivors.toml, under the
name ``_compiled``; they are asked again by a second run with the same folder.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from common import RESULTS, figures_of, record
from mutation import GROUPS, ROOT, Mutant, count, outcomes, reasons, run

SOURCE = ROOT / "src" / "wavg" / "_compiled.c"
OPERATORS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "&&": "||",
    "||": "&&",
    " + ": " - ",
    " - ": " + ",
    " * ": " / ",
    " / ": " * ",
    " | ": " & ",
    " & ": " | ",
    "<<": ">>",
    ">>": "<<",
    "+=": "-=",
    "-=": "+=",
    "|=": "&=",
    "&=": "|=",
}
# What reads or writes beyond an array is told by that, if it is there.
SANITIZER = Path(
    subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
)
WATCH = {"LD_PRELOAD": str(SANITIZER), "ASAN_OPTIONS": "detect_leaks=0"}
TOKEN = re.compile(
    r"(?P<skip>/\*.*?\*/|\"(?:\\.|[^\"])*\"|#(?:include|error|if|elif|endif|else)[^\n]*"
    r"|\benum [a-z]* ?\{[^}]*\}|->)"
    r"|(?P<operator><<|>>|<=|>=|==|!=|&&|\|\||\+=|-=|\|=|&=| \+ | - | \* | / | \| | & |<|>)"
    r"|(?<![\w.])(?P<number>0x[0-9A-Fa-f]+p[-+]?\d+|0x[0-9A-Fa-f]+|\d+)(?=[uU]?(?:ll|LL)?\b)",
    re.DOTALL,
)


def changed(token: re.Match) -> str:
    if token["operator"]:
        return OPERATORS[token["operator"]]
    number = token["number"]
    if "p" in number:  # a power of two: the next
        return re.sub(r"p[-+]?\d+", lambda m: f"p{int(m[0][1:]) + 1}", number)
    return hex(int(number, 16) + 1) if number.startswith("0x") else str(int(number) + 1)


def mutants_of(text: str) -> dict[str, tuple[Mutant, str]]:
    """Return mutants, and their whole texts, by name."""
    found = {}
    body = text.index("static inline float float_of")
    for token in TOKEN.finditer(text, body):
        if token["skip"]:
            continue
        new = text[: token.start()] + changed(token) + text[token.end() :]
        begin, end = text.rfind("\n", 0, token.start()) + 1, text.index("\n", token.end())
        was = text[begin:end].strip(" \\")
        becomes = new[begin : end + len(new) - len(text)].strip(" \\")
        mutant = Mutant("_compiled", function_at(text[:end]), was, becomes)
        found[f"wavg._compiled.c{len(found)}"] = mutant, new
    return found


def function_at(text: str) -> str:
    """Return the name of the function or macro in which a text ends."""
    head = r"^(?:#define (\w+)|(?=[A-Za-z])[^\n=;]*?\b(?!__attribute__)(\w+)\()"
    heads = re.findall(head, text, re.MULTILINE)
    return "".join(heads[-1])


def compile_to(path: Path, text: str) -> bool:
    """Make a module of a text; False if it does not compile."""
    source = path.with_suffix(".c")
    source.write_text(text)
    include = sysconfig.get_paths()["include"]
    # Of what one compiler makes for several processors, one is enough here.
    single = ("-U__GNUC__", "-D__GNUC__=11", "-w")
    watched = ("-fsanitize=address",) if SANITIZER.exists() else ()
    options = ("-O1", "-shared", "-fPIC", *single, *watched, f"-I{include}")
    command = ["cc", *options, str(source), "-o"]
    done = subprocess.run([*command, str(path), "-lm"], capture_output=True, check=False)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--look", action="store_true", help="run nothing")
    options = parser.parse_args()
    group = GROUPS["kernel"]._replace(modules=("_compiled",))
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="mutation-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    text = SOURCE.read_text("utf-8")
    assert compile_to(folder / "original.so", text)
    every = mutants_of(text)
    known, told = reasons(), outcomes(folder)
    ask = [name for name in every if name not in told or told[name] == "survived"]
    ask = [n for n in ask if n not in told or not any(r.explains(every[n][0]) for r in known)]
    ask = [n for n in ask if not options.look and compile_to(folder / f"{n}.so", every[n][1])]
    if ask:
        more = WATCH if SANITIZER.exists() else {}
        run(folder, group, ask, options.seconds, options.minutes, source=ROOT, more=more)
    told = outcomes(folder)
    mutants = {name: every[name][0] for name in every if name in told}
    figures, wrong = count(mutants, told, group, known)
    print(f"{len(every)} mutants, of which {len(mutants)} compile")
    print(figures)
    if wrong:
        sys.exit("\n".join(wrong))
    if not options.look:
        recorded = figures_of("mutation") if (RESULTS / "mutation.json").exists() else {}
        record("mutation", "warm", recorded | {"compiled": figures})


if __name__ == "__main__":
    main()
