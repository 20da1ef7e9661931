"""Residual branches: what is one, and what is left without it."""

import numpy as np
import pytest

from optc.passes.prune.branches import drop, find

BLOCKS = """(float[2,6] x) => (float[2,6] y) <float[6,9] a, float[9,6] b, float[6,6] c> {
    h = MatMul(x, a) r = Relu(h) f = MatMul(r, b) s = Add(x, f)
    g = MatMul(s, c) t = Tanh(g) y = Add(t, s) }"""


def test_branches_are_left_out(filled, run, verify, rng):
    model = filled(BLOCKS)
    found = find(model)
    assert [[node.op_type for node in branch.nodes] for branch in found] == [
        ["MatMul", "Relu", "MatMul"],
        ["MatMul", "Tanh"],
    ]
    x = rng.standard_normal((2, 6)).astype(np.float32)
    c = model.graph.initializers["c"].const_value.numpy()
    drop(model, found[:1])
    verify(model)
    np.testing.assert_allclose(run(model, {"x": x})[0], x + np.tanh(x @ c), rtol=1e-5, atol=1e-6)
    assert list(model.graph.initializers) == ["c"]
    drop(model, find(model))
    verify(model)
    np.testing.assert_array_equal(run(model, {"x": x})[0], x)


@pytest.mark.parametrize(
    "body",
    [
        # What the branch computes is read elsewhere, too.
        "h = MatMul(x, c) s = Add(x, h) t = Tanh(h) y = Add(s, t)",
        # Nothing in it depends on the skip, or it holds no weights.
        "k = Relu(x) h = MatMul(z, c) s = Add(k, h) y = Identity(s)",
        "h = Tanh(x) y = Add(x, h)",
        # Sizes that are not the same.
        "h = MatMul(x, d) y = Add(x, h)",
    ],
)
def test_other_additions_are_none(body, filled):
    declared = {"c": "float[6,6] c", "d": "float[6,1] d"}
    text = ", ".join(v for k, v in declared.items() if f" {k})" in body)
    model = filled(f"(float[2,6] x, float[2,6] z) => (float[2,6] y) <{text}> {{ {body} }}")
    assert find(model) == []


def test_an_outer_branch_takes_the_inner_ones_along(filled, verify, run, rng):
    text = """(float[2,6] x) => (float[2,6] y) <float[6,6] a, float[6,6] b> {
        h = MatMul(x, a) g = MatMul(h, b) i = Add(h, g) r = Relu(i) y = Add(x, r) }"""
    model = filled(text)
    drop(model, find(model))
    verify(model)
    x = rng.standard_normal((2, 6)).astype(np.float32)
    np.testing.assert_array_equal(run(model, {"x": x})[0], x)
