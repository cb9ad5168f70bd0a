"""Archives of any kind, ``.npz`` and ``.keras``: no crash, and NumPy agrees on what they hold."""

from __future__ import annotations

import ast
import collections
import io
import json
import math
import os
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wavg
from wavg import CheckpointFormatError, OutputError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = ("zip_mutations", "zip_mutants", "npy_mutants", "zip_records", "mutants")


@pytest.fixture(scope="module")
def script():
    """benchmarks/zip_mutations.py, which compares the two."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(BENCHMARKS)
        import zip_mutations

        yield zip_mutations
    for name in (*MODULES, "mutation_runs", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def judged(script, tmp_path, monkeypatch):
    """Have wavg and NumPy read a file, and return the tally."""
    monkeypatch.setattr(script, "SECONDS", 60)

    def judged(content, load=script.read_whole):
        tally = script.Tally()
        script.judge(tally, script.Mutant(content, "made"), tmp_path / "m.npz", load)
        return tally

    return judged


def npz(members=None, method=zipfile.ZIP_STORED, **arrays):
    """Return an archive of members as they are, and of arrays."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in (members or {}).items():
            archive.writestr(name, content)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as out:
                np.lib.format.write_array(out, array)
    return file.getvalue()


def npy(header, data=b"", magic=b"\x93NUMPY\1\0"):
    text = header.encode("latin1")
    return magic + len(text).to_bytes(2, "little") + text + data


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
GOOD = npz(a=np.float32([[1, 2], [3, 4]]), b=np.arange(3))


# --- very many ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "archives"), [(400, 100), pytest.param(30_000, 10_000, marks=pytest.mark.slow)]
)
def test_the_recorded_script_finds_nothing(count, archives):
    command = [sys.executable, str(BENCHMARKS / "zip_mutations.py"), "--no-record"]
    sizes = ["--count", str(count), "--archives", str(archives), "--workers", "1"]
    done = subprocess.run(
        [*command, *sizes, "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert figures[".npz"]["accepted by both"] > count / 5
    assert figures["zips of .keras"]["accepted by both"] > archives / 5


descrs = st.sampled_from(["'<f4'", "'<u2'", "'|u1'", "'<f8'", "'>f4'", "'|O'", "'<c8'", "'|V2'"])
names = st.sampled_from(["bfloat16", "float8_e4m3fn", "float32", "a", ""])
pairs = st.tuples(names, st.sampled_from(["<u2", "|u1", "<u4", ">u2", "<f4"]))
structures = st.lists(pairs | st.tuples(names, st.just("<u2"), st.just((2,))), max_size=2).map(repr)
numbers = st.integers(-1, 4) | st.sampled_from([2**31, 2**62, 2**63, 2**64, True, 1.0, None])
sizes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
shapes = st.lists(numbers, max_size=3).map(tuple) | st.lists(numbers, max_size=2) | numbers
values = {
    "descr": descrs | descrs | structures,
    "fortran_order": st.sampled_from(["True", "False", "False", "1", "None"]),
    "shape": (sizes | sizes | shapes).map(repr),
}
# What every reader has to accept: else nearly all that is drawn is refused.
sound_values = {
    "descr": st.sampled_from(["'<f4'", "'<u2'", "'|u1'", "'<f8'", "'>f4'", "'<c8'"]),
    "fortran_order": st.sampled_from(["True", "False"]),
    "shape": sizes.map(repr),
}


@st.composite
def headers(draw):
    """The text of a header: three fields in any order, sometimes fewer, more or of other values."""
    if draw(st.booleans()):
        keys = draw(st.permutations(list(sound_values)))
        return "{" + ", ".join(f"{key!r}: {draw(sound_values[key])}" for key in keys) + "}"
    keys = draw(st.permutations(list(values)))[: draw(st.sampled_from([3, 3, 3, 3, 2]))]
    fields = [f"{key!r}: {draw(values[key])}" for key in keys]
    if draw(st.integers(0, 9)) == 0:
        fields.append(draw(st.sampled_from(["'more': 1", "'shape': (1,)", "1: 2", "**{}"])))
    return "{" + ", ".join(fields) + draw(st.sampled_from(["}", ", }", ",}\n", "} "]))


def bytes_of(header):
    """Return how many bytes of numbers a header asks for; none where it is not sound, or huge."""
    try:
        fields = ast.literal_eval(header)
        dtype = np.lib.format.descr_to_dtype(fields["descr"])
        return len(bytes(min(10_000, math.prod(fields["shape"]) * dtype.itemsize)))
    except Exception:
        return 0


@pytest.mark.parametrize("examples", [80, pytest.param(3_000, marks=pytest.mark.slow)])
def test_numpy_agrees_on_headers(judged, examples):
    @settings(max_examples=examples, deadline=None, database=None)
    @given(headers(), st.sampled_from([0, 0, 0, 1]), st.sampled_from([zipfile.ZIP_STORED, 8]))
    def check(header, more, method):
        data = os.urandom(bytes_of(header) + more)
        tally = judged(npz({"a.npy": npy(header, data)}, method))
        assert not tally.wrong
        counts.update(tally.counts)

    counts = collections.Counter()
    check()
    assert min(counts["accepted by both"], counts["refused by both"]) > examples / 30


def test_mutants_are_the_same_for_the_same_seed(script):
    first, again = (
        [script.mutant(rng) for _ in range(200)] for rng in (random.Random(5), random.Random(5))
    )
    assert first == again


def test_a_sound_archive_taken_apart_is_put_together_again(script):
    from zip_mutants import a_base, a_keras_base
    from zip_records import put_together, taken_apart

    rng = random.Random(0)
    for _ in range(60):
        for content in (a_base(rng), a_keras_base(rng, b"weights")):
            assert put_together(taken_apart(content)) == content


# --- what was accepted once, or crashed -----------------------------------------------------------


def with_offset_of(content, value):
    """Give the first member's place in 64 bits, in the directory's entry."""
    start = content.index(b"PK\1\2")
    name, extra, comment = struct.unpack_from("<HHH", content, start + 28)
    assert (extra, comment) == (0, 0)
    entry = bytearray(content[start : start + 46 + name])
    entry[30:32] = struct.pack("<H", 12)
    entry[42:46] = b"\xff" * 4
    entry += struct.pack("<HHQ", 1, 8, value)
    rest = content[start + 46 + name :]
    end = rest.index(b"PK\5\6")
    size = struct.unpack_from("<I", rest, end + 12)[0] + 12
    rest = rest[: end + 12] + struct.pack("<I", size) + rest[end + 16 :]
    return content[:start] + bytes(entry) + rest


TWO = np.float32([1, 2]).tobytes()
ONCE = {
    "a minor version that is none": npz({"a.npy": npy(PLAIN, TWO, b"\x93NUMPY\1\xa2")}),
    "a shape of every number": npz(
        {"a.npy": npy(PLAIN.replace("'<f4'", "[('bfloat16', '<u2', (2,))]"), TWO[:4])}
    ),
    "a place beyond all numbers": with_offset_of(npz(a=np.zeros(2)), 2**63),
    "a dtype that NumPy cannot parse": npz({"a.npy": npy(PLAIN.replace("<f4", ",<f4"), TWO)}),
    "a header with more in it": npz({"a.npy": npy(PLAIN.replace("}", "'more': 1}"), TWO)}),
    "a header too long": npz({"a.npy": npy(PLAIN + " " * 10_000, TWO)}),
    "a header that is no table": npz({"a.npy": npy("('<f4', False, (2,))", TWO)}),
}


@pytest.mark.parametrize("case", ONCE)
def test_what_numpy_refuses_is_refused(judged, case):
    tally = judged(ONCE[case])
    assert not tally.wrong
    assert tally.counts == {"refused by both": 1}


def test_names_that_numpy_takes_for_each_other_are_refused(tmp_path):
    arrays = {"a": np.float32([1]), "a.npy": np.float32([2])}
    np.savez(tmp_path / "m.npz", **arrays)
    with np.load(tmp_path / "m.npz") as found:
        assert found["a.npy"] == 1
    with pytest.raises(CheckpointFormatError, match=r"'a.npy' is what NumPy gives for the array"):
        wavg.load(tmp_path / "m.npz")
    with pytest.raises(OutputError, match="rename one of them"):
        wavg.save(tmp_path / "new.npz", arrays)


@pytest.mark.parametrize(("flag", "why"), [(0x40, "is encrypted"), (0x20, "is a patch")])
@pytest.mark.parametrize("member", ["model.weights.h5", "config.json"])
def test_flags_that_the_zip_library_refuses_are_refused(script, tmp_path, member, flag, why):
    from zip_mutants import a_keras_base
    from zip_records import put_together, taken_apart

    archive = taken_apart(a_keras_base(random.Random(1), script.inner()))
    found = next(each for each in archive.members if each.name.decode() == member)
    path = tmp_path / "m.keras"
    path.write_bytes(put_together(archive))
    wavg.load(path)
    found.own["flags"] |= flag
    found.entry["flags"] |= flag
    path.write_bytes(put_together(archive))
    with pytest.raises(CheckpointFormatError, match=f"member '{member}' {why}"):
        wavg.load(path)
    tally = script.Tally()
    script.judge_archive(tally, script.Mutant(path.read_bytes(), ""), path, random.Random(0))
    assert tally.counts == {"refused by both": 1}


@pytest.mark.parametrize("descr", ["<f4", "=f4", "f4", "|u1", "|b1", "<c16"])
def test_plain_texts_of_dtypes_are_read_as_numpy_reads_them(judged, descr):
    size = np.dtype(descr).itemsize
    tally = judged(npz({"a.npy": npy(PLAIN.replace("<f4", descr), bytes(2 * size))}))
    assert tally.counts == {"accepted by both": 1}


# --- what only NumPy accepts ----------------------------------------------------------------------

BOMB = np.zeros(20_000, np.int8)
LENIENT = {
    "a member that is no array": npz({"notes.txt": b"x"}),
    "text, dates, structures, numbers of another byte order or width": npz(a=np.zeros(2, ">f4")),
    "another compression than deflate": npz(method=zipfile.ZIP_BZIP2, a=np.arange(3)),
    "more than 100 times its size": npz(method=zipfile.ZIP_DEFLATED, a=BOMB),
    "bytes behind the numbers": npz({"a.npy": npy(PLAIN, TWO + b"x")}),
    "a dtype by another name": npz({"a.npy": npy(PLAIN.replace("<f4", "float32"), TWO)}),
    "a header that NumPy mends": npz({"a.npy": npy(PLAIN.replace("(2,)", "(2L,)"), TWO)}),
    "an unsafe name": npz({"../a.npy": npy(PLAIN, TWO)}),
}


@pytest.mark.parametrize("reason", LENIENT)
def test_what_only_numpy_accepts_is_told_apart(judged, reason):
    tally = judged(LENIENT[reason])
    assert not tally.wrong
    assert tally.differences == {reason: 1}


# --- the comparison itself ------------------------------------------------------------------------


def crashing(path):
    raise KeyError("planted")


def endless(path):
    while True:
        pass


def refusing(path):
    raise CheckpointFormatError("planted")


def changed(**changes):
    def load(path):
        return {**wavg.load(path), **changes}

    return load


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (wavg.load, None),
        (crashing, "KeyError"),
        (endless, "over time"),
        (refusing, "only wavg refuses"),
        (lambda path: dict(reversed(wavg.load(path).items())), "other names"),
        (changed(c=np.zeros(1)), "other names"),
        (changed(b=np.arange(3, dtype=np.uint64)), "another dtype"),
        (changed(b=np.arange(4)), "another shape"),
        (changed(b=np.arange(3)[::-1]), "other bytes"),
        (changed(a=np.asfortranarray(np.float32([[1, 2], [3, 4]]))), "another order"),
    ],
)
def test_a_planted_fault_is_seen(script, judged, monkeypatch, plant, found):
    if plant is endless:
        monkeypatch.setattr(script, "SECONDS", 0.05)
    tally = judged(GOOD, plant)
    assert bool(tally.wrong) == (found is not None)
    assert found is None or found in tally.wrong[0]


def test_what_wavg_alone_accepts_is_seen(judged):
    tally = judged(GOOD[:-1], lambda path: {"a": np.zeros(1)})
    assert "only NumPy refuses" in tally.wrong[0]


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (None, None),
        ("crashing", "KeyError"),
        ("refusing", "only wavg refuses"),
        ("other bytes", "other bytes or metadata"),
        ("accepting", "only the zip library refuses"),
        ("weights", "with its weights"),
    ],
)
def test_a_planted_fault_in_archives_is_seen(script, tmp_path, monkeypatch, plant, found):
    from zip_mutants import a_keras_base

    content = a_keras_base(random.Random(1), script.inner())
    true = script.everything
    if plant == "crashing":
        monkeypatch.setattr(script, "everything", crashing)
    elif plant == "refusing":
        monkeypatch.setattr(script, "everything", refusing)
    elif plant == "other bytes":
        monkeypatch.setattr(script, "everything", lambda c: {script.WEIGHTS: np.zeros(1)})
    elif plant == "accepting":
        monkeypatch.setattr(script, "by_zipfile", crashing)
    elif plant == "weights":
        monkeypatch.setattr(script, "WHOLE_EVERY", 1)
        monkeypatch.setattr(wavg, "load", refusing)
    assert script.everything is true or plant
    tally = script.Tally()
    script.judge_archive(tally, script.Mutant(content, ""), tmp_path / "m.keras", random.Random(0))
    assert len(tally.wrong) == (found is not None), tally.wrong
    assert found is None or found in tally.wrong[0]
