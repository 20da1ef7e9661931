"""Common subexpressions."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.simplify.common_subexpressions import PASS

X = {"x": np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)}
NODES = "equal nodes => one"
INITIALIZERS = "equal initializers => one"


def test_equal_nodes(build, check):
    model = build("(float[b,3] x) => (float[b,3] y) { a = Neg(x) c = Neg(x) d = Exp(a) e = Exp(c) y = Mul(d, e) }")
    check(model, PASS, X, fired={NODES: 2}, ops=["Exp", "Mul", "Neg"])


@pytest.mark.parametrize(
    "body",
    [
        "a = Neg(x) c = Abs(x) y = Add(a, c)",
        "a = Softmax<axis=0>(x) c = Softmax<axis=1>(x) y = Add(a, c)",
        "a = LeakyRelu<alpha=0.0>(x) c = LeakyRelu<alpha=1.0>(x) y = Add(a, c)",
        "a = Sub(x, k) c = Sub(k, x) y = Add(a, c)",
        "a = RandomNormalLike(x) c = RandomNormalLike(x) y = Add(a, c)",
        "a = Cast<to=11>(x) c = Cast<to=10>(x) d = Cast<to=1>(a) e = Cast<to=1>(c) y = Add(d, e)",
    ],
)
def test_different_nodes_stay(build, body):
    constants = {"k": np.float32(2)} if "k" in body.replace("like", "") and "(x, k)" in body else {}
    model = build(f"(float[b,3] x) => (float[b,3] y) {{ {body} }}", **constants)
    assert PASS.call(model).fired == {}


def test_signs_of_zero_in_attributes_differ(build):
    model = build("(float[b,3] x) => (float[b,3] y) { a = Elu<alpha=0.0>(x) c = Elu<alpha=-0.0>(x) y = Add(a, c) }")
    assert PASS.call(model).fired == {}


def test_tensor_attributes(build, check):
    text = (
        "(int64[1] n) => (float[m] y) {{ a = ConstantOfShape<value=float[1] {{1.0}}>(n) c = "
        "ConstantOfShape<value=float[1] {{{0}}}>(n) y = Add(a, c) }}"
    )
    feeds = {"n": np.array([3])}
    check(build(text.format("1.0")), PASS, feeds, fired={NODES: 1}, ops=["Add", "ConstantOfShape"])
    check(build(text.format("2.0")), PASS, feeds, fired={})


def test_several_outputs(build, check):
    text = (
        "(float[b,3] x) => (float[b,3] y) { a, i = TopK(x, k) c, j = TopK(x, k) d = "
        "Add(a, c) e = Cast<to=1>(j) y = Add(d, e) }"
    )
    check(build(text, k=np.array([3])), PASS, X, fired={NODES: 1}, ops=["Add", "Add", "Cast", "TopK"])


def test_two_graph_outputs(build, check):
    model = build("(float[b,3] x) => (float[b,3] y, float[b,3] z) { y = Neg(x) z = Neg(x) }")
    check(model, PASS, X, fired={NODES: 1}, ops=["Identity", "Neg"])
    assert not PASS.call(model).modified


BRANCHES = """(bool c, float[b,3] x) => (float[b,3] y, float[b,3] z) {{
  {before}
  y = If (c) <then_branch = t () => (float[b,3] p) {{ p0 = Exp(x) p = Neg(p0) }},
              else_branch = e () => (float[b,3] q) {{ q0 = Exp(x) q = Abs(q0) }}>
  {after} }}"""


def test_a_branch_uses_what_came_before(build, check):
    model = build(BRANCHES.format(before="z = Exp(x)", after=""))
    feeds = ({"c": np.array(True), **X}, {"c": np.array(False), **X})
    check(model, PASS, feeds[0], fired={NODES: 2}, ops=["Abs", "Exp", "If", "Neg"], more_feeds=feeds[1:])


def test_nothing_leaves_a_branch(build, check):
    model = build(BRANCHES.format(before="", after="z = Exp(x)"))
    check(model, PASS, {"c": np.array(True), **X}, fired={}, ops=["Abs", "Exp", "Exp", "Exp", "If", "Neg"])


def test_equal_initializers(build, check):
    w = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    model = build(
        "(float[b,3] x) => (float[b,3] y) { a = MatMul(x, w) c = MatMul(x, v) y = Add(a, c) }", w=w, v=w.copy()
    )
    check(model, PASS, X, fired={INITIALIZERS: 1, NODES: 1}, ops=["Add", "MatMul"])
    assert len(model.graph.initializers) == 1


@pytest.mark.parametrize(
    ("w", "v"),
    [
        (np.zeros((3, 100), np.float32), np.eye(3, 100, k=55, dtype=np.float32)),  # differs outside the sample
        (np.float32([[0.0]]), np.float32([[-0.0]])),
        (np.float32([[1, 1, 1]]), np.float32([1, 1, 1])),
        (np.float32([1]), np.int32([0x3F800000])),  # the same bytes
    ],
)
def test_different_initializers_stay(build, w, v):
    kind = "float" if v.dtype == np.float32 else "int32"
    model = build(f"() => (float[n] y, {kind}[m] z) {{ y = Abs(w) z = Abs(v) }}", w=w, v=v)
    assert PASS.call(model).fired == {}


def test_an_input_with_default_stays(build):
    w = np.ones((3, 3), np.float32)
    model = build(
        "(float[b,3] x, float[3,3] w) => (float[b,3] y) { a = MatMul(x, w) c = MatMul(x, v) y = Add(a, c) }", w=w, v=w
    )
    assert PASS.call(model).fired == {}
