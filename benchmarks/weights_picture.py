"""Draw the picture of docs/weights.md: every kind of schedule over the same twenty checkpoints.

python benchmarks/weights_picture.py
"""

from __future__ import annotations

from pathlib import Path

from wavg import cli

PICTURE = Path(__file__).parent.parent / "docs" / "weights.svg"
SPECS = (
    "equal",
    "linear",
    "exponential:alpha=4",
    "polynomial:power=4",
    "polynomial_decay:eta=3",
    "schedule_free:warmup=5000",
    "lawa:last=5,every=2",
    "lawa:last=10",
    "power_ema:sigma_rel=0.1",
    "ema:decay=0.8",
    "ema:decay=0.9,debias=false",
    "ema:half_life=2000",
    "ema:decay=0.9,warmup=ratio",
    "dema:decay=0.8",
    "bema",
    "cumulative_window",
    "wsm:shape=linear",
    "wsm:shape=cosine",
    "wsm:shape=1-sqrt",
    "wsm:shape=1-square",
)


def main() -> None:
    first, *others = SPECS
    steps = ",".join(str(step) for step in range(1000, 21_000, 1000))
    compared = [word for spec in others for word in ("--compare", spec)]
    cli.main(["weights", first, "--steps", steps, *compared, "--plot", str(PICTURE), "--json"])


if __name__ == "__main__":
    main()
