"""Shape arithmetic with symbolic dims."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.simplify import dead_code
from optc.passes.simplify.contents import Contents
from optc.passes.simplify.fold_shapes import PASS

CONSTANT = "shape arithmetic => constant"
RESHAPE = "reshape(x, dims) => reshape(x, constant)"
EXPAND = "expand(x, dims) => x or expand(x, constant)"
SLICE = "slice(x, 0, dim) => slice(x, constant)"
RESIZE = "resize(x, sizes = k * dims) => resize(x, scales = k)"
MERGE = "equal shape arithmetic => the first"

I = {f"i{n}": np.array([n]) for n in range(4)}  # noqa: E741


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def constants(text: str, **more: np.ndarray) -> dict[str, np.ndarray]:
    known = {
        **I,
        "s0": np.array(0),
        "s1": np.array(1),
        "s2": np.array(2),
        "m1": np.array([-1]),
        "h8": np.array([8]),
        "h64": np.array([64]),
        **more,
    }
    words = text.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return {name: value for name, value in known.items() if name in words}


def test_static_shape_becomes_constant(build, check):
    text = "(float[4,6] x) => (float[n] y) { s = Shape(x) p = ReduceProd(s) y = Reshape(x, p) }"
    model = build(text)
    check(model, PASS, {"x": data(4, 6)}, fired={CONSTANT: 2}, ops=["Reshape"])


def test_torch_style_head_split(build, check):
    text = """(float[b,s,512] x) => (float[b,8,s,64] y) {
      sh = Shape(x) bb = Gather(sh, i0) ss = Gather(sh, i1) t = Concat<axis=0>(bb, ss, h8, h64)
      r = Reshape(x, t) y = Transpose<perm=[0,2,1,3]>(r) }"""
    model = build(text, **constants(text))
    check(model, PASS, {"x": data(2, 3, 512)}, ops=["Reshape", "Transpose"], more_feeds=({"x": data(1, 1, 512)},))
    shape = model.graph[0].inputs[1].const_value.numpy()
    assert shape.tolist() == [0, 0, 8, 64]


def test_paddle_style_flatten(build, check):
    text = """(float[b,c,h,w] x) => (float[b,n] y) {
      sh = Shape(x) bb = Slice(sh, i0, i1) t = Concat<axis=0>(bb, m1) y = Reshape(x, t) }"""
    model = build(text, **constants(text))
    check(model, PASS, {"x": data(2, 3, 4, 5)}, ops=["Reshape"])


def test_one_product_is_deduced(build, check):
    text = """(float[b,s,8] x) => (float[n,8] y) {
      sh = Shape(x) bb = Gather(sh, i0) ss = Gather(sh, i1) n = Mul(bb, ss) t = Concat<axis=0>(n, h8) y
          = Reshape(x, t) }"""
    model = build(text, **constants(text))
    check(model, PASS, {"x": data(2, 3, 8)}, fired={RESHAPE: 1}, ops=["Reshape"])


def test_two_unknown_sizes_stay(build, check):
    text = """(float[n] x, float[b,s] z) => (float[b,s] y) { sh = Shape(z) y = Reshape(x, sh) }"""
    model = build(text)
    result = check(model, PASS, {"x": data(6), "z": data(2, 3)}, fired={}, ops=["Reshape", "Shape"])
    assert "more than one symbolic size" in result.skipped[0].reason


def test_reshape_with_zero_and_allowzero_stays(build, check):
    text = """(float[b,0] x) => (float[0,b] y) {
      sh = Shape(x) bb = Gather(sh, i0) t = Concat<axis=0>(i0, bb) y = Reshape<allowzero=1>(x, t) }"""
    result = check(
        build(text, **constants(text)), PASS, {"x": data(3, 0)}, ops=["Concat", "Gather", "Reshape", "Shape"]
    )
    assert any("size 0" in s.reason for s in result.skipped)


def test_expand_to_own_shape_is_removed(build, check):
    text = "(float[b,s] x) => (float[b,s] y) { sh = Shape(x) e = Expand(x, sh) y = Relu(e) }"
    check(build(text), PASS, {"x": data(2, 3)}, fired={EXPAND: 1}, ops=["Relu"])


def test_expand_by_lower_rank_and_ones_is_removed(build, check):
    text = "(float[b,s] x) => (float[b,s] y) { e = Expand(x, i1) y = Relu(e) }"
    check(build(text, **constants(text)), PASS, {"x": data(2, 3)}, fired={EXPAND: 1}, ops=["Relu"])


def test_expand_of_a_static_axis_gets_a_constant(build, check):
    text = (
        "(float[b,1] x) => (float[b,8] y) { sh = Shape(x) bb = Gather(sh, i0) t = "
        "Concat<axis=0>(bb, h8) y = Expand(x, t) }"
    )
    check(build(text, **constants(text)), PASS, {"x": data(2, 1)}, fired={EXPAND: 1}, ops=["Expand"])


def test_expand_of_a_one_by_a_symbol_stays(build, check):
    text = "(float[1,s] x, float[b,s] z) => (float[b,s] y) { sh = Shape(z) y = Expand(x, sh) }"
    feeds = {"x": data(1, 3), "z": data(2, 3)}
    check(build(text), PASS, feeds, fired={}, ops=["Expand", "Shape"])


def test_expand_adding_an_axis_stays(build, check):
    text = "(float[s] x) => (float[2,s] y) { sh = Shape(x) t = Concat<axis=0>(i2, sh) y = Expand(x, t) }"
    check(build(text, **constants(text)), PASS, {"x": data(3)}, fired={EXPAND: 1}, ops=["Expand"])


@pytest.mark.parametrize("k", [0, 1, 2])
def test_slice_near_the_end(build, check, k):
    text = (
        "(float[b,s] x) => (float[b,n] y) { sh = Shape(x) e0 = Gather(sh, i1) e = Sub(e0, k) y = Slice(x, i0, e, i1) }"
    )
    model = build(text, **constants(text, k=np.array([k])))
    feeds = tuple({"x": data(2, n)} for n in (1, 2, 3))
    check(model, PASS, {"x": data(2, 5)}, fired={SLICE: 1}, ops=["Slice"], more_feeds=feeds)


def test_slice_beyond_the_end(build, check):
    text = (
        "(float[b,s] x) => (float[b,n] y) { sh = Shape(x) e0 = Gather(sh, i1) e = Add(e0, i3) y = Slice(x, i0, e, i1) }"
    )
    check(build(text, **constants(text)), PASS, {"x": data(2, 5)}, fired={SLICE: 1}, ops=["Slice"])


def test_slice_far_from_the_end_stays(build, check):
    text = (
        "(float[b,s] x) => (float[b,n] y) { sh = Shape(x) e0 = Gather(sh, i1) e = Sub(e0, i3) y = Slice(x, i0, e, i1) }"
    )
    model = build(text, **constants(text))
    result = check(model, PASS, {"x": data(2, 2)}, more_feeds=({"x": data(2, 7)},))
    assert SLICE not in result.fired


def test_slice_with_int32_parameters(build, check):
    text = """(float[b,s] x) => (float[b,n] y) {
      sh = Shape(x) e0 = Gather(sh, i1) e = Cast<to=6>(e0) y = Slice(x, z, e, one) }"""
    model = build(text, **constants(text, z=np.array([0], np.int32), one=np.array([1], np.int32)))
    check(model, PASS, {"x": data(2, 5)}, fired={SLICE: 1}, ops=["Slice"])


def test_overflowing_arithmetic_stays(build):
    text = "(float[4,6] x) => (int64[1] y) { sh = Shape(x) n = Concat<axis=0>(sh, k) y = ReduceProd(n) }"
    model = build(text, **constants(text, k=np.array([2**62])))
    result = PASS.call(model)
    assert result.fired == {CONSTANT: 2}
    assert result.skipped[0].reason == "the arithmetic overflows"


def test_slice_at_half_stays(build, check):
    text = (
        "(float[b,s] x) => (float[b,n] y) { sh = Shape(x) e0 = Gather(sh, i1) e = Div(e0, i2) y = Slice(x, i0, e, i1) }"
    )
    assert SLICE not in check(build(text, **constants(text)), PASS, {"x": data(2, 5)}).fired


UPSAMPLE = """(float[b,c,h,w] x) => (float[b,c,H,W] y) {{
  sh = Shape(x) hw = Slice(sh, i2, i4) bc = Slice(sh, i0, i2) t = Mul(hw, {k}) s = Concat<axis=0>(bc, t)
  y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, , , s) }}"""


def test_resize_by_two(build, check):
    text = UPSAMPLE.format(k="i2")
    model = build(text, **constants(text, i4=np.array([4])))
    check(model, PASS, {"x": data(1, 2, 3, 5)}, fired={RESIZE: 1}, ops=["Resize"])
    assert model.graph[0].inputs[2].const_value.numpy().tolist() == [1, 1, 2, 2]


def test_resize_by_three_stays(build, check):
    text = UPSAMPLE.format(k="i3")
    model = build(text, **constants(text, i4=np.array([4])))
    assert RESIZE not in check(model, PASS, {"x": data(1, 2, 3, 5)}).fired


def test_equal_contents_are_computed_once(build, check):
    text = """(float[b,s] x) => (int64[b2] y) {
      r = Relu(x) sx = Shape(x) sr = Shape(r) bx = Gather(sx, i0) br = Gather(sr, i0) p = Mul(bx, i2) q = Mul(br, i2)
      y = Concat<axis=0>(p, q) }"""
    model = build(text, **constants(text))
    check(model, PASS, {"x": data(2, 3)}, ops=["Concat", "Gather", "Mul", "Shape"])


def test_a_size_is_read_off_the_input(build, check):
    text = "(float[b,s] x) => (int64[1] y, float[b,s] z) { z = Relu(x) sz = Shape(z) y = Slice(sz, i1, i2) }"
    model = build(text, **constants(text))
    check(model, PASS, {"x": data(2, 3)}, fired={MERGE: 2}, ops=["Relu", "Shape"])
    assert model.graph.node(1).inputs[0] is model.graph.inputs[0]


def test_scalar_size_for_range_is_read_off_the_input(build, check):
    text = """(float[b,s] x) => (int64[s] y, float[b,s] z) {
      z = Relu(x) sz = Shape(z) n = Gather(sz, s1) y = Range(s0, n, s1) }"""
    model = build(text, **constants(text))
    check(model, PASS, {"x": data(2, 3)}, ops=["Gather", "Range", "Relu", "Shape"])


def test_condition_on_sizes_is_decided(build, check):
    text = """(float[b,s] x) => (int64[2] y) { sh = Shape(x) e = Equal(sh, m1) w = Where(e, one, sh) y = Mul(w, i2) }"""
    model = build(text, **constants(text, one=np.array([1, 1])))
    contents = Contents(model)
    assert [str(e) for e in contents.get(model.graph.outputs[0])] == ["2*b", "2*s"]
    check(model, PASS, {"x": data(2, 3)}, ops=["Mul", "Shape"])


def test_undecidable_comparison_stays(build, check):
    text = "(float[b,s] x) => (bool[2] y) { sh = Shape(x) y = Equal(sh, i2) }"
    check(build(text, **constants(text)), PASS, {"x": data(2, 3)}, fired={})


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("Div(n, i2)", "floor(s/2)"),
        ("Add(n, i1)", "s + 1"),
        ("Max(n, i1)", "s"),
        ("Min(n, i0)", "0"),
        ("Mod(n, i2)", "Mod(s, 2)"),
        ("Neg(n)", "-s"),
        ("Concat<axis=0>(n, i3)", "s 3"),
        ("Sub(n, n)", "0"),
        ("Unsqueeze(n, i0)", "s"),
        ("Size(x)", "b*s"),
    ],
)
def test_contents(build, expression, expected):
    text = f"(float[b,s] x) => (int64[n] y) {{ sh = Shape(x) n = Gather(sh, i1) y = {expression} }}"
    model = build(text, **constants(text))
    assert " ".join(str(e) for e in Contents(model).get(model.graph.outputs[0]).reshape(-1)) == expected


def test_float_detour(build, check):
    text = """(float[b,s] x) => (int64[1] y) {
      sh = Shape(x) n = Gather(sh, i1) f = Cast<to=1>(n) h = Mul(f, half) g = Floor(h) y = Cast<to=7>(g) }"""
    model = build(text, **constants(text, half=np.float32([0.5])))
    assert str(Contents(model).get(model.graph.outputs[0])[0]) == "floor(s/2)"


@pytest.mark.parametrize("factor", [0.3, np.inf])
def test_inexact_float_detour_is_unknown(build, factor):
    text = """(float[b,s] x) => (int64[1] y) {
      sh = Shape(x) n = Gather(sh, i1) f = Cast<to=1>(n) h = Mul(f, k) g = Floor(h) y = Cast<to=7>(g) }"""
    model = build(text, **constants(text, k=np.float32([factor])))
    assert Contents(model).get(model.graph.outputs[0]) is None


def test_negative_division_is_unknown(build):
    text = "(float[b,s] x) => (int64[1] y) { sh = Shape(x) n = Gather(sh, i1) m = Sub(n, i3) y = Div(m, i2) }"
    model = build(text, **constants(text))
    assert Contents(model).get(model.graph.outputs[0]) is None


def test_a_size_found_at_run_time_may_be_zero(build):
    text = """(float[b] x) => (bool[1] y) {
      nz = NonZero(x) sh = Shape(nz) n = Gather(sh, i1) y = Greater(n, i0) }"""
    model = build(text, **constants(text))
    assert Contents(model).get(model.graph.outputs[0]) is None


def test_inside_a_branch(build, check):
    text = """(bool c, float[b,s,8] x) => (float[n,8] y) {
      y = If (c) <then_branch = t () => (float[n1,8] p) { sh1 = Shape(x) b1 = Gather(sh1, i0) t1 =
          Concat<axis=0>(m1, h8) p = Reshape(x, t1) },
                  else_branch = e () => (float[n2,8] q) { sh2 = Shape(x) b2 = Gather(sh2, i0) c2 =
                  Gather(sh2, i1) m2 = Mul(b2, c2) t2 = Concat<axis=0>(m2, h8) q = Reshape(x, t2) }> }"""
    feeds = {"c": np.array(False), "x": data(2, 3, 8)}
    model = build(text, **constants(text))
    check(model, [PASS, dead_code.PASS], feeds, ops=["If", "Reshape", "Reshape"])
