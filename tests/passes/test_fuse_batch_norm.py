"""Batch normalization and scales folded into weights."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.fuse.fold_batch_norm import fold_batch_norm_pass

BN_CONV = "BatchNormalization(Conv(x,w,b)) => Conv(x,w',b')"
BN_GEMM = "BatchNormalization(Gemm(x,w,c)) => Gemm(x,w',c')"
BN_ALONE = "BatchNormalization(x) => x*s+t"
AFTER_CONV = "Conv(x,w,b)*s => Conv(x,w*s,b*s)"
AFTER_GEMM = "Gemm(x,w,c)*s => Gemm(x,w*s,c*s)"
AFTER_MATMUL = "(MatMul(x,w)+c)*s => MatMul(x,w*s)+c*s"
BEFORE_CONV = "Conv(x*s,w,b) => Conv(x,w*s,b)"
SHIFT_CONV = "Conv(x+t,w,b) => Conv(x,w,b+w*t), no padding"
AFFINE_CONV = "Conv(x*s+t,w,b) => Conv(x+t/s,w*s,b)"
SINGLE = "Conv(x,w,b), a pixel of a channel each => x*w+b"
BEFORE_MATMUL = "MatMul(x*s,w) => MatMul(x,s*w)"

IMAGE = "(float[b,4,5,5] x) => "


@pytest.fixture
def norm(rng):
    """The parameters of a batch normalization over ``channels``."""

    def make(channels: int) -> dict[str, np.ndarray]:
        parts = {name: rng.standard_normal(channels, np.float32) for name in ("scale", "shift", "mean")}
        return parts | {"var": rng.random(channels, np.float32) + 0.1}

    return make


@pytest.fixture
def image(rng):
    return {"x": rng.standard_normal((2, 4, 5, 5), np.float32)}


BN = "BatchNormalization<epsilon=0.001>({}, scale, shift, mean, var)"


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_batch_norm_after_conv(op_type, bias, group, norm, image, build, check, rng):
    extra = {"bias": rng.standard_normal(8, np.float32)} if bias else {}
    shape = (8, 4 // group, 3, 3) if op_type == "Conv" else (4, 8 // group, 3, 3)
    inputs = "x, w, bias" if bias else "x, w"
    text = f"c = {op_type}<group={group}, pads=[1,1,1,1]>({inputs}) y = {BN.format('c')}"
    model = build(
        IMAGE + f"(float[b,8,5,5] y) {{ {text} }}", w=rng.standard_normal(shape, np.float32), **extra, **norm(8)
    )
    check(model, fold_batch_norm_pass(), image, fired={BN_CONV: 1}, ops=[op_type], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "text", ["c = Gemm<transB=1>(x, wt, b)", "c = Gemm<beta=2.0, alpha=0.5>(x, w, b)", "c = Gemm(x, w)"]
)
def test_batch_norm_after_gemm(text, norm, build, check, rng):
    every = {"w": (4, 6), "wt": (6, 4), "b": (6,)}
    used = {n: rng.standard_normal(s, np.float32) for n, s in every.items() if f", {n}" in text.replace(")", ",")}
    used = {n: a for n, a in used.items() if n != "w" or "wt" not in text}
    model = build(f"(float[b,4] x) => (float[b,6] y) {{ {text} y = {BN.format('c')} }}", **used, **norm(6))
    feeds = {"x": rng.standard_normal((3, 4), np.float32)}
    check(model, fold_batch_norm_pass(), feeds, fired={BN_GEMM: 1}, ops=["Gemm"], atol=1e-4, rtol=1e-4)


def test_batch_norm_that_stays_becomes_two_operations(norm, image, build, check):
    model = build(IMAGE + f"(float[b,4,5,5] y) {{ r = Relu(x) y = {BN.format('r')} }}", **norm(4))
    ops = ["Relu", "Mul", "Add"]
    check(model, fold_batch_norm_pass(), image, fired={BN_ALONE: 1}, ops=ops, atol=1e-5, rtol=1e-5)


def test_batch_norm_before_conv(norm, image, build, check, rng):
    weight = rng.standard_normal((8, 2, 3, 3), np.float32)
    model = build(IMAGE + f"(float[b,8,3,3] y) {{ n = {BN.format('x')} y = Conv<group=2>(n, w) }}", w=weight, **norm(4))
    fired = {BN_ALONE: 1, SHIFT_CONV: 1, BEFORE_CONV: 1}
    check(model, fold_batch_norm_pass(), image, fired=fired, ops=["Conv"], atol=1e-4, rtol=1e-4)


def test_batch_norm_before_padded_conv_keeps_the_shift(norm, image, build, check, rng):
    weight = rng.standard_normal((8, 4, 3, 3), np.float32)
    text = f"n = {BN.format('x')} y = Conv<pads=[1,1,1,1]>(n, w)"
    model = build(IMAGE + f"(float[b,8,5,5] y) {{ {text} }}", w=weight, **norm(4))
    fired = {BN_ALONE: 1, AFFINE_CONV: 1}
    result = check(model, fold_batch_norm_pass(), image, fired=fired, ops=["Add", "Conv"], atol=1e-4, rtol=1e-4)
    assert any("pads with zeros" in skip.reason for skip in result.skipped)


def test_batch_norm_in_training_mode_stays(norm, build):
    text = "y, m, v = BatchNormalization<training_mode=1>(x, scale, shift, mean, var)"
    result = fold_batch_norm_pass().call(build(IMAGE + f"(float[b,4,5,5] y, float[4] m) {{ {text} }}", **norm(4)))
    assert not result.fired
    assert "training mode" in result.skipped[0].reason


def test_batch_norm_with_computed_scale_stays(norm, image, build, check, rng):
    text = "(float[b,4,5,5] x, float[4] scale) => (float[b,4,5,5] y) { y = " + BN.format("x") + " }"
    parts = {name: array for name, array in norm(4).items() if name != "scale"}
    feeds = image | {"scale": rng.standard_normal(4, np.float32)}
    result = check(build(text, **parts), fold_batch_norm_pass(), feeds, fired={})
    assert "not constant" in result.skipped[0].reason


@pytest.mark.parametrize(
    ("inputs", "ops"), [("x, w", ["Mul", "Relu"]), ("x, w, zero", ["Mul", "Relu"]), ("x, w, b", ["Add", "Mul", "Relu"])]
)
def test_conv_that_sums_nothing_is_a_scale_and_a_shift(inputs, ops, image, build, check, rng):
    constants = {"w": rng.standard_normal((4, 1, 1, 1), np.float32), "b": rng.standard_normal(4, np.float32)}
    constants["zero"] = np.zeros(4, np.float32)
    used = {name: array for name, array in constants.items() if name in inputs.split(", ")}
    for padding in ("", ", auto_pad='SAME_UPPER'"):
        text = f"c = Conv<group=4{padding}>({inputs}) y = Relu(c)".replace("'", '"')
        model = build(IMAGE + f"(float[b,4,5,5] y) {{ {text} }}", **used)
        check(model, fold_batch_norm_pass(), image, fired={SINGLE: 1}, ops=ops, atol=1e-6)


def test_conv_that_sums_nothing_folds_with_its_neighbours(image, build, check, rng):
    constants = {name: rng.standard_normal((4, 4, 3, 3), np.float32) for name in "uv"}
    constants |= {"w": rng.standard_normal((4, 1, 1, 1), np.float32), "b": rng.standard_normal(4, np.float32)}
    model = build(
        IMAGE + "(float[b,4,1,1] y) { c = Conv(x, u) d = Conv<group=4>(c, w, b) y = Conv(d, v) }", **constants
    )
    fired = {SINGLE: 1, SHIFT_CONV: 1, AFTER_CONV: 1}
    check(model, fold_batch_norm_pass(), image, fired=fired, ops=["Conv", "Conv"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("attributes", "shape", "out", "why"),
    [
        ("group=4, pads=[1,1,1,1]", (4, 1, 1, 1), "4,7,7", "pads"),
        ("group=4, strides=[2,2]", (4, 1, 1, 1), "4,3,3", "leaves pixels out"),
        ("group=4", (8, 1, 1, 1), "8,5,5", None),
        ("group=2", (4, 2, 1, 1), "4,5,5", None),
        ("group=4", (4, 1, 1, 2), "4,5,4", None),
    ],
)
def test_conv_that_does_more_stays(attributes, shape, out, why, image, build, check, rng):
    model = build(
        IMAGE + f"(float[b,{out}] y) {{ y = Conv<{attributes}>(x, w) }}", w=rng.standard_normal(shape, np.float32)
    )
    result = check(model, fold_batch_norm_pass(), image, fired={}, atol=1e-6)
    assert any(why in skip.reason for skip in result.skipped) if why else not result.skipped


def test_conv_with_a_computed_bias_stays(image, build, check, rng):
    text = "(float[b,4,5,5] x, float[4] c) => (float[b,4,5,5] y) { y = Conv<group=4>(x, w, c) }"
    model = build(text, w=rng.standard_normal((4, 1, 1, 1), np.float32))
    feeds = image | {"c": rng.standard_normal(4, np.float32)}
    result = check(model, fold_batch_norm_pass(), feeds, fired={}, atol=1e-6)
    assert "bias is not constant" in result.skipped[0].reason


@pytest.mark.parametrize("op", ["Mul(c, s)", "Mul(s, c)", "Div(c, s)"])
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1), ()])
def test_scale_after_conv(op, shape, image, build, check, rng):
    constants = {"w": rng.standard_normal((8, 4, 3, 3), np.float32), "b": rng.standard_normal(8, np.float32)}
    constants["s"] = np.array(rng.random(shape) + 0.5, np.float32)
    model = build(IMAGE + f"(float[b,8,3,3] y) {{ c = Conv(x, w, b) y = {op} }}", **constants)
    check(model, fold_batch_norm_pass(), image, fired={AFTER_CONV: 1}, ops=["Conv"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["g = Gemm(x, w, c) y = Mul(g, s)", "g = Gemm<beta=0.5>(x, w, c) y = Div(g, s)"])
def test_scale_after_gemm(text, build, check, rng):
    constants = {"w": rng.standard_normal((4, 6), np.float32), "c": rng.standard_normal(6, np.float32)}
    model = build("(float[b,4] x) => (float[b,6] y) {" + text + "}", s=rng.random(6, np.float32) + 0.5, **constants)
    feeds = {"x": rng.standard_normal((3, 4), np.float32)}
    check(model, fold_batch_norm_pass(), feeds, fired={AFTER_GEMM: 1}, ops=["Gemm"], atol=1e-5)


@pytest.mark.parametrize("size", [6, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_scale_after_matmul(bias, size, build, check, rng):
    constants = {"w": rng.standard_normal((4, 6), np.float32), "s": rng.random(size, np.float32) + 0.5}
    if bias:
        constants["c"] = rng.standard_normal(6, np.float32)
    text = "m = MatMul(x, w) " + ("a = Add(c, m) y = Mul(a, s)" if bias else "y = Mul(s, m)")
    model = build("(float[b,3,4] x) => (float[b,3,6] y) {" + text + "}", **constants)
    ops = ["MatMul", "Add"] if bias else ["MatMul"]
    feeds = {"x": rng.standard_normal((2, 3, 4), np.float32)}
    check(model, fold_batch_norm_pass(), feeds, fired={AFTER_MATMUL: 1}, ops=ops, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_scale_before_conv(op_type, group, image, build, check, rng):
    shape = (8, 4 // group, 3, 3) if op_type == "Conv" else (4, 8 // group, 3, 3)
    constants = {"w": rng.standard_normal(shape, np.float32), "s": rng.standard_normal((4, 1, 1), np.float32)}
    text = f"m = Mul(x, s) y = {op_type}<group={group}, pads=[1,1,1,1]>(m, w)"
    model = build(IMAGE + f"(float[b,8,5,5] y) {{ {text} }}", **constants)
    check(model, fold_batch_norm_pass(), image, fired={BEFORE_CONV: 1}, ops=[op_type], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("op", ["Add(t, x)", "Sub(x, t)"])
@pytest.mark.parametrize("group", [1, 2])
def test_shift_before_conv(op, group, image, build, check, rng):
    constants = {
        "w": rng.standard_normal((8, 4 // group, 3, 3), np.float32),
        "t": rng.standard_normal((4, 1, 1), np.float32),
    }
    model = build(IMAGE + f"(float[b,8,3,3] y) {{ a = {op} y = Conv<group={group}>(a, w) }}", **constants)
    check(model, fold_batch_norm_pass(), image, fired={SHIFT_CONV: 1}, ops=["Conv"], atol=1e-4, rtol=1e-4)


def test_affine_with_a_zero_scale_stays(image, build, check, rng):
    constants = {"w": rng.standard_normal((8, 4, 3, 3), np.float32), "t": np.ones((4, 1, 1), np.float32)}
    constants["s"] = np.array([1, 0, 2, 3], np.float32).reshape(4, 1, 1)
    text = "m = Mul(x, s) a = Add(m, t) y = Conv<pads=[1,1,1,1]>(a, w)"
    model = build(IMAGE + f"(float[b,8,5,5] y) {{ {text} }}", **constants)
    result = check(model, fold_batch_norm_pass(), image, fired={})
    assert any("a factor is zero" in skip.reason for skip in result.skipped)


@pytest.mark.parametrize("text", ["y = MatMul(m, w)", "y = Gemm(m, w)", "y = Gemm<transB=1>(m, wt)"])
def test_scale_before_matmul(text, build, check, rng):
    name, shape = ("wt", (6, 4)) if "wt" in text else ("w", (4, 6))
    constants = {name: rng.standard_normal(shape, np.float32), "s": rng.standard_normal(4, np.float32)}
    model = build("(float[b,4] x) => (float[b,6] y) { m = Mul(x, s) " + text + "}", **constants)
    feeds = {"x": rng.standard_normal((3, 4), np.float32)}
    check(model, fold_batch_norm_pass(), feeds, fired={BEFORE_MATMUL: 1}, atol=1e-5)


def test_float16_is_computed_in_float64(build, rng):
    weight, scale = rng.standard_normal((8, 4, 1, 1)).astype(np.float16), np.array(1 / 3, np.float16)
    text = "(float16[b,4,5,5] x) => (float16[b,8,5,5] y) { c = Conv(x, w) y = Div(c, s) }"
    model = build(text, w=weight, s=scale)
    assert fold_batch_norm_pass().call(model).fired == {AFTER_CONV: 1}
    expected = (weight.astype(np.float64) / np.float64(scale)).astype(np.float16)
    np.testing.assert_array_equal(model.graph.node(0).inputs[1].const_value.numpy(), expected)


@pytest.mark.parametrize(
    ("text", "outputs", "reason"),
    [
        ("c = Conv(x, w) y = Mul(c, s)", "y,c", "graph output"),
        ("c = Conv(x, w) y = Mul(c, s) z = Neg(c)", "y,z", "also used by Neg"),
        ("c = Conv(x, w) y = Mul(c, row)", "y", "not one per output channel"),
        ("c = Conv(x, w) y = Mul(c, s) z = Conv(x, w)", "y,z", "is shared"),
        ("m = Mul(x, row) y = Conv(m, v)", "y", "not one per input channel"),
        ("m = Mul(x, s1) y = Conv(m, v) z = Neg(m)", "y,z", "also used by Neg"),
        ("a = Add(x, row) y = Conv(a, v)", "y", "not one per input channel"),
    ],
)
def test_near_misses(text, outputs, reason, image, build, check, rng):
    shapes = {"w": (8, 4, 1, 1), "v": (8, 4, 1, 1), "s": (8, 1, 1), "s1": (4, 1, 1), "row": (5,)}
    used = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items() if f" {n})" in text or f", {n})" in text}
    outs = ", ".join(f"float[b,{4 if 'Neg(m)' in text and o == 'z' else 8},5,5] {o}" for o in outputs.split(","))
    model = build(IMAGE + f"({outs}) {{ {text} }}", **used)
    result = check(model, fold_batch_norm_pass(), image, fired={})
    assert any(reason in skip.reason for skip in result.skipped)


def test_small_shared_weight_is_copied(build, check, rng):
    constants = {"w": rng.standard_normal((8, 4, 1, 1), np.float32), "s": rng.standard_normal((8, 1, 1), np.float32)}
    head = "(float[2,4,5,5] x) => (float[2,8,5,5] y, float[2,8,5,5] z) "
    model = build(head + "{ c = Conv(x, w) y = Mul(c, s) z = Conv(x, w) }", **constants)
    feeds = {"x": rng.standard_normal((2, 4, 5, 5), np.float32)}
    check(model, fold_batch_norm_pass(), feeds, fired={AFTER_CONV: 1}, ops=["Conv", "Conv"], atol=1e-5)


def test_computed_weight_stays(image, build, check, rng):
    text = "(float[b,4,5,5] x, float[8,4,1,1] w) => (float[b,8,5,5] y) { c = Conv(x, w) y = Mul(c, s) }"
    model = build(text, s=rng.standard_normal((8, 1, 1), np.float32))
    feeds = image | {"w": rng.standard_normal((8, 4, 1, 1), np.float32)}
    result = check(model, fold_batch_norm_pass(), feeds, fired={})
    assert result.skipped


@pytest.mark.parametrize(
    ("signature", "shape", "text"),
    [
        ("(float[n,4] x) => (float[1,n,6] y)", (1, 1, 6), "m = MatMul(x, w) y = Mul(m, s)"),
        ("(float[n,4] x) => (float[1,n,6] y)", (1, 1, 4), "m = Mul(x, s) y = MatMul(m, w)"),
        ("(float[4,3,3,3] x) => (float[1,6,3,3,3] y)", (1, 4, 1, 1, 1), "m = Mul(x, s) y = Conv(m, w)"),
        ("(float[4,3,3,3] x) => (float[1,6,3,3,3] y)", (1, 4, 1, 1, 1), "m = Add(x, s) y = Conv(m, w)"),
        ("(float[4,3,3,3] x) => (float[1,6,3,3,3] y)", (1, 4, 1, 1, 1), "l = Mul(x, h) m = Add(l, s) y = Conv(m, w)"),
    ],
)
def test_constant_of_higher_rank_stays(signature, shape, text, build, check, rng):
    weight = rng.standard_normal((6, 4, 1, 1, 1) if "Conv" in text else (4, 6), np.float32)
    constants = {"w": weight, "s": rng.standard_normal(shape, np.float32)}
    if "h)" in text:
        constants["h"] = np.array(2, np.float32)
    feeds = {"x": rng.standard_normal((4, 3, 3, 3) if "Conv" in text else (2, 4), np.float32)}
    result = check(build(f"{signature} {{ {text} }}", **constants), fold_batch_norm_pass(), feeds, fired={})
    assert any("the constant widens" in skip.reason for skip in result.skipped)
