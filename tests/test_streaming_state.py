"""Several averages, steps, windows, and a state that outlives the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import averager_run
import strategies
import wavg
from trees import Pair, assert_same_tree, fill
from wavg import weights
from wavg.dtypes import lookup
from wavg.errors import (
    CheckpointFormatError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    StructureMismatchError,
    WavgError,
    WeightError,
)

BY_STEPS = wavg.Schedule(  # an EMA over uneven gaps, as the schedules of steps are
    "own",
    lambda steps: np.exp(-(steps[-1] - steps) / 100),
    lambda position, step, before: (np.exp(-(step - before) / 100), 1.0),
)


def models(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "layers": [Pair(rng.standard_normal((3, 4)).astype("f4"), None)],
            "double": rng.standard_normal(5),
            "half": rng.standard_normal(7).astype(lookup("bfloat16").numpy),
            "phase": (rng.standard_normal(2) + 1j).astype("c8"),
            "count": np.int64(i),
        }
        for i in range(count)
    ]


def averager_of(items, weights="linear", steps=None, **options):
    averager = wavg.StreamingAverager(weights, **options)
    for item, step in zip(items, steps or [None] * len(items), strict=True):
        averager.update(item, step)
    return averager


# Steps


def test_steps_reach_the_schedule():
    steps = [10, 20, 250, 1000.5]
    rows = [np.float64([i, 2.0 * i * i]) for i in range(4)]
    ours = averager_of(rows, BY_STEPS, steps)
    np.testing.assert_allclose(ours.result(), wavg.average(rows, BY_STEPS, steps=steps))
    assert (ours.count, ours.step) == (4, 1000.5)


def test_without_steps_they_are_the_models_numbers():
    seen = []
    rule = wavg.Schedule("own", lambda steps: steps, lambda *where: seen.append(where) or (1, 1))
    averager = wavg.StreamingAverager(rule)
    assert (averager.count, averager.step) == (0, None)
    averager.update(np.float32(1))
    seen.clear()
    for _ in range(2):
        averager.update(np.float32(1))
    assert seen == [(2, 2.0, 1.0), (3, 3.0, 2.0)]
    assert averager.step == 3


@pytest.mark.parametrize("options", [{}, {"window": 2}])
def test_steps_increase_or_are_refused(options):
    averager = averager_of(models(2), steps=[5, 9], **options)
    before = averager.result()
    for step in (9, 3, np.nan, np.inf):
        with pytest.raises(WeightError, match=r"steps must increase.*state of that time"):
            averager.update(models(1)[0], step)
    with pytest.raises(WeightError, match="for every model or for none, and those before had one"):
        averager.update(models(1)[0])
    assert (averager.count, averager.step) == (2, 9)
    assert_same_tree(averager.result(), before)
    averager = averager_of(models(1))
    with pytest.raises(WeightError, match="those before had none"):
        averager.update(models(1)[0], 7)
    with pytest.raises(WeightError, match="a step must be a finite number, not nan"):
        wavg.StreamingAverager().update(models(1)[0], np.nan)


# Every schedule

STREAMING = [text for text in weights.KNOWN if weights.parse(text).update is not None] + [
    "ema:decay=0.9,debias=false",
    "ema:decay=0.99,per=step",
    "ema:decay=0.99,warmup=ratio",
    "ema:decay=0.99,warmup=power",
    "power_ema:gamma=6.94",
]


@pytest.mark.parametrize("text", STREAMING)
@pytest.mark.parametrize("step", [-5, 0, 0.5])
def test_a_stream_begins_at_the_steps_that_a_list_may_begin_with(text, step):
    averager = wavg.StreamingAverager(text)
    try:
        right = wavg.average([1.0, 2.0], text, steps=[step, 5])
    except WeightError:
        with pytest.raises(WeightError, match=f"needs steps of at least 0, not {step}"):
            averager.update([1.0], step)
        assert averager.count == 0
    else:
        averager.update([1.0], step)
        averager.update([2.0], 5)
        assert averager.result()[0] == pytest.approx(right)


def test_some_schedules_refuse_to_begin_before_step_0():
    for text in ("ema:half_life=10", "polynomial:power=2", "polynomial:power=1.5"):
        with pytest.raises(WeightError, match="counts steps from the start of the training at 0"):
            wavg.StreamingAverager(["equal", text]).update([1.0], -5)


@pytest.mark.parametrize("text", STREAMING)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_every_schedule_that_streams_gives_what_it_gives_all_at_once(text, precision, tmp_path):
    steps = [10.0, 20.0, 50.0, 80.0, 300.0, 301.0, 1000.0]
    rows = [row + np.float32(2) for row in np.random.default_rng(0).random((7, 40), np.float32)]
    averager = wavg.StreamingAverager(text, precision=precision)
    for count, (row, step) in enumerate(zip(rows, steps, strict=True), start=1):
        averager.update([row], step)
        if count == 4:
            averager.save(tmp_path / "state.safetensors")
            averager = wavg.StreamingAverager.load(tmp_path / "state.safetensors")
        right = wavg.average(rows[:count], text, steps=steps[:count])
        ours = averager.result()
        (ours,) = ours.values() if isinstance(ours, dict) else ours
        ulps = 1 if precision == "float64" else count + 2
        np.testing.assert_array_max_ulp(ours, right, maxulp=ulps)


def test_the_list_of_streaming_schedules_is_not_cut_short():
    names = {text.partition(":")[0] for text in STREAMING}
    assert names >= {"equal", "linear", "exponential", "polynomial", "ema", "power_ema"}


def test_snapshots_of_two_widths_give_a_third_post_hoc(tmp_path):
    tracked = ["power_ema:sigma_rel=0.05", "power_ema:sigma_rel=0.1"]
    averager = wavg.StreamingAverager([*tracked, "power_ema:sigma_rel=0.08"])
    rng, model = np.random.default_rng(0), np.zeros(50)
    for step in range(1, 401):
        model = model + rng.standard_normal(50) / 10  # a random walk, as weights take
        averager.update({"w": model.astype(np.float32)}, step)
        if step % 25 == 0:
            for which in range(2):
                name = f"width{which}_step{step}.safetensors"
                averager.save_average(tmp_path / name, which)
    ours = wavg.average_checkpoints(tmp_path, weights="post_hoc_ema:sigma_rel=0.08")["w"]
    right = averager.result()[2]["w"]
    scale = np.abs(right - averager.result()[0]["w"]).max()
    assert np.abs(ours - right).max() < scale / 20


# Several averages


def test_several_averages_are_those_of_one_averager_each():
    rules = ["equal", "linear", "exponential:alpha=1", BY_STEPS]
    several = averager_of(models(5), rules)
    assert_same_tree(several.result(), [averager_of(models(5), rule).result() for rule in rules])
    assert repr(several) == (
        "StreamingAverager(['equal', 'linear', 'exponential:alpha=1', 'own'], count=5)"
    )


def test_a_list_of_one_gives_a_list():
    assert averager_of([np.float32(2)], ["equal"]).result() == [2]


def test_one_of_several_that_does_not_stream_is_refused():
    with pytest.raises(WeightError, match=r"weights 1,2 need to know how many .* window=n"):
        wavg.StreamingAverager(["equal", "1,2"])


# Windows


@pytest.fixture(params=["memory", "folder"])
def keep(request, tmp_path):
    return {} if request.param == "memory" else {"folder": tmp_path / "window"}


@pytest.mark.parametrize("weights", ["equal", "linear", "exponential:alpha=2", BY_STEPS])
def test_a_window_is_the_average_of_the_last_n(keep, weights):
    averager = wavg.StreamingAverager(weights, window=3, **keep)
    items, steps = models(7), [10.0 * i * i + 5 for i in range(7)]
    for count, (item, step) in enumerate(zip(items, steps, strict=True), start=1):
        averager.update(item, step)
        last = slice(max(0, count - 3), count)
        assert_same_tree(averager.result(), wavg.average(items[last], weights, steps=steps[last]))
    assert averager.count == 7


def test_a_window_takes_schedules_that_do_not_stream_and_several(keep):
    averager = averager_of(models(4), [[1, 2, 5], "equal"], window=3, **keep)
    last = models(4)[1:]
    assert_same_tree(averager.result(), [wavg.average(last, [1, 2, 5]), wavg.average(last)])


def test_a_window_refuses_nan_at_the_update_and_stays(keep):
    averager = averager_of(models(4), window=2, **keep)
    before = averager.result()
    bad = {**models(1)[0], "double": np.array([1, 2, np.nan, 4, 5])}
    with pytest.raises(NonFiniteError, match=r"double holds NaN or infinity, first at \[2\]"):
        averager.update(bad)
    assert averager.count == 4
    assert_same_tree(averager.result(), before)


@pytest.mark.parametrize("model", [{"n": np.int64(3)}, {}, [np.array([True])]], ids=str)
def test_a_window_of_integers_alone_is_the_newest(keep, model):
    averager = averager_of([model, model], window=2, **keep)
    assert_same_tree(averager.result(), fill(model, np.array))


CODES = {"w": np.int8([1, 2]), "w_scale": np.float32(0.5)}
FLOAT8 = {"w": np.ones(2).astype(lookup("float8_e4m3fn").numpy), "w_scale": np.float32(0.5)}


@pytest.mark.parametrize("codes", [CODES, FLOAT8])
@pytest.mark.parametrize("options", [{}, {"window": 2}, {"window": 2, "folder": "window"}])
def test_quantised_codes_are_refused_at_the_first_update(options, codes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    averager = wavg.StreamingAverager(**options)
    with pytest.raises(WavgError, match=r"w holds quantised codes .* with the scale w_scale"):
        averager.update(codes)
    assert averager.count == 0
    with pytest.raises(WavgError, match="the model: w holds quantised codes"):
        wavg.average([codes, codes])


def test_a_windows_arrays_are_copies():
    array = np.ones(3, np.float32)
    averager = averager_of([array], window=2)
    array[...] = 7
    assert averager.result().tolist() == [1, 1, 1]


def test_a_folder_holds_the_last_n_and_is_taken_up_again(tmp_path):
    steps = [100.0, 200.0, 300.5, 400.0]
    averager_of(models(4), "linear", steps, window=2, folder=tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "model_300.50000000000000000.safetensors",
        "model_400.safetensors",
    ]
    again = wavg.StreamingAverager("linear", window=2, folder=tmp_path)
    assert (again.count, again.step) == (4, 400)
    right = wavg.average(models(4)[2:], "linear")
    by_path = again.result()
    assert list(by_path) == ["layers[0].left", "double", "half", "phase", "count"]
    assert_same_tree(by_path["double"], right["double"])
    with pytest.raises(StructureMismatchError, match=r"layers\[0\].left: not in the model"):
        again.update({"double": 1.0}, 500)
    again.update(models(5)[4], 500)
    assert sorted(os.listdir(tmp_path)) == ["model_400.safetensors", "model_500.safetensors"]
    assert_same_tree(again.result(), wavg.average(models(5)[3:], "linear"))
    files = wavg.average_checkpoints(tmp_path, weights="linear")
    assert_same_tree(files["half"], again.result()["half"])


def test_a_folder_that_was_left_between_writing_and_removing_is_in_order(tmp_path):
    averager_of(models(4), window=3, folder=tmp_path)  # 2, 3, 4
    again = wavg.StreamingAverager("linear", window=2, folder=tmp_path)
    assert_same_tree(again.result()["half"], wavg.average(models(4)[2:], "linear")["half"])
    again.update(models(5)[4])
    assert sorted(os.listdir(tmp_path)) == ["model_4.safetensors", "model_5.safetensors"]


@pytest.mark.parametrize(
    "steps", [[0.25, 0.5, 0.75], [1 / 3, 0.5, 1e-3 + 2 / 3], [1e-9, 0.1 + 0.2, 9.5], [9, 10, 11]]
)
def test_files_of_a_window_are_read_by_others_in_order_and_with_their_steps(steps, tmp_path):
    averager = averager_of(models(3), "ema:half_life=1", steps, window=3, folder=tmp_path)
    plan = wavg.plan_average(tmp_path)
    assert [part.step for part in plan.inputs] == steps
    files = wavg.average_checkpoints(tmp_path, weights="ema:half_life=1")
    assert_same_tree(files["double"], averager.result()["double"])


def test_a_window_of_files_with_negative_steps_gives_no_warning(tmp_path):
    averager = averager_of(models(3), "linear", [-5, -3, 2], window=3, folder=tmp_path)
    assert_same_tree(averager.result(), wavg.average(models(3), "linear"))


def test_a_folder_gives_plain_trees_back(tmp_path):
    model = [np.float32([1, 2]), {"b": (np.float32(1), None)}]
    averager = averager_of([model], window=2, folder=tmp_path)
    again = wavg.StreamingAverager("linear", window=2, folder=tmp_path)
    assert_same_tree(again.result(), averager.result())


def test_a_folder_ahead_of_the_training_is_named_with_what_to_do(tmp_path):
    averager_of(models(3), "linear", [0.25, 0.5, 0.75], window=2, folder=tmp_path)
    again = wavg.StreamingAverager("linear", window=2, folder=tmp_path)
    newest = max(tmp_path.iterdir())
    told = f"0.75; that is in {newest}: .* needs the files of later steps removed from {tmp_path}, "
    with pytest.raises(WeightError, match=told):
        again.update(models(1)[0], 0.6)
    newest.unlink()
    again = wavg.StreamingAverager("linear", window=2, folder=tmp_path)
    again.update(models(4)[3], 0.6)
    assert_same_tree(again.result(), wavg.average([models(2)[1], models(4)[3]], "linear"))


def test_a_folder_with_other_checkpoints_is_refused(tmp_path):
    wavg.save(tmp_path / "model_3.safetensors", {"w": np.ones(2)})
    with pytest.raises(CheckpointFormatError, match="is no model of a window"):
        wavg.StreamingAverager(window=2, folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 0}, "positive number of models, not 0"),
        ({"window": 2.5}, "positive number of models, not 2.5"),
        ({"folder": "x"}, "give window=n"),
        ({"window": 2, "precision": "float32"}, "keeps models, not sums of float32"),
    ],
)
def test_a_window_that_makes_no_sense_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        wavg.StreamingAverager(**options)


# Interrupted


@pytest.mark.parametrize("options", [{}, {"window": 2}])
def test_an_update_that_was_interrupted_is_not_passed_over(options, monkeypatch, tmp_path):
    averager = averager_of(models(2), **options)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "copyto", interrupt)
        with pytest.raises(KeyboardInterrupt):
            averager.update(models(3)[2])
    for use in (
        averager.result,
        lambda: averager.update(models(3)[2]),
        lambda: averager.save(tmp_path / "a.safetensors"),
    ):
        with pytest.raises(WavgError, match="interrupted half-way"):
            use()


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"window": 2, "folder": "window"}])
def test_an_update_interrupted_before_it_was_noted_is_not_passed_over(
    options, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    averager = averager_of(models(2), **options)
    update = averager._held.update

    def interrupted(*arguments):
        update(*arguments)
        raise KeyboardInterrupt

    averager._held.update = interrupted
    with pytest.raises(KeyboardInterrupt):
        averager.update(models(3)[2])
    with pytest.raises(WavgError, match="interrupted half-way"):
        averager.result()
    if "folder" in options:
        assert wavg.StreamingAverager("linear", **options).count == 3


@pytest.mark.parametrize("options", [{}, {"window": 2}])
def test_a_first_update_without_memory_can_be_tried_again(options, monkeypatch):
    averager, left = wavg.StreamingAverager("linear", **options), [2]

    def short(make):
        def made(*arguments, **named):
            left[0] -= 1
            if not left[0]:
                raise MemoryError
            return make(*arguments, **named)

        return made

    with monkeypatch.context() as patched:
        patched.setattr(np, "full", short(np.full))
        patched.setattr(np, "empty", short(np.empty))
        with pytest.raises(MemoryError):
            averager.update(models(1)[0])
    averager.update(models(1)[0])
    assert_same_tree(averager.result(), wavg.average(models(1)))


# Saved states

WAYS = [
    {"weights": "equal"},
    {"weights": "linear"},
    {"weights": "exponential:alpha=3"},
    {"weights": "linear", "precision": "float32"},
    {"weights": ["equal", "exponential:alpha=2"]},
    {"weights": "linear", "window": 3},
    {"weights": ["0.5,0.25,0.25"], "window": 3},
    {"weights": "linear", "allow_nonfinite": True},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("steps", [None, [3.0, 7.5, 20.0, 1e6, 1e7]])
def test_a_loaded_state_goes_on_to_the_same_bytes(way, steps, tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    whole = averager_of(models(5), steps=steps, **way)
    part = averager_of(models(3), steps=steps and steps[:3], **way)
    part.save(first)
    again = wavg.StreamingAverager.load(first)
    assert repr(again) == repr(part)
    again.save(second)
    assert first.read_bytes() == second.read_bytes()
    for number in (3, 4):
        again.update(models(5)[number], steps and steps[number])
    assert_same_tree(again.result(), whole.result())
    whole.save(first)
    again.save(second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("dtype", strategies.FLOATS)
@settings(deadline=None, max_examples=4)
@given(data=st.data())
def test_a_state_keeps_every_bit_of_hard_sums(dtype, data, tmp_path_factory):
    rows = data.draw(strategies.bit_patterns(dtype, 8 * 30, 200)).reshape(8, 30)
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    averager = wavg.StreamingAverager("linear")
    for row in rows:
        averager.update([row])
        averager.save(path)
        averager = wavg.StreamingAverager.load(path)
    averager.update([rows[0]])
    assert_same_tree(averager.result(), wavg.average([[row] for row in [*rows, rows[0]]], "linear"))


def test_what_is_kept_aside_is_saved(tmp_path):
    rows = np.ones((3, 70_000), np.float32)
    rows[:2, [5, 60_000]] = [[1e30, 1e-38], [1e-8, 1e38]]
    averager = averager_of(list(rows[:2]))
    averager.save(tmp_path / "a.safetensors")
    names = list(wavg.load(tmp_path / "a.safetensors"))
    assert names == ["sum0.0/", "places0/", "values0/"]
    again = wavg.StreamingAverager.load(tmp_path / "a.safetensors")
    again.update(rows[2])
    assert_same_tree(again.result(), wavg.average(list(rows), "linear"))


def test_a_loaded_state_gives_arrays_by_path_until_a_model_shows_the_structure(tmp_path):
    path = tmp_path / "a.safetensors"
    averager_of(models(2)).save(path)
    again = wavg.StreamingAverager.load(path)
    right = averager_of(models(2)).result()
    assert_same_tree(again.result(), dict(wavg.tree.leaves(right)))
    bad = {**models(1)[0], "half": np.float32(1)}
    with pytest.raises(StructureMismatchError, match=r"half: float32\[\], not bfloat16\[7\]"):
        again.update(bad)
    with pytest.raises(StructureMismatchError, match="other: only in the model"):
        again.update({**models(1)[0], "other": 1})
    assert isinstance(again.result(), dict)
    turned = dict(reversed(models(3)[2].items()))  # the same leaves, in another order
    again.update(turned)
    result = again.result()
    assert list(result) == list(turned)
    right = averager_of(models(3)).result()
    assert_same_tree({key: result[key] for key in right}, right)


@pytest.mark.parametrize(
    "model",
    [
        [np.float32([1, 2]), np.float32(3)],
        {"a": [np.float32(1), (np.float32([2]),)], "none": None, 3: {"b": np.int64(1)}, "no": ()},
        np.float64([1, 2]),
        {},
    ],
)
def test_a_loaded_state_gives_plain_trees_back(model, tmp_path):
    averager_of([model, model]).save(tmp_path / "a.safetensors")
    again = wavg.StreamingAverager.load(tmp_path / "a.safetensors")
    assert_same_tree(again.result(), averager_of([model, model]).result())
    again.update(model)
    assert again.count == 3


@pytest.mark.parametrize("node", [OrderedDict(w=1.0), Pair(1.0, None)])
def test_a_loaded_state_of_other_nodes_gives_leaves_by_path(node, tmp_path):
    averager_of([[node]]).save(tmp_path / "a.safetensors")
    again = wavg.StreamingAverager.load(tmp_path / "a.safetensors")
    (path,) = again.result()
    assert path in ("[0]/w", "[0].left")
    again.update([node])
    assert isinstance(again.result(), list)


def test_the_reference_loader_opens_a_state(tmp_path):
    averager_of(models(2)).save(tmp_path / "a.safetensors")
    averager_of([np.float32([1, 2])]).save(tmp_path / "b.safetensors")
    for name in "ab":
        path = tmp_path / f"{name}.safetensors"
        right = wavg.load(path)
        assert safetensors.numpy.load_file(path).keys() == right.keys()


def test_saving_replaces_unless_told_not_to(tmp_path):
    path = tmp_path / "a.safetensors"
    averager = averager_of(models(1))
    averager.save(path)
    with pytest.raises(OutputExistsError):
        averager.save(path, overwrite=False)
    averager.update(models(2)[1])
    averager.save(path)
    assert wavg.StreamingAverager.load(path).count == 2
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("content", [None, b"", b"notes"])
def test_saving_replaces_no_file_but_a_state(content, tmp_path):
    path = tmp_path / "model.safetensors"
    if content is None:
        wavg.save(path, {"w": np.ones(2)})
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(OutputExistsError, match="is not the saved state of a StreamingAverager"):
        averager_of(models(1)).save(path)
    assert path.read_bytes() == before


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(WeightError, match="no average yet"):
        wavg.StreamingAverager().save(path)
    with pytest.raises(WeightError, match="own are a schedule of your own"):
        averager_of(models(1), BY_STEPS).save(path)
    (tmp_path / "w.json").write_text('{"1": 3}')
    with pytest.raises(WeightError, match="stand in a file, which may change"):
        averager_of(models(1), str(tmp_path / "w.json"), window=1).save(path)
    os.unlink(tmp_path / "w.json")
    fake = wavg.Schedule("equal", lambda steps: steps)  # calls itself equal, and does not stream
    with pytest.raises(WeightError, match="equal are a schedule of your own"):
        averager_of(models(1), fake, window=1).save(path)
    with pytest.raises(WavgError, match="two leaves of the model are called 'a/b'"):
        averager_of([{"a/b": 1.0, "a": {"b": 2.0}}]).save(path)
    with pytest.raises(OutputError, match=r"end its name \.safetensors"):
        averager_of(models(1)).save(tmp_path / "a.npz")
    with pytest.raises(OutputError, match="a window in a folder is kept there"):
        averager_of(models(1), window=1, folder=tmp_path / "w").save(path)
    assert os.listdir(tmp_path) == ["w"]


def saved(tmp_path):
    averager_of([{"w": np.ones(3), "n": 1}] * 2).save(tmp_path / "a.safetensors")
    tensors = wavg.load(tmp_path / "a.safetensors")
    with wavg.open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        return tensors, json.loads(checkpoint.metadata["wavg_state"])


def deep(levels):
    tree = 0
    for _ in range(levels):
        tree = {"list": [tree]}
    return [tree]


CHANGES = {
    "a number lacks": (lambda t, h: t.pop("sum0.0/w"), "sum0.0/w"),
    "a level lacks": (lambda t, h: t.pop("sum0.1/w"), "sum0.1/w"),
    "an integer lacks": (lambda t, h: t.pop("newest/n"), "newest/n"),
    "a shape is another": (lambda t, h: t.update({"sum0.0/w": np.ones(2)}), r"float64\[3\]"),
    "a dtype is another": (lambda t, h: t.update({"newest/n": np.float32(1)}), r"int64\[\]"),
    "a tensor too many": (lambda t, h: t.update(x=np.ones(1)), "'x' has no place in it"),
    "a later version": (lambda t, h: h.update(v=2), "version 2, later than this wavg"),
    "a total lacks": (lambda t, h: h.pop("totals"), "totals"),
    "a total is no number": (lambda t, h: h.update(totals=["x"]), ""),
    "too few totals": (lambda t, h: h.update(totals=[]), ""),
    "an unknown precision": (lambda t, h: h.update(precision="f2"), "precision"),
    "no last model": (lambda t, h: h.update(last=None), ""),
    "an unknown dtype": (lambda t, h: h["leaves"][0].__setitem__(1, "f2"), "unknown dtype"),
    "no table": (lambda t, h: h.update(leaves=3), ""),
    "a shape beyond memory": (lambda t, h: h["leaves"][0].__setitem__(2, [2**44]), "is not of"),
    "an integer beyond memory": (lambda t, h: h["leaves"][1].__setitem__(2, [2**44]), "is not int"),
    "a shape below zero": (lambda t, h: h["leaves"][0].__setitem__(2, [-3, -1]), "has the shape"),
    "a shape beyond all": (lambda t, h: h["leaves"][0].__setitem__(2, [0, 2**62]), "has the shape"),
    "a shape of parts": (lambda t, h: h["leaves"][0].__setitem__(2, [3.0]), "has the shape"),
    "a total over nothing": (lambda t, h: h.update(totals=["1/0"]), ""),
    "a total beyond float64": (lambda t, h: h.update(totals=["0x1.0p9999"]), "no sum of weights"),
    "a total beyond it": (lambda t, h: h.update(totals=["0x1.0p+9999"]), ""),
    "a total without end": (lambda t, h: h.update(totals=["1e9999999999"]), "no sum of weights"),
    "a place beyond": (
        lambda t, h: t.update({"places0/w": np.array([3]), "values0/w": np.ones(1)}),
        "places beyond its 3",
    ),
    "a value that is none": (
        lambda t, h: t.update({"places0/w": np.array([1]), "values0/w": np.array([np.inf])}),
        "",
    ),
    "a tree of other leaves": (
        lambda t, h: h.update(tree=[{"dict": [["w", 1], ["n", 0]]}]),
        "its tree is not that of its leaves",
    ),
    "a tree of fewer leaves": (lambda t, h: h.update(tree=[{"dict": [["w", 0]]}]), "its tree"),
    "a tree of no kind": (lambda t, h: h.update(tree=[{"set": [0, 1]}]), ""),
    "a tree too deep": (lambda t, h: h.update(tree=deep(400)), ""),
    "another file": (lambda t, h: h.update(weights=["/etc/hostname.json"]), "are a file's"),
    "an unknown schedule": (lambda t, h: h.update(weights=["cubic"]), "unknown weights"),
    "no schedule": (lambda t, h: h.update(weights=[]), ""),
    "a step that is none": (lambda t, h: h.update(last=[2, float("nan"), 1, False]), "steps must"),
    "steps that fall": (lambda t, h: h.update(last=[2, 1, 2, True]), "steps must"),
    "no number of models": (lambda t, h: h.update(last=[0, 1, 0, True]), "number of models is 0"),
    "a window without models": (lambda t, h: h.update(window=10**8), "steps"),
    "too many steps": (lambda t, h: h.update(window=1, steps=[1, 2]), "2 steps in a window of 1"),
    "a window of no leaves": (
        lambda t, h: (
            t.clear(),
            t.update(x=np.ones(1)),
            h.update(window=10**8, leaves=[], tree=None, steps=[2]),
        ),
        "'x' has no place in it",
    ),
}


@pytest.mark.parametrize(("change", "match"), CHANGES.values(), ids=CHANGES)
def test_a_state_that_is_not_sound_is_refused(change, match, tmp_path):
    tensors, header = saved(tmp_path)
    change(tensors, header)
    path = tmp_path / "b.safetensors"
    wavg.save(path, tensors, metadata={"wavg_state": json.dumps(header)})
    with pytest.raises(CheckpointFormatError, match=f"b.safetensors: not a sound state.*{match}"):
        wavg.StreamingAverager.load(path)


def test_a_state_as_it_was_is_sound(tmp_path):
    tensors, header = saved(tmp_path)
    path = tmp_path / "b.safetensors"
    wavg.save(path, tensors, metadata={"wavg_state": json.dumps(header)})
    assert wavg.StreamingAverager.load(path).count == 2


def test_states_are_not_averaged_as_if_they_were_models(tmp_path):
    for name in ("a", "b"):
        averager_of(models(2)).save(tmp_path / f"{name}.safetensors")
    with pytest.raises(WavgError, match=r"a.safetensors is the saved state.*save_average"):
        wavg.average_checkpoints([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_a_checkpoint_is_no_state(tmp_path):
    wavg.save(tmp_path / "a.safetensors", {"w": np.ones(2)})
    with pytest.raises(CheckpointFormatError, match="is not the saved state of a Streaming"):
        wavg.StreamingAverager.load(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        wavg.StreamingAverager.load(tmp_path / "none.safetensors")


# The average as a checkpoint


def test_a_saved_average_says_what_it_is(tmp_path):
    averager = averager_of(models(4), ["equal", "exponential:alpha=2"], [10, 20, 30, 40])
    averager.save_average(tmp_path / "a.safetensors", 1)
    with wavg.open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert checkpoint.metadata["format"] == "pt"
        record = json.loads(checkpoint.metadata["wavg"])
    assert record == {
        "v": 1,
        "wavg": wavg.__version__,
        "weights": "exponential:alpha=2",
        "step": 40,
        "count": 4,
    }
    expected = dict(wavg.tree.leaves(averager.result()[1]))
    assert_same_tree(wavg.load(tmp_path / "a.safetensors"), expected)
    with pytest.raises(OutputExistsError):
        averager.save_average(tmp_path / "a.safetensors", 0)
    averager_of(models(4)[:1] * 4, window=3).save_average(
        tmp_path / "a.safetensors", overwrite=True
    )
    with wavg.open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert json.loads(checkpoint.metadata["wavg"])["count"] == 3
    averager_of([{"w": np.ones(2)}]).save_average(tmp_path / "a.npz")
    assert wavg.load(tmp_path / "a.npz")["w"].tolist() == [1, 1]


@pytest.mark.parametrize("ending", ["safetensors", "SAFETENSORS"])
def test_a_saved_average_of_a_window_says_so(ending, tmp_path):
    path = tmp_path / f"a.{ending}"
    averager_of(models(3), window=np.int64(2)).save_average(path)
    with wavg.open_checkpoint(path) as checkpoint:
        record = wavg.Record.read(checkpoint.metadata)
    assert (record.count, record.options) == (2, {"window": 2})


@pytest.mark.parametrize("which", [None, 2, -3])
def test_which_of_several_averages_has_to_be_told(which, keep, tmp_path):
    averager = averager_of(models(2), ["equal", "linear"], window=2, **keep)
    with pytest.raises(WeightError, match="2 averages, equal, linear: which=0 is the first"):
        averager.save_average(tmp_path / "a.safetensors", which)
    averager.save_average(tmp_path / "a.safetensors", -1)
    right = wavg.average(models(2), "linear")
    assert_same_tree(wavg.load(tmp_path / "a.safetensors")["double"], right["double"])


def test_one_average_alone_is_computed_to_be_saved(tmp_path):
    zero = wavg.Schedule("zero", lambda steps: 0 * steps, lambda *_: (1.0, 0.0))
    averager = averager_of(models(2), [zero, "linear"])
    averager.save_average(tmp_path / "a.safetensors", 1)
    with pytest.raises(WeightError, match="sum to zero"):
        averager.save_average(tmp_path / "b.safetensors", 0)


def test_a_window_of_numpys_integers_is_saved(tmp_path):
    averager_of(models(2), window=np.int64(2)).save(tmp_path / "a.safetensors")
    assert wavg.StreamingAverager.load(tmp_path / "a.safetensors").count == 2


# Killed and resumed


def run(folder, kill=(), weights="linear;exponential:alpha=3", updates=6):
    folder.mkdir(exist_ok=True)
    script = Path(averager_run.__file__)
    command = [sys.executable, str(script), str(folder), weights, str(updates), *kill]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == (-9 if kill else 0), done.stderr
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_run_that_is_killed_and_resumed_gives_the_same_bytes(tmp_path):
    uninterrupted = run(tmp_path / "whole")
    for kill in ("2:write", "3", "5:commit", "6:after"):  # in a save, and between update and save
        run(tmp_path / "killed", [kill])
    assert run(tmp_path / "killed") == uninterrupted
    assert len(uninterrupted) == 3
    assert not [name for name in os.listdir(tmp_path / "killed") if "tmp" in name]
    right = wavg.average([averager_run.model(step) for step in range(1, 7)], "linear")
    average = wavg.load(tmp_path / "killed" / "average0.safetensors")
    assert_same_tree(average, dict(wavg.tree.leaves(right)))


@pytest.mark.slow
def test_a_window_in_a_folder_that_is_killed_and_resumed_gives_the_same_bytes(tmp_path):
    weights = "window:linear;0.5,0.25,0.25"
    uninterrupted = run(tmp_path / "whole", weights=weights)
    for kill in ("1:write", "2:after", "3", "5:after", "6:commit"):
        run(tmp_path / "killed", [kill], weights)
    assert run(tmp_path / "killed", weights=weights) == uninterrupted
    assert len(uninterrupted) == 2
    assert sorted(os.listdir(tmp_path / "killed" / "window")) == [
        f"model_{step}.safetensors" for step in (4, 5, 6)
    ]
