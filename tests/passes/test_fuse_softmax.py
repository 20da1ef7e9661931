"""Softmax and LogSoftmax."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.fuse.softmax import softmax_pass

SOFTMAX = "Exp(x)/Sum(Exp(x)) => Softmax(x)"
LAST = np.array([-1])
FIRST = np.array([1])


@pytest.mark.parametrize(
    "text",
    [
        "m = ReduceMax(x, ax) s = Sub(x, m) e = Exp(s) t = ReduceSum(e, ax) y = Div(e, t)",
        "e = Exp(x) t = ReduceSum(e, ax) y = Div(e, t)",
        "e = Exp(x) t = ReduceSum(e, ax) r = Reciprocal(t) y = Mul(r, e)",
    ],
)
@pytest.mark.parametrize("axes", [LAST, FIRST])
def test_softmax(text, axes, build, check, rng):
    model = build("(float[b,4,5] x) => (float[b,4,5] y) {" + text + "}", ax=axes)
    check(model, softmax_pass(), {"x": rng.standard_normal((3, 4, 5), np.float32)}, fired={SOFTMAX: 1}, ops=["Softmax"])
    assert model.graph.node(0).attributes["axis"].as_int() == axes[0] % 3


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("s = Softmax<axis=1>(x) y = Log(s)", "Log(Softmax(x)) => LogSoftmax(x)"),
        (
            "m = ReduceMax(x, ax) s = Sub(x, m) e = Exp(s) t = ReduceSum(e, ax) l = Log(t) y = Sub(s, l)",
            "x-Log(Sum(Exp(x))) => LogSoftmax(x)",
        ),
        ("l = ReduceLogSumExp(x, ax) y = Sub(x, l)", "x-Log(Sum(Exp(x))) => LogSoftmax(x)"),
    ],
)
def test_log_softmax(text, rule, build, check, rng):
    model = build("(float[b,4,5] x) => (float[b,4,5] y) {" + text + "}", ax=FIRST)
    check(model, softmax_pass(), {"x": rng.standard_normal((3, 4, 5), np.float32)}, fired={rule: 1}, ops=["LogSoftmax"])
    assert model.graph.node(0).attributes["axis"].as_int() == 1


def test_transposes_around_softmax(build, check, rng):
    text = "t = Transpose<perm=[0,2,1]>(x) s = Softmax<axis=-1>(t) y = Transpose<perm=[0,2,1]>(s)"
    model = build("(float[b,4,5] x) => (float[b,4,5] y) {" + text + "}")
    fired = {"Transpose(Softmax(Transpose(x))) => Softmax(x)": 1}
    check(model, softmax_pass(), {"x": rng.standard_normal((3, 4, 5), np.float32)}, fired=fired, ops=["Softmax"])
    assert model.graph.node(0).attributes["axis"].as_int() == 1


def test_transposes_that_are_not_inverse(build, check, rng):
    text = "t = Transpose<perm=[1,2,0]>(x) s = Softmax<axis=-1>(t) y = Transpose<perm=[1,2,0]>(s)"
    model = build("(float[b,4,5] x) => (float[5,b,4] y) {" + text + "}")
    result = check(model, softmax_pass(), {"x": rng.standard_normal((3, 4, 5), np.float32)}, fired={})
    assert "does not undo" in result.skipped[0].reason


def test_flattened_softmax_of_opset_12(build, check, rng):
    text = "f = Flatten<axis=2>(x) s = Softmax<axis=-1>(f) h = Shape(x) y = Reshape(s, h)"
    model = build("(float[b,4,5] x) => (float[b,4,5] y) {" + text + "}")
    fired = {"Reshape(Softmax(Flatten(x))) => Softmax(x)": 1}
    check(model, softmax_pass(), {"x": rng.standard_normal((3, 4, 5), np.float32)}, fired=fired, ops=["Softmax"])


def test_flattened_softmax_over_two_dimensions_stays(build, check, rng):
    text = "f = Flatten<axis=1>(x) s = Softmax<axis=-1>(f) h = Shape(x) y = Reshape(s, h)"
    model = build("(float[b,4,5] x) => (float[b,4,5] y) {" + text + "}")
    result = check(model, softmax_pass(), {"x": rng.standard_normal((3, 4, 5), np.float32)}, fired={})
    assert "is flattened to" in result.skipped[0].reason


@pytest.mark.parametrize(
    ("text", "outputs", "reason"),
    [
        ("e = Exp(x) t = ReduceSum<keepdims=1>(e, two) y = Div(e, t)", "y", "one known axis"),
        ("e = Exp(x) t = ReduceSum(e, ax) y = Div(e, t)", "y,e", "graph output"),
        ("e = Exp(x) t = ReduceSum(e, ax) y = Div(e, t) z = Neg(e)", "y,z", "also used by Neg"),
        ("s = Softmax<axis=1>(x) y = Log(s)", "y,s", "graph output"),
    ],
)
def test_near_misses(text, outputs, reason, build, check, rng):
    outs = ", ".join(f"float[b,4,5] {o}" for o in outputs.split(","))
    used = {n: v for n, v in {"ax": LAST, "two": np.array([1, 2])}.items() if f" {n})" in text}
    model = build(f"(float[b,4,5] x) => ({outs}) {{ {text} }}", **used)
    result = check(model, softmax_pass(), {"x": rng.standard_normal((3, 4, 5), np.float32)}, fired={})
    assert any(reason in skip.reason for skip in result.skipped)


def test_shift_over_another_axis_is_kept(build, check, rng):
    text = "m = ReduceMax(x, one) s = Sub(x, m) e = Exp(s) t = ReduceSum(e, ax) y = Div(e, t)"
    model = build("(float[b,4,5] x) => (float[b,4,5] y) {" + text + "}", ax=LAST, one=FIRST)
    ops = ["ReduceMax", "Sub", "Softmax"]
    check(model, softmax_pass(), {"x": rng.standard_normal((3, 4, 5), np.float32)}, fired={SOFTMAX: 1}, ops=ops)


def test_axes_of_a_graph_input_are_unknown(build):
    text = "e = Exp(x) t = ReduceSum(e, ax) y = Div(e, t)"
    result = softmax_pass().call(build("(float[b,4,5] x, int64[1] ax) => (float[b,4,5] y) {" + text + "}"))
    assert not result.fired
    assert "one known axis" in result.skipped[0].reason
