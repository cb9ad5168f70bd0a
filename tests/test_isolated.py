"""Reading an index in a process of its own: the same index, and the ways in which it can fail."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest

import wavg
from wavg import CheckpointFormatError, MissingDependencyError, WavgError
from wavg.checkpoint import Checksum, Extent, FileIdentity, Index, TensorSpec
from wavg.cli import main
from wavg.formats import isolated, keras_h5, wire
from wavg.formats.isolated import Limits, Reader

GOLDEN = Path(__file__).parent / "golden"
GOOD = GOLDEN / "keras3_mlp_1.h5"
KERAS = "wavg.formats.keras_h5"
QUICK = Limits(cpu=1, wall=20, stall=0.5)

# A format module whose files say what it does to the process that reads them.
HOSTILE = """
import ctypes, itertools, os, signal, sys
from wavg.checkpoint import FileIdentity, Index, identify
from wavg.errors import CheckpointFormatError

def read_index(path, *, opaque_dtype, like):
    words = open(path).read().split()
    if words[0] == "crash":
        ctypes.string_at(0)
    elif words[0] == "end":
        os.kill(os.getpid(), int(words[1]))
    elif words[0] == "exit":
        os._exit(3)
    elif words[0] == "spin":
        if len(words) > 1:
            open(words[1], "w").close()  # a FIFO: whoever reads it knows that this is reached
        while True:
            pass
    elif words[0] == "stick":
        sum(itertools.repeat(0))  # in C, from where Python hears nothing
    elif words[0] == "many":
        with open("/dev/zero", "rb", buffering=0) as zeros:
            end = os.times().system + float(words[1])
            while os.times().system < end:
                zeros.readinto(bytearray(1 << 16))
    elif words[0] == "wait":
        signal.pause()
    elif words[0] == "allocate":
        bytearray(int(words[1]))
    elif words[0] == "print":
        print("nothing of this is an answer", flush=True)
        os.write(1, b"nor this\\n")
    elif words[0] == "raise":
        raise {"ZeroDivisionError": ZeroDivisionError, "ImportError": ImportError}[words[1]]("why")
    elif words[0] == "talk":
        raise CheckpointFormatError("x" * int(words[1]), path=path, tensor="w")
    elif words[0] == "swap":
        return Index("keras-h5", (FileIdentity("/etc/passwd", 1, 1, 1, 1),), ())
    return Index("keras-h5", (identify(path),), (), metadata={"text": "y" * 1000})
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """Write a file that does something; returns a function from words to (module, path)."""
    (tmp_path / "hostile_format.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)

    def write(words):
        path = tmp_path / f"{words.split()[0]}.h5"
        path.write_text(words)
        return "hostile_format", str(path)

    return write


@pytest.fixture
def make_reader():
    readers = []

    def make(limits=QUICK):
        readers.append(Reader(limits))
        return readers[-1]

    yield make
    for reader in readers:
        if reader.process is not None:
            reader.process.stdin.close()
            assert reader.process.wait(30) == 0  # it ends with its input, of itself
        reader.close()


@pytest.fixture
def reader(make_reader):
    return make_reader()


@pytest.fixture
def shared_reader(monkeypatch):
    """The reader of the public functions, with shorter limits."""
    monkeypatch.setattr(isolated._READER, "limits", QUICK)
    return isolated._READER


def good_index(reader):
    return reader.read_index(KERAS, str(GOOD))


def ended(pid):
    """Wait until a process that need not be a child has ended, and say whether it has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 30)[0])
    finally:
        os.close(descriptor)


# The same as in this process


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.h5")), ids=lambda path: path.name)
def test_a_good_file_has_the_same_index_as_in_this_process(path):
    with (
        wavg.open_checkpoint(path) as here,
        wavg.open_checkpoint(path, isolate=True) as there,
    ):
        assert there.index == here.index


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_formats_that_need_no_hdf5_are_read_here(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(isolated, "read_index", None)
    path = tmp_path / f"m{suffix}"
    wavg.save(path, {"w": [1.0, 2.0]})
    assert wavg.load(path, isolate=True)["w"].tolist() == [1.0, 2.0]


def test_every_function_that_opens_files_can_isolate(tmp_path):
    paths = [GOLDEN / "keras3_mlp_1.h5", GOLDEN / "keras3_mlp_2.h5"]
    for isolate in (False, True):
        wavg.average_checkpoints(paths, tmp_path / f"{isolate}.h5", isolate=isolate)
    assert (tmp_path / "True.h5").read_bytes() == (tmp_path / "False.h5").read_bytes()
    assert len(wavg.plan_average(paths, isolate=True).inputs) == 2
    assert wavg.load(GOOD, isolate=True).keys() == wavg.load(GOOD).keys()


def test_the_files_of_a_run_share_one_process_and_one_list_of_tensors(shared_reader):
    first = wavg.open_checkpoint(GOOD, isolate=True)
    pid = shared_reader.process.pid
    with first, isolated_like(first.index) as second:
        assert second.index.tensors is first.index.tensors
    assert shared_reader.process.pid == pid


def isolated_like(index):
    from wavg.formats import open_file

    return open_file(str(GOLDEN / "keras3_mlp_2.h5"), like=index, isolate=True)


def test_a_missing_file_is_a_file_not_found(reader):
    with pytest.raises(FileNotFoundError) as caught:
        reader.read_index(KERAS, "/no/such/model.h5")
    assert caught.value.filename == "/no/such/model.h5"


def test_an_error_arrives_with_its_message_and_attributes(tmp_path, reader):
    path = tmp_path / "cut.h5"
    path.write_bytes(GOOD.read_bytes()[:-3000])
    big = {"w/kernel": [1.0] * 1000}
    wavg.save(tmp_path / "big.h5", big)
    (tmp_path / "short.h5").write_bytes((tmp_path / "big.h5").read_bytes()[:-10])
    for damaged in (path, tmp_path / "short.h5"):
        with pytest.raises(CheckpointFormatError) as here:
            keras_h5.read_index(str(damaged))
        with pytest.raises(CheckpointFormatError) as there:
            reader.read_index(KERAS, str(damaged))
        assert type(there.value) is type(here.value)
        for attribute in ("args", "path", "tensor"):
            assert getattr(there.value, attribute) == getattr(here.value, attribute)


def test_an_option_arrives(tmp_path, reader):
    path = tmp_path / "m.h5"
    wavg.save(path, {"layer/w": np.zeros(4, ml_dtypes.bfloat16)})
    with h5py.File(path, "r+") as file:
        del file["layer/w"].attrs["dtype"]
    with pytest.raises(CheckpointFormatError, match="opaque_dtype"):
        reader.read_index(KERAS, str(path))
    index = reader.read_index(KERAS, str(path), opaque_dtype="bfloat16")
    assert index.tensors[0].dtype == "bfloat16"


def test_paths_may_be_relative_and_of_any_bytes(tmp_path, monkeypatch, reader):
    good_index(reader)  # it starts elsewhere
    name = os.fsdecode(b"m\xff\n\xc3\xa9.h5")
    shutil.copy(GOOD, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    index = reader.read_index(KERAS, name)
    assert index.path == name
    assert index.tensors == good_index(reader).tensors


def test_an_attribute_may_have_a_name_of_any_bytes(tmp_path, reader):
    path = tmp_path / "m.h5"
    shutil.copy(GOOD, path)
    with h5py.File(path, "r+") as file:
        file.attrs[b"\xff"] = "text"
    index = keras_h5.read_index(str(path))
    assert all(isinstance(key, str) for key in index.metadata)
    assert reader.read_index(KERAS, str(path)) == index


def test_threads_share_a_process(reader):
    paths = sorted(map(str, GOLDEN.glob("*.h5"))) * 3
    with ThreadPoolExecutor(8) as pool:
        indexes = list(pool.map(lambda path: reader.read_index(KERAS, path), paths))
    assert indexes == [keras_h5.read_index(path) for path in paths]


# What a hostile file can do


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("crash", r"the HDF5 library crashed on it \(SIGSEGV\)"),
        (f"end {signal.SIGABRT:d}", r"the HDF5 library crashed on it \(SIGABRT\)"),
        pytest.param(
            "end 40",  # Python has no name for it
            r"the HDF5 library crashed on it \(signal 40\)",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="a real-time signal there"),
        ),
        ("spin", r"reading it took more than 1 s of processor time.*--no-isolate"),
        ("stick", r"the HDF5 library did not come back within 0.5 s of processor time: [^-]*$"),
        ("exit", r"ended without an answer \(exit code 3\)"),
        ("swap", "talks nonsense: other files than asked for"),
    ],
)
def test_what_ends_the_process_is_a_format_error_and_the_next_file_gets_a_new_one(
    hostile, reader, words, told
):
    module, path = hostile(words)
    before = good_index(reader)
    pid = reader.process.pid
    with pytest.raises(CheckpointFormatError, match=told) as caught:
        reader.read_index(module, path)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ")
    assert ended(pid)
    assert good_index(reader) == before
    assert reader.process.pid != pid


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("allocate 400000000", "too much memory"),
        ("raise ZeroDivisionError", r"reading it failed \(ZeroDivisionError: why\)"),
        ("talk 5000", "xxx"),
    ],
)
def test_what_the_process_survives_is_a_format_error_too(hostile, make_reader, words, told):
    reader = make_reader(Limits(cpu=5, memory=100 << 20))
    module, path = hostile(words)
    with pytest.raises(CheckpointFormatError, match=told) as caught:
        reader.read_index(module, path)
    assert caught.value.path == path
    assert len(str(caught.value)) < 5000
    pid = reader.process.pid
    assert good_index(reader)
    assert reader.process.pid == pid


def test_many_calls_that_come_back_are_not_taken_for_one_that_does_not(hostile, make_reader):
    """Where nearly all of the time is the system's."""
    assert make_reader(Limits(cpu=20, stall=0.25)).read_index(*hostile("many 1.5"))


def test_memory_within_the_limit_is_given(hostile, make_reader):
    module, path = hostile("allocate 50000000")
    assert make_reader(Limits(cpu=5, memory=100 << 20)).read_index(module, path)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux sets limits of others")
def test_a_limit_that_stands_already_is_not_raised(hostile, make_reader):
    reader = make_reader(Limits(cpu=5, memory=1 << 40))
    good_index(reader)
    child = reader.process.pid
    pages = int(Path(f"/proc/{child}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (100 << 20)
    resource.prlimit(child, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointFormatError, match="too much memory"):
        reader.read_index(*hostile("allocate 400000000"))
    assert reader.process.pid == child


def test_where_the_system_has_no_such_limits_the_clocks_holds(hostile, make_reader, tmp_path):
    (tmp_path / "resource.py").write_text("raise ImportError('as on Windows')")
    reader = make_reader(Limits(cpu=5, wall=0.5))
    module, path = hostile("wait")
    with pytest.raises(CheckpointFormatError, match=r"more than 0\.5 s"):
        reader.read_index(module, path)
    reader.limits = QUICK
    assert good_index(reader)


def test_a_missing_package_is_told_as_such(hostile, reader):
    with pytest.raises(MissingDependencyError, match="why"):
        reader.read_index(*hostile("raise ImportError"))
    with pytest.raises(MissingDependencyError, match="no_such_module"):
        reader.read_index("no_such_module", str(GOOD))


@pytest.mark.parametrize("which", ["the child's timer", "this process's"])
def test_waiting_ends_where_no_processor_time_is_used(hostile, make_reader, which):
    reader = make_reader(Limits(cpu=5, wall=0.5))
    good_index(reader)
    module, path = hostile("wait")
    if which == "this process's":  # a child that has been taken over lets its own timer be
        reader.limits = LaterInTheChild(5, 0.5, 512 << 20)
    with pytest.raises(CheckpointFormatError, match=r"more than 0\.5 s"):
        reader.read_index(module, path)


class LaterInTheChild(Limits):
    def __iter__(self):  # what goes into the request
        return iter((self.cpu, 60, self.memory, self.stall))


def test_limits_hold_where_this_process_ignores_or_blocks_the_timers_signals(hostile, make_reader):
    numbers = {signal.SIGPROF, signal.SIGXCPU, signal.SIGALRM}
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        reader = make_reader()
        for words in ("spin", "stick"):
            with pytest.raises(CheckpointFormatError, match="processor time"):
                reader.read_index(*hostile(words))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_answer_without_end_is_not_read(hostile, reader, monkeypatch):
    module, path = hostile("good")
    assert reader.read_index(module, path)
    monkeypatch.setattr(isolated, "_LONGEST_ANSWER", 500)
    with pytest.raises(CheckpointFormatError, match=r"without end|nonsense"):
        reader.read_index(module, path)


def test_what_a_library_prints_is_no_answer(hostile, reader):
    module, path = hostile("print")
    assert reader.read_index(module, path).format == "keras-h5"


def test_a_process_killed_between_files_is_replaced(reader):
    before = good_index(reader)
    pid = reader.process.pid
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert good_index(reader) == before
    assert reader.process.pid != pid


def test_an_interrupt_ends_the_process_whose_answer_nobody_awaits(hostile, make_reader, tmp_path):
    reader = make_reader(Limits(cpu=30, wall=60))
    fifo = tmp_path / "reached"
    os.mkfifo(fifo)
    good_index(reader)
    pid = reader.process.pid

    def interrupt():
        fifo.read_bytes()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        reader.read_index(*hostile(f"spin {fifo}"))
    thread.join()
    assert ended(pid)
    assert good_index(reader)


@pytest.mark.parametrize("program", ["/no/such/python", "/bin/true"])
def test_a_process_that_cannot_start_is_no_fault_of_the_file(reader, monkeypatch, program):
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(WavgError, match="--no-isolate") as caught:
        good_index(reader)
    assert not isinstance(caught.value, CheckpointFormatError)


# The process and its parent


def run_python(code, *arguments, flags=()):
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert not done.stderr
    return done.stdout


def test_terminal_signals_do_not_reach_it(reader):
    good_index(reader)
    assert os.getsid(reader.process.pid) != os.getsid(0)


@pytest.mark.parametrize("state", ["idle", "hung"])
def test_it_does_not_outlive_a_killed_parent(hostile, tmp_path, state):
    fifo = tmp_path / "reached"
    os.mkfifo(fifo)
    module, path = hostile(f"spin {fifo}")
    code = f"""if True:
        import sys; sys.path[:0] = [{str(tmp_path)!r}]
        from wavg.formats.isolated import Limits, Reader
        reader = Reader(Limits(cpu=1, stall=0.5))
        reader.read_index({KERAS!r}, {str(GOOD)!r})
        print(reader.process.pid, flush=True)
        if {state!r} == "hung":
            reader.read_index({module!r}, {path!r})
        sys.stdin.read()
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as parent:
        child = int(parent.stdout.readline())
        if state == "hung":
            fifo.read_bytes()
        parent.kill()
        parent.wait()
        assert ended(child)


def test_it_ends_with_the_interpreter():
    code = """if True:
        import sys, wavg
        from wavg.formats import isolated
        wavg.load(sys.argv[1], isolate=True)
        print(isolated._READER.process.pid)
    """
    assert ended(int(run_python(code, GOOD, flags=["-X", "dev"])))


@pytest.mark.parametrize("began", [True, False])
def test_a_copy_made_by_fork_has_a_process_of_its_own(began):
    code = f"""if True:
        import os, sys, wavg
        from wavg.formats import isolated
        if {began}:
            wavg.load(sys.argv[1], isolate=True)
        first = isolated._READER.process and isolated._READER.process.pid
        copy = os.fork()
        wavg.load(sys.argv[1], isolate=True)
        os.write(1, b"%r\\n" % (first == isolated._READER.process.pid))  # a line at once
        if copy:
            assert os.waitpid(copy, 0)[1] == 0
    """
    printed = run_python(code, GOOD, flags=["-W", "error"]).split()
    assert sorted(printed) == ["False", str(began)]


def test_it_finds_its_modules_where_an_isolated_interpreter_does():
    source = str(Path(wavg.__file__).parents[1])
    code = f"import sys; sys.path[:0] = [{source!r}]; import wavg; " + (
        f"print(len(wavg.load({str(GOOD)!r}, isolate=True)))"
    )
    assert run_python(code, flags=["-I"]) == "4\n"


def test_looking_into_a_file_loads_no_hdf5_here():
    code = """if True:
        import sys, wavg
        wavg.load(sys.argv[1], isolate=True)
        print("h5py" in sys.modules)
        wavg.load(sys.argv[1])
        print("h5py" in sys.modules)
    """
    assert run_python(code, GOOD).split() == ["False", "True"]


# What goes over the pipe

SOME = Index(
    "keras-h5",
    (FileIdentity("d/m.h5", 100, 1, 2, 3), FileIdentity("d/n.h5", 50, -1, 2, 3)),
    (
        TensorSpec("w", "float32", (2, 3), Extent(0, 10, 24)),
        TensorSpec("v", "bfloat16", (4,), Extent(1, 42, 8), True),
        TensorSpec("é\ud800", "float64", ()),
    ),
    (TensorSpec("slot", "int32", (0,), Extent(0, 0, 0)),),
    {"a": "1", "": "\n"},
    b"\x00\xff",
    (Checksum(Extent(1, 0, 50), 0xFFFFFFFF, "member", (4, 46)), Checksum(Extent(0, 9, 1), 0, "x")),
    7,
)


def test_an_index_comes_back_with_every_field():
    assert all(getattr(SOME, field.name) for field in dataclasses.fields(Index)), "add an example"
    back = wire.decode("d/m.h5", wire.encode(SOME).encode())
    assert back == SOME
    for field in dataclasses.fields(Index):
        assert type(getattr(back, field.name)) is type(getattr(SOME, field.name))
    assert "\n" not in wire.encode(SOME)


def changed(**fields):
    return json.dumps({**json.loads(wire.encode(SOME)), **fields})


def tensor(*parts):
    return changed(tensors=[list(parts)])


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "7",
        "null",
        '"text"',
        "{}",
        "[" * 100_000,
        "9" * 5000,
        changed(more=1),
        changed(format=1),
        changed(format="keras-h6"),
        changed(format="npz"),
        tensor("w", "float32", [0, 2**62], [0, 10, 0], False),
        tensor("w", "float32", [0] * 65, [0, 10, 0], False),
        changed(files=[]),
        changed(files={}),
        changed(files=[["d/m.h5", 100, 1, 2]]),
        changed(files=[["d/m.h5", 100.0, 1, 2, 3]]),
        changed(files=[["d/m.h5", True, 1, 2, 3]]),
        changed(files=[["d/other.h5", 100, 1, 2, 3]]),
        changed(files=[["d/m.h5", 100, 1, 2, 3], ["/etc/passwd", 1, 1, 1, 1]]),
        changed(files=[["d/m.h5", 100, 1, 2, 3], ["d/../../x", 1, 1, 1, 1]]),
        changed(files=[["d/m.h5", 100, 1, 2, 3]]),  # a tensor is in the second
        changed(metadata={"a": 1}),
        changed(metadata=[]),
        changed(signature="zz"),
        changed(signature=None),
        tensor("w", "float32", [2, 3], [0, 10, 24]),
        tensor("w", "float32", [2, 3], [0, 10, 24], 0),
        tensor(None, "float32", [2, 3], [0, 10, 24], False),
        tensor("w", "float33", [2, 3], [0, 10, 24], False),
        tensor("w", "float32", "23", [0, 10, 24], False),
        tensor("w", "float32", [2, "3"], [0, 10, 24], False),
        tensor("w", "float32", [-2, -3], [0, 10, 24], False),
        tensor("w", "float32", [2, 3], [0, 10, 20], False),
        tensor("w", "float32", [2, 3], [0, 77, 24], False),
        tensor("w", "float32", [2, 3], [0, -1, 24], False),
        tensor("w", "float32", [2, 3], [2, 10, 24], False),
        tensor("w", "float32", [2, 3], [-1, 10, 24], False),
        changed(tensors=[["w", "uint8", [1], [0, n, 1], False] for n in (1, 2)]),
        changed(others=[["w", "float32", [2, 3], [0, 77, 24], False]]),
        changed(checksums=[[[0, 0, 101], 0, "x", []]]),
        changed(checksums=[[[2, 0, 1], 0, "x", []]]),
        changed(checksums=[[[1, 0, 50], 0, "x", [47]]]),
        changed(checksums=[[[1, 0, 50], 0, "x", [-1]]]),
        changed(checksums=[[[1, 0, 50], "0", "x", []]]),
        changed(reader_bytes=-1),
        "[]",
        '["CheckpointFormatError", "m", null, null, "5"]',
        '["CheckpointFormatError", null, null, null, null]',
    ],
)
def test_nonsense_is_refused(line):
    with pytest.raises(CheckpointFormatError, match="talks nonsense") as caught:
        wire.decode("d/m.h5", line.encode())
    assert caught.value.path == "d/m.h5"
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("kind", "number", "expected"),
    [
        ("SystemExit", None, CheckpointFormatError),
        ("WavgError", None, CheckpointFormatError),
        ("OutputError", None, CheckpointFormatError),
        ("CheckpointChangedError", None, wavg.CheckpointChangedError),
        ("x", 13, PermissionError),
        ("x", 10**30, CheckpointFormatError),
        ("x", -1, CheckpointFormatError),
    ],
)
def test_an_exception_is_one_of_those_that_reading_raises(kind, number, expected):
    line = json.dumps([kind, "why", None, None, number])
    assert type(wire.decode("m.h5", line.encode())) is expected


# Files that crash or hang HDF5

MUTANTS = json.loads((GOLDEN / "hostile" / "mutants.json").read_text())
ONE_OF_EACH = [*{mutant["does"]: mutant for mutant in MUTANTS}.values()]
SEEN_WITH = {"1.14.6", "2.0.0"}  # versions of HDF5 that the mutants are known to end


def named(mutant):
    return f"{mutant['does']}-{mutant['base']}-{mutant['edits'][0][0]}"


def made(mutant, folder):
    """Write a mutant to a file, from its recipe."""
    data = bytearray((GOLDEN / mutant["base"]).read_bytes())
    for offset, text in mutant["edits"]:
        new = bytes.fromhex(text)
        data[offset : offset + len(new)] = new
    path = folder / "mutant.h5"
    path.write_bytes(data)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=named)
def test_a_file_that_ends_hdf5_is_a_format_error_in_isolation(mutant, tmp_path, shared_reader):
    path = made(mutant, tmp_path)
    with pytest.raises(CheckpointFormatError) as caught:
        wavg.load(path, isolate=True)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.path == path
    assert wavg.load(GOOD, isolate=True)


@pytest.mark.parametrize("mutant", ONE_OF_EACH, ids=named)
def test_that_file_is_one_line_on_the_command_line(mutant, tmp_path, shared_reader, capsys):
    path = made(mutant, tmp_path)
    output = tmp_path / "average.h5"
    assert main(["inspect", path]) == 1
    assert main(["average", str(GOLDEN / mutant["base"]), path, "-o", str(output)]) == 1
    shown = capsys.readouterr()
    assert not shown.out
    assert [line.startswith(f"wavg: {path}: ") for line in shown.err.splitlines()] == [True, True]
    assert not output.exists()


@pytest.mark.skipif(h5py.version.hdf5_version not in SEEN_WITH, reason="another HDF5")
@pytest.mark.parametrize(
    "mutant", [mutant for mutant in ONE_OF_EACH if mutant["does"] != "memory"], ids=named
)
def test_that_file_ends_a_process_that_reads_it_itself(mutant, tmp_path):
    code = """if True:
        import resource, signal, sys, wavg
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.setitimer(signal.ITIMER_PROF, 1)
        try:
            wavg.load(sys.argv[1])
        except wavg.WavgError:
            pass
    """
    done = subprocess.run([sys.executable, "-c", code, made(mutant, tmp_path)], check=False)
    assert -done.returncode == {"crash": signal.SIGSEGV, "endless": signal.SIGPROF}[mutant["does"]]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is Linux's")
def test_this_process_stays_small_whatever_the_file_asks_for(tmp_path):
    code = """if True:
        import re, sys, wavg
        from wavg.formats import isolated
        for path in sys.argv[1:]:
            try:
                wavg.load(path, isolate=True)
            except wavg.CheckpointFormatError:
                pass
            for pid in ("self", isolated._READER.process.pid):
                status = open(f"/proc/{pid}/status").read()
                print(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]))
    """
    paths = []
    for number, mutant in enumerate(MUTANTS):
        if mutant["does"] == "memory":
            (tmp_path / str(number)).mkdir()
            paths.append(made(mutant, tmp_path / str(number)))
    peaks = [int(line) * 1024 for line in run_python(code, *paths).split()]
    assert len(peaks) == 2 * len(paths) >= 2
    assert max(peaks[::2]) < 150 << 20  # this one
    assert max(peaks[1::2]) < 700 << 20  # the one that reads
