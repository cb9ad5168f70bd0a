"""How a plan is executed: what is told on the way, and what becomes of work that is called off."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import wavg
from wavg import stream, tasks


class Taker:
    """A sink that has a function called for every part it is given."""

    def __init__(self, written):
        self.write = written

    def wants(self, name):
        return True

    def joined(self, names):
        return True


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Return a function that streams two models of 80 numbers, two blocks of ten to a chunk."""
    models = [{"w": np.full(80, value, np.float32)} for value in (1, 3)]
    paths = [tmp_path / f"m_{step}.safetensors" for step in range(2)]
    for path, model in zip(paths, models, strict=True):
        wavg.save(path, model)
    monkeypatch.setattr(tasks, "_CHUNK_BYTES", 2 * 2 * 10 * 4)

    def start(written, workers=1, **options):
        plan = dataclasses.replace(wavg.plan_average(paths), block=10, workers=workers)
        with contextlib.ExitStack() as stack:
            checkpoints = [stack.enter_context(wavg.open_checkpoint(path)) for path in paths]
            return stream.run([plan], checkpoints, [Taker(written)], **options)

    return start


def test_every_block_is_written_once_and_its_bytes_are_told(started):
    starts, told = [], []
    names = started(lambda _, start, values: starts.append((start, *values)), progress=told.append)
    assert sorted(starts) == [(start, *[2.0] * 10) for start in range(0, 80, 10)]
    assert told == [2 * 2 * 10 * 4] * 4
    assert names == [()]


def test_a_failure_ends_the_work_under_way_and_what_waits_is_not_begun(started):
    starts, jobs, another = [], [], threading.Event()

    class Watched(ThreadPoolExecutor):
        def submit(self, job, chunk):
            jobs.append(job)
            return super().submit(job, chunk)

    def write(_, start, __):
        starts.append(start)
        if start == 0:
            assert another.wait(60)
            raise RuntimeError("as planned")
        another.set()
        assert jobs[0].stop.wait(60)

    with Watched(2) as executor, pytest.raises(RuntimeError, match="as planned"):
        started(write, workers=2, executor=executor)
    assert len(jobs) == 4
    assert set(starts) <= {0, 20, 40}  # the first blocks of chunks, and not the last chunk's
