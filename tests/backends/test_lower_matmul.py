"""MatMul and Gemm against NumPy and onnxruntime: ranks, broadcasting, packed and run-time operands, odd sizes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from optc.errors import UnsupportedModelError

F = np.float32


def data(*shape, dtype=F, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def matmul_model(make_model, a, b, constant):
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    inputs = {"a": (a.dtype, a.shape)} | ({} if constant else {"b": (b.dtype, b.shape)})
    return make_model([node], inputs, {"y": a.dtype}, {"b": b} if constant else {})


@pytest.mark.parametrize("constant", [True, False], ids=["packed", "run-time"])
@pytest.mark.parametrize(
    ("left", "right"),
    [((5, 7), (7, 33)), ((2, 3, 5, 7), (7, 16)), ((7,), (7, 3)), ((5, 7), (7,)), ((7,), (7,)), ((0, 7), (7, 4))],
)
def test_ranks(compile_model, make_model, left, right, constant):
    a, b = data(*left), data(*right, seed=1)
    (y,) = compile_model(matmul_model(make_model, a, b, constant))(*([a] if constant else [a, b]))
    np.testing.assert_allclose(y, a @ b, rtol=1e-5, atol=1e-5)
    assert y.shape == (a @ b).shape


@pytest.mark.parametrize(("left", "right"), [((2, 1, 5, 7), (3, 7, 9)), ((3, 5, 7), (1, 7, 9)), ((2, 5, 0), (2, 0, 9))])
def test_batches_broadcast(compile_model, make_model, left, right):
    a, b = data(*left), data(*right, seed=1)
    (y,) = compile_model(matmul_model(make_model, a, b, False))(a, b)
    np.testing.assert_allclose(y, a @ b, rtol=1e-5, atol=1e-5)


def test_symbolic_dimensions_take_any_size(compile_model, make_model):
    w = data(40, 50)
    nodes = [helper.make_node("MatMul", ["a", "w"], ["t"]), helper.make_node("Relu", ["t"], ["y"])]
    run = compile_model(make_model(nodes, {"a": (F, ["b", "s", 40])}, {"y": F}, {"w": w}))
    for batch, rows in [(1, 1), (2, 3), (3, 37), (0, 4)]:
        a = data(batch, rows, 40, seed=rows)
        np.testing.assert_allclose(run(a)[0], np.maximum(a @ w, 0), rtol=1e-5, atol=1e-5)


def test_symbolic_batch_of_one_broadcasts(compile_model, make_model):
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    run = compile_model(make_model([node], {"a": (F, ["p", 4, 5]), "b": (F, ["q", 5, 6])}, {"y": F}))
    for p, q in [(3, 3), (1, 3), (3, 1)]:
        a, b = data(p, 4, 5), data(q, 5, 6, seed=1)
        np.testing.assert_allclose(run(a, b)[0], a @ b, rtol=1e-5, atol=1e-5)


def test_a_wrong_run_time_depth_is_an_error(compile_model, make_model):
    node = helper.make_node("MatMul", ["a", "w"], ["y"])
    run = compile_model(make_model([node], {"a": (F, [2, "k"])}, {"y": F}, {"w": data(6, 5)}))
    assert run(data(2, 6))[0].shape == (2, 5)
    with pytest.raises(Exception, match="match"):
        run(data(2, 4))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int32, np.int64, np.uint32])
@pytest.mark.parametrize("constant", [True, False])
def test_element_types(compile_model, make_model, dtype, constant):
    integer = np.dtype(dtype).kind in "iu"
    a = np.arange(15).reshape(3, 5).astype(dtype) if integer else data(3, 5).astype(dtype)
    b = np.arange(100).reshape(5, 20).astype(dtype) if integer else data(5, 20, seed=1).astype(dtype)
    (y,) = compile_model(matmul_model(make_model, a, b, constant))(*([a] if constant else [a, b]))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    tolerance = {np.float16: 2e-3, ml_dtypes.bfloat16: 2e-2}.get(dtype, 1e-12)
    np.testing.assert_allclose(y.astype(np.float64), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("c_shape", [None, (), (9,), (5, 1), (5, 9)])
def test_gemm(compile_model, make_model, constant, trans_a, trans_b, c_shape):
    a = data(7, 5) if trans_a else data(5, 7)
    b = data(9, 7, seed=1) if trans_b else data(7, 9, seed=1)
    c = None if c_shape is None else data(*c_shape, seed=2).reshape(c_shape)
    names = ["a", "b"] + ([] if c is None else ["c"])
    node = helper.make_node("Gemm", names, ["y"], alpha=0.5, beta=-2.0, transA=trans_a, transB=trans_b)
    inputs = {"a": (F, a.shape)} | ({} if constant else {"b": (F, b.shape)})
    inputs |= {} if c is None else {"c": (F, c.shape)}
    run = compile_model(make_model([node], inputs, {"y": F}, {"b": b} if constant else {}))
    given_arrays = [a] + ([] if constant else [b]) + ([] if c is None else [c])
    expected = 0.5 * (a.T if trans_a else a) @ (b.T if trans_b else b) + (0 if c is None else -2.0 * c)
    np.testing.assert_allclose(run(*given_arrays)[0], expected, rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused(compile_model, make_model):
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    model = make_model([node], {"a": (F, [2, 3, 4]), "b": (F, [3, 4, 5])}, {"y": F})
    with pytest.raises((UnsupportedModelError, Exception), match=r"broadcast|[Ii]ncompatible|[Dd]imension"):
        compile_model(model)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 40), constant=st.booleans())
def test_any_size_with_an_epilogue(compile_model, make_model, m, n, k, constant):
    a, b, r = data(m, k), data(k, n, seed=1), data(m, n, seed=2)
    nodes = [helper.make_node("MatMul", ["a", "b"], ["t"]), helper.make_node("Add", ["t", "r"], ["y"])]
    inputs = {"a": (F, a.shape), "r": (F, r.shape)} | ({} if constant else {"b": (F, b.shape)})
    run = compile_model(make_model(nodes, inputs, {"y": F}, {"b": b} if constant else {}))
    (y,) = run(*([a, r] if constant else [a, r, b]))
    np.testing.assert_allclose(y, a @ b + r, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("constant", [True, False])
def test_sums_of_nothing_are_zero(compile_model, make_model, constant):
    (y,) = compile_model(matmul_model(make_model, data(3, 0), data(0, 5), constant))(
        *([data(3, 0)] if constant else [data(3, 0), data(0, 5)])
    )
    np.testing.assert_array_equal(y, np.zeros((3, 5), F))
    weights = {"b": data(5, 0), "c": data(5)}
    inputs = {"a": (F, [3, 0])} | ({} if constant else {"b": (F, [5, 0])})
    node = helper.make_node("Gemm", ["a", "b", "c"], ["y"], transB=1)
    given = weights if constant else {"c": weights["c"]}
    (y,) = compile_model(make_model([node], inputs, {"y": F}, given))(*([data(3, 0), data(5, 0)][: len(inputs)]))
    np.testing.assert_array_equal(y, np.broadcast_to(weights["c"], (3, 5)))


def test_an_addend_of_unknown_size_broadcasts(compile_model, make_model):
    node = helper.make_node("Gemm", ["a", "b", "c"], ["y"])
    a, b = data(3, 4), data(4, 5, seed=1)
    run = compile_model(make_model([node], {"a": (F, ["m", 4]), "c": (F, ["p", "q"])}, {"y": F}, {"b": b}))
    for shape in ((1, 1), (3, 1), (1, 5), (3, 5)):
        c = data(*shape, seed=2)
        np.testing.assert_allclose(run(a, c)[0], a @ b + c, rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match="match"):
        run(a, data(3, 4))
