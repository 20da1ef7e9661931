"""QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear: bit-exact against NumPy and onnxruntime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from optc.errors import UnsupportedModelError


def quantized(x, scale, zero, dtype):
    info = np.iinfo(dtype)
    return np.clip(np.rint(x / scale) + zero, info.min, info.max).astype(dtype)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
def test_round_trip_per_tensor(compile_model, make_model, dtype):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    scale, zero = np.array(0.03, np.float32), np.array(11, dtype)
    outputs = {"q": dtype, "y": np.float32}
    run = compile_model(make_model(nodes, {"x": (np.float32, ["n", 3])}, outputs, {"s": scale, "z": zero}))
    x = np.random.default_rng(0).uniform(-2000, 2000, (400, 3)).astype(np.float32)
    x[:2] = [[1e30, -1e30, np.inf], [-np.inf, 0.045, -0.015]]
    q, y = run(x)
    want = quantized(x, scale, int(zero), dtype)
    np.testing.assert_array_equal(q, want)
    np.testing.assert_array_equal(y, (want.astype(np.float32) - np.float32(zero)) * scale)


def test_halves_round_to_even(compile_model, make_model):
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=3)
    run = compile_model(make_model([node], {"x": (np.float32, [8])}, {"q": np.int8}, {"s": np.array(2.0, np.float32)}))
    x = np.array([1, 3, 5, -1, -3, -5, 255, -257], np.float32)
    np.testing.assert_array_equal(run(x)[0], [0, 2, 2, 0, -2, -2, 127, -128])


@pytest.mark.parametrize("known", [True, False])
def test_per_axis(compile_model, make_model, known):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=1),
    ]
    scale, zero = np.array([0.1, 0.5, 2.0], np.float32), np.array([0, 100, 255], np.uint8)
    inputs = {"x": (np.float32, [2, 3, "w"])}
    constants = {"s": scale, "z": zero} if known else {}
    if not known:
        inputs |= {"s": (np.float32, ["c"]), "z": (np.uint8, ["c"])}
    run = compile_model(make_model(nodes, inputs, {"q": np.uint8, "y": np.float32}, constants))
    x = np.random.default_rng(1).uniform(-50, 50, (2, 3, 9)).astype(np.float32)
    q, y = run(x, *([] if known else [scale, zero]))
    want = quantized(x, scale[:, None], zero[:, None].astype(int), np.uint8)
    np.testing.assert_array_equal(q, want)
    np.testing.assert_array_equal(y, (want.astype(np.float32) - zero[:, None]) * scale[:, None])


def test_length_of_the_scale_is_checked_at_run_time(compile_model, make_model):
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["q"], axis=0, output_dtype=2)
    inputs = {"x": (np.float32, ["n", 2]), "s": (np.float32, ["m"])}
    run = compile_model(make_model([node], inputs, {"q": np.uint8}))
    x = np.array([[1, 2], [3, 4]], np.float32)
    np.testing.assert_array_equal(run(x, np.array([1, 2], np.float32))[0], [[1, 2], [2, 2]])
    with pytest.raises(Exception, match=r"[Mm]ismatch"):
        run(x, np.array([1, 2, 3], np.float32))


@pytest.mark.parametrize("block", [2, 3])
def test_blocked(compile_model, make_model, block):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1, block_size=block),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=1, block_size=block),
    ]
    rng = np.random.default_rng(2)
    blocks = -(-6 // block)
    scale = rng.uniform(0.1, 1, (2, blocks, 4)).astype(np.float32)
    zero = rng.integers(-20, 20, (2, blocks, 4)).astype(np.int8)
    outputs = {"q": np.int8, "y": np.float32}
    run = compile_model(make_model(nodes, {"x": (np.float32, [2, 6, 4])}, outputs, {"s": scale, "z": zero}))
    x = rng.uniform(-30, 30, (2, 6, 4)).astype(np.float32)
    q, y = run(x)
    s, z = (np.repeat(a, block, 1)[:, :6] for a in (scale, zero))
    want = quantized(x, s, z.astype(int), np.int8)
    np.testing.assert_array_equal(q, want)
    np.testing.assert_array_equal(y, (want.astype(np.float32) - z) * s)


def test_dequantize_int32_and_half_scales(compile_model, make_model):
    nodes = [
        helper.make_node("DequantizeLinear", ["a", "s"], ["y"]),
        helper.make_node("DequantizeLinear", ["b", "h"], ["half"]),
    ]
    constants = {"s": np.array(0.5, np.float32), "h": np.array(0.25, np.float16)}
    inputs = {"a": (np.int32, [3]), "b": (np.int8, [3])}
    run = compile_model(make_model(nodes, inputs, {"y": np.float32, "half": np.float16}, constants))
    a, b = np.array([-(2**31), 7, 2**24], np.int32), np.array([-128, 1, 127], np.int8)
    y, half = run(a, b)
    np.testing.assert_array_equal(y, a * np.float32(0.5))
    np.testing.assert_array_equal(half, b * np.float16(0.25))


def test_dynamic_quantization(compile_model, make_model):
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])
    outputs = {"y": np.uint8, "scale": np.float32, "zero": np.uint8}
    model = make_model([node], {"x": (np.float32, ["n", "m"])}, outputs)
    run, session = compile_model(model), onnxruntime.InferenceSession(model.SerializeToString())
    rng = np.random.default_rng(3)
    cases = [rng.uniform(-3, 5, (7, 50)), rng.uniform(1, 5, (3, 4)), -rng.uniform(1, 5, (2, 40)), np.zeros((2, 2))]
    for x in cases:
        x = x.astype(np.float32)
        for got, want in zip(run(x), session.run(None, {"x": x}), strict=True):
            np.testing.assert_array_equal(got, want)


def test_scale_that_does_not_fit_is_refused(compile_model, make_model):
    node = helper.make_node("DequantizeLinear", ["x", "s"], ["y"], axis=1, name="dq")
    model = make_model([node], {"x": (np.int8, [2, 3])}, {"y": np.float32}, {"s": np.ones(4, np.float32)})
    with pytest.raises(UnsupportedModelError, match=r"dq.*does not fit"):
        compile_model(model)
