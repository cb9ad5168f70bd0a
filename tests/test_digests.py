"""Checksums and digests of inputs: made ahead of the averaging, compared, recorded."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import hf_folders
import wavg
from wavg import digests, tasks, workers
from wavg.carried import CarriedFile
from wavg.cli import main
from wavg.digests import BUFFER_BYTES, Digests
from wavg.errors import (
    CheckpointChangedError,
    CheckpointFormatError,
    InputError,
    NonFiniteError,
    WavgError,
)
from wavg.sha256sums import Sums


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (9, 10, 11):
        wavg.save(folder / f"m_{step}.safetensors", {"w": np.full(3, step, np.float32)})
    return folder


def large_run(folder, ending, count=3):
    """Files of several tensors, so that a run has several blocks and chunks."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for step in range(count):
        arrays = {f"t{n}": rng.standard_normal(150_000).astype(np.float32) for n in range(4)}
        wavg.save(folder / f"m_{step}{ending}", arrays)
    return folder


def test_digests_are_ahead_of_what_is_averaged_and_read_each_byte_once(tmp_path, monkeypatch):
    ending = ".safetensors"
    folder = large_run(tmp_path / "run", ending)
    made, begun, read = [], [], []
    monkeypatch.setattr(tasks, "_CHUNK_BYTES", 1 << 20)

    class Watched(Digests):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    average = workers.Job._average

    def averaged(self, task, scratch):
        (passing,) = made
        for number, spec in enumerate(task.run.sources[layout] for layout in self._layouts):
            end = spec.extent.offset + task.stop * spec.entry.itemsize
            assert passing._hashes[number, 0].position >= end
        begun.append(min(h.position < h.end for h in passing._hashes.values()))
        return average(self, task, scratch)

    def reading(descriptor, offset, out):
        read.append(len(out))
        return exactly(descriptor, offset, out)

    exactly = digests.read_exactly
    monkeypatch.setattr(digests, "read_exactly", reading)
    monkeypatch.setattr("wavg.files.Digests", Watched)
    monkeypatch.setattr(workers.Job, "_average", averaged)
    wavg.average_checkpoints(folder, tmp_path / f"a{ending}", record="sha256", workers=2)
    assert any(begun)  # some was averaged before all was read
    assert sum(read) == sum(file.stat().st_size for file in folder.iterdir())
    assert max(read) == BUFFER_BYTES


def test_nothing_is_read_ahead_where_no_digest_is_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "read_exactly", None)
    wavg.average_checkpoints(run, tmp_path / "average.safetensors")


def test_the_record_is_that_of_the_bytes_that_were_read(tmp_path):
    folder = large_run(tmp_path / "run", ".safetensors")
    output = tmp_path / "average.safetensors"
    wavg.average_checkpoints(folder, output, record="sha256")
    with wavg.open_checkpoint(output) as checkpoint:
        sources = wavg.Record.read(checkpoint.metadata).sources
    assert [s.sha256 for s in sources] == [sha256(folder / s.name) for s in sources]
    plain = wavg.average_checkpoints(folder)
    assert all(np.array_equal(plain[name], array) for name, array in wavg.load(output).items())
    assert wavg.verify(output, folder, full=True).faults == ()


def test_several_averages_of_one_pass_have_the_digests_of_their_own_inputs(run, tmp_path):
    outputs = tmp_path / "{last}.safetensors"
    for report in wavg.average_checkpoints(run, outputs, last=[1, 3], record="sha256"):
        with wavg.open_checkpoint(report.output) as checkpoint:
            sources = wavg.Record.read(checkpoint.metadata).sources
        assert [s.sha256 for s in sources] == [sha256(run / s.name) for s in sources]


def test_digests_that_nothing_would_keep_are_not_made(tmp_path):
    folder = large_run(tmp_path / "run", ".npz", 2)
    with pytest.raises(WavgError, match=r"average\.npz keeps no record.*only safetensors do"):
        wavg.average_checkpoints(folder, tmp_path / "average.npz", record="sha256")


def test_a_checksum_of_all_of_a_file_is_made_as_it_is_averaged(tmp_path, monkeypatch):
    for step in range(2):
        np.savez(tmp_path / f"m_{step}.npz", w=np.full(1_000_000, step, np.float32))
    monkeypatch.setattr(tasks, "_CHUNK_BYTES", 1 << 20)
    average, positions = workers.Job._average, []

    class Watched(Digests):
        def reach(self, ends):
            super().reach(ends)
            positions.append([checks[-1].position for checks in self._checks.values() if checks])

    def averaged(self, task, scratch):
        assert min(positions[-1], default=1 << 30) >= task.stop * 4
        return average(self, task, scratch)

    monkeypatch.setattr("wavg.files.Digests", Watched)
    monkeypatch.setattr(workers.Job, "_average", averaged)
    assert wavg.average_checkpoints(tmp_path, workers=1)["w"][-1] == 0.5
    assert len(positions) > 3
    assert max(positions[0]) < 3_000_000  # and not to the end


@pytest.mark.parametrize("place", [0, 250_000, -1])
def test_damage_anywhere_in_a_large_member_is_found(tmp_path, monkeypatch, place):
    monkeypatch.setattr(tasks, "_CHUNK_BYTES", 1 << 19)
    for step in range(2):
        np.savez(tmp_path / f"m_{step}.npz", w=np.full(500_000, step, np.float32))
    path = tmp_path / "m_1.npz"
    raw = bytearray(path.read_bytes())
    start = raw.index(np.full(9, 1, np.float32).tobytes())
    raw[start + 4 * (place % 500_000)] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointFormatError, match=r"w\.npy.* is damaged"):
        wavg.average_checkpoints(str(tmp_path / "m_*"))


def test_digests_that_are_only_recorded_are_not_made_where_the_run_ends_in_an_error(
    tmp_path, monkeypatch
):
    folder = large_run(tmp_path / "run", ".safetensors", 2)
    wavg.save(
        folder / "m_0.safetensors",
        {f"t{n}": np.full(150_000, np.nan, np.float32) for n in range(4)},
        overwrite=True,
    )
    monkeypatch.setattr(tasks, "_CHUNK_BYTES", 1 << 20)
    read, exactly = [], digests.read_exactly

    def reading(descriptor, offset, out):
        read.append(len(out))
        return exactly(descriptor, offset, out)

    monkeypatch.setattr(digests, "read_exactly", reading)
    output = tmp_path / "a.safetensors"
    with pytest.raises(NonFiniteError):
        wavg.average_checkpoints(folder, output, record="sha256", workers=1)
    assert sum(read) < 3 << 20
    sums = list_of(folder)
    sums.write_text(sums.read_text().replace(sha256(folder / "m_1.safetensors"), DIGEST))
    with pytest.raises(CheckpointFormatError, match="another file than expected"):
        wavg.average_checkpoints(str(folder / "m_*"), output, check_sha256=sums)


def test_ctrl_c_does_not_wait_for_what_is_being_read(tmp_path, monkeypatch):
    begun, deadline = threading.Event(), time.monotonic() + 20
    np.savez(tmp_path / "m.npz", a=np.zeros(3))

    def endless(descriptor, offset, out):
        begun.set()
        assert time.monotonic() < deadline, "nobody stopped it"
        return True

    def interrupted(check, end, stop):
        assert begun.wait(20)
        raise KeyboardInterrupt

    with wavg.open_checkpoint(tmp_path / "m.npz") as checkpoint, contextlib.ExitStack() as stack:
        monkeypatch.setattr(digests, "read_exactly", endless)
        monkeypatch.setattr(digests._Check, "advance", interrupted)
        passing = stack.enter_context(Digests([checkpoint, checkpoint], 2, sha256=True))
        passing._hashes[0, 0].position = passing._hashes[1, 0].end = 1 << 62
        with pytest.raises(KeyboardInterrupt):
            passing.reach([(0, 0, 1 << 62), (1, 0, 1 << 62)])


def test_damage_is_told_as_that_and_not_by_what_became_of_the_numbers(tmp_path):
    folder = large_run(tmp_path / "run", ".npz", 2)
    path = folder / "m_1.npz"
    raw = bytearray(path.read_bytes())
    raw[300:304] = np.float32("nan").tobytes()
    path.write_bytes(raw)
    with pytest.raises(CheckpointFormatError, match=r"t0\.npy.* is damaged.*CRC-32"):
        wavg.average_checkpoints(folder, tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()
    np.savez(path, **{f"t{n}": np.full(150_000, np.nan, np.float32) for n in range(4)})
    with pytest.raises(NonFiniteError, match="is nan"):
        wavg.average_checkpoints(folder)


def test_a_file_that_changed_is_told_as_that_and_not_by_its_checksum(tmp_path):
    folder = large_run(tmp_path / "run", ".npz", 2)
    path = folder / "m_1.npz"
    with wavg.open_checkpoint(path) as checkpoint, Digests([checkpoint], 1) as passing:
        os.truncate(path, 1000)
        with pytest.raises(CheckpointChangedError, match=r"m_1\.npz changed while"):
            passing.finish()


# --- digests that are expected --------------------------------------------------------------------


def list_of(folder, names=None, path=None):
    names = names or sorted(file.name for file in folder.iterdir())
    path = path or folder / "SHA256SUMS"
    path.write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names))
    return path


def test_inputs_that_are_as_listed_are_averaged(run, tmp_path):
    sums = list_of(run)
    inputs = str(run / "m_*.safetensors")
    wavg.average_checkpoints(inputs, tmp_path / "average.safetensors", check_sha256=sums)
    with wavg.open_checkpoint(tmp_path / "average.safetensors") as checkpoint:
        assert "sha256" not in checkpoint.metadata["wavg"]  # that is asked for by record
    assert wavg.average_checkpoints(inputs, check_sha256=sums)["w"][0] == 10
    given = {run / name: sha256(run / name).upper() for name in os.listdir(run)}
    assert wavg.average_checkpoints(inputs, check_sha256=given)["w"][0] == 10


def test_an_input_with_another_digest_ends_the_run_and_the_old_output_stays(run, tmp_path):
    sums, output = list_of(run), tmp_path / "average.safetensors"
    output.write_bytes(b"before")
    wavg.save(run / "m_10.safetensors", {"w": np.full(3, 1.5, np.float32)}, overwrite=True)
    with pytest.raises(CheckpointFormatError) as caught:
        wavg.average_checkpoints(
            str(run / "m_*"), output, check_sha256=sums, record="sha256", overwrite=True
        )
    assert str(run / "m_10.safetensors") in str(caught.value)
    assert sha256(run / "m_10.safetensors") in str(caught.value)
    assert output.read_bytes() == b"before"
    assert os.listdir(tmp_path) in (["run", output.name], [output.name, "run"])
    with pytest.raises(CheckpointFormatError, match="another file than expected"):
        wavg.average_checkpoints(str(run / "m_*"), check_sha256=sums)


def test_an_input_that_is_not_listed_is_refused(run, tmp_path):
    sums = list_of(run, ["m_9.safetensors", "m_10.safetensors"])
    with pytest.raises(WavgError, match=r"m_11\.safetensors is not among the files of .*SUMS"):
        wavg.average_checkpoints(str(run / "m_*"), check_sha256=sums)
    with pytest.raises(WavgError, match="not among the files of the digests given"):
        wavg.average_checkpoints(str(run / "m_*"), check_sha256={})


def test_every_file_of_a_sharded_checkpoint_is_compared(tmp_path):
    inputs = hf_folders.trainer_run(str(tmp_path / "run"), shards=(2, 2))
    folder = tmp_path / "run"
    files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    sums = list_of(folder, files, tmp_path / "run" / "sums.txt")
    wavg.average_checkpoints(inputs, tmp_path / "out", check_sha256=sums)
    lines = sums.read_text().splitlines()
    shard = next(n for n, line in enumerate(lines) if line.endswith("-of-00002.safetensors"))
    lines[shard] = "0" * 64 + lines[shard][64:]
    sums.write_text("\n".join(lines))
    with pytest.raises(CheckpointFormatError, match=r"-of-00002\.safetensors is another file"):
        wavg.average_checkpoints(inputs, check_sha256=sums)


def listed_run(tmp_path):
    """Checkpoints in folders, and a list of every file in them."""
    inputs = hf_folders.trainer_run(str(tmp_path / "run"), shards=(1, 2))
    files = [str(f.relative_to(tmp_path)) for f in (tmp_path / "run").rglob("*") if f.is_file()]
    return inputs, list_of(tmp_path, files)


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}])
def test_what_is_copied_into_a_folder_is_compared_too(tmp_path, options):
    inputs, sums = listed_run(tmp_path)
    output = tmp_path / "out"
    wavg.average_checkpoints(inputs, output, check_sha256=sums, **options)
    made = hf_folders.contents(output)
    wavg.average_checkpoints(inputs, tmp_path / "plain", **options)
    assert made == hf_folders.contents(tmp_path / "plain")
    for name in ("modeling_tiny.py", "config.json"):
        path = tmp_path / "run" / "checkpoint-1000" / name
        before = path.read_bytes()
        path.write_bytes(b" " + before[1:])
        with pytest.raises(CheckpointFormatError, match=f"{name} is another file than expected"):
            wavg.average_checkpoints(inputs, output, check_sha256=sums, overwrite=True, **options)
        assert hf_folders.contents(output) == made
        path.write_bytes(before)
    assert sorted(os.listdir(tmp_path)) == ["SHA256SUMS", "out", "plain", "run"]


def test_what_is_copied_into_a_folder_has_to_be_listed(tmp_path):
    inputs, sums = listed_run(tmp_path)
    (tmp_path / "run" / "checkpoint-1000" / "extra.py").write_text("import os")
    asked = {"check_sha256": sums}
    for ask in (wavg.average_checkpoints, wavg.plan_average):
        with pytest.raises(WavgError, match=r"extra\.py is not among the files of .*; list it too"):
            ask(inputs, tmp_path / "out", **asked)
        ask(inputs, tmp_path / "one.safetensors", **asked)  # of a file nothing else is copied
        ask(inputs, **asked)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_cut_while_it_is_copied_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bytes(2 * BUFFER_BYTES + 1))
    pieces = CarriedFile(str(path)).pieces()
    assert next(pieces) == bytes(BUFFER_BYTES)
    os.truncate(path, BUFFER_BYTES)
    with pytest.raises(InputError, match=r"tokenizer\.json: the file became shorter"):
        next(pieces)


def test_files_of_the_older_folders_need_not_be_listed(tmp_path):
    """They are neither averaged nor copied."""
    inputs, sums = listed_run(tmp_path)
    text = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(t for t in text if "-900" not in t or t.endswith("safetensors\n")))
    wavg.average_checkpoints(inputs, tmp_path / "out", check_sha256=sums)


DIGEST, OTHER = "ab" * 32, "cd" * 32


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (f"{DIGEST}  a b.npz", "a b.npz"),
        (f"{DIGEST} *m.npz\r", "m.npz"),
        (f"SHA256 (m (1).npz) = {DIGEST.upper()}", "m (1).npz"),
        (f"SHA256(m.npz)= {DIGEST}", "m.npz"),  # as openssl writes it
        (f"\\{DIGEST}  a\\\\b\\nc.npz", "a\\b\nc.npz"),
        (f"\\SHA256 (a\\\\b.npz) = {DIGEST}", "a\\b.npz"),
        (f"# of the run\n\n{DIGEST}  ./sub/../m.npz", "m.npz"),
        (f"\ufeff{DIGEST}  m.npz", "m.npz"),  # as Windows marks UTF-8
    ],
)
def test_lists_are_read_as_tools_write_them(tmp_path, line, name):
    path = tmp_path / "sums"
    path.write_bytes(line.encode() + b"\n")
    assert Sums(path)(str(tmp_path / name)) == DIGEST


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_lists_are_those_of_sha256sum(tmp_path):
    names = ["plain.npz", "with space.npz", "back\\slash.npz", "line\nfeed.npz", "ключ.npz"]
    for name in names:
        (tmp_path / name).write_text(name)
    done = subprocess.run(["sha256sum", *names], cwd=tmp_path, capture_output=True, check=True)
    (tmp_path / "sums").write_bytes(done.stdout)
    sums = Sums(tmp_path / "sums")
    assert [sums(str(tmp_path / name)) for name in names] == [sha256(tmp_path / n) for n in names]


def test_names_are_taken_from_the_list_and_else_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "sums"
    path.write_text(f"{DIGEST}  run/m.npz\n")
    monkeypatch.chdir(tmp_path)
    sums = Sums(path)
    assert sums("lists/run/m.npz") == sums("run/m.npz") == DIGEST
    path.write_text(f"{DIGEST}  run/m.npz\n{OTHER}  lists/run/m.npz\n")
    sums = Sums(path)
    assert sums("lists/run/m.npz") == DIGEST  # and what the current folder makes of it is not asked
    with pytest.raises(WavgError, match="not among"):
        sums("m.npz")  # a name alone is not looked for in other folders


def test_names_of_a_mapping_are_taken_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sums = Sums({"run/m.npz": DIGEST, tmp_path / "k.npz": OTHER})
    assert sums(str(tmp_path / "run" / "m.npz")) == DIGEST
    assert sums("run/../k.npz") == OTHER
    with pytest.raises(WavgError, match="not among"):
        sums("m.npz")


def test_a_link_is_the_file_that_it_leads_to(tmp_path):
    """As in a Hugging Face cache, whichever of the two names is listed."""
    (tmp_path / "blob").write_text("numbers")
    (tmp_path / "m.npz").symlink_to("blob")
    for listed, asked in (("blob", "m.npz"), ("m.npz", "blob")):
        (tmp_path / "sums").write_text(f"{DIGEST}  {listed}\n")
        assert Sums(tmp_path / "sums")(str(tmp_path / asked)) == DIGEST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{DIGEST}  a\n{DIGEST[:-1]}  b\n", r"sums, line 2: .* is not a digest and a name"),
        (f"{DIGEST}\n", "line 1"),
        ("", "lists no digest"),
        ("# nothing\n", "lists no digest"),
        (f"{DIGEST}  a\n{OTHER}  ./a\n", r"two different digests of \./a"),
        (f"{DIGEST}  a\n{DIGEST}  b\0c\n", r"sums, line 2: .*b\\x00c' is not a digest and a name"),
        (f"SHA256 (b\0c) = {DIGEST}\n", "sums, line 1: "),
    ],
)
def test_what_is_no_list_is_told(tmp_path, text, message):
    (tmp_path / "sums").write_text(text)
    with pytest.raises(WavgError, match=message):
        Sums(tmp_path / "sums")


def test_a_digest_or_a_path_of_another_kind_is_told():
    for digest in ("abc", DIGEST.encode(), bytes.fromhex(DIGEST), None):
        with pytest.raises(WavgError, match=re.escape(f"{digest!r} is not a SHA-256 (of a.npz)")):
            Sums({"a.npz": digest})
    with pytest.raises(WavgError, match="is no path: it holds a NUL"):
        Sums({"a\0.npz": DIGEST})


def test_a_list_that_is_missing_or_no_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        Sums(tmp_path / "missing")
    with pytest.raises(InputError, match=f"cannot read {re.escape(str(tmp_path))}: ") as caught:
        Sums(tmp_path)
    assert caught.value.path == str(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_list_as_powershell_writes_it_is_told_as_that(tmp_path, encoding):
    (tmp_path / "sums").write_bytes(f"\ufeff{DIGEST}  m.npz\r\n".encode(encoding))
    with pytest.raises(WavgError, match=r"sums is text in UTF-16, .* as `\| Out-File"):
        Sums(tmp_path / "sums")


def test_a_list_of_digests_has_a_limit(tmp_path):
    with open(tmp_path / "sums", "wb") as file:
        file.truncate((100 << 20) + 1)
    with pytest.raises(WavgError, match="too long"):
        Sums(tmp_path / "sums")


def test_command_records_and_checks(run, tmp_path, capsys):
    sums, output = list_of(run), tmp_path / "average.safetensors"
    command = ["average", str(run / "m_*"), "-o", str(output), "--check-sha256", str(sums)]
    assert main([*command, "--sha256"]) == 0
    with wavg.open_checkpoint(output) as checkpoint:
        assert wavg.Record.read(checkpoint.metadata).sources[0].sha256
    sums.write_text(sums.read_text().replace(sha256(run / "m_9.safetensors"), DIGEST))
    before = output.read_bytes()
    assert main([*command, "--overwrite"]) == 1
    assert f"expected {DIGEST}" in capsys.readouterr().err
    assert output.read_bytes() == before


@pytest.mark.parametrize("record", ["none", "inputs"])
@pytest.mark.parametrize("first", [True, False])
def test_options_that_disagree_on_the_record_are_refused(run, tmp_path, capsys, record, first):
    command = ["average", str(run), "-o", str(tmp_path / "a.safetensors")]
    options = [["--record", record], ["--sha256"]]
    with pytest.raises(SystemExit) as caught:
        main([*command, *options[first], *options[not first]])
    assert caught.value.code == 2
    assert f"--record {record} keeps none; use one of them" in capsys.readouterr().err
    assert main([*command, "--sha256", "--record", "sha256", "--quiet"]) == 0


def test_a_dry_run_looks_whether_the_inputs_are_listed(run, tmp_path, capsys):
    sums = list_of(run, ["m_9.safetensors"])
    command = ["average", str(run / "m_*"), "-o", str(tmp_path / "a.safetensors"), "--dry-run"]
    assert main([*command, "--check-sha256", str(sums)]) == 1
    assert "m_10.safetensors is not among the files of" in capsys.readouterr().err
    assert main([*command, "--check-sha256", str(list_of(run, sorted(os.listdir(run))))]) == 0
