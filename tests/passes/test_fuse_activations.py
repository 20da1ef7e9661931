"""Activations written in elementary operators."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.fuse.activations import activations_pass
from optc.passes.fuse.portable import portable_pass

HEAD = "(float[b,5] x) => (float[b,5] y) "
CONSTANTS = {
    "zero": 0.0, "one": 1.0, "two": 2.0, "three": 3.0, "six": 6.0, "sixth": 1 / 6, "half": 0.5, "fifth": 0.2,
    "mfifth": -0.2, "mone": -1.0, "alpha": 1.702, "twenty": 20.0, "ten": 10.0, "huge": 3.4028235e38,
}  # fmt: skip

SIGMOID = "1/(1+exp(-x)) => Sigmoid(x)"
HARD_SIGMOID = "k*Clip(a*x+b,0,1/k) => HardSigmoid(x,a*k,b*k)"
HARD_SWISH = "x*k*Clip(x+3,0,6) => HardSwish(x)"
CLIP = "Min(Max(x,a),b) => Clip(x,a,b)"
SPELLINGS = [
    ("e = Neg(x) f = Exp(e) g = Add(f, one) y = Div(one, g)", {SIGMOID: 1}, ["Sigmoid"]),
    ("e = Mul(x, mone) f = Exp(e) g = Add(one, f) y = Reciprocal(g)", {SIGMOID: 1}, ["Sigmoid"]),
    ("e = Exp(x) f = Add(e, one) y = Log(f)", {"Log(1+Exp(x)) => Softplus(x)": 1}, ["Softplus"]),
    (
        "t = Softplus(x) c = Greater(x, twenty) y = Where(c, x, t)",
        {"Where(x>t, x, Softplus(x)) => Softplus(x)": 1},
        ["Softplus"],
    ),
    ("t = Softplus(x) u = Tanh(t) y = Mul(u, x)", {"x*Tanh(Softplus(x)) => Mish(x)": 1}, ["Mish"]),
    (
        "e = Exp(x) f = Add(one, e) s = Log(f) u = Tanh(s) y = Mul(x, u)",
        {"Log(1+Exp(x)) => Softplus(x)": 1, "x*Tanh(Softplus(x)) => Mish(x)": 1},
        ["Mish"],
    ),
    ("y = Max(x, zero)", {"Max(x,0) => Relu(x)": 1}, ["Relu"]),
    ("y = Clip(x, zero)", {"Clip(x,0,inf) => Relu(x)": 1}, ["Relu"]),
    ("y = Clip(x, zero, huge)", {"Clip(x,0,inf) => Relu(x)": 1}, ["Relu"]),
    ("m = Max(x, mone) y = Min(m, two)", {CLIP: 1}, ["Clip"]),
    ("m = Min(two, x) y = Max(m, mone)", {CLIP: 1}, ["Clip"]),
    ("m = Relu(x) y = Min(m, six)", {CLIP: 1}, ["Clip"]),
    ("m = Relu(x) y = Clip(m, mone, six)", {"Clip(Relu(x),a,b) => Clip(x,max(a,0),b)": 1}, ["Clip"]),
    (
        "m = Mul(x, fifth) s = Add(m, half) y = Clip(s, zero, one)",
        {"Clip(a*x+b,0,1) => HardSigmoid(x,a,b)": 1},
        ["HardSigmoid"],
    ),
    ("s = Add(x, three) c = Clip(s, zero, six) y = Div(c, six)", {HARD_SIGMOID: 1}, ["HardSigmoid"]),
    ("s = Add(three, x) c = Clip(s, zero, six) y = Mul(sixth, c)", {HARD_SIGMOID: 1}, ["HardSigmoid"]),
    ("s = Add(x, three) c = Clip(s, zero, six) m = Mul(x, c) y = Div(m, six)", {HARD_SWISH: 1}, ["HardSwish"]),
    ("s = Add(x, three) c = Clip(s, zero, six) m = Mul(x, sixth) y = Mul(c, m)", {HARD_SWISH: 1}, ["HardSwish"]),
    (
        "s = Add(x, three) c = Clip(s, zero, six) m = Div(c, six) y = Mul(m, x)",
        {HARD_SIGMOID: 1, "x*HardSigmoid(x,1/6,1/2) => HardSwish(x)": 1},
        ["HardSwish"],
    ),
    (
        "s = Add(x, three) r = Relu(s) c = Min(r, six) m = Mul(x, c) y = Div(m, six)",
        {CLIP: 1, HARD_SWISH: 1},
        ["HardSwish"],
    ),
    ("m = Mul(x, fifth) y = Max(x, m)", {"Max(x,a*x) => LeakyRelu(x,a)": 1}, ["LeakyRelu"]),
    (
        "c = Greater(x, zero) m = Mul(x, fifth) y = Where(c, x, m)",
        {"Where(x>0, x, a*x) => LeakyRelu(x,a)": 1},
        ["LeakyRelu"],
    ),
    (
        "p = Relu(x) n = Neg(x) r = Relu(n) m = Mul(r, mfifth) y = Add(p, m)",
        {"Relu(x)-a*Relu(-x) => PRelu(x,a)": 1},
        ["LeakyRelu"],
    ),
    (
        "p = Relu(x) n = Neg(x) r = Relu(n) m = Mul(slope, r) y = Sub(p, m)",
        {"Relu(x)-a*Relu(-x) => PRelu(x,a)": 1},
        ["PRelu"],
    ),
]  # fmt: skip


def constants(text: str) -> dict[str, np.ndarray]:
    words = set(text.replace(")", " ").replace("(", " ").replace(",", " ").split())
    found = {name: np.array(value, np.float32) for name, value in CONSTANTS.items() if name in words}
    if "slope" in words:
        found["slope"] = np.linspace(0.1, 0.5, 5, dtype=np.float32)
    return found


def values(rng: np.random.Generator) -> np.ndarray:
    return (rng.standard_normal((7, 5)) * 5).astype(np.float32)


@pytest.mark.parametrize(("text", "fired", "ops"), SPELLINGS)
def test_spelling(text, fired, ops, build, check, rng):
    check(
        build(HEAD + "{" + text + "}", **constants(text)), activations_pass(), {"x": values(rng)}, fired=fired, ops=ops
    )


@pytest.mark.parametrize(
    ("text", "alpha"),
    [
        ("s = Sigmoid(x) y = Mul(x, s)", 1.0),
        ("m = Mul(alpha, x) s = Sigmoid(m) y = Mul(s, x)", 1.702),
        ("n = Neg(x) e = Exp(n) p = Add(one, e) y = Div(x, p)", 1.0),
    ],
)
def test_swish(text, alpha, build, check, op_types, rng):
    model = build(HEAD + "{" + text + "}", **constants(text))
    result = activations_pass().call(model)
    assert result.fired["x*Sigmoid(alpha*x) => Swish(x, alpha)"] == 1
    assert op_types(model) == ["Swish"]
    assert model.graph.node(0).attributes["alpha"].as_float() == pytest.approx(alpha)
    # onnxruntime has no Swish: compare what it can run.
    fresh = build(HEAD + "{" + text + "}", **constants(text))
    check(fresh, [activations_pass(), portable_pass()], {"x": values(rng)})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("t = Softplus(x) c = Greater(x, ten) y = Where(c, x, t)", "threshold"),
        ("m = Max(x, two) y = Min(m, mone)", "exceeds"),
        ("s = Add(x, three) c = Clip(s, zero, six) y = Div(c, two)", "does not end at 1"),
        ("s = Add(x, two) c = Clip(s, zero, six) m = Mul(x, c) y = Div(m, six)", "the gate is clip"),
        ("h = HardSigmoid<alpha=0.2, beta=0.5>(x) y = Mul(x, h)", "the gate is HardSigmoid"),
        ("m = Mul(x, two) y = Max(x, m)", "no leaky Relu"),
        ("m = Add(x, one) s = Sigmoid(m) y = Mul(x, s)", "not a multiple"),
    ],
)
def test_near_misses(text, reason, build, check, rng):
    model = build(HEAD + "{" + text + "}", **constants(text))
    result = check(model, activations_pass(), {"x": values(rng)}, fired={})
    assert any(reason in skip.reason for skip in result.skipped)


@pytest.mark.parametrize(
    ("text", "outputs", "reason"),
    [
        ("s = Sigmoid(x) y = Mul(x, s)", "y,s", "graph output"),
        ("s = Sigmoid(x) y = Mul(x, s) z = Neg(s)", "y,z", "also used by Neg"),
        ("s = Softplus(x) u = Tanh(s) y = Mul(x, u) z = Neg(s)", "y,z", "also used by Neg"),
        ("e = Exp(x) f = Add(e, one) y = Log(f)", "y,f", "graph output"),
        ("s = Add(x, three) c = Clip(s, zero, six) y = Div(c, six) z = Neg(c)", "y,z", "also used by Neg"),
    ],
)
def test_parts_that_are_needed_elsewhere(text, outputs, reason, build, check, rng):
    outs = ", ".join(f"float[b,5] {o}" for o in outputs.split(","))
    model = build(f"(float[b,5] x) => ({outs}) {{ {text} }}", **constants(text))
    result = check(model, activations_pass(), {"x": values(rng)}, fired={})
    assert any(reason in skip.reason for skip in result.skipped)


@pytest.mark.parametrize(
    "text",
    [
        "s = Sigmoid(v) y = Mul(x, s)",
        "y = Max(x, v)",
        "y = Max(x, one)",
        "y = Clip(x, zero, six)",
        "y = Clip(x, one)",
        "m = Mul(v, fifth) y = Max(x, m)",
        "y = Clip(x, zero, one)",
        "e = Exp(x) f = Add(e, two) y = Log(f)",
        "s = Add(v, three) c = Clip(s, zero, six) m = Mul(x, c) y = Neg(m)",
    ],
)
def test_other_functions_stay(text, build, check, rng):
    model = build("(float[b,5] x, float[b,5] v) => (float[b,5] y) {" + text + "}", **constants(text))
    assert not check(model, activations_pass(), {"x": values(rng), "v": values(rng)}, fired={}).skipped


def test_bounds_that_are_not_constant(build, check, rng):
    model = build("(float[b,5] x, float low) => (float[b,5] y) { m = Max(x, low) y = Min(m, six) }", **constants("six"))
    check(model, activations_pass(), {"x": values(rng), "low": np.array(-1, np.float32)}, fired={}, ops=["Max", "Min"])


def test_integers_stay(build, check):
    model = build("(int32[b,5] x) => (int32[b,5] y) { y = Max(x, zero) }", zero=np.array(0, np.int32))
    check(model, activations_pass(), {"x": np.arange(-5, 5, dtype=np.int32).reshape(2, 5)}, fired={})


def test_constant_of_higher_rank_widens_the_result(build, check, rng):
    model = build("(float[b,5] x) => (float[1,b,5] y) { y = Max(x, zero) }", zero=np.zeros((1, 1, 1), np.float32))
    result = check(model, activations_pass(), {"x": values(rng)}, fired={})
    assert "shape" in result.skipped[0].reason
