"""No-ops are removed, and look-alikes are not."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.simplify.identities import PASS

X = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}


def case(build, expression, declaration="", **constants):
    """``Relu(expression(Neg(x)))``, so that neither end of the expression is an interface of the graph."""
    text = f"(float[b,3,4] x{declaration}) => (float[n] y) {{ a = Neg(x) r = {expression} y = Relu(r) }}"
    return build(text, **constants)


REMOVED = {
    "identity(x) => x": [("Identity(a)", {})],
    "dropout(x) => x": [
        ("Dropout(a)", {}),
        ("Dropout(a, p)", {"p": np.float32(0.5)}),
        ("Dropout(a, p, t)", {"p": np.float32(0.5), "t": np.array(False)}),
    ],
    "reshape(x, shape of x) => x": [
        ("Reshape(a, s)", {"s": np.array([0, 0, 4])}),
        ("Reshape(a, s)", {"s": np.array([-1, 3, 4])}),
        ("Expand(a, s)", {"s": np.array([1, 1, 4])}),
        ("Expand(a, s)", {"s": np.array([1])}),
        ("Tile(a, s)", {"s": np.array([1, 1, 1])}),
    ],
    "slice(x, everything) => x": [
        ("Slice(a, s, e, x1)", {"s": np.array([0]), "e": np.array([3]), "x1": np.array([1])}),
        ("Slice(a, s, e, x1)", {"s": np.array([0]), "e": np.array([2**62]), "x1": np.array([2])}),
    ],
    "pad(x, 0) => x": [("Pad(a, s)", {"s": np.zeros(6, np.int64)})],
    "resize(x, scales = 1) => x": [
        ("Resize(a, , s)", {"s": np.ones(3, np.float32)}),
        ('Resize<axes=[1, 2], mode="linear">(a, , , s)', {"s": np.array([3, 4])}),
    ],
    "op(x) of one operand => x": [("Concat<axis=1>(a)", {}), ("Max(a)", {}), ("Sum(a)", {}), ("Mean(a)", {})],
    "split(x) into one => x": [("Split<axis=1, num_outputs=1>(a)", {})],
    "x op neutral => x": [
        ("Mul(a, c)", {"c": np.float32(1)}),
        ("Mul(c, a)", {"c": np.float32([1])}),
        ("Div(a, c)", {"c": np.ones((3, 1), np.float32)}),
        ("Add(a, c)", {"c": np.zeros((1, 4), np.float32)}),
        ("Sub(a, c)", {"c": np.float32(0)}),
        ("Pow(a, c)", {"c": np.int64(1)}),
    ],
    "reduce(x) over axes of size 1 => reshape(x)": [
        ("ReduceMean<noop_with_empty_axes=1>(a)", {}),
    ],
}


@pytest.mark.parametrize(
    ("rule", "expression", "constants"), [(r, e, c) for r, cases in REMOVED.items() for e, c in cases]
)
def test_removed(build, check, rule, expression, constants):
    check(case(build, expression, **constants), PASS, X, fired={rule: 1}, ops=["Neg", "Relu"])


KEPT = [
    ("Reshape(a, s)", {"s": np.array([0, 4, 3])}),
    ("Reshape(a, s)", {"s": np.array([3, -1, 4])}),  # b could be 3
    ("Expand(a, s)", {"s": np.array([1, 1, 1, 1])}),
    ("Tile(a, s)", {"s": np.array([1, 2, 1])}),
    ("Slice(a, s, e, x1)", {"s": np.array([0]), "e": np.array([2]), "x1": np.array([1])}),
    ("Slice(a, s, e, x1)", {"s": np.array([0]), "e": np.array([1]), "x1": np.array([0])}),
    ("Slice(a, s, e, x1, st)", {"s": [-1], "e": [-(2**62)], "x1": [1], "st": [-1]}),  # reversed
    ("Pad(a, s)", {"s": np.array([0, 0, 0, 0, 0, 1])}),
    ("Resize(a, , s)", {"s": np.array([1, 1, 2], np.float32)}),
    ('Resize<mode="linear">(a, , s)', {"s": np.array([1, 1, 1.2], np.float32)}),  # as many, but others
    ("Resize<axes=[1, 2]>(a, , , s)", {"s": np.array([3, 8])}),
    ("Split<axis=2, num_outputs=2>(a)", {}),
    ("Mul(a, c)", {"c": np.float32(2)}),
    ("Mul(a, c)", {"c": np.ones((1, 1, 1, 1), np.float32)}),  # adds an axis
    ("Add(a, c)", {"c": np.float32([0, 0, 0, 1])}),
    ("Sub(c, a)", {"c": np.float32(0)}),
    ("Div(c, a)", {"c": np.float32(1)}),
    ("Pow(c, a)", {"c": np.float32(1)}),
    ("ReduceMean(a)", {}),
]


@pytest.mark.parametrize(("expression", "constants"), KEPT)
def test_kept(build, check, expression, constants):
    if expression.startswith("Split"):
        text = "(float[b,3,4] x) => (float[n] y) { a = Neg(x) r, q = Split<axis=2, num_outputs=2>(a) y = Add(r, q) }"
        model = build(text)
    else:
        model = case(build, expression, **{k: np.asarray(v) for k, v in constants.items()})
    check(model, PASS, X, fired={})


def test_neutral_constant_that_broadcasts_is_reported(build, check):
    model = case(build, "Mul(a, c)", c=np.ones((1, 1, 1, 1), np.float32))
    result = check(model, PASS, X, fired={})
    assert [s.reason for s in result.skipped] == ["the neutral constant broadcasts the other operand"]


def test_symbolic_dim_against_one_that_may_differ_stays(build, check):
    """The constant has size 1 where x has b: nothing is broadcast; with x of size 1 there, x would be."""
    model = build("(float[b,1] x) => (float[b,4] y) { y = Mul(x, c) }", c=np.ones((1, 4), np.float32))
    check(model, PASS, {"x": X["x"][0, :, :1]}, fired={})


def test_dropout_in_training_or_undecided_stays(build):
    model = case(build, "Dropout(a, p, t)", ", bool t", p=np.float32(0.5))
    result = PASS.call(model)
    assert not result.modified
    assert "training mode" in result.skipped[0].reason


def test_dropout_with_used_mask_stays(build, check):
    model = build("(float[b,3,4] x) => (float[b,3,4] y, bool[b,3,4] m) { y, m = Dropout(x) }")
    assert not PASS.call(model).modified


def test_unit_reduction_without_keepdims(build, check):
    model = build("(float[b,1,4] x) => (float[b,4] y) { y = ReduceSum<keepdims=0>(x, a) }", a=np.array([1]))
    check(model, PASS, {"x": X["x"][:, :1]}, ops=["Squeeze"])


def test_reduction_over_symbolic_axis_stays(build, check):
    model = build("(float[b,1,4] x) => (float[1,4] y) { y = ReduceSum<keepdims=0>(x, a) }", a=np.array([0]))
    check(model, PASS, {"x": X["x"][:1, :1]}, fired={})


def test_mean_of_all_single_elements(build, check):
    model = build("(float[1,1] x) => (float[] y) { y = ReduceMean<keepdims=0>(x) }")
    check(model, PASS, {"x": X["x"][0, :1, :1]}, ops=["Squeeze"])


EXPAND = "op(expand(x), y) => op(x, y)"


def test_expand_before_broadcasting_operator(build, check):
    text = "(float[b,1] x, float[b,4] z) => (float[b,4] y) { e = Expand(x, s) y = Add(e, z) }"
    feeds = {"x": np.float32([[1], [2]]), "z": X["x"][0, :2]}
    check(build(text, s=np.array([1, 4])), PASS, feeds, fired={EXPAND: 1}, ops=["Add"])


def test_expand_that_gives_the_result_its_size_stays(build, check):
    text = "(float[b,1] x, float[b,1] z) => (float[b,4] y) { e = Expand(x, s) y = Add(e, z) }"
    feeds = {"x": np.float32([[1], [2]]), "z": np.float32([[1], [2]])}
    check(build(text, s=np.array([1, 4])), PASS, feeds, fired={})


def test_expand_that_adds_an_axis_stays(build, check):
    text = "(float[4] x, float[4] z) => (float[2,4] y) { e = Expand(x, s) y = Add(e, z) }"
    feeds = {"x": X["x"][0, 0], "z": X["x"][0, 1]}
    check(build(text, s=np.array([2, 4])), PASS, feeds, fired={})


def test_expand_into_where_and_attributes(build, check):
    text = "(float[b,1] x, int64[b,4] z) => (int64[b,4] y) { c = Cast<to=7>(x) e = Expand(c, s) y = Mod<fmod=1>(z, e) }"
    feeds = {"x": np.float32([[3], [-2]]), "z": np.array([[1, 2, 3, -4], [5, -6, 7, 8]])}
    check(build(text, s=np.array([1, 4])), PASS, feeds, fired={EXPAND: 1}, ops=["Cast", "Mod"])


@pytest.mark.parametrize("op", ["Relu", "Abs", "Floor", "Sign"])
def test_idempotent(build, check, op):
    model = build(f"(float[b,3,4] x) => (float[b,3,4] y) {{ a = {op}(x) r = {op}(a) y = Neg(r) }}")
    check(model, PASS, X, fired={"relu(relu(x)) => relu(x)": 1}, ops=[op, "Neg"])


def test_different_idempotent_operators_stay(build, check):
    check(build("(float[b,3,4] x) => (float[b,3,4] y) { a = Abs(x) y = Floor(a) }"), PASS, X, fired={})


def test_involutions(build, check):
    model = build("(float[b,3,4] x) => (float[b,3,4] y) { a = Neg(x) r = Neg(a) y = Relu(r) }")
    check(model, PASS, X, fired={"--x => x": 1}, ops=["Relu"])
    model = build("(bool[b] x) => (bool[b] y) { a = Not(x) r = Not(a) y = And(r, x) }")
    check(model, PASS, {"x": np.array([True, False])}, fired={"--x => x": 1}, ops=["And"])


@pytest.mark.parametrize(
    ("attributes", "ops"),
    [
        ("kernel_shape=[1,1]", ["Relu"]),
        ("kernel_shape=[1,1], strides=[2,2]", ["MaxPool", "Relu"]),
        ("kernel_shape=[3,3], pads=[1,1,1,1]", ["MaxPool", "Relu"]),
    ],
)
def test_pool(build, check, attributes, ops):
    model = build(f"(float[b,2,3,3] x) => (float[n] y) {{ a = MaxPool<{attributes}>(x) y = Relu(a) }}")
    check(model, PASS, {"x": np.random.default_rng(0).standard_normal((1, 2, 3, 3)).astype(np.float32)}, ops=ops)


def test_minus_zero_and_nan(build, run):
    model = case(build, "Add(a, c)", c=np.float32(0))
    x = np.full((1, 3, 4), np.nan, np.float32)
    PASS.call(model)
    assert np.isnan(run(model, {"x": x})[0]).all()


def test_identity_between_input_and_output_stays(build, check):
    check(build("(float[b,3,4] x) => (float[b,3,4] y) { y = Identity(x) }"), PASS, X, fired={}, ops=["Identity"])


def test_two_outputs_of_one_value_keep_one_identity(build, check):
    model = build("(float[b,3,4] x) => (float[b,3,4] y, float[b,3,4] z) { y = Relu(x) z = Identity(y) }")
    check(model, PASS, X, fired={}, ops=["Identity", "Relu"])
