"""Ten checkpoints of a Llama-shaped model into one: against the copy limit, `cat`, and peers.

    python benchmarks/speed.py FOLDER [--dtype float32] [--repeats 9] [--peers]

FOLDER takes about 5 GB a float32 run and half of that for each other. Everything is timed in turns,
and writes new files: what an output of the turn before occupied is freed between the turns.

- The copy limit: the same reads and the same write without arithmetic, in pieces of 1 MB on two
  threads, fsync included; in one process with wavg, files in the page cache.
- `cat`, the files one after the other, and wavg, whose output is written besides: each with the
  files dropped from the page cache before.
- With --peers, whole processes, start-up included, files in the page cache: `wavg average`; the
  tutorial's way (load all, `np.average` over the stack); timm's script's method (a float64 sum, one
  checkpoint at a time, in torch); mergekit's linear merge. A peer that is not installed is skipped,
  and a line says so.

Writes results/speed.json and results/peers.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
from common import (
    copy_limit,
    drop_from_cache,
    llama_shapes,
    make_run,
    median,
    read_all,
    record,
    run_process,
    side_by_side,
    spread,
    time_once,
)

import wavg
from wavg.dtypes import lookup
from wavg.exact import integer_mean

DTYPES = ("float32", "bfloat16", "float16")

TUTORIAL = """
    import sys, numpy as np, ml_dtypes
    from safetensors.numpy import load_file, save_file
    models = [load_file(path) for path in sys.argv[2:]]
    average = {}
    for name, first in models[0].items():
        stack = np.stack([model[name] for model in models])
        average[name] = np.average(stack, axis=0).astype(first.dtype)
    save_file(average, sys.argv[1])
"""

TIMM = """
    import sys, torch
    from safetensors.torch import load_file, save_file
    total = {}
    for path in sys.argv[2:]:
        for name, tensor in load_file(path).items():
            wide = tensor.to(torch.float64)
            total[name] = total[name] + wide if name in total else wide
    dtypes = {name: tensor.dtype for name, tensor in load_file(sys.argv[2]).items()}
    count = len(sys.argv) - 2
    save_file({n: (t / count).to(dtypes[n]) for n, t in total.items()}, sys.argv[1])
"""


def wrong_share(paths: list[Path], output: Path) -> float:
    """Return the share of a sample of numbers that are not the correctly rounded mean."""
    name = "model.layers.3.mlp.up_proj.weight"
    rows = []
    for path in [*paths, output]:
        with wavg.open_checkpoint(path) as checkpoint:
            rows.append(np.asarray(checkpoint[name]).ravel()[:20_000])
    target = lookup(rows[0].dtype.name)
    columns = np.stack(rows[:-1]).astype(np.float64).T.tolist()
    right = np.array([integer_mean((1,) * len(paths), column, target) for column in columns])
    return float(np.mean(rows[-1] != right.astype(target.numpy)))


def warm(folder: Path, dtype: str, repeats: int) -> dict:
    paths = make_run(folder / dtype, dtype, llama_shapes())
    read_all(paths)
    output, copy = folder / "average.safetensors", folder / "copy.bin"
    times = side_by_side(
        {
            "copy limit": lambda: copy_limit(paths, [copy]),
            "wavg": lambda: wavg.average_checkpoints(paths, output),
        },
        repeats,
        [output, copy],
    )
    if wrong_share(paths, output):
        raise SystemExit("the output is wrong; no figure is reported")
    ratio = median(times["wavg"]) / median(times["copy limit"])
    print(f"{dtype}, warm: " + ", ".join(f"{k} {spread(v)}" for k, v in times.items()), end="")
    print(f"; {ratio:.2f} times the copy limit")
    return {"seconds": times, "ratio": ratio}


def cold(folder: Path, dtype: str, repeats: int) -> dict:
    paths = make_run(folder / dtype, dtype, llama_shapes())
    output = folder / "average.safetensors"
    methods = {
        "cat": lambda: subprocess.run(["cat", *paths], stdout=subprocess.DEVNULL, check=True),
        "wavg": lambda: wavg.average_checkpoints(paths, output),
    }
    times: dict[str, list] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            drop_from_cache(paths)
            output.unlink(missing_ok=True)
            times[name].append(time_once(method))
    share = median(times["cat"]) / median(times["wavg"])
    print(f"{dtype}, cold: " + ", ".join(f"{k} {spread(v)}" for k, v in times.items()), end="")
    print(f"; {share:.0%} of the speed of cat")
    return {"seconds": times, "share_of_cat": share}


def mergekit_command(paths: list[Path], folder: Path, dtype: str) -> list[str]:
    """Lay the run out as mergekit wants it: a folder with a configuration for each model."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "vocab_size": 16_000,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    models = []
    for path in paths:
        model = folder / "mergekit" / path.stem
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(config))
        link = model / "model.safetensors"
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
        models.append({"model": str(model), "parameters": {"weight": 1.0}})
    recipe = folder / "mergekit" / "recipe.yaml"  # JSON is YAML
    recipe.write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": dtype}))
    return ["mergekit-yaml", str(recipe), str(folder / "mergekit" / "out")]


def peers(folder: Path, dtype: str, repeats: int) -> dict:
    paths = make_run(folder / dtype, dtype, llama_shapes())
    read_all(paths)
    output = folder / "peer.safetensors"
    names = [str(path) for path in paths]
    python = sys.executable
    commands = {
        "wavg": [python, "-m", "wavg", "average", *names, "-o", str(output)],
        "tutorial": [python, "-c", textwrap.dedent(TUTORIAL), str(output), *names],
    }
    if importlib.util.find_spec("torch"):
        commands["timm's method"] = [python, "-c", textwrap.dedent(TIMM), str(output), *names]
    else:
        print("timm's method: skipped, torch is not installed")
    if shutil.which("mergekit-yaml"):
        commands["mergekit"] = mergekit_command(paths, folder, dtype)
    else:
        print("mergekit: skipped, not installed")
    runs: dict[str, list] = {name: [] for name in commands}
    wrong = {}
    for _ in range(repeats):
        for name, command in list(commands.items()):
            output.unlink(missing_ok=True)
            shutil.rmtree(folder / "mergekit/out", ignore_errors=True)
            try:
                runs[name].append(run_process(command))
            except RuntimeError as error:
                print(f"{dtype}: {name} failed: {str(error)[-300:]}")
                del commands[name]
                continue
            if name not in wrong:
                result = next((folder / "mergekit").glob("out/*.safetensors"), output)
                wrong[name] = wrong_share(paths, result)
    figures = {}
    for name in commands:
        seconds, peak = [run[0] for run in runs[name]], max(run[1] for run in runs[name])
        figures[name] = {"seconds": seconds, "peak_bytes": peak, "wrong_share": wrong[name]}
        faster = median(seconds) / median(figures["wavg"]["seconds"])
        print(
            f"{dtype}: {name} {spread(seconds)}, {peak / 1e6:.0f} MB, {wrong[name]:.2%} of numbers "
            f"not correctly rounded; wavg is {faster:.1f} times as fast"
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    dtypes = options.dtype or DTYPES
    if options.peers:
        rounds = min(3, options.repeats)
        record("peers", "warm", {d: peers(options.folder, d, rounds) for d in dtypes})
        return
    figures = {
        d: {
            "warm": warm(options.folder, d, options.repeats),
            "cold": cold(options.folder, d, min(5, options.repeats)),
        }
        for d in dtypes
    }
    record("speed", "as named", figures)


if __name__ == "__main__":
    main()
