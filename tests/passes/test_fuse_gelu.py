"""Gelu in the spellings of the exporters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from optc.passes.fuse.gelu import gelu_pass

ERF = "0.5*x*(1+erf(x/sqrt(2))) => Gelu(x)"
TANH = "0.5*x*(1+tanh(sqrt(2/pi)*(x+0.044715*x^3))) => Gelu(x, tanh)"


def scalars(**numbers: float) -> dict[str, np.ndarray]:
    return {name: np.array(value, np.float32) for name, value in numbers.items()}


BASE = scalars(half=0.5, one=1.0, two=2.0, root2=math.sqrt(2), iroot2=1 / math.sqrt(2), three=3.0)
TAIL = scalars(c=0.044715, k=math.sqrt(2 / math.pi), ck=0.044715 * math.sqrt(2 / math.pi))
HEAD = "(float[b,5] x) => (float[b,5] y) "

ERF_SPELLINGS = {
    "torch": "a = Div(x, root2) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)",
    "half first": "h = Mul(x, half) a = Mul(x, iroot2) e = Erf(a) p = Add(one, e) y = Mul(h, p)",
    "tensorflow": "a = Mul(iroot2, x) e = Erf(a) p = Add(e, one) q = Mul(half, p) y = Mul(x, q)",
    "divided by two": "a = Div(x, root2) e = Erf(a) p = Add(e, one) m = Mul(p, x) y = Div(m, two)",
    "distributed": "h = Mul(x, half) a = Div(x, root2) e = Erf(a) m = Mul(h, e) y = Add(h, m)",
}
TANH_SPELLINGS = {
    "pow": "p = Pow(x, three) q = Mul(p, c) s = Add(x, q) a = Mul(s, k) t = Tanh(a) u = Add(t, one) "
    "h = Mul(x, half) y = Mul(h, u)",
    "x*x*x": "p = Mul(x, x) q = Mul(p, x) r = Mul(c, q) s = Add(r, x) a = Mul(k, s) t = Tanh(a) u = Add(one, t) "
    "m = Mul(x, u) y = Mul(half, m)",
    "factored": "p = Mul(x, x) q = Mul(p, ck) s = Add(q, k) a = Mul(x, s) t = Tanh(a) u = Add(t, one) "
    "v = Mul(u, half) y = Mul(v, x)",
}


@pytest.mark.parametrize("name", ERF_SPELLINGS)
def test_erf(name, build, check, rng):
    model = build(HEAD + "{" + ERF_SPELLINGS[name] + "}", **BASE)
    check(model, gelu_pass(), {"x": rng.standard_normal((3, 5), np.float32) * 3}, fired={ERF: 1}, ops=["Gelu"])
    assert model.graph.node(0).attributes["approximate"].as_string() == "none"


@pytest.mark.parametrize("name", TANH_SPELLINGS)
def test_tanh(name, build, check, rng):
    model = build(HEAD + "{" + TANH_SPELLINGS[name] + "}", **BASE, **TAIL)
    check(model, gelu_pass(), {"x": rng.standard_normal((3, 5), np.float32) * 3}, fired={TANH: 1}, ops=["Gelu"])
    assert model.graph.node(0).attributes["approximate"].as_string() == "tanh"


def test_argument_may_be_arithmetic_itself(build, check, rng):
    text = "w = Mul(z, two) x = Add(w, v) a = Div(x, root2) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)"
    model = build("(float[b,5] z, float[b,5] v) => (float[b,5] y) {" + text + "}", **BASE)
    feeds = {name: rng.standard_normal((3, 5), np.float32) for name in "zv"}
    check(model, gelu_pass(), feeds, fired={ERF: 1}, ops=["Mul", "Add", "Gelu"])


def test_gated_gelu_keeps_the_other_factor(build, check, rng):
    text = "a = Div(x, root2) e = Erf(a) p = Add(e, one) m = Mul(x, p) n = Mul(m, half) y = Mul(n, g)"
    model = build("(float[b,5] x, float[b,5] g) => (float[b,5] y) {" + text + "}", **BASE)
    feeds = {name: rng.standard_normal((3, 5), np.float32) for name in "xg"}
    check(model, gelu_pass(), feeds, fired={ERF: 1}, ops=["Gelu", "Mul"])


@pytest.mark.parametrize(
    ("text", "outputs", "reason"),
    [
        ("a = Div(x, root2) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, third)", "y", "combined as"),
        ("a = Div(x, root2) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)", "y,e", "graph output"),
        (
            "a = Div(x, root2) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, half) z = Neg(p)",
            "y,z",
            "also used by Neg",
        ),
        ("a = Div(x, root2) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, wide)", "y", "shape"),
    ],
)
def test_near_misses(text, outputs, reason, build, check, rng):
    outs = ", ".join(f"float[b,5] {o}" for o in outputs.split(","))
    if "wide" in text:
        outs = "float[1,b,5] y"
    extra = {"third": np.float32(1 / 3), "wide": np.full((1, 1, 1), 0.5, np.float32)}
    used = {n: v for n, v in {**BASE, **extra}.items() if n in text}
    model = build(f"(float[b,5] x) => ({outs}) {{ {text} }}", **used)
    result = check(model, gelu_pass(), {"x": rng.standard_normal((3, 5), np.float32)}, fired={})
    assert any(reason in skip.reason for skip in result.skipped)


@pytest.mark.parametrize(
    "text",
    [
        "a = Mul(x, two) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)",
        "a = Mul(x, v) e = Erf(a) p = Add(e, one) m = Mul(x, p) y = Mul(m, half)",
        "a = Div(x, root2) e = Erf(a) p = Add(e, one) m = Mul(v, p) y = Mul(m, half)",
        "a = Mul(x, quick) e = Sigmoid(a) y = Mul(x, e)",
    ],
)
def test_other_functions_stay(text, build, check, rng):
    model = build("(float[b,5] x, float[b,5] v) => (float[b,5] y) {" + text + "}", **BASE, quick=np.float32(1.702))
    feeds = {name: rng.standard_normal((3, 5), np.float32) for name in "xv"}
    assert not check(model, gelu_pass(), feeds, fired={}).modified
