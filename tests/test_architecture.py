"""What may import what, what importing costs, and what the public face promises."""

from __future__ import annotations

import ast
import copy
import dataclasses
import graphlib
import inspect
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import wavg
from wavg import errors

ROOT = Path(wavg.__file__).parent
FACE = "wavg"  # `import wavg` itself

# The table of the design, with dtypes and printable (which everything may import) and inputs, which
# it lacks, and the kernel's parts below it, of which _compiled is C.
MAY_IMPORT = {
    "printable": "",
    "errors": "printable",
    "_version": "",
    "record": "_version errors",
    "dtypes": "errors",
    "arrays": "errors",
    "tree": "errors",
    "schedule": "errors",
    "rules": "schedule errors",
    "moving": "schedule errors",
    "posthoc": "moving schedule errors",
    "listed": "places rules schedule errors",
    "weights": "schedule rules moving posthoc listed errors",
    "rounding": "errors",
    "exact": "rounding errors",
    "_compiled": "",
    "combination": "errors",
    "ieee": "",
    "leftovers": "combination exact ieee rounding errors",
    "compiled": "_compiled combination leftovers",
    "tiles": "combination ieee leftovers rounding",
    "kernel": "combination compiled ieee leftovers tiles errors",
    "average": "combination arrays quantised tree weights kernel errors",
    "extents": "",
    "places": "errors",
    "positional": "",
    "shortage": "errors",
    "checkpoint": "extents positional errors",
    "digests": "checkpoint extents positional errors",
    "templates": "checkpoint extents positional",
    "renames": "",
    "access": "",
    "destinations": "errors",
    "temporaries": "renames",
    "publish": "access destinations positional renames temporaries errors",
    "publish_folder": "access destinations publish renames temporaries errors",
    "alignment": "checkpoint errors",
    "quantised": "checkpoint errors",
    "options": "alignment",
    "decisions": "options checkpoint errors",
    "budget": "decisions options checkpoint kernel errors",
    "plan": "budget decisions options record quantised alignment checkpoint weights errors",
    "runs": "decisions extents checkpoint errors",
    "blas": "",
    "tasks": "runs decisions plan checkpoint",
    "workers": "tasks combination blas plan checkpoint kernel errors",
    "stream": "tasks workers blas digests plan checkpoint errors",
    "sinks": "extents plan checkpoint publish templates errors",
    "formats": "checkpoint extents places positional publish templates errors",
    "names": "",
    "inputs": "names checkpoint formats places errors",
    "recorded": "checkpoint names places record",
    "grid": "destinations errors formats inputs names recorded weights",
    "sha256sums": "checkpoint inputs places errors",
    "opening": "checkpoint errors formats shortage",
    "carried": "checkpoint digests formats plan",
    "outputs": "carried checkpoint destinations errors formats opening plan publish publish_folder "
    "record renames sinks templates temporaries",
    "signatures": "sha256sums weights",
    "files": "signatures carried checkpoint digests errors formats grid inputs opening options "
    "outputs plan publish record sha256sums shortage sinks stream weights",
    "stored": "checkpoint digests errors formats inputs opening outputs shortage",
    "findings": "",
    "located": "checkpoint errors formats inputs record recorded",
    "comparison": "checkpoint decisions",
    "claims": "checkpoint digests errors findings grid listed names record recorded schedule "
    "weights",
    "likeness": "carried checkpoint decisions findings formats plan record templates",
    "verification": "claims comparison findings likeness located stored checkpoint digests errors "
    "formats inputs opening options plan record stream",
    "structure": "arrays quantised tree errors",
    "blocks": "structure errors",
    "sums": "blocks exact rounding errors",
    "tracks": "blocks sums structure weights errors",
    "ring": "stored average blocks files schedule structure temporaries weights errors",
    "state": "stored checkpoint listed record structure weights errors",
    "streaming": "stored inputs record ring schedule state structure tracks weights errors",
    "prefixes": "",
    "prefix_sums": "checkpoint decisions plan positional prefixes rounding errors",
    "evaluation": "dtypes errors",
    "journal": "evaluation destinations publish renames errors",
    "scoring": "checkpoint evaluation inputs journal errors",
    "subjects": "checkpoint decisions destinations digests files formats inputs opening outputs "
    "plan prefixes prefix_sums sinks errors",
    "sweep_picture": "errors",
    "results": "evaluation inputs publish scoring sweep_picture errors",
    "sweeps": "evaluation files formats grid inputs journal options outputs prefixes results "
    "scoring subjects prefix_sums weights errors",
    "selection": "evaluation formats grid inputs places errors",
    "greedy": "evaluation prefixes scoring subjects prefix_sums errors",
    "soups": "evaluation files formats greedy grid inputs journal outputs results scoring "
    "selection subjects errors",
    "demo": FACE,
    "picture": "errors weights",
    "cli_options": "alignment formats options",
    "cli_sweep": "destinations errors cli_options cli_weights soups sweeps sweep_picture",
    "cli_weights": "cli_options formats grid inputs picture schedule weights",
    "cli_inspect": "stored checkpoint cli_options cli_weights errors record verification",
    "cli_average": "cli_options cli_weights files formats grid names options plan schedule "
    f"weights {FACE}",
    "cli": f"cli_average cli_inspect cli_options cli_sweep cli_weights kernel demo errors {FACE}",
}
# The face gathers what people use; it may take it from anywhere but from what uses the face.
MAY_IMPORT["__init__"] = " ".join(
    MAY_IMPORT.keys()
    - {"cli", "cli_average", "cli_inspect", "cli_options", "cli_sweep", "cli_weights", "demo"}
)
MAY_IMPORT["__main__"] = "cli"

# What only some programs need, imported when it is first asked for.
LATER = {"streaming", "results", "sweeps", "soups", "selection", "verification"}

HEAVY = {"h5py", "ml_dtypes", "tqdm", "matplotlib", "safetensors"}

PATHS = sorted(ROOT.rglob("*.py"))


def layer(path):
    """The row of the table that a file belongs to: a package is one row."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(source, layers=frozenset(MAY_IMPORT)):
    """The layers that a module's source imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "wavg":
                found.add(rest[0] if rest and rest[0] in layers else FACE)
    return found


def trespasses(name, source):
    allowed = {*MAY_IMPORT[name].split(), "dtypes", "printable", name}
    return imported(source) - allowed


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_layers_below(path):
    name = layer(path)
    assert not trespasses(name, path.read_text("utf-8"))


def test_every_module_has_a_row_in_the_table():
    assert {layer(path) for path in PATHS} <= MAY_IMPORT.keys()


def test_the_table_has_layers_and_no_circles():
    rows = {name: set(below.split()) - {FACE} for name, below in MAY_IMPORT.items()}
    order = list(graphlib.TopologicalSorter(rows).static_order())
    assert order[0] == "printable"


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("kernel", "from wavg.files import load", {"files"}),
        ("kernel", "from wavg import files as f, errors", {"files"}),
        ("kernel", "import wavg.files", {"files"}),
        ("kernel", "import wavg", {FACE}),
        ("kernel", "from wavg import average_checkpoints", {FACE}),
        ("tree", "def f():\n    from wavg.kernel import combine", {"kernel"}),
        ("plan", "if TYPE_CHECKING:\n    from wavg.stream import run", {"stream"}),
        ("formats", "from wavg.files import load", {"files"}),
        ("formats", "from wavg.formats import FORMATS\nimport wavg.dtypes, os.path", set()),
        ("demo", "import wavg", set()),
        ("demo", "from wavg.files import load", {"files"}),
        ("__init__", "from wavg.cli import main", {"cli"}),
    ],
)
def test_the_reading_of_imports_sees_planted_ones(name, source, expected):
    assert trespasses(name, source) == expected


def modules_after(statement):
    """The modules that a fresh interpreter has after a statement."""
    code = f"import sys, json; {statement}; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    return {*json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "statement",
    [
        "import wavg",
        "import wavg.cli, wavg.demo",
        "import wavg; wavg.average([[1.0, 2.0], [3.0, 4.0]], 'linear')",
    ],
)
def test_importing_loads_numpy_and_nothing_heavier(statement):
    loaded = modules_after(statement)
    assert "numpy" in loaded
    assert not loaded & HEAVY
    assert not loaded & {f"wavg.{name}" for name in LATER}


def test_the_look_at_loaded_modules_sees_a_planted_one():
    assert modules_after("import tqdm") & HEAVY == {"tqdm"}
    assert "wavg.sweeps" in modules_after("import wavg; wavg.sweep")


# The public face

EXPORTED = {name: getattr(wavg, name) for name in wavg.__all__}
FUNCTIONS = {n: v for n, v in EXPORTED.items() if inspect.isfunction(v)}
CLASSES = {n: v for n, v in EXPORTED.items() if inspect.isclass(v)}


def test_all_names_what_is_exported_and_in_order():
    public = {
        name
        for name, value in vars(wavg).items()
        if (not name.startswith("_") and not isinstance(value, ModuleType))
        or name == "average"  # the function, not the module
    }
    assert set(wavg.__all__) == public
    assert wavg.__all__ == sorted(wavg.__all__)
    assert EXPORTED == {**FUNCTIONS, **CLASSES}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_owns_and_what_it_exports(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree)
    if path.name == "__main__.py":
        return
    name = ".".join(["wavg", *path.relative_to(ROOT).with_suffix("").parts])
    module = __import__(name.removesuffix(".__init__"), fromlist=["*"])
    assert all(hasattr(module, exported) for exported in module.__all__)


def documented(thing, title="Parameters"):
    """The names in a section of a docstring of NumPy's style."""
    section = re.search(
        rf"^{title}\n-+\n(.*?)(?=^\w+\n-+\n|\Z)",
        inspect.getdoc(thing),
        re.DOTALL | re.MULTILINE,
    )
    lines = re.findall(r"^\S.*$", section[1], re.MULTILINE) if section else []
    return {name for line in lines for name in re.split(r",\s*", line)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_documents_its_parameters(name):
    takes = inspect.signature(FUNCTIONS[name]).parameters.keys()
    borrowed = re.search(r"Parameters are those of `(\w+)`", FUNCTIONS[name].__doc__)
    if borrowed:
        assert takes - {"options"} <= documented(FUNCTIONS[borrowed[1]])
    else:
        assert takes == documented(FUNCTIONS[name])


def test_the_reading_of_docstrings_sees_names_alone_and_in_lists():
    def function(a, b, c):
        """Do.

        Parameters
        ----------
        a
            Not this: x.
        b, c
            Nor that.

        Returns
        -------
        d
            The result.
        """

    assert documented(function) == {"a", "b", "c"}
    assert documented(function, "Returns") == {"d"}
    assert documented(function, "Attributes") == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_an_example(name):
    assert ">>> " in FUNCTIONS[name].__doc__


def is_trivial(kind):
    """Errors and plain data need no example."""
    return issubclass(kind, Exception) or dataclasses.is_dataclass(kind)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_documented_and_has_an_example_unless_it_is_trivial(name):
    kind = CLASSES[name]
    assert kind.__doc__
    assert is_trivial(kind) or ">>> " in kind.__doc__


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_member_of_a_class_is_documented(name):
    members = {n: v for n, v in vars(CLASSES[name]).items() if not n.startswith("_")}
    described = (property, type(lambda: None))
    assert all(value.__doc__ for value in members.values() if isinstance(value, described))


DATA = [name for name, kind in CLASSES.items() if dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize("name", DATA)
def test_plain_data_is_frozen(name):
    assert CLASSES[name].__dataclass_params__.frozen


@pytest.mark.parametrize("name", DATA)
def test_the_fields_of_plain_data_are_documented(name):
    fields = {field.name for field in dataclasses.fields(CLASSES[name])}
    assert fields <= documented(CLASSES[name], "Attributes")


# The errors

BASES = {
    "WavgError": Exception,
    "CheckpointFormatError": ValueError,
    "CheckpointChangedError": RuntimeError,
    "RecordError": ValueError,
    "StructureMismatchError": ValueError,
    "WeightError": ValueError,
    "NonFiniteError": ValueError,
    "InputError": OSError,
    "OutputError": OSError,
    "OutputExistsError": FileExistsError,
    "MemoryBudgetError": ValueError,
    "OutOfMemoryError": MemoryError,
    "MissingDependencyError": ImportError,
}


def test_every_error_is_exported_and_in_the_table():
    assert set(errors.__all__) == BASES.keys()
    assert BASES.keys() <= set(wavg.__all__)
    assert {n for n, v in CLASSES.items() if issubclass(v, Exception)} == BASES.keys()


@pytest.mark.parametrize("name", BASES)
def test_an_error_is_a_wavg_error_and_of_the_natural_builtin(name):
    kind = CLASSES[name]
    assert issubclass(kind, wavg.WavgError)
    assert issubclass(kind, BASES[name])


@pytest.mark.parametrize("name", BASES)
def test_an_error_carries_its_message_and_raw_values(name):
    error = CLASSES[name]("what and where", path="m.h5", index=(1, 2))
    assert str(error) == "what and where"
    assert (error.path, error.index) == ("m.h5", (1, 2))
    assert (error.tensor, error.differences) == (None, None)
    with pytest.raises(AttributeError):
        error.no_such_detail  # noqa: B018


@pytest.mark.parametrize("name", BASES)
def test_an_error_survives_the_way_from_another_process(name):
    error = CLASSES[name]("what and where", tensor="w", index=(1,))
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert (str(twin), twin.tensor, twin.index) == (str(error), "w", (1,))


def test_the_design_page_names_every_module():
    page = (ROOT.parent.parent / "docs" / "design.md").read_text("utf-8")
    names = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__", "_version"}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_every_module_whose_branches_are_counted_exists():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    text = (ROOT.parent.parent / "pyproject.toml").read_text("utf-8")
    patterns = tomllib.loads(text)["tool"]["coverage"]["run"]["include"]
    assert patterns == sorted(patterns)
    for pattern in patterns:
        assert [*ROOT.glob(pattern.removeprefix("*/wavg/"))], pattern
