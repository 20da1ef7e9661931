"""Constants of chains."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.simplify.reassociate import PASS

X = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}
HEAD = "(float[b,3,4] x) => (float[n] y)"
SUM = "(x + c1) + c2 => x + (c1+c2)"
PRODUCT = "(x * c1) * c2 => x * (c1*c2)"
TWO = {"c": np.float32(3), "d": np.float32([1, 2, 3, 5])}


@pytest.mark.parametrize(
    ("rule", "body", "ops"),
    [
        (SUM, "a = Add(x, c) y = Add(d, a)", ["Add"]),
        (SUM, "a = Sub(x, c) y = Add(a, d)", ["Add"]),
        (SUM, "a = Add(c, x) y = Sub(a, d)", ["Add"]),
        (SUM, "a = Sub(x, c) y = Sub(a, d)", ["Add"]),
        (PRODUCT, "a = Mul(x, c) y = Mul(d, a)", ["Mul"]),
        (PRODUCT, "a = Div(x, c) y = Mul(a, d)", ["Mul"]),
        (PRODUCT, "a = Mul(x, c) y = Div(a, d)", ["Mul"]),
        (PRODUCT, "a = Div(x, c) y = Div(a, d)", ["Div"]),
    ],
)
def test_rule(build, check, rule, body, ops):
    check(build(f"{HEAD} {{ {body} }}", **TWO), PASS, X, fired={rule: 1}, ops=ops)


def test_chain_of_four(build, check):
    model = build(f"{HEAD} {{ a = Add(x, c) e = Add(a, d) f = Sub(e, c) y = Add(f, c) }}", **TWO)
    check(model, PASS, X, fired={SUM: 3}, ops=["Add"])


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("a = Sub(c, x) y = Add(a, c)", TWO),
        ("a = Div(c, x) y = Mul(a, c)", TWO),
        ("a = Add(x, c) y = Mul(a, d)", TWO),
        ("a = Add(x, c) y = Add(a, x)", TWO),
        ("a = Add(x, c) y = Add(a, d)", {"c": np.ones((3, 1), np.float32), "d": np.ones((1, 4), np.float32)}),
        ("a = Mul(x, c) y = Mul(a, d)", {"c": np.float32(1e30), "d": np.float32(1e30)}),
        ("a = Mul(x, c) y = Mul(a, d)", {"c": np.float32(1e-30), "d": np.float32(1e-30)}),
        ("a = Mul(x, c) y = Div(a, d)", {"c": np.float32(1), "d": np.float32(0)}),
    ],
)
def test_kept(build, check, body, constants):
    check(build(f"{HEAD} {{ {body} }}", **constants), PASS, X, fired={}, rtol=1e-4)


def test_fan_out_and_graph_output_stay(build, check):
    model = build("(float[b,3,4] x) => (float[n] a, float[n] y) { a = Add(x, c) y = Add(a, d) }", **TWO)
    result = check(model, PASS, X, fired={})
    assert "elsewhere" in result.skipped[0].reason


def test_integer_sums_are_combined_and_products_are_not(build, check):
    feeds = {"x": np.array([5, -5])}
    text = "(int64[b] x) => (int64[b] y) {{ a = {0}(x, c) y = {0}(a, c) }}"
    check(build(text.format("Sub"), c=np.array(2)), PASS, feeds, fired={SUM: 1}, ops=["Add"])
    check(build(text.format("Div"), c=np.array(2)), PASS, feeds, fired={})


def test_rounding_idiom_stays(build, check):
    model = build(f"{HEAD} {{ a = Add(x, c) y = Sub(a, c) }}", c=np.float32(3 << 22))
    result = check(model, PASS, X, fired={})
    assert "may be there to round" in result.skipped[0].reason


def test_half_precision_overflow_stays(build):
    model = build("(float16[b] x) => (float16[b] y) { a = Mul(x, c) y = Mul(a, c) }", c=np.float16(300))
    assert "overflows" in PASS.call(model).skipped[0].reason
