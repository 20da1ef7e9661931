"""Pooling against onnxruntime: padding, ceil mode, dilation, indices, element types, symbolic sizes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import helper

F = np.float32


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def check(compile_model, model, *inputs, tolerance=1e-5):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, dict(zip([i.name for i in session.get_inputs()], inputs, strict=True)))
    for got, want in zip(compile_model(model)(*inputs), expected, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


GEOMETRIES = [
    {"kernel_shape": [3, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "dilations": [2, 1], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [2, 3], "strides": [3, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [2, 3], "strides": [3, 2], "auto_pad": "SAME_LOWER"},
]


@pytest.mark.parametrize("shape", [(2, 3, 10, 13), ("n", 3, "h", "w")], ids=["static", "symbolic"])
@pytest.mark.parametrize("attributes", GEOMETRIES, ids=str)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "AveragePool with pad"])
def test_windows(compile_model, make_model, op, attributes, shape):
    extra = {"count_include_pad": 1} if op.endswith("pad") else {}
    node = helper.make_node(op.split()[0], ["x"], ["y"], **attributes, **extra)
    check(compile_model, make_model([node], {"x": (F, shape)}, {"y": F}, opset=19), data(2, 3, 10, 13))


def test_average_counts_only_what_ceil_mode_adds_inside_the_padding(compile_model, make_model):
    node = helper.make_node(
        "AveragePool", ["x"], ["y"], kernel_shape=[3], strides=[2], pads=[1, 1], ceil_mode=1, count_include_pad=1
    )
    x = np.arange(1, 7, dtype=F).reshape(1, 1, 6)
    (y,) = compile_model(make_model([node], {"x": (F, x.shape)}, {"y": F}, opset=19))(x)
    # The last window covers 6 and the padding after it, and sticks out by one.
    np.testing.assert_allclose(y.reshape(-1), [1.0, 3.0, 5.0, 3.0])


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("dims", [2, 3])
def test_max_pool_indices(compile_model, make_model, order, dims):
    shape = (2, 3, 6, 7, 5)[: dims + 2]
    node = helper.make_node(
        "MaxPool", ["x"], ["y", "i"], kernel_shape=[2] * dims, strides=[1, 2, 1][:dims], storage_order=order
    )
    x = np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape).astype(F)
    check(compile_model, make_model([node], {"x": (F, shape)}, {"y": F, "i": np.int64}), x)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.float16, np.float64])
def test_max_pool_types(compile_model, make_model, dtype):
    node = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3], pads=[1, 1])
    x = np.array([[[-5, -7, -3, -9, 100]]]).astype(dtype)
    (y,) = compile_model(make_model([node], {"x": (dtype, x.shape)}, {"y": dtype}))(x)
    padded = np.pad(x.astype(float), [(0, 0), (0, 0), (1, 1)], constant_values=-np.inf)
    np.testing.assert_array_equal(y[0, 0], np.lib.stride_tricks.sliding_window_view(padded[0, 0], 3).max(-1))


@pytest.mark.parametrize("p", [1, 2, 3])
def test_lp_pool(compile_model, make_model, p):
    node = helper.make_node("LpPool", ["x"], ["y"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], p=p)
    check(compile_model, make_model([node], {"x": (F, (2, 3, 7, 8))}, {"y": F}, opset=18), data(2, 3, 7, 8))


def test_lp_pool_of_bfloat16(compile_model, make_model):
    x = data(1, 2, 9).astype(ml_dtypes.bfloat16)
    node = helper.make_node("LpPool", ["x"], ["y"], kernel_shape=[3], pads=[1, 1])
    (y,) = compile_model(make_model([node], {"x": (x.dtype, x.shape)}, {"y": x.dtype}))(x)
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (1, 1)])
    norms = np.sqrt((np.lib.stride_tricks.sliding_window_view(padded, 3, -1) ** 2).sum(-1))
    np.testing.assert_allclose(y.astype(np.float64), norms, rtol=2**-8)


@pytest.mark.parametrize("op", ["GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"])
@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (2, 3, 9), ("n", 3, "h", "w")], ids=str)
def test_global(compile_model, make_model, op, shape):
    node = helper.make_node(op, ["x"], ["y"])
    x = data(*[d if isinstance(d, int) else 5 for d in shape])
    check(compile_model, make_model([node], {"x": (F, shape)}, {"y": F}, opset=18), x)


def test_max_unpool_undoes_max_pool(compile_model, make_model):
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p", "i"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("MaxUnpool", ["p", "i"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    model = make_model(nodes, {"x": (F, (2, 3, 6, 8))}, {"y": F})
    check(compile_model, model, data(2, 3, 6, 8))
