"""Biases and the plain form of Gemm."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.fuse.bias import bias_pass

CONV = "Conv(x,w,b)+c => Conv(x,w,b+c)"
GEMM = "MatMul(x,w)+c => Gemm(x,w,c)"
PLAIN = "Gemm(x,w,c,alpha,beta,transB) => Gemm(x,w',c')"
MATMUL = "Gemm(x,w) => MatMul(x,w)"
UNFLAT = "Reshape(Gemm(Reshape(x,[M,K]),w,c),[..,N]) => MatMul(Reshape(x,[..,K]),w)+c"


@pytest.fixture
def some(rng):
    """``some(w=(4, 6))``: random constants of these shapes."""
    return lambda **shapes: {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("op", ["Add(c, t)", "Add(t, c)", "Sub(c, t)"])
@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1,)])
@pytest.mark.parametrize("bias", [True, False])
def test_conv(op, shape, bias, some, build, check):
    constants = some(w=(6, 2, 1, 1), t=shape, **({"b": (6,)} if bias else {}))
    conv = "Conv<group=2>(x, w, b)" if bias else "Conv<group=2>(x, w)"
    model = build(f"(float[n,4,3,3] x) => (float[n,6,3,3] y) {{ c = {conv} y = {op} }}", **constants)
    check(model, bias_pass(), some(x=(2, 4, 3, 3)), fired={CONV: 1}, ops=["Conv"], atol=1e-5)


def test_conv_transpose_with_groups(some, build, check):
    text = "(float[n,4,3,3] x) => (float[n,6,3,3] y) { c = ConvTranspose<group=2>(x, w) y = Add(c, t) }"
    model = build(text, **some(w=(4, 3, 1, 1), t=(6, 1, 1)))
    check(model, bias_pass(), some(x=(2, 4, 3, 3)), fired={CONV: 1}, ops=["ConvTranspose"], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "outputs", "reason"),
    [
        ("c = Conv(x, w) y = Add(c, row)", ["y"], "not one per channel"),
        ("c = Conv(x, w) y = Add(c, t)", ["y", "c"], "graph output"),
        ("c = Conv(x, w) y = Add(c, t) z = Neg(c)", ["y", "z"], "also used by Neg"),
    ],
)
def test_conv_near_misses(text, outputs, reason, some, build, check):
    constants = some(w=(6, 4, 1, 1), **({"row": (3,)} if "row" in text else {"t": (6, 1, 1)}))
    outs = ", ".join(f"float[n,6,3,3] {name}" for name in outputs)
    model = build(f"(float[n,4,3,3] x) => ({outs}) {{ {text} }}", **constants)
    result = check(model, bias_pass(), some(x=(2, 4, 3, 3)), fired={})
    assert reason in result.skipped[0].reason


def test_conv_with_computed_weight(some, build, check):
    text = "(float[n,4,3,3] x, float[6,4,1,1] w) => (float[n,6,3,3] y) { c = Conv(x, w) y = Add(c, t) }"
    feeds = some(x=(2, 4, 3, 3), w=(6, 4, 1, 1))
    result = check(build(text, **some(t=(6, 1, 1))), bias_pass(), feeds, fired={})
    assert "not constant" in result.skipped[0].reason


@pytest.mark.parametrize("shape", [(6,), (1, 6), ()])
def test_gemm(shape, some, build, check):
    model = build("(float[n,4] x) => (float[n,6] y) { m = MatMul(x, w) y = Add(c, m) }", **some(w=(4, 6), c=shape))
    check(model, bias_pass(), some(x=(3, 4)), fired={GEMM: 1}, ops=["Gemm"], atol=1e-5)


def test_gemm_with_computed_bias(some, build, check):
    model = build("(float[n,4] x, float[n,6] c) => (float[n,6] y) { m = MatMul(x, w) y = Add(c, m) }", **some(w=(4, 6)))
    check(model, bias_pass(), some(x=(3, 4), c=(3, 6)), fired={GEMM: 1}, ops=["Gemm"], atol=1e-5)


@pytest.mark.parametrize(
    ("signature", "feeds", "constants", "reason"),
    [
        ("(float[n,4] x) => (float[1,n,6] y)", {"x": (3, 4)}, {"c": (1, 1, 6)}, "one direction"),
        ("(float[n,4] x, float[k,6] c) => (float[n,6] y)", {"x": (3, 4), "c": (1, 6)}, {}, "one direction"),
        ("(float[n,4] x) => (float[n,6] y, float[n,6] m)", {"x": (3, 4)}, {"c": (6,)}, "graph output"),
    ],
)
def test_gemm_near_misses(signature, feeds, constants, reason, some, build, check):
    model = build(signature + "{ m = MatMul(x, w) y = Add(m, c) }", **some(w=(4, 6), **constants))
    result = check(model, bias_pass(), some(**feeds), fired={})
    assert reason in result.skipped[0].reason


def test_batched_product_keeps_matmul_and_add(some, build, check):
    model = build("(float[n,2,4] x) => (float[n,2,6] y) { m = MatMul(x, w) y = Add(m, c) }", **some(w=(4, 6), c=(6,)))
    check(model, bias_pass(), some(x=(3, 2, 4)), fired={}, ops=["MatMul", "Add"])


@pytest.mark.parametrize("attributes", ["transB=1", "alpha=2.0", "beta=0.5", "alpha=0.5, beta=3.0, transB=1"])
@pytest.mark.parametrize("trans_a", [0, 1])
def test_plain_gemm(attributes, trans_a, some, build, check):
    signature = "(float[4,n] x)" if trans_a else "(float[n,4] x)"
    shape = (6, 4) if "transB" in attributes else (4, 6)
    text = signature + f" => (float[n,6] y) {{ y = Gemm<{attributes}, transA={trans_a}>(x, w, c) }}"
    model = build(text, **some(w=shape, c=(6,)))
    check(model, bias_pass(), some(x=(4, 3) if trans_a else (3, 4)), fired={PLAIN: 1}, ops=["Gemm"], atol=1e-5)
    node = model.graph.node(0)
    assert [node.attributes[name].value for name in ("alpha", "beta", "transB")] == [1.0, 1.0, 0]


def test_gemm_with_shared_weight_stays(some, build, check):
    text = "(float[n,4] x) => (float[n,4] y, float[n,4] z) { y = Gemm<transB=1>(x, w, c) z = MatMul(x, w) }"
    result = check(build(text, **some(w=(4, 4), c=(4,))), bias_pass(), some(x=(3, 4)), fired={})
    assert "shared" in result.skipped[0].reason


def test_gemm_with_computed_weight_stays(some, build, check):
    text = "(float[n,4] x, float[6,4] w) => (float[n,6] y) { y = Gemm<transB=1>(x, w) }"
    result = check(build(text), bias_pass(), some(x=(3, 4), w=(6, 4)), fired={})
    assert "not constant" in result.skipped[0].reason


def test_gemm_without_bias_is_a_matmul(some, build, check):
    model = build("(float[n,4] x) => (float[n,6] y) { y = Gemm<transB=1>(x, w) }", **some(w=(6, 4)))
    check(model, bias_pass(), some(x=(3, 4)), fired={PLAIN: 1, MATMUL: 1}, ops=["MatMul"], atol=1e-5)


def test_flattened_gemm(some, build, check):
    text = "f = Reshape(x, flat) g = Gemm(f, w, c) y = Reshape<allowzero=1>(g, full)"
    constants = some(w=(4, 6), c=(6,)) | {"flat": np.array([-1, 4]), "full": np.array([-1, 2, 6])}
    model = build("(float[n,2,4] x) => (float[n,2,6] y) {" + text + "}", **constants)
    # The rank of 6 elements of a symbolic product is not enough to know n: static sizes are.
    static = build("(float[3,2,4] x) => (float[3,2,6] y) {" + text + "}", **constants)
    check(static, bias_pass(), some(x=(3, 2, 4)), fired={UNFLAT: 1}, ops=["MatMul", "Add"], atol=1e-5)
    check(model, bias_pass(), some(x=(3, 2, 4)), atol=1e-5)


def test_flattened_gemm_of_other_dimensions_keeps_one_reshape(some, build, check):
    text = "f = Reshape(x, flat) g = Gemm(f, w, c) y = Reshape(g, full)"
    constants = some(w=(4, 6), c=(6,)) | {"flat": np.array([6, 4]), "full": np.array([3, 2, 6])}
    model = build("(float[3,2,2,2] x) => (float[3,2,6] y) {" + text + "}", **constants)
    check(model, bias_pass(), some(x=(3, 2, 2, 2)), fired={UNFLAT: 1}, ops=["Reshape", "MatMul", "Add"], atol=1e-5)


@pytest.mark.parametrize("allowzero", [0, 1])
def test_flattened_gemm_over_symbolic_dimensions(allowzero, some, build, check):
    """With two symbolic dimensions the old shape tensor serves, if the sizes agree and it copies no dimension."""
    text = f"""f = Reshape(x, flat) g = Gemm(f, w, c) s = Shape<start=0, end=2>(x) k = Concat<axis=0>(s, last)
    y = Reshape<allowzero={allowzero}>(g, k)"""
    constants = some(w=(4, 4), c=(4,)) | {"flat": np.array([-1, 4]), "last": np.array([4])}
    model = build("(float[n,m,2,2] x) => (float[n,m,4] y) {" + text + "}", **constants)
    result = check(model, bias_pass(), some(x=(3, 2, 2, 2)), fired={UNFLAT: 1} if allowzero else {}, atol=1e-5)
    assert allowzero or "symbolic" in result.skipped[0].reason


def test_reshape_that_mixes_columns_stays(some, build, check):
    text = "f = Reshape(x, flat) g = Gemm(f, w, c) y = Reshape(g, full)"
    constants = some(w=(4, 6), c=(6,)) | {"flat": np.array([6, 4]), "full": np.array([3, 4, 3])}
    model = build("(float[3,2,4] x) => (float[3,4,3] y) {" + text + "}", **constants)
    result = check(model, bias_pass(), some(x=(3, 2, 4)), fired={})
    assert "keep the columns" in result.skipped[0].reason


def test_flat_value_needed_elsewhere(some, build, check):
    text = "f = Reshape(x, flat) g = Gemm(f, w, c) y = Reshape(g, full)"
    constants = some(w=(4, 6), c=(6,)) | {"flat": np.array([6, 4]), "full": np.array([3, 2, 6])}
    model = build("(float[3,2,4] x) => (float[3,2,6] y, float[6,6] g) {" + text + "}", **constants)
    result = check(model, bias_pass(), some(x=(3, 2, 4)), fired={})
    assert "graph output" in result.skipped[0].reason
