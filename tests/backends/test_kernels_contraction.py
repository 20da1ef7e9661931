"""The contraction and depthwise schedules: that they take what they should, decline the rest, and stay right."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from tvm import te, tirx

from optc.backends.base import Target
from optc.backends.cpu.single import aligned
from optc.backends.kernels import contraction, contraction_schedule, convolution, loops, threads, window
from optc.backends.kernels.fused import take_apart

F = np.float32
TARGETS = {
    "avx2": Target("x86-64-v3", "cpu", "x86_64-linux-gnu", "x86-64-v3", (), 256, False),
    "sse": Target("x86-64-v2", "cpu", "x86_64-linux-gnu", "x86-64-v2", (), 128, False),
}


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def call(function, *arrays):
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    library = tvm.compile(function.with_attr("global_symbol", "main"), target=target)
    tensors = [aligned(a) for a in arrays]
    library["main"](*tensors)
    return tensors[-1].numpy()


def matmul_function(m, k, n, epilogue=lambda acc: acc):
    a = te.placeholder((m, k), "float32", "a")
    b = te.placeholder((-(-n // 16), k, 16), "float32", "b")
    return te.create_prim_func([a, b, epilogue(contraction.packed_matmul(a, b, n))], "int64")


def test_packing_pads_with_zeros():
    w = data(5, 20)
    packed = contraction.pack_columns(w, 16)
    assert packed.shape == (2, 5, 16)
    np.testing.assert_array_equal(packed.transpose(1, 0, 2).reshape(5, 32)[:, :20], w)
    assert not packed[1, :, 4:].any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "m, k, n", [(1, 1, 1), (6, 8, 16), (13, 40, 50), (7, 5, 3), (120, 33, 96), (37, 1601, 50), (9, 769, 16)]
)
def test_packed_matmul(target, m, k, n):
    scheduled = contraction_schedule.schedule(matmul_function(m, k, n), TARGETS[target])
    assert scheduled is not None
    a, w = data(m, k), data(k, n, seed=1)
    got = call(scheduled, a, contraction.pack_columns(w, 16), np.zeros((m, n), F))
    np.testing.assert_allclose(got, a @ w, rtol=1e-4, atol=1e-5 * np.sqrt(k))


@pytest.mark.parametrize("columns", [16, 96])
def test_rows_of_the_run_make_chunks(columns):
    m = tirx.Var("m", "int64")
    scheduled = contraction_schedule.schedule(matmul_function(m, 600, columns), TARGETS["avx2"])
    w = data(600, columns, seed=1)
    for rows in (0, 1, 6, 13, 95, 97, 577):
        a = data(rows, 600)
        got = call(scheduled, a, contraction.pack_columns(w, 16), np.zeros((rows, columns), F))
        np.testing.assert_allclose(got, a @ w, rtol=1e-4, atol=1e-5 * np.sqrt(600))


@pytest.mark.parametrize("m, k, n, least", [(40, 2880, 16, 4), (40, 2880, 64, 4), (200, 2880, 16, 8), (40, 64, 16, 1)])
def test_work_is_shared_among_threads(m, k, n, least):
    """Of a few rows too, where there are no columns to share: products of 40 rows are those of short texts."""
    scheduled = contraction_schedule.schedule(matmul_function(m, k, n), TARGETS["avx2"])
    (tasks,) = (int(f.extent) for f in loops.collect(scheduled.body, tirx.For) if threads.is_parallel(f))
    assert tasks >= least
    assert tasks <= 8


def test_the_epilogue_runs_on_the_tile():
    def epilogue(acc):
        return te.compute(acc.shape, lambda i, j: tirx.max(acc(i, j), tirx.const(0, "float32")), "relu")

    function = matmul_function(13, 9, 20, epilogue)
    fused = take_apart(function, contraction.TEMPLATE)
    assert fused is not None and fused.tail is None
    a, w = data(13, 9), data(9, 20, seed=1)
    scheduled = contraction_schedule.schedule(function, TARGETS["avx2"])
    got = call(scheduled, a, contraction.pack_columns(w, 16), np.zeros((13, 20), F))
    np.testing.assert_allclose(got, np.maximum(a @ w, 0), rtol=1e-4, atol=1e-5)


def test_a_larger_last_stage_gets_loops_of_its_own():
    """Zeros appended behind the result read it at the same indices, but the stage is larger."""

    def epilogue(acc):
        m, n = acc.shape
        zero = tirx.const(0, "float32")
        return te.compute((m + 2, n), lambda i, j: tirx.if_then_else(i < m, acc(i, j), zero), "append")

    function = matmul_function(6, 9, 20, epilogue)
    fused = take_apart(function, contraction.TEMPLATE)
    assert fused is not None and fused.tail is not None
    a, w = data(6, 9), data(9, 20, seed=1)
    scheduled = contraction_schedule.schedule(function, TARGETS["avx2"])
    got = call(scheduled, a, contraction.pack_columns(w, 16), np.ones((8, 20), F))
    np.testing.assert_allclose(got, np.pad(a @ w, [(0, 2), (0, 0)]), rtol=1e-4, atol=1e-5)


def test_other_functions_are_declined():
    a = te.placeholder((4, 4), "float32", "a")
    plain = te.create_prim_func([a, te.compute((4, 4), lambda i, j: a[i, j] + 1.0)], "int64")
    assert contraction_schedule.schedule(plain, TARGETS["avx2"]) is None
    assert window.schedule(plain, TARGETS["avx2"]) is None
    k = te.reduce_axis((0, 4), "k")
    largest = te.compute((4,), lambda i: te.max(a[i, k], axis=k), "matmul", attrs=contraction.annotate([0], []))
    assert contraction_schedule.schedule(te.create_prim_func([a, largest], "int64"), TARGETS["avx2"]) is None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("channels", [1, 5, 8, 19])
@pytest.mark.parametrize("width", [1, 3, 7, 8, 21])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_of_any_width(target, channels, width, stride):
    size = (width - 1) * stride + 1
    x = te.placeholder((1, 5, size, channels), "float32", "x")
    w = te.placeholder((3, 3, channels), "float32", "w")
    out = convolution.depthwise(x, w, strides=[1, stride], dilations=[1, 1], before=[1, 1], out=[5, width])
    scheduled = window.schedule(te.create_prim_func([x, w, out], "int64"), TARGETS[target])
    assert scheduled is not None
    image, weights = data(1, 5, size, channels), data(3, 3, channels, seed=1)
    got = call(scheduled, image, weights, np.zeros((1, 5, width, channels), F))
    padded = np.pad(image, [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, :, ::stride]
    np.testing.assert_allclose(got, np.einsum("nhwcij,ijc->nhwc", windows, weights), rtol=1e-4, atol=1e-5)


def test_accumulators_stay_in_registers():
    """What a partial tile copies to memory must not keep the accumulators of whole tiles there."""
    m, n = te.var("m", "int64"), 96
    a, b = te.placeholder((m, 64), "float32", "a"), te.placeholder((n // 16, 64, 16), "float32", "b")
    function = te.create_prim_func([a, b, contraction.packed_matmul(a, b, n)], "int64")
    scheduled = contraction_schedule.schedule(function, TARGETS["avx2"])
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    assembly = tvm.compile(scheduled.with_attr("global_symbol", "main"), target=target).mod.inspect_source("asm")
    loops = [block for block in re.split(r"\n(?=\.LBB)", assembly) if "vfmadd" in block]
    assert loops
    for block in loops:
        body = block[: block.index("\n\tj", block.rindex("vfmadd"))]
        assert body.count("vfmadd") == 12
        assert "%ymm" in body and not any("vmov" in line and line.rstrip().endswith(")") for line in body.splitlines())
