"""Conv, ConvTranspose and the integer convolutions against torch and onnxruntime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from tvm import te, tirx

from optc.backends.cpu.target import resolve, to_tvm
from optc.backends.kernels import border, convolution, packed_schedule

F = np.float32


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def reference(model, *inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], inputs, strict=True)))[0]


def model_of(make_model, op, shape, w, bias=True, after=(), constant=True, **attributes):
    channels = w.shape[0] if op == "Conv" else w.shape[1] * attributes.get("group", 1)
    constants = {"b": data(channels, seed=2)} if bias else {}
    constants |= {"w": w} if constant else {}
    node = helper.make_node(op, ["x", "w"] + (["b"] if bias else []), ["y0"], **attributes)
    nodes, last = [node], "y0"
    for i, activation in enumerate(after):
        nodes.append(helper.make_node(activation, [last], [f"y{i + 1}"]))
        last = f"y{i + 1}"
    inputs = {"x": (F, shape)} | ({} if constant else {"w": (F, w.shape)})
    return make_model(nodes, inputs, {last: F}, constants)


CASES = {
    "plain": ((2, 8, 9, 11), (20, 8, 3, 3), {"pads": [1, 1, 1, 1]}),
    "asymmetric": ((1, 3, 13, 9), (7, 3, 3, 2), {"pads": [0, 2, 1, 0], "strides": [2, 3], "dilations": [2, 1]}),
    "pointwise": ((2, 20, 7, 5), (33, 20, 1, 1), {}),
    "pointwise strided": ((2, 8, 7, 5), (12, 8, 1, 1), {"strides": [2, 2]}),
    "grouped": ((2, 8, 9, 9), (12, 4, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ((2, 6, 9, 11), (6, 1, 3, 3), {"group": 6, "pads": [1, 0, 1, 2]}),
    "depthwise strided": ((2, 6, 9, 21), (12, 1, 5, 3), {"group": 6, "strides": [1, 2], "pads": [2, 1, 2, 1]}),
    "depthwise narrow": ((1, 3, 6, 4), (3, 1, 3, 3), {"group": 3, "dilations": [2, 1]}),
    "same upper": ((1, 3, 10, 7), (5, 3, 3, 4), {"auto_pad": "SAME_UPPER", "strides": [3, 2]}),
    "same lower": ((1, 3, 10, 7), (5, 3, 3, 4), {"auto_pad": "SAME_LOWER", "strides": [3, 2]}),
    "valid": ((1, 3, 10, 7), (5, 3, 3, 4), {"auto_pad": "VALID"}),
    "1-D": ((2, 3, 17), (5, 3, 4), {"pads": [1, 2], "strides": [2]}),
    "3-D": ((1, 2, 5, 6, 7), (3, 2, 2, 3, 3), {"pads": [1, 0, 1, 0, 1, 0]}),
    "deep": ((1, 200, 7, 6), (18, 200, 3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    "deep pointwise": ((1, 900, 3, 5), (35, 900, 1, 1), {}),
    "empty batch": ((0, 3, 8, 8), (4, 3, 3, 3), {}),
}


@pytest.mark.parametrize("constant", [True, False], ids=["packed", "run-time"])
@pytest.mark.parametrize("case", CASES)
def test_conv(compile_model, make_model, case, constant):
    shape, filters, attributes = CASES[case]
    w, x = data(*filters, seed=1), data(*shape)
    model = model_of(make_model, "Conv", shape, w, constant=constant, **attributes)
    inputs = [x] if constant else [x, w]
    if shape[0] == 0:
        assert compile_model(model)(*inputs)[0].shape == (0, 4, 6, 6)
        return
    np.testing.assert_allclose(compile_model(model)(*inputs)[0], reference(model, *inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("filters, group", [((10, 4, 3, 3), 1), ((4, 1, 3, 3), 4), ((10, 4, 1, 1), 1)])
def test_symbolic_sizes_and_epilogue(compile_model, make_model, filters, group):
    w, pad = data(*filters, seed=1), filters[2] // 2
    attributes = {"pads": [pad] * 4, "group": group, "strides": [2, 2] if group > 1 else [1, 1]}
    model = model_of(make_model, "Conv", ["n", 4, "h", "w"], w, after=["Relu", "Exp"], **attributes)
    run = compile_model(model)
    for shape in [(1, 4, 5, 5), (2, 4, 16, 33), (3, 4, 3, 8)]:
        x = data(*shape)
        np.testing.assert_allclose(run(x)[0], reference(model, x), rtol=1e-4, atol=1e-4)


def test_residual_is_fused_and_right(compile_model, make_model):
    w = data(8, 8, 3, 3, seed=1) / 8
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["t"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["t", "x"], ["s"]),
        helper.make_node("Relu", ["s"], ["y"]),
    ]
    model = make_model(nodes, {"x": (F, [1, 8, 10, 10])}, {"y": F}, {"w": w})
    x = data(1, 8, 10, 10)
    np.testing.assert_allclose(compile_model(model)(x)[0], reference(model, x), rtol=1e-4, atol=1e-5)


def test_result_broadcast_by_its_consumer(compile_model, make_model):
    """Squeeze and excitation: a 1x1 result scales a whole map."""
    w = data(6, 6, 1, 1, seed=1)
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Conv", ["p", "w"], ["t"]),
        helper.make_node("Sigmoid", ["t"], ["s"]),
        helper.make_node("Mul", ["x", "s"], ["y"]),
    ]
    model = make_model(nodes, {"x": (F, ["n", 6, "h", "w"])}, {"y": F}, {"w": w})
    x = data(2, 6, 5, 7)
    np.testing.assert_allclose(compile_model(model)(x)[0], reference(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("constant", [True, False], ids=["packed", "run-time"])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        {"strides": [3, 2], "output_shape": [17, 14]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
        {"group": 2, "dilations": [2, 1], "pads": [0, 1, 1, 0]},
    ],
    ids=str,
)
def test_conv_transpose(compile_model, make_model, attributes, constant):
    w, shape = data(4, 5, 3, 3, seed=1), (2, 4, 6, 7)
    model = model_of(make_model, "ConvTranspose", shape, w, constant=constant, **attributes)
    inputs = [data(*shape)] if constant else [data(*shape), w]
    np.testing.assert_allclose(compile_model(model)(*inputs)[0], reference(model, *inputs), rtol=1e-4, atol=1e-4)


def test_conv_transpose_symbolic(compile_model, make_model):
    w = data(4, 5, 2, 2, seed=1)
    model = model_of(make_model, "ConvTranspose", ["n", 4, "h", "w"], w, strides=[2, 2], after=["Sigmoid"])
    run = compile_model(model)
    for shape in [(1, 4, 3, 5), (2, 4, 8, 8)]:
        np.testing.assert_allclose(run(data(*shape))[0], reference(model, data(*shape)), rtol=1e-4, atol=1e-5)


def quantized(seed, *shape, signed):
    rng = np.random.default_rng(seed)
    return rng.integers(-128, 128, shape).astype(np.int8) if signed else rng.integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("constant", [True, False], ids=["packed", "run-time"])
def test_conv_integer_is_exact(compile_model, make_model, constant):
    """torch in float64 is exact here; onnxruntime saturates uint8 x int8 without VNNI."""
    x, w = quantized(0, 2, 4, 6, 7, signed=False), quantized(1, 6, 2, 3, 3, signed=True)
    node = helper.make_node("ConvInteger", ["x", "w", "z"], ["y"], pads=[1, 1, 1, 1], group=2)
    inputs = {"x": (np.uint8, x.shape)} | ({} if constant else {"w": (np.int8, w.shape)})
    constants = {"z": np.array(7, np.uint8)} | ({"w": w} if constant else {})
    (y,) = compile_model(make_model([node], inputs, {"y": np.int32}, constants))(*([x] if constant else [x, w]))
    exact = torch.nn.functional.conv2d(
        torch.tensor(x.astype(np.float64) - 7), torch.tensor(w.astype(np.float64)), padding=1, groups=2
    )
    np.testing.assert_array_equal(y, exact.numpy())


def test_qlinear_conv_is_exact(compile_model, make_model):
    x, w = quantized(0, 2, 4, 6, 7, signed=False), quantized(1, 6, 4, 3, 3, signed=True)
    scales = (np.abs(data(6)) / 30 + 0.01).astype(F)
    bias = np.arange(6, dtype=np.int32) * 1000 - 2500
    constants = {
        "xs": np.float32(0.02), "xz": np.uint8(7), "w": w, "ws": scales, "wz": np.zeros(6, np.int8),
        "ys": np.float32(0.5), "yz": np.uint8(100), "b": bias,
    }  # fmt: skip
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"]
    node = helper.make_node("QLinearConv", names, ["y"], strides=[2, 1])
    constants = {k: np.asarray(v) for k, v in constants.items()}
    (y,) = compile_model(make_model([node], {"x": (np.uint8, x.shape)}, {"y": np.uint8}, constants))(x)
    total = torch.nn.functional.conv2d(
        torch.tensor(x.astype(np.float64) - 7), torch.tensor(w.astype(np.float64)),
        torch.tensor(bias.astype(np.float64)), stride=(2, 1),
    ).numpy()  # fmt: skip
    exact = np.clip(np.rint(total * (F(0.02) * scales / F(0.5)).reshape(1, -1, 1, 1)) + 100, 0, 255)
    np.testing.assert_array_equal(y, exact)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(4, 20), st.integers(4, 20)),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 14)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    depthwise=st.booleans(),
)
def test_any_geometry(compile_model, make_model, size, channels, kernel, strides, pads, depthwise):
    c, m = channels
    filters = (c, 1, *kernel) if depthwise else (m, c, *kernel)
    attributes = {"strides": list(strides), "pads": list(pads), "group": c if depthwise else 1}
    w, x = data(*filters, seed=1), data(1, c, *size)
    model = model_of(make_model, "Conv", x.shape, w, after=["Relu"], **attributes)
    np.testing.assert_allclose(compile_model(model)(x)[0], reference(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_padding_row_by_row(seed, last):
    rng = np.random.default_rng(seed)
    rank = 1 + seed % 3
    before, after = (rng.integers(0, 3, rank).tolist() for _ in range(2))
    spatial = rng.integers(1, 7, rank).tolist()
    channels = int(rng.choice([1, 3, 8]))
    shape = [2, *spatial, channels] if last else [2, channels, *spatial]
    a = te.placeholder(shape, "float32", "a")
    out = convolution.pad_rows(a, before, after, tirx.const(-1.5, "float32"), last=last)
    function = te.create_prim_func([a, out], "int64").with_attr("global_symbol", "main")
    x = rng.standard_normal(shape).astype(F)
    pads = list(zip(before, after, strict=True))
    want = np.pad(x, [(0, 0), *pads, (0, 0)] if last else [(0, 0), (0, 0), *pads], constant_values=-1.5)
    got = tvm.runtime.tensor(np.zeros_like(want))
    tvm.compile(function, target=to_tvm(resolve("cpu")))["main"](tvm.runtime.tensor(x), got)
    np.testing.assert_array_equal(got.numpy(), want)


DILATED = {
    "wide": ((1, 16, 12, 12), (20, 16, 3, 3), {"pads": [9, 9, 9, 9], "dilations": [9, 9]}),
    "wider than the image": ((1, 6, 7, 9), (20, 6, 3, 3), {"pads": [8, 8, 8, 8], "dilations": [8, 8]}),
    "two images": ((2, 6, 7, 5), (20, 6, 3, 3), {"pads": [5, 5, 5, 5], "dilations": [5, 5]}),
    "only behind": ((1, 6, 11, 9), (20, 6, 3, 2), {"pads": [0, 0, 11, 2], "dilations": [4, 1], "strides": [2, 1]}),
    "grouped": ((1, 8, 9, 9), (12, 4, 3, 3), {"group": 2, "pads": [6, 6, 6, 6], "dilations": [6, 6]}),
    "deep": ((1, 700, 6, 6), (18, 700, 3, 3), {"pads": [4, 4, 4, 4], "dilations": [4, 4]}),
    "3-D": ((1, 2, 5, 6, 7), (3, 2, 3, 3, 3), {"pads": [4, 0, 1, 4, 0, 1], "dilations": [4, 1, 1]}),
}


@pytest.mark.parametrize("case", DILATED)
def test_rows_of_zeros_are_not_multiplied(compile_model, make_model, monkeypatch, case):
    shape, filters, attributes = DILATED[case]
    found = []

    def told(*arguments):
        found.append(border.border_of(*arguments))
        return found[-1]

    monkeypatch.setattr(packed_schedule, "border_of", told)
    w, x = data(*filters, seed=1), data(*shape)
    model = model_of(make_model, "Conv", shape, w, after=["Relu"], **attributes)
    np.testing.assert_allclose(compile_model(model)(x)[0], reference(model, x), rtol=1e-4, atol=1e-4)
    assert any(found)


@settings(max_examples=200, deadline=None)
@given(
    before=st.integers(0, 12), size=st.integers(1, 9), after=st.integers(0, 12), stride=st.integers(1, 3),
    dilation=st.integers(1, 9), window=st.integers(2, 4), width=st.integers(1, 6), images=st.integers(1, 3),
    tile=st.integers(1, 9),
)  # fmt: skip
def test_rows_left_out_are_zeros(before, size, after, stride, dilation, window, width, images, tile):
    height = (before + size + after - (window - 1) * dilation - 1) // stride + 1
    if height < 1:
        return
    rows = border.Border(before, size, stride, dilation, window, height, width)
    pixels = np.arange(images * height * width)
    inside = (pixels // width % height)[:, None] * stride + np.arange(window) * dilation - before
    needed = (inside >= 0) & (inside < size)
    for first in range(0, len(pixels), tile):
        last = min(first + tile, len(pixels)) - 1
        low, high = rows.inside(first, last, min, max)
        assert low >= 0
        assert high <= window
        wanted = np.flatnonzero(needed[first : last + 1].any(axis=0))
        assert all(low <= k < high for k in wanted)
        if len(wanted) and first // width == last // width:
            assert high - low == wanted[-1] - wanted[0] + 1
