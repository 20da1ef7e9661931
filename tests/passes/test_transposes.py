"""Transposes."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.simplify.transposes import PASS

X = {"x": np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)}
AROUND = "transpose(op(transpose(x))) => op(transpose(x))"
HEAD = "(float[b,3,4,w] x) => (float[n] y)"


def test_no_op(build, check):
    model = build(f"{HEAD} {{ a = Transpose<perm=[0,1,2,3]>(x) y = Neg(a) }}")
    check(model, PASS, X, fired={"transpose(x, identity) => x": 1}, ops=["Neg"])


def test_chain_cancels(build, check):
    model = build(f"{HEAD} {{ a = Transpose<perm=[0,2,3,1]>(x) c = Transpose<perm=[0,3,1,2]>(a) y = Neg(c) }}")
    check(model, PASS, X, fired={"transpose(transpose(x)) => transpose(x)": 1}, ops=["Neg"])


def test_chain_composes(build, check):
    model = build(f"{HEAD} {{ a = Transpose<perm=[1,2,3,0]>(x) y = Transpose<perm=[2,0,1,3]>(a) }}")
    check(model, PASS, X, ops=["Transpose"])


def test_default_permutation(build, check):
    model = build(f"{HEAD} {{ a = Transpose(x) c = Transpose(a) y = Neg(c) }}")
    check(model, PASS, X, ops=["Neg"])


def test_chain_keeps_inner_for_others(build, check):
    model = build(
        "(float[b,3,4,w] x) => (float[n] y, float[n] z) { a = Transpose<perm=[0,2,3,1]>(x) z = "
        "Neg(a) c = Transpose<perm=[0,3,1,2]>(a) y = Neg(c) }"
    )
    check(model, PASS, X, ops=["Neg", "Neg", "Transpose"])


@pytest.mark.parametrize(
    ("shape", "perm", "ops"),
    [
        ("b,1,4", [0, 2, 1], ["Reshape"]),
        ("b,1,4", [1, 0, 2], ["Reshape"]),
        ("b,s,1,1", [2, 0, 3, 1], ["Transpose"]),  # b and s both move: two sizes to deduce
        ("b,s,1,1", [0, 2, 1, 3], ["Reshape"]),
        ("b,1,4", [2, 1, 0], ["Transpose"]),
        ("b,s,4", [0, 2, 1], ["Transpose"]),
    ],
)
def test_axes_of_size_one(build, check, shape, perm, ops):
    model = build(f"(float[{shape}] x) => (float[n] y) {{ y = Transpose<perm={perm}>(x) }}")
    sizes = [{"b": 2, "s": 3}.get(d) or int(d) for d in shape.split(",")]
    check(model, PASS, {"x": np.arange(np.prod(sizes), dtype=np.float32).reshape(sizes)}, ops=ops)


@pytest.mark.parametrize(
    ("body", "constants", "ops"),
    [
        ("c = Relu(a)", {}, ["Relu"]),
        ("d = Sigmoid(a) c = Abs(d)", {}, ["Abs", "Sigmoid"]),
        ("c = Mul(a, k)", {"k": np.float32(2)}, ["Mul"]),
        ("c = Add(a, k)", {"k": np.float32([1, 2, 3])}, ["Add"]),
        ("c = Sub(k, a)", {"k": np.arange(20, dtype=np.float32).reshape(4, 5, 1)}, ["Sub"]),
        ("c = Clip(a, k)", {"k": np.float32(0.5)}, ["Clip"]),
        (
            "d = Add(a, k) e = Relu(d) c = Mul(e, e2)",
            {"k": np.float32([1, 2, 3]), "e2": np.float32([[3]])},
            ["Add", "Mul", "Relu"],
        ),
    ],
)
def test_around_elementwise(build, check, body, constants, ops):
    model = build(
        (
            f"(float[b,3,4,5] x) => (float[n] y) {{ a = Transpose<perm=[0,2,3,1]>(x) "
            f"{body} y = Transpose<perm=[0,3,1,2]>(c) }}"
        ),
        **constants,
    )
    check(model, PASS, X, fired={AROUND: 1}, ops=ops)


def test_around_elementwise_that_does_not_cancel(build, check):
    model = build(f"{HEAD} {{ a = Transpose<perm=[0,2,3,1]>(x) c = Relu(a) y = Transpose<perm=[3,0,1,2]>(c) }}")
    check(model, PASS, X, fired={AROUND: 1}, ops=["Relu", "Transpose"])


def test_around_elementwise_with_fan_out_stays(build, check):
    model = build(
        "(float[b,3,4,w] x) => (float[n] y, float[n] z) { a = Transpose<perm=[0,2,3,1]>(x) c = "
        "Relu(a) y = Transpose<perm=[0,3,1,2]>(c) z = Neg(c) }"
    )
    result = check(model, PASS, X, fired={})
    assert "its own layout" in result.skipped[0].reason


def test_around_two_variables_stays(build, check):
    text = (
        "(float[b,3,4,w] x, float[b,4,w,3] z) => (float[n] y) { a = Transpose<perm=[0,2,3,1]>(x) c "
        "= Add(a, z) y = Transpose<perm=[0,3,1,2]>(c) }"
    )
    feeds = {**X, "z": X["x"].transpose(0, 2, 3, 1).copy()}
    check(build(text), PASS, feeds, fired={})


def test_around_other_operators_stays(build, check):
    model = build(
        f"{HEAD} {{ a = Transpose<perm=[0,2,3,1]>(x) c = Softmax<axis=-1>(a) y = Transpose<perm=[0,3,1,2]>(c) }}"
    )
    check(model, PASS, X, fired={})


def test_both_operands_transposed(build, check):
    text = (
        "(float[b,3,4,w] x) => (float[n] y) { s = Sigmoid(x) a = Transpose<perm=[0,2,3,1]>(x) c "
        "= Transpose<perm=[0,2,3,1]>(s) y = Mul(a, c) }"
    )
    check(build(text), PASS, X, ops=["Mul", "Sigmoid", "Transpose"])


def test_operands_transposed_differently_stay(build, check):
    text = "(float[4,4] x) => (float[4,4] y) { s = Sigmoid(x) a = Transpose<perm=[1,0]>(x) y = Mul(a, s) }"
    check(build(text), PASS, {"x": np.eye(4, dtype=np.float32)}, fired={})


def test_operands_with_fan_out_stay(build, check):
    text = (
        "(float[4,4] x) => (float[4,4] y, float[4,4] z) { s = Sigmoid(x) a = Transpose<perm=[1,0]>(x) c = "
        "Transpose<perm=[1,0]>(s) y = Mul(a, c) z = Neg(a) }"
    )
    result = check(build(text), PASS, {"x": np.eye(4, dtype=np.float32)}, fired={})
    assert "elsewhere" in result.skipped[0].reason


@pytest.mark.parametrize("flag", [0, 1])
def test_into_gemm(build, check, flag):
    rng = np.random.default_rng(0)
    text = (
        "(float[3,4] x, float[5,3] z) => (float[4,5] y) { a = Transpose<perm=[1,0]>(x) c = "
        "Transpose<perm=[1,0]>(z) y = Gemm<alpha=0.5>(a, c) }"
    )
    if flag:
        text = (
            "(float[4,3] x, float[3,5] z) => (float[4,5] y) { a = Transpose<perm=[1,0]>(x) c = "
            "Transpose<perm=[1,0]>(z) y = Gemm<transA=1, transB=1>(a, c) }"
        )
    sizes = [(4, 3), (3, 5)] if flag else [(3, 4), (5, 3)]
    feeds = {n: rng.standard_normal(s).astype(np.float32) for n, s in zip("xz", sizes, strict=True)}
    check(build(text), PASS, feeds, fired={"gemm(transpose(a), b) => gemm(a, b) with transA": 2}, ops=["Gemm"])
