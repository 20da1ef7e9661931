"""Kernels that read an operand across its rows: any permutation, size and type, whatever is fused around it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve
from optc.frontend.onnx import load

SIZE = st.sampled_from([1, 2, 7, 8, 16, 17, 31, 40])


def rules(model, target="cpu"):
    return [kernel.rule for kernel in CpuBackend(resolve(target)).schedule(load(model)).kernels]


def values(shape, dtype):
    return (np.arange(np.prod(shape)) * 37 % 251).reshape(shape).astype(dtype)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(SIZE, min_size=2, max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([np.float32, np.int32, np.float64, np.uint8, np.int8, np.int16, np.int64, np.bool_]),
    named=st.booleans(),
    target=st.sampled_from(["cpu", "nehalem"]),
)
def test_any_permutation(compile_model, make_model, shape, order, dtype, named, target):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    x = values(shape, dtype)
    node = helper.make_node("Transpose", ["x"], ["y"], perm=axes)
    sizes = [f"d{i}" for i in range(len(shape))] if named else shape
    run = compile_model(make_model([node], {"x": (dtype, sizes)}, {"y": dtype}), target)
    np.testing.assert_array_equal(run(x)[0], x.transpose(axes))


@pytest.mark.parametrize("sizes", [(37, 50), (64, 16), (8, 200)])
def test_what_is_fused_goes_along(compile_model, make_model, sizes):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(sizes, np.float32), rng.standard_normal(sizes[::-1], np.float32)
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("Transpose", ["a"], ["t"], perm=[1, 0]),
        helper.make_node("Add", ["t", "y"], ["z"]),
    ]
    model = make_model(nodes, {"x": (np.float32, sizes), "y": (np.float32, sizes[::-1])}, {"z": np.float32})
    assert rules(model) == ["turned"]
    np.testing.assert_array_equal(compile_model(model)(x, y)[0], np.abs(x).T + y)


def test_an_operand_read_both_ways_is_left_alone(compile_model, make_model):
    x = values((19, 19), np.float32)
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("Add", ["t", "x"], ["y"]),
    ]
    model = make_model(nodes, {"x": (np.float32, x.shape)}, {"y": np.float32})
    assert rules(model) == ["generic"]
    np.testing.assert_array_equal(compile_model(model)(x)[0], x.T + x)


def test_rows_that_stay_rows_are_left_alone(make_model):
    node = helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0, 2])
    assert rules(make_model([node], {"x": (np.float32, [5, 6, 7])}, {"y": np.float32})) == ["generic"]


@pytest.mark.parametrize("target", ["x86-64-v4", "aarch64", "riscv64"])
def test_other_targets_compile(make_model, target):
    node = helper.make_node("Transpose", ["x"], ["y"], perm=[0, 2, 1])
    model = make_model([node], {"x": (np.float32, ["n", 35, 50])}, {"y": np.float32})
    assert rules(model, target) == ["turned"]
    assert len(CpuBackend(resolve(target)).build(load(model)).code) > 0


@pytest.mark.parametrize("channels", [16, 24])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_images_turned_for_convolution(compile_model, make_model, channels, kernel):
    rng = np.random.default_rng(kernel)
    x = rng.standard_normal((2, channels, 11, 13), np.float32)
    w = rng.standard_normal((300, channels, kernel, kernel), np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 1])
    run = compile_model(make_model([node], {"x": (np.float32, x.shape)}, {"y": np.float32}, {"w": w}))
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (kernel, kernel), (2, 3))[:, :, ::2]
    expected = np.einsum("ncyxij,mcij->nmyx", windows, w.astype(np.float64))
    np.testing.assert_allclose(run(x)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["cpu", "nehalem"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint16])
@pytest.mark.parametrize("sizes", [(32, 80), (50, 33), (16, 7)])
def test_short_integers(compile_model, make_model, sizes, dtype, target):
    x = values((2, *sizes), dtype)
    node = helper.make_node("Transpose", ["x"], ["y"], perm=[0, 2, 1])
    run = compile_model(make_model([node], {"x": (dtype, x.shape)}, {"y": dtype}), target)
    np.testing.assert_array_equal(run(x)[0], x.transpose(0, 2, 1))
