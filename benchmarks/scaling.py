"""What an average costs as the model, the number of checkpoints, and that of outputs grow.

    python benchmarks/scaling.py FOLDER [--repeats 5] [--only tensors]

FOLDER takes about 8 GB. Each point is timed beside its own copy limit: the same reads once, as many
writes as there are outputs, no arithmetic. Also: a model of 20,000 small tensors against the same
bytes in 10, and what opening a file costs a tensor. Writes results/scaling.json.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from common import (
    copy_limit,
    figures_of,
    llama_shapes,
    make_run,
    median,
    read_all,
    record,
    side_by_side,
    spread,
    time_once,
)

import wavg

WEIGHTS = [f"exponential:alpha={alpha}" for alpha in (1, 2, 3, 4, 5, 6, 7, 8)] + ["equal", "linear"]


def point(folder: Path, paths: list[Path], outputs: int, repeats: int) -> dict:
    """Time one average, or several in one pass, beside the copy limit."""
    copies = [folder / f"copy_{index}.bin" for index in range(outputs)]
    weights = WEIGHTS[-outputs:]
    names = [text.replace(":", "-") for text in weights]
    averages = [folder / f"average-{name}.safetensors" for name in names]
    times = side_by_side(
        {
            "copy limit": lambda: copy_limit(paths, copies),
            "wavg": lambda: wavg.average_checkpoints(
                paths, folder / "average-{weights}.safetensors", weights=weights
            ),
        },
        repeats,
        [*copies, *averages],
    )
    for path in [*copies, *averages]:
        path.unlink(missing_ok=True)
    return {"seconds": times, "ratio": median(times["wavg"]) / median(times["copy limit"])}


def model_sizes(folder: Path, repeats: int) -> list[dict]:
    rows = []
    for width, layers in ((256, 2), (512, 4), (1024, 4), (1024, 8), (1024, 16), (2048, 8)):
        shapes = llama_shapes(width, layers, hidden=width * 11 // 4)
        paths = make_run(folder / f"size_{width}_{layers}", "bfloat16", shapes)
        read_all(paths)
        size = paths[0].stat().st_size
        rows.append({"bytes": size, **point(folder, paths, 1, repeats)})
        print(f"10 models of {size / 1e6:.0f} MB: {told(rows[-1])}")
        shutil.rmtree(paths[0].parent)
    return rows


def numbers_of_checkpoints(folder: Path, repeats: int) -> list[dict]:
    rows = []
    shapes = llama_shapes(512, 4, hidden=1408)
    paths = make_run(folder / "count", "bfloat16", shapes, 100)
    read_all(paths)
    for count in (2, 5, 10, 20, 50, 100):
        rows.append({"checkpoints": count, **point(folder, paths[:count], 1, repeats)})
        print(f"{count} models of {paths[0].stat().st_size / 1e6:.0f} MB: {told(rows[-1])}")
    shutil.rmtree(folder / "count")
    return rows


def numbers_of_outputs(folder: Path, repeats: int) -> list[dict]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        paths = make_run(folder / dtype, dtype, llama_shapes())
        read_all(paths)
        for outputs in (1, 2, 5, 10):
            rows.append(
                {"dtype": dtype, "outputs": outputs, **point(folder, paths, outputs, repeats)}
            )
            print(f"{outputs} averages of 10 {dtype} models: {told(rows[-1])}")
    return rows


def small_tensors(folder: Path, repeats: int) -> dict:
    total, count = 20_000_000, 10
    shapes = {
        "many": {f"block.{index // 10}.w{index % 10}": (1_000,) for index in range(total // 1000)},
        "few": {f"block.{index}": (total // 10,) for index in range(10)},
    }
    runs = {
        name: make_run(folder / f"tensors_{name}", "float32", shape, count)
        for name, shape in shapes.items()
    }
    output = folder / "average.safetensors"
    times = side_by_side(
        {
            name: lambda paths=paths: wavg.average_checkpoints(paths, output)
            for name, paths in runs.items()
        },
        repeats,
        [output],
    )
    ratio = median(times["many"]) / median(times["few"])
    print(f"20,000 tensors: {spread(times['many'])}, 10: {spread(times['few'])}; {ratio:.2f} times")

    def open_time(paths: list[Path]) -> float:
        """Seconds to open and index these, a tensor; each header is parsed."""

        def go() -> None:
            for path in paths:
                with wavg.open_checkpoint(path):
                    pass

        tensors = len(shapes["many"]) * len(paths)
        return median([time_once(go) for _ in range(repeats)]) / tensors

    figures = {"seconds": times, "ratio": ratio, "index_seconds_per_tensor": {}}
    for suffix in (".safetensors", ".npz", ".h5"):
        names = dict(list(shapes["many"].items())[: 20_000 if suffix == ".safetensors" else 2_000])
        paths = make_run(folder / f"index{suffix}", "float32", names, 2, suffix)
        each = open_time(paths) * len(shapes["many"]) / len(names)
        figures["index_seconds_per_tensor"][suffix] = each
        print(f"indexing {suffix}: {each * 1e6:.1f} µs a tensor")
        shutil.rmtree(folder / f"index{suffix}")
    for name in runs:
        shutil.rmtree(folder / f"tensors_{name}")
    return figures


def told(row: dict) -> str:
    times = ", ".join(f"{name} {spread(values)}" for name, values in row["seconds"].items())
    return f"{times}; {row['ratio']:.2f} times the copy limit"


PARTS = {
    "tensors": small_tensors,
    "model_sizes": model_sizes,
    "checkpoints": numbers_of_checkpoints,
    "outputs": numbers_of_outputs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", action="append", choices=PARTS, help="keep the other figures")
    options = parser.parse_args()
    folder, repeats = options.folder, options.repeats
    folder.mkdir(parents=True, exist_ok=True)
    figures = figures_of("scaling") if options.only else {}
    for part in options.only or PARTS:
        most = 3 if part == "outputs" else repeats
        figures[part] = PARTS[part](folder, min(most, repeats))
    record("scaling", "warm", figures)


if __name__ == "__main__":
    main()
