"""The slow, obvious oracle: exact fractions, and a rounding that shares nothing with the kernel."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from wavg.dtypes import DType, lookup

LARGEST = {
    "float64": Fraction(np.finfo(np.float64).max),
    "float32": Fraction(float(np.finfo(np.float32).max)),
    "float16": Fraction(65504),
    "bfloat16": Fraction(255 * 2**120),
}


def fraction_exponent(value: Fraction) -> int:
    """The e with 2**e <= |value| < 2**(e + 1)."""
    value = abs(value)
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if value >= Fraction(2) ** exponent else exponent - 1


def round_fraction(value: Fraction, dtype: DType) -> float:
    """Round an exact value to a format, to nearest even, by integer arithmetic only."""
    if value == 0:
        return 0.0
    exponent = max(fraction_exponent(value), dtype.min_exponent)
    quantum = Fraction(2) ** (exponent - dtype.precision + 1)
    rounded = round(value / quantum) * quantum  # round() of a Fraction is to nearest even
    if abs(rounded) > LARGEST[dtype.name]:
        return float("inf") if value > 0 else float("-inf")
    return float(rounded) if rounded else (0.0 if value > 0 else -0.0)


def mean(weights, values) -> Fraction:
    total = sum(Fraction(weight) for weight in weights)
    return sum(Fraction(w) * Fraction(v) for w, v in zip(weights, values, strict=True)) / total


def average(weights, rows: np.ndarray, dtype: str | None = None) -> np.ndarray:
    """The correctly rounded weighted mean of the rows, element by element."""
    entry = lookup(dtype or rows.dtype.name)
    weights = [float(weight) for weight in weights]
    out = np.empty(rows.shape[1:], entry.numpy)
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    for position, column in enumerate(flat.T.tolist()):
        exact = mean(weights, column)
        if exact == 0:
            used = [(w, v) for w, v in zip(weights, column, strict=True) if w]
            sign = np.sign(float(sum(Fraction(w) for w in weights)))
            negative = all(np.copysign(1.0, w) * np.copysign(1.0, v) * sign < 0 for w, v in used)
            out.reshape(-1)[position] = -0.0 if negative and not any(v for _, v in used) else 0.0
        else:
            out.reshape(-1)[position] = round_fraction(exact, entry)
    return out


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
