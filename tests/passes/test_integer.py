"""Quantized models: products of integers, and values that travel as integers."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.integer.passage import passage_pass
from optc.passes.integer.products import products_pass
from optc.passes.integer.weights import weights_pass

MATMUL = "matmul(dq(a), dq(b)) => dq(matmul_integer(a, b))"
GEMM = "gemm(dq(a), dq(b), c) => dq(matmul_integer(a, b) + c)"
CONV = "conv(dq(x), dq(w), c) => dq(conv_integer(x, w) + c)"
REQUANTIZE = "q(dq(integers, s), r, z) => q(dq(integers, s / r), 1, z)"
ROUND_TRIP, MOVED = "q(dq(x)) => x", "q(move(dq(x))) => move(x)"
CLIPPED = "q(clip(x, low, high)) => clip(q(x), q(low), q(high))"
JOINED = "q(concat(dq(a), dq(b), ...)) => concat(a, b, ...)"
F = np.float32


def numbers(rng, shape, dtype=np.uint8):
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def weights(rng, shape):
    """Seven bits: onnxruntime's sums of 8-bit products saturate at 16 bits where the CPU has no better instruction."""
    return rng.integers(-64, 65, shape).astype(np.int8)


def matmul_parameters(rng, k=7, n=5):
    return {
        "sa": F(0.02),
        "za": np.uint8(118),
        "w": weights(rng, (k, n)),
        "sw": rng.uniform(0.001, 0.01, n).astype(F),
        "zw": np.zeros(n, np.int8),
        "sy": F(0.05),
        "zy": np.uint8(7),
    }


def test_matmul_between_roundings(build, check, rng):
    text = """(uint8[b,7] x) => (uint8[b,5] y) {
        a = DequantizeLinear(x, sa, za) c = DequantizeLinear<axis=1>(w, sw, zw)
        m = MatMul(a, c) y = QuantizeLinear(m, sy, zy) }"""
    model = build(text, **matmul_parameters(rng))
    ops = ["MatMulInteger", "DequantizeLinear", "QuantizeLinear"]
    check(model, products_pass(), {"x": numbers(rng, (9, 7))}, fired={MATMUL: 1, REQUANTIZE: 1}, ops=ops, atol=1)


def test_matmul_that_stays_float(build, check, rng):
    text = """(uint8[b,7] x) => (float[b,5] y) {
        a = DequantizeLinear(x, sa, za) c = DequantizeLinear<axis=1>(w, sw, zw) y = MatMul(a, c) }"""
    parameters = {k: v for k, v in matmul_parameters(rng).items() if not k.endswith("y")}
    feeds = {"x": numbers(rng, (9, 7))}
    check(
        build(text, **parameters), products_pass(), feeds, fired={MATMUL: 1}, ops=["MatMulInteger", "DequantizeLinear"]
    )


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", ["int32", "float", None])
def test_gemm(build, check, rng, transposed, bias):
    p = matmul_parameters(rng)
    p["w"] = p["w"].T.copy() if transposed else p["w"]
    scale, addend = "", ""
    if bias == "int32":
        p |= {"c": rng.integers(-999, 999, 5).astype(np.int32), "sc": p["sa"] * p["sw"], "zc": np.zeros(5, np.int32)}
        scale, addend = "b = DequantizeLinear<axis=0>(c, sc, zc)", ", b"
    elif bias == "float":
        p |= {"b": rng.standard_normal(5).astype(F)}
        addend = ", b"
    text = f"""(uint8[b,7] x) => (uint8[b,5] y) {{
        a = DequantizeLinear(x, sa, za) d = DequantizeLinear<axis={1 - transposed}>(w, sw, zw) {scale}
        m = Gemm<transB={transposed}>(a, d{addend}) y = QuantizeLinear(m, sy, zy) }}"""
    fired = {GEMM: 1} | ({} if bias == "float" else {REQUANTIZE: 1})
    check(build(text, **p), products_pass(), {"x": numbers(rng, (9, 7))}, fired=fired, atol=1)


def test_a_bias_of_another_scale_is_added_as_floats(build, check, rng):
    p = matmul_parameters(rng)
    p |= {"c": np.int32([4, -5, 6, 7, 8]), "sc": p["sa"] * p["sw"] * F(1.01), "zc": np.zeros(5, np.int32)}
    text = """(uint8[b,7] x) => (uint8[b,5] y) {
        a = DequantizeLinear(x, sa, za) d = DequantizeLinear<axis=1>(w, sw, zw) b = DequantizeLinear<axis=0>(c, sc, zc)
        m = Gemm(a, d, b) y = QuantizeLinear(m, sy, zy) }"""
    check(build(text, **p), products_pass(), {"x": numbers(rng, (9, 7))}, fired={GEMM: 1}, atol=1)


def test_convolution(build, check, rng):
    p = {
        "sx": F(0.02),
        "zx": np.uint8(118),
        "w": weights(rng, (6, 3, 3, 3)),
        "sw": rng.uniform(0.001, 0.01, 6).astype(F),
        "zw": np.zeros(6, np.int8),
        "c": rng.integers(-999, 999, 6).astype(np.int32),
        "zc": np.zeros(6, np.int32),
        "sy": F(0.05),
        "zy": np.uint8(7),
    }
    p["sc"] = p["sx"] * p["sw"]
    text = """(uint8[b,3,8,9] x) => (uint8[b,6,4,5] y) {
        a = DequantizeLinear(x, sx, zx) d = DequantizeLinear<axis=0>(w, sw, zw) b = DequantizeLinear<axis=0>(c, sc, zc)
        m = Conv<pads=[1,1,1,1], strides=[2,2]>(a, d, b) y = QuantizeLinear(m, sy, zy) }"""
    ops = ["ConvInteger", "Add", "DequantizeLinear", "QuantizeLinear"]
    feeds = {"x": numbers(rng, (2, 3, 8, 9))}
    check(build(text, **p), products_pass(), feeds, fired={CONV: 1, REQUANTIZE: 1}, ops=ops, atol=1)


def test_scales_along_the_depth_stay_float(build, check, rng):
    p = matmul_parameters(rng) | {"sw": np.full(7, 0.01, F), "zw": np.zeros(7, np.int8)}
    text = """(uint8[b,7] x) => (uint8[b,5] y) {
        a = DequantizeLinear(x, sa, za) c = DequantizeLinear<axis=0>(w, sw, zw)
        m = MatMul(a, c) y = QuantizeLinear(m, sy, zy) }"""
    result = check(build(text, **p), products_pass(), {"x": numbers(rng, (9, 7))}, fired={})
    assert [s.reason for s in result.skipped] == ["the scale of the right factor varies along the depth or a batch"]


def test_a_depth_that_may_overflow_stays_float(build, rng):
    p = matmul_parameters(rng, k=40000)
    text = """(uint8[b,40000] x) => (float[b,5] y) {
        a = DequantizeLinear(x, sa, za) c = DequantizeLinear<axis=1>(w, sw, zw) y = MatMul(a, c) }"""
    result = products_pass().call(build(text, **{k: v for k, v in p.items() if not k.endswith("y")}))
    assert [s.reason for s in result.skipped] == ["the sum may not fit int32"]


MOVES = {
    "Reshape": ("Reshape(d, shape)", {"shape": np.int64([6, 4])}),
    "Transpose": ("Transpose<perm=[1,0,2]>(d)", {}),
    "Gather": ("Gather(d, i)", {"i": np.int64([1, 0, 1])}),
    "Slice": ("Slice(d, f, t)", {"f": np.int64([0, 1]), "t": np.int64([2, 3])}),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(build, check, rng, name):
    call, constants = MOVES[name]
    text = f"""(uint8[2,3,4] x) => (uint8[a,b,c] y) {{
        d = DequantizeLinear(x, s, z) m = {call} y = QuantizeLinear(m, s, z) }}"""
    text = text.replace("[a,b,c]", "[a,b]") if name == "Reshape" else text
    model = build(text, s=F(0.3), z=np.uint8(3), **constants)
    check(model, passage_pass(), {"x": numbers(rng, (2, 3, 4))}, fired={MOVED: 1}, ops=[name], rtol=0, atol=0)


def test_max_pool_selects_integers(build, check, rng):
    text = """(int8[1,2,6,6] x) => (int8[1,2,3,3] y) { d = DequantizeLinear(x, s, z)
        m = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(d) y = QuantizeLinear(m, s, z) }"""
    model = build(text, s=F(0.3), z=np.int8(-3))
    feeds = {"x": numbers(rng, (1, 2, 6, 6), np.int8)}
    check(model, passage_pass(), feeds, fired={MOVED: 1}, ops=["MaxPool"], rtol=0, atol=0)


def test_other_parameters_keep_the_pair(build, check, rng):
    text = """(uint8[4,4] x) => (uint8[4,4] y) {
        d = DequantizeLinear(x, s, z) m = Transpose(d) y = QuantizeLinear(m, t, z) }"""
    model = build(text, s=F(0.3), t=F(0.2), z=np.uint8(3))
    result = check(model, passage_pass(), {"x": numbers(rng, (4, 4))}, fired={})
    assert [s.reason for s in result.skipped] == ["the parameters differ"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("scale", [1e-6, 0.1, 3.7])
def test_a_round_trip_gives_every_value_back(build, check, dtype, scale):
    info = np.iinfo(dtype)
    every = np.arange(info.min, info.max + 1).astype(dtype)
    kind = np.dtype(dtype).name
    text = f"""({kind}[256] x) => ({kind}[256] y) {{
        d = DequantizeLinear(x, s, z) q = QuantizeLinear(d, s, z) y = Identity(q) }}"""
    check(build(text, s=F(scale), z=dtype(5)), passage_pass(), {"x": every}, fired={ROUND_TRIP: 1}, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "zero", "extra"),
    [
        ("Relu(x)", 0, []),
        ("Relu(x)", 9, ["Max"]),
        ("Clip(x, low, high)", 9, ["Max", "Min"]),
        ("Clip(x, low)", 9, ["Max"]),
    ],
)
def test_bounds(build, check, rng, call, zero, extra):
    text = f"(float[90] x) => (uint8[90] y) {{ c = {call} y = QuantizeLinear(c, s, z) }}"
    known = {"low": F(-0.31), "high": F(2.04)}
    model = build(text, s=F(0.1), z=np.uint8(zero), **{k: v for k, v in known.items() if k in call})
    feeds = {"x": (rng.standard_normal(90) * 9).astype(F)}
    check(model, passage_pass(), feeds, fired={CLIPPED: 1}, ops=["QuantizeLinear", *extra], rtol=0, atol=0)


def test_concatenation(build, check, rng):
    text = """(uint8[2,3] a, uint8[2,4] b) => (uint8[2,7] y) { c = DequantizeLinear(a, s, z)
        d = DequantizeLinear(b, s, z) e = Concat<axis=1>(c, d) y = QuantizeLinear(e, s, z) }"""
    feeds = {"a": numbers(rng, (2, 3)), "b": numbers(rng, (2, 4))}
    check(
        build(text, s=F(0.3), z=np.uint8(3)), passage_pass(), feeds, fired={JOINED: 1}, ops=["Concat"], rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("parameters", "attributes"), [("s, z", "axis=1"), ("t", "axis=0"), ("b, c", "axis=1, block_size=2")]
)
def test_constants_are_transposed_as_integers(build, check, rng, parameters, attributes):
    constants = {
        "w": weights(rng, (4, 6)),
        "s": rng.uniform(0.1, 1, 6).astype(F),
        "z": weights(rng, 6),
        "t": F(0.5),
        "b": rng.uniform(0.1, 1, (4, 3)).astype(F),
        "c": weights(rng, (4, 3)),
    }
    used = {name: constants[name] for name in ["w", *parameters.split(", ")]}
    text = f"""(float[3,6] x) => (float[3,4] y, float[4,6] d) {{
        d = DequantizeLinear<{attributes}>(w, {parameters}) t0 = Transpose<perm=[1, 0]>(d) y = MatMul(x, t0) }}"""
    model = build(text, **used)
    feeds = {"x": rng.standard_normal((3, 6)).astype(F)}
    rule = "transpose(dq(constant)) => dq(transposed)"
    check(model, weights_pass(), feeds, fired={rule: 1}, ops=["DequantizeLinear", "DequantizeLinear", "MatMul"])


def test_what_is_no_constant_is_not_transposed(build, check, rng):
    text = "(int8[4,6] w) => (float[6,4] y) { d = DequantizeLinear(w, t) y = Transpose<perm=[1, 0]>(d) }"
    check(build(text, t=F(0.5)), weights_pass(), {"w": weights(rng, (4, 6))}, fired={})
