"""Quantized models from end to end: bit-equal to the formula of integer arithmetic, one kernel per layer."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve
from optc.frontend.onnx import load
from optc.ir.serialize import to_proto
from optc.passes import pipeline

F = np.float32


def optimized(text, constants):
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>\nagraph ' + text)
    for name, array in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    canonical = load(model)
    pipeline.run(canonical)
    return to_proto(canonical)


def rules(model):
    return [kernel.rule for kernel in CpuBackend(resolve("cpu")).schedule(load(model)).kernels]


def requantized(total, scale, ratio, zero, dtype):
    """``round(float32(total) * float32(scale / ratio)) + zero``, to even, saturated."""
    info = np.iinfo(dtype)
    factor = np.asarray(scale, F) / F(ratio)
    return np.clip(np.rint(total.astype(F) * factor) + F(zero), info.min, info.max).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("rows", [1, 30])
def test_two_layers_with_a_relu(compile_model, dtype, rows):
    rng = np.random.default_rng(rows)
    kind, info = np.dtype(dtype).name, np.iinfo(dtype)
    zeros = {"z0": dtype(info.min + 100), "z1": dtype(info.min), "z2": dtype(7)}
    scales = {"s0": F(0.02), "s1": F(0.2), "s2": F(0.7)}
    weights = {"w1": rng.integers(-127, 128, (40, 33)), "w2": rng.integers(-127, 128, (33, 20))}
    weights = {name: w.astype(np.int8) for name, w in weights.items()}
    sw = {"t1": rng.uniform(0.001, 0.01, 33).astype(F), "t2": rng.uniform(0.001, 0.01, 20).astype(F)}
    bias = {"b1": rng.integers(-9999, 9999, 33).astype(np.int32), "u1": scales["s0"] * sw["t1"]}
    columns = {"y1": np.zeros(33, np.int8), "y2": np.zeros(20, np.int8), "yb": np.zeros(33, np.int32)}
    text = f"""(float[{rows},40] x) => ({kind}[{rows},20] y) {{
        q0 = QuantizeLinear(x, s0, z0) d0 = DequantizeLinear(q0, s0, z0)
        v1 = DequantizeLinear<axis=1>(w1, t1, y1) c1 = DequantizeLinear<axis=0>(b1, u1, yb)
        m1 = Gemm(d0, v1, c1) r1 = Relu(m1) q1 = QuantizeLinear(r1, s1, z1) d1 = DequantizeLinear(q1, s1, z1)
        v2 = DequantizeLinear<axis=1>(w2, t2, y2) m2 = MatMul(d1, v2) y = QuantizeLinear(m2, s2, z2) }}"""
    model = optimized(text, zeros | scales | weights | sw | bias | columns)
    x = rng.uniform(-2.5, 2.5, (rows, 40)).astype(F)
    q0 = np.clip(np.rint(x / scales["s0"]) + F(zeros["z0"]), info.min, info.max).astype(np.int32)
    total = (q0 - int(zeros["z0"])) @ weights["w1"].astype(np.int32) + bias["b1"]
    q1 = requantized(total, bias["u1"], scales["s1"], zeros["z1"], dtype).astype(np.int32)
    total = (q1 - int(zeros["z1"])) @ weights["w2"].astype(np.int32)
    expected = requantized(total, scales["s1"] * sw["t2"], scales["s2"], zeros["z2"], dtype)
    np.testing.assert_array_equal(compile_model(model)(x)[0], expected)
    assert sorted(rules(model)) == ["generic", "integer_contraction", "integer_contraction"]


def test_a_residual_sum_is_part_of_the_product(compile_model):
    rng = np.random.default_rng(0)
    text = """(uint8[9,32] x, uint8[9,16] r) => (uint8[9,16] y) {
        d = DequantizeLinear(x, s, z) v = DequantizeLinear<axis=1>(w, t, zw) m = MatMul(d, v)
        q = QuantizeLinear(m, s1, z) e = DequantizeLinear(q, s1, z) f = DequantizeLinear(r, s2, z)
        a = Add(e, f) y = QuantizeLinear(a, s3, z) }"""
    s = {"s": F(0.02), "s1": F(0.1), "s2": F(0.03), "s3": F(0.12)}
    t, w = rng.uniform(0.001, 0.01, 16).astype(F), rng.integers(-127, 128, (32, 16)).astype(np.int8)
    model = optimized(text, {**s, "z": np.uint8(128), "w": w, "t": t, "zw": np.zeros(16, np.int8)})
    x, r = rng.integers(0, 256, (9, 32)).astype(np.uint8), rng.integers(0, 256, (9, 16)).astype(np.uint8)
    q = requantized((x.astype(np.int32) - 128) @ w.astype(np.int32), s["s"] * t, s["s1"], 128, np.uint8)
    total = (q.astype(F) - F(128)) * s["s1"] + (r.astype(F) - F(128)) * s["s2"]
    # The sum of the two products is float32 arithmetic, of which a fused multiply-add rounds once less.
    expected = np.clip(np.rint(total / s["s3"]) + F(128), 0, 255)
    difference = np.abs(compile_model(model)(x, r)[0] - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.02
    assert rules(model) == ["integer_contraction"]


def test_an_activation_between_two_roundings(compile_model):
    """Rounding binds values, inside of a product of floats, whose operands TVM vectorizes twice."""
    rng = np.random.default_rng(3)
    w = rng.integers(-127, 128, (16, 16, 1, 1)).astype(np.int8)
    x = rng.integers(-127, 128, (1, 16, 5, 6)).astype(np.int8)
    s = F(0.02)
    text = """(int8[1,16,5,6] x) => (int8[1,16,5,6] y) {
        d0 = DequantizeLinear(x, s) v = DequantizeLinear(w, s) c = Conv(d0, v)
        q1 = QuantizeLinear(c, t, z) d1 = DequantizeLinear(q1, t)
        a = Sigmoid(d1) q2 = QuantizeLinear(a, s, z) d2 = DequantizeLinear(q2, s) m = Mul(d1, d2)
        q3 = QuantizeLinear(m, t, z) d3 = DequantizeLinear(q3, t) l = LeakyRelu(d3) y = QuantizeLinear(l, t, z) }"""
    model = optimized(text, {"w": w, "s": s, "t": F(0.5), "z": np.int8(0)})
    total = np.einsum("oi,nihw->nohw", w[:, :, 0, 0].astype(np.int32), x.astype(np.int32))
    first = requantized(total, s * s, 0.5, 0, np.int8).astype(F) * F(0.5)
    gate = np.clip(np.rint(1 / (1 + np.exp(-first)) / s), -128, 127) * s
    product = np.clip(np.rint(first * gate / F(0.5)), -128, 127) * F(0.5)
    expected = np.clip(np.rint(np.where(product < 0, product * F(0.01), product) / F(0.5)), -128, 127)
    (found,) = compile_model(model)(x)
    # A step of one of the roundings in between is a step of the result.
    assert np.abs(found.astype(int) - expected).max() <= 1
