"""Pages of the documentation that are run from top to bottom: their code and their commands."""

from __future__ import annotations

import doctest
import re
import shlex

from wavg.cli import main

_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def run(page, folder, monkeypatch):
    """Run a page's blocks in a folder, one after the other; return the names they leave."""
    text = page.read_text("utf-8")
    monkeypatch.chdir(folder)
    names: dict = {"__name__": "page"}
    for block in _BLOCK.finditer(text):
        language, code = block.groups()
        line = text[: block.start()].count("\n") + 1
        if language == "sh":
            for command in code.splitlines():
                program, *arguments = shlex.split(command)
                assert program == "wavg"
                assert main(arguments) == 0, f"line {line}: {command}"
        elif ">>>" in code:
            test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
            output: list[str] = []
            runner = doctest.DocTestRunner(optionflags=_FLAGS, verbose=False)
            runner.run(test, out=output.append, clear_globs=False)
            assert not runner.summarize(verbose=False).failed, "".join(output)
            names.update(test.globs)
        else:
            exec(compile("\n" * line + code, str(page), "exec"), names)
    return names
