"""The questions that fusion rules ask."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.fuse import passes, portable
from optc.passes.fuse.pattern import affine, along, is_polynomial, leak, polynomial, reduced_axes, scalings


def scalars(**numbers: float) -> dict[str, np.ndarray]:
    return {name: np.array(value, np.float32) for name, value in numbers.items()}


def values_of(model):
    return {v.name: v for v in (*model.graph.inputs, *(o for node in model.graph for o in node.outputs))}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = Mul(x, two) b = Add(a, three) y = Sub(b, x)", {(1,): 1.0, (0,): 3.0}),
        ("a = Neg(x) b = Div(a, two) y = Sub(three, b)", {(1,): 0.5, (0,): 3.0}),
        ("a = Mul(x, x) b = Pow(x, three) c = Identity(b) y = Add(a, c)", {(2,): 1.0, (3,): 1.0}),
        ("a = Add(x, two) y = Pow(a, two)", {(2,): 1.0, (1,): 4.0, (0,): 4.0}),
    ],
)
def test_polynomial(text, expected, build):
    model = build("(float[b] x) => (float[b] y) {" + text + "}", **scalars(two=2, three=3))
    values = values_of(model)
    assert is_polynomial(polynomial(values["y"], [values["x"]]), expected)


@pytest.mark.parametrize(
    "text", ["y = Div(two, x)", "y = Pow(x, half)", "y = Exp(x)", "y = Mul(x, v)", "y = Div(x, zero)"]
)
def test_no_polynomial(text, build):
    numbers = scalars(two=2, half=0.5, zero=0)
    model = build("(float[b] x, float[b] v) => (float[b] y) {" + text + "}", **numbers)
    values = values_of(model)
    assert polynomial(values["y"], [values["x"]]) is None


def test_polynomial_tolerance():
    assert is_polynomial({(1,): 0.7978, (2,): 0.0}, {(1,): 0.79788456})
    assert not is_polynomial({(1,): 0.8}, {(1,): 0.79788456})
    assert not is_polynomial({(1,): 1.0, (0,): 1e-9}, {(1,): 1.0})


def test_affine_stops_at_values_with_other_uses(build):
    text = "a = Mul(x, two) b = Add(a, three) c = Div(b, two) y = Relu(c) z = Neg(a)"
    values = values_of(build("(float[b] x) => (float[b] y, float[b] z) {" + text + "}", **scalars(two=2, three=3)))
    assert affine(values["c"]) == (values["a"], 0.5, 1.5)


def test_scalings(build):
    values = values_of(
        build("(float[b] x) => (float[b] y) { a = Mul(two, x) y = Div(a, four) }", **scalars(two=2, four=4))
    )
    assert list(scalings(values["y"])) == [(values["y"], 1.0), (values["a"], 0.25), (values["x"], 0.5)]


def test_leak(build):
    model = build("(float[b] x) => (float[b] y, float[b] z) { a = Exp(x) b = Neg(a) y = Abs(b) z = Relu(a) }")
    values, anchor = values_of(model), model.graph.node(2)
    assert leak(anchor, values["x"]) == "'a' is also used by Relu 'n3'"
    assert leak(anchor, values["a"]) is None


def test_leak_into_a_subgraph(build):
    text = """(float[b] x, bool c) => (float[b] y, float[b] z) {
        a = Exp(x)
        y = Neg(a)
        z = If(c) <
            then_branch = t () => (float[b] u) { u = Abs(a) },
            else_branch = e () => (float[b] w) { w = Abs(x) }
        >
    }"""
    model = build(text)
    assert "also used by Abs" in (leak(model.graph.node(1), model.graph.inputs[0]) or "")


@pytest.mark.parametrize(
    ("node", "axes", "expected"),
    [
        ("ReduceSum(x, ax)", [-1, 0], (0, 2)),
        ("ReduceSum(x)", [0], (0, 1, 2)),
        ("ReduceSum<noop_with_empty_axes=1>(x)", [0], None),
    ],
)
def test_reduced_axes(node, axes, expected, build):
    model = build("(float[a,b,c] x) => (float[d,e,f] y) { y = " + node + " }", ax=np.array(axes))
    assert reduced_axes(model.graph.node(0)) == expected


@pytest.mark.parametrize(
    ("shape", "size"), [((), 3), ((3, 1, 1), 3), ((1, 3, 1, 1), 3), ((3,), None), ((2, 1, 1), None), ((1,) * 5, None)]
)
def test_along(shape, size):
    vector = along(np.ones(shape, np.float32), 4, 1, 3)
    assert (vector is None) == (size is None)
    assert vector is None or vector.shape == (size,)


def test_pass_names_are_unique():
    names = [one.name for one in (*passes(), *portable())]
    rules = [rule.name for one in (*passes(), *portable()) for rule in one.rules]
    assert len(set(names)) == len(names)
    assert len(set(rules)) == len(rules)
