"""Tables and picture of the experiment on digits, for report.py: from the recorded scores alone.

The first seeds choose, by their loss on images kept for that; the others are reported, each figure
a mean over them, and each difference paired by seed with its standard error.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from tabular import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "digits.json"
PLOT = ROOT / "docs" / "digits.svg"
Arm = tuple[str, float]  # what is done, at which learning rate

SHAPES = {"linear": "equal", "cosine": "wsm:shape=cosine", "1-sqrt": "wsm:shape=1-sqrt"}
WINDOWS = (10, 20, 50, 100)
PLAIN = "average equal, 20 %"
LAST, FALLS = "constant rate, last model", "rate falls, last model"
AVERAGE, BOTH = "constant rate, average", "rate falls, average"
FAMILIES: dict[str, Callable[[str], bool]] = {
    LAST: lambda name: name == "constant",
    FALLS: lambda name: name.startswith("decay") and "then" not in name,
    AVERAGE: lambda name: name.startswith("average"),
    BOTH: lambda name: "then" in name,
}
COMPARED = ("constant", "decay linear, 20 %", "decay linear, 100 %", PLAIN, "average equal, 50 %")
COLORS = {
    "constant": "0.7",
    "decay linear, 20 %": "C0",
    "decay linear, 50 %": "C1",
    "decay linear, 100 %": "C2",
    PLAIN: "C3",
    "average of the last fifth so far": "C3",  # which is PLAIN at the end
    "average equal, 50 %": "C4",
}


class Scores:
    """The scores of every arm, seed by seed."""

    def __init__(self, path: Path = RESULTS) -> None:
        content = json.loads(path.read_text("utf-8"))
        self.machine, self.figures = content["machine"], content["figures"]
        self.rates: list[float] = self.figures["rates"]
        self.along: dict[str, list[list[float]]] = self.figures["along"]

    def of(self, arm: Arm, part: str = "test", choosing: bool = False) -> list[float]:
        """Return an arm's scores of the seeds that are reported, or of those that choose."""
        name, rate = arm
        scores = self.figures["scores"][name][part][self.rates.index(rate)]
        first = self.figures["choosing_seeds"]
        return scores[:first] if choosing else scores[first:]

    def mean(self, arm: Arm, part: str = "test") -> float:
        return statistics.mean(self.of(arm, part))

    def difference(self, arm: Arm, other: Arm, part: str = "test") -> tuple[float, float]:
        """Return the mean over seeds of arm less other, and its standard error."""
        each = [a - b for a, b in zip(self.of(arm, part), self.of(other, part), strict=True)]
        error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        return statistics.mean(each), error

    def arms(self, title: str) -> list[Arm]:
        """Return the arms of a family, at every rate."""
        names = filter(FAMILIES[title], self.figures["scores"])
        return [(name, rate) for name in names for rate in self.rates]

    def chosen(self, title: str) -> Arm:
        """Return the one that the choosing seeds choose: rate and setting together."""
        return min(
            self.arms(title), key=lambda arm: statistics.mean(self.of(arm, "choose", choosing=True))
        )

    def in_hindsight(self, title: str) -> Arm:
        """Return the one with the least test loss of the seeds that are reported."""
        return min(self.arms(title), key=self.mean)


def shown(name: str) -> str:
    """Say what an arm does, without what its row says already."""
    return name.removeprefix("average ").removeprefix("decay ").replace("constant", "–")


def signed(difference: tuple[float, float], scale: float = 1, digits: int = 4) -> str:
    return f"{difference[0] * scale:+.{digits}f} ± {difference[1] * scale:.{digits}f}"


def digits_chosen() -> str:
    scores = Scores()
    constant = scores.chosen(LAST)
    arms = {title: scores.chosen(title) for title in FAMILIES}
    arms["constant rate, average, nothing chosen for it"] = (PLAIN, constant[1])

    def rows() -> Iterator[str]:
        for title, arm in arms.items():
            less = "–" if arm == constant else signed(scores.difference(arm, constant))
            yield (
                f"{title} | {shown(arm[0])} | {arm[1]:g} | {scores.mean(arm):.4f} | {less} | "
                f"{scores.mean(arm, 'accuracy'):.2%} | {scores.mean(arm, 'train'):.4f}"
            )

    return table(
        "| chosen | rate | test loss | less the first row's | test accuracy | training loss", rows()
    )


def digits_against() -> str:
    scores = Scores()
    average, fallen, both = map(scores.chosen, (AVERAGE, FALLS, BOTH))
    best = scores.in_hindsight(FALLS)
    pairs = {
        "average, less the falling rate": (average, fallen),
        f"the same, less the best falling rate in hindsight ({shown(best[0])}, {best[1]:g})": (
            average,
            best,
        ),
        "falling rate and average, less the falling rate alone": (both, fallen),
    }

    def rows() -> Iterator[str]:
        for title, pair in pairs.items():
            yield (
                f"{title} | {signed(scores.difference(*pair))} | "
                f"{signed(scores.difference(*pair, 'choose'))} | "
                f"{signed(scores.difference(*pair, 'accuracy'), 100, 2)} points | "
                f"{signed(scores.difference(*pair, 'train'))}"
            )

    return table("| test loss | loss on the 400 | test accuracy | training loss", rows())


def digits_shapes() -> str:
    scores = Scores()
    rate = scores.chosen(FALLS)[1]

    def rows() -> Iterator[str]:
        for shape, merged in SHAPES.items():
            for window in WINDOWS:
                decay = (f"decay {shape}, {window} %", rate)
                average = (f"average {merged}, {window} %", rate)
                yield (
                    f"{shape} | {window} % | {scores.mean(decay):.4f} | {scores.mean(average):.4f}"
                    f" | {signed(scores.difference(average, decay))} | "
                    f"{signed(scores.difference(average, decay, 'train'))}"
                )

    return table(
        "shape | over the last | rate falls | merged | merged less fallen | of the training loss",
        rows(),
    )


def digits_rates() -> str:
    scores = Scores()
    return table(
        f"rate | {' | '.join(COMPARED)}",
        (
            f"{rate:g} | " + " | ".join(f"{scores.mean((name, rate)):.4f}" for name in COMPARED)
            for rate in scores.rates
        ),
    )


def digits_moving() -> str:
    scores = Scores()
    rate = scores.chosen(AVERAGE)[1]
    arms = [arm for arm in scores.arms(AVERAGE) if arm[1] == rate and "wsm" not in arm[0]]
    return table(
        "weights | test loss | less the last model's | training loss",
        (
            f"{shown(arm[0])} | {scores.mean(arm):.4f} | "
            f"{signed(scores.difference(arm, ('constant', rate)))} | "
            f"{scores.mean(arm, 'train'):.4f}"
            for arm in arms
        ),
    )


def digits_setting() -> str:
    scores = Scores()
    found, choosing = scores.figures, scores.figures["choosing_seeds"]
    reported = len(scores.of(("constant", scores.rates[0])))
    versions = ", ".join(
        f"{name} {scores.machine['versions'][name]}" for name in ("wavg", "jax", "scikit-learn")
    )
    rates = ", ".join(f"{rate:g}" for rate in scores.rates)
    return (
        f"{found['steps']:,} steps a run; learning rates {rates}; {choosing} seeds choose, "
        f"{reported} others are reported. {found['processor_seconds'] / 60:.0f} minutes of "
        f"processor time, by {found['workers']} processes on {scores.machine['cores']} cores; "
        f"{found['seconds'] / 60:.0f} minutes on a machine with other work (a load of "
        f"{found['load_before']:.1f} before it began). {versions}."
    )


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (
        digits_setting,
        digits_chosen,
        digits_against,
        digits_shapes,
        digits_rates,
        digits_moving,
    )
}


def draw(results: Path = RESULTS, output: Path = PLOT) -> None:
    """Draw loss along training, merged against fallen, and loss by the rate."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "wavg"
    scores = Scores(results)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14, 4.6), constrained_layout=True, width_ratios=(1, 1.15, 1)
    )
    rate = scores.chosen(FALLS)[1]
    for name, by_rate in scores.along.items():
        losses = by_rate[scores.rates.index(rate)]
        left.plot(range(101 - len(losses), 101), losses, label=name, color=COLORS[name])
    left.set(yscale="log", xlabel="percent of the steps", ylabel="test loss")
    left.set_title(f"along training, rate {rate:g}")

    pairs = {
        f"{shape}, {window} %": (f"average {merged}, {window} %", f"decay {shape}, {window} %")
        for shape, merged in SHAPES.items()
        for window in WINDOWS
    }
    for part, shift, label in (("test", -0.15, "test loss"), ("train", 0.15, "training loss")):
        differences = [scores.difference((a, rate), (b, rate), part) for a, b in pairs.values()]
        middle.errorbar(
            [mean for mean, _ in differences],
            [place + shift for place in range(len(pairs))],
            xerr=[2 * error for _, error in differences],
            fmt="o",
            markersize=4,
            label=label,
        )
    middle.axvline(0, color="0.4", linewidth=1)
    middle.set(
        yticks=range(len(pairs)), yticklabels=pairs, xlabel="difference, ± 2 standard errors"
    )
    middle.invert_yaxis()
    middle.set_title(f"merged less fallen, rate {rate:g}")

    for name in COMPARED:
        losses = [scores.mean((name, each)) for each in scores.rates]
        right.plot(scores.rates, losses, "o-", label=name, color=COLORS[name])
    right.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="test loss")
    right.set_title("by the learning rate, at the end")
    for axis in (left, right):
        low, high = axis.get_ylim()
        ticks = [tick for tick in (0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1) if low < tick < high]
        axis.set_yticks(ticks, map(str, ticks))
        axis.set_yticks([], minor=True)
    right.set_xticks(scores.rates, [f"{each:g}" for each in scores.rates])
    right.set_xticks([], minor=True)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)
