"""Operators of com.microsoft on quantized tensors, against onnxruntime's: at most one step apart.

The step is that of the last rounding: onnxruntime computes some of them by tables, and sums in another order.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

import optc
from optc import ir
from optc.errors import UnsupportedModelError
from optc.frontend.onnx import load

IMPORTS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
RNG = np.random.default_rng(0)
KINDS = {"u": np.uint8, "i": np.int8}


def scale(value):
    return np.array(value, np.float32)


def whole(kind, *shape):
    info = np.iinfo(KINDS[kind])
    return RNG.integers(info.min, info.max, shape, KINDS[kind], endpoint=True)


def zero(kind):
    return np.array(11 if kind == "u" else -3, KINDS[kind])


def model_of(build, op, inputs, constants, outputs=("y",), **attributes):
    """Return a model of one node: arrays in ``inputs`` are given, those in ``constants`` are not; in that order."""
    arrays = inputs | constants
    weights = {k: v for k, v in constants.items() if v is not None}
    node = helper.make_node(
        op, [k if v is not None else "" for k, v in arrays.items()], list(outputs), domain="com.microsoft", **attributes
    )
    types = {k: helper.np_dtype_to_tensor_dtype(v.dtype) for k, v in inputs.items()}
    if "ys" in arrays:
        types["y"] = types["x"]
    return build(
        [node], {k: list(v.shape) for k, v in inputs.items()}, outputs, weights=weights, types=types, imports=IMPORTS
    )


def operands(kind):
    """Return the operators with their arrays in order, all of which but the first are constants, and attributes."""
    x, z, s = whole(kind, 2, 4, 6, 6), zero(kind), scale(0.03)
    one = {"x": x, "xs": s, "xz": z, "ys": scale(0.05), "yz": z}
    two = {"x": x, "xs": s, "xz": z, "b": whole(kind, 4, 1, 6), "bs": scale(0.02), "bz": z, "ys": scale(0.05), "yz": z}
    return {
        "QLinearAdd": (two, {}),
        "QLinearMul": (two, {}),
        "QLinearSigmoid": (one | {"ys": scale(1 / 256)}, {}),
        "QLinearLeakyRelu": (one, {"alpha": 0.2}),
        "QLinearSoftmax": (one | {"ys": scale(1 / 256)}, {"axis": -1, "opset": 13}),
        "QLinearGlobalAveragePool": (one, {}),
        "QLinearAveragePool": (one, {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "strides": [2, 1]}),
    }


def compare(model, evaluate, feeds, tolerance=1e-6):
    """Check that the canonical model gives what onnxruntime's own operator gives: 1 step for integers."""
    (expected,) = evaluate(model, feeds)
    canonical = load(model)
    ir.verify(canonical)
    assert "com.microsoft" not in canonical.opset_imports
    (found,) = evaluate(canonical, feeds)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if found.dtype.kind in "iu":
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    else:
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", operands("u"))
def test_element_by_element_and_pooling(build, evaluate, op, kind):
    arrays, attributes = operands(kind)[op]
    x = arrays.pop("x")
    compare(model_of(build, op, {"x": x}, arrays, **attributes), evaluate, {"x": x})


def test_absent_zero_points_are_zero(build, evaluate):
    x, b = whole("u", 3, 5), whole("u", 3, 5)
    constants = {"xs": scale(0.1), "xz": None, "b": b, "bs": scale(0.2), "bz": None, "ys": scale(0.3)}
    (found,) = evaluate(load(model_of(build, "QLinearAdd", {"x": x}, constants)), {"x": x})
    expected = np.clip(np.rint((x * 0.1 + b * 0.2) / 0.3), 0, 255)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_concat_and_where(build, evaluate, kind):
    x, z = whole(kind, 2, 3, 4), zero(kind)
    first = {"ys": scale(0.05), "yz": z}
    more = {"xs": scale(0.03), "xz": z, "b": whole(kind, 2, 5, 4), "bs": scale(0.07), "bz": z}
    model = model_of(build, "QLinearConcat", first | {"x": x}, more, axis=1)
    weights = {k: onnx.numpy_helper.from_array(v, k) for k, v in first.items()}
    model.graph.initializer.extend(weights.values())
    del model.graph.input[0:2]
    compare(model, evaluate, {"x": x})
    condition = whole("u", 2, 1, 4) > 99
    rest = {"xs": scale(0.03), "xz": z, "b": whole(kind, 3, 1), "bs": scale(0.07), "bz": z}
    model = model_of(build, "QLinearWhere", {"condition": condition, "x": x}, rest | first)
    compare(model, evaluate, {"condition": condition, "x": x})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("form", ["whole", "float", "transposed"])
def test_gemm(build, evaluate, kind, columns, form):
    x, z = whole(kind, 5, 16), zero(kind)
    each = [7] if columns else []
    scales = np.asarray(RNG.uniform(0.01, 0.02, each), np.float32)
    zeros = np.zeros(each, np.int8) if kind == "i" else np.full(each, 99, np.uint8)
    w = whole(kind, 7, 16) if form == "transposed" else whole(kind, 16, 7)
    constants = {"xs": scale(0.03), "xz": z, "w": w, "ws": scales, "wz": zeros}
    constants["c"] = RNG.integers(-9000, 9000, 7).astype(np.int32)
    if form != "float":
        constants |= {"ys": scale(0.2), "yz": z}
    attributes = {"transB": 1} if form == "transposed" else {"alpha": 1.0}
    compare(model_of(build, "QGemm", {"x": x}, constants, **attributes), evaluate, {"x": x}, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_numbers_quantized_at_run_time(build, evaluate, bias):
    x = RNG.standard_normal((4, 16)).astype(np.float32)
    constants = {"w": whole("i", 16, 8), "ws": scale(0.02), "wz": np.array(3, np.int8)}
    if bias:
        constants["c"] = RNG.standard_normal(8).astype(np.float32)
    compare(model_of(build, "DynamicQuantizeMatMul", {"x": x}, constants), evaluate, {"x": x}, 1e-5)
    u = whole("u", 4, 16)
    constants = {"w": whole("i", 16, 8), "us": scale(0.05), "ws": np.full(8, 0.02, np.float32), "uz": zero("u")}
    constants |= {"wz": np.zeros(8, np.int8)}
    if bias:
        constants["c"] = RNG.standard_normal(8).astype(np.float32)
    compare(model_of(build, "MatMulIntegerToFloat", {"u": u}, constants), evaluate, {"u": u}, 1e-5)


def test_images_with_channels_last_are_refused(build):
    arrays, _ = operands("u")["QLinearGlobalAveragePool"]
    x = arrays.pop("x")
    model = model_of(build, "QLinearGlobalAveragePool", {"x": x}, arrays, channels_last=1)
    with pytest.raises(UnsupportedModelError, match=r"QLinearGlobalAveragePool.*channels_last"):
        load(model)


def test_softmax_over_several_axes_is_refused(build):
    arrays, _ = operands("u")["QLinearSoftmax"]
    x = arrays.pop("x")
    model = model_of(build, "QLinearSoftmax", {"x": x}, arrays, axis=1, opset=12)
    with pytest.raises(UnsupportedModelError, match="several axes"):
        load(model)


def test_the_numbers_of_a_compiled_model(build, evaluate):
    arrays, _ = operands("u")["QLinearAdd"]
    x = arrays.pop("x")
    model = model_of(build, "QLinearAdd", {"x": x}, arrays)
    found = optc.compile(model, verify=False).model().run({"x": x})["y"]
    assert np.abs(found.astype(int) - evaluate(model, {"x": x})[0].astype(int)).max() <= 1
