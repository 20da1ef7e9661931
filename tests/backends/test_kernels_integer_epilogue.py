"""Epilogues of integer products: equal to NumPy to the last bit, whatever is packed together."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

SCALES = 2.0 ** -np.arange(4, 8, dtype=np.float32)
"""Powers of two: rescaling is exact, so every order of it rounds alike."""


def quantized(y, zero, dtype):
    info = np.iinfo(dtype)
    return np.clip(np.rint(y) + int(zero), info.min, info.max).astype(dtype)


def after_the_sums(zero, dtype, *, residual=False):
    """Return nodes from int32 sums ``s`` to ``y``: a bias, a scale for each column, a quantization, an addition."""
    nodes = [
        helper.make_node("Add", ["s", "bias"], ["t"]),
        helper.make_node("DequantizeLinear", ["t", "scale"], ["f"], axis=-1),
        helper.make_node("QuantizeLinear", ["f", "one", "zero"], ["q" if residual else "y"]),
    ]
    if residual:
        nodes += [
            helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["g"]),
            helper.make_node("Add", ["g", "r"], ["h"]),
            helper.make_node("QuantizeLinear", ["h", "one", "zero"], ["y"]),
        ]
    return nodes, {"one": np.float32(1), "zero": np.array(zero, dtype)}


@pytest.mark.parametrize(
    ("dtype", "zero"), [(np.int8, -128), (np.int8, 0), (np.int8, 5), (np.uint8, 0), (np.uint8, 128)]
)
@pytest.mark.parametrize("m, n", [(25, 24), (13, 40), (6, 21)])
def test_rows_packed_together(compile_model, make_model, m, n, dtype, zero):
    rng = np.random.default_rng(m)
    a, b = rng.integers(0, 60, (m, 12)).astype(np.uint8), rng.integers(-128, 128, (12, n)).astype(np.int8)
    bias, scale = rng.integers(-900, 900, n).astype(np.int32), SCALES[rng.integers(0, 4, n)]
    nodes, known = after_the_sums(zero, dtype, residual=m == 13)
    nodes.insert(0, helper.make_node("MatMulInteger", ["a", "b"], ["s"]))
    inputs, given = {"a": (np.uint8, a.shape)}, [a]
    residual = rng.integers(-99, 99, (m, n)).astype(np.float32)
    if m == 13:
        inputs["r"] = (np.float32, residual.shape)
        given.append(residual)
    run = compile_model(make_model(nodes, inputs, {"y": dtype}, {"b": b, "bias": bias, "scale": scale, **known}))
    y = quantized((a.astype(np.int32) @ b + bias).astype(np.float32) * scale, zero, dtype)
    if m == 13:
        y = quantized(y.astype(np.float32) - zero + residual, zero, dtype)
    np.testing.assert_array_equal(run(*given)[0], y)


@pytest.mark.parametrize("channels, width, stride", [(24, 5, 1), (16, 8, 2), (8, 7, 1)])
def test_pixels_packed_together(compile_model, make_model, channels, width, stride):
    rng = np.random.default_rng(width)
    x = rng.integers(-128, 128, (1, channels, 6, width)).astype(np.int8)
    w = rng.integers(-128, 128, (channels, 1, 3, 3)).astype(np.int8)
    bias, scale = rng.integers(-900, 900, (channels, 1, 1)).astype(np.int32), SCALES[rng.integers(0, 4, channels)]
    nodes, known = after_the_sums(-128, np.int8)
    nodes[1] = helper.make_node("DequantizeLinear", ["t", "scale"], ["f"], axis=1)
    attributes = {"group": channels, "strides": [stride] * 2, "pads": [1] * 4}
    nodes.insert(0, helper.make_node("ConvInteger", ["x", "w"], ["s"], **attributes))
    known |= {"w": w, "bias": bias, "scale": scale}
    run = compile_model(make_model(nodes, {"x": (np.int8, x.shape)}, {"y": np.int8}, known))
    padded = np.pad(x.astype(np.int32), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::stride, ::stride]
    sums = (windows * w[:, 0, None, None].astype(np.int32)).sum((-2, -1)) + bias
    np.testing.assert_array_equal(run(x)[0], quantized(sums * scale[:, None, None], -128, np.int8))
