"""The order in which members of an HDF5 file were linked, told from the bytes alone."""

from __future__ import annotations

import io

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavg.formats import hdf5_links
from wavg.formats.hdf5_links import linked_order


def written(fill, **options):
    """The bytes of a file that a function fills."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **options) as file:
        fill(file)
    return buffer.getvalue()


def order(data):
    ranks = linked_order(lambda offset, size: data[offset : offset + size])
    return sorted(ranks, key=ranks.__getitem__)


def create(file, paths, size=3):
    for path in paths:
        file[path] = np.zeros(size, np.float32)


NAME = st.text("abcdefgh_0123456789", min_size=1, max_size=40)


@given(st.lists(NAME, unique=True, max_size=60))
def test_names_come_in_the_order_of_their_creation(names):
    assert order(written(lambda file: create(file, names))) == names


@given(st.lists(st.tuples(NAME, NAME), unique=True, max_size=40))
def test_members_come_after_their_group_whenever_they_were_made(pairs):
    data = written(lambda file: create(file, [f"{a}/x{b}" for a, b in pairs]))
    groups = dict.fromkeys(a for a, _ in pairs)
    right = []
    for group in groups:
        right += [group, *(f"{a}/x{b}" for a, b in pairs if a == group)]
    assert order(data) == right


def test_thousands_of_members_keep_their_order_where_offsets_do_not(tmp_path):
    names = [f"layer_{i * 7919 % 5000}/vars/{j}" for i in range(5000) for j in (0, 1)]
    sizes = np.random.default_rng(0).choice([3, 200, 900], len(names))

    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name, size in zip(names, sizes, strict=True):
            file[name] = np.zeros(size, np.float32)
    data = (tmp_path / "x.h5").read_bytes()
    assert [path for path in order(data) if path.count("/") == 2] == names
    with h5py.File(tmp_path / "x.h5") as file:
        assert sorted(names, key=lambda name: file[name].id.get_offset()) != names


def test_attributes_and_links_of_other_kinds_do_not_matter():
    def fill(file):
        create(file, ["b", "a"])
        file.attrs["long"] = "x" * 10_000
        file["soft"] = h5py.SoftLink("/b")
        file["b"].attrs["name"] = "b"
        file["again"] = file["a"]

    assert order(written(fill)) == ["b", "a", "soft", "again"]


def test_a_file_of_the_newer_style_gives_no_order():
    assert order(written(lambda file: create(file, ["b", "a"]), libver="latest")) == []


def test_an_empty_file_and_no_hdf5_give_no_order():
    assert order(written(lambda file: None)) == order(b"") == order(b"PK\3\4" * 100) == []


def test_a_group_that_is_its_own_member_gives_no_order():
    def fill(file):
        group = file.create_group("a/b")
        group["back"] = group.parent

    assert order(written(fill)) == []


def test_a_node_that_is_a_child_twice_gives_no_order():
    names = [f"m{n}" for n in range(100)]
    data = bytearray(written(lambda file: create(file, names)))
    assert order(bytes(data)) == names
    tree = data.index(b"TREE")
    used = int.from_bytes(data[tree + 6 : tree + 8], "little")
    assert used > 2
    first = data[tree + 32 : tree + 40]
    data[tree + 48 : tree + 56] = first
    assert order(bytes(data)) == []


def test_two_members_of_one_name_give_no_order():
    data = bytearray(written(lambda file: create(file, ["b", "a"])))
    entries = data.index(b"SNOD") + 8
    data[entries : entries + 8] = data[entries + 40 : entries + 48]
    assert order(bytes(data)) == []


def test_two_groups_of_one_tree_of_nodes_give_no_order():
    data = bytearray(written(lambda file: create(file, ["a/x", "b/x"])))
    group = data.index(b"SNOD") + 8
    assert order(bytes(data)) == ["a", "a/x", "b", "b/x"]
    data[group + 64 : group + 72] = data[group + 24 : group + 32]
    assert order(bytes(data)) == []


@pytest.mark.parametrize("limit", ["_MOST", "_MOST_NAME_BYTES"])
def test_the_budget_is_that_of_the_whole_walk(monkeypatch, limit):
    names = [f"{group}{n}/{n}" for group in "abc" for n in range(40)]
    data = written(lambda file: create(file, names))
    assert len(order(data)) == 240
    monkeypatch.setattr(hdf5_links, limit, 230 if limit == "_MOST" else 5000)
    assert order(data) == []
    assert order(written(lambda file: create(file, names[:10]))) != []


def test_a_file_that_begins_elsewhere_than_it_says_gives_no_order():
    data = written(lambda file: create(file, ["b", "a"]))
    assert order(data[:24] + (512).to_bytes(8, "little") + data[32:]) == []


def test_a_groups_name_counts_for_each_of_its_members(monkeypatch):
    names = [f"{'x' * 1000}/{number:02}" for number in range(40)]
    data = written(lambda file: create(file, names))
    monkeypatch.setattr(hdf5_links, "_MOST_NAME_BYTES", 20_000)
    assert order(data) == []
    monkeypatch.setattr(hdf5_links, "_MOST_NAME_BYTES", 50_000)
    assert len(order(data)) == 41


def test_a_node_that_claims_more_members_than_a_file_may_have_gives_no_order(monkeypatch):
    monkeypatch.setattr(hdf5_links, "_MOST", 100)
    data = bytearray(written(lambda file: create(file, ["b", "a"])))
    assert order(bytes(data)) == ["b", "a"]
    node = data.index(b"SNOD")
    data[node + 6 : node + 8] = (101).to_bytes(2, "little")
    assert order(bytes(data)) == []


@pytest.mark.parametrize("length", [60_000, 66_000])
def test_a_very_long_name_gives_no_order(length):
    data = written(lambda file: create(file, ["x" * length, "a"]))
    assert len(order(data)) == (2 if length < 1 << 16 else 0)


@pytest.mark.parametrize("signature", [b"TREE", b"SNOD", b"HEAP"])
def test_damaged_metadata_gives_no_order(signature):
    data = written(lambda file: create(file, ["b/x", "a/y"]))
    assert order(data.replace(signature, b"ROTT")) == []


SMALL = written(lambda file: create(file, ["b/vars/0", "b/vars/1", "a/vars/0"], 1))


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=8))
def test_mutated_files_give_some_order_or_none_but_no_error(changes):
    data = bytearray(SMALL)
    for position, value in changes:
        data[position] = value
    assert len(set(order(bytes(data)))) <= len(SMALL)


@given(st.integers(0, len(SMALL)))
def test_truncated_files_give_no_error(length):
    order(SMALL[:length])
