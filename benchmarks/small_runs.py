"""Small averages, one a format, that replace a good output; and what may stand there after a fault.

Shared by kills.py, injected.py and power_loss.py. Beside the output lie files of others, which
nothing may touch: some have names like those of wavg's own temporaries.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, figures_of

import wavg

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
FOREIGN = "what others keep here"
DONE, TYPED, UNTYPED, INTERRUPTED = 0, 10, 11, 130  # how a child ends


@dataclass(frozen=True)
class Kind:
    """An average of one format: where its inputs come from, and its options."""

    name: str
    suffix: str
    golden: str = ""  # files that Keras wrote, else ours
    folder: bool = False
    options: dict[str, Any] = field(default_factory=dict)


KINDS = (
    Kind("safetensors", ".safetensors"),
    Kind("folder of safetensors", "", folder=True, options={"max_shard_size": "200KB"}),
    Kind(".h5", ".h5", "keras3_nested"),
    Kind(".h5 written anew", ".h5", "keras3_nested", options={"dtype": "float16"}),
    Kind(".weights.h5", ".weights.h5", "keras3_kernels"),
    Kind(".keras", ".keras", "keras3_tower"),
    Kind(".keras written anew", ".keras", "keras3_tower", options={"dtype": "float16"}),
    Kind(".weights.json", ".weights.json", "keras3_shards"),
    Kind(".npz", ".npz"),
)
NEVER_REPLACED = (".weights.json",)


def model(seed: int) -> dict[str, np.ndarray]:
    """Return some 600 KB of tensors."""
    rng = np.random.default_rng(seed)
    shapes = {f"layers.{n}.weight": (96, 128) for n in range(12)} | {"norm.weight": (128,)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


class Small:
    """One average in a folder of its own."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind, self.root = kind, folder
        self._aside = tempfile.TemporaryDirectory()  # the folder's disk may be full
        self.told = Path(self._aside.name) / "told"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "in").mkdir(parents=True)
        self.out = folder / "out"
        self.out.mkdir()
        self.inputs = [self._input(number) for number in (1, 2)]
        self.output = self.out / f"model{kind.suffix}"
        self.name = self.output.name
        self.replaces = kind.name not in NEVER_REPLACED
        self.overwrite = True
        self.options = {"weights": "equal", "workers": 2, **kind.options}
        self.old: dict[str, bytes] = {}
        if self.replaces:
            wavg.average_checkpoints(
                self.inputs, self.target, **{**self.options, "weights": [3, 1]}
            )
            self.old = self.content()
            assert wavg.load(self.output)
        self.run()
        self.new = self.content()
        assert self.old != self.new
        assert wavg.load(self.output)
        self.restore()
        for name in (f".{self.name}.x.0123456789ab.wavg-tmp", ".other.0123456789ab.wavg-tmp",
                     f".{self.name}.0123.wavg-tmp", f"{self.name}.backup"):  # fmt: skip
            (self.out / name).write_text(FOREIGN)
        self.foreign = {n: FOREIGN.encode() for n in os.listdir(self.out)}
        for name in self.old:
            self.foreign.pop(name.partition("/")[0], None)
        self.theirs: set[str] = set()  # temporaries of runs that live

    def close(self) -> None:
        """Remove what is kept aside."""
        self._aside.cleanup()

    def _input(self, number: int) -> str:
        kind, place = self.kind, self.root / "in"
        if kind.golden:
            for path in GOLDEN.glob(f"{kind.golden}_{number}*"):
                if path.suffix != ".npz":
                    shutil.copy(path, place)
            return str(place / f"{kind.golden}_{number}{kind.suffix}")
        if kind.folder:
            place = place / f"model_{number}"
            place.mkdir()
            wavg.save(place / "model.safetensors", model(number), metadata={"format": "pt"})
            (place / "config.json").write_text('{"torch_dtype": "float32"}')
            return str(place)
        path = place / f"model_{number}{kind.suffix}"
        wavg.save(path, model(number))
        return str(path)

    @property
    def target(self) -> str:
        """The output as it is named to wavg."""
        return str(self.output) + "/" * self.kind.folder

    def run(self) -> None:
        """Average into the output, replacing what is there."""
        options = {"overwrite": self.overwrite, **self.options}
        wavg.average_checkpoints(self.inputs, self.target, **options)

    def forget_old(self) -> None:
        """Have no output there before a run, which is then to replace none."""
        self.old, self.overwrite = {}, False
        self.restore()

    def content(self) -> dict[str, bytes]:
        """Return every file of the output's folder by its path within."""
        found = {}
        for path in sorted(self.out.rglob("*")):
            if path.is_file():
                found[str(path.relative_to(self.out))] = path.read_bytes()
            elif not any(path.iterdir()):
                found[f"{path.relative_to(self.out)}/"] = b""
        return found

    def restore(self) -> None:
        """Put the old output back, and remove what runs left."""
        outputs = {name.partition("/")[0] for name in (*self.old, *self.new)}
        for name in os.listdir(self.out):
            if name in outputs or (self._is_stray(name) and name not in self.theirs):
                path = self.out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, data in self.old.items():
            (self.out / name).parent.mkdir(exist_ok=True)
            (self.out / name).write_bytes(data)

    def _is_stray(self, name: str) -> bool:
        own = {file.partition("/")[0] for file in self.new}
        found = re.fullmatch(r"\.(.+)\.[0-9a-f]{12}\.wavg-(?:tmp|old)", name)
        return found is not None and found[1] in own

    def state(self) -> tuple[str, int]:
        """Return what stands there, and how many temporaries are left over.

        ``old``, ``new``; ``unnamed`` are whole shards without the file that names them; ``bad`` is
        anything else, such as a file of others that is missing.
        """
        content = self.content()
        first = {name: name.partition("/")[0] for name in content}
        strays = {n for n in first.values() if self._is_stray(n) and n not in self.theirs}
        living = {n for n in first.values() if n in self.theirs}
        rest = {n: data for n, data in content.items() if first[n] not in strays | living}
        foreign = {n: rest.pop(n, None) for n in self.foreign}
        if foreign != self.foreign or living != self.theirs:
            return "bad: the files of others", len(strays)
        if rest == self.old:
            return "old", len(strays)
        if rest == self.new:
            return "new", len(strays)
        if not self.replaces and self.name not in rest and rest.items() <= self.new.items():
            return "unnamed", len(strays)
        return f"bad: {sorted(rest)}", len(strays)

    def begin(self, before: Callable[[], object] = lambda: None) -> int:
        """Start the run in a copy of this process, and return its number."""
        child = os.fork()
        if child:
            return child
        code, message = UNTYPED, ""
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries tell of failures there, too
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                try:
                    before()
                    self.run()
                    code = DONE
                except BaseException as error:
                    code = TYPED if is_typed(error) else UNTYPED
                    message = f"{type(error).__name__}: {error}"
            message += "".join(f"; warned: {each.message}" for each in warned)
            with open(self.told, "w") as file:
                file.write(message)
        finally:
            os._exit(code)

    def message(self) -> str:
        """Return the error and the warnings of the last run."""
        return self.told.read_text() if self.told.exists() else ""


def is_typed(error: BaseException) -> bool:
    """Whether an error says by its type what is wrong, and of the system's which file it concerns.

    A missing or unreadable input stays Python's own error, and so does a lack of memory outside of
    files.
    """
    named = isinstance(error, OSError) and error.filename is not None
    return named or isinstance(error, (wavg.WavgError, MemoryError))


def ended(child: int, seconds: float = 60) -> str:
    """Wait for a child; return how it ended. One that does not is killed: ``hung``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if os.WIFSIGNALED(status):
                return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
            names = {DONE: "done", TYPED: "typed error", UNTYPED: "untyped error"}
            names[INTERRUPTED] = "interrupted"
            return names.get(os.WEXITSTATUS(status), f"exit code {os.WEXITSTATUS(status)}")
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


def recorded(name: str, formats: list[str]) -> dict:
    """Return the figures kept before, if only those of some formats are to be made anew."""
    kept = (RESULTS / f"{name}.json").exists()
    return figures_of(name) if formats and kept else {}
