"""What an averaged safetensors file says of how it came to be, and that all else stays."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import hf_folders
import wavg
from wavg import record as records
from wavg.cli import main
from wavg.formats import safetensors as ours


@pytest.fixture
def run(tmp_path):
    """Three checkpoints with a counter and metadata, as PyTorch writes them."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (8, 9, 10):
        safetensors.numpy.save_file(
            {"w": np.full((3,), step, np.float32), "n": np.array([step])},
            folder / f"m_{step}.safetensors",
            metadata={"format": "pt", "note": 'ü "quoted"'},
        )
    return str(folder / "m_*.safetensors")


def metadata_of(path):
    with safetensors.safe_open(path, "np") as file:
        return file.metadata()


def header_of(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def test_one_versioned_key_is_added_and_the_rest_carried_over(run, tmp_path):
    output = tmp_path / "average.safetensors"
    wavg.average_checkpoints(run, output, weights="linear")
    metadata = metadata_of(output)
    assert metadata.keys() == {"format", "note", "wavg"}
    assert (metadata["format"], metadata["note"]) == ("pt", 'ü "quoted"')
    size = (tmp_path / "run" / "m_8.safetensors").stat().st_size
    assert json.loads(metadata["wavg"]) == {
        "v": 1,
        "wavg": wavg.__version__,
        "weights": "linear",
        "step": 10,
        "count": 3,
        "inputs": ["m_8.safetensors", "m_9.safetensors", "m_10.safetensors"],
        "sizes": [size] * 3,
        "steps": [8, 9, 10],
        "coefficients": [1, 2, 3],
    }
    assert " " not in metadata["wavg"]
    np.testing.assert_array_equal(
        safetensors.numpy.load_file(output)["w"], np.float32([28 / 3] * 3)
    )
    (mine, data), (theirs, before) = header_of(output), header_of(tmp_path / "run/m_10.safetensors")
    del mine["__metadata__"], theirs["__metadata__"]
    assert list(mine.items()) == list(theirs.items())
    assert len(data) == len(before)


def test_the_header_stays_a_multiple_of_eight(run, tmp_path):
    for weights in ("equal", "linear", "exponential:alpha=3", [1, 2, 33]):
        output = tmp_path / "average.safetensors"
        wavg.average_checkpoints(run, output, weights=weights, overwrite=True)
        assert int.from_bytes(output.read_bytes()[:8], "little") % 8 == 0


def test_digests_are_kept_on_request(run, tmp_path):
    output = tmp_path / "average.safetensors"
    report = wavg.average_checkpoints(run, output, record="sha256")
    record = wavg.Record.read(metadata_of(output))
    files = [(tmp_path / "run" / source.name).read_bytes() for source in record.sources]
    assert [s.sha256 for s in record.sources] == [hashlib.sha256(f).hexdigest() for f in files]
    assert [source.size for source in record.sources] == list(map(len, files))
    assert report.plan.bytes_read == wavg.plan_average(run, output).bytes_read


def test_digests_of_a_sharded_checkpoint_are_those_of_its_files(tmp_path):
    run = hf_folders.trainer_run(str(tmp_path / "run"), shards=(2, 2))
    wavg.average_checkpoints(run, tmp_path / "out", record="sha256")
    with wavg.open_checkpoint(tmp_path / "out") as checkpoint:
        record = wavg.Record.read(checkpoint.metadata)
    assert record.sources[0].name == "checkpoint-900/model.safetensors.index.json"
    folder = tmp_path / "run" / "checkpoint-900"
    assert record.sources[0].sha256 == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if "safetensors" in file.name
    }


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 600}, {"dtype": "float16"}])
def test_every_shard_says_it_and_the_index_of_shards_does_not(tmp_path, options):
    run = hf_folders.trainer_run(str(tmp_path / "run"), shards=(2, 2))
    wavg.average_checkpoints(run, tmp_path / "out", **options)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert len({metadata_of(shard)["wavg"] for shard in shards}) == 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "wavg" not in json.dumps(index)


def test_a_file_without_metadata_gets_the_format_that_loaders_insist_on(tmp_path):
    for step in (1, 2):
        safetensors.numpy.save_file({"w": np.float32([step])}, tmp_path / f"m_{step}.safetensors")
    wavg.average_checkpoints(str(tmp_path / "m_*.safetensors"), tmp_path / "average.safetensors")
    assert metadata_of(tmp_path / "average.safetensors")["format"] == "pt"
    wavg.save(tmp_path / "k_1.npz", {"w": np.float32([1])})
    wavg.average_checkpoints(str(tmp_path / "k_*.npz"), tmp_path / "new.safetensors")
    assert metadata_of(tmp_path / "new.safetensors").keys() == {"format", "wavg"}


def test_an_average_of_averages_tells_its_own_story(run, tmp_path):
    once = tmp_path / "once.safetensors"
    wavg.average_checkpoints(run, once, weights="linear")
    wavg.average_checkpoints([once], tmp_path / "twice.safetensors", weights="equal")
    record = wavg.Record.read(metadata_of(tmp_path / "twice.safetensors"))
    assert record.weights == "equal"
    assert [source.name for source in record.sources] == ["once.safetensors"]
    wavg.average_checkpoints([once], tmp_path / "none.safetensors", record="none")
    assert metadata_of(tmp_path / "none.safetensors").keys() == {"format", "note"}


def test_no_record_leaves_the_header_as_it_is(run, tmp_path):
    output = tmp_path / "average.safetensors"
    wavg.average_checkpoints(run, output, record="none")
    before = (tmp_path / "run" / "m_10.safetensors").read_bytes()
    length = 8 + int.from_bytes(before[:8], "little")
    assert output.read_bytes()[:length] == before[:length]


def test_what_shows_in_the_numbers_is_recorded_and_nothing_else(run, tmp_path, capsys):
    output = tmp_path / "average.safetensors"
    wavg.average_checkpoints(run, output, dtype="float16", exclude="n", workers=1)
    record = wavg.Record.read(metadata_of(output))
    assert record.options == {"dtype": "float16", "exclude": ["n"]}
    assert main(["inspect", str(output)]) == 0
    assert "weights equal, dtype float16, exclude ['n']\n" in capsys.readouterr().out


def test_an_unknown_kind_of_record_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="record must be one of inputs, sha256, none, not 'all'"):
        wavg.average_checkpoints(run, tmp_path / "average.safetensors", record="all")


def test_inspect_shows_the_record(run, tmp_path, capsys):
    output = str(tmp_path / "average.safetensors")
    assert main(["average", run, "-o", output, "--record", "sha256", "--quiet"]) == 0
    assert main(["inspect", output]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(
        f"made by wavg {wavg.__version__} from 3 models up to step 10, weights equal"
    )
    assert lines[start + 2].split()[:3] == ["m_8.safetensors", "8", "0.3333"]
    assert lines[start + 3].split()[0] == "sha256"
    assert not any(line.startswith("  wavg:") for line in lines)
    assert main(["inspect", output, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["record"]
    assert [source["step"] for source in told["sources"]] == [8, 9, 10]
    assert len(told["sources"][0]["sha256"]) == 64


def record_text(**changes):
    """A record's text with something else in it; None takes a part out."""
    content = {"v": 1, "wavg": "9", "weights": "equal", "step": 1, "count": 2}
    content |= {"inputs": ["a", "b"], "sizes": [1, 1], "steps": [1, 2], "coefficients": [1, 1]}
    return json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None})


NOT_OURS = "it is no JSON: it is damaged, or not by wavg"
WITHOUT_VERSION = "it has no version: it is damaged, or not by wavg"
NOT_ALIKE = "it has not as much of everything on its inputs"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", NOT_OURS),
        ("linear", NOT_OURS),
        (record_text()[:-1], NOT_OURS),
        ("[" * 100_000, NOT_OURS),
        ("[]", WITHOUT_VERSION),
        ("{}", WITHOUT_VERSION),
        ("null", WITHOUT_VERSION),
        (record_text(v=True), WITHOUT_VERSION),
        (record_text(v=2), f"version 2, of wavg '9', and wavg {wavg.__version__} knows 1; a later"),
        (record_text(v=2, wavg=[[]]), "version 2, of wavg a list, and wavg"),
        (record_text(v=0), "it is damaged: there is no version 0"),
        (record_text(step="1"), "it is damaged: '1' is not a number"),
        (record_text(step=float("nan")), "nan is not a number"),
        (record_text(wavg=9), "9 is not a text"),
        (record_text(weights="x", wavg=None), "it is damaged: it lacks 'wavg'"),
        (record_text(count=True), "True is not a whole number"),
        (record_text(count=-1), "-1 is not a whole number"),
        (record_text(count="7" * 99), f"'{'7' * 60}' ... is not a whole number"),
        (record_text(options=[]), "a list is not a table"),
        (record_text(options={"dtype": [[]]}), "'dtype' has more in it than an option can"),
        (record_text(options={"dtype": {"a": 1}}), "'dtype' has more in it than an option can"),
        (record_text(inputs=4), "4 is not a list"),
        (record_text(inputs=["a"]), NOT_ALIKE),
        (record_text(inputs=["a", "a"]), "it is damaged: it names an input twice"),
        (record_text(coefficients=None), NOT_ALIKE),
        (record_text(sha256=["a"]), NOT_ALIKE),
        (record_text(sha256=["a", {"b": 1}]), "1 is not a text"),
        (record_text(sha256=["a", {"b": {}}]), "a table is not a text"),
        (record_text(coefficients=[1, -1]), "the coefficients sum to zero"),
        (record_text(coefficients=[1e308, 1e308]), "it is damaged: "),
    ],
)
def test_what_is_no_record_of_this_version_is_told_and_stays_a_text(tmp_path, capsys, text, why):
    path = str(tmp_path / "m.safetensors")
    assert wavg.Record.read({"wavg": text}) is None
    with pytest.raises(wavg.RecordError) as caught:
        wavg.Record.parse(text)
    assert why in str(caught.value)
    wavg.save(path, {"w": np.float32([1])}, metadata={"wavg": text})
    assert main(["inspect", path]) == 0
    out = capsys.readouterr().out
    assert "  wavg: " in out
    assert f"its record of how it came to be cannot be read: {caught.value}\n" in out
    assert main(["inspect", path, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["record"], told["unreadable_record"]) == (None, str(caught.value))
    with pytest.raises(wavg.RecordError) as caught:
        wavg.verify(path)
    assert str(caught.value).startswith(f"{path}: its record of how it came to be cannot be read: ")


def test_a_record_without_inputs_or_with_parts_unknown_is_one():
    text = record_text(inputs=None, sizes=None, steps=None, coefficients=None, later={"x": 1})
    assert wavg.Record.parse(text) == wavg.Record("equal", 1.0, (), 2, {}, "9")


@given(
    st.lists(
        st.tuples(
            st.text(),
            st.integers(0, 2**60),
            st.floats(allow_nan=False, allow_infinity=False),
            st.floats(1e-9, 1e9),
            st.none() | st.text(min_size=1) | st.dictionaries(st.text(), st.text(), min_size=1),
        ),
        unique_by=lambda row: row[0],
    )
)
def test_a_record_comes_back_from_its_text(rows):
    sources = tuple(records.Source(*row) for row in rows)
    if not all(source.sha256 for source in sources):
        sources = tuple(records.Source(*row[:4]) for row in rows)
    record = wavg.Record("linear", 3.5, sources, 7, {"exclude": ["*.bias"]})
    assert wavg.Record.read({"wavg": record.text()}) == record


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4)


@given(
    st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=6)),
    st.lists(names.filter(lambda name: name != "__metadata__"), unique=True, min_size=1),
    st.sampled_from(["first", "last", "none"]),
    st.booleans(),
    st.sampled_from([None, "\t ", 1]),
    st.none() | st.text(st.characters(exclude_categories=["Cs"])),
)
def test_a_header_is_changed_in_its_metadata_alone(metadata, tensors, place, ascii, indent, text):
    entries = {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in tensors}
    table = {**entries, "__metadata__": metadata}
    if place == "first":
        table = {"__metadata__": metadata, **entries}
    elif place == "none":
        table, metadata = entries, {}
    header = json.dumps(table, ensure_ascii=ascii, indent=indent).encode()
    changed = json.loads(ours._with_metadata(header + b"   ", "wavg", text))
    expected = {key: value for key, value in metadata.items() if key != "wavg"}
    if text is not None:
        expected = {**(metadata or {"format": "pt"}), "wavg": text}
    assert changed.pop("__metadata__") == expected
    assert list(changed.items()) == list(entries.items())
    size = len(header)
    identity = ours.FileIdentity("m", 8 + size, 0, 0, 0)
    assert ours.parsed(identity, header).tensors  # such headers are sound


def test_what_a_file_says_cannot_steer_the_terminal(tmp_path, capsys):
    text = wavg.Record("\x1b[2Jfake\nline", 1.0, (), 1).text()
    metadata = {"wavg": text, "note\x07": "\x1b[31m"}
    wavg.save(tmp_path / "m.safetensors", {"w\x9b": np.float32([1])}, metadata=metadata)
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "weights \\x1b[2Jfake\\nline" in out
    assert all(letter.isprintable() for letter in out.replace("\n", ""))


@pytest.mark.parametrize("value", [1, np.nan])
def test_nor_can_what_an_average_says_of_it(tmp_path, capsys, value):
    for step in (1, 2):
        tensors = {"w\x1b[2J": np.float32([value]), "n\x1b[2J": np.array(step)}
        wavg.save(tmp_path / f"m_{step}.safetensors", tensors)
    code = main(["average", str(tmp_path), "-o", str(tmp_path / "average.npz")])
    told = "".join(capsys.readouterr())
    assert code == (value != 1)
    assert "\\x1b[2J" in told
    assert all(letter.isprintable() for letter in told.replace("\n", ""))
