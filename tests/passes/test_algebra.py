"""Algebraic rules, slices and concatenations."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.simplify.algebra import PASS

X = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32) * 4}
HEAD = "(float[b,3,4] x) => (float[n] y)"

RULES = [
    ("x / 2^k => x * 2^-k", "y = Div(x, c)", {"c": np.float32(8)}, ["Mul"]),
    ("x / 2^k => x * 2^-k", "y = Div(x, c)", {"c": np.float32([0.5, -2, 4, 1024])}, ["Mul"]),
    ("1 / x => reciprocal(x)", "y = Div(c, x)", {"c": np.float32(1)}, ["Reciprocal"]),
    ("pow(x, 2) => x * x", "y = Pow(x, c)", {"c": np.float32(2)}, ["Mul"]),
    ("pow(x, 2) => x * x", "y = Pow(x, c)", {"c": np.int64(2)}, ["Mul"]),
    ("x * -1 => -x", "y = Mul(x, c)", {"c": np.float32([-1])}, ["Neg"]),
    ("x + -y => x - y", "a = Abs(x) n = Neg(a) y = Add(n, x)", {}, ["Abs", "Sub"]),
    ("x + -y => x - y", "a = Abs(x) n = Neg(a) y = Sub(x, n)", {}, ["Abs", "Add"]),
    ("clip(x, 0) => relu(x)", "y = Clip(x, c)", {"c": np.float32(0)}, ["Relu"]),
    ("clip(clip(x)) => clip(x)", "a = Relu(x) y = Clip(a, , c)", {"c": np.float32(6)}, ["Clip"]),
    ("clip(clip(x)) => clip(x)", "a = Clip(x, , c) y = Relu(a)", {"c": np.float32(6)}, ["Clip"]),
    ("clip(clip(x)) => clip(x)", "a = Clip(x, , c) y = Relu(a)", {"c": np.float32(-1)}, ["Clip"]),
    (
        "clip(clip(x)) => clip(x)",
        "a = Clip(x, c, d) y = Clip(a, d, e)",
        {"c": np.float32(-9), "d": np.float32(1), "e": np.float32(2)},
        ["Clip"],
    ),
    ("clip(clip(x)) => clip(x)", "a = Max(x, c) y = Min(d, a)", {"c": np.float32(0), "d": np.float32([6])}, ["Clip"]),
    ("clip(clip(x)) => clip(x)", "a = Max(c, x) y = Relu(a)", {"c": np.float32(-3)}, ["Relu"]),
    (
        "where(constant, a, b) => a or b",
        "a = Neg(x) e = Where(c, x, a) y = Abs(e)",
        {"c": np.ones((1, 4), bool)},
        ["Abs"],
    ),
    (
        "where(constant, a, b) => a or b",
        "a = Neg(x) e = Where(c, x, a) y = Abs(e)",
        {"c": np.array(False)},
        ["Abs", "Neg"],
    ),
    (
        "where(!c, a, b) => where(c, b, a)",
        ("p = Greater(x, c) q = Not(p) n = Neg(x) y = Where(q, x, n)"),
        {"c": np.float32(0)},
        ["Greater", "Neg", "Where"],
    ),
    ("gather(x, [k, k+1, ...]) => slice(x)", "y = Gather<axis=2>(x, c)", {"c": np.array([1, 2])}, ["Slice"]),
    ("gather(x, [k, k+1, ...]) => slice(x)", "y = Gather<axis=2>(x, c)", {"c": np.array([-2, -1])}, ["Slice"]),
    ("gather(x, [k, k+1, ...]) => slice(x)", "y = Gather<axis=2>(x, c)", {"c": np.array([-3, -2])}, ["Slice"]),
    (
        "gather(x, [k, k+1, ...]) => slice(x)",
        "a = Gather<axis=1>(x, c) y = Neg(a)",
        {"c": np.array([0, 1, 2])},
        ["Neg"],
    ),
    (
        "slice(slice(x)) of other axes => slice(x)",
        "a = Slice(x, c, d, c) y = Slice(a, c, d, d)",
        {"c": np.array([1]), "d": np.array([2])},
        ["Slice"],
    ),
    (
        "concat(concat(a, b), c) => concat(a, b, c)",
        ("a = Neg(x) e = Concat<axis=1>(x, a) y = Concat<axis=-2>(e, x)"),
        {},
        ["Concat", "Neg"],
    ),
]


@pytest.mark.parametrize(("rule", "body", "constants", "ops"), RULES)
def test_rule(build, check, rule, body, constants, ops):
    model = build(f"{HEAD} {{ {body} }}", **constants)
    check(model, PASS, X, fired={rule: 1}, ops=ops)


def test_relu6_bounds(build):
    model = build(f"{HEAD} {{ a = Relu(x) y = Clip(a, , c) }}", c=np.float32(6))
    PASS.call(model)
    assert [v.const_value.numpy().item() for v in model.graph[0].inputs[1:]] == [0, 6]


NEGATIVE = [
    ("y = Div(x, c)", {"c": np.float32(3)}),
    ("y = Div(x, c)", {"c": np.float32([1, 2, 4, 6])}),
    ("y = Div(x, c)", {"c": np.float32(2.0**-127)}),  # the reciprocal would not be exact
    ("y = Div(c, x)", {"c": np.ones((2, 1, 1, 1), np.float32)}),
    ("y = Pow(x, c)", {"c": np.float32(3)}),
    ("y = Pow(x, c)", {"c": np.full((2, 1, 1, 1), 2, np.float32)}),
    ("y = Mul(x, c)", {"c": np.full((2, 1, 1, 1), -1, np.float32)}),
    ("y = Clip(x, c)", {"c": np.float32(1)}),
    ("y = Clip(x, c, d)", {"c": np.float32(0), "d": np.float32(1)}),
    ("a = Clip(x, c, d) y = Relu(a)", {"c": np.float32(2), "d": np.float32(1)}),
    ("y = Where(c, x, x)", {"c": np.array([True, False, True, True])}),
    ("y = Where(c, x, x)", {"c": np.ones((2, 1, 1, 1), bool)}),
    ("y = Gather<axis=2>(x, c)", {"c": np.array([2, 1])}),
    ("y = Gather<axis=2>(x, c)", {"c": np.array([-1, 0])}),
    ("y = Gather<axis=2>(x, c)", {"c": np.array(1)}),
    ("y = Gather<axis=2>(x, c)", {"c": np.array([[1, 2]])}),
    ("a = Slice(x, c, d, c) y = Slice(a, z, c, c)", {"c": np.array([1]), "d": np.array([3]), "z": np.array([0])}),
    ("a = Neg(x) e = Concat<axis=2>(x, a) y = Concat<axis=1>(e, e)", {}),
    ("a = Neg(x) e = Concat<axis=1>(x, a) y = Concat<axis=1>(e, e)", {}),  # needed twice
    ("a = Max(x, c) y = Min(a, d)", {"c": np.float32(0), "d": np.float32([1, 2, 3, 4])}),
    ("a = Max(x, c, d) y = Relu(a)", {"c": np.float32(0), "d": np.float32(1)}),
]


@pytest.mark.parametrize(("body", "constants"), NEGATIVE)
def test_kept(build, check, body, constants):
    check(build(f"{HEAD} {{ {body} }}", **constants), PASS, X, fired={}, rtol=1e-4)


def test_integer_operands_stay(build, check):
    model = build("(int64[b] x) => (int64[b] y) { a = Div(x, c) y = Pow(a, c) }", c=np.array(2))
    check(model, PASS, {"x": np.array([5, -5])}, fired={})


def test_clip_with_computed_bound_stays(build, check):
    model = build("(float[b,3,4] x, float hi) => (float[n] y) { a = Relu(x) y = Clip(a, , hi) }")
    check(model, PASS, {**X, "hi": np.array(6, np.float32)}, fired={})


def test_clip_chain_with_fan_out_stays(build, check):
    model = build(
        "(float[b,3,4] x) => (float[n] y, float[n] z) { a = Relu(x) y = Clip(a, , c) z = Neg(a) }", c=np.float32(6)
    )
    result = check(model, PASS, X, fired={})
    assert "elsewhere" in result.skipped[0].reason


def test_clip_chain_over_a_graph_output_stays(build, check):
    model = build("(float[b,3,4] x) => (float[n] a, float[n] y) { a = Relu(x) y = Clip(a, , c) }", c=np.float32(6))
    check(model, PASS, X, fired={})


def test_clip_to_not_a_number_stays(build):
    model = build(f"{HEAD} {{ a = Relu(x) y = Clip(a, , c) }}", c=np.float32(np.nan))
    assert "not a number" in PASS.call(model).skipped[0].reason


def test_slices_of_one_axis_are_reported(build, check):
    model = build(
        f"{HEAD} {{ a = Slice(x, c, d, c) y = Slice(a, z, c, c) }}", c=np.array([1]), d=np.array([3]), z=np.array([0])
    )
    result = check(model, PASS, X, fired={})
    assert result.skipped[0].reason == "both slices cut the same axis"


def test_slices_with_steps_and_negative_axes(build, check):
    model = build(
        f"{HEAD} {{ a = Slice(x, z, e, m1, st) y = Slice(a, z, e) }}",
        z=np.array([0]), e=np.array([2**40]), m1=np.array([-1]), st=np.array([2]),
    )  # fmt: skip
    check(model, PASS, X, fired={"slice(slice(x)) of other axes => slice(x)": 1}, ops=["Slice"])


def test_slice_with_fan_out_stays(build, check):
    model = build(
        "(float[b,3,4] x) => (float[n] y, float[n] z) { a = Slice(x, c, d, c) y = Slice(a, c, d, d) z = Neg(a) }",
        c=np.array([1]),
        d=np.array([2]),
    )
    result = check(model, PASS, X, fired={})
    assert result.skipped[0].reason == "the inner result is needed elsewhere too"
