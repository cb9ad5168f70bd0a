"""Blocks with all that is hard, and what the kernel makes of a block."""

from __future__ import annotations

import numpy as np

from wavg import kernel
from wavg.combination import Combination
from wavg.dtypes import lookup


def means(weights, block, target=None, **options):
    entry = lookup(target or block.dtype.name)
    combination = Combination.of(weights)
    outs = np.empty((len(combination.matrix), block.shape[1]), entry.numpy)
    kernel.combine(combination, block, outs, **options)
    return outs


def planted(rng, source, columns, inputs=3):
    """Ordinary numbers, zeros of both signs, ties, what nearly cancels, and subnormal numbers."""
    block = rng.standard_normal((inputs, columns))
    step = 2.0 ** (1 - source.precision)
    block[:, ::7] = 0.0
    block[:, ::21] *= -1.0
    block[0, 14::21] = 1.0
    block[:, 3::11] = 1.0
    block[0, 3::11] += step
    block[1, 5::13] = -block[0, 5::13]
    block[2, 5::13] *= 2.0**-20
    block[:, 6::17] *= 2.0 ** (source.min_exponent - source.precision + 3)
    return block.astype(source.numpy)
