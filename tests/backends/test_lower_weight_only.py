"""Dequantized constants: what stays packed in the artifact, which kernels read it, and their numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve
from optc.backends.kernels.weight_only import CHAIN
from optc.errors import UnsupportedModelError
from optc.frontend.onnx import load
from optc.passes import pipeline

F = np.float32
RANGES = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}


def integers(rng, kind, shape):
    dtype = getattr(ml_dtypes, kind) if kind.endswith("t4") else np.dtype(kind)
    return rng.integers(*RANGES[kind], shape).astype(dtype)


def dequantize(values, scale, zero, axis, block):
    """Compute DequantizeLinear in float64: blocks, an axis, or one number."""
    values, scale, zero = (np.asarray(x).astype(np.float64) for x in (values, scale, zero))
    if block:
        scale, zero = (np.repeat(x, block, axis=axis).take(range(values.shape[axis]), axis) for x in (scale, zero))
    elif scale.ndim:
        along = [1] * values.ndim
        along[axis] = -1
        scale, zero = scale.reshape(along), zero.reshape(along)
    return (values - zero) * scale


class Weight:
    """A random quantized matrix, and the constants and node that stand for it."""

    def __init__(self, shape, kind, *, axis=1, block=0, scales="axis", zeros=True, seed=0):
        rng = np.random.default_rng(seed)
        self.shape = shape
        size = (shape[axis],)
        if block:
            size = tuple(-(-d // block) if i == axis else d for i, d in enumerate(shape))
        elif scales == "tensor":
            size = ()
        self.values = integers(rng, kind, shape)
        self.scale = rng.uniform(0.01, 0.05, size).astype(F)
        self.zero = integers(rng, kind, size) if zeros else None
        self.axis, self.block = axis, block
        zero = np.zeros(size) if self.zero is None else self.zero.astype(np.float64)
        self.floats = dequantize(self.values, self.scale, zero, axis, block)
        middle = 128.0 if kind == "uint8" else 8.0 if kind == "int4" else 0.0
        # What the kernel adds up: integers and zero points as it stores them.
        stored = np.abs(self.values.astype(np.float64)) + middle
        self.magnitudes = dequantize(stored, self.scale, -np.abs(zero) - middle, axis, block)

    def nodes(self):
        names = ["q", "s", *([] if self.zero is None else ["z"])]
        return [helper.make_node("DequantizeLinear", names, ["w"], axis=self.axis, block_size=self.block)]

    def model(self, nodes, inputs, output=F):
        def info(name, dtype, shape):
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

        arrays = {"q": self.values, "s": self.scale} | ({} if self.zero is None else {"z": self.zero})
        graph = helper.make_graph(
            [*self.nodes(), *nodes],
            "g",
            [info(name, dtype, shape) for name, (dtype, shape) in inputs.items()],
            [info("y", output, None)],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def rules(model):
    """Return the schedules of all kernels, and the bytes of all weights."""
    canonical = load(model)
    pipeline.run(canonical)
    module = CpuBackend(resolve("x86-64-v3")).schedule(canonical)
    return [k.rule for k in module.kernels], sum(w.nbytes for w in module.lowered.weights.values())


def data(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"])


@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_products(compile_model, data):
    kind = data.draw(st.sampled_from(sorted(RANGES)), "kind")
    k, n = data.draw(st.integers(1, 300), "depth"), data.draw(st.integers(1, 60), "columns")
    form = data.draw(st.sampled_from(["tensor", "column", "block"]), "form")
    block = data.draw(st.sampled_from([16, 32, 64, 128, 256]), "block") if form == "block" else 0
    transposed = data.draw(st.booleans(), "transposed")
    rows = data.draw(st.sampled_from([1, 2, 5, 17, "m"]), "rows")
    axis = (0 if block else 1) if not transposed else (1 if block else 0)
    weight = Weight(
        (n, k) if transposed else (k, n),
        kind,
        axis=axis,
        block=block,
        scales="tensor" if form == "tensor" else "axis",
        zeros=data.draw(st.booleans(), "zeros"),
    )
    gemm = helper.make_node("Gemm", ["x", "w", "c"], ["y"], transB=int(transposed), alpha=0.5)
    run = compile_model(weight.model([gemm], {"x": (F, [rows, k]), "c": (F, [n])}))
    floats, magnitudes = (x.T if transposed else x for x in (weight.floats, weight.magnitudes))
    for m in [1, 3, 20] if rows == "m" else [rows]:
        rng = np.random.default_rng(m)
        x, c = rng.standard_normal((m, k)).astype(F), rng.standard_normal(n).astype(F)
        (y,) = run(x, c)
        terms = CHAIN + 6 + -(-k // min(block or k, CHAIN)) + -(-k // CHAIN)
        bound = terms * 2.0**-24 * (0.5 * (np.abs(x) @ magnitudes) + np.abs(c))
        assert (np.abs(y - (0.5 * (x.astype(np.float64) @ floats) + c)) <= bound).all()


@pytest.mark.parametrize(("kind", "bits"), [("int4", 4), ("uint4", 4), ("int8", 8), ("uint8", 8)])
def test_weights_stay_packed(kind, bits):
    weight = Weight((256, 96), kind, axis=0, block=32, zeros=kind.startswith("u"))
    for rows in (1, 40, "m"):
        schedules, size = rules(weight.model([MATMUL], {"x": (F, [rows, 256])}))
        assert schedules == ["weight_only"]
        scales = 8 * 96 * 4 + (8 * 96 if kind.startswith("u") else 0)
        assert size == 256 * 96 * bits // 8 + scales


def test_batches_and_vectors(compile_model):
    weight = Weight((40, 20), "int4", axis=0, block=32)
    x = data(2, 3, 40)
    (y,) = compile_model(weight.model([MATMUL], {"x": (F, [2, 3, 40])}))(x)
    np.testing.assert_allclose(y, x @ weight.floats, rtol=1e-5, atol=1e-5)
    (y,) = compile_model(weight.model([MATMUL], {"x": (F, [40])}))(x[0, 0])
    np.testing.assert_allclose(y, x[0, 0] @ weight.floats, rtol=1e-5, atol=1e-5)


def test_half_precision_is_summed_in_float32(compile_model):
    weight = Weight((100, 20), "int4", axis=0, block=32)
    weight.scale = weight.scale.astype(np.float16)
    weight.floats = dequantize(weight.values, weight.scale, weight.zero, 0, 32)
    x = data(1, 100).astype(np.float16)
    (y,) = compile_model(weight.model([MATMUL], {"x": (np.float16, [1, 100])}, np.float16))(x)
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.floats, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["int4", "uint4", "int8"])
@pytest.mark.parametrize("columns", [48, 45])
def test_gather_reads_only_its_rows(compile_model, kind, columns):
    weight = Weight((30, columns), kind, axis=1, block=16)
    node = helper.make_node("Gather", ["w", "i"], ["y"])
    model = weight.model([node], {"i": (np.int64, [2, 2])})
    schedules, size = rules(model)
    assert len(schedules) == 1
    assert size <= 30 * (-(-columns // (2 if kind.endswith("t4") else 1)) + 3 * 5)
    i = np.array([[3, -1], [0, 29]])
    (y,) = compile_model(model)(i)
    np.testing.assert_allclose(y, weight.floats[i], rtol=1e-6)


def test_a_table_shared_by_gather_and_a_transposed_product(compile_model):
    weight = Weight((50, 32), "int4", axis=1, block=16)
    nodes = [
        helper.make_node("Gather", ["w", "i"], ["x"]),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    model = weight.model(nodes, {"i": (np.int64, [2])})
    schedules, _ = rules(model)
    assert sorted(schedules) == ["generic", "weight_only"]
    (y,) = compile_model(model)(np.array([7, 49]))
    np.testing.assert_allclose(y, weight.floats[[7, 49]] @ weight.floats.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("axis", "block"), [(0, 0), (0, 12), (1, 16)])
def test_other_forms_are_dequantized_while_compiling(compile_model, axis, block):
    """Scales that vary within a word, or along the depth, are no business of the packed kernel."""
    weight = Weight((60, 32), "int4", axis=axis, block=block)
    x = data(3, 60)
    model = weight.model([MATMUL], {"x": (F, [3, 60])})
    assert rules(model)[0] == ["contraction"]
    (y,) = compile_model(model)(x)
    np.testing.assert_allclose(y, x @ weight.floats, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("axis", "block"), [(0, 0), (1, 4)])
@pytest.mark.parametrize("kind", ["uint4", "int8"])
def test_filters_are_dequantized_while_compiling(compile_model, kind, axis, block):
    weight = Weight((24, 16, 3, 3), kind, axis=axis, block=block)
    x = np.random.default_rng(1).standard_normal((1, 16, 9, 8)).astype(F)
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1])
    model = weight.model([node], {"x": (F, x.shape)})
    schedules, _ = rules(model)
    assert "contraction" in schedules
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2]
    expected = np.einsum("ncyxij,mcij->nmyx", windows, weight.floats)
    np.testing.assert_allclose(compile_model(model)(x)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [7, 111, 301])
@pytest.mark.parametrize("kind", ["uint4", "int8"])
def test_one_row_of_a_size_that_the_run_decides(compile_model, kind, depth):
    weight = Weight((depth, 2), kind, axis=0, block=512)
    run = compile_model(weight.model([MATMUL], {"x": (F, ["m", depth])}))
    for rows in (1, 2):
        x = data(rows, depth)
        np.testing.assert_allclose(run(x)[0], x @ weight.floats, rtol=1e-4, atol=1e-3)


def test_infinities_and_nans_are_not_hidden(compile_model):
    weight = Weight((64, 16), "int4", axis=0, block=32)
    x = data(2, 64)
    x[0, 5], x[1, 40] = np.inf, np.nan
    for rows in (2, "m"):
        (y,) = compile_model(weight.model([MATMUL], {"x": (F, [rows, 64])}))(x)
        assert not np.isfinite(y).any()


def test_four_bits_that_are_no_constants_are_refused():
    weight = Weight((8, 4), "int4", axis=0, block=0, scales="tensor", zeros=False)
    model = weight.model([helper.make_node("Identity", ["w"], ["y"])], {})
    model.graph.initializer.pop(0)
    model.graph.input.append(helper.make_tensor_value_info("q", onnx.TensorProto.INT4, [8, 4]))
    canonical = load(model)
    with pytest.raises(UnsupportedModelError, match="INT4"):
        CpuBackend(resolve("x86-64-v3")).supported(canonical)


def test_scales_that_do_not_fit_are_refused():
    weight = Weight((64, 4), "int4", axis=0, block=32)
    weight.scale, weight.zero = weight.scale[:1], None
    with pytest.raises(UnsupportedModelError, match="scale of shape"):
        CpuBackend(resolve("x86-64-v3")).supported(load(weight.model([MATMUL], {"x": (F, [1, 64])})))
