"""Constant folding: values, weights, the size policy, and what must never be folded."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest

from optc.passes.simplify.fold_constants import PASS

X = {"x": np.array([[1.0, -2.0, 3.0]], np.float32)}
W = np.arange(12, dtype=np.float32).reshape(3, 4)
FOLD = "op(constants) => constant"


def test_folds_a_chain_on_a_weight(build, check):
    model = build(
        (
            "(float[b,3] x) => (float[b,4] y) { t = Transpose <perm=[1,0]> (w) u = "
            "Transpose <perm=[1,0]> (t) y = MatMul(x, u) }"
        ),
        w=W,
    )
    check(model, PASS, X, fired={FOLD: 2}, ops=["MatMul"])
    assert len(model.graph.initializers) == 1  # the weight and the intermediate are gone


def test_keeps_a_shared_weight(build, check):
    model = build(
        "(float[b,3] x) => (float[b,4] y) { t = Neg(w) a = MatMul(x, t) c = MatMul(x, w) y = Add(a, c) }", w=W
    )
    check(model, PASS, X, fired={FOLD: 1}, ops=["Add", "MatMul", "MatMul"])
    assert len(model.graph.initializers) == 2


def test_constant_graph_output_keeps_its_name(build, check):
    model = build("(float[b,3] x) => (float[3,4] y, float[b,3] z) { y = Neg(w) z = Relu(x) }", w=W)
    check(model, PASS, X, fired={FOLD: 1}, ops=["Identity", "Relu"])


def test_identity_of_a_constant_output_settles(build):
    model = build("(float[b,3] x) => (float[3,4] y, float[b,3] z) { y = Neg(w) z = Relu(x) }", w=W)
    PASS.call(model)
    assert not PASS.call(model).modified


def test_optional_outputs_that_are_left_out(build, check):
    model = build("() => (float[n] y) { y = Attention(q, q, q) }", q=np.ones((1, 1, 2, 4), np.float32))
    check(model, PASS, {}, fired={FOLD: 1}, ops=["Identity"])


def test_several_outputs(build, check):
    model = build(
        (
            "(float[b,3] x) => (float[b,2] y) { p, q = Split <axis=1, num_outputs=2> (w) a = "
            "MatMul(x, p) c = MatMul(x, q) y = Add(a, c) }"
        ),
        w=W,
    )
    check(model, PASS, X, fired={FOLD: 1}, ops=["Add", "MatMul", "MatMul"])


CASES = {
    "Abs(w)": None,
    "Sqrt(p)": None,
    "Exp(w)": None,
    "Reciprocal(p)": None,
    "Relu(w)": None,
    "Sign(w)": None,
    "Erf(w)": None,
    "Add(w, p)": None,
    "Sub(w, p)": None,
    "Mul(w, p)": None,
    "Div(w, p)": None,
    "Pow(p, w)": None,
    "Max(w, p)": None,
    "Softmax(w)": None,
    "ReduceMean(w)": None,
    "Unsqueeze(w, i)": None,
    "Squeeze(u)": None,
    "Squeeze(u, zero)": None,
    "Gather(w, i)": None,
    "Slice(w, i, j)": None,
    "Slice(w, j, neg, i, m1)": None,
    "Expand(w, shape)": None,
    "Tile(w, j)": None,
    "Reshape(w, flat)": None,
    "Concat<axis=1>(w, p)": None,
    "Cast<to=11>(w)": "double",
    "Cast<to=7>(w)": "int64",
    "Where(c, w, p)": None,
    "Div(k, k2)": "int64",
    "Mod(k, k2)": "int64",
    "Mod<fmod=1>(k, k2)": "int64",
    "Equal(w, p)": "bool",
    "Shape(w)": "int64",
    "ConstantOfShape(j)": None,
    "Range(zero0, three0, one0)": "int64",
    "MatMul(w, wt)": None,
    "Floor(w)": None,
    "Not(c)": "bool",
    "Clip(w, lo, hi)": None,
    "Trilu(w)": None,
    "Pad(w, pads)": None,
    "CumSum(w, zero0)": None,
    "Cast<to=16>(w)": "bfloat16",
}


@pytest.mark.parametrize("expression", CASES)
def test_agrees_with_onnxruntime(build, check, expression):
    rng = np.random.default_rng(1)
    constants = {
        "w": rng.standard_normal((3, 4), np.float32),
        "p": rng.random((3, 4), np.float32) + 0.5,
        "wt": rng.standard_normal((4, 3), np.float32),
        "u": rng.standard_normal((1, 3, 1), np.float32),
        "c": rng.random((3, 4)) > 0.5,
        "i": np.array([1]),
        "j": np.array([3]) if "Tile" not in expression else np.array([2, 3]),
        "m1": np.array([-1]),
        "neg": np.array([-100]),
        "zero": np.array([0]),
        "shape": np.array([2, 1, 4]),
        "flat": np.array([0, -1, 2]),
        "k": np.array([7, -7, 8, -8]),
        "k2": np.array([2, 2, -3, 3]),
        "zero0": np.array(0),
        "three0": np.array(3),
        "one0": np.array(1),
        "lo": np.float32(-0.5),
        "hi": np.float32(0.5),
        "pads": np.array([1, 0, 0, 2]),
    }
    if "Slice(w, j, neg" in expression:
        constants["i"] = np.array([1])
    output = CASES[expression] or "float"
    used = {
        name: value
        for name, value in constants.items()
        if name in expression.replace("(", " ").replace(")", " ").replace(",", " ").split()
    }
    cast = f"r = {expression} y = Cast <to=1> (r)" if output == "bfloat16" else f"y = {expression}"
    kind = "float" if output == "bfloat16" else output
    model = build(f"() => ({kind}[...] y) {{ {cast} }}".replace("[...]", ""), **used)
    result = check(model, PASS, {}, ops=["Identity"])
    assert result.fired[FOLD] >= 1


@pytest.mark.parametrize(
    "body",
    [
        "y = RandomNormal <shape=[3], seed=1.0> ()",
        "a = RandomUniformLike(w) y = ReduceSum(a)",
    ],
)
def test_never_folds_random_ops(build, body):
    model = build(f"() => (float y) {{ {body} }}", **({"w": W} if "(w)" in body else {}))
    assert not PASS.call(model).modified


def test_never_folds_dequantization(build, check):
    model = build(
        "(float[b,3] x) => (float[b,4] y) { d = DequantizeLinear(q, s) y = MatMul(x, d) }",
        q=W.astype(np.int8),
        s=np.float32(0.1),
    )
    check(model, PASS, X, fired={})


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("y = ConstantOfShape(n)", {"n": np.array([1 << 40])}),
        ("y = Expand(v, n)", {"v": np.float32([1.0]), "n": np.array([1 << 20])}),
        ("y = Tile(v, n)", {"v": np.float32([1.0]), "n": np.array([1 << 20])}),
        ("y = Range(a, n, b)", {"a": np.float32(0), "n": np.float32(1e9), "b": np.float32(1)}),
    ],
)
def test_does_not_blow_up(build, body, constants):
    model = build(f"() => (float[n] y) {{ {body} }}", **constants)
    result = PASS.call(model)
    assert not result.modified
    assert "larger than" in result.skipped[0].reason


def test_a_large_weight_is_folded(build):
    model = build(
        "(float[b,600] x) => (float[b,600] y) { t = Transpose(w) y = MatMul(x, t) }", w=np.ones((600, 600), np.float32)
    )
    assert PASS.call(model).fired == {FOLD: 1}


def test_integer_division_by_zero_stays(build):
    model = build("() => (int64[2] y) { y = Div(a, b) }", a=np.array([1, 2]), b=np.array([1, 0]))
    result = PASS.call(model)
    assert not result.modified
    assert "division by zero" in result.skipped[0].reason


def test_an_input_with_default_is_not_constant(build):
    model = build("(float[3,4] w, float[b,3] x) => (float[b,4] y) { n = Neg(w) y = MatMul(x, n) }", w=W)
    assert not PASS.call(model).modified


IF = """({c}float[b,3] x) => (float[b,3] y) {{
  r = Abs(x)
  y0 = If ({condition}) <then_branch = t () => (float[b,3] p) {{ h = Neg(r) p = Relu(h) }},
                         else_branch = e () => (float[b,3] q) {{ q = Identity(x) }}>
  y = Neg(y0) }}"""


@pytest.mark.parametrize("taken", [True, False])
def test_inlines_the_branch_taken(build, check, taken):
    model = build(IF.format(c="", condition="k"), k=np.array(taken))
    ops = ["Abs", "Neg", "Neg", "Relu"] if taken else ["Identity", "Neg"]
    check(model, PASS, X, fired={"if(constant) => branch": 1}, ops=ops)


def test_inlines_into_a_graph_output(build, check):
    text = IF.format(c="", condition="k").replace("y0 =", "y =").replace("y = Neg(y0)", "")
    check(build(text, k=np.array(True)), PASS, X, ops=["Abs", "Neg", "Relu"])


def test_keeps_if_with_computed_condition(build, check):
    model = build(IF.format(c="bool k, ", condition="k"))
    check(model, PASS, {"k": np.array(True), **X}, fired={})


def test_inlines_nested_if_and_captured_values(build, check):
    model = build(
        """(bool c, float[b,3] x) => (float[b,3] y) {
          y = If (c) <then_branch = t () => (float[b,3] p) {
                p = If (k) <then_branch = t2 () => (float[b,3] p2) { p2 = Neg(x) },
                            else_branch = e2 () => (float[b,3] q2) { q2 = Abs(x) }> },
              else_branch = e () => (float[b,3] q) { q = Relu(x) }> }""",
        k=np.array(False),
    )
    check(model, PASS, {"c": np.array(True), **X}, ops=["Abs", "If", "Relu"])


def test_result_dtype_is_kept(build):
    model = build("() => (float16[3] y) { y = Exp(a) }", a=np.float16([1, 2, 3]))
    PASS.call(model)
    (value,) = model.graph.initializers.values()
    assert value.dtype == oir.DataType.FLOAT16
