"""Reductions, ArgMax/ArgMin, softmax, running sums, against NumPy in float64."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest
import tvm
from onnx import helper
from tvm import te, tirx

from optc.backends.kernels import reduction

REFERENCE = {
    "ReduceSum": np.sum,
    "ReduceMean": np.mean,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
    "ReduceL1": lambda x, **k: np.sum(np.abs(x), **k),
    "ReduceL2": lambda x, **k: np.sqrt(np.sum(x * x, **k)),
    "ReduceLogSum": lambda x, **k: np.log(np.sum(x, **k)),
    "ReduceLogSumExp": lambda x, **k: np.log(np.sum(np.exp(x), **k)),
    "ReduceSumSquare": lambda x, **k: np.sum(x * x, **k),
}


@pytest.fixture(scope="module")
def reductions(compile_model, make_model):
    """Every reduction of one input in one model."""

    def build(shape, axes, keepdims=1, dtype=np.float32, names=tuple(REFERENCE), at_run=False):
        inputs = ["x"] if axes is None else ["x", "axes"]
        nodes = [helper.make_node(op, inputs, [op], keepdims=keepdims) for op in names]
        arguments, constants = {"x": (dtype, shape)}, {}
        if at_run:
            arguments["axes"] = (np.int64, [len(axes)])
        elif axes is not None:
            constants["axes"] = np.array(axes, np.int64)
        return compile_model(make_model(nodes, arguments, dict.fromkeys(names, dtype), constants))

    return build


def check(results, x, axes, keepdims, rtol=1e-6):
    axis = None if axes is None else tuple(axes)
    for (op, reference), got in zip(REFERENCE.items(), results, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = reference(x.astype(np.float64), axis=axis, keepdims=bool(keepdims))
        assert got.shape == np.shape(want), op
        np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-7, err_msg=op)


@pytest.mark.parametrize(
    ("shape", "axes", "keepdims"),
    [
        ((3, 5, 200), [-1], 1),  # lanes and a rest
        ((3, 64, 5), [1], 0),
        ((2, 7, 9, 13), [2, 3], 0),  # trailing axes merged
        ((4, 3, 6), [0, 2], 1),
        ((5, 130), None, 1),
    ],
)
def test_static_shapes(reductions, shape, axes, keepdims):
    x = np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(np.float32)
    check(reductions(shape, axes, keepdims)(x), x, axes, keepdims, rtol=3e-6)


def test_symbolic_shapes(reductions):
    run = reductions(["b", "n"], [1], 0)
    for n in (1, 31, 32, 33, 64, 100, 257):
        x = np.random.default_rng(n).uniform(0.5, 1.2, (3, n)).astype(np.float32)
        check(run(x), x, [1], 0, rtol=1e-5)


@pytest.mark.parametrize("keepdims", [0, 1])
def test_axes_known_at_run_time(reductions, keepdims):
    names = ["ReduceMean", "ReduceMax"]
    run = reductions((3, 4, 5), [0, 1], keepdims, names=names, at_run=True)
    x = np.random.default_rng(1).uniform(0.5, 1.5, (3, 4, 5)).astype(np.float32)
    for axes in ([0, 1], [-1, 0], [1, 2]):
        for op, got in zip(names, run(x, np.array(axes, np.int64)), strict=True):
            want = REFERENCE[op](x, axis=tuple(axes), keepdims=bool(keepdims))
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 0, 3), ("a", "n", "c")])
def test_empty_axis_gives_the_identity(reductions, shape):
    names = [op for op in REFERENCE if op != "ReduceMean"]
    results = reductions(shape, [1], 0, names=names)(np.zeros((2, 0, 3), np.float32))
    expected = [0, -np.inf, np.inf, 1, 0, 0, -np.inf, -np.inf, 0]
    for op, got, want in zip(names, results, expected, strict=True):
        np.testing.assert_array_equal(got, np.full((2, 3), want, np.float32), err_msg=op)


@pytest.mark.parametrize("contiguous", [False, True])
def test_empty_reduction_without_a_schedule(contiguous):
    length = tirx.Var("n", "int64")
    a = te.placeholder((3, length), "float32")
    total = reduction.reduce(
        reduction.addition("float32"), lambda i, k: a(*i, *k), [3], [length], contiguous=contiguous
    )
    kernel = tvm.compile(tvm.IRModule({"main": te.create_prim_func([a, total], "int64")}), target="llvm")
    result = tvm.runtime.tensor(np.full(3, 7, np.float32))
    kernel["main"](tvm.runtime.tensor(np.zeros((3, 0), np.float32)), result)
    np.testing.assert_array_equal(result.numpy(), [0, 0, 0])


def test_noop_with_empty_axes(compile_model, make_model):
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["same"], noop_with_empty_axes=1),
        helper.make_node("ReduceSumSquare", ["x"], ["square"], noop_with_empty_axes=1),
    ]
    run = compile_model(make_model(nodes, {"x": (np.float32, [3])}, {"same": np.float32, "square": np.float32}))
    x = np.array([1, -2, 3], np.float32)
    same, square = run(x)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(square, x * x)


def test_large_and_special_values(reductions):
    names = ["ReduceMax", "ReduceMin", "ReduceLogSumExp"]
    x = np.zeros((4, 70), np.float32)
    x[0, 3], x[1, 69] = np.nan, 1000.0
    x[2] = -np.inf
    x[3, 40] = np.inf
    largest, smallest, total = reductions((4, 70), [1], 0, names=names)(x)
    np.testing.assert_array_equal(largest, [np.nan, 1000, -np.inf, np.inf])
    np.testing.assert_array_equal(smallest, [np.nan, 0, -np.inf, 0])
    np.testing.assert_allclose(total, [np.nan, 1000, -np.inf, np.inf])


def test_long_rows_keep_their_precision(reductions):
    x = np.random.default_rng(2).uniform(0, 1, (2, 100_000)).astype(np.float32)
    (got,) = reductions((2, 100_000), [1], 0, names=["ReduceMean"])(x)
    np.testing.assert_allclose(got, x.astype(np.float64).mean(1), rtol=5e-6)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint64, np.float64, np.float16, ml_dtypes.bfloat16])
def test_dtypes(reductions, dtype):
    names = ["ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"]
    x = np.random.default_rng(3).integers(1, 4, (3, 6)).astype(dtype)
    for op, got in zip(names, reductions((3, 6), [1], 1, dtype, names)(x), strict=True):
        want = REFERENCE[op](x.astype(np.float64), axis=1, keepdims=True)
        np.testing.assert_array_equal(got.astype(np.float64), want.astype(dtype).astype(np.float64), err_msg=op)


def test_boolean_extremes(compile_model, make_model):
    nodes = [helper.make_node(op, ["x", "axes"], [op], keepdims=0) for op in ("ReduceMax", "ReduceMin")]
    outputs = dict.fromkeys(["ReduceMax", "ReduceMin"], np.bool_)
    run = compile_model(make_model(nodes, {"x": (np.bool_, ["n", "m"])}, outputs, {"axes": np.array([1])}))
    x = np.array([[True, False], [False, False], [True, True]])
    for got, want in zip(run(x), [x.max(1), x.min(1)], strict=True):
        np.testing.assert_array_equal(got, want)
    for got, want in zip(run(np.zeros((2, 0), bool)), [False, True], strict=True):
        np.testing.assert_array_equal(got, [want, want])


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(4, 3, 70), ("a", "b", "c")])
def test_arg_extremes(compile_model, make_model, axis, shape):
    nodes, outputs = [], {}
    for op in ("ArgMax", "ArgMin"):
        for last in (0, 1):
            name = f"{op}{last}"
            attributes = {"axis": axis, "keepdims": last, "select_last_index": last}
            nodes.append(helper.make_node(op, ["x"], [name], **attributes))
            outputs[name] = np.int64
    run = compile_model(make_model(nodes, {"x": (np.float32, shape)}, outputs))
    x = np.random.default_rng(4).integers(0, 3, (4, 3, 70)).astype(np.float32)
    x[1, 2, 5] = x[1, 2, 9] = np.nan
    x[0] = -np.inf
    results = run(x)
    for function, first, last in ((np.argmax, *results[:2]), (np.argmin, *results[2:])):
        np.testing.assert_array_equal(first, function(x, axis))
        flipped = x.shape[axis] - 1 - function(np.flip(x, axis), axis, keepdims=True)
        np.testing.assert_array_equal(last, flipped)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(5, 6, 128), ("a", "b", "c")])
def test_softmax_family(compile_model, make_model, axis, shape):
    names = ["Softmax", "LogSoftmax", "Hardmax"]
    nodes = [helper.make_node(op, ["x"], [op], axis=axis) for op in names]
    run = compile_model(make_model(nodes, {"x": (np.float32, shape)}, dict.fromkeys(names, np.float32)))
    for last in (128, 128 if shape[2] == 128 else 77):
        x = np.random.default_rng(5).uniform(-40, 90, (5, 6, last)).astype(np.float32)
        x[0, 1, :3] = -np.inf
        softmax, logarithm, hardmax = run(x)
        # Rounding the difference to float32 alone costs up to 130 * 6e-8.
        shifted = (x - x.max(axis, keepdims=True)).astype(np.float64)
        total = np.exp(shifted).sum(axis, keepdims=True)
        np.testing.assert_allclose(softmax, np.exp(shifted) / total, rtol=1e-6, atol=1e-37)
        np.testing.assert_allclose(logarithm, shifted - np.log(total), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(hardmax.argmax(axis), x.argmax(axis))
        np.testing.assert_array_equal(hardmax.sum(axis), np.ones_like(hardmax.sum(axis)))


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("at_run", [False, True])
def test_cumulative_sum(compile_model, make_model, exclusive, reverse, at_run):
    node = helper.make_node("CumSum", ["x", "axis"], ["y"], exclusive=exclusive, reverse=reverse)
    inputs = {"x": (np.float32, ["n", 3, "m"])}
    constants = {} if at_run else {"axis": np.array(-1, np.int64)}
    if at_run:
        inputs["axis"] = (np.int64, [])
    run = compile_model(make_model([node], inputs, {"y": np.float32}, constants))
    x = np.random.default_rng(6).integers(-9, 9, (2, 3, 4)).astype(np.float32)
    for axis in (0, 1, -1) if at_run else (-1,):
        turned = np.flip(x, axis) if reverse else x
        total = np.cumsum(turned, axis)
        total = total - turned if exclusive else total
        got = run(x, *([np.array(axis, np.int64)] if at_run else []))[0]
        np.testing.assert_array_equal(got, np.flip(total, axis) if reverse else total)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64", "float64", "int32"])
def test_rows_of_unknown_length_of_every_type(compile_model, make_model, dtype):
    """Stages of such a kernel are functions that share scratch memory: LLVM must not take it for apart."""
    nodes = [
        helper.make_node("ReduceMax", ["x", "axis"], ["top"], keepdims=0),
        helper.make_node("ArgMin", ["x"], ["where"], axis=-1, keepdims=0),
    ]
    outputs = {"top": dtype, "where": np.int64}
    if dtype not in ("int8", "uint8"):
        nodes.append(helper.make_node("ReduceSum", ["x", "axis"], ["sum"], keepdims=0))
        outputs["sum"] = dtype
    run = compile_model(make_model(nodes, {"x": (dtype, [13, "n"])}, outputs, {"axis": np.array([1])}))
    for n in (5, 40, 100):
        x = np.random.default_rng(n).integers(0, 99, (13, n)).astype(dtype)
        top, where, *total = run(x)
        np.testing.assert_array_equal(top, x.max(1))
        np.testing.assert_array_equal(where, x.argmin(1))
        for found in total:
            np.testing.assert_array_equal(found, x.sum(1))
