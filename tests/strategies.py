"""Hypothesis strategies: numbers that sit where rounding is hard, weights, shapes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from wavg.dtypes import lookup

FLOATS = ["float64", "float32", "float16", "bfloat16"]


def bit_patterns(dtype: str, elements: int, spread: int | None = None) -> st.SearchStrategy:
    """Arrays of finite values drawn as raw bits, so that every exponent is as likely as any."""
    entry = lookup(dtype)
    unsigned = np.dtype(f"u{entry.itemsize}")

    def build(args) -> np.ndarray:
        seed, zeros = args
        rng = np.random.default_rng(seed)
        if spread is None:
            bits = rng.integers(0, 2**entry.bits, elements, dtype=unsigned)
            with np.errstate(invalid="ignore"):  # some of them are signalling NaNs
                values = bits.view(entry.numpy).astype(np.float64)
        else:
            exponents = rng.integers(-spread, 1, elements)
            values = np.ldexp(
                rng.choice([-1, 1], elements) * rng.uniform(1, 2, elements), exponents
            )
        values[~np.isfinite(values)] = 1.5
        values[rng.random(elements) < zeros] = rng.choice([0.0, -0.0])
        return values.astype(entry.numpy)

    return st.tuples(st.integers(0, 2**32), st.sampled_from([0.0, 0.2, 0.9])).map(build)


def weights(count: int, *, negative: bool = True) -> st.SearchStrategy[list[float]]:
    """Small integers, ordinary numbers, tiny and huge ones; not summing to zero."""
    ordinary = st.floats(0.001, 1000.0)
    extreme = st.sampled_from([1e-300, 1e-30, 2.0**-50, 1.0, 3.0, 2.0**50, 1e30, 1e300])
    options = [
        st.lists(st.integers(0, 50).map(float), min_size=count, max_size=count),
        st.just([1.0] * count),
        st.just([float(i + 1) for i in range(count)]),
        st.lists(ordinary, min_size=count, max_size=count),
        st.lists(extreme, min_size=count, max_size=count),
    ]
    if negative:
        options.append(st.lists(st.floats(-10, 10), min_size=count, max_size=count))
    return st.one_of(options).filter(lambda row: sum(map(Fraction, row)) != 0)
