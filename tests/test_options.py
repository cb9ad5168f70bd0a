"""What may be asked of an average, and sizes as people write them."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavg.options import IN_THE_NUMBERS, Options, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("512", 512),
        ("7b", 7),
        ("1.5", 1),
        ("1k", 1000),
        ("2KB", 2000),
        ("64MiB", 64 << 20),
        ("1.5GiB", 3 << 29),
        ("3gb", 3 * 10**9),
        (" 2 TiB ", 2 << 40),
        ("1t", 10**12),
        ("1.001k", 1001),
        ("9" * 400 + "k", int("9" * 400) * 1000),
    ],
)
def test_a_size_is_a_number_with_or_without_a_unit(text, size):
    assert parse_size(text) == size


@given(
    st.integers(0, 10**15), st.integers(0, 999), st.sampled_from("kmgt"), st.sampled_from(["", "i"])
)
def test_a_size_is_exact_and_cut_to_whole_bytes(whole, thousandths, letter, binary):
    unit = (1024 if binary else 1000) ** ("kmgt".index(letter) + 1)
    exact = (whole + Fraction(thousandths, 1000)) * unit
    assert parse_size(f"{whole}.{thousandths:03}{letter}{binary}b") == exact // 1


@pytest.mark.parametrize(
    "text", ["", "much", "-1", "1e3", "1.", ".5", "1ib", "1kk", "1 k b", "64MiB!", "1\n2"]
)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="is not a size; write 64MiB, 512MB or") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"align": "order"}, "align must be 'name' or 'position', not 'order'"),
        ({"optimizer": "x"}, "optimizer must be 'carry' or 'drop', not 'x'"),
        ({"integers": "x"}, "integers must be 'reference' or 'error', not 'x'"),
        ({"record": "x"}, "record must be one of inputs, sha256, none, not 'x'"),
        ({"dtype": "int8"}, "dtype must be a floating-point format, not 'int8'"),
        ({"dtype": "complex64"}, "dtype must be a floating-point format, not 'complex64'"),
        ({"max_shard_size": 0}, "max_shard_size must be positive, not 0"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(option, message):
    with pytest.raises(ValueError, match="must be") as caught:
        Options(**option)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "option",
    [
        {"align": "position"},
        {"optimizer": "drop"},
        {"integers": "error"},
        {"record": "sha256"},
        {"record": "none"},
        {"dtype": "bfloat16"},
        {"max_shard_size": 1},
        {"workers": 1},
    ],
)
def test_an_option_that_makes_sense_is_kept(option):
    assert dataclasses.asdict(Options(**option)).items() >= option.items()


def test_what_is_asked_for_by_default():
    assert dataclasses.asdict(Options()) == {
        "dtype": None,
        "include": (),
        "exclude": (),
        "align": "name",
        "optimizer": "carry",
        "integers": "reference",
        "allow_nonfinite": False,
        "record": "inputs",
        "digests": False,
        "max_shard_size": None,
        "max_memory": 64 << 20,
        "workers": 1,
    }


def test_what_shows_in_the_numbers_is_told_where_it_is_not_the_default():
    asked = {
        "dtype": "float16",
        "include": ("a*", "b*"),
        "exclude": ("*.b",),
        "align": "position",
        "optimizer": "drop",
        "allow_nonfinite": True,
    }
    assert asked.keys() == {*IN_THE_NUMBERS}
    told = Options(**asked, integers="error", record="none", max_memory=1, workers=3).told()
    assert told == asked | {"include": ["a*", "b*"], "exclude": ["*.b"]}
    assert Options(integers="error", record="none", max_memory=1, workers=3).told() == {}
