"""Packed weights, dynamic int8 and half precision: structure, numbers, and what is left alone."""

import ml_dtypes
import numpy as np
import pytest

from optc.ir.reference import evaluate
from optc.passes.quantize.dynamic import DynamicPass
from optc.passes.quantize.half import HalfPass
from optc.passes.quantize.products import products
from optc.passes.quantize.weight_only import WeightOnlyPass, matrices, rounded, tables, turned

F = np.float32


@pytest.mark.parametrize("kind", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("block", [0, 32])
def test_matrices_are_what_their_integers_stand_for(kind, block, build, verify, rng):
    arrays = {"w": rng.normal(0, 1, (96, 64)).astype(F), "v": rng.normal(0, 1, (80, 64)).astype(F)}
    model = build(
        "(float[3,96] x) => (float[3,80] y) { h = MatMul(x, w) y = Gemm<transB=1>(h, v, b) }",
        **arrays,
        b=rng.normal(0, 1, 80).astype(F),
    )
    found = {p.name: rounded(p.matrix().T, kind, block) for p in matrices(model)}
    x = rng.normal(0, 1, (3, 96)).astype(F)
    w, v = (a.dequantized() for a in found.values())
    bias = model.graph.initializers["b"].const_value.numpy()
    result = WeightOnlyPass(found).call(model)
    assert result.fired == {"packed": 2}
    verify(model)
    assert np.allclose(evaluate(model, {"x": x})["y"], (x @ w) @ v + bias, rtol=1e-4, atol=1e-3)
    assert not set(arrays) & set(model.graph.initializers)


def test_tables_of_gather_are_packed_by_rows(build, verify, rng):
    table = rng.normal(0, 1, (100, 64)).astype(F)
    model = build("(int64[4] i) => (float[4,64] y) { y = Gather(t, i) }", t=table)
    (node,) = tables(model)
    array = turned(rounded(table.T, "int4", 32))
    WeightOnlyPass({node.name: array}).call(model)
    verify(model)
    rows = np.array([3, 99, 0, 3])
    assert np.array_equal(evaluate(model, {"i": rows})["y"], array.dequantized()[rows])


def test_small_and_convolved_weights_stay(build, rng):
    model = build(
        "(float[1,8,5,5] x) => (float[1,64,5,5] y) { y = Conv(x, w) }", w=rng.normal(0, 1, (64, 8, 1, 1)).astype(F)
    )
    assert not matrices(model)
    assert not matrices(build("(float[1,8] x) => (float[1,8] y) { y = MatMul(x, w) }", w=np.eye(8, dtype=F)))
    assert not WeightOnlyPass({}).call(model).modified


def test_dynamic_int8(build, run, verify, rng):
    def weights(*shape):
        return (rng.uniform(-1, 1, shape) / np.sqrt(np.prod(shape[1:]))).astype(F)

    model = build(
        """(float[2,3,6,6] x) => (float[2,5] y, float[2,4,6,6] c) {
        c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) f = Flatten(r) y = Gemm<transB=1>(f, v, d) }""",
        w=weights(4, 3, 3, 3),
        b=weights(4),
        v=weights(5, 144),
        d=weights(5),
    )
    feeds = {"x": rng.uniform(-1, 1, (2, 3, 6, 6)).astype(F)}
    before = run(model, feeds)
    result = DynamicPass(frozenset(p.name for p in products(model)), bits=7).call(model)
    assert result.fired == {"quantized": 2}
    verify(model)
    for want, got in zip(before, run(model, feeds), strict=True):
        assert np.abs(want - got).max() < 0.05 * np.abs(want).max()
    assert not DynamicPass(frozenset()).call(model).modified


def test_dynamic_products_one_behind_the_other(build, run, verify, rng):
    arrays = {name: rng.uniform(-0.3, 0.3, shape).astype(F) for name, shape in {"w": (8, 6), "v": (6, 5)}.items()}
    model = build("(float[4,8] x) => (float[4,5] y) { h = MatMul(x, w) y = MatMul(h, v) }", **arrays)
    feeds = {"x": rng.uniform(-1, 1, (4, 8)).astype(F)}
    (before,) = run(model, feeds)
    assert DynamicPass(frozenset(p.name for p in products(model)), bits=7).call(model).fired == {"quantized": 2}
    verify(model)
    (after,) = run(model, feeds)
    assert np.abs(before - after).max() < 0.05 * np.abs(before).max()


HALF = """(float[2,8] x) => (float[2,8] y, float[2,8] h) {
 h = MatMul(x, w) s = Softmax(h) m = MatMul(s, v) a = Add(m, e) y = Relu(a) }"""


@pytest.mark.parametrize(("kind", "eps"), [("float16", 1e-2), ("bfloat16", 6e-2)])
def test_half_precision_has_islands(kind, eps, build, verify, rng):
    arrays = {name: rng.normal(0, 1, (8, 8)).astype(F) for name in "wv"}
    model = build(HALF, **arrays, e=np.full(8, 1e-9 if kind == "float16" else 1.0, F))
    feeds = {"x": rng.normal(0, 1, (2, 8)).astype(F)}
    before = evaluate(model, feeds)
    assert HalfPass(kind).call(model).modified
    verify(model)
    assert [v.dtype.name for v in model.graph.outputs] == ["FLOAT", "FLOAT"]
    types = {node.op_type: node.outputs[0].dtype.name for node in model.graph if node.op_type != "Cast"}
    assert types["Softmax"] == "FLOAT"
    assert types["MatMul"] == types["Relu"] == kind.upper()
    # A constant that vanishes in float16 keeps its operator in float32.
    assert types["Add"] == ("FLOAT" if kind == "float16" else kind.upper())
    after = evaluate(model, feeds)
    for name, want in before.items():
        assert np.abs(want - after[name]).max() < eps * np.abs(want).max()


def test_values_that_are_large_and_nodes_that_are_excluded_stay(build, rng):
    model = build(HALF, w=np.eye(8, dtype=F), v=np.full((8, 8), 1e5, F), e=np.ones(8, F))
    half = HalfPass("float16", large=["a"], exclude=["n0"])
    reasons = [half.island(node) for node in model.graph]
    assert reasons == ["excluded", "needs float32", "a constant overflows or vanishes", "large values", "large values"]
    assert not half.call(model).modified


def test_bfloat16_has_the_range_of_float32(build):
    model = build("(float[2,8] x) => (float[2,8] y) { y = Mul(x, c) }", c=np.full(8, 1e30, F))
    assert HalfPass("bfloat16").call(model).modified
    assert model.graph.initializers["c.half"].const_value.numpy().dtype == ml_dtypes.bfloat16
