"""The keyword arguments of `wavg.files`, for type checkers: what is returned depends on them.

Nothing of it is there when the program runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TypedDict

from wavg.sha256sums import SumsLike
from wavg.weights import WeightsLike

__all__ = ["ManyAverages", "ManyPlans", "OneAverage", "OnePlan"]


class _PlanOptions(TypedDict, total=False):
    """The keyword arguments of `plan_average`, for type checkers."""

    steps: Sequence[float] | None
    sort: bool | None
    dtype: str | None
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    align: str
    optimizer: str
    integers: str
    allow_nonfinite: bool
    opaque_dtype: str | None
    isolate: bool
    record: str
    check_sha256: SumsLike | None
    max_shard_size: int | str | None
    max_memory: int | str
    workers: int | None


class _AverageOptions(_PlanOptions, total=False):
    """Those of `average_checkpoints`."""

    overwrite: bool
    executor: Executor | None
    progress: bool


class OneAverage(_AverageOptions, total=False):
    """Those of a call that makes one average."""

    weights: WeightsLike
    last: int | None


class ManyAverages(_AverageOptions, total=False):
    """Those of a call that makes several in one pass."""

    weights: WeightsLike | Sequence[WeightsLike]
    last: int | Sequence[int] | None


class OnePlan(_PlanOptions, total=False):
    """Those of a call that plans one average."""

    weights: WeightsLike
    last: int | None


class ManyPlans(_PlanOptions, total=False):
    """Those of a call that plans several."""

    weights: WeightsLike | Sequence[WeightsLike]
    last: int | Sequence[int] | None
