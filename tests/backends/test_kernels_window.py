"""Depthwise convolution and pooling: borders on both sides, small images, and blocks of channels."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from optc import driver
from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve
from optc.backends.kernels.decisions import deciding
from optc.backends.kernels.schedule import schedule_kernel

F = np.float32


def reference(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("target", ["cpu", "nehalem"])
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "dilation", "pads"),
    [
        (200, (9, 28), 7, 1, 1, (3, 3, 3, 3)),
        (40, (7, 7), 7, 1, 1, (3, 3, 3, 3)),
        (130, (8, 9), 5, 2, 1, (2, 2, 2, 2)),
        (96, (12, 12), 3, 1, 2, (2, 2, 2, 2)),
        (100, (5, 30), 3, 2, 1, (0, 0, 1, 1)),
        (16, (3, 2), 3, 1, 1, (1, 1, 1, 1)),
        (72, (4, 6), 5, 1, 3, (6, 6, 6, 6)),
        (20, (4, 5), 1, 1, 1, (0, 0, 0, 1)),
        (8, (4, 4), 2, 1, 1, (0, 3, 2, 3)),
        (50, (9, 40), 9, 3, 1, (4, 8, 0, 3)),
        (24, (110, 100), 3, 1, 1, (1, 1, 1, 1)),
        (72, (90, 60), 3, 2, 1, (1, 0, 0, 1)),
    ],
)
def test_depthwise(compile_model, make_model, target, channels, size, kernel, stride, dilation, pads):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, channels, *size), F), rng.standard_normal((channels, 1, kernel, kernel), F)
    attributes = {"strides": [stride] * 2, "dilations": [dilation] * 2, "pads": pads, "group": channels}
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)
    constants = {"w": w, "b": rng.standard_normal(channels, F)}
    model = make_model([node], {"x": (F, x.shape)}, {"y": F}, constants, opset=21)
    np.testing.assert_allclose(compile_model(model, target)(x)[0], reference(model, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "size", "kernel", "block"),
    [
        (24, 112, 3, 24),  # far, and not whole lines: pixel after pixel
        (64, 112, 5, 64),  # far and narrow
        (72, 112, 5, 16),  # far, but what larger windows read stays in the first-level cache
        (112, 28, 5, 16),  # near: 32 would compute 128
        (128, 28, 3, 64),  # near: the largest that repeats nothing
    ],
)
def test_how_many_channels_are_taken_at_a_time(make_model, channels, size, kernel, block):
    w = np.ones((channels, 1, kernel, kernel), F)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[kernel // 2] * 4, group=channels)
    model = make_model([node], {"x": (F, (1, channels, size, size))}, {"y": F}, {"w": w}, opset=21)
    target = resolve("znver3")  # caches of 32 and 512 KB
    module, _ = CpuBackend(target).fuse(driver.optimize(model, portable=False))
    (function,) = [f for var, f in module.functions.items() if "depthwise" in str(var.name_hint)]
    with deciding({}) as space:
        schedule_kernel(function, target)
    assert space.taken["block"] == block


@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"), [((6, 31), 3, 2, 1), ((5, 5), 5, 1, 2), ((9, 12), 2, 2, 0)]
)
def test_pooling(compile_model, make_model, operator, size, kernel, stride, pads):
    x = np.random.default_rng(0).standard_normal((2, 150, *size), F)
    node = helper.make_node(operator, ["x"], ["y"], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pads] * 4)
    model = make_model([node], {"x": (F, x.shape)}, {"y": F}, opset=21)
    np.testing.assert_allclose(compile_model(model)(x)[0], reference(model, x), rtol=1e-6, atol=1e-6)


def test_no_rows(compile_model, make_model):
    x = np.zeros((0, 600, 8, 30), F)
    node = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3])
    assert compile_model(make_model([node], {"x": (F, x.shape)}, {"y": F}))(x)[0].shape == (0, 600, 6, 28)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("height", [1, 4, 19, 40])
def test_blocks_of_channels_where_only_the_run_knows_the_rows(compile_model, make_model, batch, height):
    rng = np.random.default_rng(0)
    channels = 600
    x, w = rng.standard_normal((batch, channels, height, 30), F), rng.standard_normal((channels, 1, 3, 3), F)
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1] * 4, group=channels)
    model = make_model([node], {"x": (F, ["n", channels, "h", 30])}, {"y": F}, {"w": w}, opset=21)
    actual = compile_model(model)(x)[0]
    expected = reference(model, x) if batch else np.zeros((0, channels, (height + 1) // 2, 15), F)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)
