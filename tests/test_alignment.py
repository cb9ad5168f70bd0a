"""Which tensor of one file is which of another: by name, by position only when asked."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import wavg
from contract import assert_same
from wavg.alignment import align
from wavg.checkpoint import FileIdentity, Index, TensorSpec
from wavg.cli import main


def save(path, names, shapes=((2, 3), (3,)), seed=0):
    rng = np.random.default_rng(seed)
    tensors = {n: rng.standard_normal(s).astype("f4") for n, s in zip(names, shapes, strict=True)}
    wavg.save(path, tensors)
    return [*tensors.values()]


@pytest.fixture
def two_runs(tmp_path):
    """Files of two runs of one program, whose automatic names differ."""
    arrays = [
        save(tmp_path / "a_1.h5", ["dense/dense/kernel", "dense/dense/bias"], seed=1),
        save(tmp_path / "a_2.h5", ["dense_3/dense_3/kernel", "dense_3/dense_3/bias"], seed=2),
    ]
    return str(tmp_path / "a_*.h5"), arrays


def test_names_that_differ_are_told_with_the_option_that_pairs_them(two_runs):
    with pytest.raises(wavg.StructureMismatchError) as caught:
        wavg.average_checkpoints(two_runs[0])
    text = str(caught.value)
    assert "align='position' (--align position)" in text
    assert "lacks dense_3/dense_3/kernel (float32[2, 3])" in text
    assert "also has dense/dense/kernel (float32[2, 3])" in text
    assert len(caught.value.differences) == 4


def test_position_pairs_them_and_the_newest_gives_the_names(two_runs, tmp_path):
    paths, arrays = two_runs
    report = wavg.average_checkpoints(
        paths, tmp_path / "average.h5", align="position", weights="linear"
    )
    assert report.plan.paired == {
        "dense_3/dense_3/kernel": ("dense/dense/kernel",),
        "dense_3/dense_3/bias": ("dense/dense/bias",),
    }
    ours = wavg.load(tmp_path / "average.h5")
    expected = wavg.average(arrays, weights="linear")
    assert_same(ours, dict(zip(report.plan.paired, expected, strict=True)))


def test_the_command_line_pairs_when_asked_and_shows_the_pairs(two_runs, tmp_path, capsys):
    command = ["average", two_runs[0], "-o", str(tmp_path / "out.h5")]
    assert main(command) == 1
    assert "--align position" in capsys.readouterr().err.splitlines()[0]
    assert main([*command, "--align", "position"]) == 0
    text = capsys.readouterr().out
    assert "paired by position: 2 tensors of other names" in text
    assert "  dense_3/dense_3/kernel = dense/dense/kernel" in text
    assert main([*command, "--align", "position", "--dry-run", "--json", "--overwrite"]) == 0
    paired = json.loads(capsys.readouterr().out)["paired"]
    assert paired["dense_3/dense_3/bias"] == ["dense/dense/bias"]


@pytest.mark.parametrize(
    ("names", "shapes", "message"),
    [
        (["x/a", "x/b"], ((3, 2), (3,)), r"x/a is float32\[3, 2\], not float32\[2, 3\] as"),
        (["x/a", "x/b", "x/c"], ((2, 3), (3,), (1,)), "3 tensors, not 2"),
    ],
)
def test_shapes_and_numbers_are_checked_by_position_too(tmp_path, names, shapes, message):
    save(tmp_path / "m_1.h5", names, shapes)
    save(tmp_path / "m_2.h5", ["y/a", "y/b"])
    with pytest.raises(wavg.StructureMismatchError, match=message):
        wavg.average_checkpoints(f"{tmp_path}/m_*.h5", align="position")
    with pytest.raises(wavg.StructureMismatchError) as caught:
        wavg.average_checkpoints(f"{tmp_path}/m_*.h5")
    assert "align=" not in str(caught.value)  # it would not help


def test_dtypes_are_checked_by_position_too(tmp_path):
    wavg.save(tmp_path / "m_1.h5", {"x/a": np.float16([1])})
    wavg.save(tmp_path / "m_2.h5", {"y/a": np.float32([1])})
    with pytest.raises(wavg.StructureMismatchError, match=r"float16.*not float32"):
        wavg.average_checkpoints(f"{tmp_path}/m_*.h5", align="position")


@pytest.mark.parametrize("odd", [1, 2, 3])
def test_one_file_that_differs_from_all_others_is_named(tmp_path, odd):
    for step in (1, 2, 3):
        save(tmp_path / f"m_{step}.npz", ["y/a", "y/b"] if step == odd else ["x/a", "x/b"])
    with pytest.raises(wavg.StructureMismatchError, match=rf"only \S+m_{odd}\.npz differs, the"):
        wavg.average_checkpoints(f"{tmp_path}/m_*.npz")


@pytest.mark.parametrize("names", ["xy", "xyz", "xxyy", "xxyz"])
def test_where_none_is_the_odd_one_none_is_named(tmp_path, names):
    for step, name in enumerate(names):
        save(tmp_path / f"m_{step}.npz", [f"{name}/a", f"{name}/b"])
    with pytest.raises(wavg.StructureMismatchError) as caught:
        wavg.average_checkpoints(f"{tmp_path}/m_*.npz")
    assert "only" not in str(caught.value)


def test_files_of_equal_names_have_nothing_paired(tmp_path):
    for step in (1, 2):
        save(tmp_path / f"m_{step}.h5", ["x/a", "x/b"], seed=step)
    by_name = wavg.average_checkpoints(f"{tmp_path}/m_*.h5")
    assert_same(wavg.average_checkpoints(f"{tmp_path}/m_*.h5", align="position"), by_name)
    assert wavg.plan_average(f"{tmp_path}/m_*.h5", align="position").paired == {}


def test_an_unknown_alignment_is_refused(two_runs):
    with pytest.raises(ValueError, match="align must be 'name' or 'position'"):
        wavg.average_checkpoints(two_runs[0], align="order")


def index(path, *names):
    specs = tuple(TensorSpec(name, "float32", (2,)) for name in names)
    return Index("npz", (FileIdentity(path, 0, 0, 0, 0),), specs)


def test_inputs_that_share_a_list_of_tensors_have_one_layout():
    old, new = index("a", "x", "y"), index("b", "y", "x")
    twin = Index("npz", (FileIdentity("c", 0, 0, 0, 0),), new.tensors)
    layouts, sources = align([old, twin, old, new], "name")
    assert layouts == (1, 0, 1, 0)
    assert [tuple(spec.name for spec in found) for found in sources] == [("y", "y"), ("x", "x")]
    layouts, sources = align([old, new], "position")
    assert [tuple(spec.name for spec in found) for found in sources] == [("y", "x"), ("x", "y")]


def refusal(*indexes, how="name"):
    with pytest.raises(wavg.StructureMismatchError) as caught:
        align(indexes, how)
    first, *listed = str(caught.value).split("\n  ")
    assert listed == [*caught.value.differences]
    return first, listed


def test_the_differences_of_all_inputs_are_listed_in_one_text():
    old, odd, third = index("old", "x"), index("odd", "x"), index("third", "z", "x")
    odd = dataclasses.replace(odd, format="keras-h5")
    same = index("same", "x", "y")
    new = index("new", "x", "y")
    assert refusal(old, odd, same, third, new) == (
        "4 differences between the inputs and the newest, new:",
        [
            "old: lacks y (float32[2])",
            "odd: keras-h5, not npz",
            "third: lacks y (float32[2])",
            "third: also has z (float32[2])",
        ],
    )
    assert refusal(old, same, new) == (
        "1 difference between the inputs and the newest, new; only old differs, the others agree:",
        ["old: lacks y (float32[2])"],
    )
    assert refusal(same, old, old, new)[0].startswith("2 differences between")


def test_the_advice_to_pair_by_position_is_given_where_it_helps():
    names, new = index("names", "x", "z"), index("new", "x", "y")
    archives = [dataclasses.replace(each, format="keras") for each in (names, new)]
    assert refusal(*archives)[0] == "2 differences between the inputs and the newest, new:"
    assert refusal(names, new)[0] == (
        "2 differences between the inputs and the newest, new; by position the tensors agree, and "
        "align='position' (--align position) averages them so:"
    )
    assert "position" not in refusal(names, index("few", "x"), new)[0]


def test_what_differs_in_a_place_is_told_with_both_names():
    new = index("new", "x", "y")
    wide = dataclasses.replace(new, tensors=(new.tensors[0], TensorSpec("z", "float64", (2,))))
    assert refusal(wide, index("few", "x"), new, how="position") == (
        "2 differences between the inputs and the newest, new:",
        [
            "new: z is float64[2], not float32[2] as y in its place",
            "few: 1 tensors, not 2",
        ],
    )
