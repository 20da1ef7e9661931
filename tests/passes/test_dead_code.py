"""Dead code."""

from __future__ import annotations

import numpy as np

from optc.passes.simplify.dead_code import PASS

X = {"x": np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)}


def test_unused_chain_and_its_weight(build, check):
    model = build(
        "(float[b,3] x) => (float[b,3] y) { a = Neg(x) c = MatMul(a, w) d = Exp(c) y = Relu(x) }",
        w=np.eye(3, dtype=np.float32),
    )
    check(model, PASS, X, fired={"unused node": 3}, ops=["Relu"])
    assert not model.graph.initializers


def test_unused_initializer(build, check):
    model = build("(float[b,3] x) => (float[b,3] y) { y = Relu(x) }", w=np.eye(3, dtype=np.float32))
    check(model, PASS, X, fired={"unused initializer": 1}, ops=["Relu"])
    assert not model.graph.initializers


def test_used_things_stay(build, check):
    model = build("(float[b,3] x) => (float[b,3] a, float[b,3] y) { a = Neg(x) y = Add(a, w) }", w=np.float32(1))
    check(model, PASS, X, fired={})


def test_unused_input_stays(build, check):
    model = build("(float[b,3] x, float[b] u) => (float[b,3] y) { y = Relu(x) }")
    check(model, PASS, {**X, "u": np.float32([1, 2])}, fired={})


def test_captured_values_stay_and_dead_branch_nodes_go(build, check):
    model = build(
        """(bool c, float[b,3] x) => (float[b,3] y) {
          a = Neg(x)
          y = If (c) <then_branch = t () => (float[b,3] p) { dead = Exp(a) p = Add(a, w) },
                      else_branch = e () => (float[b,3] q) { q = Abs(x) }> }""",
        w=np.float32(1),
    )
    check(model, PASS, {"c": np.array(True), **X}, fired={"unused node": 1}, ops=["Abs", "Add", "If", "Neg"])


def test_dead_if_frees_what_it_captured(build, check):
    model = build(
        """(bool c, float[b,3] x) => (float[b,3] y) {
          a = Neg(x)
          dead = If (c) <then_branch = t () => (float[b,3] p) { p = Exp(a) },
                         else_branch = e () => (float[b,3] q) { q = Abs(x) }>
          y = Relu(x) }"""
    )
    check(model, PASS, {"c": np.array(True), **X}, fired={"unused node": 2}, ops=["Relu"])


def test_unused_optional_output_is_dropped(build, check):
    model = build("(float[b,3] x) => (float[b,3] y) { y, m = Dropout(x) }")
    check(model, PASS, X, fired={"unused output": 1}, ops=["Dropout"])
    assert len(model.graph[0].outputs) == 1


def test_outputs_that_are_always_there_stay(build, check):
    model = build("(float[b,3] x) => (int64[b,3] i) { v, i = TopK(x, k) }", k=np.array([3]))
    check(model, PASS, X, fired={}, ops=["TopK"])
