"""Bias correction: what rounding shifts the mean of a channel by goes into its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2, with means of
calibration data: ``E[W x] - E[W' Q(x)]`` for each output channel. Padding is taken for data like any other.
"""

from __future__ import annotations

import numpy as np

from optc.passes.quantize.products import Product
from optc.passes.quantize.weights import Integers


def correction(found: Product, array: Integers, mean: np.ndarray, rounded_mean: np.ndarray) -> np.ndarray:
    """Return what to add to the bias ``[output channels]``.

    ``mean`` and ``rounded_mean`` are those of each channel of what is read, before and after it is rounded.
    """
    exact = found.array().astype(np.float64)
    rounded = array.dequantized().astype(np.float64)
    if found.node.op_type != "Conv":
        if found.channels == 0:
            exact, rounded = exact.T, rounded.T
        return np.asarray(mean @ exact - rounded_mean @ rounded, np.float32)
    group = found.node.attributes.get_int("group", 1)

    def expected(weight: np.ndarray, channels: np.ndarray) -> np.ndarray:
        taps = weight.reshape(group, len(weight) // group, weight.shape[1], -1).sum(3)
        return np.asarray(np.einsum("goc,gc->go", taps, channels.reshape(group, -1))).reshape(-1)

    return np.asarray(expected(exact, mean) - expected(rounded, rounded_mean), np.float32)
