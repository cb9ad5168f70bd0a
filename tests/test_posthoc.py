"""Post-hoc EMA: against averages that were tracked, against the profiles, from arrays and files."""

from __future__ import annotations

import re
import warnings
from fractions import Fraction

import numpy as np
import pytest

import wavg
from wavg import cli, cli_weights
from wavg.errors import WeightError
from wavg.moving import gamma_of
from wavg.weights import AMPLIFIES

TRACKED = (0.05, 0.10)
EVERY, COUNT = 50, 20


@pytest.fixture(scope="module")
def run():
    """A random walk with a drift; the averages of some widths at every 50th step."""
    rng = np.random.default_rng(0)
    widths = (0.05, 0.07, 0.10, 0.15)
    model, found = np.zeros(30), {}
    averages = {width: np.zeros(30) for width in widths}
    updates = {width: wavg.power_ema(sigma_rel=width).update for width in widths}
    for step in range(1, EVERY * COUNT + 1):
        model = model + 0.01 * rng.standard_normal(30) + 0.002
        for width, update in updates.items():
            keep, add = update(step, step, step - 1)
            averages[width] = keep * averages[width] + add * model
        if step % EVERY == 0:
            found |= {(step, width): average for width, average in averages.items()}
    return found


def inputs(found, tracked=TRACKED):
    places = [(step, width) for step, width in sorted(found) if width in tracked]
    return places, [[found[place]] for place in places]


@pytest.mark.parametrize("width", [0.05, 0.07, 0.10, 0.15])
@pytest.mark.parametrize("step", [500, 1000])
def test_it_is_the_average_that_was_really_tracked(run, width, step):
    places, trees = inputs(run)
    schedule = wavg.post_hoc_ema(sigma_rel=width, step=step, tracked=[width for _, width in places])
    made = wavg.average(trees, schedule, steps=[step for step, _ in places])[0]
    right = run[step, width]
    assert np.linalg.norm(made - right) < 2e-3 * np.linalg.norm(right)


def test_a_wrong_width_is_seen_by_that_comparison(run):
    places, trees = inputs(run)
    schedule = wavg.post_hoc_ema(sigma_rel=0.08, tracked=[width for _, width in places])
    made = wavg.average(trees, schedule, steps=[step for step, _ in places])[0]
    right = run[1000, 0.07]
    assert np.linalg.norm(made - right) > 2e-3 * np.linalg.norm(right)


def test_a_tracked_width_is_taken_as_it_is():
    steps = np.repeat(np.arange(1, 21) * 100, 2)
    for width in TRACKED:
        weights = wavg.post_hoc_ema(sigma_rel=width, tracked=TRACKED)(steps)
        expected = np.zeros(40)
        expected[-2 + TRACKED.index(width)] = 1
        np.testing.assert_allclose(weights, expected, atol=1e-10)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.2])
def test_weights_are_the_least_squares_solution_in_exact_arithmetic(width):
    """Cramer by elimination in fractions: powers are whole numbers here, so all of it is exact."""
    gammas, wanted = [17, 7], {0.03: 31, 0.07: 11, 0.2: 2}[width]
    times = [Fraction(step, 5) for step in range(1, 6) for _ in gammas]
    powers = [Fraction(gamma) for _ in range(5) for gamma in gammas]

    def product(t, g, u, h):
        power = h if t < u else -g
        return (g + 1) * (h + 1) * (t / u) ** int(power) / ((g + h + 1) * max(t, u))

    rows = [
        [product(t, g, u, h) for u, h in zip(times, powers, strict=True)]
        + [product(t, g, Fraction(1), Fraction(wanted))]
        for t, g in zip(times, powers, strict=True)
    ]
    for i in range(len(rows)):
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(len(rows)):
            if j != i:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    exact = [row[-1] for row in rows]
    exact = np.array([float(value / sum(exact)) for value in exact])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = wavg.post_hoc_ema(gamma=wanted, tracked=gammas)([*map(float, times)])
    np.testing.assert_allclose(found, exact, atol=1e-12 * abs(exact).max())


def test_weights_do_not_depend_on_the_unit_of_steps():
    steps = np.repeat(np.arange(1, 33), 2)
    schedule = wavg.post_hoc_ema(sigma_rel=0.07, tracked=TRACKED)
    np.testing.assert_allclose(schedule(steps), schedule(steps * 1e6), atol=1e-9)


def test_only_inputs_up_to_the_step_wanted_count():
    steps = np.repeat(np.arange(1, 11) * 100, 2)
    with pytest.warns(UserWarning, match=r"share of only 0\.\d+ .*up to step 550 ends at 500, and"):
        early = wavg.post_hoc_ema(sigma_rel=0.07, step=550, tracked=TRACKED)(steps)
    assert (early[steps > 550] == 0).all()
    assert early.sum() == pytest.approx(1)
    whole = wavg.post_hoc_ema(sigma_rel=0.07, step=500, tracked=TRACKED)(steps)
    short = wavg.post_hoc_ema(sigma_rel=0.07, tracked=TRACKED)(steps[steps <= 500])
    np.testing.assert_array_equal(whole[steps <= 500], short)


def test_snapshots_given_twice_have_a_solution_all_the_same():
    once = np.repeat(np.arange(1, 11) * 100.0, 2)
    twice = np.repeat(once, 2)
    widths = [0.05, 0.05, 0.10, 0.10] * 10
    ours = wavg.post_hoc_ema(sigma_rel=0.07, tracked=widths)(twice)
    right = wavg.post_hoc_ema(sigma_rel=0.07, tracked=TRACKED)(once)
    np.testing.assert_allclose(ours.reshape(-1, 2).sum(1), right, atol=1e-9)


# The amplification


def test_the_published_amplification():
    steps = np.repeat(np.arange(1, 129), 2)
    schedule = wavg.post_hoc_ema(sigma_rel=0.02, tracked=TRACKED)
    with pytest.warns(UserWarning, match=r"^post_hoc_ema:sigma_rel=0\.02.*amplification, 43\.1;"):
        weights = schedule(steps)
    assert wavg.figures(weights, steps).amplification == pytest.approx(43, abs=0.5)


def test_there_is_no_warning_between_the_tracked_widths():
    steps = np.repeat(np.arange(1, 129), 2)
    weights = wavg.post_hoc_ema(sigma_rel=0.07, tracked=TRACKED)(steps)  # warnings are errors here
    assert wavg.figures(weights, steps).amplification < 2 < AMPLIFIES


# What is refused


@pytest.mark.parametrize(
    ("tracked", "steps", "message"),
    [
        (None, [1, 1, 2, 2], "needs the widths of the averages that were tracked: tracked=..."),
        ([0.05, 0.1], [1, 1, 2], "2 widths were given for 3 inputs"),
        ([0.05, 0.1], [1, 2, 3, 4], "as many as there are inputs at every step"),
        ([0.05, 0.1], [0, 0, 3, 3], "needs steps above 0, not 0"),
    ],
)
def test_what_does_not_fit_is_refused(tracked, steps, message):
    with pytest.raises(WeightError, match=re.escape(message)):
        wavg.post_hoc_ema(sigma_rel=0.07, tracked=tracked)(steps)


@pytest.mark.parametrize("tracked", [[], "0.05", [0.4], [None]])
def test_widths_without_sense_are_refused(tracked):
    with pytest.raises(WeightError, match="post_hoc_ema: tracked"):
        wavg.post_hoc_ema(sigma_rel=0.07, tracked=tracked)


def test_a_step_before_the_first_input_is_refused():
    with pytest.raises(
        WeightError, match="no input ends at step 50 or before; the first ends at 100"
    ):
        wavg.post_hoc_ema(sigma_rel=0.07, step=50, tracked=[0.05])([100, 200])


@pytest.mark.parametrize("step", [1001, 5000])
def test_a_step_beyond_the_newest_input_is_refused(step):
    schedule = wavg.post_hoc_ema(sigma_rel=0.07, step=step, tracked=TRACKED)
    with pytest.raises(WeightError, match=f"knows of step {step}; the newest ends at 1000, so"):
        schedule(np.repeat([500, 1000], 2))


def test_a_step_of_which_the_inputs_know_nothing_is_refused():
    schedule = wavg.post_hoc_ema(gamma=1e6, step=900, tracked=[7])
    with pytest.raises(WeightError, match="the inputs know nothing of that average"):
        schedule([100, 1000])


@pytest.mark.parametrize("width", [0.03, 0.07, 0.2, 0.25])
def test_inputs_at_the_step_wanted_know_the_whole_average(width):
    steps = np.repeat(np.arange(1, 65), 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*amplification")  # the other one would be an error
        wavg.post_hoc_ema(sigma_rel=width, step=32, tracked=TRACKED)(steps)


# Files


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """A glob of snapshots of two widths whose names tell both."""
    folder = tmp_path_factory.mktemp("tracked")
    for step, width in inputs(run)[0]:
        path = folder / f"ema-sigma_rel={width}-step={step}.safetensors"
        wavg.save(path, {"w": run[step, width]})
    return str(folder / "ema-*.safetensors")


def test_widths_and_steps_come_from_names_and_several_widths_in_one_pass(run, files, tmp_path):
    reports = wavg.average_checkpoints(
        files,
        tmp_path / "out-{weights}.safetensors",
        weights=[wavg.post_hoc_ema(sigma_rel=width) for width in (0.07, 0.15)],
    )
    for report, width in zip(reports, (0.07, 0.15), strict=True):
        made, right = wavg.load(report.output)["w"], run[1000, width]
        assert report.output.endswith(f"/out-post_hoc_ema-sigma_rel={width}.safetensors")
        assert np.linalg.norm(made - right) < 2e-3 * np.linalg.norm(right)
        assert [part.step for part in report.plan.inputs] == [
            step for step in range(50, 1001, 50) for _ in TRACKED
        ]


def test_widths_come_from_metadata_as_a_streaming_averager_writes_it(run, tmp_path):
    for step, width in inputs(run)[0]:
        told = wavg.Record(f"power_ema:gamma={gamma_of(width)}", float(step), (), step).text()
        path = tmp_path / f"{'ab'[width > 0.07]}-{step}.safetensors"
        wavg.save(path, {"w": run[step, width]}, metadata={"wavg": told})
    made = wavg.average_checkpoints(tmp_path, weights="post_hoc_ema:sigma_rel=0.07")["w"]
    right = run[1000, 0.07]
    assert np.linalg.norm(made - right) < 2e-3 * np.linalg.norm(right)


def test_widths_are_given_on_the_command_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for step, width in inputs(run)[0]:
        wavg.save(f"{'ab'[width > 0.07]}-{step}.safetensors", {"w": run[step, width]})
    spec = "post_hoc_ema:sigma_rel=0.07,tracked=0.05/0.1"
    names = [path.name for path in tmp_path.iterdir()]
    assert cli.main(["average", *names, "-o", "out.safetensors", "--weights", spec]) == 0
    out = capsys.readouterr().out
    assert f"weights {spec}: effective number" in out
    assert "note" not in out
    right = run[1000, 0.07]
    assert np.linalg.norm(wavg.load("out.safetensors")["w"] - right) < 2e-3 * np.linalg.norm(right)


@pytest.mark.parametrize("name", ["ema-{width}-{step}.npz", "{width}/ema_{step}.npz"])
@pytest.mark.parametrize("tracked", [[0.05, 0.1], np.array([0.1, 0.05])])
def test_tracked_widths_are_found_in_names_whatever_their_order(run, tmp_path, name, tracked):
    """Naturally sorted, 0.1 comes before 0.05."""
    for step, width in inputs(run)[0][-12:]:
        path = tmp_path / name.format(width=width, step=step)
        path.parent.mkdir(exist_ok=True)
        wavg.save(path, {"w": run[step, width]})
    schedule = wavg.post_hoc_ema(sigma_rel=0.07, tracked=tracked)
    made = wavg.average_checkpoints(tmp_path / name.format(width="*", step="*"), weights=schedule)
    right = run[1000, 0.07]
    assert np.linalg.norm(made["w"] - right) < 2e-3 * np.linalg.norm(right)


def test_names_of_which_some_have_a_width_are_refused(tmp_path):
    for name in ("ema-0.05-100.npz", "other-100.npz"):
        wavg.save(tmp_path / name, {"w": np.zeros(1)})
    schedule = wavg.post_hoc_ema(sigma_rel=0.07, tracked=[0.05, 0.1])
    with pytest.raises(
        WeightError, match=r"other-100\.npz: its name has none of the tracked widths"
    ):
        wavg.average_checkpoints(tmp_path, weights=schedule)


def test_a_large_amplification_is_noted_on_the_command_line(files, tmp_path, capsys):
    spec, output = "post_hoc_ema:sigma_rel=0.015", str(tmp_path / "out.npz")
    assert cli.main(["average", files, "-o", output, "--weights", spec]) == 0
    out, err = capsys.readouterr()
    assert re.search(
        r"note: rounding and noise in the inputs come out \d+(\.\d+)? times as large", out
    )
    assert not err
    assert cli.main(["weights", spec, files]) == 0
    out, err = capsys.readouterr()
    assert "times as large" in out
    assert not err


@pytest.mark.parametrize(
    "weights", ["ema:decay=0.9,warmup=power,gamma=1,power=0.7", "bema:gamma=3"]
)
@pytest.mark.parametrize("name", ["{}.safetensors", "ppo-gamma=0.99/{}.safetensors"])
def test_another_gamma_is_no_width(tmp_path, weights, name):
    for step in (100, 200):
        path = tmp_path / name.format(step)
        path.parent.mkdir(exist_ok=True)
        told = wavg.Record(weights, float(step), (), step).text()
        wavg.save(path, {"w": np.zeros(1)}, metadata={"wavg": told})
    with pytest.raises(WeightError, match="which width was it tracked with"):
        wavg.average_checkpoints(path.parent, weights="post_hoc_ema:sigma_rel=0.07")


def test_a_power_ema_over_a_window_is_none_over_all_steps(tmp_path):
    for step in (100, 200):
        told = wavg.Record("power_ema:sigma_rel=0.1", float(step), (), step, {"window": 3}).text()
        path = tmp_path / f"sigma_rel=0.1-step={step}.safetensors"
        wavg.save(path, {"w": np.zeros(1)}, metadata={"wavg": told})
    message = r"made by power_ema:sigma_rel=0\.1 \(window=3\), which is no power EMA over all steps"
    with pytest.raises(WeightError, match=message):
        wavg.average_checkpoints(tmp_path, weights="post_hoc_ema:sigma_rel=0.07")


def test_post_hoc_averages_may_be_combined_again(run, files, tmp_path):
    for width in TRACKED:
        for step in (500, 950, 1000):
            spec = wavg.post_hoc_ema(sigma_rel=width, step=step)
            path = tmp_path / f"{width}-{step}.safetensors"
            wavg.average_checkpoints(files, path, weights=spec)
            with wavg.open_checkpoint(path) as checkpoint:
                assert wavg.Record.read(checkpoint.index.metadata).step == step
    made = wavg.average_checkpoints(tmp_path, weights="post_hoc_ema:sigma_rel=0.1,step=500")["w"]
    np.testing.assert_allclose(made, run[500, 0.1], atol=1e-6)


def test_a_number_in_the_folder_of_a_run_is_no_width(run, tmp_path):
    """The order counts there, as without any such name."""
    folder = tmp_path / "run-0.1"
    folder.mkdir()
    for step, width in inputs(run)[0]:
        wavg.save(folder / f"{'ab'[width > 0.07]}-{step}.npz", {"w": run[step, width]})
    schedule = wavg.post_hoc_ema(sigma_rel=0.07, tracked=TRACKED)
    right = run[1000, 0.07]
    made = wavg.average_checkpoints(folder, weights=schedule)["w"]
    assert np.linalg.norm(made - right) < 2e-3 * np.linalg.norm(right)


def test_a_tracked_width_that_no_name_has_is_told(tmp_path):
    for name in ("lr0.1-a-100.npz", "lr0.1-b-100.npz"):
        wavg.save(tmp_path / name, {"w": np.zeros(1)})
    schedule = wavg.post_hoc_ema(sigma_rel=0.07, tracked=TRACKED)
    with pytest.raises(WeightError, match=r"have the width 0\.1, and none has 0\.05"):
        wavg.average_checkpoints(tmp_path, weights=schedule)


def test_what_the_inputs_do_not_know_is_noted_on_the_command_line(files, tmp_path, capsys):
    spec = "post_hoc_ema:sigma_rel=0.05,step=149"
    for command in (["average", files, "-o", str(tmp_path / "a.npz"), "--weights", spec],
                    ["weights", spec, files]):  # fmt: skip
        assert cli.main(command) == 0
        out, err = capsys.readouterr()
        assert out.count(f"note: {spec}: the inputs know a share of only 0.") == 1
        assert not err


def test_other_warnings_pass_the_gathering_of_notes():
    with pytest.warns(UserWarning, match="of another kind"), cli_weights.gathered() as notes:
        warnings.warn("of another kind", stacklevel=1)
    assert not notes


def test_a_width_that_nothing_tells_is_asked_for(tmp_path):
    wavg.save(tmp_path / "m-1.npz", {"w": np.zeros(1)})
    message = (
        r"m-1\.npz: which width was it tracked with\? .*: post_hoc_ema:sigma_rel=0\.07,tracked="
    )
    with pytest.raises(WeightError, match=message):
        wavg.average_checkpoints(tmp_path, weights="post_hoc_ema:sigma_rel=0.07")


def test_other_schedules_refuse_the_shared_steps(files):
    with pytest.raises(WeightError, match="steps must increase"):
        wavg.average_checkpoints(files, weights=["equal", "post_hoc_ema:sigma_rel=0.07"])


def test_steps_that_nothing_tells_are_asked_for(tmp_path):
    for name in ("a", "b"):
        wavg.save(tmp_path / f"{name}.npz", {"w": np.zeros(1)})
    with pytest.raises(
        WeightError, match=r"neither names nor metadata tell the inputs' steps; pass"
    ):
        wavg.average_checkpoints(tmp_path, weights="post_hoc_ema:sigma_rel=0.07,tracked=0.05")


def test_records_tell_the_steps_before_any_number_in_a_name(tmp_path):
    for name, width in (("final_ema1", 0.05), ("final_ema2", 0.1)):
        told = wavg.Record(f"power_ema:sigma_rel={width}", 400.0, (), 400).text()
        path = tmp_path / f"{name}.safetensors"
        wavg.save(path, {"w": np.zeros(1)}, metadata={"wavg": told})
    plan = wavg.plan_average(tmp_path, weights="post_hoc_ema:sigma_rel=0.07")
    assert [part.step for part in plan.inputs] == [400, 400]


def test_given_steps_put_the_inputs_in_their_order(run, tmp_path):
    places, trees = inputs(run)
    paths = [tmp_path / f"{'xyz'[number % 3]}.{number}.npz" for number in range(len(places))]
    for path, tree in zip(paths, trees, strict=True):
        wavg.save(path, {"w": tree[0]})
    steps = np.random.default_rng(1).permutation(len(places) // 2)
    order = [place for step in steps for place in (2 * step, 2 * step + 1)]
    made = wavg.average_checkpoints(
        [paths[place] for place in order],
        weights=wavg.post_hoc_ema(sigma_rel=0.07, step=400, tracked=TRACKED),
        steps=[places[place][0] for place in order],
        sort=False,
    )
    right = run[400, 0.07]
    assert np.linalg.norm(made["w"] - right) < 2e-3 * np.linalg.norm(right)
