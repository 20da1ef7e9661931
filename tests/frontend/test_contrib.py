"""Operators of com.microsoft: quantized weights against onnxruntime's operators, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from optc import ir
from optc.errors import InvalidModelError, UnsupportedModelError
from optc.frontend.onnx import load

F = np.float32
IMPORTS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]


def nbits(build, rng, *, bits=4, k=70, n=9, block=32, zeros="none", bias=False, flat=False, **changes):
    """Return a model of one MatMulNBits; ``changes`` replace constants."""
    blocks = -(-k // block)
    weights = {
        "B": rng.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8),
        "scales": rng.uniform(0.5, 1.5, (n, blocks)).astype(F),
    }
    if zeros == "packed":
        weights["zero_points"] = rng.integers(0, 256, (n, -(-blocks * bits // 8))).astype(np.uint8)
    elif zeros == "float":
        weights["zero_points"] = rng.integers(0, 1 << bits, (n, blocks)).astype(F)
    if bias:
        weights["bias"] = rng.standard_normal(n).astype(F)
    if flat:
        weights = {name: array.reshape(-1) if name != "B" else array for name, array in weights.items()}
    weights |= changes.pop("weights", {})
    inputs = ["x", "B", "scales", "zero_points", "", "bias"]
    inputs = [name if name == "x" or name in weights else "" for name in inputs]
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block} | changes
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **attributes)
    return build([node], {"x": ["m", k]}, ["y"], imports=IMPORTS, weights=weights)


@pytest.mark.parametrize(
    ("bits", "block", "zeros", "bias", "flat"),
    [
        (4, 32, "none", True, True),
        (4, 32, "packed", False, True),
        (4, 128, "packed", True, False),
        (4, 16, "float", True, False),
        (8, 16, "none", True, False),
        (8, 64, "packed", False, False),
    ],
)
def test_matmul_nbits(build, evaluate, bits, block, zeros, bias, flat):
    rng = np.random.default_rng(block)
    model = nbits(build, rng, bits=bits, block=block, zeros=zeros, bias=bias, flat=flat)
    x = rng.standard_normal((3, 70)).astype(F)
    (expected,) = evaluate(model, {"x": x})
    canonical = load(model)
    ir.verify(canonical)
    assert [n.op_type for n in canonical.graph] == ["DequantizeLinear", "MatMul", *(["Add"] if bias else [])]
    assert "com.microsoft" not in canonical.opset_imports
    (weight,) = [v for v in canonical.graph.initializers.values() if v.name.endswith("weight")]
    assert weight.dtype.bitwidth == bits
    assert weight.const_value.nbytes == 70 * 9 * bits // 8
    (got,) = evaluate(canonical, {"x": x})
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["int4", "uint4", "uint8"])
@pytest.mark.parametrize("with_zeros", [False, True])
def test_gather_block_quantized(build, evaluate, kind, with_zeros):
    rng = np.random.default_rng(1)
    shape = (11, 24) if kind == "uint8" else (11, 48)
    dtype = np.uint8 if kind == "uint8" else helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, kind.upper()))
    low, high = {"int4": (-8, 8), "uint4": (0, 16), "uint8": (0, 256)}[kind]
    weights = {
        "data": rng.integers(low, high, shape).astype(dtype),
        "scales": rng.uniform(0.5, 1.5, (11, 3)).astype(F),
    }
    if with_zeros:
        weights["zeros"] = rng.integers(low, high, (11, 2 if kind == "uint8" else 3)).astype(dtype)
    inputs = ["data", "i", "scales", *(["zeros"] if with_zeros else [])]
    attributes = {"block_size": 16, "quantize_axis": 1, "gather_axis": 0, "bits": 4}
    node = helper.make_node("GatherBlockQuantized", inputs, ["y"], domain="com.microsoft", **attributes)
    model = build([node], {"i": [2, 2]}, ["y"], imports=IMPORTS, weights=weights, types={"i": onnx.TensorProto.INT64})
    i = np.array([[3, 0], [10, 3]])
    (expected,) = evaluate(model, {"i": i})
    canonical = load(model)
    ir.verify(canonical)
    np.testing.assert_allclose(evaluate(canonical, {"i": i})[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 2}, "2 bits"),
        ({"weight_prepacked": 1}, "packed for a GPU"),
        ({"zeros": "float", "weights": {"zero_points": np.full((9, 3), 7.5, F)}}, "no integers"),
    ],
)
def test_what_has_no_equal_is_refused(build, changes, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        load(nbits(build, np.random.default_rng(0), **changes))


def test_an_order_of_rows_and_weights_that_are_no_constants_are_refused(build):
    model = nbits(build, np.random.default_rng(0))
    model.graph.node[0].input[4] = "order"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(70, np.int32), "order"))
    with pytest.raises(UnsupportedModelError, match="g_idx"):
        load(model)
    model = nbits(build, np.random.default_rng(0))
    model.graph.initializer.pop(0)
    model.graph.input.append(helper.make_tensor_value_info("B", onnx.TensorProto.UINT8, [9, 3, 16]))
    with pytest.raises(UnsupportedModelError, match="B is not constant"):
        load(model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_size": 24}, "power of two"),
        ({"weights": {"scales": np.ones((9, 2), F)}}, r"scales has the shape \[9, 2\]"),
        ({"K": 200}, "B has the shape"),
        ({"N": 1.5}, "'N' is no integer"),
    ],
)
def test_contradictions_are_invalid(build, changes, reason):
    with pytest.raises(InvalidModelError, match=reason):
        load(nbits(build, np.random.default_rng(0), **changes))


def test_a_missing_attribute_is_invalid(build):
    model = nbits(build, np.random.default_rng(0))
    del model.graph.node[0].attribute[:]
    with pytest.raises(InvalidModelError, match="missing"):
        load(model)
