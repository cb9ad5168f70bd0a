"""What a plan says: of its inputs, of the bytes that are moved, of what is refused at once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import wavg
from wavg.checkpoint import Checksum, FileIdentity, Index, TensorSpec
from wavg.extents import Extent
from wavg.options import Options
from wavg.plan import PlannedInput, Weighting, make_plans
from wavg.record import STATE_KEY

TENSORS = (
    TensorSpec("w", "float32", (10, 3), Extent(0, 0, 120)),
    TensorSpec("h", "float16", (7,), Extent(0, 120, 14)),
    TensorSpec("n", "int64", (2,), Extent(0, 134, 16)),
    TensorSpec("x", "float64", (4,), Extent(0, 150, 32)),
)
OTHERS = (
    TensorSpec("opt/m", "float32", (10, 3), Extent(0, 182, 120)),
    TensorSpec("opt/v", "float32", (1,), Extent(0, 302, 4)),
)
AVERAGED = 30 * 4 + 7 * 2 + 4 * 8


def index(path, *, size=1000, **changes):
    files = tuple(FileIdentity(f"{path}{part}", size, 0, 0, 0) for part in ("", ".2"))
    return Index(
        **{"format": "npz", "files": files, "tensors": TENSORS, "others": OTHERS} | changes
    )


RUN = [index("a"), index("b"), index("c")]


def planned(indexes=RUN, weights=(1.0, 2.0, 3.0), output_format="npz", **options):
    """Return the plan of one average."""
    (plan,) = make_plans(
        indexes,
        [10 * number for number in range(len(indexes))],
        [Weighting("given", np.array(weights), "out")],
        Options(**options),
        output_format=output_format,
    )
    return plan


def test_every_input_is_told_with_its_step_and_its_proportion():
    plan = planned(weights=(1.0, 1.0, 2.0))
    assert plan.inputs == (
        PlannedInput("a", 0, 0.25),
        PlannedInput("b", 10, 0.25),
        PlannedInput("c", 20, 0.5),
    )
    assert (plan.schedule, plan.output) == ("given", "out")
    assert plan.figures.mean_age == 7.5


def test_an_input_that_is_an_average_is_known_by_its_record():
    average = dataclasses.replace(RUN[1], metadata={"wavg": "{}"})
    ones = [Weighting("equal", np.ones(3), None)]
    (plan,) = make_plans([RUN[0], average, RUN[2]], [1, 5, 6], ones, Options(), output_format=None)
    assert [part.average for part in plan.inputs] == [False, True, False]


def test_averages_of_one_pass_have_the_newest_inputs_and_share_the_rest():
    ones = [Weighting(f"last {n}", np.ones(n), None) for n in (1, 3, 2)]
    plans = make_plans(RUN, [1, 5, 6], ones, Options(), output_format=None)
    assert [[part.path for part in plan.inputs] for plan in plans] == [["c"], [*"abc"], ["b", "c"]]
    assert [[part.step for part in plan.inputs] for plan in plans] == [[6], [1, 5, 6], [5, 6]]
    assert [plan.figures.mean_age for plan in plans] == pytest.approx([0, 2, 0.5])
    assert len({id(plan.decisions) for plan in plans}) == 1
    one = make_plans(RUN, [1, 5, 6], ones[:1], Options(), output_format=None)
    assert plans[0].projected_memory > one[0].projected_memory


def test_arrays_are_read_and_not_written():
    plan = planned(output_format=None)
    assert not plan.patches
    assert not plan.keep_others
    assert plan.bytes_read == 3 * (AVERAGED + 16)
    assert plan.result_bytes == AVERAGED + 16
    assert (plan.bytes_written, plan.disk_bytes) == (0, 0)


def test_a_patched_file_keeps_what_lies_beside_its_tensors():
    plan = planned()
    assert plan.patches
    assert plan.keep_others
    assert plan.others == OTHERS
    assert plan.bytes_read == 3 * (AVERAGED + 16) + 124
    assert plan.bytes_written == AVERAGED + 16 + 124
    assert plan.disk_bytes == 2 * 1000
    assert plan.result_bytes == 0


def test_an_optimizer_left_out_is_neither_read_nor_written():
    plan = planned(optimizer="drop")
    assert plan.patches
    assert not plan.keep_others
    assert plan.bytes_read == 3 * (AVERAGED + 16)
    assert plan.bytes_written == AVERAGED + 16
    assert plan.disk_bytes == 2 * 1000 - 124


def test_a_file_of_another_format_is_written_anew_without_the_optimizer():
    plan = planned(output_format="safetensors")
    assert not plan.patches
    assert not plan.keep_others
    assert plan.disk_bytes == plan.bytes_written == AVERAGED + 16
    assert plan.projected_memory == planned().projected_memory + 4 * 600


def test_another_dtype_changes_what_is_written_and_not_what_is_read():
    plan = planned(dtype="float16")
    assert plan.bytes_read == planned().bytes_read
    assert plan.bytes_written == (30 + 7 + 4) * 2 + 16 + 124
    assert plan.disk_bytes == 2 * 1000 - AVERAGED + (30 + 7 + 4) * 2


def test_what_is_excluded_is_read_from_the_newest_only():
    assert planned(exclude=("w",)).bytes_read == planned().bytes_read - 2 * 120
    assert planned(exclude=("n",)).bytes_read == planned().bytes_read - 2 * 16


def test_checksums_and_digests_make_no_reading_of_their_own_but_take_memory():
    checked = [index("a", checksums=(Checksum(Extent(0, 0, 7), 0, ""),)), *RUN[1:]]
    plain = planned()
    for passed in (planned(checked), planned(digests=True)):
        assert passed.bytes_read == plain.bytes_read
        assert passed.projected_memory == plain.projected_memory + plain.workers * (1 << 19)


def test_bytes_are_whole_where_numbers_are_not_of_whole_bytes():
    quarter = (TensorSpec("q", "float4_e2m1fn", (3,)), *TENSORS)
    indexes = [index(path, tensors=quarter) for path in "abc"]
    for output_format in ("npz", None):
        plan, usual = (planned(run, output_format=output_format) for run in (indexes, RUN))
        assert plan.bytes_read == usual.bytes_read + 3
        figures = (plan.bytes_read, plan.bytes_written, plan.disk_bytes, plan.result_bytes)
        assert {type(figure) for figure in figures} == {int}


def test_a_file_that_stores_less_than_its_tensors_have_is_no_negative_demand():
    packed = [index("a", size=10)]
    assert planned(packed, (1.0,)).disk_bytes == 20
    assert planned(packed, (1.0,), optimizer="drop").disk_bytes == 0


def test_saved_states_are_refused_whichever_input_they_are():
    for place in range(3):
        indexes = [*RUN]
        indexes[place] = index("sums", metadata={STATE_KEY: ""})
        with pytest.raises(wavg.WavgError) as caught:
            planned(indexes)
        assert caught.value.path == "sums"
        assert str(caught.value) == (
            "sums is the saved state of a StreamingAverager, and its sums are no model; have it "
            "write its average: StreamingAverager.load(path).save_average(…)"
        )


def test_a_model_without_a_number_to_average_is_refused():
    with pytest.raises(wavg.WavgError, match="c: there is no tensor to average"):
        planned(exclude=("[!n]",))


def test_codes_beside_scales_are_refused_unless_neither_is_averaged():
    specs = (TensorSpec("q", "int8", (1,)), TensorSpec("q_scale", "float32", (1,)), *TENSORS)
    indexes = [index(path, tensors=specs) for path in "abc"]
    with pytest.raises(wavg.WavgError, match="c: q holds quantised codes"):
        planned(indexes)
    assert len(planned(indexes, exclude=("q_scale",)).carried) == 3


def test_tensors_are_paired_as_asked_and_other_names_told():
    names = {"w": "weight", "n": "count"}
    renamed = tuple(s._replace(name=names.get(s.name, s.name)) for s in TENSORS)
    indexes = [index("a", tensors=renamed), index("b"), index("c")]
    with pytest.raises(wavg.StructureMismatchError):
        planned(indexes)
    plan = planned(indexes, align="position")
    assert plan.layouts == (1, 0, 0)
    assert plan.paired == {"w": ("weight",), "n": ("count",)}
    assert planned().paired == {}
    assert planned().layouts == (0, 0, 0)


def test_a_plan_shows_itself_in_short():
    plan = planned()
    assert repr(plan) == ("<Plan: given weights, 3 inputs, 3 tensors averaged, 1 carried over>")
    assert [decision.spec.name for decision in plan.averaged] == ["w", "h", "x"]
    assert [decision.spec.name for decision in plan.carried] == ["n"]
