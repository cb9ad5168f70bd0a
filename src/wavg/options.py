"""What a person may ask of an average, and sizes as people write them.

It checks each option by itself, and knows no checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from wavg.alignment import ALIGNMENTS
from wavg.dtypes import lookup

__all__ = ["IN_THE_NUMBERS", "MIB", "RECORDS", "Options", "parse_size"]

RECORDS = ("inputs", "sha256", "none")
IN_THE_NUMBERS = ("dtype", "include", "exclude", "align", "optimizer", "allow_nonfinite")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What a person may ask of an average; see `wavg.average_checkpoints`."""

    dtype: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    align: str = "name"
    optimizer: str = "carry"
    integers: str = "reference"
    allow_nonfinite: bool = False
    record: str = "inputs"
    digests: bool = False  # whether the inputs' SHA-256 are made
    max_shard_size: int | None = None
    max_memory: int = 64 * MIB
    workers: int = 1

    def __post_init__(self) -> None:
        if self.align not in ALIGNMENTS:
            raise ValueError(f"align must be 'name' or 'position', not {self.align!r}")
        if self.optimizer not in ("carry", "drop"):
            raise ValueError(f"optimizer must be 'carry' or 'drop', not {self.optimizer!r}")
        if self.integers not in ("reference", "error"):
            raise ValueError(f"integers must be 'reference' or 'error', not {self.integers!r}")
        if self.record not in RECORDS:
            raise ValueError(f"record must be one of {', '.join(RECORDS)}, not {self.record!r}")
        if self.dtype is not None and lookup(self.dtype).kind != "float":
            raise ValueError(f"dtype must be a floating-point format, not {self.dtype!r}")
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise ValueError(f"max_shard_size must be positive, not {self.max_shard_size}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers}")

    def told(self) -> dict[str, Any]:
        """Return those that show in the numbers, where they are not the defaults.

        >>> Options(exclude=("*.bias",), workers=4).told()
        {'exclude': ['*.bias']}
        """
        default = Options()
        pairs = [(name, getattr(self, name), getattr(default, name)) for name in IN_THE_NUMBERS]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value, usual in pairs
            if value != usual
        }


def parse_size(text: str | int) -> int:
    """Read a size in bytes: a number, or one with a unit (``64MiB``, ``1.5GB``).

    >>> parse_size("64MiB"), parse_size("1k"), parse_size(4096)
    (67108864, 1000, 4096)
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", text.lower())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write 64MiB, 512MB or a number of bytes")
    number, letter, binary = match.groups()
    unit = (1024 if binary else 1000) ** " kmgt".index(letter or " ")
    return int(Fraction(number) * unit)  # in floats 1.001k would be 1,000
