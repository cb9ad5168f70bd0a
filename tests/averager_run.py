"""A training run that is averaged and may be killed: for `test_streaming_state.py`.

Usage: averager_run.py FOLDER WEIGHTS UPDATES [KILL_AT]

KILL_AT is an update, or an update and a call within its save: ``7:write``. At it the process kills
itself with SIGKILL. Started again, it goes on from the state that is there. WEIGHTS that begin with
``window:`` average the last three models, kept in a folder, which is the state.
"""

from __future__ import annotations

import os
import signal
import sys

import numpy as np

import wavg
from wavg import publish


def model(step: int) -> dict:
    rng = np.random.default_rng(step)
    wide = np.ldexp(rng.standard_normal(3000), rng.integers(-90, 90, 3000))
    return {
        "layers": [{"kernel": rng.standard_normal((40, 50)).astype("f4"), "none": None}],
        "wide": wide.astype("f4"),
        "double": rng.standard_normal(70),
        "half": rng.standard_normal(33).astype("f2"),
        "phase": (rng.standard_normal(9) + 1j * rng.standard_normal(9)).astype("c8"),
        "steps": np.int64(step),
    }


def kill_at(name: str) -> None:
    """Have the process die in the middle of a call of the publishing of a file."""

    def dying(self, *arguments, **options):
        if name == "write":  # half of it is done
            data = arguments[0]
            half = data[: len(data) // 2] if isinstance(data, bytes) else data.reshape(-1)[:1]
            original(self, half, *arguments[1:])
        if name == "after":
            original(self, *arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    owner, method = {
        "write": (publish.NewFile, "write"),
        "commit": (publish.AtomicFile, "commit"),
        "after": (publish.AtomicFile, "commit"),
    }[name]
    original = getattr(owner, method)
    setattr(owner, method, dying)


def main() -> None:
    folder, weights, updates, *kill = sys.argv[1:]
    path = f"{folder}/state.safetensors"
    number, _, call = (kill[0] if kill else "0").partition(":")
    in_folder = weights.startswith("window:")
    if in_folder:
        rules = weights.removeprefix("window:").split(";")
        averager = wavg.StreamingAverager(rules, window=3, folder=f"{folder}/window")
    elif os.path.exists(path):
        averager = wavg.StreamingAverager.load(path)
    else:
        averager = wavg.StreamingAverager(weights.split(";"))
    for step in range(averager.count + 1, int(updates) + 1):
        if step == int(number) and call:
            kill_at(call)
        averager.update(model(step))
        if step == int(number) and not call:
            os.kill(os.getpid(), signal.SIGKILL)
        if not in_folder:
            averager.save(path)
    for which in range(len(averager.result())):
        averager.save_average(f"{folder}/average{which}.safetensors", which)


if __name__ == "__main__":
    main()
