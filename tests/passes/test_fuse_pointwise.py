"""1x1 convolutions before what enlarges images, and folded into the products before them."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.fuse.pointwise import pointwise_pass

BEFORE = "Conv1x1(Concat(Resize(x),y)) => Resize(Conv1x1(x))+Conv1x1(y)"
PRODUCT = "Conv1x1(MatMul(x,w)+b) => MatMul(x,w*v)+b*v"
POINTWISE = "Conv1x1(Conv1x1(x,w,b),v,c) => Conv1x1(x,v*w,v*b+c)"
F = np.float32
HEAD = "(float[2,40,4,6] x, float[2,48,8,12] y, float[2,32,8,12] z) => (float[2,8,8,12] r) "
TWICE = np.array([1, 1, 2, 2], F)


def feeds(rng, **shapes):
    return {name: rng.standard_normal(shape, F) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "resize",
    [
        "Resize<mode='nearest'>(x, , two)",
        "Resize<mode='linear'>(x, , two)",
        "Resize<mode='cubic', coordinate_transformation_mode='align_corners'>(x, , , sizes)",
        "Resize<mode='linear', axes=[2, 3]>(x, , , plane)",
    ],
)
@pytest.mark.parametrize("bias", ["", ", b"])
def test_parts_of_several_scales(resize, bias, build, check, rng):
    constants = {
        "w": rng.standard_normal((8, 120, 1, 1), F),
        "b": rng.standard_normal(8, F),
        "two": TWICE,
        "sizes": np.array([2, 40, 8, 12]),
        "plane": np.array([8, 12]),
    }
    used = {name: value for name, value in constants.items() if name in resize + bias + "w"}
    text = HEAD + "{ e = " + resize + " c = Concat<axis=1>(y, e, z) r = Conv(c, w" + bias + ") }"
    model = build(text.replace("'", '"'), **used)
    given = feeds(rng, x=(2, 40, 4, 6), y=(2, 48, 8, 12), z=(2, 32, 8, 12))
    ops = ["Add", "Concat", "Conv", "Conv", "Resize"]
    check(model, pointwise_pass(), given, fired={BEFORE: 1}, ops=ops, atol=1e-4)
    (small,) = [n for n in model.graph if n.op_type == "Conv" and n.inputs[0].name == "x"]
    assert list(small.outputs[0].shape) == [2, 8, 4, 6]


def test_every_part_is_enlarged_and_the_bias_is_added_once(build, check, rng):
    text = (
        "(float[1,32,4,6] x, float[1,32,2,3] y) => (float[1,16,8,12] r) "
        '{ e = Resize<mode="linear">(x, , two) f = Resize<mode="linear">(y, , four) '
        "c = Concat<axis=-3>(e, f) r = Conv(c, w, b) }"
    )
    four = np.array([1, 1, 4, 4], F)
    w, b = rng.standard_normal((16, 64, 1, 1), F), rng.standard_normal(16, F)
    given = feeds(rng, x=(1, 32, 4, 6), y=(1, 32, 2, 3))
    ops = ["Add", "Add", "Conv", "Conv", "Resize", "Resize"]
    check(build(text, w=w, b=b, two=TWICE, four=four), pointwise_pass(), given, fired={BEFORE: 1}, ops=ops, atol=1e-4)


def test_one_image_of_symbolic_size(build, check, rng):
    text = (
        "(float[n,64,h,w0] x) => (float[n,16,h2,w2] r) "
        '{ e = Resize<mode="nearest", coordinate_transformation_mode="asymmetric">(x, , two) r = Conv(e, w) }'
    )
    model = build(text, w=rng.standard_normal((16, 64, 1, 1), F), two=TWICE)
    more = (feeds(rng, x=(1, 64, 1, 7)),)
    check(
        model, pointwise_pass(), feeds(rng, x=(2, 64, 5, 3)), fired={BEFORE: 1}, ops=["Conv", "Resize"], atol=1e-4,
        more_feeds=more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "maps", "why"),
    [
        # More channels out than in: resizing them takes longer than what is saved.
        ('{ e = Resize<mode="linear">(x, , two) r = Conv(e, w) }', 900, "too few channels"),
        ('{ e = Resize<mode="linear">(x, , two) t = Relu(e) r = Conv(e, w) q = Add(t, e) }', 8, "is also used"),
        ('{ e = Resize<mode="linear">(x, , half) r = Conv(e, w) }', 8, None),
        ('{ e = Resize<mode="linear">(x, , two) r = Conv<pads=[1,1,1,1]>(e, w) }', 8, None),
        ('{ e = Resize<mode="linear">(x, , two) r = Conv<strides=[2,2]>(e, w) }', 8, None),
        ('{ e = Resize<mode="linear">(x, , two) s = Relu(e) r = Conv(s, w) }', 8, None),
    ],
)
def test_what_keeps_an_image_large(text, maps, why, build, check, rng):
    depth = 64 if maps == 8 else 4
    extra = ", float[2,64,8,12] q" if " q = " in text else ""
    head = f"(float[2,{depth},4,6] x) => (float[2,{maps},h,w0] r{extra}) "
    constants = {"w": rng.standard_normal((maps, depth, 1, 1), F)}
    constants |= {"half": np.array([1, 1, 0.5, 0.5], F)} if "half" in text else {"two": TWICE}
    result = check(
        build(head + text, **constants), pointwise_pass(), feeds(rng, x=(2, depth, 4, 6)), fired={}, atol=1e-4
    )
    reasons = [skipped.reason for skipped in result.skipped]
    assert any(why in reason for reason in reasons) if why else not reasons


@pytest.mark.parametrize("shift", [(), (24,), (1, 1, 24), (1,)])
@pytest.mark.parametrize("bias", [False, True])
def test_after_a_product_of_flattened_pixels(shift, bias, build, check, rng):
    constants = {
        "w": rng.standard_normal((10, 24), F),
        "v": rng.standard_normal((6, 24, 1, 1), F),
        "to": np.array([2, 24, 3, 5]),
        **({"s": rng.standard_normal(shift, F)} if shift else {}),
        **({"b": rng.standard_normal(6, F)} if bias else {}),
    }
    text = (
        "(float[2,15,10] x) => (float[2,6,3,5] r) { m = MatMul(x, w) "
        + ("a = Add(s, m) " if shift else "a = Neg(m) ").replace("a = Neg(m) ", "")
        + f"t = Transpose<perm=[0,2,1]>({'a' if shift else 'm'}) i = Reshape<allowzero=1>(t, to) "
        + ("r = Conv(i, v, b) }" if bias else "r = Conv(i, v) }")
    )
    ops = ["MatMul", "Reshape", "Transpose"] + (["Add"] if shift or bias else [])
    check(
        build(text, **constants),
        pointwise_pass(),
        feeds(rng, x=(2, 15, 10)),
        fired={PRODUCT: 1},
        ops=sorted(ops),
        atol=1e-4,
    )


def test_a_bias_of_pixels_is_none_of_channels(build, check, rng):
    constants = {
        "w": rng.standard_normal((10, 15), F),
        "v": rng.standard_normal((6, 15, 1, 1), F),
        "s": rng.standard_normal((15, 1), F),
        "to": np.array([2, 15, 3, 5]),
    }
    text = (
        "(float[2,15,10] x) => (float[2,6,3,5] r) { m = MatMul(x, w) a = Add(m, s) "
        "t = Transpose<perm=[0,2,1]>(a) i = Reshape<allowzero=1>(t, to) r = Conv(i, v) }"
    )
    result = check(build(text, **constants), pointwise_pass(), feeds(rng, x=(2, 15, 10)), fired={}, atol=1e-4)
    assert any("not one per channel" in skipped.reason for skipped in result.skipped)


def test_a_product_through_a_bottleneck_stays(build, check, rng):
    constants = {
        "w": rng.standard_normal((90, 4), F),
        "v": rng.standard_normal((60, 4, 1, 1), F),
        "to": np.array([2, 4, 3, 5]),
    }
    text = (
        "(float[2,15,90] x) => (float[2,60,3,5] r) { m = MatMul(x, w) t = Transpose<perm=[0,2,1]>(m) "
        "i = Reshape<allowzero=1>(t, to) r = Conv(i, v) }"
    )
    result = check(build(text, **constants), pointwise_pass(), feeds(rng, x=(2, 15, 90)), fired={}, atol=1e-4)
    assert any("takes more than two" in skipped.reason for skipped in result.skipped)


@pytest.mark.parametrize("first", ["Conv(x, w)", "Conv(x, w, b)"])
@pytest.mark.parametrize("second", ["Conv(f, v)", "Conv(f, v, c)"])
def test_two_pointwise_convolutions(first, second, build, check, rng):
    constants = {
        "w": rng.standard_normal((20, 8, 1, 1), F),
        "b": rng.standard_normal(20, F),
        "v": rng.standard_normal((6, 20, 1, 1), F),
        "c": rng.standard_normal(6, F),
    }
    used = {k: a for k, a in constants.items() if k in "wv" or k in first.split("w")[1] or k in second.split("v")[2]}
    text = f"(float[n,8,h,w0] x) => (float[n,6,h,w0] r) {{ f = {first} r = {second} }}"
    check(
        build(text, **used), pointwise_pass(), feeds(rng, x=(2, 8, 5, 4)), fired={POINTWISE: 1}, ops=["Conv"], atol=1e-4
    )


@pytest.mark.parametrize("first", ["Conv<pads=[1,1,1,1]>(x, w)", "Conv<group=2>(x, g)", "Conv<strides=[2,2]>(x, w)"])
def test_what_is_no_pointwise_convolution(first, build, check, rng):
    name, inner = ("g", 4) if "g)" in first else ("w", 8)
    constants = {name: rng.standard_normal((20, inner, 1, 1), F), "v": rng.standard_normal((6, 20, 1, 1), F)}
    text = f"(float[n,8,h,w0] x) => (float[n,6,h2,w2] r) {{ f = {first} r = Conv(f, v) }}"
    check(build(text, **constants), pointwise_pass(), feeds(rng, x=(2, 8, 5, 4)), fired={}, atol=1e-4)
