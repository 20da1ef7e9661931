"""Chains of reshapes."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.simplify.reshapes import PASS

X = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}
CHAIN = "reshape(reshape(x)) => reshape(x)"


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("a = Reshape(x, s) y = Reshape(a, t)", {"s": [0, 12], "t": [0, 2, 6]}),
        ("a = Flatten(x) y = Reshape(a, t)", {"t": [-1, 2, 6]}),
        ("a = Unsqueeze(x, s) y = Reshape(a, t)", {"s": [1], "t": [-1, 12]}),
        ("a = Reshape(x, s) y = Squeeze(a, t)", {"s": [-1, 1, 12], "t": [1]}),
        ("a = Reshape(x, s) y = Unsqueeze(a, t)", {"s": [-1, 12], "t": [2]}),
        ("a = Unsqueeze(x, s) y = Unsqueeze(a, t)", {"s": [0], "t": [4]}),
        ("a = Reshape(x, s) y = Reshape(a, t)", {"s": [-1], "t": [6, -1]}),
    ],
)
def test_chain(build, check, body, constants):
    model = build(f"(float[b,3,4] x) => (float[n] y) {{ {body} }}", **{k: np.array(v) for k, v in constants.items()})
    check(model, PASS, X, fired={CHAIN: 1}, ops=["Reshape"], more_feeds=({"x": X["x"][:2, :3]},))


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("a = Unsqueeze(r, s) c = Squeeze(a, s) y = Neg(c)", {"s": [1]}),
        ("a = Reshape(r, s) c = Reshape(a, t) y = Neg(c)", {"s": [0, 12], "t": [-1, 3, 4]}),
    ],
)
def test_there_and_back(build, check, body, constants):
    model = build(
        f"(float[b,3,4] x) => (float[n] y) {{ r = Relu(x) {body} }}", **{k: np.array(v) for k, v in constants.items()}
    )
    check(model, PASS, X, fired={CHAIN: 1}, ops=["Neg", "Relu"])


def test_two_symbolic_dims_in_new_places_stay(build, check):
    model = build(
        "(float[b,s,4] x) => (float[n] y) { a = Unsqueeze(x, u) c = Unsqueeze(a, u) y = Neg(c) }", u=np.array([0])
    )
    result = check(model, PASS, X, fired={})
    assert "cannot be written" in result.skipped[0].reason


def test_shape_between_is_needed(build, check):
    """The 0 of the second Reshape copies a size that x does not have in that place."""
    model = build(
        "(float[b,s,12] x) => (float[n] y) { a = Reshape(x, t) y = Reshape(a, u) }",
        t=np.array([-1, 6]),
        u=np.array([0, 2, 3]),
    )
    check(model, PASS, {"x": np.arange(72, dtype=np.float32).reshape(2, 3, 12)})


def test_inner_with_other_use_stays_for_it(build, check):
    model = build(
        "(float[b,3,4] x) => (float[n] y, float[m] z) { a = Reshape(x, s) y = Reshape(a, t) z = Neg(a) }",
        s=np.array([0, 12]),
        t=np.array([0, 2, 6]),
    )
    check(model, PASS, X, fired={CHAIN: 1}, ops=["Neg", "Reshape", "Reshape"])
    assert model.graph.node("n1/Reshape").inputs[0].name == "x"


def test_axes_of_size_zero_stay(build, check):
    model = build("(float[b,0,4] x) => (float[n] y) { a = Unsqueeze(x, s) y = Unsqueeze(a, s) }", s=np.array([1]))
    check(model, PASS, {"x": np.zeros((2, 0, 4), np.float32)}, fired={})


def test_computed_shape_stays(build, check):
    model = build(
        "(float[b,3,4] x, int64[2] t) => (float[n,m] y) { a = Flatten(x) y = Reshape(a, t) }",
    )
    check(model, PASS, {**X, "t": np.array([6, 4])}, fired={})


def test_copied_sizes_refer_to_the_shape_between(build, check):
    model = build(
        "(float[b,s,4] x) => (float[n] y) { a = Unsqueeze(x, z) y = Reshape(a, t) }",
        z=np.array([0]),
        t=np.array([0, 0, 0, 2, 2]),
    )
    check(model, PASS, X, fired={})
