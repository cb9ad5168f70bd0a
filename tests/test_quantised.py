"""Which tensors are taken for quantised codes beside their scales, and which are not."""

from __future__ import annotations

import re

import pytest

import wavg
from wavg.checkpoint import TensorSpec
from wavg.dtypes import DTYPES, lookup
from wavg.quantised import refuse_quantised, refuse_quantised_leaves


def refused(*tensors, averaged=None):
    """Return (codes, scale) of what is refused in tensors given as (name, dtype); None if nothing.

    All but integers are averaged unless it is said which.
    """
    specs = [TensorSpec(name, dtype, (2,)) for name, dtype in tensors]
    if averaged is None:
        averaged = [spec.name for spec in specs if spec.entry.averaged]
    try:
        refuse_quantised("m.npz", specs, iter(averaged))
        return None
    except wavg.WavgError as caught:
        error = caught
    scale = re.search("with the scale ([^:]*): ", str(error))[1]
    assert error.path == "m.npz"
    assert str(error) == (
        f"m.npz: {error.tensor} holds quantised codes ({dict(tensors)[error.tensor]}) with the "
        f"scale {scale}: their average has no meaning. Average the checkpoints before they are "
        "quantised, or exclude both"
    )
    return error.tensor, scale


@pytest.mark.parametrize("entry", DTYPES, ids=lambda entry: entry.name)
def test_codes_are_of_eight_bits_at_most_and_neither_bool_nor_complex(entry):
    pair = ("w", entry.name), ("w_scale", "float32")
    narrow = entry.bits <= 8 and entry.kind != "bool"
    assert refused(*pair) == (("w", "w_scale") if narrow else None)


@pytest.mark.parametrize(
    "scale",
    ["w_scale", "w_scales", "w_scale_inv", "w.scale", "w.absmax", "w.SCB", "w_absmax"],
)
def test_a_scale_is_named_after_its_codes(scale):
    assert refused(("w", "int8"), (scale, "float32")) == ("w", scale)
    assert refused(("v", "int8"), (scale, "float32")) is None


@pytest.mark.parametrize("scale", ["scale", "scales", "SCB", "weight_scb", "absmax"])
@pytest.mark.parametrize("group", ["", "layers.0.", "layers/0/"])
def test_or_it_lies_beside_them_under_a_usual_name(scale, group):
    codes = f"{group}weight"
    assert refused((codes, "int8"), (f"{group}{scale}", "float16")) == (codes, f"{group}{scale}")
    assert refused((codes, "int8"), (f"else.{group}{scale}", "float16")) is None


@pytest.mark.parametrize("name", ["qweight", "qzeros"])
def test_codes_packed_into_wide_integers_are_known_by_name(name):
    scales = ("l.scales", "float16")
    assert refused((f"l.{name}", "int32"), scales) == (f"l.{name}", "l.scales")
    assert refused((name, "int32"), ("scales", "float16")) == (name, "scales")
    assert refused((f"l.my{name}", "int32"), scales) is None
    assert refused((f"l.{name}.x", "int32"), ("l.x_scale", "float16")) is None


def test_numbered_variables_of_a_layer_are_codes_and_scale_the_last_of_them_told():
    layer = [("d/vars/0", "int8"), ("d/vars/1", "float32"), ("d/vars/2", "float32")]
    assert refused(*layer) == ("d/vars/0", "d/vars/2")
    assert refused(("d/vars/0", "int8"), ("d/vars/1", "int32")) is None
    assert refused(("d/vars/0", "int8"), ("e/vars/1", "float32")) is None
    assert refused(("d/vars/0", "int8"), ("d/1", "float32")) is None
    assert refused(("d/0", "int8"), ("d/1", "float32")) is None


def test_narrow_floats_are_no_scale_of_themselves():
    assert refused(("w.scale", "float8_e4m3fn")) is None
    assert refused(("d/vars/0", "float8_e4m3fn")) is None
    assert refused(("w", "float8_e4m3fn"), ("w_scale", "float32")) == ("w", "w_scale")


def test_codes_and_scale_that_are_both_carried_over_stay_together():
    pair = ("w", "float8_e5m2"), ("w_scale", "float32")
    assert refused(*pair, averaged=[]) is None
    assert refused(*pair, averaged=["w"]) == ("w", "w_scale")
    assert refused(*pair, averaged=["w_scale"]) == ("w", "w_scale")
    assert refused(*pair, ("x", "float32"), averaged=["x"]) is None


def test_the_first_pair_is_told_though_others_are_fine():
    tensors = [
        ("fine", "int8"),
        ("a", "int8"),
        ("a_scale", "float32"),
        ("b", "int8"),
        ("b_scale", "float32"),
    ]
    assert refused(*tensors) == ("a", "a_scale")
    assert refused(*tensors, averaged=["b_scale"]) == ("b", "b_scale")


def test_leaves_of_a_model_are_judged_by_their_paths():
    pair = [("w", lookup("int8")), ("w_scale", lookup("float32"))]
    with pytest.raises(wavg.WavgError, match="the model: w holds quantised codes") as caught:
        refuse_quantised_leaves(pair)
    assert caught.value.tensor == "w"
    refuse_quantised_leaves([("w", lookup("int8")), ("w_scale", lookup("int32"))])
    refuse_quantised_leaves([("w", lookup("int32")), ("w_scale", lookup("float32"))])
