"""The lowering core: symbolic shape values, refusals, weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from optc.backends.cpu.target import resolve
from optc.backends.lowering import TABLE
from optc.backends.lowering.lower import Lowerer, lower
from optc.errors import UnsupportedModelError
from optc.frontend.onnx import load

X = np.arange(24, dtype="f4").reshape(4, 6)


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>' + text.replace("'", '"'))


def kernels(text: str) -> list[str]:
    """Return the names of the kernels that a model is lowered to."""
    module = lower(load(parse(text)), TABLE, resolve("cpu")).module
    return sorted(str(v.name_hint) for v in module.functions if str(v.name_hint) != "main")


CONSTANTS = """i0 = Constant<value_ints = [0]>() i1 = Constant<value_ints = [1]>() i2 = Constant<value_ints = [2]>()
    i3 = Constant<value_ints = [3]>() m1 = Constant<value_ints = [-1]>() one = Constant<value_int = 1>()
    half = Constant<value_floats = [0.5, 2.5]>() s = Shape(x) """


def arithmetic(body: str) -> str:
    return "g (float[a, b] x) => (float y) { " + CONSTANTS + body + " }"


@pytest.mark.parametrize(
    "body",
    [
        "p = ReduceProd(s) y = Reshape(x, p)",
        "a = Slice(s, i0, i1) b = Slice(s, i1, i2) t = Concat<axis = 0>(b, a) y = Reshape(x, t)",
        "a = Slice(s, i0, i1) h = Div(a, i2) t = Concat<axis = 0>(h, m1) y = Reshape(x, t)",
        "b = Gather(s, one) d = Mul(b, one) u = Unsqueeze(d, i0) t = Concat<axis = 0>(m1, u) y = Reshape(x, t)",
        "c = Cast<to = 1>(s) d = Mul(c, half) e = Floor(d) t = Cast<to = 7>(e) y = ConstantOfShape(t)",
        "c = Cast<to = 1>(s) d = Div(c, half) e = Ceil(d) t = Cast<to = 7>(e) y = ConstantOfShape(t)",
        "e = Equal(s, s) t = Where(e, s, m1) y = Reshape(x, t)",
        "r = ConstantOfShape<value = int64[1] {1}>(i2) e = Equal(r, i1) t = Where(e, s, r) y = Reshape(x, t)",
        "g = GreaterOrEqual(s, i0) n = Not(g) t = Where(n, m1, s) y = Reshape(x, t)",
        "o = Max(s, i3) t = Min(o, i2) y = ConstantOfShape(t)",
        "n = Neg(s) k = Abs(s) a = Add(n, k) t = Sub(s, a) y = Reshape(x, t)",
        "k = Mod(s, i2) t = Add(k, i1) y = ConstantOfShape(t)",
        "u = Tile(s, i2) t = Slice(u, i2, i3) y = ConstantOfShape(t)",
        "q = ReduceMax<keepdims = 1>(s) y = ConstantOfShape(q)",
    ],
)
def test_shape_arithmetic(check, body):
    check(arithmetic(body), (X,), (X[:2],), (X[:, :4],))


def test_shape_arithmetic_costs_no_kernel():
    assert kernels(arithmetic("a = Slice(s, i0, i1) t = Concat<axis = 0>(a, m1) y = Reshape(x, t)")) == []
    names = kernels(
        arithmetic("c = Cast<to = 1>(s) d = Mul(c, half) e = Floor(d) t = Cast<to = 7>(e) y = ConstantOfShape(t)")
    )
    assert len(names) == 1


def test_a_shape_is_a_tensor_where_one_is_wanted(check):
    check("g (float[a, b] x) => (int64[n] y) { s = Shape(x) y = Add(s, s) }", (X,))
    check("g (float[a, b] x) => (float[n] y, int64 z) { s = Shape(x) y = Cast<to = 1>(s) z = Size(x) }", (X,))


def test_a_factor_that_is_not_exact_is_computed_in_floating_point(check):
    body = "f = Constant<value_floats = [0.7, 0.3]>() c = Cast<to = 1>(s) d = Mul(c, f) e = Floor(d) "
    check(arithmetic(body + "t = Cast<to = 7>(e) y = ConstantOfShape(t)"), (np.ones((10, 20), "f4"),), (X,))


def test_negative_numbers_read_at_run_time_keep_their_sign(check):
    text = """g (float[a, b] x, int64[1] n) => (float[p, q] y, int64[1] z) {
        i0 = Constant<value_ints = [0]>() e = Constant<value_ints = [100]>() m = Neg(n)
        y = Slice(x, n, e, i0) z = Max(m, i0) }"""
    check(text, *((X, np.array([n])) for n in (-1, -3, 0, 2)))


def test_everything_refused_is_named_at_once():
    text = """g (float[a, b] x, string[n] t) => (float y) {
        k = RandomNormalLike(x) y = RandomUniformLike(k) z = Multinomial(x) }"""
    with pytest.raises(UnsupportedModelError) as caught:
        lower(load(parse(text)), TABLE, resolve("cpu"))
    assert "'t'" in str(caught.value)
    text = text.replace(", string[n] t", "")
    with pytest.raises(UnsupportedModelError) as caught:
        lower(load(parse(text)), TABLE, resolve("cpu"))
    message = str(caught.value)
    assert "RandomNormalLike" in message
    assert "Multinomial" in message
    assert "RandomUniformLike" not in message, "a node behind a refused one is not a finding of its own"
    assert caught.value.hint is not None


def test_weights_of_one_name_and_different_contents_are_two():
    lowerer = Lowerer(load(parse("g (float[a] x) => (float[a] y) { y = Neg(x) }")), TABLE, resolve("cpu"), (), None)
    first = lowerer.weight(np.zeros(3, "f4"), "w")
    assert lowerer.weight(np.zeros(3, "f4"), "w") is first
    assert lowerer.weight(np.ones(3, "f4"), "w") is not first
    assert len(lowerer.weights) == 2


def test_an_element_of_a_shape_can_go_through_an_empty_tensor(check):
    text = "g (float[0, b] x) => (int64[n] y, float[p] z) { y = Shape(x) k = Constant<value_ints = [-1]>() "
    check(text + "z = Reshape(x, k) }", (np.zeros((0, 3), "f4"),))
