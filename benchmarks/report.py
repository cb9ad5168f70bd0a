"""Put the recorded figures into the pages of docs that have tables of them, and draw the plots.

    python benchmarks/report.py [--check]

Every table between ``<!-- table: NAME -->`` and ``<!-- end -->`` is made from benchmarks/results.
--check writes nothing and fails if the pages say anything else.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import digits_tables
import fault_tables
import founding_tables
import mutation_tables
from tabular import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = tuple(
    page
    for page in sorted((ROOT / "docs").glob("*.md"))
    if "<!-- table: " in page.read_text("utf-8")
)
PLOT = ROOT / "docs" / "performance.svg"
DTYPES = ("float32", "bfloat16", "float16")
AGAIN = ", measured again"


def figures(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())["figures"]


def seconds(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} s"


def machine() -> str:
    found = json.loads((RESULTS / "speed.json").read_text())["machine"]
    versions = ", ".join(f"{name} {text}" for name, text in found["versions"].items() if text)
    return (
        f"{found['cores']} cores ({found['cpu']}), {found['memory_bytes'] / 2**30:.0f} GiB, "
        f"{found['system']}, Python {found['python']}; {versions}."
    )


def warm() -> str:
    return table(
        "| copy limit | wavg | ratio of the medians",
        (
            f"{dtype} | {seconds(row['seconds']['copy limit'])} | {seconds(row['seconds']['wavg'])}"
            f" | {row['ratio']:.2f}"
            for dtype in DTYPES
            for row in [figures("speed")[dtype]["warm"]]
        ),
    )


def cold() -> str:
    return table(
        "| `cat` | wavg | speed of wavg over that of `cat`",
        (
            f"{dtype} | {seconds(row['seconds']['cat'])} | {seconds(row['seconds']['wavg'])}"
            f" | {row['share_of_cat']:.0%}"
            for dtype in DTYPES
            for row in [figures("speed")[dtype]["cold"]]
        ),
    )


def peers() -> str:
    def rows() -> Iterator[str]:
        for dtype in DTYPES:
            found = figures("peers")[dtype]
            ours = statistics.median(found["wavg"]["seconds"])
            for name, row in found.items():
                times = statistics.median(row["seconds"]) / ours
                yield (
                    f"{dtype} | {name} | {seconds(row['seconds'])} | {times:.1f} | "
                    f"{row['peak_bytes'] / 1e6:,.0f} MB | {row['wrong_share']:.1%}"
                )

    return table("| | time | times wavg's | peak memory | not correctly rounded", rows())


def outputs() -> str:
    return table(
        "| averages in one pass | copy limit | wavg | ratio",
        (
            f"{row['dtype']} | {row['outputs']} | {seconds(row['seconds']['copy limit'])} | "
            f"{seconds(row['seconds']['wavg'])} | {row['ratio']:.2f}"
            for row in figures("scaling")["outputs"]
        ),
    )


def tensors() -> str:
    found = figures("scaling")["tensors"]
    return table(
        "model of 80 MB, ten checkpoints | time",
        iter(
            [
                f"20,000 tensors of 1,000 numbers | {seconds(found['seconds']['many'])}",
                f"10 tensors of 2,000,000 | {seconds(found['seconds']['few'])}",
                f"ratio of the medians | {found['ratio']:.2f}",
            ]
        ),
    )


def index() -> str:
    found = figures("scaling")["tensors"]["index_seconds_per_tensor"]
    return table(
        "opening a file | a tensor",
        (f"`{suffix}` | {each * 1e6:.0f} µs" for suffix, each in found.items()),
    )


def breakdown() -> str:
    found = figures("breakdown")
    names = sorted({name for step in found["float32"].values() for name in step} - {"wall"})

    def rows() -> Iterator[str]:
        for dtype in DTYPES:
            for step in ("NumPy", "compiled"):
                row = found[dtype][step]
                parts = " | ".join(f"{row.get(name, 0):.2f}" for name in names)
                yield f"{dtype} | {step} | {row['wall']:.2f} | {parts}"

    return table(f"| first step | wall | {' | '.join(names)}", rows())


def keras() -> str:
    return table(
        "| copy limit | wavg | ratio of the medians | as a process | peak memory",
        (
            f"`{suffix}` | {seconds(row['seconds']['copy limit'])} | "
            f"{seconds(row['seconds']['wavg'])} | {row['ratio']:.2f} | "
            f"{seconds(row['process']['seconds'])} | {row['process']['peak_bytes'] / 1e6:,.0f} MB"
            for suffix, row in figures("keras").items()
        ),
    )


def keras_peers() -> str:
    found = figures("keras_peers")
    ours = statistics.median(found["wavg"]["seconds"])
    return table(
        "| time | times wavg's | peak memory | not correctly rounded",
        (
            f"{name} | {seconds(row['seconds'])} | "
            f"{statistics.median(row['seconds']) / ours:.1f} | "
            f"{row['peak_bytes'] / 1e6:,.0f} MB | {row['wrong_share']:.1%}"
            for name, row in found.items()
        ),
    )


def batchnorm() -> str:
    names = [f"{x}{y}" for x in ("newest checkpoint", "average of 5") for y in ("", AGAIN)]

    def rows() -> Iterator[str]:
        for found in figures("batchnorm"):
            scores = [found["scores"][name]["accuracy"] for name in names]
            shown = " | ".join(f"{statistics.mean(accuracies):.1%}" for accuracies in scores)
            yield f"{found['way']} | {24 * found['epochs']:,} | {shown}"

    return table(f"| steps | {' | '.join(names)}", rows())


def memory() -> str:
    def size(count: float) -> str:
        return f"{count / 1e9:g} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

    return table(
        "checkpoints | each | measured | projected",
        (
            f"{row['checkpoints']:,} | {size(round(row['bytes_each'], -6))} | "
            f"{row['measured'] / 2**20:.0f} MiB | {row['projected'] / 2**20:.0f} MiB"
            for row in figures("memory")
        ),
    )


def posthoc_run() -> str:
    found = figures("posthoc")
    first, second = found["tracked"]
    return (
        f"a random walk with a drift, {found['numbers']:,} numbers over {found['steps']:,} steps; "
        f"widths {first} and {second} tracked at every step in float64, {found['snapshots']} "
        "snapshots of each."
    )


def posthoc() -> str:
    def rows() -> Iterator[str]:
        for row in figures("posthoc")["rows"]:
            errors = " | ".join(
                f"{row['error'][dtype]:.1e} ({row['error_of_the_change'][dtype]:.1e})"
                for dtype in ("float32", "bfloat16")
            )
            where = "" if row["snapshot"] else ", between snapshots"
            yield (
                f"{row['sigma_rel']:.2f} | {row['step']:,}{where} | {row['amplification']:.2f} | "
                f"{errors}"
            )

    return table(
        "width wanted | at step | amplification | error, inputs in float32 | in bfloat16", rows()
    )


def streaming() -> str:
    def rows() -> Iterator[str]:
        for dtype, found in figures("streaming").items():
            bare = statistics.median(found["bare_sum_seconds"])
            for name, row in found["ways"].items():
                update = statistics.median(row["update_seconds"])
                yield (
                    f"{dtype} | {name} | {update / found['numbers'] * 1e9:.1f} ns | "
                    f"{update / bare:.1f} | "
                    f"{statistics.median(row['result_seconds']) / found['numbers'] * 1e9:.0f} ns | "
                    f"{row['state_bytes'] / found['numbers']:.1f} | "
                    f"{row['later_updates_allocate_bytes'] / 1e6:.2f} MB of "
                    f"{found['model_bytes'] / 1e6:.0f} MB"
                )

    return table(
        "| average | an update, a number | times a bare sum | the result, a number | "
        "state, bytes a number | later updates allocate, of a model of",
        rows(),
    )


def sweep() -> str:
    found = figures("sweep")
    size = found["model_bytes"]
    return table(
        "| models read | time | processor time | memory, in models",
        (
            f"{name} | {row['bytes_read'] / size:.0f} | {seconds(row['seconds'])} | "
            f"{seconds(row['processor'])} | {row['memory'] / size:.1f}"
            for name, row in found["cases"].items()
        ),
    )


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (
        machine,
        warm,
        cold,
        peers,
        keras,
        keras_peers,
        outputs,
        tensors,
        index,
        breakdown,
        batchnorm,
        streaming,
        memory,
        posthoc_run,
        posthoc,
        sweep,
    )
}
TABLES |= founding_tables.TABLES | digits_tables.TABLES
TABLES |= fault_tables.TABLES | mutation_tables.TABLES


def filled(text: str) -> str:
    def put(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", put, text, flags=re.DOTALL)


def draw() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "wavg"
    found = figures("scaling")
    bfloat = [row for row in found["outputs"] if row["dtype"] == "bfloat16"]
    panels = [
        ("size of a model in MB, ten of them", [r["bytes"] / 1e6 for r in found["model_sizes"]]),
        ("checkpoints of 37 MB", [r["checkpoints"] for r in found["checkpoints"]]),
        ("averages in one pass, ten models of 238 MB", [r["outputs"] for r in bfloat]),
    ]
    rows = [found["model_sizes"], found["checkpoints"], bfloat]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for axis, (label, places), points in zip(axes, panels, rows, strict=True):
        for name, style in (("copy limit", "o--"), ("wavg", "o-")):
            medians = [statistics.median(point["seconds"][name]) for point in points]
            axis.plot(places, medians, style, label=name)
        axis.set(xlabel=label, ylabel="seconds", ylim=(0, None), xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("bfloat16, page cache warm, fsync included")
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for page in PAGES:
        text = page.read_text()
        right = filled(text)
        if options.check and text != right:
            sys.exit(f"{page} does not say what benchmarks/results do; run benchmarks/report.py")
        if not options.check:
            page.write_text(right)
    if not options.check:
        from founding_pictures import draw as draw_founding

        draw()
        draw_founding(ROOT / "docs")
        digits_tables.draw()


if __name__ == "__main__":
    main()
