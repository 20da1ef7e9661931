"""ConvInteger and QLinearConv: equal to integer arithmetic to the last bit, and taken by their templates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve
from optc.backends.kernels import integer_depthwise
from optc.backends.kernels.integer_depthwise import Lines
from optc.frontend.onnx import load


def integers(rng, shape, dtype):
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max + 1, shape)
    extremes = rng.choice([info.min, info.max], shape)
    return np.where(rng.random(shape) < 0.3, extremes, values).astype(dtype)


def convolved(x, xz, w, wz, *, strides, dilations, pads, group):
    """The sum over kernel positions, in int64."""
    x, w = x.astype(np.int64) - int(xz), w.astype(np.int64) - np.asarray(wz, np.int64).reshape(-1, 1, 1, 1)
    x = np.pad(x, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    m, per_group, kh, kw = w.shape
    height = (x.shape[2] - (kh - 1) * dilations[0] - 1) // strides[0] + 1
    width = (x.shape[3] - (kw - 1) * dilations[1] - 1) // strides[1] + 1
    y = np.zeros((x.shape[0], m, height, width), np.int64)
    split = x.reshape(x.shape[0], group, per_group, *x.shape[2:])
    filters = w.reshape(group, m // group, per_group, kh, kw)
    for i in range(kh):
        for j in range(kw):
            top, left = i * dilations[0], j * dilations[1]
            part = split[
                ..., top : top + height * strides[0] : strides[0], left : left + width * strides[1] : strides[1]
            ]
            part = part[..., :height, :width]
            y += np.einsum("ngchw,gmc->ngmhw", part, filters[..., i, j]).reshape(y.shape)
    assert np.abs(y).max(initial=0) < 2**31
    return y.astype(np.int32)


def rules(model):
    kernels = CpuBackend(resolve("cpu")).schedule(load(model)).kernels
    return [kernel.rule for kernel in kernels if "integer" in kernel.name]


SIDE = st.integers(1, 3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(7, 20), st.integers(7, 20)),
    kernel=st.tuples(SIDE, SIDE),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    group=st.sampled_from([1, 1, 2, "depthwise"]),
    channels=st.integers(1, 20),
    maps=st.integers(1, 20),
    dtype=st.sampled_from([np.uint8, np.int8]),
    seed=st.integers(0, 9),
)
def test_any_window(
    compile_model, make_model, size, kernel, strides, dilations, pads, group, channels, maps, dtype, seed
):
    rng = np.random.default_rng(seed)
    group = channels if group == "depthwise" else group
    x = integers(rng, (2, channels if group == channels else channels * group, *size), dtype)
    per_group = x.shape[1] // group
    w = integers(rng, (maps * group, per_group, *kernel), np.int8)
    xz = integers(rng, (), dtype)
    geometry = {"strides": strides, "dilations": dilations, "pads": pads, "group": group}
    node = helper.make_node("ConvInteger", ["x", "w", "xz"], ["y"], **geometry)
    model = make_model([node], {"x": (dtype, x.shape)}, {"y": np.int32}, {"w": w, "xz": xz})
    np.testing.assert_array_equal(compile_model(model)(x)[0], convolved(x, xz, w, 0, **geometry))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 70)),
    kernel=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilations=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    channels=st.integers(4, 90),
    dtype=st.sampled_from([np.uint8, np.int8]),
    target=st.sampled_from(["cpu", "x86-64-v3:l1=4K", "x86-64-v2", "x86-64-v2:l1=4K"]),
    seed=st.integers(0, 9),
)
def test_any_depthwise_window(
    compile_model, make_model, size, kernel, strides, dilations, pads, channels, dtype, target, seed
):
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    assume(all(n + a + b >= r for n, a, b, r in zip(size, pads[:2], pads[2:], reach, strict=True)))
    rng = np.random.default_rng(seed)
    x, w = integers(rng, (2, channels, *size), dtype), integers(rng, (channels, 1, *kernel), np.int8)
    xz = integers(rng, (), dtype)
    geometry = {"strides": strides, "dilations": dilations, "pads": pads, "group": channels}
    node = helper.make_node("ConvInteger", ["x", "w", "xz"], ["y"], **geometry)
    model = make_model([node], {"x": (dtype, x.shape)}, {"y": np.int32}, {"w": w, "xz": xz})
    np.testing.assert_array_equal(compile_model(model, target)(x)[0], convolved(x, xz, w, 0, **geometry))


@pytest.mark.parametrize(
    ("channels", "maps", "kernel", "rule"),
    [
        (32, 32, [3, 3], "integer_depthwise"),
        (17, 17, [5], "integer_depthwise"),
        (3, 3, [3, 3], "window"),
        (16, 32, [3, 3], "window"),
    ],
)
def test_schedule_of_depthwise_convolution(compile_model, make_model, channels, maps, kernel, rule):
    rng = np.random.default_rng(4)
    x, w = integers(rng, (1, channels, *[6] * len(kernel)), np.uint8), integers(rng, (maps, 1, *kernel), np.int8)
    node = helper.make_node("ConvInteger", ["x", "w", "xz"], ["y"], group=channels)
    model = make_model([node], {"x": (np.uint8, x.shape)}, {"y": np.int32}, {"w": w, "xz": np.uint8(7)})
    assert rules(model) == [rule]
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.int64) - 7, kernel, range(2, x.ndim))
    expected = np.einsum(
        "nc...k,cmk->nmc...", windows.reshape(*windows.shape[: x.ndim], -1), w.reshape(channels, -1, w[0].size)
    )
    y = np.moveaxis(expected, 1, 2).reshape(1, maps, *expected.shape[3:])
    np.testing.assert_array_equal(compile_model(model)(x)[0], y)


def test_depthwise_weights_beyond_16_bits_are_refused():
    with pytest.raises(OverflowError, match="16 bits"):
        integer_depthwise.pack(np.full((8, 3, 3), 1 << 15), Lines(3, 1, 1, 2))


@pytest.mark.parametrize(
    ("channels", "maps", "kernel", "size"),
    [(64, 48, 3, 14), (3, 40, 7, 33), (2050, 16, 1, 7), (512, 32, 3, 7), (700, 16, 3, 5), (32, 16, 1, 30)],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_deep_and_wide(compile_model, make_model, channels, maps, kernel, size, stride):
    rng = np.random.default_rng(channels)
    x, w = integers(rng, (1, channels, size, size), np.uint8), integers(rng, (maps, channels, kernel, kernel), np.int8)
    pad = kernel // 2
    geometry = {"strides": [stride] * 2, "dilations": [1, 1], "pads": [pad] * 4, "group": 1}
    node = helper.make_node("ConvInteger", ["x", "w", "xz"], ["y"], **geometry)
    model = make_model([node], {"x": (np.uint8, x.shape)}, {"y": np.int32}, {"w": w, "xz": np.uint8(117)})
    np.testing.assert_array_equal(compile_model(model)(x)[0], convolved(x, 117, w, 0, **geometry))
    assert rules(model) == ["integer_contraction"]


@pytest.mark.parametrize("group", [1, 24])
@pytest.mark.parametrize("target", ["cpu", "x86-64-v2:l1=4K"])
def test_open_sizes(compile_model, make_model, group, target):
    rng = np.random.default_rng(1)
    w = integers(rng, (24, 24 // group, 3, 3), np.int8)
    geometry = {"strides": [2, 1], "dilations": [1, 1], "pads": [1, 1, 1, 1], "group": group}
    node = helper.make_node("ConvInteger", ["x", "w", "xz"], ["y"], **geometry)
    model = make_model([node], {"x": (np.int8, ["n", 24, "h", "w"])}, {"y": np.int32}, {"w": w, "xz": np.int8(-128)})
    run = compile_model(model, target)
    for shape in [(1, 24, 9, 30), (3, 24, 1, 1), (2, 24, 5, 64)]:
        x = integers(rng, shape, np.int8)
        np.testing.assert_array_equal(run(x)[0], convolved(x, -128, w, 0, **geometry))


@pytest.mark.parametrize("zeros", [0, 128])
def test_requantization_is_one_kernel(compile_model, make_model, zeros):
    rng = np.random.default_rng(2)
    x, w = integers(rng, (1, 16, 9, 9), np.uint8), integers(rng, (32, 16, 3, 3), np.uint8 if zeros else np.int8)
    bias = rng.integers(-9999, 9999, 32).astype(np.int32)
    sw = rng.uniform(0.001, 0.01, 32).astype(np.float32)
    constants = {
        "xs": np.float32(0.02),
        "xz": np.uint8(3),
        "w": w,
        "ws": sw,
        "wz": np.full(32, zeros, w.dtype),
        "ys": np.float32(0.6),
        "yz": np.uint8(100),
        "b": bias,
    }
    node = helper.make_node(
        "QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["y"], pads=[1, 1, 1, 1]
    )
    model = make_model(
        [node], {"x": (np.uint8, x.shape)}, {"y": np.uint8}, {k: np.asarray(v) for k, v in constants.items()}
    )
    total = convolved(x, 3, w, constants["wz"], strides=[1, 1], dilations=[1, 1], pads=[1, 1, 1, 1], group=1)
    total = (total + bias.reshape(-1, 1, 1)).astype(np.float32)
    factor = (constants["xs"] * sw / constants["ys"]).reshape(-1, 1, 1)
    expected = np.clip(np.rint(total * factor) + 100, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(compile_model(model)(x)[0], expected)
    assert rules(model) == ["integer_contraction"]


def test_one_spatial_axis(compile_model, make_model):
    rng = np.random.default_rng(3)
    x, w = integers(rng, (2, 5, 40), np.uint8), integers(rng, (7, 5, 3), np.int8)
    node = helper.make_node("ConvInteger", ["x", "w", "xz"], ["y"], pads=[1, 1], strides=[2])
    model = make_model([node], {"x": (np.uint8, x.shape)}, {"y": np.int32}, {"w": w, "xz": np.uint8(9)})
    geometry = {"strides": [1, 2], "dilations": [1, 1], "pads": [0, 1, 0, 1], "group": 1}
    expected = convolved(x[:, :, None], 9, w[:, :, None], 0, **geometry)[:, :, 0]
    np.testing.assert_array_equal(compile_model(model)(x)[0], expected)
