"""Safetensors headers of any kind: no crash, and the reference parser agrees on what they hold."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hf_folders
import wavg
from wavg import CheckpointFormatError
from wavg.checkpoint import FileIdentity
from wavg.formats.safetensors import noted, parsed
from wavg.templates import Template

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def script():
    """benchmarks/safetensors_mutations.py, which compares the two."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(BENCHMARKS)
        import safetensors_mutations

        yield safetensors_mutations
    for name in ("safetensors_mutations", "mutation_runs", "mutants", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def agree(script, tmp_path, monkeypatch):
    """Raise an error unless wavg and the reference agree on a header, or on a whole file."""
    monkeypatch.setattr(script, "SECONDS", 60)  # hypothesis has much garbage to collect

    def agree(raw, data=b"", whole=None):
        tally = script.Tally()
        made = script.Mutant(raw, data, "drawn")
        script.judge(tally, made, tmp_path / "drawn.safetensors", whole)
        assert not tally.wrong
        return tally

    return agree


# --- what may be in a header ----------------------------------------------------------------------

CODES = {"F64": 8, "F32": 4, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "C64": 8}
texts = st.text(max_size=6)
names = texts.filter(lambda name: name != "__metadata__")
layouts = st.tuples(st.sampled_from(list(CODES)), st.lists(st.integers(0, 3), max_size=3))


@st.composite
def sound_headers(draw):
    """A header that every parser has to accept, as a table, and the length of its data."""
    found = draw(st.dictionaries(names, layouts, max_size=5))
    start, header = 0, {}
    for name in draw(st.permutations(list(found))):
        code, shape = found[name]
        end = start + CODES[code] * functools.reduce(int.__mul__, shape, 1)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        start = end
    ordered = {name: header[name] for name in draw(st.permutations(list(header)))}
    if draw(st.booleans()):
        metadata = {"__metadata__": draw(st.none() | st.dictionaries(texts, texts, max_size=3))}
        ordered = {**metadata, **ordered} if draw(st.booleans()) else {**ordered, **metadata}
    return ordered, start


def written(header, ascii_only=True, spaces=0):
    text = json.dumps(header, ensure_ascii=ascii_only) + " " * spaces
    return text.encode("utf-8", "surrogatepass")


numbers = st.one_of(st.integers(-2, 9), st.integers(2**31, 2**66), st.floats(), st.booleans())
anything = st.recursive(
    st.one_of(st.none(), numbers, texts, st.sampled_from([*CODES, "F4", "F33", "\ud800"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def broken_headers(draw):
    """A sound header of which some values are others, and the length of its data."""
    header, size = draw(sound_headers())
    for _ in range(draw(st.integers(1, 3))):
        place = header
        while isinstance(place, (dict, list)) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], (dict, list)) or draw(st.integers(0, 4)) == 0:
                place[key] = draw(anything)
                break
            place = place[key]
    return header, draw(st.sampled_from([size, size, size + 1, max(0, size - 1)]))


# What a header is made of, put together in any way.
pieces = st.sampled_from(
    [
        *(
            '{"',
            '"}',
            '":{"',
            '"dtype":"',
            '","',
            'F32"',
            '"shape":[',
            '],"',
            "data_offsets",
            '":[',
        ),
        *("0", "8", "-0", ",", "]", "}", "}}", "{", "[", " ", "\\", "\\ud800", '"', ":", "NaN"),
    ]
)
jumbled = st.lists(pieces, max_size=30).map(lambda parts: "".join(parts).encode())


def check_sound(agree, examples):
    @settings(max_examples=examples, deadline=None, database=None)
    @given(sound_headers(), st.booleans(), st.integers(0, 9))
    def check(header, ascii_only, spaces):
        table, size = header
        tally = agree(written(table, ascii_only, spaces), os.urandom(size))
        assert tally.counts["accepted by both"] == 1

    check()


def check_broken(agree, examples):
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(broken_headers(), st.booleans())
    def check(header, ascii_only):
        table, size = header
        agree(written(table, ascii_only), bytes(size))

    check()


def check_bytes(agree, examples):
    @settings(max_examples=examples, deadline=None, database=None)
    @given(st.binary(max_size=40) | jumbled, st.integers(0, 9))
    def check(raw, size):
        agree(raw, bytes(size))
        agree(b"", whole=raw)

    check()


def check_noted(agree, examples):
    @settings(max_examples=examples, deadline=None, database=None)
    @given(sound_headers(), st.booleans(), st.integers(0, 9), texts, st.none() | texts)
    def check(header, ascii_only, spaces, key, text):
        (table, size), data = header, os.urandom(header[1])
        raw = written(table, ascii_only, spaces)
        before = parsed(FileIdentity("m", 8 + len(raw) + size, 0, 0, 0), raw)
        template = Template(8 + len(raw) + size, {}, [(0, b""), (8 + len(raw), data)])
        (_, head), (place, body) = noted(template, raw, key, text, "m").pieces
        assert (len(head), body) == (place, data)
        assert agree(b"", whole=head + body).counts["accepted by both"] == 1
        after = parsed(FileIdentity("m", len(head) + size, 0, 0, 0), head[8:])
        expected = dict(before.metadata)
        if text is None:
            expected.pop(key, None)
        else:
            expected = {**(expected or {"format": "pt"}), key: text}
        assert after.metadata == expected
        moved = len(head) - 8 - len(raw)
        assert {spec._replace(extent=None) for spec in after.tensors} == {
            spec._replace(extent=None) for spec in before.tensors
        }
        assert {spec.name: spec.extent.offset - moved for spec in after.tensors} == {
            spec.name: spec.extent.offset for spec in before.tensors
        }

    check()


CHECKS = {check_sound: 60, check_broken: 100, check_bytes: 200, check_noted: 30}


@pytest.mark.parametrize("check", CHECKS)
def test_the_reference_parser_agrees(agree, check):
    check(agree, CHECKS[check])


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_the_reference_parser_agrees_on_very_many(agree, check):
    check(agree, 400)


# --- what disagreed once --------------------------------------------------------------------------


def verdict(raw, size=0):
    try:
        return parsed(FileIdentity("m", 8 + len(raw) + size, 0, 0, 0), raw)
    except CheckpointFormatError as error:
        return str(error)


def test_null_metadata_is_none(agree):
    raw = b'{"__metadata__":null}'
    assert verdict(raw).metadata == {}
    assert agree(raw).counts["accepted by both"] == 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"__metadata__":{"a":"b"},"__metadata__":null}', "'__metadata__' appears twice"),
        (b'{"__metadata__":[],"__metadata__":3,"__metadata__":null}', "appears twice"),
        (b'{"__metadata__":{"a":"\\ud800"}}', "not a table of texts"),
        (b'{"__metadata__":{"\\udfff":"b"}}', "not a table of texts"),
        (b'{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', "name that is no text"),
        (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[-0,1]}}', "-0 in its header"),
    ],
)
def test_what_the_reference_refuses_is_refused(agree, raw, message):
    assert message in verdict(raw, 1)
    assert agree(raw, bytes(1)).counts["refused by both"] == 1


def test_a_name_may_look_like_a_number(agree):
    raw = b'{"block-0":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    assert agree(raw, b"x").counts["accepted by both"] == 1


LENIENT = {
    "a name twice": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "another field besides dtype, shape and data_offsets": b'{"a":{"dtype":"U8","shape":[1],'
    b'"data_offsets":[0,1],"more":1}}',
    "a tensor as a list of its fields": b'{"a":["U8",[1],[0,1]]}',
    "a dtype as a table": b'{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}',
    "more than 64 dimensions": b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}'
    % b",".join([b"1"] * 65),
    "an empty tensor of a shape too large": b'{"b":{"dtype":"U8","shape":[1],'
    b'"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[0,9223372036854775807],'
    b'"data_offsets":[0,0]}}',
    "whitespace before the first brace": b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
}


def test_there_is_an_example_of_every_known_difference(script):
    assert LENIENT.keys() == script.LENIENT.keys()


@pytest.mark.parametrize("reason", LENIENT)
def test_what_only_the_reference_accepts_is_told_apart(agree, reason):
    raw = LENIENT[reason]
    tally = agree(raw, b"x", whole=len(raw).to_bytes(8, "little") + raw + b"x")
    assert tally.differences == {reason: 1}


# --- the comparison itself ------------------------------------------------------------------------

GOOD = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},' + (
    b'"b":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},"__metadata__":{"format":"pt"}}'
)


def crashing(identity, raw):
    raise KeyError("planted")


def endless(identity, raw):
    while True:
        pass


def refusing(identity, raw):
    raise CheckpointFormatError("planted")


def changed(**changes):
    def parse(identity, raw):
        index = parsed(identity, raw)
        first, *rest = index.tensors
        return index.__class__(
            index.format,
            index.files,
            (first._replace(**changes), *rest),
            metadata=changes and index.metadata,
        )

    return parse


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (parsed, None),
        (crashing, "KeyError"),
        (endless, "over time"),
        (refusing, "only wavg refuses"),
        (changed(name="c"), "other names"),
        (changed(dtype="int8"), "another dtype"),
        (changed(shape=(1, 2)), "another dtype or shape"),
        (changed(extent=(0, 8 + len(GOOD), 2)), "other bytes"),
        (changed(), "other metadata"),
    ],
)
def test_a_planted_fault_is_seen(script, tmp_path, monkeypatch, plant, found):
    monkeypatch.setattr(script, "parsed", plant)
    monkeypatch.setattr(script, "SECONDS", 0.05)
    tally = script.Tally()
    script.judge(tally, script.Mutant(GOOD, b"xyz", ""), tmp_path / "m.safetensors")
    assert len(tally.wrong) == (found is not None)
    assert found is None or found in tally.wrong[0]


def test_what_wavg_alone_accepts_is_seen(script, tmp_path, monkeypatch):
    sound = parsed(FileIdentity("m", 8 + len(GOOD) + 3, 0, 0, 0), GOOD)
    monkeypatch.setattr(script, "parsed", lambda identity, raw: sound)
    tally = script.Tally()
    script.judge(tally, script.Mutant(b"{", b"", ""), tmp_path / "m.safetensors")
    assert "only the reference refuses" in tally.wrong[0]


@pytest.mark.parametrize("plant", ["index", "oracle"])
def test_a_planted_disagreement_on_shards_is_seen(script, tmp_path, monkeypatch, plant):
    path = script.make_shards(tmp_path)
    shard = "model-00001-of-00003.safetensors"
    raw = json.dumps({"weight_map": {"a": shard, "b": shard}}).encode()
    tally = script.Tally()
    script.judge_map(tally, raw, path)
    assert tally.counts == {"accepted by both": 1}
    if plant == "index":
        monkeypatch.setattr(script, "read_index", lambda path: refusing(None, None))
    else:
        monkeypatch.setattr(script, "sound_map", lambda raw: None)
    script.judge_map(tally, raw, path)
    assert len(tally.wrong) == 1


def test_mutants_are_the_same_for_the_same_seed(script):
    first, again = (
        [script.mutant(rng) for _ in range(200)] for rng in (random.Random(5), random.Random(5))
    )
    assert first == again


@pytest.mark.parametrize(
    ("count", "maps"), [(2_000, 500), pytest.param(50_000, 10_000, marks=pytest.mark.slow)]
)
def test_the_recorded_script_finds_nothing(count, maps):
    command = [sys.executable, str(BENCHMARKS / "safetensors_mutations.py"), "--no-record"]
    sizes = ["--count", str(count), "--maps", str(maps), "--workers", "1"]
    done = subprocess.run(
        [*command, *sizes],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert figures["headers"]["accepted by both"] > count / 4
    assert figures["shard indexes"]["accepted by both"] > maps / 10


# --- whole files ----------------------------------------------------------------------------------


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    wavg.save(path, {"a": np.float32([1, 2]), "b": np.int8([3])}, metadata={"format": "pt"})
    content = path.read_bytes()
    assert wavg.load(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointFormatError, match=r"m\.safetensors"):
            wavg.load(path)


def test_an_index_of_shards_cut_at_any_byte_is_refused(tmp_path):
    model = {"a": np.float32([1, 2]), "b": np.int8([3])}
    path = Path(hf_folders.sharded(tmp_path, model))
    content = path.read_bytes().rstrip()
    path.write_bytes(content)
    assert wavg.load(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointFormatError, match=r"index\.json"):
            wavg.load(path)


HOSTILE = {
    "a header of 2**40 bytes": (2**40, b"{}"),
    "a header of the largest size allowed": (100_000_000, b"{}"),
    "a tensor of 2**62 bytes": (
        None,
        b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (2**62, 2**62),
    ),
    "a shape beyond all numbers": (
        None,
        b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,8]}}' % b",".join([b"9" * 18] * 64),
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_header_declares_is_not_allocated(tmp_path, case):
    length, raw = HOSTILE[case]
    path = tmp_path / "m.safetensors"
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw)
    wavg.save(tmp_path / "other.safetensors", {})  # what is imported on the way is
    wavg.load(tmp_path / "other.safetensors")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointFormatError):
            wavg.load(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_an_error_about_a_very_long_name_is_short(tmp_path):
    error = verdict(b'{"%s":{}}' % (b"a" * 1_000_000))
    assert "'aaaa" in error
    assert len(error) < 3_000


def test_a_name_twice_among_very_many_is_found_at_once():
    """By comparing each with each, this would take minutes."""
    entries = [
        b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number for number in range(50_000)
    ]
    assert "'49999' appears twice" in verdict(b"{" + b",".join([*entries, entries[-1]]) + b"}")
